"""Reading the table, and reading and writing operands: 16 bytes at a time where it can be, else through dtype and strides.

Addresses are int64 numbers from the table, cast to pointers here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import layout as at

# How elements are accessed: as arrays of one dtype, numbered like DType, or one at a time, computed in float32 or float64.
ANY = tl.constexpr(4)
ANY_WIDE = tl.constexpr(5)
ACCESSES = tl.constexpr(6)


class Operand(NamedTuple):
    """A tensor as a kernel walks it: the address of its description in the table, the address of its data, and its dtype."""

    description: Any
    data: Any
    dtype: Any


class Tile(NamedTuple):
    """Elements ``start + local`` of a row where ``mask`` is true: from ``column`` on of neighbouring units of one length."""

    start: Any
    local: Any
    mask: Any
    length: Any
    column: Any


@triton.jit
def read(address, T: tl.constexpr):
    return tl.load(address.to(tl.pointer_type(T)))


@triton.jit
def read_bool(address):
    return tl.load(address.to(tl.pointer_type(tl.int8))) != 0


@triton.jit
def needs_of(row):
    """The bits of what a row needs: see csrc/plan/needs.h."""
    return read(row + at.row_needs, tl.int32)


@triton.jit
def rows_of(job):
    return read(job + at.job_rows, tl.int64)


@triton.jit
def settings_of(job, row):
    group = read(row + at.row_group, tl.int32)
    return read(job + at.job_settings, tl.int64) + group.to(tl.int64) * at.DeviceSettings


@triton.jit
def operand_at(description):
    return Operand(
        description, read(description + at.operand_data, tl.int64), read(description + at.operand_dtype, tl.int8)
    )


@triton.jit
def operand_if(WANTED: tl.constexpr, description):
    """An operand that not every row has, without data unless it is wanted."""
    if WANTED:
        return operand_at(description)
    else:
        return Operand(description, tl.full([], 0, tl.int64), read(description + at.operand_dtype, tl.int8))


@triton.jit
def place(operand, i):
    """Where elements ``i`` of the iteration order lie, in elements."""
    dims = read(operand + at.operand_dims, tl.int32)
    where = i
    if dims > 0:
        sizes = read(operand + at.operand_sizes, tl.int64)
        strides = read(operand + at.operand_strides, tl.int64)
        where = i * 0
        rest = i
        for d in range(dims):
            inner = (dims - 1 - d) * 8
            size = read(sizes + inner, tl.int64)
            where += rest % size * read(strides + inner, tl.int64)
            rest = rest // size
    return where


@triton.jit
def widen_bfloat16(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def narrow_bfloat16(x):
    """To nearest even, as bits; a NaN stays one. What the interpreter lacks: it truncates."""
    u = x.to(tl.int32, bitcast=True)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return tl.where(x != x, (u >> 16) | 0x40, rounded).to(tl.int16)


@triton.jit
def pointer(address, T: tl.constexpr, ALIGNED: tl.constexpr):
    """``address``, a multiple of ALIGNED, as a pointer."""
    if ALIGNED > 1:
        return tl.multiple_of(address.to(tl.pointer_type(T)), ALIGNED)
    else:
        return address.to(tl.pointer_type(T))


@triton.jit
def load_as(S: tl.constexpr, address, where, mask, T: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements of dtype S, in T; 0 where ``mask`` is not."""
    if S == tl.bfloat16 and at.INTERPRETED:
        bits = tl.load(pointer(address, tl.int16, ALIGNED) + where, mask=mask, other=0)
        return widen_bfloat16(bits).to(T)
    else:
        return tl.load(pointer(address, S, ALIGNED) + where, mask=mask, other=0.0).to(T)


@triton.jit
def store_as(S: tl.constexpr, address, where, x, mask, ALIGNED: tl.constexpr):
    if S == tl.bfloat16 and at.INTERPRETED:
        tl.store(pointer(address, tl.int16, ALIGNED) + where, narrow_bfloat16(x.to(tl.float32)), mask=mask)
    elif S == tl.float32 or S == tl.float64:
        tl.store(pointer(address, S, ALIGNED) + where, x.to(S), mask=mask)
    else:
        tl.store(pointer(address, S, ALIGNED) + where, x.to(tl.float32).to(S), mask=mask)


@triton.jit
def rounded_as(S: tl.constexpr, x):
    """``x`` in float32 as dtype S would hold it."""
    if S == tl.bfloat16 and at.INTERPRETED:
        return widen_bfloat16(narrow_bfloat16(x))
    else:
        return x.to(S).to(tl.float32)


@triton.jit
def load(ACCESS: tl.constexpr, x, tile, T: tl.constexpr):
    """The operand's elements in ``tile``, as T.

    The compiler does not know how an address from a table is aligned, so it is told where the row's plan promises it. The hint
    is put on the pointer: on an int64 it is lost in the cast.
    """
    if ACCESS == at.DType_float32:
        return load_as(tl.float32, x.data + tile.start * 4, tile.local, tile.mask, T, 16)
    elif ACCESS == at.DType_float64:
        return load_as(tl.float64, x.data + tile.start * 8, tile.local, tile.mask, T, 16)
    elif ACCESS == at.DType_float16:
        return load_as(tl.float16, x.data + tile.start * 2, tile.local, tile.mask, T, 16)
    elif ACCESS == at.DType_bfloat16:
        return load_as(tl.bfloat16, x.data + tile.start * 2, tile.local, tile.mask, T, 16)
    else:
        return load_any(x, tile.start + tile.local, tile.mask, T)


@triton.jit
def load_any(x, i, mask, T: tl.constexpr):
    where = place(x.description, i)
    values = tl.zeros(i.shape, T)
    if x.dtype == at.DType_float32:
        values = load_as(tl.float32, x.data, where, mask, T, 1)
    elif x.dtype == at.DType_float64:
        values = load_as(tl.float64, x.data, where, mask, T, 1)
    elif x.dtype == at.DType_float16:
        values = load_as(tl.float16, x.data, where, mask, T, 1)
    else:
        values = load_as(tl.bfloat16, x.data, where, mask, T, 1)
    return values


@triton.jit
def store(ACCESS: tl.constexpr, x, tile, values):
    """The counterpart of ``load``."""
    if ACCESS == at.DType_float32:
        store_as(tl.float32, x.data + tile.start * 4, tile.local, values, tile.mask, 16)
    elif ACCESS == at.DType_float64:
        store_as(tl.float64, x.data + tile.start * 8, tile.local, values, tile.mask, 16)
    elif ACCESS == at.DType_float16:
        store_as(tl.float16, x.data + tile.start * 2, tile.local, values, tile.mask, 16)
    elif ACCESS == at.DType_bfloat16:
        store_as(tl.bfloat16, x.data + tile.start * 2, tile.local, values, tile.mask, 16)
    else:
        store_any(x, tile.start + tile.local, values, tile.mask)


@triton.jit
def store_any(x, i, values, mask):
    where = place(x.description, i)
    if x.dtype == at.DType_float32:
        store_as(tl.float32, x.data, where, values, mask, 1)
    elif x.dtype == at.DType_float64:
        store_as(tl.float64, x.data, where, values, mask, 1)
    elif x.dtype == at.DType_float16:
        store_as(tl.float16, x.data, where, values, mask, 1)
    else:
        store_as(tl.bfloat16, x.data, where, values, mask, 1)


@triton.jit
def load_mixed(ACCESS: tl.constexpr, x, tile, T: tl.constexpr):
    """``load`` of an operand that may be float32 in a row of 16 bits."""
    if ACCESS == at.DType_float16 or ACCESS == at.DType_bfloat16:
        values = tl.zeros(tile.mask.shape, T)
        if x.dtype == at.DType_float32:
            values = load(at.DType_float32, x, tile, T)
        else:
            values = load(ACCESS, x, tile, T)
        return values
    else:
        return load(ACCESS, x, tile, T)


@triton.jit
def store_mixed(ACCESS: tl.constexpr, x, tile, values):
    """The counterpart of ``load_mixed``."""
    if ACCESS == at.DType_float16 or ACCESS == at.DType_bfloat16:
        if x.dtype == at.DType_float32:
            store(at.DType_float32, x, tile, values)
        else:
            store(ACCESS, x, tile, values)
    else:
        store(ACCESS, x, tile, values)
