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
# A variant that takes more than so many times the fastest's time, and more than so many ms, sits out every second round.
SLOW, SLOW_MS = 3.0, 40.0
SHORT_MS = 20.0  # steps shorter than this depend on what ran before them, so an untimed one precedes each sample

Step = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)


@dataclass
class Samples:
    """The samples of one variant, in milliseconds a step."""

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
    """How to read a time, and how many steps make a sample.

    Attributes:
        read: Calls a step so many times and returns the milliseconds that one call took.
        burst_ms: A sample takes enough steps to last about this long.
        least: The fewest steps in a sample.
        most: The most steps in a sample.
    """

    read: Callable[[Step, int], float]
    burst_ms: float = 2.0
    least: int = 1
    most: int = 20

    def burst(self, ms: float) -> int:
        """The number of steps in a sample, if one step takes so many milliseconds."""
        return max(self.least, min(self.most, round(self.burst_ms / max(ms, 1e-6))))


def read_host(step: Step, count: int) -> float:
    """Milliseconds a call takes by the host's clock."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) * 1e3 / count


HOST = Clock(read_host)


@dataclass(frozen=True)
class Meter:
    """How one kind of device is timed.

    Attributes:
        wall: Reads how long a caller waits.
        device: Reads how long the device is busy; None where that is the same time.
        capture: Turns steps into one call that has the device repeat them without the host; raises if it cannot.
        cache_bytes: Size of the cache that tensors should overflow; 0 lets small models stay in cache.
    """

    wall: Clock = HOST
    device: Clock | None = None
    capture: Callable[[Sequence[Step]], Step] | None = None
    cache_bytes: int = 0


def in_turn(steps: Sequence[Step]) -> Step:
    """A callable that takes the next of the steps at each call, and starts over after the last."""
    if len(steps) == 1:
        return steps[0]
    turns = cycle(steps)
    return lambda: next(turns)()


@dataclass(frozen=True)
class Series:
    """One thing to time, and its clock.

    Attributes:
        step: The callable to time.
        clock: The clock that times it.
        holds: How many steps one call takes.
    """

    step: Step
    clock: Clock = HOST
    holds: int = 1

    def calls(self, ms: float) -> int:
        """The number of calls in a sample, if a step takes so many milliseconds."""
        return -(-self.clock.burst(ms) // self.holds)

    def lead_in(self, ms: float) -> int:
        """The number of untimed calls before a sample, so that it finds its own code and data in cache.

        Large models overflow every cache, where an untimed call would only take time.
        """
        return 1 if ms * self.holds < SHORT_MS else 0

    def cost(self, ms: float) -> float:
        """Milliseconds that a whole sample takes, if a step takes so many."""
        return ms * self.holds * (self.calls(ms) + self.lead_in(ms))

    def read(self, calls: int) -> float:
        """Milliseconds a step takes, over so many calls."""
        return self.clock.read(self.step, calls) / self.holds

    def warm_up(self) -> float:
        """Call once, which allocates and compiles, then return the milliseconds that a warm step takes."""
        self.read(1)
        return self.read(-(-self.clock.least // self.holds))

    def sample(self, warm_ms: float) -> float:
        """Take one sample, in milliseconds a step."""
        for _ in range(self.lead_in(warm_ms)):
            self.step()
        return self.read(self.calls(warm_ms))


@dataclass(frozen=True)
class Budget:
    """How long the timing of a case may take.

    Attributes:
        seconds: About how long timing may take. At least `MIN_ROUNDS` are taken, or `LEAST_ROUNDS` where the machine turns
            out to be busy.
        rounds: If given, exactly so many rounds are taken, however long they are.
    """

    seconds: float = 10.0
    rounds: int | None = None

    def rounds_of(self, cost_ms: float) -> int:
        """The number of rounds to take, if one takes so many milliseconds."""
        if self.rounds is not None:
            return self.rounds
        return min(MAX_ROUNDS, max(MIN_ROUNDS, int(self.seconds * 1e3 / max(cost_ms, 1e-3))))

    def spent(self, rounds: int, elapsed: float) -> bool:
        """Whether to stop early, because rounds took much longer than the warm-up let expect."""
        if self.rounds is not None or rounds < LEAST_ROUNDS:
            return False
        return elapsed > (1.5 if rounds >= MIN_ROUNDS else 3.0) * self.seconds


def slow_variants(warm: Mapping[Key, float]) -> set[Key]:
    """The variants so slow that they would take the time of all others."""
    limit = max(SLOW * min(warm.values()), SLOW_MS)
    return {name for name, ms in warm.items() if ms > limit}


def interleave(
    series: Mapping[Key, Series],
    *,
    budget: Budget,
    refresh: Callable[[], object] = lambda: None,
    on_round: Callable[[int, int], object] = lambda done, total: None,
) -> dict[Key, Samples]:
    """Time variants against each other, one sample of each a round.

    Each round has its own order, so that no variant always finds in cache what the same other variant left there.

    Args:
        series: What to time, by key.
        budget: Decides the number of rounds.
        refresh: Called before each round, untimed.
        on_round: Called after each round with how many are done, and of how many.

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
    """Keep Python's garbage collector from running inside a sample."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
