"""Tensors as addresses and walks over memory; rows and settings handed to a native table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..step.memory import address
from .base import Row, Settings

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
#: The fields of a row that native code reads: csrc/schema.def lists them.
_ROW = [f.name for f in fields(Row) if f.name not in ("name", "kept")]
_COUNTS = ("step", "mu_product")

# (address, dtype, sizes, strides) as a native module reads an operand
Operand = tuple[int, str, list[int], list[int]]


def refusal(tensor: Tensor, *devices: str) -> str | None:
    """Why a backend for ``devices`` cannot work on a parameter or gradient, or None if it can."""
    if tensor.device.type not in devices:
        return f"works on {' and '.join(map(str.upper, devices))} tensors, got one on {tensor.device}"
    if tensor.dtype not in DTYPES:
        return f"works on {', '.join(DTYPES.values())}, got {tensor.dtype}"
    if tensor.numel() and not address(tensor):  # wrappers such as DTensor run their operators on another tensor
        return f"reads plain tensors' memory, got a {type(tensor).__name__}"
    return None


def iteration_order(row: Row, drawn: bool) -> list[int] | None:
    """Dims, outermost first, in which a row's elements are numbered: as they lie in memory where that is allowed.

    None stands for row-major order. Units must be contiguous runs of the order, and what is ``drawn`` at random is
    defined on row-major positions.
    """
    p = row.param
    if drawn or p.is_contiguous():
        return None
    dims = [d for d in range(p.dim()) if p.shape[d] != 1]
    by_stride = sorted(dims, key=p.stride, reverse=True)
    expected = 1
    for d in reversed(by_stride):
        if p.stride(d) != expected:
            return None
        expected *= p.shape[d]
    units_in_order = row.unit_length == p.numel() or by_stride[:1] == [0]
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


def operand(tensor: Tensor, order: list[int] | None) -> Operand:
    """A tensor as a walk in ``order``."""
    if order is None and tensor.is_contiguous():
        return tensor.data_ptr(), DTYPES[tensor.dtype], [], []
    order = [d for d in range(tensor.dim()) if tensor.shape[d] != 1] if order is None else order
    return (tensor.data_ptr(), DTYPES[tensor.dtype], *_walk(tensor, order))


def add_row(rows: Any, row: Row, settings: Settings, *, numel: int | None = None) -> None:
    """Give a row to a native table. ``numel`` of 0 leaves out its elements: they are another table's."""
    order = iteration_order(row, drawn=settings.noise > 0 or row.precision == "stochastic")

    def described(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return [operand(t, order) for t in value.values()]
        if not isinstance(value, Tensor):
            return value
        if name in _COUNTS:
            return None if numel == 0 else (value.data_ptr(), DTYPES[value.dtype])
        return operand(value, order)

    elements = row.param.numel() if numel is None else numel
    rows.add(numel=elements, **{name: described(name, getattr(row, name)) for name in _ROW})


def configure(rows: Any, known: Sequence[Settings | None], new: Sequence[Settings]) -> bool:
    """Write the groups' settings that changed to a native table. True if any did."""
    changed = [i for i, (old, settings) in enumerate(zip(known, new, strict=True)) if settings != old]
    for i in changed:
        rows.configure(i, new[i])
    return bool(changed)
