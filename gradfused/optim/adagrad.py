"""Adagrad."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..step.options import Recipe, finite, finite_numbers
from .base import Optimizer, Params


class Adagrad(Optimizer):
    """Drop-in for ``torch.optim.Adagrad`` (Duchi et al. 2011) with a gradient recipe fused into the step.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        lr_decay: At step t the learning rate is divided by ``1 + (t - 1) * lr_decay``.
        weight_decay: Coupled weight decay.
        initial_accumulator_value: What the sum of squares starts from.
        eps: Added to the denominator.
        foreach, fused: Accepted and ignored: every step is fused.
        maximize: Ascend.
        differentiable: Must be False.
        **recipe: See gradfused.Recipe.

    Raises:
        TypeError, ValueError: An option is unknown, out of range or contradicts another.
    """

    _own_options = ("lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value")
    _state_keys = frozenset(("sum",))

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **recipe: Unpack[Recipe],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, dict(recipe))

    def _rule(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        return "adagrad", ("sum",)

    def _initial(self, group: dict[str, Any]) -> tuple[float, ...]:
        return (finite("initial_accumulator_value", group["initial_accumulator_value"]),)

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return finite_numbers(group, "lr", "lr_decay", "eps", "weight_decay")
