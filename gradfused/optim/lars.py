"""LARS."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..step.options import Recipe, finite, finite_numbers, flag, momentum_numbers
from .base import Optimizer, Params


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

    Raises:
        TypeError, ValueError: An option is unknown, out of range or contradicts another.
    """

    _own_options = ("lr", "momentum", "weight_decay", "trust_coefficient", "adapt")
    _state_keys = frozenset()
    _optional_keys = frozenset(("momentum_buffer",))
    _counts_steps = False

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
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "adapt": adapt,
            "maximize": maximize,
        }
        super().__init__(params, defaults, dict(recipe))

    def _rule(self, group: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
        return ("lars_momentum", ("momentum_buffer",)) if finite("momentum", group["momentum"]) else ("lars", ())

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        numbers = finite_numbers(group, "lr", "weight_decay", "eps") | momentum_numbers(group)
        return numbers | {
            "trust_coefficient": finite("trust_coefficient", group["trust_coefficient"]),
            "decoupled": True,  # the rule adds the decay, after the norm is taken
            "adapt": flag("adapt", group["adapt"]),
        }
