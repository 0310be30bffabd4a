"""Adan."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..step.options import Recipe, beta_numbers, finite_numbers, flag
from .base import Optimizer, Params


class Adan(Optimizer):
    """Adan (Xie et al. 2022): Adam with Nesterov momentum from differences of gradients, with a gradient recipe fused in.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        betas: Decay of the averages of the gradient, of its difference to the last one, and of the square.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        no_prox: Shrink the weights before the update, as AdamW does, instead of dividing by ``1 + lr * weight_decay`` after it.
        maximize: Ascend.
        **recipe: See gradfused.Recipe.

    Raises:
        TypeError, ValueError: An option is unknown, out of range or contradicts another.
    """

    _own_options = ("lr", "betas", "eps", "weight_decay", "no_prox")
    _state_keys = frozenset(("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"))

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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "no_prox": no_prox,
            "maximize": maximize,
        }
        super().__init__(params, defaults, dict(recipe))

    def _rule(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        return "adan", ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad")

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        numbers = finite_numbers(group, "lr", "eps", "weight_decay") | beta_numbers(group, 3)
        return numbers | {"decoupled": True, "proximal": not flag("no_prox", group["no_prox"])}
