"""LPG cross-entropy as a function.

After "Gradient Perturbation: Learning to Perturb Gradients for Adaptive Training" (arXiv 2605.29494). docs/lpg.md says
which parts follow the paper and which are this package's reading of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..backends import choose_name
from ..backends import cpu as native_cpu
from ..backends import triton as native_triton
from . import cpu, reference, triton
from .options import PGD, Options, check_inputs, checked_radius, checked_sign, checked_weight, class_count
from .problem import Kernels, Measured, Perturbation, Problem, wide_dtype

_KERNELS: dict[str, Kernels] = {"cpu": cpu, "triton": triton, "reference": reference}
_chosen: dict[tuple[object, ...], Kernels] = {}


def choose(request: str, logits: Tensor) -> Kernels:
    """The kernels to use for ``logits``. Raises as ``gradfused.backends.choose_name``.

    Choices are cached, since finding out what can run takes longer than the loss of a small batch.
    """
    plain = bool(logits.numel() == 0 or logits.data_ptr())
    asked = (request, os.environ.get("GRADFUSED_BACKEND"), native_cpu.native_or_none(), native_triton.interpreting())
    key = (*asked, logits.device, logits.dtype, plain)
    if key not in _chosen:
        _chosen[key] = _KERNELS[choose_name(request, [logits], tuple(_KERNELS), "LPG cross-entropy")]
    return _chosen[key]


def _to_rows(logits: Tensor) -> Tensor:
    """The logits as (n, C), or as (N, D, C) for dense predictions: a view wherever the layout allows one."""
    if logits.dim() == 1:
        return logits[None]
    return logits if logits.dim() == 2 else logits.flatten(2).transpose(1, 2)


def _from_rows(rows: Tensor, logits: Tensor) -> Tensor:
    """The inverse of ``_to_rows``: ``rows`` in the shape of ``logits``."""
    return rows.view(logits.shape) if logits.dim() <= 2 else rows.transpose(1, 2).reshape(logits.shape)


@dataclass(frozen=True)
class Call:
    """One evaluation of the loss.

    Attributes:
        options: The options of the loss.
        weight: (C,) class weights as the caller gave them, or None.
        kernels: The backend's kernels.
        tally: Whether ``perturb`` needs the tally of the forward.
        perturb: Chooses the perturbation of the backward once the logits have been read.
    """

    options: Options
    weight: Tensor | None
    kernels: Kernels
    tally: bool
    perturb: Callable[[Problem, Kernels, Measured], Perturbation]

    def problem(self, logits: Tensor, labels: Tensor, weight: Tensor | None) -> Problem:
        """The rows to work on; ``labels``, (n,), and ``weight`` are copies that nobody else can change."""
        return Problem(_to_rows(logits), labels, weight, self.options.label_smoothing, self.options.ignore_index)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Evaluate."""
        loss: Tensor = _CrossEntropy.apply(logits, target, self)
        return loss


class _Once(torch.autograd.Function):
    """The identity on the gradient of the loss. Differentiating it raises, since autograd would otherwise leave a term out."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, logits: Tensor, upstream: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> NoReturn:
        raise RuntimeError(
            "lpg_cross_entropy: expected to be differentiated once, got a second derivative; the perturbed gradient is "
            "not the gradient of any function and has no derivative. Use F.cross_entropy for the term that needs one"
        )


class _CrossEntropy(torch.autograd.Function):
    """The loss and its perturbed gradient.

    Kernels use targets as memory offsets, so both passes use a copy of the targets that forward checked: the caller could
    change its own between the passes through NumPy or ``.data``, unseen by autograd. The caller's targets and weights are
    saved as well, so that autograd raises its error for changes that it sees.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, call: Call) -> Tensor:
        labels = target.clone(memory_format=torch.contiguous_format).view(-1)
        weight = None if call.weight is None else call.weight.to(wide_dtype(logits), copy=True)
        problem = call.problem(logits, labels, weight)
        measured = call.kernels.forward(problem, call.tally)
        ctx.call, ctx.how = call, call.perturb(problem, call.kernels, measured)
        kept = (logits, labels, measured.total, *measured.saved, *(() if weight is None else (weight,)))
        ctx.kinds = [(t.shape, t.dtype, t.device) for t in kept]
        ctx.save_for_backward(target, call.weight, *kept)
        # float32 under autocast, as torch's cross_entropy. The kernels need no copy of the logits for that.
        autocast = torch.is_autocast_enabled(logits.device.type)
        dtype = torch.float32 if autocast and logits.dtype != torch.float64 else logits.dtype
        if call.options.reduction == "none":
            return measured.loss.to(dtype).view(target.shape)
        loss = measured.total[0]
        return (loss / measured.total[1] if call.options.reduction == "mean" else loss).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        call = ctx.call
        _, _, *kept = ctx.saved_tensors
        _check_kept(kept, ctx.kinds)
        weight = kept.pop() if call.weight is not None else None
        logits, labels, total, *saved = kept
        with torch.no_grad():
            problem = call.problem(logits, labels, weight)
            factor = gradient.to(problem.wide)
            if call.options.reduction == "mean":
                factor = (factor.double() / total[1]).to(problem.wide)
            factor = factor.reshape(-1).expand(labels.shape)
            found = _from_rows(call.kernels.backward(problem, tuple(saved), factor, ctx.how), logits)
        if torch.is_grad_enabled():  # create_graph=True
            found = _Once.apply(found, logits, gradient)
        return found, None, None


def _check_kept(kept: list[Tensor], kinds: list[Any]) -> None:
    """Raise unless the saved tensors are of the kinds that forward saved, whose sizes the kernels trust."""
    for tensor, (shape, dtype, device) in zip(kept, kinds, strict=True):
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
            raise RuntimeError(
                f"lpg_cross_entropy: backward expected a tensor that forward saved, {dtype} of shape {tuple(shape)} on {device}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; assign nothing to .data between forward "
                "and backward, and let hooks on saved tensors give back what they were given"
            )


def signed_bound(sign: Tensor, radius: float | Tensor, logits: Tensor) -> Tensor:
    """(C,): the radius times ``sign``, on the device of ``logits`` and in the dtype of their arithmetic."""
    bound = sign.to(logits.device, wide_dtype(logits))
    return bound * (radius.to(bound) if isinstance(radius, Tensor) else radius)


@_disable_dynamo  # the kernels take addresses
def lpg_cross_entropy(
    logits: Tensor,
    target: Tensor,
    sign: Any,
    radius: float | Tensor,
    *,
    scope: str = "class",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    solver: str | PGD = "closed_form",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy with the value of ``F.cross_entropy`` and logit gradients that are perturbed within a radius.

    Take a sample of class c and its logit gradient ``g = softmax(u) - target distribution``, before class weight and
    reduction. The backward uses ``g + delta_c`` with ``||delta_c||_2 <= radius[c]``. Among these, ``delta_c`` makes the
    mean gradient of the batch's samples of class c as long (``sign[c] = 1``) or as short (``-1``) as possible.

    Args:
        logits: (N, C), (N, C, d1, ...) or (C,), of float32, float64, float16 or bfloat16. Arithmetic is float32, or
            float64 for float64.
        target: Class indices, int64, of the logits' shape without C.
        sign: (C,): 1 amplifies a class, -1 dampens it, 0 leaves it alone.
        radius: The bound on delta: one number for all classes, or (C,).
        scope: ``"class"``: one delta for each class; ``"sample"``: each sample's own g is made longer or shorter by the
            radius, though not shorter than 0.
        weight: (C,) class weights.
        label_smoothing: As in ``F.cross_entropy``. The target distribution is the smoothed one.
        ignore_index: Samples with this target are ignored.
        reduction: ``"mean"`` (weighted by class weights), ``"sum"`` or ``"none"``.
        solver: ``"closed_form"``, ``"pgd"`` or a ``PGD(steps, step_size)``.
        backend: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Returns:
        The loss, in the logits' dtype (float32 under autocast). It can be differentiated once.

    Raises:
        TypeError: Logits are not floating point, or targets not int64.
        ValueError: A shape or an option is not allowed.
        IndexError: A target is not a class (on CPU tensors).
        RuntimeError: The backend was asked for by name and cannot run.
    """
    options = Options(scope, label_smoothing, ignore_index, reduction, solver, backend)
    check_inputs(logits, target)
    classes = class_count(logits)
    how = options.perturbation(signed_bound(checked_sign(sign, classes), checked_radius(radius, classes), logits))
    kernels = choose(backend, logits)
    return Call(options, checked_weight(weight, logits), kernels, False, lambda *_: how).loss(logits, target)
