"""Gradient reversal, alone and before a linear layer: its sizes, its oracle and its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradfused.nn import GradientReversal, reversal_linear

from ..cases import NO_REVERSAL, OURS, FunctionCase, FunctionPeer, Run, Size, Tensors, TimedFunction, gradients, needs

LAMBDA = 0.5

SIZES = (
    Size("pooled-features", "256 images' features of a ResNet-50 into a domain head of 1024", (256, 2048), 1024),
    Size("token-features", "16384 tokens' features of width 768 into a domain head of 100", (16384, 768), 100),
    Size("feature-map", "32 maps of 256 channels, reversal alone", (32, 256, 56, 56)),
)


def make(size: Size, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Features, the linear layer that follows, if any, and the gradient that arrives at the output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    tensors = {"x": normal(*size.shape).requires_grad_()}
    if size.outputs:
        width = size.shape[-1]
        tensors["weight"] = normal(size.outputs, width, scale=width**-0.5).requires_grad_()
        tensors["bias"] = normal(size.outputs).requires_grad_()
    return tensors | {"upstream": normal(*size.shape[:-1], size.outputs or size.shape[-1])}


def oracle(tensors: Tensors, plain: bool) -> Sequence[Tensor]:
    """The formulas of the value and of each gradient."""
    x, upstream, factor = tensors["x"].detach(), tensors["upstream"], 1.0 if plain else -LAMBDA
    if "weight" not in tensors:
        return [x, factor * upstream]
    weight, bias = tensors["weight"].detach(), tensors["bias"].detach()
    return [x @ weight.t() + bias, factor * upstream @ weight, upstream.t() @ x, upstream.sum(0)]


class PlainFunction(torch.autograd.Function):
    """Reversal as most code that uses it has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lambda_: float) -> Tensor:
        ctx.lambda_ = lambda_
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.neg() * ctx.lambda_, None


def layered(reverse: Callable[[Tensor], Tensor]) -> Run:
    """Reversal as a layer, then the linear layer, if there is one."""

    def run(tensors: Tensors) -> list[Tensor]:
        y = reverse(tensors["x"])
        y = F.linear(y, tensors["weight"], tensors["bias"]) if "weight" in tensors else y
        return gradients(y, tensors, tensors["upstream"])

    return run


def build_gradfused() -> Run:
    """gradfused: reversal folded into the linear layer, or alone where there is none."""
    alone = layered(GradientReversal(LAMBDA))

    def run(tensors: Tensors) -> Sequence[Tensor]:
        if "weight" not in tensors:
            return alone(tensors)
        y = reversal_linear(tensors["x"], tensors["weight"], tensors["bias"], LAMBDA)
        return gradients(y, tensors, tensors["upstream"])

    return run


def build_compiled() -> Run:
    """torch.compile of the plain function and the linear layer together."""
    torch.compiler.reset()

    @torch.compile
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = PlainFunction.apply(x, LAMBDA)
        return y if weight is None else F.linear(y, weight, bias)

    def run(tensors: Tensors) -> Sequence[Tensor]:
        y = forward(tensors["x"], tensors.get("weight"), tensors.get("bias"))
        return gradients(y, tensors, tensors["upstream"])

    return run


def build_revgrad() -> Run:
    """The layer of pytorch-revgrad."""
    return layered(import_module("pytorch_revgrad").RevGrad(alpha=LAMBDA))


def needs_a_head(case: FunctionCase) -> str | None:
    """Why gradfused's layer is not measured, or None: without a linear layer, gradfused itself runs just that layer."""
    return None if case.model.outputs else f"is {OURS} itself where no linear layer follows"


def streams(size: Size) -> int:
    """Alone, the gradient is read and written. Before a linear layer, features are read twice and their gradient is written."""
    return 3 if size.outputs else 2


WAYS = (
    FunctionPeer(OURS, "gradfused.nn.reversal_linear, or GradientReversal alone", build_gradfused),
    FunctionPeer(
        f"{OURS}-layer",
        "GradientReversal, then F.linear",
        lambda: layered(GradientReversal(LAMBDA)),
        unable=needs_a_head,
    ),
    FunctionPeer(
        "autograd-function",
        "the usual ten lines of an autograd function",
        lambda: layered(lambda x: PlainFunction.apply(x, LAMBDA)),
        "the usual autograd function",
    ),
    FunctionPeer(
        "pytorch-revgrad", "its RevGrad layer", build_revgrad, absent=needs("pytorch_revgrad", "pytorch-revgrad")
    ),
    FunctionPeer("torch-compile", "torch.compile of autograd-function and F.linear", build_compiled, opt_in=True),
    FunctionPeer(NO_REVERSAL, "the same without reversal", lambda: layered(lambda x: x.view_as(x)), yardstick=True),
)

REVERSAL = TimedFunction(
    name="reversal",
    about="gradient reversal at a layer boundary, alone and before a linear layer",
    spoken="gradient reversal",
    sizes=SIZES,
    make=make,
    oracle=oracle,
    ways=WAYS,
    standard="autograd-function",
    streams=streams,
)
