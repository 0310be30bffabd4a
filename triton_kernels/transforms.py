"""Stages 0 to 6 of a step, which a gradient goes through before the update rule sees it, and moving averages."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import layout as at
from .access import read, read_bool


@triton.jit
def clamp(x, lo, hi):
    """Comparisons are ordered so that a NaN stays, as in torch.clamp."""
    x = tl.where(x < lo, lo, x)
    return tl.where(x > hi, hi, x)


@triton.jit
def maximum(a, b):
    """torch.maximum: a NaN on either side wins."""
    return tl.where((b > a) | (b != b), b, a)


@triton.jit
def perturb_factor(settings, norm):
    """s(n) = clamp(a + b / (n + e), lo, hi), in float64."""
    p = settings + at.settings_perturb
    a = read(p + at.perturb_a, tl.float64)
    b = read(p + at.perturb_b, tl.float64)
    e = read(p + at.perturb_e, tl.float64)
    return clamp(a + b / (norm + e), read(p + at.perturb_lo, tl.float64), read(p + at.perturb_hi, tl.float64))


@triton.jit
def agc_factor(radius, weight_norm, norm):
    """Adaptive gradient clipping (Brock et al. 2021): min(1, radius * max(||w||, 1e-3) / max(n, 1e-6)), NaN kept."""
    bound = radius * maximum(weight_norm, tl.zeros_like(norm) + 1e-3) / maximum(tl.zeros_like(norm) + 1e-6, norm)
    return tl.where((bound < 1.0) | (bound != bound), bound, 1.0)


@triton.jit
def power(base, exponent):
    """base ** exponent in float64, for base >= 0. No library call, so that the interpreter can run it."""
    return tl.exp2(exponent * tl.log2(base))


@triton.jit
def noise_sigma(noise, decay, step):
    """Annealed noise (Neelakantan et al. 2015): sigma_t for a step that counts from 0."""
    return tl.sqrt(noise / power(1.0 + step, decay))


@triton.jit
def anchor(first):
    """What the values of a unit are compared with while their mean is taken: its first value, or 0 where that is not finite.

    Equal values then have just themselves for a mean, and are zero once centred, which rounded sums would not leave them.
    """
    return tl.where(first - first == 0.0, first, tl.zeros_like(first))


@triton.jit
def centred(g, unscale, mean):
    return g * unscale - mean


class Stages(NamedTuple):
    """The numbers of a row's stages 0 to 6, but for the mean and the factor of each unit."""

    unscale: Any
    clip_value: Any
    sigma: Any
    sign: Any
    decay: Any


@triton.jit
def stages_of(NEEDS: tl.constexpr, settings, unscale, taken, T: tl.constexpr):
    decoupled = read_bool(settings + at.settings_decoupled)
    sigma = tl.full([], 0.0, T)
    if at.Need_noise & NEEDS:
        noise = read(settings + at.settings_noise, tl.float64)
        sigma = noise_sigma(noise, read(settings + at.settings_noise_decay, tl.float64), taken).to(T)
    return Stages(
        unscale.to(T),
        read(settings + at.settings_clip_value, tl.float64).to(T),
        sigma,
        read(settings + at.settings_sign, tl.float64).to(T),
        tl.where(decoupled, 0.0, read(settings + at.settings_weight_decay, tl.float64)).to(T),
    )


@triton.jit
def transformed(NEEDS: tl.constexpr, stages, mean, factor, g, z, p):
    """The gradient as the rule is given it, from what was read, the noise and the weights."""
    x = clamp(centred(g, stages.unscale, mean) * factor, -stages.clip_value, stages.clip_value)
    if at.Need_noise & NEEDS:
        x = x + stages.sigma * z
    x = x * stages.sign
    # Without decay an infinite weight leaves the gradient alone.
    return tl.where(stages.decay != 0.0, x + stages.decay * p, x)


# ---- moving averages, as torch.lerp steps them


@triton.jit
def mix_of(weight, T: tl.constexpr):
    """What ``mixed`` is given for a weight in float64."""
    from_end = weight >= 0.5
    return tl.where(from_end, weight - 1.0, weight).to(T), from_end


@triton.jit
def mixed(begin, end, mix):
    """From one value to another by a weight, from the nearer end: a weight of 1 gives just the other."""
    return tl.where(mix[1], end, begin) + (end - begin) * mix[0]
