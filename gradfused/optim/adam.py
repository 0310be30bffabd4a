"""Adam and AdamW, which differ in their weight decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..step.options import items
from ..step.schema import Recipe
from .base import Optimizer, Params
from .rule import Rule, given


def _refuse_tensors(lr: object, betas: object, foreach: bool) -> None:
    """Raise ValueError for tensors where torch's constructor does: one beta of two, or any where ``foreach`` is asked for."""
    are = [isinstance(value, Tensor) for value in (lr, *(items(betas) or ()))]
    if len(are) == 3 and are[1] != are[2]:
        raise ValueError(f"betas: expected two numbers or two tensors, as torch does, got {betas!r}")
    if foreach and any(are):
        name, value = ("lr", lr) if are[0] else ("betas", betas)
        raise ValueError(
            f"{name}: expected a number, as torch does with foreach=True and capturable=False, got {value!r}; "
            "leave out foreach: every step is fused"
        )


class Adam(Optimizer):
    """Drop-in for ``torch.optim.Adam`` (Kingma & Ba 2015) with a gradient recipe fused into the step.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: Learning rate; a one-element tensor is read at each step.
        betas: Decay of the running averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Weight decay, coupled unless ``decoupled_weight_decay``.
        amsgrad: Keep the maximum of the second moment (Reddi et al. 2018).
        maximize: Ascend.
        foreach, fused, capturable: Accepted and ignored: every step is fused.
        differentiable: Must be False.
        decoupled_weight_decay: Decay the weights as AdamW does.
        **recipe: See gradfused.Recipe.
    """

    _rule = Rule("adam", {"exp_avg": None, "exp_avg_sq": None, "max_exp_avg_sq": "amsgrad"})

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **recipe: Unpack[Recipe],
    ) -> None:
        super().__init__(**given(locals()))
        _refuse_tensors(lr, betas, foreach=bool(foreach) and not capturable)


class AdamW(Adam):
    """Drop-in for ``torch.optim.AdamW`` (Loshchilov & Hutter 2019) with a gradient recipe fused into the step.

    The arguments are Adam's, but weight decay is always decoupled: each step multiplies weights by
    ``1 - lr * weight_decay``.
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
