"""Interleaved timing: every variant takes its turn in every round, in one process."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import TypeVar

import torch

MIN_ROUNDS = 9  # a slow variant, which sits out every second round, still gets 5 samples
LEAST_ROUNDS = 5  # on a machine that turns out to be busy
MAX_ROUNDS = 60
SLOW, SLOW_MS = 3.0, 40.0  # times the fastest, and ms: such variants sit out every second round
SHORT_MS = 20.0  # steps below this are at the mercy of what ran before: they get a lead-in

Step = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


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


@dataclass(frozen=True)
class Clock:
    """Reads a time, and says how many steps make a sample.

    Attributes:
        read: Milliseconds a call, over so many calls of a step.
        burst_ms: A sample lasts at least about this long, in whole steps.
        least: Steps in a sample.
        most: Steps in a sample.
    """

    read: Callable[[Step, int], float]
    burst_ms: float = 2.0
    least: int = 1
    most: int = 20

    def burst(self, ms: float) -> int:
        """Steps in a sample, given what one takes: the least, unless that is too short to time."""
        return max(self.least, min(self.most, round(self.burst_ms / max(ms, 1e-6))))


def read_host(step: Step, count: int) -> float:
    """Milliseconds a call, on the host's clock."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) * 1e3 / count


HOST = Clock(read_host)


@dataclass(frozen=True)
class Meter:
    """How one kind of device is timed: all that timing knows of it.

    Attributes:
        wall: What a caller waits for.
        device: What keeps the device busy; None where that is the same.
        capture: Turns steps into one call that has the device repeat them without the host, or raises.
        cache_bytes: Of the cache that tensors should overflow; 0 leaves small models in it.
    """

    wall: Clock = HOST
    device: Clock | None = None
    capture: Callable[[Sequence[Step]], Step] | None = None
    cache_bytes: int = 0


def in_turn(steps: Sequence[Step]) -> Step:
    """Each call takes the next of the steps, for ever."""
    if len(steps) == 1:
        return steps[0]
    turns = cycle(steps)
    return lambda: next(turns)()


@dataclass(frozen=True)
class Series:
    """What is timed, and how.

    Attributes:
        step: What a call does.
        clock: Times it.
        holds: Steps that a call takes.
    """

    step: Step
    clock: Clock = HOST
    holds: int = 1

    def calls(self, ms: float) -> int:
        """Calls in a sample, given what a step takes."""
        return -(-self.clock.burst(ms) // self.holds)

    def lead_in(self, ms: float) -> int:
        """Untimed calls before a sample, so that it finds its own code and data in cache, not others'.

        Large models overflow every cache, where this would only take time.
        """
        return 1 if ms * self.holds < SHORT_MS else 0

    def cost(self, ms: float) -> float:
        """Milliseconds that a sample takes, given what a step takes."""
        return ms * self.holds * (self.calls(ms) + self.lead_in(ms))

    def read(self, calls: int) -> float:
        """Milliseconds a step, over so many calls."""
        return self.clock.read(self.step, calls) / self.holds

    def warm_up(self) -> float:
        """The first call allocates and compiles, the next say what a warm step takes."""
        self.read(1)
        return self.read(-(-self.clock.least // self.holds))

    def sample(self, warm_ms: float) -> float:
        """One sample: milliseconds a step."""
        for _ in range(self.lead_in(warm_ms)):
            self.step()
        return self.read(self.calls(warm_ms))


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

    def rounds_of(self, cost_ms: float) -> int:
        """The number of rounds, given what one takes."""
        if self.rounds is not None:
            return self.rounds
        return min(MAX_ROUNDS, max(MIN_ROUNDS, int(self.seconds * 1e3 / max(cost_ms, 1e-3))))

    def spent(self, rounds: int, elapsed: float) -> bool:
        """Whether it is time to stop after so many rounds: steps were slower than when warm."""
        if self.rounds is not None or rounds < LEAST_ROUNDS:
            return False
        return elapsed > (1.5 if rounds >= MIN_ROUNDS else 3.0) * self.seconds


def slow_variants(warm: Mapping[Key, float]) -> set[Key]:
    """Variants so slow that they would eat the time of all others."""
    limit = max(SLOW * min(warm.values()), SLOW_MS)
    return {name for name, ms in warm.items() if ms > limit}


def interleave(
    series: Mapping[Key, Series],
    *,
    budget: Budget,
    refresh: Callable[[], object] = lambda: None,
    on_round: Callable[[int, int], object] = lambda done, total: None,
) -> dict[Key, Samples]:
    """Times variants against each other.

    Each round has its own order, so that no variant always finds what the same one left in cache.

    Args:
        series: What to time, by name.
        budget: Says how many rounds.
        refresh: Called before each round, untimed.
        on_round: Told how many rounds are done, of how many.

    Returns:
        The samples of each variant.
    """
    names = list(series)
    samples = {name: Samples() for name in names}
    with no_collector():
        refresh()
        warm = {name: series[name].warm_up() for name in names}
        slow = slow_variants(warm) if budget.rounds is None else set()
        cost = sum(series[name].cost(ms) * (0.5 if name in slow else 1.0) for name, ms in warm.items())
        total, start = budget.rounds_of(cost), time.perf_counter()
        for number in range(total):
            if budget.spent(number, time.perf_counter() - start):
                break
            refresh()
            for name in random.Random(number).sample(names, len(names)):
                if name not in slow or number % 2 == 0:
                    samples[name].values.append(series[name].sample(warm[name]))
            on_round(number + 1, total)
    return samples


@contextmanager
def no_collector() -> Iterator[None]:
    """Keeps Python's garbage collector out of the samples."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
