"""Counter-based random numbers, Philox4x32-10 (Salmon et al. 2011): normal noise by Box-Muller, and stochastic rounding.

Both are bit for bit those of csrc/math/noise.h and csrc/math/rounding.h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import layout as at

# Draws for rounding have counters of their own: the noise's never reach this one.
ROUNDING = tl.constexpr(0x80000000)


class Draws(NamedTuple):
    """What the random words of a row's elements depend on besides their number: ``step`` is how many were taken before."""

    seed: Any
    param_number: Any
    step: Any


@triton.jit
def philox(draws, quad, MARK: tl.constexpr):
    """Four words for each counter (quad low, quad high, parameter, step). MARK tells draws of one kind from another's."""
    c0 = quad.to(tl.uint32)
    c1 = (quad >> 32).to(tl.uint32) | MARK
    return tl.philox(draws.seed, c0, c1, c0 * 0 + draws.param_number.to(tl.uint32), c0 * 0 + draws.step.to(tl.uint32))


@triton.jit
def uniform(word):
    """23 random bits in the open interval (0, 1), exact in float32."""
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-7


@triton.jit
def log_normal_range(x):
    """ln(x) for normal positive x, by the polynomial of csrc/math/noise.h: every backend draws the same values."""
    i = x.to(tl.int32, bitcast=True) - 0x3F3504F3
    e = (i >> 23).to(tl.float32)
    m = ((i & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    z = m * m
    y = m * 7.0376836292e-2 - 1.1514610310e-1
    y = y * m + 1.1676998740e-1
    y = y * m - 1.2420140846e-1
    y = y * m + 1.4249322787e-1
    y = y * m - 1.6668057665e-1
    y = y * m + 2.0000714765e-1
    y = y * m - 2.4999993993e-1
    y = y * m + 3.3333331174e-1
    y = y * m * z + e * -2.12194440e-4
    y = y - 0.5 * z
    return m + y + e * 0.693359375


@triton.jit
def sincos_turns(u):
    """Sine and cosine of 2 pi u for u in (0, 1)."""
    q = (u * 4.0 + 0.5).to(tl.int32)
    r = (u - q.to(tl.float32) * 0.25) * 6.283185307179586
    z = r * r
    sine = ((z * -1.9515295891e-4 + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r
    cosine = ((z * 2.443315711809948e-5 - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    swap = (q & 1) != 0
    a = tl.where(swap, cosine, sine)
    b = tl.where(swap, sine, cosine)
    return tl.where((q & 2) != 0, -a, a), tl.where(((q + 1) & 2) != 0, -b, b)


@triton.jit
def box_muller(a, b):
    """Two words to two independent standard normal values."""
    r = tl.sqrt_rn(log_normal_range(uniform(a)) * -2.0)
    s, c = sincos_turns(uniform(b))
    return r * c, r * s


@triton.jit
def draw_quads(draws, quad):
    """The normal values of elements 4 quad to 4 quad + 3, neighbours along the last dim, which gets four times as long."""
    w0, w1, w2, w3 = philox(draws, quad, 0)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def draw(draws, i):
    """The normal values of elements ``i``, wherever they begin: each draws the words of its quad."""
    w0, w1, w2, w3 = philox(draws, i // 4, 0)
    late = (i & 2) != 0
    z0, z1 = box_muller(tl.where(late, w2, w0), tl.where(late, w3, w1))
    return tl.where((i & 1) != 0, z1, z0)


# ---- stochastic rounding: random bits are added below the last bit kept, and what is below it is then cut off


@triton.jit
def words_of_quads(draws, quad):
    """The words of elements 4 quad to 4 quad + 3, neighbours along the last dim, which gets four times as long."""
    w0, w1, w2, w3 = philox(draws, quad, ROUNDING)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def words(draws, i):
    """The words of elements ``i``, wherever they begin."""
    w0, w1, w2, w3 = philox(draws, i // 4, ROUNDING)
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
