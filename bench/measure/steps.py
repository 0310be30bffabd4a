"""Measures cases: builds each variant, checks it, and times all that passed together."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..cases.recipes import RECIPES
from ..cases.steps import Case, Workload, bytes_available
from ..peers import PEERS
from ..peers.eager import NoiseSource
from ..peers.peer import Peer
from ..report.results import (
    EVENTS,
    FUSED_PLAIN,
    GRAPH,
    ROOF,
    CaseResult,
    Skipped,
    case_fields,
    is_ours,
    record,
    roof_record,
)
from ..timing import cuda
from ..timing.quiet import CpuWatch
from ..timing.roof import roof_of
from ..timing.rounds import Budget, Meter, Samples, Series, Step, in_turn, interleave
from .check import Checker, same_on_any_threads

THREAD_CHECK_ELEMENTS = 30_000_000  # larger models would only repeat the same code for longer
WALL, DEVICE = "wall", "device"  # the two times of a variant

# Told what is being done, and which part of the current case is finished, from 0 to 1.
Progress = Callable[[str, float], object]


def silent(what: str, part: float) -> None:
    """A `Progress` that tells nobody."""


@dataclass(frozen=True)
class Plan:
    """How to measure.

    Attributes:
        peers: Whom, gradfused among them.
        budget: How long a case may take.
    """

    peers: Sequence[Peer]
    budget: Budget


@dataclass(frozen=True)
class Ready:
    """A variant that may be timed.

    Attributes:
        step: Takes a step on the next set of tensors.
        replay: Has the device take a step on every set, without the host; None where that is not to be had.
    """

    step: Step
    replay: Step | None = None


def meter_for(device: torch.device) -> Meter:
    """How a device is timed."""
    return cuda.meter(device) if device.type == "cuda" else Meter()


def measure(
    case: Case, sets: Sequence[Workload], plan: Plan, progress: Progress = silent, meter: Meter | None = None
) -> CaseResult:
    """Checks and times the variants of one case.

    Args:
        case: What to measure.
        sets: The model's tensors, once or as often as overflows the cache; they are overwritten.
        plan: Whom to measure, and for how long.
        progress: Told how it goes.
        meter: How to time; that of the case's device by default.

    Returns:
        A record for each variant that could do the case and did it right; the rest with reasons.
    """
    result, meter = CaseResult(case), meter or meter_for(case.device)
    for workload in sets:
        workload.reset()
    roof = roof_of(case, sets[0])  # first: on CUDA it takes memory, which peers must leave it
    ready = prepare(case, sets, plan.peers, result, meter, progress)
    series = dict(all_series(ready, meter, len(sets)))
    series[ROOF, WALL] = Series(roof.step, meter.device or meter.wall)
    watch = CpuWatch()
    samples = interleave(
        series,
        budget=plan.budget,
        refresh=lambda: [workload.refresh() for workload in sets],
        on_round=lambda done, total: progress(f"timing, round {done} of {total}", done / total),
    )
    result.others_share = watch.share_of_others()
    fill(result, ready, samples, roof.moved)
    return result


def all_series(ready: dict[str, Ready], meter: Meter, sets: int) -> Iterator[tuple[tuple[str, str], Series]]:
    """What to time of each variant: the caller's time, and the device's where that is another."""
    for name, variant in ready.items():
        yield (name, WALL), Series(variant.step, meter.wall)
        if meter.device and variant.replay:
            yield (name, DEVICE), Series(variant.replay, meter.device, holds=sets)
        elif meter.device:
            yield (name, DEVICE), Series(variant.step, meter.device)


def fill(result: CaseResult, ready: dict[str, Ready], samples: dict[tuple[str, str], Samples], roof_bytes: int) -> None:
    """Makes the records of a case, the roof's last."""
    case, roof = result.case, samples[ROOF, WALL]
    gbps = roof_bytes / roof.median / 1e6
    for name, variant in ready.items():
        means = GRAPH if variant.replay else EVENTS
        of_device = samples.get((name, DEVICE))
        result.records.append(record(case, name, gbps, samples[name, WALL], of_device, means))
    result.records.append(roof_record(case, roof, gbps))


def prepare(
    case: Case,
    sets: Sequence[Workload],
    peers: Sequence[Peer],
    result: CaseResult,
    meter: Meter,
    progress: Progress,
) -> dict[str, Ready]:
    """The variants that may be timed; the others go to `result.skipped`."""
    checker = Checker(case)
    candidates = [(peer, case, checker) for peer in peers]
    fused = PEERS["torch-fused"]
    if fused in peers and not case.recipe.plain and not fused.unable(case):
        # What the recipe costs on top of a plain step, seen side by side.
        plain = replace(case, recipe=RECIPES["plain"])
        candidates.append((replace(fused, name=FUSED_PLAIN), plain, Checker(plain)))
    ready = {}
    for peer, its_case, its_checker in candidates:
        progress(f"checking {peer.name}", 0.0)
        steps = ready_steps(peer, its_case, sets, its_checker)
        if isinstance(steps, str):
            result.skipped.append(skipped(case, peer, steps))
            continue
        replay = meter.capture and ready_replay(peer, its_case, sets, its_checker, steps, meter.capture)
        if isinstance(replay, str):
            result.uncaptured[peer.name] = replay
            replay = None
        ready[peer.name] = Ready(in_turn(steps), replay)
    return ready


def skipped(case: Case, peer: Peer, reason: str) -> Skipped:
    """The record of a variant that is not timed."""
    everywhere = peer.absent() is not None
    return Skipped(**case_fields(case), variant=peer.name, reason=reason, everywhere=everywhere)


def ready_steps(peer: Peer, case: Case, sets: Sequence[Workload], checker: Checker) -> list[Step] | str:
    """A peer's step on each set of tensors, already taken once, or why it is not timed."""
    reason = peer.reason_against(case) or memory_reason(peer, case, len(sets))
    if reason:
        return reason
    if peer.compiles and len(sets) > 1:
        return f"compiles anew for each of the {len(sets)} sets of tensors that rotate past the cache"
    try:
        with hushed():
            verdict = checker.verdict(peer)
            return built(peer, case, sets) if verdict.right else str(verdict)
    except Exception as error:  # other people's code: whatever it raises, the others still run
        return f"failed: {told(error)}"


def ready_replay(
    peer: Peer,
    case: Case,
    sets: Sequence[Workload],
    checker: Checker,
    steps: Sequence[Step],
    capture: Callable[[Sequence[Step]], Step],
) -> Step | str:
    """One call that takes a peer's step on every set without the host, already made once, or why there is none."""
    if peer.uncapturable:
        return peer.uncapturable
    try:
        with hushed():
            if peer.rebuilds:
                verdict = checker.verdict(peer, captured=True)
                if not verdict.right:
                    return f"as a graph needs it, it is {verdict}"
                steps = built(peer, replace(case, captured=True), sets)
            replay = capture(steps)
            replay()
            if not peer.rebuilds:
                for step in steps:  # gradfused gave its table to the graph, and here makes another
                    step()
    except Exception as error:  # as above
        return f"capturing failed: {told(first_of(error))}"
    return replay


def built(peer: Peer, case: Case, sets: Sequence[Workload]) -> list[Step]:
    """A peer's step on each set of tensors, already taken once."""
    steps = [peer.build(case, workload, NoiseSource()) for workload in sets]
    for step in steps:
        step()
    return steps


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Keeps other people's code from the screen: some peers print or warn when they are made."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def first_of(error: BaseException) -> BaseException:
    """The error that led to this one: a failed capture ends in another that says nothing."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def told(error: BaseException) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


def memory_reason(peer: Peer, case: Case, sets: int = 1) -> str | None:
    """Why what a peer allocates does not fit, or None.

    On CUDA a graph holds temporaries of its own, and some peers keep state that they do not share.
    """
    on_cuda = case.device.type == "cuda"
    drawn = case.recipe.noise and (peer.copies or (on_cuda and not is_ours(peer.name)))
    temporary = case.dtype.itemsize * (peer.copies + (1.0 if drawn else 0.0)) * (2 if on_cuda else 1)
    kept = max(4, case.dtype.itemsize) * peer.keeps * sets if on_cuda else 0.0
    needed, free = case.model.elements * (temporary + kept), bytes_available(case.device)
    if needed < free:
        return None
    what = "temporaries and own state need" if kept else "temporaries need"
    return f"its {what} {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def threads_agree(cases: Sequence[Case]) -> bool | None:
    """Whether gradfused's bits are those of one thread, on the measured models of moderate size."""
    tried = [
        same_on_any_threads(case)
        for case in cases
        if case.device.type == "cpu" and case.model.elements <= THREAD_CHECK_ELEMENTS
    ]
    return all(tried) if tried else None
