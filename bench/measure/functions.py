"""Measures functions: builds and checks each way of computing one, then times all that passed together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..cases import CPU, FunctionCase, FunctionPeer, Run
from ..peers import chosen_ways
from ..timing import Budget, Meter, Roof, bytes_available, copy_of
from .check import LIMITS, LOW_PRECISION_LIMITS, Verdict
from .results import CaseResult
from .running import Progress, Ready, hushed, meter_for, silent, skipped, time_together, told


class FunctionChecker:
    """Checks the ways of one case on fewer rows; the oracle computes in float64 on the CPU."""

    def __init__(self, case: FunctionCase) -> None:
        self.case = replace(case, model=case.model.cropped)
        self.values = replace(self.case, device=CPU).tensors(torch.float64)
        floor, ceiling = LIMITS.get(case.dtype, LOW_PRECISION_LIMITS)
        floor = max(floor, 2 * torch.finfo(case.dtype).eps)  # errors are relative, and two roundings are allowed
        standard = next(way for way in case.recipe.ways if way.name == case.recipe.standard)
        self.allowed = min(max(2 * self.error(standard), floor), ceiling)

    def error(self, way: FunctionPeer) -> float:
        """The largest error of a way's value and gradients, each relative to its largest element."""
        found = way.build()(self.case.tensors())
        exact = self.case.recipe.oracle(self.values, way.yardstick)
        return max(relative_error(a, b) for a, b in zip(found, exact, strict=True))

    def verdict(self, way: FunctionPeer) -> Verdict:
        """Whether a way may be timed."""
        return Verdict(self.error(way), self.allowed)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The largest absolute difference, divided by the largest element; infinite where a value is not a number."""
    difference = (found.detach().cpu().double() - exact).abs().max() / exact.abs().max()
    return float(difference) if difference == difference else float("inf")


def measure_function(
    case: FunctionCase,
    names: Sequence[str] | None,
    budget: Budget,
    progress: Progress = silent,
    meter: Meter | None = None,
) -> CaseResult:
    """Check and time the ways of one case.

    Args:
        case: The case.
        names: The names that `--peers` gave, or None.
        budget: How long timing may take.
        progress: Called with what is being done.
        meter: How to time the device; by default what suits the case's.

    Returns:
        A record for each way that could do the case and did it right, and the reason for each other one.
    """
    result, meter = CaseResult(case), meter or meter_for(case.device)
    roof = roof_for(case)
    ready = prepare(case, chosen_ways(case.recipe, names), result, progress)
    time_together(result, ready, roof, meter, budget, progress)
    return result


def roof_for(case: FunctionCase) -> Roof:
    """A copy between two tensors like the case's main one, both allocated already."""
    source = torch.randn(case.model.shape, device=case.device).to(case.dtype)
    return copy_of(source)


def prepare(
    case: FunctionCase, ways: Sequence[FunctionPeer], result: CaseResult, progress: Progress
) -> dict[str, Ready]:
    """The ways that may be timed, all on the same tensors; the others are added to `result.skipped`."""
    checker, tensors, ready = FunctionChecker(case), case.tensors(), {}
    for way in ways:
        progress(f"checking {way.name}", 0.0)
        run = right_way(way, case, checker)
        if isinstance(run, str):
            result.skipped.append(skipped(case, way, run))
        else:
            ready[way.name] = Ready(functools.partial(run, tensors))
    return ready


def right_way(way: FunctionPeer, case: FunctionCase, checker: FunctionChecker) -> Run | str:
    """A way that may be timed, or why it may not."""
    reason = way.reason_against(case) or memory_reason(way, case)
    if reason:
        return reason
    try:
        with hushed():
            verdict = checker.verdict(way)
            return way.build() if verdict.right else str(verdict)
    except Exception as error:  # other packages may raise anything, and the remaining ways must still run
        return f"failed: {told(error)}"


def memory_reason(way: FunctionPeer, case: FunctionCase) -> str | None:
    """Why the memory that a way allocates is not there, or None; some compute 16-bit tensors in float32."""
    needed, free = case.model.elements * max(4, case.dtype.itemsize) * way.copies, bytes_available(case.device)
    return None if needed < free else f"it needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
