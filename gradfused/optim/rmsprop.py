"""RMSprop."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..step.options import Recipe, finite, finite_numbers, flag, number
from .base import Optimizer, Params


class RMSprop(Optimizer):
    """Drop-in for ``torch.optim.RMSprop`` (Hinton 2012; centred: Graves 2013) with a gradient recipe fused into the step.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        alpha: Decay of the running average of the squared gradient.
        eps: Added to the denominator.
        weight_decay: Coupled weight decay.
        momentum: Momentum factor.
        centered: Divide by the gradient's estimated standard deviation.
        foreach, capturable: Accepted and ignored: every step is fused.
        maximize: Ascend.
        differentiable: Must be False.
        **recipe: See gradfused.Recipe.

    Raises:
        TypeError, ValueError: An option is unknown, out of range or contradicts another.
    """

    _own_options = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")
    _state_keys = frozenset(("square_avg",))
    _optional_keys = frozenset(("momentum_buffer", "grad_avg"))

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **recipe: Unpack[Recipe],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults, dict(recipe))

    def _rule(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        momentum, centered = finite("momentum", group["momentum"]) > 0, flag("centered", group["centered"])
        rule = "rmsprop" + "_centered" * centered + "_momentum" * momentum
        return rule, ("square_avg", *("momentum_buffer",) * momentum, *("grad_avg",) * centered)

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        numbers = finite_numbers(group, "lr", "eps", "weight_decay", "momentum")
        return numbers | {"beta2": number("alpha", group["alpha"], high=1.0)}
