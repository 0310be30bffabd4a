"""Options of the LPG loss and the checks of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..step.options import finite, number, whole
from .problem import Perturbation

SCOPES = ("class", "sample")
REDUCTIONS = ("mean", "sum", "none")
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class PGD:
    """Projected gradient descent, a solver that iterates towards the closed form of delta.

    Each step moves delta by ``step_size`` along the normalised gradient of ``||G + delta||`` (when dampening, against it
    and not beyond the origin), then projects it onto the ball of the radius.

    Args:
        steps: Number of steps, at least 1.
        step_size: Length of a step, in the unit of the radius; None for ``2.5 * radius / steps``, which reaches the edge
            of the ball.

    Raises:
        TypeError: ``step_size`` is not a number, or ``steps`` not an integer.
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
    """The options that ``lpg_cross_entropy`` and ``LPGCrossEntropyLoss`` share. Raises for values that are not allowed."""

    scope: str
    label_smoothing: float
    ignore_index: int
    reduction: str
    solver: str | PGD
    backend: str

    def __post_init__(self) -> None:
        for name, value, allowed in (("scope", self.scope, SCOPES), ("reduction", self.reduction, REDUCTIONS)):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
        if self.solver not in ("closed_form", "pgd") and not isinstance(self.solver, PGD):
            raise ValueError(
                f"solver: expected 'closed_form', 'pgd' or a gradfused.nn.PGD(steps, step_size), got {self.solver!r}"
            )
        object.__setattr__(self, "label_smoothing", number("label_smoothing", self.label_smoothing, 0.0, 1.0))
        object.__setattr__(self, "ignore_index", whole("ignore_index", self.ignore_index))

    def perturbation(self, bound: Tensor, means: Tensor | None = None) -> Perturbation:
        """The perturbation within ``bound``; see there."""
        pgd = PGD() if self.solver == "pgd" else self.solver
        steps, size = (pgd.steps, pgd.step_size) if isinstance(pgd, PGD) else (0, None)
        return Perturbation(bound, self.scope, steps, size, means)


def per_class(name: str, value: Any, classes: int, *, default_dtype: torch.dtype = torch.float32) -> Tensor:
    """``value`` as a tensor of shape (classes,). A tensor stays on its device.

    Raises:
        ValueError: The shape is another.
    """
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=default_dtype, device="cpu")
    if tensor.shape != (classes,):
        raise ValueError(f"{name}: expected shape ({classes},), one value a class, got {tuple(tensor.shape)}")
    detached: Tensor = tensor.detach()
    return detached


def _check_each(name: str, values: Tensor, allowed: Callable[[Tensor], Tensor], expected: str) -> Tensor:
    """``values``, or ValueError for the first class whose value is not allowed. Reading a GPU's values would wait for it."""
    if values.device.type == "cpu" and not (fine := allowed(values)).all():
        bad = int((~fine).nonzero()[0])
        raise ValueError(f"{name}: expected {expected}, got {values[bad].item()} for class {bad}")
    return values


def checked_sign(value: Any, classes: int) -> Tensor:
    """``value`` as (classes,) signs, each -1, 0 or 1."""
    sign = per_class("sign", value, classes)
    return _check_each("sign", sign, lambda s: (s == 0) | (s.abs() == 1), "-1, 0 or 1 for each class")


def checked_amounts(name: str, values: Tensor) -> Tensor:
    """``values``, (C,), each finite and not negative."""
    return _check_each(name, values, lambda v: v.isfinite() & (v >= 0), "finite values of 0 or more")


def checked_radius(value: Any, classes: int) -> float | Tensor:
    """``value``, finite and not negative: one number for all classes, or (classes,)."""
    if not isinstance(value, (Tensor, list, tuple)) or (isinstance(value, Tensor) and value.dim() == 0):
        return finite("radius", value)
    return checked_amounts("radius", per_class("radius", value, classes))


def class_count(logits: Tensor) -> int:
    """C of logits of shape (C,), (N, C) or (N, C, d1, ...)."""
    return logits.shape[0] if logits.dim() == 1 else logits.shape[1]


def check_inputs(logits: Tensor, target: Tensor) -> None:
    """Raise unless ``logits`` and ``target``, class indices, fit together."""
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


def checked_weight(value: Tensor | None, logits: Tensor) -> Tensor | None:
    """``value``, class weights that fit ``logits``, or None."""
    if value is None:
        return None
    weight = per_class("weight", value, class_count(logits))
    if weight.device != logits.device:
        raise ValueError(f"weight: expected a tensor on {logits.device}, as the logits, got one on {weight.device}")
    return weight
