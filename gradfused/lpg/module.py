"""LPG cross-entropy as a module that decides by itself which classes to amplify and which to dampen."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..step.options import number, whole
from . import kernels as backends
from . import modes
from .function import (
    PGD,
    Call,
    check_inputs,
    checked_radius,
    checked_sign,
    class_count,
    class_weight,
    evaluate,
    options,
    per_class,
    signed_bound,
)
from .problem import Kernels, Measured, Perturbation, Problem

#: Bytes of class-mean gradients, (C, C) in float32, beyond which momentum is refused.
MOST_BYTES = 2**31


class LPGCrossEntropyLoss(nn.Module):
    """Cross-entropy whose backward perturbs the logit gradients of each class within a bound (arXiv 2605.29494).

    The value is ``nn.CrossEntropyLoss``'s. In training mode, each call first updates the classes' statistics from its
    own batch, then decides by ``mode`` which classes to amplify (their mean logit gradient made as long as the bound
    allows) and which to dampen. In evaluation mode, and where no gradients are recorded, it is plain cross-entropy and
    the statistics stay. A batch with a logit of nan or +inf, whose loss is no number either, does not enter them.

    Args:
        num_classes: C, 2 or more.
        radius: The bound eps of the perturbation of ``softmax - target distribution``: a number, or (C,), one a class.
        mode: ``"balanced"``: classes with own-class confidence below the mean of classes are amplified, above it
            dampened. ``"longtail"``: by ``counts``; rare classes are amplified and frequent ones dampened, within the
            radius times the distance of their rank from the middle, in [0, 1]. ``"noisy"``: classes whose gradient norm
            is high for their confidence are dampened.
        counts: (C,) samples a class, of the whole training set; for ``"longtail"``, and only for it.
        sign: (C,) of -1, 0 and 1: these signs for good, in place of a mode.
        scope: ``"class"``: one delta a class; ``"sample"``: each sample's own gradient made longer or shorter.
        solver: ``"closed_form"``, ``"pgd"`` or a ``PGD(steps, step_size)``.
        momentum: Of the moving averages of statistics and of class-mean gradients, in [0, 1): ``m * old + (1 - m) *
            batch`` for the classes a batch has; a class's first batch counts whole. 0: the batch alone. More than 0
            keeps (C, C) float32.
        weight: (C,) class weights.
        label_smoothing, ignore_index, reduction: As of ``nn.CrossEntropyLoss``.
        sync: Add up statistics over the default process group at each training call: (3, C) float64, and (C, C) with
            momentum. Without momentum class-mean gradients are each process's own. Every process must make every call.
        backend: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Shape:
        As ``nn.CrossEntropyLoss`` with class indices: logits (N, C), (N, C, d1, ...) or (C,); C from 2 to 256k.

    Attributes:
        confidence: (C,) mean own-class probability of each class.
        gradient_norm: (C,) mean norm of each class's logit gradients.
        seen: (C,) int64: samples so far.
        mean_gradient: (C, C) moving averages of class-mean logit gradients; None without momentum.

    Raises:
        TypeError, ValueError: An argument is not what it should be, or momentum would take more than 2 GiB.
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
        self.options = options(scope, label_smoothing, ignore_index, reduction, solver, backend)
        self._refuse_what_does_not_fit(counts, sign)
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

    def _refuse_what_does_not_fit(self, counts: Any, sign: Any) -> None:
        classes = self.num_classes
        if self.mode not in modes.MODES:
            raise ValueError(f"mode: expected one of {', '.join(map(repr, modes.MODES))}, got {self.mode!r}")
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
        return modes.longtail(counts, self.num_classes) if self.mode == "longtail" else None

    def signs(self) -> Tensor:
        """(C,): the sign of each class's perturbation by the present statistics, in ``"longtail"`` times its share."""
        if self._sign is not None:
            return self._sign
        if self.mode == "noisy":
            smoothing = self.options.label_smoothing
            return modes.noisy(self.confidence.float(), self.gradient_norm.float(), self._known(), smoothing)
        return modes.balanced(self.confidence.float(), self._known())

    def _known(self) -> Tensor:
        """(C,): whether there are statistics of a class. A checkpoint may hold ones that are no numbers."""
        return (self.seen > 0) & self.confidence.isfinite() & self.gradient_norm.isfinite()

    @_disable_dynamo
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss, in the logits' dtype (float32 under autocast). Its gradient is perturbed."""
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
        kernels = backends.choose(self.options.backend, logits)
        perturb = self._learn if training else self._leave
        call = Call(self.options, class_weight(self.weight, logits), kernels, training, perturb)
        return evaluate(logits, target, call)

    def _leave(self, problem: Problem, kernels: Kernels, measured: Measured) -> Perturbation:
        return self.options.perturbation(torch.zeros_like(problem.logits[:1], dtype=problem.wide).expand(1, -1)[0])

    def _learn(self, problem: Problem, kernels: Kernels, measured: Measured) -> Perturbation:
        assert measured.tally is not None
        tally = measured.tally
        sums = kernels.class_sums(problem, measured.saved) if self.mean_gradient is not None else None
        if self.sync and dist.is_available() and dist.is_initialized():
            dist.all_reduce(tally)
            if sums is not None:
                dist.all_reduce(sums)
        self._update(tally, sums)
        bound = signed_bound(self.signs(), self._bounds(), problem.logits)
        means = None if self.mean_gradient is None else self.mean_gradient.to(problem.wide, copy=True)
        return self.options.perturbation(bound, means)

    def _bounds(self) -> float | Tensor:
        if self._radius is not None:
            return self._radius
        assert self.radius is not None
        return self.radius

    def _update(self, tally: Tensor, sums: Tensor | None) -> None:
        count = tally[0] * tally.isfinite().all()  # of a batch with nan in it, nothing counts
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
    """Mixes a batch's means into ``buffer`` where it has samples. What is kept by 0 may be nan."""
    old = torch.where(keep > 0, keep * buffer, 0)
    buffer.copy_(torch.where(count > 0, old + (1 - keep) * total / count, buffer.double()))
