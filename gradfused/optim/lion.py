"""Lion."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from ..step.schema import Recipe
from .base import Optimizer, Params
from .rule import Rule, given


class Lion(Optimizer):
    """Lion (Chen et al. 2023): steps of one size, along the sign of an average, with a gradient recipe fused in.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        betas: Share of the average in the direction, and decay of the average.
        weight_decay: Decoupled weight decay.
        maximize: Ascend.
        **recipe: See gradfused.Recipe.
    """

    _rule = Rule("lion", {"exp_avg": None}, counts_steps=False, decoupled=True)

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
        super().__init__(**given(locals()))
