"""Checks and times the ways of computing a function, as the runner does optimizer steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..cases.functions import Function, FunctionCase, Run, Size, Way
from ..cases.steps import CPU, bytes_available
from ..peers.lpg import LPG
from ..peers.reversal import REVERSAL
from ..report.results import OURS, ROOF, CaseResult, Skipped, case_fields
from ..timing.quiet import CpuWatch
from ..timing.roof import Roof, copy_of
from ..timing.rounds import Budget, Meter, Series, interleave
from .check import LIMITS, LOW_PRECISION_LIMITS, Verdict
from .steps import WALL, Progress, Ready, all_series, fill, hushed, meter_for, silent, told

FUNCTIONS = {function.name: function for function in (REVERSAL, LPG)}
SIZES: dict[str, Size] = {size.name: size for function in FUNCTIONS.values() for size in function.sizes}
WAYS: dict[str, list[Way]] = {}
for _way in (way for function in FUNCTIONS.values() for way in function.ways):
    WAYS.setdefault(_way.name, []).append(_way)


def chosen_ways(function: Function, names: Sequence[str] | None) -> list[Way]:
    """The ways of a run, gradfused first.

    Args:
        function: Of which.
        names: What `--peers` gave; None takes everyone but the opt-in ones. Yardsticks go with any peer.
    """
    if names is None:
        return [way for way in function.ways if not way.opt_in]
    return [way for way in function.ways if way.name == OURS or way.name in names or (way.yardstick and names)]


class FunctionChecker:
    """Checks the ways of one case on fewer rows; the oracle computes in float64 on the CPU."""

    def __init__(self, case: FunctionCase) -> None:
        self.case = replace(case, model=case.model.cropped)
        self.values = replace(self.case, device=CPU).tensors(torch.float64)
        floor, ceiling = LIMITS.get(case.dtype, LOW_PRECISION_LIMITS)
        floor = max(
            floor, 2 * torch.finfo(case.dtype).eps
        )  # errors are relative: one rounding of a value, and one before
        standard = next(way for way in case.recipe.ways if way.name == case.recipe.standard)
        self.allowed = min(max(2 * self.error(standard), floor), ceiling)

    def error(self, way: Way) -> float:
        """How far a way's value and gradients are from the oracle's, each relative to its largest element."""
        found = way.build()(self.case.tensors())
        exact = self.case.recipe.oracle(self.values, way.yardstick)
        return max(relative_error(a, b) for a, b in zip(found, exact, strict=True))

    def verdict(self, way: Way) -> Verdict:
        """Whether a way may be timed."""
        return Verdict(self.error(way), self.allowed)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The largest absolute difference, in units of the largest element; infinite where one is not a number."""
    difference = (found.detach().cpu().double() - exact).abs().max() / exact.abs().max()
    return float(difference) if difference == difference else float("inf")


def measure_function(
    case: FunctionCase,
    names: Sequence[str] | None,
    budget: Budget,
    progress: Progress = silent,
    meter: Meter | None = None,
) -> CaseResult:
    """Checks and times the ways of one case.

    Args:
        case: What to measure.
        names: What `--peers` gave.
        budget: How long timing may take.
        progress: Told how it goes.
        meter: How to time; that of the case's device by default.

    Returns:
        A record for each way that could do the case and did it right; the rest with reasons.
    """
    result, meter = CaseResult(case), meter or meter_for(case.device)
    roof = roof_for(case)
    ready = prepare(case, chosen_ways(case.recipe, names), result, progress)
    series = dict(all_series(ready, meter, sets=1))
    series[ROOF, WALL] = Series(roof.step, meter.device or meter.wall)
    watch = CpuWatch()
    samples = interleave(
        series,
        budget=budget,
        on_round=lambda done, total: progress(f"timing, round {done} of {total}", done / total),
    )
    result.others_share = watch.share_of_others()
    fill(result, ready, samples, roof.moved)
    return result


def roof_for(case: FunctionCase) -> Roof:
    """A copy between two tensors like the case's main one, which are there already."""
    source = torch.randn(case.model.shape, device=case.device).to(case.dtype)
    return copy_of(source)


def prepare(case: FunctionCase, ways: Sequence[Way], result: CaseResult, progress: Progress) -> dict[str, Ready]:
    """The ways that may be timed, on the same tensors; the others go to `result.skipped`."""
    checker, tensors, ready = FunctionChecker(case), case.tensors(), {}
    for way in ways:
        progress(f"checking {way.name}", 0.0)
        run = right_way(way, case, checker)
        if isinstance(run, str):
            result.skipped.append(
                Skipped(**case_fields(case), variant=way.name, reason=run, everywhere=bool(way.absent()))
            )
            continue
        ready[way.name] = Ready(functools.partial(run, tensors))
    return ready


def right_way(way: Way, case: FunctionCase, checker: FunctionChecker) -> Run | str:
    """A way that may be timed, or why it may not."""
    reason = way.reason_against(case) or memory_reason(way, case)
    if reason:
        return reason
    try:
        with hushed():
            verdict = checker.verdict(way)
            return way.build() if verdict.right else str(verdict)
    except Exception as error:  # other people's code: whatever it raises, the others still run
        return f"failed: {told(error)}"


def memory_reason(way: Way, case: FunctionCase) -> str | None:
    """Why what a way allocates does not fit, or None; in 16 bits some compute in float32."""
    needed, free = case.model.elements * max(4, case.dtype.itemsize) * way.copies, bytes_available(case.device)
    return None if needed < free else f"it needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
