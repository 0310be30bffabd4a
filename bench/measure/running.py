"""What measuring a step and measuring a function have in common: timing all variants together, and containing their errors."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..cases import ROOF, Case, Peer
from ..timing import Budget, CpuWatch, Meter, Roof, Samples, Series, Step, cuda, interleave
from .results import EVENTS, GRAPH, CaseResult, Skipped, case_fields, record, roof_record

WALL, DEVICE = "wall", "device"  # the two times of a variant

# Called with what is being done, and which part of the current case is finished, from 0 to 1.
Progress = Callable[[str, float], object]


def silent(what: str, part: float) -> None:
    """A `Progress` that does nothing."""


@dataclass(frozen=True)
class Ready:
    """A variant that passed its check and may be timed.

    Attributes:
        step: Does the work once; with several sets of tensors, each call takes the next set.
        replay: Has the device do the work on every set without the host; None where that is not possible.
    """

    step: Step
    replay: Step | None = None


def meter_for(device: torch.device) -> Meter:
    """How to time a device."""
    return cuda.meter(device) if device.type == "cuda" else Meter()


def skipped(case: Case, peer: Peer, reason: str) -> Skipped:
    """The record of a variant that is not timed."""
    absent, expected = peer.absent() is not None, peer.reason_against(case) is not None
    return Skipped(**case_fields(case), variant=peer.name, reason=reason, everywhere=absent, expected=expected)


def time_together(
    result: CaseResult,
    ready: dict[str, Ready],
    roof: Roof,
    meter: Meter,
    budget: Budget,
    progress: Progress,
    sets: int = 1,
    refresh: Callable[[], object] = lambda: None,
) -> None:
    """Time the variants of a case and its roof, interleaved, and add their records to the result.

    Args:
        result: The result of the case.
        ready: The variants, by name.
        roof: The roof.
        meter: How to time the device.
        budget: How long it may take.
        progress: Called after each round.
        sets: How many sets of tensors one replay goes through.
        refresh: Called before each round, untimed.
    """
    series = dict(all_series(ready, meter, sets))
    series[ROOF, WALL] = Series(roof.step, meter.device or meter.wall)
    watch = CpuWatch()
    samples = interleave(
        series,
        budget=budget,
        refresh=refresh,
        on_round=lambda done, total: progress(f"timing, round {done} of {total}", done / total),
    )
    result.others_share = watch.share_of_others()
    add_records(result, ready, samples, roof.moved)


def all_series(ready: dict[str, Ready], meter: Meter, sets: int) -> Iterator[tuple[tuple[str, str], Series]]:
    """What to time of each variant: how long its caller waits, and how long the device is busy where that differs."""
    for name, variant in ready.items():
        yield (name, WALL), Series(variant.step, meter.wall)
        if meter.device and variant.replay:
            yield (name, DEVICE), Series(variant.replay, meter.device, holds=sets)
        elif meter.device:
            yield (name, DEVICE), Series(variant.step, meter.device)


def add_records(
    result: CaseResult, ready: dict[str, Ready], samples: dict[tuple[str, str], Samples], roof_bytes: int
) -> None:
    """Add the records of the variants, then that of the roof."""
    case, roof = result.case, samples[ROOF, WALL]
    gbps = roof_bytes / roof.median / 1e6
    for name, variant in ready.items():
        means = GRAPH if variant.replay else EVENTS
        result.records.append(record(case, name, gbps, samples[name, WALL], samples.get((name, DEVICE)), means))
    result.records.append(roof_record(case, roof, gbps))


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keep other packages' output and warnings from the screen."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def first_of(error: BaseException) -> BaseException:
    """The error that led to this one: a failed capture raises another at its end that explains nothing."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def told(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
