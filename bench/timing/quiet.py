"""Whether other programs took the processors while something was timed."""

from __future__ import annotations

import os
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
IDLE, IOWAIT = 3, 4  # columns of /proc/stat; the rest, steal among them, is work
# On two loaded cores torch's thread barriers have been seen to take 10 times as long: a busy machine
# does not slow everyone alike, so that ratios are worth nothing either.
LIMIT = 0.1
GRAIN = 0.05  # seconds: five ticks, below which the kernel's count says nothing


class CpuWatch:
    """Watches the processors that this process may use, from its making on."""

    def __init__(self) -> None:
        self.start, self.busy, self.own = time.perf_counter(), busy_seconds(), own_seconds()

    def share_of_others(self) -> float | None:
        """The share of processor time that went elsewhere since; None where the system does not tell."""
        busy = busy_seconds()
        if busy is None or self.busy is None:
            return None
        elsewhere = (busy - self.busy) - (own_seconds() - self.own) - GRAIN
        available = (time.perf_counter() - self.start) * len(usable_cpus())
        return min(1.0, max(0.0, elsewhere / available))


def usable_cpus() -> set[int]:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def own_seconds() -> float:
    """Processor time of this process, all threads."""
    times = os.times()
    return times.user + times.system


def busy_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """Processor time of all programs on the usable processors; None where there is no /proc."""
    if not stat.exists():
        return None
    names, ticks = {f"cpu{number}" for number in usable_cpus()}, 0
    for line in stat.read_text().splitlines():
        name, *columns = line.split()
        if name in names:
            counts = [int(column) for column in columns[:8]]  # the guest columns count twice
            ticks += sum(counts) - counts[IDLE] - counts[IOWAIT]
    return ticks / TICKS
