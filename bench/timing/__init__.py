"""How time is taken: clocks, interleaved rounds, the roof that memory sets, and what the machine has left for us."""

from . import cuda
from .machine import BUSY_LIMIT, CpuWatch, bytes_available, usable_cpus
from .roof import Roof, copy_of, roof_of
from .rounds import Budget, Clock, Meter, Samples, Series, Step, in_turn, interleave, no_collector

__all__ = [
    "BUSY_LIMIT",
    "Budget",
    "Clock",
    "CpuWatch",
    "Meter",
    "Roof",
    "Samples",
    "Series",
    "Step",
    "bytes_available",
    "copy_of",
    "cuda",
    "in_turn",
    "interleave",
    "no_collector",
    "roof_of",
    "usable_cpus",
]
