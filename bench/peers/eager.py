"""A recipe in plain PyTorch, as careful users write it: what peers run before their own step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from ..cases.recipes import Recipe

CLIP_EPS = 1e-6  # as in torch's clip_grad_norm_


class NoiseSource:
    """Where eager peers get standard normal noise: torch's own generator."""

    def advance(self, step: int) -> None:
        """Called once before each step."""

    def draw(self, index: int, grad: Tensor) -> Tensor:
        """Noise for the parameter at `index`, shaped like its gradient."""
        return torch.randn_like(grad)


class Transforms:
    """Applies a recipe to gradients in place.

    Args:
        recipe: What to apply.
        params: Whose gradients.
        source: Of noise.
        foreach: Use torch's multi-tensor operations where they exist.
        sigma_tensor: Keep the noise's scale in a tensor, so that compiled code need not be
            compiled again when it changes.
    """

    def __init__(
        self,
        recipe: Recipe,
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
        """Prepares the noise of the next step."""
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
        """Transforms the gradients, in the order of docs/design.md#what-a-step-computes."""
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
    """As `Transforms`, but leaves the last multiplication to the fused step's `grad_scale`.

    What would multiply every gradient (clipping, reversal) is returned as the number that the
    optimizer divides by, which saves a read and a write of every gradient.
    """

    @torch.no_grad()
    def folded(self) -> Tensor:
        """Transforms the gradients as far as needed; returns the 0-dim `grad_scale` to preset."""
        recipe, grads = self.recipe, gradients(self.params)
        if recipe.centralize:
            centralize(grads, foreach=self.foreach)
        divisor = torch.ones((), device=grads[0].device)
        if recipe.clip is not None:
            total = get_total_norm(grads, foreach=self.foreach).float()
            divisor = ((total + CLIP_EPS) / recipe.clip).clamp_(min=1.0)
        if recipe.noise:
            # Scaled up here, because the step will scale it down.
            noise_scale = (divisor * self.sigma).to(grads[0].dtype)
            add_noise(grads, self.source, noise_scale, foreach=self.foreach)
        return divisor if recipe.reverse is None else divisor / -recipe.reverse


def gradients(params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, read anew each step as training does."""
    return [param.grad for param in params if param.grad is not None]


def centralize(grads: list[Tensor], *, foreach: bool) -> None:
    """Subtracts each unit's mean from gradients of dim >= 2."""
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
    """Adds `sigma` times standard normal noise to each gradient."""
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
    """Multiplies every gradient by a number."""
    if foreach:
        torch._foreach_mul_(grads, factor)
        return
    for grad in grads:
        grad.mul_(factor)
