"""Parameter shapes of real models, in the order in which `model.parameters()` gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ModelShapes:
    """A model as an optimizer sees it: the shapes of its parameters.

    Attributes:
        name: Its name for `--models`.
        about: One line for `--list`.
        make: Yields the shape of each parameter.
    """

    name: str
    about: str
    make: Callable[[], Iterator[Shape]]

    @property
    def shapes(self) -> list[Shape]:
        """The shape of each parameter."""
        return list(self.make())

    @property
    def elements(self) -> int:
        """The number of elements of all parameters together."""
        return sum(map(prod, self.make()))


def norm(width: int) -> Iterator[Shape]:
    """Weight and bias of a batch or layer norm."""
    yield from [(width,), (width,)]


def linear(outputs: int, inputs: int) -> Iterator[Shape]:
    """Weight and bias of a linear layer."""
    yield from [(outputs, inputs), (outputs,)]


def small_400() -> Iterator[Shape]:
    """Many tensors so small that a step measures overhead in place of bandwidth."""
    for _ in range(200):
        yield from linear(32, 32)


def bottleneck(inputs: int, width: int, downsample: bool) -> Iterator[Shape]:
    """One residual block of a ResNet with 4 times as many output channels as `width`."""
    for outputs, channels, kernel in ((width, inputs, 1), (width, width, 3), (4 * width, width, 1)):
        yield (outputs, channels, kernel, kernel)
        yield from norm(outputs)
    if downsample:
        yield (4 * width, inputs, 1, 1)
        yield from norm(4 * width)


def resnet50() -> Iterator[Shape]:
    """torchvision's `resnet50`."""
    yield (64, 3, 7, 7)
    yield from norm(64)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from bottleneck(inputs, width, downsample=block == 0)
            inputs = 4 * width
    yield from linear(1000, 2048)


def vit_b16() -> Iterator[Shape]:
    """torchvision's `vit_b_16`."""
    width, mlp = 768, 3072
    yield (1, 1, width)
    yield (width, 3, 16, 16)
    yield (width,)
    yield (1, 197, width)
    for _ in range(12):
        yield from norm(width)
        yield from linear(3 * width, width)
        yield from linear(width, width)
        yield from norm(width)
        yield from linear(mlp, width)
        yield from linear(width, mlp)
    yield from norm(width)
    yield from linear(1000, width)


def conv1d(inputs: int, outputs: int) -> Iterator[Shape]:
    """Weight and bias of GPT-2's `Conv1D`, a linear layer whose weight is stored transposed."""
    yield from [(inputs, outputs), (outputs,)]


def gpt2() -> Iterator[Shape]:
    """Hugging Face's `gpt2`; the head is tied to the token embedding."""
    width = 768
    yield (50257, width)
    yield (1024, width)
    for _ in range(12):
        yield from norm(width)
        yield from conv1d(width, 3 * width)
        yield from conv1d(width, width)
        yield from norm(width)
        yield from conv1d(width, 4 * width)
        yield from conv1d(4 * width, width)
    yield from norm(width)


def llama_1b() -> Iterator[Shape]:
    """Hugging Face's `TinyLlama-1.1B`: no biases, 4 key and value heads, an untied head."""
    width, keys, mlp, vocabulary = 2048, 256, 5632, 32000
    yield (vocabulary, width)
    for _ in range(22):
        yield from [(width, width), (keys, width), (keys, width), (width, width)]
        yield from [(mlp, width), (mlp, width), (width, mlp)]
        yield from norm(width)
    yield (width,)
    yield (vocabulary, width)


MODELS = {
    model.name: model
    for model in (
        ModelShapes("small-400", "200 x (32, 32) and 200 x (32,): the overhead of a step", small_400),
        ModelShapes("resnet50", "torchvision's ResNet-50", resnet50),
        ModelShapes("vit-b16", "torchvision's ViT-B/16", vit_b16),
        ModelShapes("gpt2", "GPT-2 small, Conv1D weights as (in, out)", gpt2),
        ModelShapes("llama-1b", "TinyLlama-1.1B; 18 GB in float32, so a default on CUDA alone", llama_1b),
    )
}
