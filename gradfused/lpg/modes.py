"""The modes of ``LPGCrossEntropyLoss``: which classes are amplified or dampened, from class counts or from statistics."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .options import checked_amounts, per_class

MODES = ("balanced", "longtail", "noisy")


def longtail(samples: Any, classes: int) -> Tensor:
    """Return (C,) in [-1, 1]: for each class, from class counts, its sign times its share of the radius.

    Classes are ranked by count. Those below the middle of the ranking are amplified, those above it dampened, in
    proportion to the distance of their rank from the middle: the rarest and the most frequent by the whole radius. Equal
    counts share their mean rank, so balanced data are left alone.

    Raises:
        ValueError: The shape is not (C,), or a count is negative or not finite.
    """
    given = per_class("counts", samples, classes, default_dtype=torch.float64)
    counts = checked_amounts("counts", given.double().cpu())
    _, group, size = counts.unique(return_inverse=True, return_counts=True)
    rank = size.cumsum(0) - (size.double() + 1) / 2  # from 0, in ascending order of counts
    middle = (classes - 1) / 2
    share: Tensor = (middle - rank[group]) / max(middle, 0.5)
    return share.float()


def balanced(confidence: Tensor, seen: Tensor) -> Tensor:
    """Return (C,) signs: 1 for a confidence below the mean over the classes seen, -1 above it, 0 for unseen classes."""
    mean = torch.where(seen, confidence, 0).sum() / seen.sum()
    return torch.where(seen, (mean - confidence).sign(), 0)


def noisy(confidence: Tensor, norm: Tensor, seen: Tensor, smoothing: float) -> Tensor:
    """Return (C,) signs: -1 where a class's mean gradient norm is high for its confidence, else 0.

    Among all gradients with own-class probability q, the shortest one has the remaining probability spread evenly over
    the other classes. Its norm is ``|t - q| * sqrt(C / (C - 1))``, where t is the target's probability. A class exceeds
    this norm by putting probability on few wrong classes, which marks samples that the model contradicts. Classes whose
    excess is above the mean over the classes seen are dampened.
    """
    classes = len(confidence)
    own = 1 - smoothing + smoothing / classes
    excess = norm - (own - confidence).abs() * math.sqrt(classes / (classes - 1))
    mean = torch.where(seen, excess, 0).sum() / seen.sum()
    return torch.where(seen & (excess > mean), -1.0, torch.zeros_like(norm))
