"""RMSprop."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..step.options import number
from ..step.schema import Recipe
from .base import Optimizer, Params
from .rule import Rule, given


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
    """

    _rule = Rule("rmsprop", {"square_avg": None, "momentum_buffer": "momentum", "grad_avg": "centered"})

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
        super().__init__(**given(locals()))

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        return super()._numbers(group) | {"beta2": number("alpha", group["alpha"], high=1.0)}
