"""Lion."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..step.options import Recipe, beta_numbers, finite_numbers
from .base import Optimizer, Params


class Lion(Optimizer):
    """Lion (Chen et al. 2023): steps of one size, along the sign of an average, with a gradient recipe fused in.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        betas: Share of the average in the direction, and decay of the average.
        weight_decay: Decoupled weight decay.
        maximize: Ascend.
        **recipe: See gradfused.Recipe.

    Raises:
        TypeError, ValueError: An option is unknown, out of range or contradicts another.
    """

    _own_options = ("lr", "betas", "weight_decay")
    _state_keys = frozenset(("exp_avg",))
    _counts_steps = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **recipe: Unpack[Recipe],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults, dict(recipe))

    def _rule(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        return "lion", ("exp_avg",)

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return finite_numbers(group, "lr", "weight_decay") | beta_numbers(group) | {"decoupled": True}
