"""Adan."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..step.options import flag
from ..step.schema import Recipe
from .base import Optimizer, Params
from .rule import Rule, given


class Adan(Optimizer):
    """Adan (Xie et al. 2022): Adam with Nesterov momentum from differences of gradients, with a gradient recipe fused in.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        betas: Decay of the averages of the gradient, of its difference to the last one, and of the square.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        no_prox: Shrink the weights before the update, as AdamW does, instead of dividing by ``1 + lr * weight_decay``
            after it.
        maximize: Ascend.
        **recipe: See gradfused.Recipe.
    """

    _rule = Rule("adan", dict.fromkeys(("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad")), decoupled=True)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        *,
        maximize: bool = False,
        **recipe: Unpack[Recipe],
    ) -> None:
        super().__init__(**given(locals()))

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return super()._numbers(group) | {"proximal": not flag("no_prox", group["no_prox"])}
