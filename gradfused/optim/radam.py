"""RAdam."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..step.options import Recipe, adam_numbers
from .base import Optimizer, Params


class RAdam(Optimizer):
    """Drop-in for ``torch.optim.RAdam`` (Liu et al. 2020) with a gradient recipe fused into the step.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        betas: Decay of the running averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Weight decay, coupled unless ``decoupled_weight_decay``.
        decoupled_weight_decay: Decay the weights as AdamW does.
        foreach, capturable: Accepted and ignored: every step is fused.
        maximize: Ascend.
        differentiable: Must be False.
        **recipe: See gradfused.Recipe.

    Raises:
        TypeError, ValueError: An option is unknown, out of range or contradicts another.
    """

    _own_options = ("lr", "betas", "eps", "weight_decay")
    _state_keys = frozenset(("exp_avg", "exp_avg_sq"))

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **recipe: Unpack[Recipe],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, dict(recipe))

    def _rule(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        return "radam", ("exp_avg", "exp_avg_sq")

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return adam_numbers(group)
