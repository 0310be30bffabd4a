"""Tensors that every variant of a case shares, and the case itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from .models import Model, Shape
from .recipes import RECIPES, Recipe, Rule

ALIGNMENT = {"cpu": 64, "cuda": 512}  # bytes; that of torch's own allocations
CPU = torch.device("cpu")
MAX_SETS = 128  # of tensors that rotate past a cache: a real model needs far fewer
SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
PATTERN = 1 << 16  # elements; small enough to stay in cache, so that a refresh only writes


@dataclass(frozen=True)
class Case:
    """What is measured: every variant of one case runs interleaved.

    Attributes:
        model: Whose parameters are stepped.
        recipe: The gradient transforms.
        rule: The update rule.
        dtype: Of parameters, gradients and state.
        device: Where they live.
        lr: Learning rate; small, so that weights stay sane over thousands of steps.
        weight_decay: Always on: without it a wrong decay would go unnoticed.
        captured: The steps are to be captured in a CUDA graph; torch's optimizers must know.
    """

    model: Model
    recipe: Recipe
    rule: Rule
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    lr: float = 1e-5
    weight_decay: float = 0.01
    captured: bool = False

    work = "optimizer step"

    @property
    def rule_name(self) -> str:
        """Of the update rule."""
        return self.rule.name

    @property
    def plain(self) -> Case:
        """The same without transforms."""
        return replace(self, recipe=RECIPES["plain"])

    @property
    def tensors(self) -> Case:
        """A case on the same tensors: the recipe counts where it keeps state."""
        return self if self.recipe.state else self.plain

    @property
    def title(self) -> str:
        """What a table is about."""
        per_element = self.rule.bytes_per_element(self.recipe, self.dtype.itemsize)
        return (
            f"{self.model.name} | {self.recipe.name} | {self.rule.name} | {self.dtype_name} on "
            f"{self.device.type} ({len(self.model.shapes)} tensors, "
            f"{self.model.elements / 1e6:.1f}M elements, {per_element} bytes each)"
        )

    @property
    def dtype_name(self) -> str:
        """The dtype without its `torch.` prefix."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def bytes_moved(self) -> int:
        """Bytes that one step may move: the budget of docs/design.md#byte-budgets."""
        return self.model.elements * self.rule.bytes_per_element(self.recipe, self.dtype.itemsize)


class Slab:
    """Tensors of the given shapes in one allocation, each aligned, so that a roof can sweep it."""

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
        """Overwrites the slab with repetitions of a 1-D pattern."""
        rows = self.flat.numel() // pattern.numel()
        body = rows * pattern.numel()
        self.flat[:body].view(rows, pattern.numel()).copy_(pattern)
        self.flat[body:].copy_(pattern[: self.flat.numel() - body])


class Workload:
    """Parameters, gradients and optimizer state that the variants of a case take turns with.

    Sharing them keeps a benchmark of many optimizers at the memory of one, and gives every variant
    the same addresses.

    Args:
        shapes: Of the parameters.
        rule: Says which state there is.
        dtype: Of every tensor but the averages of 16-bit weights, which are of float32.
        device: Of every tensor.
        recipe: May add state.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        rule: Rule,
        dtype: torch.dtype,
        device: torch.device,
        recipe: Recipe = RECIPES["plain"],
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
        # Neither centred, nor of norm below 1, nor near the dtype's denormals.
        self.pattern = (0.01 * (noise + 0.5)).to(dtype)

    @property
    def averages(self) -> list[Tensor]:
        """The moving average of each parameter."""
        return self.state["ema"].tensors

    @torch.no_grad()
    def reset(self) -> None:
        """Gives every tensor ordinary values."""
        self.weights.tile(self.pattern * 10)
        for key, slab in self.state.items():
            slab.tile(self.pattern.square() if key in SQUARES else self.pattern)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Restores the gradients, which eager transforms overwrite, as a backward pass would."""
        self.grads.tile(self.pattern)

    @torch.no_grad()
    def clear_state(self) -> None:
        """Zeroes the state: that of an optimizer before its first step."""
        for slab in self.state.values():
            slab.flat.zero_()


def make_sets(case: Case, cache_bytes: int) -> list[Workload]:
    """A case's tensors, as often as it takes to overflow a cache when steps take the sets in turn."""
    count = sets_needed(bytes_needed(case.model.elements, case.rule, case.dtype), cache_bytes)
    return [workload_of(case) for _ in range(count)]


def workload_of(case: Case, shapes: Sequence[Shape] | None = None) -> Workload:
    """A case's tensors, in the model's shapes or others."""
    return Workload(shapes or case.model.shapes, case.rule, case.dtype, case.device, case.recipe)


def sets_needed(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of tensors are together larger than a cache twice over."""
    return max(1, min(MAX_SETS, 2 * cache_bytes // max(1, set_bytes) + 1)) if cache_bytes else 1


def bytes_needed(elements: int, rule: Rule, dtype: torch.dtype, copies: float = 0.0) -> int:
    """Memory of a workload and of a variant's temporaries.

    Args:
        elements: Of all parameters.
        rule: Says how much state there is.
        dtype: Of every tensor.
        copies: Temporaries, in multiples of the parameters' size.
    """
    return int(elements * dtype.itemsize * (2 + len(rule.state) + copies))


def bytes_available(device: torch.device) -> int:
    """Memory that can be had on a device without swapping, as far as the system tells."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(available, container_bytes())


def container_bytes() -> int:
    """What a container's memory limit leaves; huge where there is none."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        return int(limit) - used
    except (OSError, ValueError):  # no cgroup v2, or the limit reads "max"
        return 1 << 62
