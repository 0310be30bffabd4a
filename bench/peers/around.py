"""What a recipe has around a step, in plain PyTorch: SAM's ascent before it, an average of the weights after it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..cases.recipes import Recipe
from ..timing.rounds import Step


class Tensors(Protocol):
    """What is needed of a workload."""

    params: list[torch.nn.Parameter]

    @property
    def averages(self) -> list[Tensor]:
        """The moving average of each parameter."""


class EagerSAM:
    """Sharpness-aware minimization as its paper writes it (Foret et al. 2021, equations 2 and 3).

    Args:
        params: Whose gradients are ascended.
        rho: Length of the ascent.
        foreach: Use torch's multi-tensor operations.
    """

    def __init__(self, params: list[torch.nn.Parameter], rho: float, *, foreach: bool) -> None:
        self.params, self.rho, self.foreach = params, rho, foreach
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def ascend(self) -> None:
        """Moves the weights to the top of the ball around them."""
        grads = [p.grad for p in self.params if p.grad is not None]
        scale = float(self.rho / (get_total_norm(grads, foreach=self.foreach) + 1e-12))
        self.kept = [p.detach().clone() for p in self.params]
        if self.foreach:
            torch._foreach_add_(self.params, grads, alpha=scale)
            return
        for p, grad in zip(self.params, grads, strict=True):
            p.add_(grad, alpha=scale)

    @torch.no_grad()
    def restore(self) -> None:
        """Brings them back."""
        if self.foreach:
            torch._foreach_copy_(self.params, self.kept)
        else:
            for p, kept in zip(self.params, self.kept, strict=True):
                p.copy_(kept)
        self.kept = []


def average(workload: Tensors, fresh: float) -> None:
    """Moves the averages towards the weights; in two operations where these are of 16 bits, which lerp does not mix."""
    params = list(workload.params)
    if workload.averages[0].dtype == params[0].dtype:
        torch._foreach_lerp_(workload.averages, params, fresh)
    else:
        torch._foreach_mul_(workload.averages, 1.0 - fresh)
        torch._foreach_add_(workload.averages, params, alpha=fresh)


def around(recipe: Recipe, workload: Tensors, step: Step, *, foreach: bool) -> Step:
    """A step with the recipe's SAM before it and its average after it."""
    if recipe.sam is not None:
        sam, inner = EagerSAM(workload.params, recipe.sam, foreach=foreach), step

        def both_halves() -> None:
            sam.ascend()
            sam.restore()
            inner()

        step = both_halves
    if recipe.ema is not None:
        fresh, alone = 1.0 - recipe.ema, step

        @torch.no_grad()
        def step_and_average() -> None:
            alone()
            average(workload, fresh)

        step = step_and_average
    return step
