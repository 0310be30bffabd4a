"""The weights of a tile: read from where they are kept, written back in the row's precision, and what is written along with them.

Addresses and dtypes are looked up before a row's loops. Code for what no row of the table needs is left out by NEEDS.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import layout as at
from .access import ANY, load, load_mixed, needs_of, operand_at, operand_if, read, rounded_as, store, store_mixed
from .chunk import elements_of, quads_of, tile_at
from .noise import rounded_randomly, words, words_of_quads
from .transforms import mix_of, mixed


class Weights(NamedTuple):
    """The operands of a row's weights, and what becomes of them.

    ``source`` is where they are read: the parameter, or what SAM put aside. ``mix`` is how the average takes new weights.
    """

    param: Any
    source: Any
    master: Any
    kahan_comp: Any
    ema: Any
    mix: Any
    needs: Any


@triton.jit
def weights_of(NEEDS: tl.constexpr, row, settings, T: tl.constexpr):
    needs = needs_of(row)
    source = row + at.row_param
    if at.Need_source & NEEDS:
        source = tl.where((needs & at.Need_source) != 0, row + at.row_source, source)
    return Weights(
        operand_at(row + at.row_param),
        operand_at(source),
        operand_if((at.Need_copy | at.Need_master) & NEEDS, row + at.row_master),
        operand_if(at.Need_kahan & NEEDS, row + at.row_kahan_comp),
        operand_if(at.Need_ema & NEEDS, row + at.row_ema),
        mix_of(1.0 - read(settings + at.settings_ema, tl.float64), T),
        needs,
    )


@triton.jit
def held(ACCESS: tl.constexpr, param, x):
    """``x`` as the 16-bit parameter will hold it."""
    if ACCESS == at.DType_bfloat16:
        return rounded_as(tl.bfloat16, x)
    elif ACCESS == at.DType_float16:
        return rounded_as(tl.float16, x)
    else:
        y = x
        if param.dtype == at.DType_bfloat16:
            y = rounded_as(tl.bfloat16, x)
        else:
            y = rounded_as(tl.float16, x)
        return y


@triton.jit
def half_unit(ACCESS: tl.constexpr, param):
    """Half a unit in the last place of a weight of 1."""
    if ACCESS == at.DType_bfloat16:
        return 0.00390625  # 2^-8
    elif ACCESS == at.DType_float16:
        return 0.00048828125  # 2^-11
    else:
        return tl.where(param.dtype == at.DType_bfloat16, 0.00390625, 0.00048828125)


@triton.jit
def believed_comp(comp, weight, half):
    """As in csrc/math/rounding.h: what rounding took off, where it is within half a unit in the last place of the weight."""
    power = (weight.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where((tl.abs(comp) <= power * half) & (tl.abs(comp) < float("inf")), comp, 0.0)


@triton.jit
def load_weights(ACCESS: tl.constexpr, NEEDS: tl.constexpr, weights, tile, T: tl.constexpr):
    """The weights before the step, in all the digits that are kept and belong to them."""
    SHORT: tl.constexpr = (ACCESS == at.DType_float16 or ACCESS == at.DType_bfloat16) or ACCESS == ANY
    p = load(ACCESS, weights.source, tile, T)
    if SHORT and at.Need_copy & NEEDS:
        if (weights.needs & at.Need_copy) != 0:
            finer = load_mixed(ACCESS, weights.master, tile, T)
            p = tl.where(held(ACCESS, weights.param, finer) == p, finer, p)
    if SHORT and at.Need_kahan & NEEDS:
        if (weights.needs & at.Need_kahan) != 0:
            comp = load_mixed(ACCESS, weights.kahan_comp, tile, T)
            p += believed_comp(comp, p, half_unit(ACCESS, weights.param))
    return p


@triton.jit
def square_weights(ACCESS: tl.constexpr, NEEDS: tl.constexpr, weights, span, T: tl.constexpr):
    """Each unit's sum of squares of the weights, (units, 1) in float64."""
    HEIGHT: tl.constexpr = span.inside.shape[0]
    WIDTH: tl.constexpr = span.columns.shape[1]
    total = tl.zeros([HEIGHT, WIDTH], tl.float64)
    for k in range(0, span.length, WIDTH):
        tile = tile_at(span, k)
        x = tl.where(tile.mask, load_weights(ACCESS, NEEDS, weights, tile, T), 0.0).to(tl.float64)
        total += x * x
    return tl.sum(total, axis=1)[:, None]


@triton.jit
def rounded(ACCESS: tl.constexpr, param, x, draws, tile):
    """``x`` as one of its two neighbours in the parameter's 16-bit dtype, the nearer the likelier."""
    if ACCESS < ANY:
        return rounded_randomly(ACCESS, x, words_of_quads(draws, quads_of(tile)))
    else:
        word = words(draws, elements_of(tile))
        y = x
        if param.dtype == at.DType_bfloat16:
            y = rounded_randomly(at.DType_bfloat16, x, word)
        else:
            y = rounded_randomly(at.DType_float16, x, word)
        return y


@triton.jit
def store_weights(ACCESS: tl.constexpr, NEEDS: tl.constexpr, weights, grad, draws, tile, p):
    """Write the new weights ``p``, and what is kept along with them; leave the gradient at zero where that is asked for."""
    SHORT: tl.constexpr = (ACCESS == at.DType_float16 or ACCESS == at.DType_bfloat16) or ACCESS == ANY
    if at.Need_ema & NEEDS:
        if (weights.needs & at.Need_ema) != 0:
            average = mixed(load_mixed(ACCESS, weights.ema, tile, p.dtype), p, weights.mix)
            store_mixed(ACCESS, weights.ema, tile, average)
    if SHORT and at.Need_master & NEEDS:
        if (weights.needs & at.Need_master) != 0:
            store_mixed(ACCESS, weights.master, tile, p)
    if SHORT and at.Need_stochastic & NEEDS:
        if (weights.needs & at.Need_stochastic) != 0:
            p = rounded(ACCESS, weights.param, p, draws, tile)
    store(ACCESS, weights.param, tile, p)
    if SHORT and at.Need_kahan & NEEDS:
        if (weights.needs & at.Need_kahan) != 0:
            store_mixed(ACCESS, weights.kahan_comp, tile, p - held(ACCESS, weights.param, p))
    if at.Need_zero_grad_in_step & NEEDS:
        if (weights.needs & at.Need_zero_grad_in_step) != 0:
            store(ACCESS, grad, tile, tl.zeros_like(p))
