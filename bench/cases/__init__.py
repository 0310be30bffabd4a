"""What is measured: the cases, each one optimizer step or one function on tensors of a real size."""

from .functions import FunctionCase, FunctionPeer, Run, Size, Tensors, TimedFunction, gradients
from .models import MODELS, ModelShapes, Shape
from .names import CROSS_ENTROPY, FUSED_PLAIN, NO_REVERSAL, OURS, ROOF, YARDSTICKS, is_ours
from .peer import Peer, needs
from .recipes import NOISE_DECAY, RECIPES, SEED, StepRecipe
from .rules import RULES, UpdateRule
from .steps import CPU, StepCase, bytes_needed, sets_needed
from .workload import Slab, Workload, make_sets, workload_of

Case = StepCase | FunctionCase

__all__ = [
    "CPU",
    "CROSS_ENTROPY",
    "FUSED_PLAIN",
    "MODELS",
    "NOISE_DECAY",
    "NO_REVERSAL",
    "OURS",
    "RECIPES",
    "ROOF",
    "RULES",
    "SEED",
    "YARDSTICKS",
    "Case",
    "FunctionCase",
    "FunctionPeer",
    "ModelShapes",
    "Peer",
    "Run",
    "Shape",
    "Size",
    "Slab",
    "StepCase",
    "StepRecipe",
    "Tensors",
    "TimedFunction",
    "UpdateRule",
    "Workload",
    "bytes_needed",
    "gradients",
    "is_ours",
    "make_sets",
    "needs",
    "sets_needed",
    "workload_of",
]
