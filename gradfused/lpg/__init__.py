"""Cross-entropy whose backward perturbs the logit gradients class by class (LPG), as a function and as a module."""

from .function import PGD, lpg_cross_entropy
from .module import LPGCrossEntropyLoss

__all__ = ["PGD", "LPGCrossEntropyLoss", "lpg_cross_entropy"]
