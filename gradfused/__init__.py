"""Optimizers that centralise, clip, perturb, add noise to and reverse gradients within the step, in one pass over memory."""

from . import nn, optim
from ._version import __version__
from .optim import *  # noqa: F403
from .optim.sam import SAM, frozen_statistics
from .step.schema import Recipe

__all__ = ["SAM", "Recipe", "__version__", "frozen_statistics", "nn"]
__all__ += optim.__all__
