"""RAdam."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from ..step.schema import Recipe
from .base import Optimizer, Params
from .rule import Rule, given


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
    """

    _rule = Rule("radam", {"exp_avg": None, "exp_avg_sq": None})

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
        super().__init__(**given(locals()))
