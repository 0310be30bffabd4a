"""Which classes LPG amplifies and which it dampens: sign and bound of each, from counts or from what a batch showed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .function import per_class

MODES = ("balanced", "longtail", "noisy")


def longtail(samples: Any, classes: int) -> Tensor:
    """(C,) in [-1, 1]: the sign of each class's direction times its share of the radius, from class counts.

    Classes are ranked by count; the split is the middle of the ranking. Classes rarer than that are amplified, more
    frequent ones dampened, each by its rank's distance from the split: the rarest and the most frequent by the whole
    radius. Equal counts share their mean rank, so balanced data are left alone.

    Raises:
        ValueError: The shape is not (C,), or a count is negative or not finite.
    """
    counts = per_class("counts", samples, classes, default_dtype=torch.float64).double().cpu()
    if not (counts.isfinite() & (counts >= 0)).all():
        bad = int((~(counts.isfinite() & (counts >= 0))).nonzero()[0])
        raise ValueError(f"counts: expected finite values of 0 or more, got {counts[bad].item()} for class {bad}")
    _, group, size = counts.unique(return_inverse=True, return_counts=True)
    rank = size.cumsum(0) - (size.double() + 1) / 2  # of the ascending counts, from 0
    middle = (classes - 1) / 2
    share: Tensor = (middle - rank[group]) / max(middle, 0.5)
    return share.float()


def balanced(confidence: Tensor, seen: Tensor) -> Tensor:
    """(C,) signs: 1 where a class's confidence is below the mean of the classes seen, -1 above, 0 if never seen."""
    mean = torch.where(seen, confidence, 0).sum() / seen.sum()
    return torch.where(seen, (mean - confidence).sign(), 0)


def noisy(confidence: Tensor, norm: Tensor, seen: Tensor, smoothing: float) -> Tensor:
    """(C,) signs: -1 where a class's mean gradient norm is high for its confidence, else 0.

    Of all gradients with own-class probability q, the shortest has the rest spread evenly over the other classes:
    ``|t - q| * sqrt(C / (C - 1))``, t being the target's share. What a class has beyond that is probability put on few
    wrong classes: the mark of samples that the model contradicts. Classes are dampened where that excess is above the
    mean of the classes seen.
    """
    classes = len(confidence)
    own = 1 - smoothing + smoothing / classes
    excess = norm - (own - confidence).abs() * math.sqrt(classes / (classes - 1))
    mean = torch.where(seen, excess, 0).sum() / seen.sum()
    return torch.where(seen & (excess > mean), -1.0, torch.zeros_like(norm))
