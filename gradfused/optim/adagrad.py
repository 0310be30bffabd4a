"""Adagrad."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from ..step.schema import Recipe
from .base import Optimizer, Params
from .rule import Rule, given


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
    """

    _rule = Rule("adagrad", {"sum": None}, initial={"sum": "initial_accumulator_value"})

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
        super().__init__(**given(locals()))
