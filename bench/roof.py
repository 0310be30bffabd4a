"""The roof: what memory gives a loop with a step's streams and no math."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gradfused.backends import cpu

from .workload import Case, Workload


@dataclass(frozen=True)
class Roof:
    """One sweep over a workload's tensors.

    Attributes:
        step: The sweep.
        moved: Elements it moves for each element of the parameters.
    """

    step: Callable[[], object]
    moved: int


def roof_of(case: Case, workload: Workload) -> Roof:
    """The roof for a case's update rule, without the norm's extra read of the gradient.

    On a CPU it is gradfused's own loop, all streams in one sweep; elsewhere one in-place torch
    kernel a written tensor, which moves more and is credited with it.
    """
    written = [workload.weights.flat, *(slab.flat for slab in workload.state.values())]
    read = workload.grads.flat
    if not has_native_loop(case):
        return Roof(lambda: sweep_with_torch(written, read), 3 * len(written))
    # The loop is float32's; half as many of those are the same bytes in 16-bit types.
    floats = [tensor.view(torch.float32) for tensor in (*written, read)]
    return Roof(lambda: cpu.roof(floats[:-1], floats[-1:]), case.rule.streams)


def has_native_loop(case: Case) -> bool:
    """Whether gradfused's loop can sweep a case's tensors.

    Halves of float64 are left alone: read as float32 some are subnormal, which costs time.
    """
    here = case.device.type == "cpu" and cpu.availability().usable
    return here and case.dtype != torch.float64


@torch.no_grad()
def sweep_with_torch(written: list[torch.Tensor], read: torch.Tensor) -> None:
    """Adds zero times the gradient: one read and one in-place update a written tensor."""
    for tensor in written:
        tensor.add_(read, alpha=0)
