"""The second kind of case: forward and backward of a function on tensors of a real size, in place of an optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from .models import Shape
from .steps import CPU

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Sequence[Tensor]]  # the value and the gradients

CHECK_ELEMENTS = 1 << 20  # of the main tensor, when a way is checked


@dataclass(frozen=True)
class Size:
    """What a function is measured on.

    Attributes:
        name: What `--models` calls it.
        about: One line for `--list`.
        shape: Of the main tensor, whose gradient is asked for.
        outputs: Width of the linear layer behind it; 0 where there is none.
    """

    name: str
    about: str
    shape: Shape
    outputs: int = 0

    @property
    def shapes(self) -> list[Shape]:
        """The shape of each tensor that has a gradient."""
        width = self.shape[-1]
        return [self.shape, *([(self.outputs, width), (self.outputs,)] if self.outputs else [])]

    @property
    def elements(self) -> int:
        """Elements of the main tensor."""
        return prod(self.shape)

    @property
    def cropped(self) -> Size:
        """The same with fewer rows, of which at least two are left."""
        rows = max(2, CHECK_ELEMENTS // prod(self.shape[1:]))
        return replace(self, shape=(min(self.shape[0], rows), *self.shape[1:]))


@dataclass(frozen=True)
class Way:
    """One way of computing a function and its gradients.

    Attributes:
        name: What `--peers` and the tables call it.
        about: One line for `--list`.
        build: Makes what computes them, once a case.
        absent: Why this machine lacks it, or None.
        unable: Why it cannot do a case, or None.
        opt_in: Runs only where `--peers` names it.
        yardstick: Leaves out what the case is about, and is there for scale.
        copies: Memory that it takes, in multiples of the main tensor.
    """

    name: str
    about: str
    build: Callable[[], Run]
    absent: Callable[[], str | None] = lambda: None
    unable: Callable[[FunctionCase], str | None] = lambda case: None
    opt_in: bool = False
    yardstick: bool = False
    copies: float = 2.0

    def reason_against(self, case: FunctionCase) -> str | None:
        """Why it will not be measured on a case, or None if it can."""
        return self.absent() or self.unable(case)


@dataclass(frozen=True)
class Function:
    """A function and every way of computing it that is known here.

    Attributes:
        name: What `--recipes` calls it.
        about: One line for `--list`.
        sizes: What it is measured on.
        make: The tensors of a size, in a dtype on a device; the same values every time.
        oracle: The value and gradients in float64, with what the case is about or, for yardsticks, without.
        ways: gradfused first.
        standard: The way whose error, twice over, is allowed to all.
        streams: Times the main tensor has to pass through memory, by size.
    """

    name: str
    about: str
    sizes: tuple[Size, ...]
    make: Callable[[Size, torch.dtype, torch.device], Tensors]
    oracle: Callable[[Tensors, bool], Sequence[Tensor]]
    ways: tuple[Way, ...]
    standard: str
    streams: Callable[[Size], int]


@dataclass(frozen=True)
class FunctionCase:
    """What is measured: every way of one function on one size runs interleaved.

    Attributes:
        recipe: The function.
        model: The size.
        dtype: Of every tensor that has a gradient.
        device: Where they live.
    """

    recipe: Function
    model: Size
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU

    rule_name = "none"
    work = "forward and backward"

    @property
    def dtype_name(self) -> str:
        """The dtype without its `torch.` prefix."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def plain(self) -> FunctionCase:
        """There is no simpler case."""
        return self

    @property
    def bytes_moved(self) -> int:
        """What has to pass through memory, weights aside."""
        return self.model.elements * self.recipe.streams(self.model) * self.dtype.itemsize

    @property
    def title(self) -> str:
        """What a table is about."""
        per_element = self.recipe.streams(self.model) * self.dtype.itemsize
        return (
            f"{self.model.name} | {self.recipe.name} | {self.work} | {self.dtype_name} on {self.device.type} "
            f"({self.model.about}: {self.model.elements / 1e6:.1f}M elements, {per_element} bytes each)"
        )

    def tensors(self, dtype: torch.dtype | None = None) -> Tensors:
        """The case's tensors; in another dtype their values are those of the case's own."""
        made = self.recipe.make(self.model, self.dtype, self.device)
        if dtype is None:
            return made
        return {
            k: t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for k, t in made.items()
        }


def gradients(y: Tensor, tensors: Tensors, upstream: Tensor | None = None) -> list[Tensor]:
    """A value and its gradients by every tensor that has one."""
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]
