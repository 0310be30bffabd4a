"""Reading the table, and reading and writing operands: 16 bytes at a time where it can be, else through dtype and strides.

Addresses are int64 numbers from the table, cast to pointers here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at

# How elements are accessed: as arrays of one dtype, numbered like DType, or one at a time, computed in float32 or float64.
ANY = tl.constexpr(4)
ANY_WIDE = tl.constexpr(5)
ACCESSES = tl.constexpr(6)


@triton.jit
def read(address, T: tl.constexpr):
    return tl.load(address.to(tl.pointer_type(T)))


@triton.jit
def read_bool(address):
    return tl.load(address.to(tl.pointer_type(tl.int8))) != 0


@triton.jit
def rows_of(job):
    return read(job + at.job_rows, tl.int64)


@triton.jit
def settings_of(job, row):
    group = read(row + at.row_group, tl.int32)
    return read(job + at.job_settings, tl.int64) + group.to(tl.int64) * at.DeviceSettings


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
def load(ACCESS: tl.constexpr, operand, data, start, local, mask, T: tl.constexpr):
    """Elements ``start + local`` of the operand at ``data`` in memory.

    The compiler sees nothing of the alignment of an address from a table, so it is told where the row's plan promised it. The
    hint is put on the pointer: on an int64 it is lost in the cast.
    """
    if ACCESS == at.DType_float32:
        return load_as(tl.float32, data + start * 4, local, mask, T, 16)
    elif ACCESS == at.DType_float64:
        return load_as(tl.float64, data + start * 8, local, mask, T, 16)
    elif ACCESS == at.DType_float16:
        return load_as(tl.float16, data + start * 2, local, mask, T, 16)
    elif ACCESS == at.DType_bfloat16:
        return load_as(tl.bfloat16, data + start * 2, local, mask, T, 16)
    else:
        return load_any(operand, data, start + local, mask, T)


@triton.jit
def load_any(operand, data, i, mask, T: tl.constexpr):
    where = place(operand, i)
    dtype = read(operand + at.operand_dtype, tl.int8)
    x = tl.zeros(i.shape, T)
    if dtype == at.DType_float32:
        x = load_as(tl.float32, data, where, mask, T, 1)
    elif dtype == at.DType_float64:
        x = load_as(tl.float64, data, where, mask, T, 1)
    elif dtype == at.DType_float16:
        x = load_as(tl.float16, data, where, mask, T, 1)
    else:
        x = load_as(tl.bfloat16, data, where, mask, T, 1)
    return x


@triton.jit
def store(ACCESS: tl.constexpr, operand, data, start, local, x, mask):
    """The counterpart of ``load``."""
    if ACCESS == at.DType_float32:
        store_as(tl.float32, data + start * 4, local, x, mask, 16)
    elif ACCESS == at.DType_float64:
        store_as(tl.float64, data + start * 8, local, x, mask, 16)
    elif ACCESS == at.DType_float16:
        store_as(tl.float16, data + start * 2, local, x, mask, 16)
    elif ACCESS == at.DType_bfloat16:
        store_as(tl.bfloat16, data + start * 2, local, x, mask, 16)
    else:
        store_any(operand, data, start + local, x, mask)


@triton.jit
def store_any(operand, data, i, x, mask):
    where = place(operand, i)
    dtype = read(operand + at.operand_dtype, tl.int8)
    if dtype == at.DType_float32:
        store_as(tl.float32, data, where, x, mask, 1)
    elif dtype == at.DType_float64:
        store_as(tl.float64, data, where, x, mask, 1)
    elif dtype == at.DType_float16:
        store_as(tl.float16, data, where, x, mask, 1)
    else:
        store_as(tl.bfloat16, data, where, x, mask, 1)


@triton.jit
def load_mixed(ACCESS: tl.constexpr, MIXED: tl.constexpr, operand, data, dtype, start, local, mask, T: tl.constexpr):
    """``load`` of an operand that may, if MIXED, be of float32 in a row of 16 bits."""
    if MIXED and (ACCESS == at.DType_float16 or ACCESS == at.DType_bfloat16):
        x = tl.zeros(mask.shape, T)
        if dtype == at.DType_float32:
            x = load(at.DType_float32, operand, data, start, local, mask, T)
        else:
            x = load(ACCESS, operand, data, start, local, mask, T)
        return x
    else:
        return load(ACCESS, operand, data, start, local, mask, T)


@triton.jit
def store_mixed(ACCESS: tl.constexpr, operand, data, dtype, start, local, x, mask):
    """The counterpart of ``load_mixed``, where MIXED."""
    if ACCESS == at.DType_float16 or ACCESS == at.DType_bfloat16:
        if dtype == at.DType_float32:
            store(at.DType_float32, operand, data, start, local, x, mask)
        else:
            store(ACCESS, operand, data, start, local, x, mask)
    else:
        store(ACCESS, operand, data, start, local, x, mask)
