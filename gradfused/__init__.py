"""Optimizers that centralise, clip, perturb, add noise to and reverse gradients inside the step, in one pass over memory."""

from ._version import __version__
from .optim import LAMB, LARS, SGD, Adagrad, Adam, AdamW, Adan, Lion, NAdam, RAdam, RMSprop

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adan",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "__version__",
]
