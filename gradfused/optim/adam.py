"""Adam."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..options import Recipe, adam_numbers
from .base import Optimizer, Params


class Adam(Optimizer):
    """Drop-in for ``torch.optim.Adam`` (Kingma & Ba 2015) with a gradient recipe fused into the step.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        betas: Decay of the running averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Weight decay, coupled unless ``decoupled_weight_decay``.
        amsgrad: Keep the maximum of the second moment (Reddi et al. 2018).
        maximize: Ascend.
        foreach, fused, capturable: Accepted and ignored: every step is fused.
        differentiable: Must be False.
        decoupled_weight_decay: Decay the weights as AdamW does.
        **recipe: See gradfused.options.Recipe.

    Raises:
        TypeError, ValueError: An option is unknown, out of range or contradicts another.
    """

    _own_options = ("lr", "betas", "eps", "weight_decay", "amsgrad")
    _state_keys = frozenset(("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"))

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **recipe: Unpack[Recipe],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, dict(recipe))

    def _rule(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        if group["amsgrad"]:
            return "adam_amsgrad", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return "adam", ("exp_avg", "exp_avg_sq")

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return adam_numbers(group)
