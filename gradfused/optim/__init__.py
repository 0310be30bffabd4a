"""Optimizers with torch.optim's names and signatures."""

from .adam import Adam
from .adamw import AdamW
from .base import Optimizer
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "Optimizer"]
