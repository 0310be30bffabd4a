"""Cross-entropy whose backward perturbs the logit gradient class by class: LPG as a function.

After "Gradient Perturbation: Learning to Perturb Gradients for Adaptive Training" (arXiv 2605.29494). docs/lpg.md says
what is the paper's and what is this package's reading of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from ..step.options import finite, number, whole
from . import kernels as backends
from .problem import Kernels, Measured, Perturbation, Problem

SCOPES = ("class", "sample")
REDUCTIONS = ("mean", "sum", "none")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent in place of the closed form: it reaches the same delta.

    Each step moves delta by ``step_size`` along the normalised gradient of ``||G + delta||`` (against it, and not
    beyond the origin, where the class is dampened), then projects onto the ball.

    Args:
        steps: How many, at least 1.
        step_size: In the unit of the radius; None for ``2.5 * eps_c / steps``, which reaches the edge.

    Raises:
        TypeError: A value is no number, or ``steps`` no integer.
        ValueError: A value is out of range.
    """

    steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", whole("PGD steps", self.steps, 1))
        if self.step_size is not None:
            finite("PGD step_size", self.step_size)


@dataclass(frozen=True)
class Options:
    """What lpg_cross_entropy and LPGCrossEntropyLoss have in common, checked."""

    scope: str
    label_smoothing: float
    ignore_index: int
    reduction: str
    solver: PGD | None
    backend: str

    def perturbation(self, bound: Tensor, means: Tensor | None = None) -> Perturbation:
        """The perturbation of these options within ``bound``."""
        steps, size = (self.solver.steps, self.solver.step_size) if self.solver else (0, None)
        return Perturbation(bound, self.scope, steps, size, means)


def options(
    scope: str, label_smoothing: float, ignore_index: int, reduction: str, solver: str | PGD, backend: str
) -> Options:
    """Check and collect."""
    for name, value, allowed in (("scope", scope, SCOPES), ("reduction", reduction, REDUCTIONS)):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    if solver not in ("closed_form", "pgd") and not isinstance(solver, PGD):
        raise ValueError(
            f"solver: expected 'closed_form', 'pgd' or a gradfused.nn.PGD(steps, step_size), got {solver!r}"
        )
    chosen = PGD() if solver == "pgd" else solver if isinstance(solver, PGD) else None
    smoothing = number("label_smoothing", label_smoothing, 0.0, 1.0)
    return Options(scope, smoothing, whole("ignore_index", ignore_index), reduction, chosen, backend)


def per_class(name: str, value: Any, classes: int, *, default_dtype: torch.dtype = torch.float32) -> Tensor:
    """``value`` as a tensor of shape (classes,); a tensor stays on its device.

    Raises:
        ValueError: The shape is another.
    """
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=default_dtype, device="cpu")
    if tensor.shape != (classes,):
        raise ValueError(f"{name}: expected shape ({classes},), one value a class, got {tuple(tensor.shape)}")
    detached: Tensor = tensor.detach()
    return detached


def checked_sign(value: Any, classes: int) -> Tensor:
    """``value``, one of -1, 0 and 1 a class. Values on a GPU are not looked at, which would wait for it."""
    sign = per_class("sign", value, classes)
    if sign.device.type == "cpu" and not ((sign == 0) | (sign.abs() == 1)).all():
        bad = int((~((sign == 0) | (sign.abs() == 1))).nonzero()[0])
        raise ValueError(f"sign: expected -1, 0 or 1 for each class, got {sign[bad].item()} for class {bad}")
    return sign


def checked_radius(value: Any, classes: int) -> float | Tensor:
    """``value``, finite and not negative: a float, or one value a class."""
    if not isinstance(value, (Tensor, list, tuple)) or (isinstance(value, Tensor) and value.dim() == 0):
        return finite("radius", value)
    radius = per_class("radius", value, classes)
    if radius.device.type == "cpu" and not (radius.isfinite() & (radius >= 0)).all():
        bad = int((~(radius.isfinite() & (radius >= 0))).nonzero()[0])
        raise ValueError(f"radius: expected finite values of 0 or more, got {radius[bad].item()} for class {bad}")
    return radius


def check_inputs(logits: Tensor, target: Tensor) -> None:
    """Raise unless these are logits and class indices that fit together."""
    if not isinstance(logits, Tensor) or logits.dtype not in _DTYPES:
        got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits: expected a tensor of float32, float64, float16 or bfloat16, got {got}")
    if logits.dim() == 0:
        raise ValueError("logits: expected shape (C,), (N, C) or (N, C, d1, ...), got a 0-dim tensor")
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        hint = ": LPG perturbs by class, so targets cannot be probabilities" if "float" in str(got) else ""
        raise TypeError(f"target: expected class indices of dtype int64, got {got}{hint}")
    expected = (*logits.shape[:1], *logits.shape[2:]) if logits.dim() > 1 else ()
    if target.shape != expected:
        shape = tuple(logits.shape)
        raise ValueError(f"target: expected shape {expected} for logits of shape {shape}, got {tuple(target.shape)}")
    if target.device != logits.device:
        raise ValueError(f"target: expected a tensor on {logits.device}, as the logits, got one on {target.device}")


def class_count(logits: Tensor) -> int:
    """C of logits of shape (C,), (N, C) or (N, C, d1, ...)."""
    return logits.shape[0] if logits.dim() == 1 else logits.shape[1]


def _rows(logits: Tensor) -> Tensor:
    """(n, C), or of dense predictions (N, D, C): a view wherever the layout allows one."""
    if logits.dim() == 1:
        return logits[None]
    return logits if logits.dim() == 2 else logits.flatten(2).transpose(1, 2)


def _like(rows: Tensor, logits: Tensor) -> Tensor:
    """What ``_rows`` made of ``logits``, undone."""
    return rows.view(logits.shape) if logits.dim() <= 2 else rows.transpose(1, 2).reshape(logits.shape)


@dataclass(frozen=True)
class Call:
    """One evaluation of the loss.

    Attributes:
        weight: (C,) class weights as the caller gave them.
        perturb: Called once the logits have been read: (problem, kernels, what they hold) -> the perturbation of the
            backward.
    """

    options: Options
    weight: Tensor | None
    kernels: Kernels
    tally: bool
    perturb: Callable[[Problem, Kernels, Measured], Perturbation]

    def problem(self, logits: Tensor, labels: Tensor, weight: Tensor | None) -> Problem:
        """The rows to work on. Labels, (n,), and weights are copies that nobody else can change."""
        return Problem(_rows(logits), labels, weight, self.options.label_smoothing, self.options.ignore_index)


def _result_dtype(logits: Tensor) -> torch.dtype:
    """float32 under autocast, as of torch's cross_entropy; the kernels need no copy of the logits for that."""
    autocast = torch.is_autocast_enabled(logits.device.type)
    return torch.float32 if autocast and logits.dtype != torch.float64 else logits.dtype


class _Once(torch.autograd.Function):
    """A gradient of the loss, as it is: differentiating it again is refused in place of leaving its own gradient out."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, logits: Tensor, upstream: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> NoReturn:
        raise RuntimeError(
            "lpg_cross_entropy: expected to be differentiated once, got a second derivative of it; its perturbed gradient "
            "is no function's gradient and has none here. Use F.cross_entropy for the term that needs one"
        )


class _CrossEntropy(torch.autograd.Function):
    """The loss, and its perturbed gradient.

    Kernels take targets for places in memory, so both passes use a copy of those that forward checked: the caller's may
    change in between without autograd's knowledge, by way of NumPy or of ``.data``. The caller's own targets and weights
    are saved beside the copies so that autograd raises for the changes that it knows of.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, call: Call) -> Tensor:
        labels = target.clone(memory_format=torch.contiguous_format).view(-1)
        problem = call.problem(logits, labels, _own_weight(call.weight, logits))
        measured = call.kernels.forward(problem, call.tally)
        ctx.call, ctx.how = call, call.perturb(problem, call.kernels, measured)
        kept = (logits, labels, measured.total, *measured.saved, *(() if problem.weight is None else (problem.weight,)))
        ctx.kinds = [(t.shape, t.dtype, t.device) for t in kept]
        ctx.save_for_backward(target, call.weight, *kept)
        dtype = _result_dtype(logits)
        if call.options.reduction == "none":
            return measured.loss.to(dtype).view(target.shape)
        loss = measured.total[0]
        return (loss / measured.total[1] if call.options.reduction == "mean" else loss).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, _, *kept = ctx.saved_tensors
        _check_kept(kept, ctx.kinds)
        weight = kept.pop() if ctx.call.weight is not None else None
        logits, labels, total, *saved = kept
        with torch.no_grad():
            problem = ctx.call.problem(logits, labels, weight)
            found = _like(_CrossEntropy._gradient(ctx, problem, total, saved, gradient), logits)
        if torch.is_grad_enabled():  # create_graph=True
            found = _Once.apply(found, logits, gradient)
        return found, None, None

    @staticmethod
    def _gradient(ctx: Any, problem: Problem, total: Tensor, saved: list[Tensor], gradient: Tensor) -> Tensor:
        call = ctx.call
        factor = gradient.to(problem.wide)
        if call.options.reduction == "mean":
            factor = (factor.double() / total[1]).to(problem.wide)
        factor = factor.reshape(-1).expand(problem.target.shape)
        rows: Tensor = call.kernels.backward(problem, tuple(saved), factor, ctx.how)
        return rows


def _check_kept(kept: list[Tensor], kinds: list[Any]) -> None:
    """Raise unless backward is given tensors of the kinds that forward saved: kernels trust their sizes."""
    for tensor, (shape, dtype, device) in zip(kept, kinds, strict=True):
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, device):
            raise RuntimeError(
                f"lpg_cross_entropy: backward expected a tensor that forward saved, {dtype} of shape {tuple(shape)} on {device}, "
                f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; assign nothing to .data between forward "
                "and backward, and let hooks on saved tensors give back what they were given"
            )


def class_weight(value: Tensor | None, logits: Tensor) -> Tensor | None:
    """``value``, checked."""
    if value is None:
        return None
    weight = per_class("weight", value, class_count(logits))
    if weight.device != logits.device:
        raise ValueError(f"weight: expected a tensor on {logits.device}, as the logits, got one on {weight.device}")
    return weight


def _own_weight(value: Tensor | None, logits: Tensor) -> Tensor | None:
    """A copy in the dtype of the arithmetic."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return None if value is None else value.to(wide, copy=True)


def signed_bound(sign: Tensor, radius: float | Tensor, logits: Tensor) -> Tensor:
    """(C,): the radius with the sign of its direction, where and in what the arithmetic of ``logits`` is."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    bound = sign.to(logits.device, wide)
    return bound * (radius.to(logits.device, wide) if isinstance(radius, Tensor) else radius)


def evaluate(logits: Tensor, target: Tensor, call: Call) -> Tensor:
    """The loss."""
    loss: Tensor = _CrossEntropy.apply(logits, target, call)
    return loss


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
    """Cross-entropy whose value is ``F.cross_entropy``'s and whose backward perturbs each sample's logit gradient.

    For a sample of class c with logit gradient ``g = softmax(u) - target distribution`` (before class weight and
    reduction) the backward uses ``g + delta_c`` with ``||delta_c||_2 <= radius[c]``, where ``delta_c`` makes the mean
    gradient of the batch's samples of class c as long (``sign[c] = 1``) or as short (``-1``) as it can.

    Args:
        logits: (N, C), (N, C, d1, ...) or (C,), of float32, float64, float16 or bfloat16; arithmetic is float32, or
            float64 for float64.
        target: Class indices, int64, of the logits' shape without C.
        sign: (C,): 1 amplifies a class, -1 dampens it, 0 leaves it.
        radius: The bound eps of every class, or (C,), one a class.
        scope: ``"class"``: one delta a class; ``"sample"``: each sample's own g is made longer or shorter by the
            radius, not below 0.
        weight: (C,) class weights.
        label_smoothing: As of ``F.cross_entropy``; the target distribution is the smoothed one.
        ignore_index: Targets of this value count nowhere.
        reduction: ``"mean"`` (by the weights' sum), ``"sum"`` or ``"none"``.
        solver: ``"closed_form"``, ``"pgd"`` or a ``PGD(steps, step_size)``.
        backend: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``.

    Returns:
        The loss, in the logits' dtype (float32 under autocast). It can be differentiated once.

    Raises:
        TypeError: Logits are not floating point or targets not int64.
        ValueError: A shape or an option does not fit.
        IndexError: A target is not a class (on CPU tensors).
        RuntimeError: The backend was asked for by name and cannot run.
    """
    chosen = options(scope, label_smoothing, ignore_index, reduction, solver, backend)
    check_inputs(logits, target)
    classes = class_count(logits)
    bound = signed_bound(checked_sign(sign, classes), checked_radius(radius, classes), logits)
    kernels = backends.choose(backend, logits)
    how = chosen.perturbation(bound)
    call = Call(chosen, class_weight(weight, logits), kernels, False, lambda *_: how)
    return evaluate(logits, target, call)
