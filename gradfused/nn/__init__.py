"""Layers and losses that change gradients before the optimizer sees them."""

from ..lpg import PGD, LPGCrossEntropyLoss, lpg_cross_entropy
from .reversal import GradientReversal, ReversalLinear, grad_reverse, reversal_linear
from .schedule import DANNSchedule

__all__ = [
    "PGD",
    "DANNSchedule",
    "GradientReversal",
    "LPGCrossEntropyLoss",
    "ReversalLinear",
    "grad_reverse",
    "lpg_cross_entropy",
    "reversal_linear",
]
