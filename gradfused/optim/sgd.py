"""SGD."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..step.options import Recipe, finite, finite_numbers, momentum_numbers
from .base import Optimizer, Params


class SGD(Optimizer):
    """Drop-in for ``torch.optim.SGD`` (momentum after Sutskever et al. 2013) with a gradient recipe fused into the step.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        momentum: Momentum factor.
        dampening: Dampening of the momentum.
        weight_decay: Coupled weight decay.
        nesterov: Nesterov momentum; needs momentum and no dampening.
        maximize: Ascend.
        foreach, fused: Accepted and ignored: every step is fused.
        differentiable: Must be False.
        **recipe: See gradfused.Recipe.

    Raises:
        TypeError, ValueError: An option is unknown, out of range or contradicts another.
    """

    _own_options = ("lr", "momentum", "weight_decay")
    _state_keys = frozenset()
    _optional_keys = frozenset(("momentum_buffer",))
    _counts_steps = False

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **recipe: Unpack[Recipe],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, dict(recipe))

    def _rule(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        return ("sgd_momentum", ("momentum_buffer",)) if finite("momentum", group["momentum"]) else ("sgd", ())

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return finite_numbers(group, "lr", "weight_decay") | momentum_numbers(group)
