"""The CPU backend: the engine of gradfused._cpu, which is given tensors as addresses."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from . import native as natives
from .base import Availability, CompiledBackend, Row, Scaling, Settings

_native: ModuleType | None
_error: str | None = None
try:
    _native = import_module("gradfused._cpu")
except ImportError as error:  # a source tree that was never built, or a wheel for another platform
    _native = None
    _error = (
        f"cannot load the compiled module gradfused._cpu ({error}): install a wheel, "
        "or build from source with a C++17 compiler (pip install -e . when working in a checkout)"
    )


def native() -> ModuleType:
    """The compiled module. Raises RuntimeError, with the reason and the remedy, if it did not load."""
    if _native is None:
        raise RuntimeError(f"backend 'cpu': {_error}")
    return _native


def native_or_none() -> ModuleType | None:
    """The compiled module, if it loaded."""
    return _native


def availability() -> Availability:
    """Whether the compiled module loads, and the instruction set it chose."""
    if _native is None:
        return Availability("cpu", _error)
    try:
        isa = _native.isa()
    except ValueError as error:  # GRADFUSED_CPU_ISA names one that this machine lacks
        return Availability("cpu", str(error), mistake=True)
    return Availability("cpu", details={"isa": isa, "isas": ", ".join(_native.isas())})


def isa() -> str:
    """The instruction set in use: ``"generic"``, ``"avx2"`` or ``"avx512"``."""
    return str(native().isa())


def refusal(tensor: Tensor) -> str | None:
    """The reason why this backend cannot work on a parameter or gradient; None if it can."""
    return natives.refusal(tensor, "cpu")


class CpuBackend(CompiledBackend):
    """The native CPU engine with the rows of a step."""

    def __init__(self, rows: Sequence[Row], settings: Sequence[Settings]) -> None:
        super().__init__(rows, settings)
        self._engine = native().Engine(len(settings))
        self.natives = [self._engine]
        self._sums = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
        natives.configure(self._engine, [None] * len(settings), settings)
        for row in rows:
            natives.add_row(self._engine, row, settings[row.group])

    @staticmethod
    def module() -> ModuleType:
        return native()

    def configure(self, settings: Sequence[Settings]) -> None:
        natives.configure(self._engine, self.settings, settings)
        super().configure(settings)

    @property
    def sums(self) -> Tensor:
        return self._sums

    def stats(self, scaling: Scaling) -> None:
        self._engine.stats(scaling.unscale, self._sums.data_ptr(), torch.get_num_threads())

    def apply(self, scaling: Scaling) -> bool:
        return bool(self._engine.apply(scaling.unscale, self._sums.data_ptr(), torch.get_num_threads()))
