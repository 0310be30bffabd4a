"""Moving averages, as torch.lerp steps them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix_of(weight, T: tl.constexpr):
    """What ``mixed`` is given for a weight in float64."""
    from_end = weight >= 0.5
    return tl.where(from_end, weight - 1.0, weight).to(T), from_end


@triton.jit
def mixed(begin, end, mix):
    """From one value to another by a weight, from the nearer end: a weight of 1 gives just the other."""
    return tl.where(mix[1], end, begin) + (end - begin) * mix[0]
