"""LARS."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from ..step.schema import Recipe
from .base import Optimizer, Params
from .rule import Rule, given


class LARS(Optimizer):
    """LARS (You et al. 2017): SGD on gradients as long as the weights allow, with a gradient recipe fused in.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        momentum: Momentum factor.
        dampening: Dampening of the momentum.
        weight_decay: Coupled weight decay.
        nesterov: Nesterov momentum; needs momentum and no dampening.
        trust_coefficient: Length of a step, at ``lr=1``, relative to the weights.
        eps: Added to the denominator of the trust ratio.
        adapt: Take the trust ratio; False where steps shall be SGD's: biases and norms, say.
        maximize: Ascend.
        **recipe: See gradfused.Recipe.
    """

    _rule = Rule("lars", {"momentum_buffer": "momentum"}, counts_steps=False, decoupled=True)  # adds the decay itself

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        adapt: bool = True,
        maximize: bool = False,
        **recipe: Unpack[Recipe],
    ) -> None:
        super().__init__(**given(locals()))
