"""Measuring a case: each variant is checked against the oracle, then all that passed are timed together."""

from .functions import measure_function
from .results import EVENTS, CaseResult, Record, Results, Skipped
from .running import meter_for
from .steps import measure_step, threads_agree

__all__ = [
    "EVENTS",
    "CaseResult",
    "Record",
    "Results",
    "Skipped",
    "measure_function",
    "measure_step",
    "meter_for",
    "threads_agree",
]
