"""SGD."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from ..step.schema import Recipe
from .base import Optimizer, Params
from .rule import Rule, given


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
    """

    _rule = Rule("sgd", {"momentum_buffer": "momentum"}, counts_steps=False)

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
        super().__init__(**given(locals()))
