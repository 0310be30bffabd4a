"""Optimizers: torch.optim's under its names and signatures, and others after their papers."""

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .adan import Adan
from .base import Optimizer as Optimizer
from .lamb import LAMB
from .lars import LARS
from .lion import Lion
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["LAMB", "LARS", "SGD", "Adagrad", "Adam", "AdamW", "Adan", "Lion", "NAdam", "RAdam", "RMSprop"]
