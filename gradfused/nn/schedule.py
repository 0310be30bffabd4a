"""The schedule of the strength of gradient reversal in DANN (Ganin et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..step.options import finite, whole
from .reversal import GradientReversal, ReversalLinear

Target = nn.Module | Optimizer | tuple[Optimizer, int]


class DANNSchedule:
    """Moves lambda from ``lo`` towards ``hi``: ``lo + (hi - lo) * (2 / (1 + exp(-gamma * p)) - 1)`` at progress p.

    The constructor sets lambda for p = 0. Each ``step()`` adds ``1 / total_steps`` to p, up to 1.

    Args:
        target: What lambda is set on: a ``GradientReversal``, a ``ReversalLinear``, or a module that contains any number
            of them; or a gradfused optimizer, for the ``reverse`` of all groups that have one; or ``(optimizer, i)``,
            for its group i.
        total_steps: Number of steps until p = 1.
        gamma: How fast lambda rises; 10 in the paper.
        lo: Lambda at p = 0.
        hi: The limit of lambda. At p = 1 it is short of it by ``2 * exp(-gamma)`` of the way.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A number is out of range, or ``target`` reverses nothing.
    """

    def __init__(self, target: Target, total_steps: int, gamma: float = 10.0, lo: float = 0.0, hi: float = 1.0) -> None:
        values = _checked({"total_steps": total_steps, "gamma": gamma, "lo": lo, "hi": hi, "steps": 0})
        self._layers = _layers(target) if isinstance(target, nn.Module) else []
        self._optimizer: Optimizer | None = None
        self._index: int | None = None
        if not isinstance(target, nn.Module):
            self._optimizer, self._index = _optimizer(target)
        self._begin(values)

    def _begin(self, values: dict[str, Any]) -> None:
        self.total_steps: int = values["total_steps"]
        self.gamma: float = values["gamma"]
        self.lo: float = values["lo"]
        self.hi: float = values["hi"]
        self.steps: int = values["steps"]
        self._move()

    @property
    def lambda_(self) -> float:
        """The present lambda of the target."""
        progress = min(1.0, self.steps / self.total_steps)
        return self.lo + (self.hi - self.lo) * math.tanh(0.5 * self.gamma * progress)  # the same without overflow

    def step(self) -> None:
        """Count a training step and set lambda."""
        self.steps += 1
        self._move()

    def _move(self) -> None:
        for layer in self._layers:
            layer.lambda_ = self.lambda_
        for group in self._groups():
            group["reverse"] = self.lambda_

    def _groups(self) -> list[dict[str, Any]]:
        """The groups to set, looked up at each step since ``load_state_dict`` replaces them."""
        if self._optimizer is None:
            return []
        if self._index is not None:
            return [self._optimizer.param_groups[self._index]]
        return [group for group in self._optimizer.param_groups if group["reverse"] is not None]

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers of the schedule."""
        return {key: getattr(self, key) for key in ("total_steps", "gamma", "lo", "hi", "steps")}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved schedule and set the target's lambda to what it was then.

        Raises:
            TypeError: A value is of the wrong type.
            ValueError: A value is out of range, or the keys are not those of a DANNSchedule. Nothing has changed.
        """
        expected = list(self.state_dict())
        if sorted(state_dict) != sorted(expected):
            raise ValueError(
                f"state dict is not of DANNSchedule: expected {', '.join(expected)}, got {', '.join(map(str, state_dict))}"
            )
        self._begin(_checked(state_dict))

    def __repr__(self) -> str:
        return f"DANNSchedule({self.steps} of {self.total_steps} steps, lambda_={self.lambda_:g})"


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values``, the numbers of a schedule, each checked for its type and range."""
    counts = {name: whole(name, values[name]) for name in ("total_steps", "steps")}
    for name, least in (("total_steps", 1), ("steps", 0)):
        if counts[name] < least:
            raise ValueError(f"{name}: expected {least} or more, got {counts[name]}")
    return dict(values) | counts | {name: finite(name, values[name]) for name in ("gamma", "lo", "hi")}


def _layers(module: nn.Module) -> list[GradientReversal | ReversalLinear]:
    """The layers inside ``module`` that reverse gradients."""
    found = [m for m in module.modules() if isinstance(m, (GradientReversal, ReversalLinear))]
    if not found:
        raise ValueError(
            f"target: {type(module).__name__} has no GradientReversal and no ReversalLinear inside; "
            "pass the module that holds them, or an optimizer"
        )
    return found


def _optimizer(target: Any) -> tuple[Optimizer, int | None]:
    """The optimizer and the index of the one group to set, or None for all groups that reverse."""
    optimizer, index = target if isinstance(target, tuple) and len(target) == 2 else (target, None)
    if not isinstance(optimizer, Optimizer) or not (index is None or type(index) is int):
        raise TypeError(
            "target: expected a module, a gradfused optimizer or (optimizer, index of a group), "
            f"got {type(target).__name__}; a group itself would be replaced by load_state_dict"
        )
    groups = optimizer.param_groups
    if not all("reverse" in group for group in groups):
        raise ValueError(f"target: {type(optimizer).__name__} cannot reverse; use the optimizer's gradfused twin")
    if index is not None and not 0 <= index < len(groups):
        raise ValueError(f"target: expected a group from 0 to {len(groups) - 1}, got {index}")
    if index is None and all(group["reverse"] is None for group in groups):
        raise ValueError("target: no group of the optimizer reverses; give one reverse=..., or pass (optimizer, index)")
    return optimizer, index
