"""The tensors that all variants of a step case take turns with."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from .models import Shape
from .recipes import RECIPES, StepRecipe
from .rules import UpdateRule
from .steps import StepCase, bytes_needed, sets_needed

ALIGNMENT = {"cpu": 64, "cuda": 512}  # bytes, like torch's own allocations
PATTERN = 1 << 16  # elements; small enough to stay in cache, so that a refresh only writes


class Slab:
    """Tensors of given shapes in one allocation, each aligned, so that the roof can go over all of it at once."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> None:
        step = ALIGNMENT[device.type] // dtype.itemsize
        offsets = [0]
        for shape in shapes:
            offsets.append(offsets[-1] + -(-prod(shape) // step) * step)
        self.flat = torch.zeros(offsets[-1], dtype=dtype, device=device)
        self.tensors = [
            self.flat[start : start + prod(shape)].view(shape) for start, shape in zip(offsets, shapes, strict=False)
        ]

    def tile(self, pattern: Tensor) -> None:
        """Overwrite the allocation with repetitions of a 1-D pattern."""
        rows = self.flat.numel() // pattern.numel()
        body = rows * pattern.numel()
        self.flat[:body].view(rows, pattern.numel()).copy_(pattern)
        self.flat[body:].copy_(pattern[: self.flat.numel() - body])


class Workload:
    """Parameters, gradients and optimizer state of a step case.

    All variants share them: a benchmark of many optimizers then needs the memory of one, and every variant finds the same
    addresses.

    Args:
        shapes: The shape of each parameter.
        rule: The update rule, which says what state there is.
        dtype: The type of every tensor, except that averages of 16-bit weights are float32.
        device: Where every tensor is.
        recipe: The recipe, which may add state.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        rule: UpdateRule,
        dtype: torch.dtype,
        device: torch.device,
        recipe: StepRecipe = RECIPES["plain"],
    ) -> None:
        self.rule, self.recipe = rule, recipe
        self.weights, self.grads = Slab(shapes, dtype, device), Slab(shapes, dtype, device)
        short = dtype in (torch.float16, torch.bfloat16)
        kept = {key: torch.float32 if short and key == "ema" else dtype for key in (*rule.state, *recipe.state)}
        self.state = {key: Slab(shapes, kept[key], device) for key in kept}
        self.params = [torch.nn.Parameter(tensor) for tensor in self.weights.tensors]
        for param, grad in zip(self.params, self.grads.tensors, strict=True):
            param.grad = grad
        generator = torch.Generator(device).manual_seed(0)
        noise = torch.randn(PATTERN, generator=generator, device=device)
        # Off centre, and neither so small that clipping has nothing to do nor near the dtype's denormals.
        self.pattern = (0.01 * (noise + 0.5)).to(dtype)

    @property
    def averages(self) -> list[Tensor]:
        """The moving average of each parameter."""
        return self.state["ema"].tensors

    @torch.no_grad()
    def reset(self) -> None:
        """Give every tensor ordinary values; none of the state is negative, because it may be an average of squares."""
        self.weights.tile(self.pattern * 10)
        for slab in self.state.values():
            slab.tile(self.pattern.abs())
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Rewrite the gradients, as a backward pass would: eager transforms overwrite them."""
        self.grads.tile(self.pattern)

    @torch.no_grad()
    def clear_state(self) -> None:
        """Zero the state, as it is before an optimizer's first step."""
        for slab in self.state.values():
            slab.flat.zero_()


def make_sets(case: StepCase, cache_bytes: int) -> list[Workload]:
    """As many sets of a case's tensors as overflow a cache when steps take the sets in turn."""
    count = sets_needed(bytes_needed(case.model.elements, case.rule, case.dtype), cache_bytes)
    return [workload_of(case) for _ in range(count)]


def workload_of(case: StepCase, shapes: Sequence[Shape] | None = None) -> Workload:
    """One set of a case's tensors, in the model's shapes or in others."""
    return Workload(shapes or case.model.shapes, case.rule, case.dtype, case.device, case.recipe)
