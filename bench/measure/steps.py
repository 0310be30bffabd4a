"""Measures optimizer steps: builds and checks each peer, then times all that passed together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..cases import FUSED_PLAIN, StepCase, Workload, is_ours
from ..peers import PEERS, NoiseSource, StepPeer
from ..timing import Budget, Meter, Step, bytes_available, in_turn, roof_of
from .check import Checker, same_on_any_threads
from .results import CaseResult
from .running import Progress, Ready, first_of, hushed, meter_for, silent, skipped, time_together, told

THREAD_CHECK_ELEMENTS = 30_000_000  # larger models would only repeat the same code for longer


def measure_step(
    case: StepCase,
    sets: Sequence[Workload],
    peers: Sequence[StepPeer],
    budget: Budget,
    progress: Progress = silent,
    meter: Meter | None = None,
) -> CaseResult:
    """Check and time the variants of one case.

    Args:
        case: The case.
        sets: The model's tensors, once or as many times as overflow the cache; they are overwritten.
        peers: The peers to measure, gradfused among them.
        budget: How long timing may take.
        progress: Called with what is being done.
        meter: How to time the device; by default what suits the case's.

    Returns:
        A record for each variant that could do the case and did it right, and the reason for each other one.
    """
    result, meter = CaseResult(case), meter or meter_for(case.device)
    for workload in sets:
        workload.reset()
    roof = roof_of(case, sets[0])  # before the peers, which must leave it its memory on CUDA
    ready = prepare(case, sets, peers, result, meter, progress)

    def refresh() -> None:
        for workload in sets:
            workload.refresh()

    time_together(result, ready, roof, meter, budget, progress, len(sets), refresh)
    return result


def prepare(
    case: StepCase,
    sets: Sequence[Workload],
    peers: Sequence[StepPeer],
    result: CaseResult,
    meter: Meter,
    progress: Progress,
) -> dict[str, Ready]:
    """The variants that may be timed; the others are added to `result.skipped`."""
    checker = Checker(case)
    candidates = [(peer, case, checker) for peer in peers]
    fused = PEERS["torch-fused"]
    if fused in peers and not case.recipe.plain and not fused.unable(case):
        # torch's step without the recipe shows what the recipe costs on top.
        candidates.append((replace(fused, name=FUSED_PLAIN), case.plain, Checker(case.plain)))
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


def ready_steps(peer: StepPeer, case: StepCase, sets: Sequence[Workload], checker: Checker) -> list[Step] | str:
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
    except Exception as error:  # other packages may raise anything, and the remaining peers must still run
        return f"failed: {told(error)}"


def ready_replay(
    peer: StepPeer,
    case: StepCase,
    sets: Sequence[Workload],
    checker: Checker,
    steps: Sequence[Step],
    capture: Callable[[Sequence[Step]], Step],
) -> Step | str:
    """A call that has the device take a peer's step on every set, already made once, or why there is none."""
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
                for step in steps:  # gradfused leaves its table to the graph, and makes another in these steps
                    step()
    except Exception as error:  # as above
        return f"capturing failed: {told(first_of(error))}"
    return replay


def built(peer: StepPeer, case: StepCase, sets: Sequence[Workload]) -> list[Step]:
    """A peer's step on each set of tensors, already taken once."""
    steps = [peer.build(case, workload, NoiseSource()) for workload in sets]
    for step in steps:
        step()
    return steps


def memory_reason(peer: StepPeer, case: StepCase, sets: int = 1) -> str | None:
    """Why the memory that a peer allocates is not there, or None.

    On CUDA a graph has temporaries of its own, and some peers keep state that they do not share.
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


def threads_agree(cases: Sequence[StepCase]) -> bool | None:
    """Whether gradfused computes the same bits on 1 thread as on more, tried on the models of moderate size."""
    tried = [
        same_on_any_threads(case)
        for case in cases
        if case.device.type == "cpu" and case.model.elements <= THREAD_CHECK_ELEMENTS
    ]
    return all(tried) if tried else None
