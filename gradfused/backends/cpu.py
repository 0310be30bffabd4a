"""The native CPU backend: gradfused._cpu with torch's tensors turned into addresses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .base import Availability, BackendTable, Row, Settings

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

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_SETTINGS = [f.name for f in fields(Settings)]

# (address, dtype, sizes, strides) as the native module reads an operand
_Operand = tuple[int, str, list[int], list[int]]


def native() -> ModuleType:
    """The compiled module. Raises RuntimeError, with the reason and the remedy, where there is none."""
    if _native is None:
        raise RuntimeError(f"backend 'cpu': {_error}")
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
    """Why this backend cannot work on a parameter or gradient, or None if it can."""
    if tensor.device.type != "cpu":
        return f"works on CPU tensors, got one on {tensor.device}"
    if tensor.dtype not in DTYPES:
        return f"works on {', '.join(DTYPES.values())}, got {tensor.dtype}"
    if tensor.numel() and tensor.data_ptr() == 0:  # wrappers such as DTensor run their operators on another tensor
        return f"reads plain tensors' memory, got a {type(tensor).__name__}"
    return None


def _iteration_order(row: Row, noisy: bool) -> list[int] | None:
    """Dims, outermost first, in which a row's elements are numbered: as they lie in memory where that is allowed.

    None stands for row-major order. Units must be contiguous runs of the order, and noise is defined on row-major positions.
    """
    p = row.param
    if noisy or p.is_contiguous():
        return None
    dims = [d for d in range(p.dim()) if p.shape[d] != 1]
    by_stride = sorted(dims, key=p.stride, reverse=True)
    expected = 1
    for d in reversed(by_stride):
        if p.stride(d) != expected:
            return None
        expected *= p.shape[d]
    units_in_order = row.unit == p.numel() or by_stride[:1] == [0]
    return by_stride if units_in_order else None


def _walk(tensor: Tensor, order: list[int]) -> tuple[list[int], list[int]]:
    """Sizes and strides of a walk over ``tensor`` in ``order``, merged where they can be; empty where it is a plain array."""
    sizes: list[int] = []
    strides: list[int] = []
    for d in order:
        size, stride = tensor.shape[d], tensor.stride(d)
        if sizes and strides[-1] == size * stride:
            sizes[-1] *= size
            strides[-1] = stride
        else:
            sizes.append(size)
            strides.append(stride)
    return ([], []) if strides in ([], [1]) else (sizes, strides)


def _operand(tensor: Tensor, order: list[int] | None) -> _Operand:
    if order is None and tensor.is_contiguous():
        return tensor.data_ptr(), DTYPES[tensor.dtype], [], []
    order = [d for d in range(tensor.dim()) if tensor.shape[d] != 1] if order is None else order
    return (tensor.data_ptr(), DTYPES[tensor.dtype], *_walk(tensor, order))


class Table(BackendTable):
    """Rows as the native engine keeps them between steps."""

    def __init__(self, rows: Sequence[Row], settings: Sequence[Settings]) -> None:
        super().__init__(rows, settings)
        self._native = native().Table(len(settings))
        self._watch: Any = None
        self._configured: list[Settings | None] = [None] * len(settings)
        self.configure(settings)
        for row in rows:
            self._add(row)

    def _add(self, row: Row) -> None:
        order = _iteration_order(row, noisy=self.settings[row.group].noise > 0)
        self._native.add(
            rule=row.rule,
            param=_operand(row.param, order),
            grad=_operand(row.grad, order),
            state=[_operand(t, order) for t in row.state.values()],
            numel=row.param.numel(),
            length=row.unit,
            group=row.group,
            parameter=row.number,
            centre=row.centre,
            whole=row.whole,
            first=row.first,
            step=None if row.step is None else (row.step.data_ptr(), DTYPES[row.step.dtype]),
        )

    def configure(self, settings: Sequence[Settings]) -> None:
        for i, new in enumerate(settings):
            if new != self._configured[i]:
                hyper = self._native.hyper(i)
                for name in _SETTINGS:
                    value = getattr(new, name)
                    setattr(hyper, name, native().Perturb(*value) if name == "perturb" else value)
                self._configured[i] = new
        super().configure(settings)

    def watch(self, rows: Sequence[Row], groups: list[dict[str, Any]], state: dict[Any, Any]) -> None:
        self._watch = native().Watch(torch._C.TensorBase, groups, state)
        for row in rows:
            keys = [*row.state, *(() if row.step is None else ("step",))]
            self._watch.add(row.param, state.get(row.param, {}), keys)

    def refresh(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> bool:
        return self._watch is not None and bool(self._watch.refresh(groups, state, self._native))

    @property
    def needs_stats(self) -> bool:
        return bool(self._native.needs_stats())

    def stats(self, unscale: float) -> None:
        self._native.stats(unscale, self.sums.data_ptr(), torch.get_num_threads())

    def apply(self, unscale: float) -> bool:
        return bool(self._native.apply(unscale, self.sums.data_ptr(), torch.get_num_threads()))


def roof(written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """One sweep of memory, in place and without math: what no optimizer step over the same streams can beat.

    Args:
        written: float32 tensors, contiguous and of equal length, that are read and written; their values stay.
        read: Tensors of the same kind that are only read.

    Raises:
        ValueError: The streams differ in length, are not contiguous float32 CPU tensors, or none is written.
    """
    streams = [*written, *read]
    if not written:
        raise ValueError("roof: expected at least one stream to write, got none")
    for t in streams:
        if (
            t.dtype != torch.float32
            or t.device.type != "cpu"
            or not t.is_contiguous()
            or t.numel() != streams[0].numel()
        ):
            raise ValueError(
                "roof: expected contiguous float32 CPU tensors of one length, "
                f"got {t.dtype} of shape {tuple(t.shape)} on {t.device}"
            )
    native().roof(
        [t.data_ptr() for t in written], [t.data_ptr() for t in read], streams[0].numel(), torch.get_num_threads()
    )
