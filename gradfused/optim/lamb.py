"""LAMB."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..step.options import Recipe, beta_numbers, finite_numbers, flag
from .base import Optimizer, Params


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

    Raises:
        TypeError, ValueError: An option is unknown, out of range or contradicts another.
    """

    _own_options = ("lr", "betas", "eps", "weight_decay", "adapt")
    _state_keys = frozenset(("exp_avg", "exp_avg_sq"))

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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adapt": adapt,
            "maximize": maximize,
        }
        super().__init__(params, defaults, dict(recipe))

    def _rule(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        return "lamb", ("exp_avg", "exp_avg_sq")

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        numbers = finite_numbers(group, "lr", "eps", "weight_decay") | beta_numbers(group)
        return numbers | {"decoupled": True, "adapt": flag("adapt", group["adapt"])}
