"""Stochastic rounding to the 16-bit formats, bit for bit that of csrc/math/rounding.h.

Random bits are added below the last bit kept, and what is below it is then cut off.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .noise import philox

# Draws for rounding have counters of their own: the noise's never reach this one.
MARK = tl.constexpr(0x80000000)


@triton.jit
def words_of_quads(draws, quad):
    """The words of elements 4 quad to 4 quad + 3, neighbours along the last dim, which gets four times as long."""
    w0, w1, w2, w3 = philox(draws, quad, MARK)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def words(draws, i):
    """The words of elements ``i``, wherever they begin."""
    w0, w1, w2, w3 = philox(draws, i // 4, MARK)
    late = (i & 2) != 0
    return tl.where((i & 1) != 0, tl.where(late, w3, w1), tl.where(late, w2, w0))


@triton.jit
def random_bfloat16(x, word):
    """Infinities and NaN stay; finite values beyond the largest become it."""
    u = x.to(tl.uint32, bitcast=True)
    rounded = (u + (word >> 16)) & 0xFFFF0000
    rounded = tl.where((rounded & 0x7F800000) == 0x7F800000, u & 0xFFFF0000, rounded)
    return tl.where((u & 0x7F800000) == 0x7F800000, u, rounded).to(tl.float32, bitcast=True)


@triton.jit
def random_half(x, word):
    """The same for float16, whose subnormals are whole multiples of 2^-24."""
    u = x.to(tl.uint32, bitcast=True)
    a = u & 0x7FFFFFFF
    tiny = a < 0x38800000
    rounded = (a + (word >> 19)) & 0xFFFFE000
    rounded = tl.where(rounded > 0x477FE000, 0x477FE000, rounded)  # 65504
    fraction = (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-8
    scaled = tl.where(tiny, tl.abs(x), 0.0) * 16777216.0 + fraction
    steps = scaled.to(tl.int32).to(tl.float32) * 5.9604644775390625e-8
    rounded = tl.where(tiny, steps.to(tl.uint32, bitcast=True), rounded) | (u & 0x80000000)
    return tl.where(a >= 0x7F800000, u, rounded).to(tl.float32, bitcast=True)


@triton.jit
def rounded_randomly(DTYPE: tl.constexpr, x, word):
    if DTYPE == at.DType_bfloat16:
        return random_bfloat16(x, word)
    else:
        return random_half(x, word)
