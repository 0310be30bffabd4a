"""Cross-entropy with perturbed logit gradients (LPG) as a function and as a module; ``gradfused.nn`` has the same names."""

from .function import lpg_cross_entropy
from .module import LPGCrossEntropyLoss
from .options import PGD

__all__ = ["PGD", "LPGCrossEntropyLoss", "lpg_cross_entropy"]
