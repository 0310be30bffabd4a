"""Interleaved timing: every variant takes its turn in every round, in one process."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

MIN_ROUNDS = 9  # a slow variant, which sits out every second round, still gets 5 samples
LEAST_ROUNDS = 5  # on a machine that turns out to be busy
MAX_ROUNDS = 60
SLOW, SLOW_MS = 3.0, 40.0  # times the fastest, and ms: such variants sit out every second round
BURST_MS = 2.0  # a sample lasts at least about this long, in whole steps
MAX_BURST = 20
SHORT_MS = 20.0  # steps below this are at the mercy of what ran before: they get a lead-in

Clock = Callable[[Callable[[], object], int], float]


@dataclass
class Samples:
    """Milliseconds a step, one value a sample."""

    values: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        """A quantile, by linear interpolation."""
        return float(torch.tensor(self.values, dtype=torch.float64).quantile(q))

    @property
    def median(self) -> float:
        """The middle of the samples."""
        return self.quantile(0.5)


def host_clock(step: Callable[[], object], count: int) -> float:
    """Milliseconds a step, on the host's clock."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) * 1e3 / count


def cuda_clock(step: Callable[[], object], count: int) -> float:
    """Milliseconds a step on the device, between two events on an otherwise idle stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / count


def clock_for(device: torch.device) -> Clock:
    """The clock that tells how long a step keeps a device busy."""
    return cuda_clock if device.type == "cuda" else host_clock


@dataclass(frozen=True)
class Budget:
    """How long a case may take.

    Attributes:
        seconds: About what timing may take; `MIN_ROUNDS` are taken in any case, or on a machine too
            busy for them `LEAST_ROUNDS`.
        rounds: Exactly so many rounds for every variant, whatever they take.
    """

    seconds: float = 10.0
    rounds: int | None = None

    def plan(self, warm: Mapping[str, float]) -> tuple[int, set[str]]:
        """The number of rounds, and who sits out every second one, given warm milliseconds."""
        if self.rounds is not None:
            return self.rounds, set()
        slow = slow_variants(warm)
        cost = sum(ms * (burst_length(ms) + lead_in(ms)) * (0.5 if name in slow else 1.0) for name, ms in warm.items())
        fitting = int(self.seconds * 1e3 / max(cost, 1e-3))
        return min(MAX_ROUNDS, max(MIN_ROUNDS, fitting)), slow

    def spent(self, rounds: int, elapsed: float) -> bool:
        """Whether it is time to stop after so many rounds: steps were slower than when warm."""
        if self.rounds is not None or rounds < LEAST_ROUNDS:
            return False
        return elapsed > (1.5 if rounds >= MIN_ROUNDS else 3.0) * self.seconds


def slow_variants(warm: Mapping[str, float]) -> set[str]:
    """Variants so slow that they would eat the time of all others."""
    limit = max(SLOW * min(warm.values()), SLOW_MS)
    return {name for name, ms in warm.items() if ms > limit}


def burst_length(ms: float) -> int:
    """Steps in a sample: one, unless steps are too short to time one by one."""
    return max(1, min(MAX_BURST, round(BURST_MS / max(ms, 1e-6))))


def lead_in(ms: float) -> int:
    """Untimed steps before a sample, so that it finds its own code and data in cache, not others'.

    Large models overflow every cache, where this would only take time.
    """
    return 1 if ms < SHORT_MS else 0


def sample(step: Callable[[], object], warm_ms: float, clock: Clock) -> float:
    """One sample of a variant: milliseconds a step."""
    for _ in range(lead_in(warm_ms)):
        step()
    return clock(step, burst_length(warm_ms))


def interleave(
    steps: Mapping[str, Callable[[], object]],
    *,
    budget: Budget,
    clock: Clock = host_clock,
    refresh: Callable[[], object] = lambda: None,
    on_round: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Samples]:
    """Times variants against each other.

    Each round has its own order, so that no variant always finds what the same one left in cache.

    Args:
        steps: What to time, by name.
        budget: Says how many rounds.
        clock: Measures some steps, in milliseconds a step.
        refresh: Called before each round, untimed.
        on_round: Told how many rounds are done, of how many.

    Returns:
        The samples of each variant.
    """
    names = list(steps)
    with no_collector():
        refresh()
        warm = {name: warm_up(steps[name], clock) for name in names}
        total, slow = budget.plan(warm)
        samples = {name: Samples() for name in names}
        start = time.perf_counter()
        for number in range(total):
            if budget.spent(number, time.perf_counter() - start):
                break
            refresh()
            for name in random.Random(number).sample(names, len(names)):
                if name not in slow or number % 2 == 0:
                    samples[name].values.append(sample(steps[name], warm[name], clock))
            on_round(number + 1, total)
    return samples


def warm_up(step: Callable[[], object], clock: Clock) -> float:
    """Two steps: the first allocates and compiles, the second says what a warm step takes."""
    clock(step, 1)
    return clock(step, 1)


@contextmanager
def no_collector() -> Iterator[None]:
    """Keeps Python's garbage collector out of the samples."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
