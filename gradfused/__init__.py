"""Optimizers that centralise, clip, perturb, add noise to and reverse gradients inside the step, in one pass over memory."""

from . import nn
from ._version import __version__
from .optim import LAMB, LARS, SGD, Adagrad, Adam, AdamW, Adan, Lion, NAdam, RAdam, RMSprop
from .optim.sam import SAM, frozen_statistics
from .step.options import Recipe

__all__ = [
    "LAMB",
    "LARS",
    "SAM",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adan",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Recipe",
    "__version__",
    "frozen_statistics",
    "nn",
]
