"""AdamW."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..step.schema import Recipe
from .adam import Adam
from .base import Params
from .rule import given


class AdamW(Adam):
    """Drop-in for ``torch.optim.AdamW`` (Loshchilov & Hutter 2019) with a gradient recipe fused into the step.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        betas: Decay of the running averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay: each step multiplies weights by ``1 - lr * weight_decay``.
        amsgrad: Keep the maximum of the second moment (Reddi et al. 2018).
        maximize: Ascend.
        foreach, fused, capturable: Accepted and ignored: every step is fused.
        differentiable: Must be False.
        **recipe: See gradfused.Recipe.

    Raises:
        TypeError, ValueError: An option is unknown, out of range or contradicts another.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **recipe: Unpack[Recipe],
    ) -> None:
        super().__init__(decoupled_weight_decay=True, **given(locals()))

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        # Whatever a loaded state dict says, this is AdamW.
        return super()._numbers(group) | {"decoupled": True}
