"""Measures cases: builds each variant, checks it, and times all that passed together."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .check import Checker, same_on_any_threads
from .eager import NoiseSource
from .peer import Peer, Step
from .peers import PEERS
from .quiet import CpuWatch
from .recipes import RECIPES
from .results import FUSED_PLAIN, ROOF, CaseResult, Record, Skipped, case_fields
from .roof import roof_of
from .timing import Budget, Samples, clock_for, interleave
from .workload import Case, Workload, bytes_available

THREAD_CHECK_ELEMENTS = 30_000_000  # larger models would only repeat the same code for longer

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


def measure(case: Case, workload: Workload, plan: Plan, progress: Progress = silent) -> CaseResult:
    """Checks and times the variants of one case.

    Args:
        case: What to measure.
        workload: The model's tensors; they are overwritten.
        plan: Whom to measure, and for how long.
        progress: Told how it goes.

    Returns:
        A record for each variant that could do the case and did it right; the rest with reasons.
    """
    result = CaseResult(case)
    workload.reset()
    steps = prepare(case, workload, plan.peers, result, progress)
    roof = roof_of(case, workload)
    watch = CpuWatch()
    samples = interleave(
        {**steps, ROOF: roof.step},
        budget=plan.budget,
        clock=clock_for(case.device),
        refresh=workload.refresh,
        on_round=lambda done, total: progress(f"timing, round {done} of {total}", done / total),
    )
    result.others_share = watch.share_of_others()
    moved = roof.moved * workload.weights.flat.numel() * case.dtype.itemsize
    roof_gbps = moved / samples[ROOF].median / 1e6
    result.records = [record(case, name, samples[name], roof_gbps) for name in steps]
    result.records.append(roof_record(case, samples[ROOF], roof_gbps))
    return result


def prepare(
    case: Case, workload: Workload, peers: Sequence[Peer], result: CaseResult, progress: Progress
) -> dict[str, Step]:
    """The steps of the variants that may be timed; the others go to `result.skipped`."""
    checker = Checker(case)
    candidates = [(peer, case, checker) for peer in peers]
    fused = PEERS["torch-fused"]
    if fused in peers and not case.recipe.plain:
        # What the recipe costs on top of a plain step, seen side by side.
        plain = replace(case, recipe=RECIPES["plain"])
        candidates.append((replace(fused, name=FUSED_PLAIN), plain, Checker(plain)))
    steps = {}
    for peer, its_case, its_checker in candidates:
        progress(f"checking {peer.name}", 0.0)
        outcome = ready_step(peer, its_case, workload, its_checker)
        if isinstance(outcome, str):
            result.skipped.append(skipped(case, peer, outcome))
        else:
            steps[peer.name] = outcome
    return steps


def skipped(case: Case, peer: Peer, reason: str) -> Skipped:
    """The record of a variant that is not timed."""
    everywhere = peer.absent() is not None
    return Skipped(**case_fields(case), variant=peer.name, reason=reason, everywhere=everywhere)


def ready_step(peer: Peer, case: Case, workload: Workload, checker: Checker) -> Step | str:
    """A peer's step on the workload, already taken once, or why it is not timed."""
    reason = peer.reason_against(case) or memory_reason(peer, case)
    if reason:
        return reason
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some peers print when they are made
            verdict = checker.verdict(peer)
            if not verdict.right:
                return str(verdict)
            step = peer.build(case, workload, NoiseSource())
            step()
    except Exception as error:  # other people's code: whatever it raises, the others still run
        lines = str(error).strip().splitlines() or [""]
        return f"failed: {type(error).__name__}: {lines[0]}"
    return step


def memory_reason(peer: Peer, case: Case) -> str | None:
    """Why a peer's temporaries do not fit, or None."""
    noise = 1.0 if case.recipe.noise else 0.0
    extra = int((peer.copies + noise * (peer.copies > 0)) * case.model.elements)
    needed, free = extra * case.dtype.itemsize, bytes_available(case.device)
    if needed < free:
        return None
    return f"its temporaries need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def record(case: Case, variant: str, samples: Samples, roof_gbps: float) -> Record:
    """The record of a variant."""
    return Record(
        **case_fields(case),
        variant=variant,
        ms_median=round(samples.median, 4),
        ms_p20=round(samples.quantile(0.2), 4),
        ms_p80=round(samples.quantile(0.8), 4),
        gbps=round(bytes_moved(case, variant) / samples.median / 1e6, 2),
        roof_gbps=round(roof_gbps, 2),
        elements=case.model.elements,
        tensors=len(case.model.shapes),
    )


def bytes_moved(case: Case, variant: str) -> int:
    """DESIGN 3's budget of what a variant computes."""
    return (replace(case, recipe=RECIPES["plain"]) if variant == FUSED_PLAIN else case).bytes_moved


def roof_record(case: Case, samples: Samples, roof_gbps: float) -> Record:
    """The roof as a record: the time that the plain rule's streams need at its speed."""
    plain_bytes = replace(case, recipe=RECIPES["plain"]).bytes_moved
    ms = plain_bytes / roof_gbps / 1e6
    spread = ms / samples.median
    return Record(
        **case_fields(case),
        variant=ROOF,
        ms_median=round(ms, 4),
        ms_p20=round(samples.quantile(0.2) * spread, 4),
        ms_p80=round(samples.quantile(0.8) * spread, 4),
        gbps=round(roof_gbps, 2),
        roof_gbps=round(roof_gbps, 2),
        elements=case.model.elements,
        tensors=len(case.model.shapes),
    )


def threads_agree(cases: Sequence[Case]) -> bool | None:
    """Whether gradfused's bits are those of one thread, on the measured models of moderate size."""
    tried = [
        same_on_any_threads(case)
        for case in cases
        if case.device.type == "cpu" and case.model.elements <= THREAD_CHECK_ELEMENTS
    ]
    return all(tried) if tried else None
