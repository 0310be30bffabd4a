"""The roof: how fast memory lets a loop read and write what a step has to, if it computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradfused.backends import cpu

from ..cases import StepCase, Workload
from .machine import bytes_available
from .rounds import Step

COPY_BYTES = 1 << 31  # of each side of the copy: tens of times any GPU's L2 cache


@dataclass(frozen=True)
class Roof:
    """A loop over memory, timed beside the variants.

    Attributes:
        step: Runs the loop once.
        moved: Bytes that it reads and writes.
    """

    step: Step
    moved: int


def roof_of(case: StepCase, workload: Workload) -> Roof:
    """The roof for a case's update rule; the norm's read of the gradient and the recipe's state are not part of it.

    On a CPU it is gradfused's own loop over all the tensors at once. Where that cannot run, it is one in-place torch kernel per
    written tensor, which moves more and is credited with all that it moves. On CUDA it is a copy.
    """
    if case.device.type == "cuda":
        return copy_on(case.device)
    written = [workload.weights.flat, *(workload.state[key].flat for key in case.rule.state)]
    read = workload.grads.flat
    if not has_native_loop(case):
        return Roof(lambda: sweep_with_torch(written, read), 3 * len(written) * read.nbytes)
    # The loop reads float32; a tensor of a 16-bit type has the same bytes as half as many of those.
    floats = [tensor.view(torch.float32) for tensor in (*written, read)]
    return Roof(lambda: sweep(floats[:-1], floats[-1:]), case.rule.streams * read.nbytes)


def copy_on(device: torch.device, largest: int = COPY_BYTES) -> Roof:
    """A copy within a device's memory, of a tensor that no cache holds, whatever the model."""
    count = min(largest, bytes_available(device) // 8) // 4
    return copy_of(torch.randn(count, device=device))  # a copy of zeros is known to be faster


def copy_of(source: torch.Tensor) -> Roof:
    """A copy into memory that is allocated already."""
    target = torch.zeros_like(source)
    return Roof(lambda: target.copy_(source), 2 * source.nbytes)


def has_native_loop(case: StepCase) -> bool:
    """Whether gradfused's loop can go over a case's tensors.

    float64 tensors are left to torch: halves of them, read as float32, may be subnormal numbers, which are slow.
    """
    return cpu.availability().usable and case.dtype != torch.float64


def sweep(written: Sequence[torch.Tensor], read: Sequence[torch.Tensor]) -> None:
    """Sweep memory once, in place and without arithmetic, which no optimizer step over the same tensors can beat.

    Args:
        written: Contiguous float32 tensors of equal length that are read and written; their values stay the same.
        read: Tensors of the same kind that are only read.

    Raises:
        ValueError: The streams differ in length, are not contiguous float32 CPU tensors, or none is written.
    """
    streams = [*written, *read]
    if not written:
        raise ValueError("roof: expected at least one stream to write, got none")
    for t in streams:
        on_cpu = t.device.type == "cpu"
        if t.dtype != torch.float32 or not on_cpu or not t.is_contiguous() or t.numel() != streams[0].numel():
            raise ValueError(
                "roof: expected contiguous float32 CPU tensors of one length, "
                f"got {t.dtype} of shape {tuple(t.shape)} on {t.device}"
            )
    addresses = [[t.data_ptr() for t in some] for some in (written, read)]
    cpu.native().roof(*addresses, streams[0].numel(), torch.get_num_threads())


@torch.no_grad()
def sweep_with_torch(written: list[torch.Tensor], read: torch.Tensor) -> None:
    """Add zero times the gradient to each written tensor in place."""
    for tensor in written:
        tensor.add_(read, alpha=0)
