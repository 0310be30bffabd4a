"""LPG cross-entropy as a module that decides, from class counts or statistics, which classes to amplify or dampen."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..step.options import number, whole
from .function import Call, choose, signed_bound
from .options import (
    PGD,
    Options,
    check_inputs,
    checked_amounts,
    checked_radius,
    checked_sign,
    checked_weight,
    class_count,
    per_class,
)
from .problem import Kernels, Measured, Perturbation, Problem

#: Momentum is refused where the mean gradients of the classes, (C, C) in float32, would take more bytes than this.
MOST_BYTES = 2**31
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


class LPGCrossEntropyLoss(nn.Module):
    """Cross-entropy whose backward perturbs the logit gradients of each class within a radius (arXiv 2605.29494).

    The value is that of ``nn.CrossEntropyLoss``. In training mode, each call first updates the statistics of the classes
    from its own batch. It then decides by ``mode`` which classes to amplify (their mean logit gradient is made as long as
    the radius allows) and which to dampen. In evaluation mode, and where no gradients are recorded, it is plain
    cross-entropy and the statistics stay as they are. A batch with a logit of nan or +inf does not enter the statistics.

    Args:
        num_classes: C, 2 or more.
        radius: The bound on the perturbation of ``softmax - target distribution``: a number for all classes, or (C,).
        mode: ``"balanced"``: classes whose own-class confidence is below the mean over the classes are amplified, those
            above it dampened. ``"longtail"``: by ``counts``, rare classes are amplified and frequent ones dampened,
            within the radius times the distance of their rank from the middle, in [0, 1]. ``"noisy"``: classes whose
            gradient norm is high for their confidence are dampened.
        counts: (C,) numbers of samples in the whole training set; required by ``"longtail"``, refused otherwise.
        sign: (C,) of -1, 0 and 1: fixed signs in place of a mode.
        scope, solver, backend: As in ``lpg_cross_entropy``.
        momentum: In [0, 1), for moving averages of the statistics and of the classes' mean gradients: ``m * old + (1 -
            m) * batch`` for the classes in a batch. The first batch of a class counts whole. 0 uses the batch alone; more
            than 0 keeps (C, C) float32.
        weight, label_smoothing, ignore_index, reduction: As in ``nn.CrossEntropyLoss``.
        sync: Add up statistics over the default process group at each training call: (3, C) float64, and (C, C) with
            momentum. Without momentum each process uses its own mean gradients. Every process must make every call.

    Shape:
        As ``nn.CrossEntropyLoss`` with class indices: logits (N, C), (N, C, d1, ...) or (C,); C from 2 to 256k.

    Attributes:
        confidence: (C,) mean own-class probability of each class.
        gradient_norm: (C,) mean norm of each class's logit gradients.
        seen: (C,) int64: number of samples so far.
        mean_gradient: (C, C) moving averages of the classes' mean logit gradients; None without momentum.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, arguments exclude each other, or momentum would take more than 2 GiB.
    """

    confidence: Tensor
    gradient_norm: Tensor
    seen: Tensor
    mean_gradient: Tensor | None
    weight: Tensor | None
    _sign: Tensor | None
    _radius: Tensor | None

    def __init__(
        self,
        num_classes: int,
        radius: float | Tensor = 0.1,
        mode: str = "balanced",
        counts: Any = None,
        sign: Any = None,
        scope: str = "class",
        solver: str | PGD = "closed_form",
        momentum: float = 0.0,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        *,
        sync: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes = whole("num_classes", num_classes, 2)
        self.mode, self.sync = mode, bool(sync)
        self.momentum = number("momentum", momentum, 0.0, 1.0, high_open=True)
        self.options = Options(scope, label_smoothing, ignore_index, reduction, solver, backend)
        self._check_options(counts, sign)
        bounds = checked_radius(radius, num_classes)
        self.radius: float | None = None if isinstance(bounds, Tensor) else bounds
        self.register_buffer("_radius", bounds if isinstance(bounds, Tensor) else None, persistent=False)
        self.register_buffer("_sign", self._fixed_sign(counts, sign), persistent=False)
        self.register_buffer("weight", None if weight is None else per_class("weight", weight, num_classes))
        self.register_buffer("confidence", torch.zeros(num_classes, dtype=torch.float32, device=None))
        self.register_buffer("gradient_norm", torch.zeros(num_classes, dtype=torch.float32, device=None))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.int64, device=None))
        kept = self.momentum > 0 and scope == "class"
        means = torch.zeros(num_classes, num_classes, dtype=torch.float32, device=None) if kept else None
        self.register_buffer("mean_gradient", means)

    def _check_options(self, counts: Any, sign: Any) -> None:
        """Raise for options that exclude each other."""
        classes = self.num_classes
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(map(repr, MODES))}, got {self.mode!r}")
        if sign is not None and counts is not None:
            raise ValueError(
                "sign and counts: expected one of them; sign fixes the classes, counts let 'longtail' choose"
            )
        if sign is None and (counts is None) == (self.mode == "longtail"):
            problem = "needs counts, (C,): samples a class" if counts is None else "takes no counts; 'longtail' does"
            raise ValueError(f"mode={self.mode!r} {problem}")
        if sign is None and self.mode == "noisy" and classes == 2:
            raise ValueError(
                "mode='noisy' needs 3 classes or more: with two, a gradient's norm follows from its confidence; give sign"
            )
        size = 4 * classes * classes
        if self.momentum > 0 and self.options.scope == "class" and size > MOST_BYTES:
            raise ValueError(
                f"momentum={self.momentum:g} keeps class-mean gradients of ({classes}, {classes}) float32, {size:,} bytes, "
                f"more than {MOST_BYTES:,}; use momentum=0, which needs none, or scope='sample'"
            )

    def _fixed_sign(self, counts: Any, sign: Any) -> Tensor | None:
        if sign is not None:
            return checked_sign(sign, self.num_classes).float()
        return longtail(counts, self.num_classes) if self.mode == "longtail" else None

    def signs(self) -> Tensor:
        """(C,): the sign of each class's perturbation by the present statistics; in ``"longtail"`` times its share."""
        if self._sign is not None:
            return self._sign
        if self.mode == "noisy":
            smoothing = self.options.label_smoothing
            return noisy(self.confidence.float(), self.gradient_norm.float(), self._known(), smoothing)
        return balanced(self.confidence.float(), self._known())

    def _known(self) -> Tensor:
        """(C,): whether a class has statistics. Those of a checkpoint may be nan, which does not count."""
        return (self.seen > 0) & self.confidence.isfinite() & self.gradient_norm.isfinite()

    @_disable_dynamo
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the loss, in the logits' dtype (float32 under autocast)."""
        check_inputs(logits, target)
        if class_count(logits) != self.num_classes:
            raise ValueError(
                f"logits: expected {self.num_classes} classes (num_classes), got {class_count(logits)} in {tuple(logits.shape)}"
            )
        if self.seen.device != logits.device:
            raise ValueError(
                f"LPGCrossEntropyLoss is on {self.seen.device}, logits on {logits.device}; move it with .to()"
            )
        training = self.training and torch.is_grad_enabled()
        kernels = choose(self.options.backend, logits)
        perturb = self._learn if training else self._perturb_nothing
        call = Call(self.options, checked_weight(self.weight, logits), kernels, training, perturb)
        return call.loss(logits, target)

    def _perturb_nothing(self, problem: Problem, kernels: Kernels, measured: Measured) -> Perturbation:
        return self.options.perturbation(problem.logits.new_zeros(self.num_classes, dtype=problem.wide))

    def _learn(self, problem: Problem, kernels: Kernels, measured: Measured) -> Perturbation:
        """Update the statistics from a batch, then choose the perturbation by them."""
        assert measured.tally is not None
        tally = measured.tally
        sums = kernels.class_sums(problem, measured.saved) if self.mean_gradient is not None else None
        if self.sync and dist.is_available() and dist.is_initialized():
            dist.all_reduce(tally)
            if sums is not None:
                dist.all_reduce(sums)
        self._update(tally, sums)
        radius = self._radius if self.radius is None else self.radius
        assert radius is not None
        bound = signed_bound(self.signs(), radius, problem.logits)
        means = None if self.mean_gradient is None else self.mean_gradient.to(problem.wide, copy=True)
        return self.options.perturbation(bound, means)

    def _update(self, tally: Tensor, sums: Tensor | None) -> None:
        count = tally[0] * tally.isfinite().all()  # a batch with nan or inf counts as empty
        keep = torch.where(self._known(), self.momentum, 0.0).double()
        _average(self.confidence, tally[1], count, keep)
        _average(self.gradient_norm, tally[2], count, keep)
        if self.mean_gradient is not None and sums is not None:
            _average(self.mean_gradient, sums, count[:, None], keep[:, None])
        self.seen += count.long()

    def extra_repr(self) -> str:
        radius = "a class" if self.radius is None else f"{self.radius:g}"
        which = f"mode={self.mode!r}" if self._sign is None or self.mode == "longtail" else "sign=given"
        return (
            f"{self.num_classes}, radius={radius}, {which}, scope={self.options.scope!r}, momentum={self.momentum:g}, "
            f"label_smoothing={self.options.label_smoothing:g}, reduction={self.options.reduction!r}"
        )


def _average(buffer: Tensor, total: Tensor, count: Tensor, keep: Tensor) -> None:
    """Mix a batch's means, ``total / count``, into ``buffer`` for classes with samples. ``buffer`` may be nan where keep is 0."""
    old = torch.where(keep > 0, keep * buffer, 0)
    buffer.copy_(torch.where(count > 0, old + (1 - keep) * total / count, buffer.double()))
