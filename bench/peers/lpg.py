"""Cross-entropy with logit-gradient perturbation (LPG), forward and backward: its sizes, its oracle and its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradfused.nn import lpg_cross_entropy

from ..cases import CROSS_ENTROPY, OURS, FunctionPeer, Run, Size, Tensors, TimedFunction, gradients

SIZES = (
    Size("8192x1000", "logits of 8192 images, 1000 classes", (8192, 1000)),
    Size("2048x32000", "logits of 2048 tokens, 32000 words", (2048, 32000)),
)
LEAST, MOST = 0.05, 2.0  # bounds of a radius; some radii exceed the norm that they are to dampen


def make(size: Size, dtype: torch.dtype, device: torch.device) -> Tensors:
    """Logits, and targets with a long tail: class k is as frequent as 1 / k, frequent ones are dampened, rare ones amplified."""
    generator = torch.Generator().manual_seed(0)
    rows, classes = size.shape
    drawn = torch.rand(rows, generator=generator, dtype=torch.float64)
    ranks = torch.arange(classes)
    return {
        "logits": torch.randn(rows, classes, generator=generator).to(device, dtype).requires_grad_(),
        "target": (classes**drawn).long().sub_(1).clamp_(0, classes - 1).to(device),
        "sign": torch.where(ranks < classes**0.5, -1, 1).to(device),
        "radius": torch.empty(classes).uniform_(LEAST, MOST, generator=generator).to(device),
    }


def oracle(tensors: Tensors, plain: bool) -> Sequence[Tensor]:
    """The definition of LPG, computed class by class."""
    logits, target = tensors["logits"].detach(), tensors["target"]
    picked = logits.log_softmax(1).gather(1, target[:, None])
    gradient = logits.softmax(1) - F.one_hot(target, logits.shape[1])
    for c in [] if plain else target.unique().tolist():
        members = target == c
        mean = gradient[members].mean(0)
        norm = mean.norm()
        length = tensors["radius"][c] if tensors["sign"][c] > 0 else -min(tensors["radius"][c], norm)
        gradient[members] += length * mean / norm
    return [-picked.mean(), gradient / len(target)]


class EagerLPG(torch.autograd.Function):
    """The formula as one writes it in torch: cross-entropy in the forward pass, perturbed gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, sign: Tensor, radius: Tensor) -> Tensor:
        log_p = logits.log_softmax(1, dtype=exact_dtype(logits))
        ctx.save_for_backward(log_p, target, sign, radius)
        ctx.dtype = logits.dtype
        return F.nll_loss(log_p, target)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        log_p, target, sign, radius = ctx.saved_tensors
        rows = torch.arange(len(target), device=target.device)
        gradient = log_p.exp()
        gradient[rows, target] -= 1
        classes, members, counts = target.unique(return_inverse=True, return_counts=True)
        means = gradient.new_zeros(len(classes), gradient.shape[1]).index_add(0, members, gradient) / counts[:, None]
        norms = means.norm(dim=1)
        delta = means * (lengths(norms, sign[classes], radius[classes]) / norms.clamp_min(1e-12))[:, None]
        perturbed = (gradient + delta[members]) * (upstream / len(target))
        return perturbed.to(ctx.dtype), None, None, None


def exact_dtype(logits: Tensor) -> torch.dtype:
    """The dtype to compute in: float32 for 16-bit logits, the logits' own otherwise."""
    return torch.promote_types(logits.dtype, torch.float32)


def lengths(norms: Tensor, sign: Tensor, radius: Tensor) -> Tensor:
    """How far the mean gradient of each class moves along itself."""
    radius = radius.to(norms.dtype)
    return torch.where(sign > 0, radius, torch.where(sign < 0, -radius.minimum(norms), 0.0))


def frugal_lpg(
    log_p: Tensor, tensors: Tensors, members: Tensor, counts: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """The formula in the fewest torch operations that we know: all in place, with the gradient computed along with the loss.

    Args:
        log_p: Log-softmax of the logits; it is overwritten.
        tensors: The tensors of the case.
        members: For each row, the index of its class among the classes in the batch.
        counts: The number of rows of each class in the batch.
        classes: The classes in the batch.
    """
    target, rows = tensors["target"][:, None], log_p.shape[0]
    loss = -log_p.gather(1, target).mean()
    gradient = log_p.exp_()
    gradient.scatter_add_(1, target, gradient.new_full((1, 1), -1.0).expand(rows, 1))
    means = gradient.new_zeros(len(counts), log_p.shape[1]).index_add_(0, members, gradient)
    means.div_(counts[:, None])
    norms = means.norm(dim=1)
    length = lengths(norms, tensors["sign"][classes], tensors["radius"][classes])
    means.mul_((length / norms.clamp_min(1e-12))[:, None])
    gradient.add_(means.index_select(0, members))
    return loss, gradient.div_(rows)


def frugally(run: Callable[..., tuple[Tensor, Tensor]]) -> Run:
    """The frugal formula, with the classes of the batch and the log-softmax computed before it."""

    def loss_and_gradient(tensors: Tensors) -> list[Tensor]:
        logits = tensors["logits"].detach()
        classes, members, counts = tensors["target"].unique(return_inverse=True, return_counts=True)
        loss, gradient = run(logits.log_softmax(1, dtype=exact_dtype(logits)), tensors, members, counts, classes)
        return [loss, gradient.to(logits.dtype)]

    return loss_and_gradient


def build_compiled() -> Run:
    """torch.compile of the frugal formula, without the search for the batch's classes, whose number it cannot know."""
    torch.compiler.reset()
    return frugally(torch.compile(frugal_lpg, dynamic=True))


def run_gradfused(tensors: Tensors) -> list[Tensor]:
    """gradfused's loss and its gradient."""
    loss = lpg_cross_entropy(tensors["logits"], tensors["target"], tensors["sign"], tensors["radius"])
    return gradients(loss, tensors)


def run_eager(tensors: Tensors) -> list[Tensor]:
    """The eager loss and its gradient."""
    loss = EagerLPG.apply(tensors["logits"], tensors["target"], tensors["sign"], tensors["radius"])
    return gradients(loss, tensors)


def run_cross_entropy(tensors: Tensors) -> list[Tensor]:
    """torch's own loss, whose gradient is not perturbed."""
    return gradients(F.cross_entropy(tensors["logits"], tensors["target"]), tensors)


WAYS = (
    FunctionPeer(OURS, "gradfused.nn.lpg_cross_entropy", lambda: run_gradfused),
    FunctionPeer(
        "eager-lpg",
        "the formula as one writes it, an autograd function",
        lambda: run_eager,
        "the formula written in PyTorch",
        copies=7,
    ),
    FunctionPeer(
        "eager-lpg-frugal",
        "in place, with the gradient computed along with the loss",
        lambda: frugally(frugal_lpg),
        copies=5,
    ),
    FunctionPeer(
        "torch-compile", "torch.compile of the frugal formula; slow to compile", build_compiled, opt_in=True, copies=5
    ),
    FunctionPeer(
        CROSS_ENTROPY, "F.cross_entropy, without perturbation", lambda: run_cross_entropy, yardstick=True, copies=3
    ),
)

LPG = TimedFunction(
    name="lpg",
    about="cross-entropy with class-level logit-gradient perturbation",
    spoken="LPG cross-entropy",
    sizes=SIZES,
    make=make,
    oracle=oracle,
    ways=WAYS,
    standard="eager-lpg",
    streams=lambda size: 3,  # both passes read the logits, and the backward pass writes their gradient
)
