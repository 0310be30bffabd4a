"""Lion."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..options import Recipe, finite
from ..options import betas as checked_betas
from .base import Optimizer, Params


class Lion(Optimizer):
    """Lion (Chen et al. 2023): steps of one size, along the sign of an average, with a gradient recipe fused in.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        betas: Share of the average in the direction, and decay of the average.
        weight_decay: Decoupled weight decay.
        maximize: Ascend.
        **recipe: See gradfused.options.Recipe.

    Raises:
        TypeError, ValueError: An option is unknown, out of range or contradicts another.
    """

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

    @property
    def _own_options(self) -> tuple[str, ...]:
        return ("lr", "betas", "weight_decay")

    def _rule(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        return "lion", ("exp_avg",)

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        numbers = {name: finite(name, group[name]) for name in ("lr", "weight_decay")}
        return numbers | checked_betas(group) | {"decoupled": True}
