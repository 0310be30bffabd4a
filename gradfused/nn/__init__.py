"""Layers and losses that change gradients before the optimizer sees them."""

from .reversal import GradientReversal, ReversalLinear, grad_reverse, reversal_linear
from .schedule import DANNSchedule

__all__ = ["DANNSchedule", "GradientReversal", "ReversalLinear", "grad_reverse", "reversal_linear"]
