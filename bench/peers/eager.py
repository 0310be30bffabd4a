"""A recipe in plain PyTorch, as careful users write it: what peers do before, around and after their own step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from ..cases import StepRecipe, Workload
from ..timing import Step

CLIP_EPS = 1e-6  # as in torch's clip_grad_norm_


class NoiseSource:
    """Gives eager peers standard normal noise from torch's own generator."""

    def advance(self, step: int) -> None:
        """Prepare the noise of a step; called once before each."""

    def draw(self, index: int, grad: Tensor) -> Tensor:
        """Noise for the parameter at `index`, shaped like its gradient."""
        return torch.randn_like(grad)


class Transforms:
    """The parts of a recipe that change the gradients, applied to them in place.

    Args:
        recipe: The recipe to apply.
        params: The parameters whose gradients are changed.
        source: Where noise comes from.
        foreach: Use torch's multi-tensor operations where they exist.
        sigma_tensor: Keep the scale of the noise in a tensor, so that compiled code is not compiled again when it changes.
    """

    def __init__(
        self,
        recipe: StepRecipe,
        params: Sequence[Tensor],
        source: NoiseSource,
        *,
        foreach: bool,
        sigma_tensor: bool = False,
    ) -> None:
        self.recipe, self.params, self.source, self.foreach = recipe, params, source, foreach
        self.step = 0
        self.sigma: float | Tensor = 0.0
        if sigma_tensor:
            self.sigma = torch.zeros((), dtype=params[0].dtype, device=params[0].device)

    def advance(self) -> None:
        """Prepare the noise of the next step."""
        if not self.recipe.noise:
            return
        sigma = self.recipe.sigma(self.step)
        if isinstance(self.sigma, Tensor):
            self.sigma.fill_(sigma)
        else:
            self.sigma = sigma
        self.source.advance(self.step)
        self.step += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Centralise, clip, add noise and reverse, in gradfused's order."""
        recipe, grads = self.recipe, gradients(self.params)
        if recipe.centralize:
            centralize(grads, foreach=self.foreach)
        if recipe.clip is not None:
            clip_grad_norm_(self.params, recipe.clip, foreach=self.foreach)
        if recipe.noise:
            add_noise(grads, self.source, self.sigma, foreach=self.foreach)
        if recipe.reverse is not None:
            scale(grads, -recipe.reverse, foreach=self.foreach)


class FoldedTransforms(Transforms):
    """Transforms that leave clipping and reversal to the division by `grad_scale` in torch's fused step.

    Both multiply every gradient by one number. Handing that number to the optimizer saves a read and a write of every gradient.
    """

    @torch.no_grad()
    def folded(self) -> Tensor:
        """Do what cannot be folded, and return the 0-dim tensor to set as `grad_scale`."""
        recipe, grads = self.recipe, gradients(self.params)
        if recipe.centralize:
            centralize(grads, foreach=self.foreach)
        divisor = torch.ones((), device=grads[0].device)
        if recipe.clip is not None:
            total = get_total_norm(grads, foreach=self.foreach).float()
            divisor = ((total + CLIP_EPS) / recipe.clip).clamp_(min=1.0)
        if recipe.noise:
            # The step will divide the noise as well, so it is scaled up here.
            noise_scale = (divisor * self.sigma).to(grads[0].dtype)
            add_noise(grads, self.source, noise_scale, foreach=self.foreach)
        return divisor if recipe.reverse is None else divisor / -recipe.reverse


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the parameters that have one, read anew each step as training does."""
    return [param.grad for param in params if param.grad is not None]


def centralize(grads: list[Tensor], *, foreach: bool) -> None:
    """Subtract the mean of each unit from gradients of dim >= 2."""
    matrices = [grad for grad in grads if grad.dim() > 1]
    if foreach and matrices:
        torch._foreach_sub_(matrices, [unit_mean(grad) for grad in matrices])
        return
    for grad in matrices:
        grad.sub_(unit_mean(grad))


def unit_mean(grad: Tensor) -> Tensor:
    """The mean over everything but dim 0, broadcastable to the gradient."""
    return grad.mean(dim=tuple(range(1, grad.dim())), keepdim=True)


def add_noise(grads: list[Tensor], source: NoiseSource, sigma: float | Tensor, *, foreach: bool) -> None:
    """Add `sigma` times standard normal noise to each gradient."""
    if foreach and not isinstance(sigma, Tensor):
        noises = [source.draw(index, grad) for index, grad in enumerate(grads)]
        torch._foreach_add_(grads, noises, alpha=sigma)
        return
    for index, grad in enumerate(grads):
        noise = source.draw(index, grad)
        if isinstance(sigma, Tensor):
            grad.addcmul_(noise, sigma)
        else:
            grad.add_(noise, alpha=sigma)


def scale(grads: list[Tensor], factor: float, *, foreach: bool) -> None:
    """Multiply every gradient by a number."""
    if foreach:
        torch._foreach_mul_(grads, factor)
        return
    for grad in grads:
        grad.mul_(factor)


class EagerSAM:
    """Sharpness-aware minimization as its paper writes it (Foret et al. 2021, equations 2 and 3).

    Args:
        params: The parameters to move along their gradients.
        rho: The length of the ascent.
        foreach: Use torch's multi-tensor operations.
    """

    def __init__(self, params: list[torch.nn.Parameter], rho: float, *, foreach: bool) -> None:
        self.params: list[Tensor] = list(params)
        self.rho, self.foreach = rho, foreach
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def ascend(self) -> None:
        """Save the weights, and move them by rho along the gradient."""
        grads = gradients(self.params)
        scale = float(self.rho / (get_total_norm(grads, foreach=self.foreach) + 1e-12))
        self.kept = [p.detach().clone() for p in self.params]
        if self.foreach:
            torch._foreach_add_(self.params, grads, alpha=scale)
            return
        for p, grad in zip(self.params, grads, strict=True):
            p.add_(grad, alpha=scale)

    @torch.no_grad()
    def restore(self) -> None:
        """Copy the saved weights back."""
        if self.foreach:
            torch._foreach_copy_(self.params, self.kept)
        else:
            for p, kept in zip(self.params, self.kept, strict=True):
                p.copy_(kept)
        self.kept = []


def average(workload: Workload, fresh: float) -> None:
    """Move the averages towards the weights; lerp does not mix dtypes, so 16-bit weights take two operations."""
    params: list[Tensor] = list(workload.params)
    if workload.averages[0].dtype == params[0].dtype:
        torch._foreach_lerp_(workload.averages, params, fresh)
    else:
        torch._foreach_mul_(workload.averages, 1.0 - fresh)
        torch._foreach_add_(workload.averages, params, alpha=fresh)


def around(recipe: StepRecipe, workload: Workload, step: Step, *, foreach: bool) -> Step:
    """A step with SAM before it and an average of the weights after it, where the recipe has them."""
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
