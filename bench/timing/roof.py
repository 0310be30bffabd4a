"""The roof: what memory gives a loop with a step's streams and no math."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradfused.backends import cpu

from ..cases.steps import Case, Workload, bytes_available
from .rounds import Step

COPY_BYTES = 1 << 31  # of each side of the copy: tens of times any GPU's L2


@dataclass(frozen=True)
class Roof:
    """One sweep over memory.

    Attributes:
        step: The sweep.
        moved: Bytes that it reads and writes.
    """

    step: Step
    moved: int


def roof_of(case: Case, workload: Workload) -> Roof:
    """The roof for a case's update rule, without the norm's extra read of the gradient and the recipe's own state.

    On a CPU it is gradfused's own loop over the workload, all streams in one sweep, or else one in-place
    torch kernel a written tensor, which moves more and is credited with it. On CUDA it is a copy.
    """
    if case.device.type == "cuda":
        return copy_on(case.device)
    written = [workload.weights.flat, *(workload.state[key].flat for key in case.rule.state)]
    read = workload.grads.flat
    if not has_native_loop(case):
        return Roof(lambda: sweep_with_torch(written, read), 3 * len(written) * read.nbytes)
    # The loop is float32's; half as many of those are the same bytes in 16-bit types.
    floats = [tensor.view(torch.float32) for tensor in (*written, read)]
    return Roof(lambda: cpu.roof(floats[:-1], floats[-1:]), case.rule.streams * read.nbytes)


def copy_on(device: torch.device, largest: int = COPY_BYTES) -> Roof:
    """A copy within a device's memory, of a tensor that no cache holds, whatever the model."""
    count = min(largest, bytes_available(device) // 8) // 4
    return copy_of(torch.randn(count, device=device))  # zeros are known to run faster


def copy_of(source: torch.Tensor) -> Roof:
    """A copy into memory that is there already."""
    target = torch.zeros_like(source)
    return Roof(lambda: target.copy_(source), 2 * source.nbytes)


def has_native_loop(case: Case) -> bool:
    """Whether gradfused's loop can sweep a case's tensors.

    Halves of float64 are left alone: read as float32 some are subnormal, which costs time.
    """
    return cpu.availability().usable and case.dtype != torch.float64


@torch.no_grad()
def sweep_with_torch(written: list[torch.Tensor], read: torch.Tensor) -> None:
    """Adds zero times the gradient: one read and one in-place update a written tensor."""
    for tensor in written:
        tensor.add_(read, alpha=0)
