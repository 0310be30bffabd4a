"""The backends ``cuda``, ``triton``, ``cpu`` and ``reference``, and the choice among them."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cache

from torch import Tensor

from . import cpu, cuda, reference, triton
from .base import Availability, Backend, Held, Row, Scaling, Settings

__all__ = ["NAMES", "Availability", "Backend", "Held", "Row", "Scaling", "Settings"]
__all__ += ["availability", "choose", "choose_name"]

NAMES = ("auto", "cuda", "cpu", "triton", "reference")
_BACKENDS: dict[str, type[Backend]] = {
    "cpu": cpu.CpuBackend,
    "cuda": cuda.CudaBackend,
    "triton": triton.TritonBackend,
    "reference": reference.ReferenceBackend,
}
#: Those that cannot run everywhere and on every tensor.
_MODULES = {"cpu": cpu, "cuda": cuda, "triton": triton}
_log = logging.getLogger("gradfused")


def availability() -> dict[str, Availability]:
    """Whether each backend runs here, and if not, why."""
    found = {name: module.availability() for name, module in _MODULES.items()}
    return found | {"reference": Availability("reference")}


def _refusal(backend: Availability, tensors: Sequence[Tensor]) -> str | None:
    if backend.reason is not None or backend.name not in _MODULES:
        return backend.reason
    return next(filter(None, map(_MODULES[backend.name].refusal, tensors)), None)


@cache
def _log_fallback(taken: str, name: str, reason: str) -> None:
    _log.warning("using the slower %s backend: '%s' %s", taken, name, reason)


def choose(request: str, tensors: Sequence[Tensor]) -> type[Backend]:
    """The backend to use for ``tensors``: parameters and gradients. Raises as ``choose_name``."""
    return _BACKENDS[choose_name(request, tensors)]


def choose_name(
    request: str, tensors: Sequence[Tensor], offered: Sequence[str] = tuple(_BACKENDS), what: str = ""
) -> str:
    """The backend to use for ``tensors``, one of ``offered``; ``what`` names the work for which others have no kernels.

    ``"auto"`` takes the backend that the environment variable GRADFUSED_BACKEND names, or else the fastest one that can
    run, and logs once if a faster one cannot.

    Raises:
        ValueError: There is no backend of that name.
        RuntimeError: The backend was asked for by name and cannot run, or GRADFUSED_CPU_ISA names an instruction set
            that this machine lacks.
    """
    available = availability()
    source = "backend"
    if request == "auto" and os.environ.get("GRADFUSED_BACKEND"):
        source, request = "GRADFUSED_BACKEND", os.environ["GRADFUSED_BACKEND"]
    if request not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}, got {request!r}")
    if available["cpu"].mistake and request in ("auto", "cpu"):
        raise RuntimeError(f"backend 'cpu' cannot run: {available['cpu'].reason}")
    if request != "auto":
        reason = _refusal(available[request], tensors)
        if request not in offered:
            reason = f"has no kernels for {what}; {', '.join(offered)} do"
        if reason is not None:
            raise RuntimeError(f"{source}='{request}' cannot run: {reason}; backend='auto' takes what can")
        return request
    kinds = {t.device.type for t in tensors}
    candidates = ("cpu",) if kinds <= {"cpu"} else ("triton",) if kinds <= {"xpu"} else ("cuda", "triton")
    refused: dict[str, str] = {}
    taken = "reference"
    for name in [n for n in candidates if n in offered]:
        reason = _refusal(available[name], tensors)
        if reason is None:
            taken = name
            break
        refused[name] = reason
    for name, reason in refused.items():
        _log_fallback(taken, name, reason)
    return taken
