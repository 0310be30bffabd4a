"""The other kind of case: forward and backward of a function on tensors of a real size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from .models import Shape
from .peer import Peer
from .steps import CPU

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Sequence[Tensor]]  # computes a function's value and its gradients
# The value and gradients in float64; the flag asks for those of a yardstick, which leaves out what the function is about.
Oracle = Callable[[Tensors, bool], Sequence[Tensor]]

CHECK_ELEMENTS = 1 << 20  # elements of the main tensor when a variant is checked


@dataclass(frozen=True)
class Size:
    """The size of the tensors that a function is measured on.

    Attributes:
        name: Its name for `--models`.
        about: One line for `--list`.
        shape: The shape of the main tensor, whose gradient is asked for.
        outputs: Width of the linear layer that follows; 0 where none does.
    """

    name: str
    about: str
    shape: Shape
    outputs: int = 0

    @property
    def shapes(self) -> list[Shape]:
        """The shape of each tensor that gets a gradient."""
        width = self.shape[-1]
        return [self.shape, *([(self.outputs, width), (self.outputs,)] if self.outputs else [])]

    @property
    def elements(self) -> int:
        """The number of elements of the main tensor."""
        return prod(self.shape)

    @property
    def cropped(self) -> Size:
        """The same size with fewer rows, but at least two, for the check."""
        rows = max(2, CHECK_ELEMENTS // prod(self.shape[1:]))
        return replace(self, shape=(min(self.shape[0], rows), *self.shape[1:]))


@dataclass(frozen=True)
class FunctionPeer(Peer):
    """One way of computing a function and its gradients; `build()` returns a `Run`.

    Attributes:
        yardstick: It leaves out what the function is about, and gives a sense of scale.
        copies: Memory that it takes, in multiples of the main tensor.
    """

    yardstick: bool = False
    copies: float = 2.0


@dataclass(frozen=True)
class TimedFunction:
    """A function that gradfused computes, as a case of the benchmark.

    Attributes:
        name: Its name for `--recipes`.
        about: One line for `--list`.
        spoken: Its name in a sentence.
        sizes: The sizes that it is measured on.
        make: Makes the tensors of a size, with the same values every time.
        oracle: Computes the value and the gradients in float64.
        ways: The peers, gradfused first.
        standard: The name of the peer that most users would write; twice its error is allowed to all.
        streams: How many times the main tensor has to pass through memory, by size.
    """

    name: str
    about: str
    spoken: str
    sizes: tuple[Size, ...]
    make: Callable[[Size, torch.dtype, torch.device], Tensors]
    oracle: Oracle
    ways: tuple[FunctionPeer, ...]
    standard: str
    streams: Callable[[Size], int]


@dataclass(frozen=True)
class FunctionCase:
    """Forward and backward of one function on one size, which every variant computes, all interleaved.

    Attributes:
        recipe: The function.
        model: The size.
        dtype: The type of every tensor that gets a gradient.
        device: Where the tensors are.
    """

    recipe: TimedFunction
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
        """The case itself: a function has nothing to switch off."""
        return self

    @property
    def bytes_per_element(self) -> int:
        """Bytes that have to move for each element of the main tensor."""
        return self.recipe.streams(self.model) * self.dtype.itemsize

    @property
    def bytes_moved(self) -> int:
        """Bytes that have to move, not counting the weights of a linear layer."""
        return self.model.elements * self.bytes_per_element

    @property
    def title(self) -> str:
        """The heading of the case's table."""
        return (
            f"{self.model.name} | {self.recipe.name} | {self.work} | {self.dtype_name} on {self.device.type} "
            f"({self.model.about}: {self.model.elements / 1e6:.1f}M elements, {self.bytes_per_element} bytes each)"
        )

    def tensors(self, dtype: torch.dtype | None = None) -> Tensors:
        """The case's tensors; in another dtype their values are those of the case's own, converted."""
        made = self.recipe.make(self.model, self.dtype, self.device)
        if dtype is None:
            return made
        return {
            k: t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for k, t in made.items()
        }


def gradients(y: Tensor, tensors: Tensors, upstream: Tensor | None = None) -> list[Tensor]:
    """A value, and its gradient with respect to every tensor that requires one."""
    leaves = [tensor for tensor in tensors.values() if tensor.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream)]
