"""The weights of a tile: read from where they are kept, and written back in the way that is asked for, with what rides on that.

RIDERS says what of it a kernel is compiled for. The addresses and dtypes of a row's ``riders`` are looked up before its loops.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import ANY, load, load_mixed, read, read_bool, rounded_as, store, store_mixed
from .chunk import elements_of, quads_of
from .mix import mix_of, mixed
from .rounding import rounded_randomly, words, words_of_quads

# Bits of RIDERS: some row has its weights elsewhere, a remainder, random rounding, a copy in float32 or an average, or leaves its
# gradient at zero. A constant stands left of an operator, where the interpreter needs it.
SOURCE = tl.constexpr(1)
KAHAN = tl.constexpr(2)
STOCHASTIC = tl.constexpr(4)
MASTER = tl.constexpr(8)
EMA = tl.constexpr(16)
ZERO = tl.constexpr(32)
BITS = {"source": 1, "kahan": 2, "stochastic": 4, "master": 8, "ema": 16, "zero": 32}


@triton.jit
def data_of(row, FIELD: tl.constexpr, WANTED: tl.constexpr):
    """The address of an operand that a row may have, or 0."""
    if WANTED:
        return read(row + (FIELD + at.operand_data), tl.int64)
    else:
        return tl.full([], 0, tl.int64)


@triton.jit
def kept_of(row, RIDERS: tl.constexpr):
    """What load_kept is to know of a row: operand and address of the weights; address and dtype of their copy and remainder."""
    operand = row + at.row_param
    if SOURCE & RIDERS:
        has_source = data_of(row, at.row_source, True) != 0
        operand = tl.where(has_source, row + at.row_source, operand)
    copy = data_of(row, at.row_master, MASTER & RIDERS)
    copy_dtype = read(row + (at.row_master + at.operand_dtype), tl.int8)
    rest = data_of(row, at.row_kahan_comp, KAHAN & RIDERS)
    rest_dtype = read(row + (at.row_kahan_comp + at.operand_dtype), tl.int8)
    return operand, read(operand + at.operand_data, tl.int64), copy, copy_dtype, rest, rest_dtype


@triton.jit
def riders_of(row, settings, RIDERS: tl.constexpr, T: tl.constexpr):
    """What store_weights is to know of a row besides."""
    rounding = read(row + at.row_precision, tl.int8)
    average = data_of(row, at.row_ema, EMA & RIDERS)
    average_dtype = read(row + (at.row_ema + at.operand_dtype), tl.int8)
    mix = mix_of(1.0 - read(settings + at.settings_ema, tl.float64), T)
    zeroes = read_bool(settings + at.settings_zero_grad_in_step)
    return rounding, average, average_dtype, mix, zeroes


@triton.jit
def held(ACCESS: tl.constexpr, row, x):
    """``x`` as the 16-bit parameter will hold it."""
    if ACCESS == at.DType_bfloat16:
        return rounded_as(tl.bfloat16, x)
    elif ACCESS == at.DType_float16:
        return rounded_as(tl.float16, x)
    else:
        y = x
        if read(row + (at.row_param + at.operand_dtype), tl.int8) == at.DType_bfloat16:
            y = rounded_as(tl.bfloat16, x)
        else:
            y = rounded_as(tl.float16, x)
        return y


@triton.jit
def half_unit(ACCESS: tl.constexpr, row):
    """Half a unit in the last place of a weight of 1."""
    if ACCESS == at.DType_bfloat16:
        return 0.00390625  # 2^-8
    elif ACCESS == at.DType_float16:
        return 0.00048828125  # 2^-11
    else:
        is_bfloat16 = read(row + (at.row_param + at.operand_dtype), tl.int8) == at.DType_bfloat16
        return tl.where(is_bfloat16, 0.00390625, 0.00048828125)


@triton.jit
def believed_rest(rest, weight, half):
    """As in csrc/math/believed.h: what rounding took off, where it is within half a unit in the last place of the weight."""
    power = (weight.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((tl.abs(rest) <= power * half) & (tl.abs(rest) < float("inf")), rest, 0.0)


@triton.jit
def load_kept(ACCESS: tl.constexpr, RIDERS: tl.constexpr, row, kept, start, local, mask, T: tl.constexpr):
    """The weights before the step, in all the digits that are kept and belong to them."""
    operand, data, copy, copy_dtype, rest, rest_dtype = kept
    SHORT: tl.constexpr = (ACCESS == at.DType_float16 or ACCESS == at.DType_bfloat16) or ACCESS == ANY
    p = load(ACCESS, operand, data, start, local, mask, T)
    if SHORT and MASTER & RIDERS:
        if copy != 0:
            finer = load_mixed(ACCESS, True, row + at.row_master, copy, copy_dtype, start, local, mask, T)
            p = tl.where(held(ACCESS, row, finer) == p, finer, p)
    if SHORT and KAHAN & RIDERS:
        if rest != 0:
            taken_off = load_mixed(ACCESS, True, row + at.row_kahan_comp, rest, rest_dtype, start, local, mask, T)
            p += believed_rest(taken_off, p, half_unit(ACCESS, row))
    return p


@triton.jit
def square_kept(
    ACCESS: tl.constexpr, RIDERS: tl.constexpr, row, kept, start, stride, inside, length,
    WIDTH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Each unit's sum of squares of the weights, (units, 1) in float64."""
    total = tl.zeros([inside.shape[0], WIDTH], tl.float64)
    for k in range(0, length, WIDTH):
        column = k + tl.arange(0, WIDTH)[None, :]
        mask = inside & (column < length)
        x = tl.where(mask, load_kept(ACCESS, RIDERS, row, kept, start, stride + column, mask, T), 0.0).to(tl.float64)
        total += x * x
    return tl.sum(total, axis=1)[:, None]


@triton.jit
def rounded(
    ACCESS: tl.constexpr, row, x, seed, parameter, step, start, length, k, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """``x`` as one of its two neighbours in the parameter's 16-bit dtype, the nearer the likelier."""
    if ACCESS < ANY:
        word = words_of_quads(seed, quads_of(start, length, k, HEIGHT, WIDTH), parameter, step)
        return rounded_randomly(ACCESS, x, word)
    else:
        word = words(seed, elements_of(start, length, k, HEIGHT, WIDTH), parameter, step)
        y = x
        if read(row + (at.row_param + at.operand_dtype), tl.int8) == at.DType_bfloat16:
            y = rounded_randomly(at.DType_bfloat16, x, word)
        else:
            y = rounded_randomly(at.DType_float16, x, word)
        return y


@triton.jit
def store_weights(
    ACCESS: tl.constexpr, RIDERS: tl.constexpr, row, param, grad, kept, riders, p, seed, parameter, step,
    start, length, k, local, mask, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Takes the step's weights ``p`` to where they are kept."""
    rounding, average, average_dtype, mix, zeroes = riders
    SHORT: tl.constexpr = (ACCESS == at.DType_float16 or ACCESS == at.DType_bfloat16) or ACCESS == ANY
    if EMA & RIDERS:
        if average != 0:
            e = load_mixed(ACCESS, True, row + at.row_ema, average, average_dtype, start, local, mask, T)
            e = mixed(e, p, mix)
            store_mixed(ACCESS, row + at.row_ema, average, average_dtype, start, local, e, mask)
    if SHORT and MASTER & RIDERS:
        if rounding == at.Precision_master:
            store_mixed(ACCESS, row + at.row_master, kept[2], kept[3], start, local, p, mask)
    if SHORT and STOCHASTIC & RIDERS:
        if rounding == at.Precision_stochastic:
            p = rounded(ACCESS, row, p, seed, parameter, step, start, length, k, HEIGHT, WIDTH)
    store(ACCESS, row + at.row_param, param, start, local, p, mask)
    if SHORT and KAHAN & RIDERS:
        if rounding == at.Precision_kahan:
            taken_off = p - held(ACCESS, row, p)
            store_mixed(ACCESS, row + at.row_kahan_comp, kept[4], kept[5], start, local, taken_off, mask)
    if ZERO & RIDERS:
        if zeroes:
            store(ACCESS, row + at.row_grad, grad, start, local, tl.zeros_like(p), mask)
