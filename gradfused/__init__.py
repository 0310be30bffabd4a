"""Optimizers that centralise, clip, perturb, add noise to and reverse gradients inside the step, in one pass over memory."""

from . import nn
from ._version import __version__
from .optim import SGD, Adam, AdamW

__all__ = ["SGD", "Adam", "AdamW", "__version__", "nn"]
