"""What the machine has left for a measurement: free memory, and processors that other programs may be using."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
IDLE, IOWAIT = 3, 4  # columns of /proc/stat; the others, steal among them, count as work
# On two loaded cores torch's thread barriers have been seen to take 10 times as long. A busy machine does not slow all variants
# alike, so that ratios are worth nothing either.
BUSY_LIMIT = 0.1
GRAIN = 0.05  # seconds: five ticks, below which the kernel's count says nothing


class CpuWatch:
    """Measures, from its creation on, how much of the processors other programs take."""

    def __init__(self) -> None:
        self.start, self.busy, self.own = time.perf_counter(), busy_seconds(), own_seconds()

    def share_of_others(self) -> float | None:
        """The share of processor time that other programs have taken; None where the system does not tell."""
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
    """Processor time that all threads of this process have taken."""
    times = os.times()
    return times.user + times.system


def busy_seconds(stat: Path = Path("/proc/stat")) -> float | None:
    """Processor time that all programs have taken on the usable processors; None where there is no /proc."""
    if not stat.exists():
        return None
    names, ticks = {f"cpu{number}" for number in usable_cpus()}, 0
    for line in stat.read_text().splitlines():
        name, *columns = line.split()
        if name in names:
            counts = [int(column) for column in columns[:8]]  # the guest columns after them would count twice
            ticks += sum(counts) - counts[IDLE] - counts[IOWAIT]
    return ticks / TICKS


def bytes_available(device: torch.device) -> int:
    """Memory that can be had on a device without swapping, as far as the system tells."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(available, container_bytes())


def container_bytes() -> int:
    """What a container's memory limit leaves; a huge number where there is no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        return int(limit) - used
    except (OSError, ValueError):  # no cgroup v2, or the limit reads "max"
        return 1 << 62
