"""LAMB."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from ..step.schema import Recipe
from .base import Optimizer, Params
from .rule import Rule, given


class LAMB(Optimizer):
    """LAMB (You et al. 2020): Adam with each step as long as the weights allow, with a gradient recipe fused in.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        betas: Decay of the running averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Decay, part of the update whose length is adapted.
        adapt: Take the trust ratio ``||p|| / ||update||``; False where steps shall be AdamW's: biases
            and norms, say.
        maximize: Ascend.
        **recipe: See gradfused.Recipe.
    """

    _rule = Rule("lamb", {"exp_avg": None, "exp_avg_sq": None}, decoupled=True)

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        adapt: bool = True,
        maximize: bool = False,
        **recipe: Unpack[Recipe],
    ) -> None:
        super().__init__(**given(locals()))
