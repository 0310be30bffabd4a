"""One chunk's way through a launch of ``apply``: the step, or the sums that the step's numbers are made of.

A row's numbers depend on its group's settings, the steps taken, the learning rate on the device, and the trust in the step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import layout as at
from .access import (
    ACCESSES,
    ANY,
    ANY_WIDE,
    Operand,
    load,
    needs_of,
    operand_if,
    read,
    read_bool,
    rows_of,
    settings_of,
    store,
)
from .chunk import (
    TILES,
    elements_of,
    first_of,
    mean_tiles,
    quads_of,
    span_at,
    square_tiles,
    sum_row,
    tile_at,
    walk_of,
    write,
)
from .noise import Draws, draw, draw_quads
from .rules import coefficients, direction, next_mu_product, ratio_of
from .transforms import agc_factor, anchor, perturb_factor, stages_of, transformed
from .weights import load_weights, square_weights, store_weights, weights_of


class RowStep(NamedTuple):
    """What a row's step depends on. It is looked up before the loops: after a store the compiler would have to look again."""

    grad: Any
    weights: Any
    states: Any
    draws: Any
    stages: Any
    shrink: Any
    step_size: Any
    coefficients: Any
    settings: Any
    units: Any
    needs: Any


# ---- what a row's numbers depend on


@triton.jit
def scalar_at(address, dtype, otherwise):
    """The float32 or float64 scalar at an address; ``otherwise``, a float64, if that is 0."""
    value = otherwise
    if address != 0:
        if dtype == at.DType_float64:
            value = read(address, tl.float64)
        else:
            value = read(address, tl.float32).to(tl.float64)
    return value


@triton.jit
def put_scalar(address, dtype, value):
    if dtype == at.DType_float64:
        write(address, value, tl.float64)
    else:
        write(address, value, tl.float32)


@triton.jit
def steps_taken(row):
    zero = tl.full([], 0.0, tl.float64)
    return scalar_at(read(row + at.row_step, tl.int64), read(row + at.row_step_dtype, tl.int8), zero)


@triton.jit
def lr_of(settings):
    lr = read(settings + at.settings_lr, tl.float64)
    return scalar_at(read(settings + at.settings_lr_at, tl.int64), read(settings + at.settings_lr_dtype, tl.int8), lr)


@triton.jit
def mu_product_of(row, settings, step):
    """The product of the momenta up to ``step``; what the row keeps is that of the step before."""
    dtype = read(row + at.row_mu_product_dtype, tl.int8)
    before = scalar_at(read(row + at.row_mu_product, tl.int64), dtype, tl.full([], 1.0, tl.float64))
    return next_mu_product(settings, step, before, dtype)


# ---- a step is counted


@triton.jit
def count_step(row, settings, NEEDS: tl.constexpr):
    tl.store((row + at.row_first).to(tl.pointer_type(tl.int8)), 0)
    if at.Need_mu_product & NEEDS:
        address = read(row + at.row_mu_product, tl.int64)
        if address != 0:
            mu_product = mu_product_of(row, settings, steps_taken(row) + 1.0)
            put_scalar(address, read(row + at.row_mu_product_dtype, tl.int8), mu_product)
    at_step = read(row + at.row_step, tl.int64)
    if at_step != 0:
        put_scalar(at_step, read(row + at.row_step_dtype, tl.int8), steps_taken(row) + 1.0)


@triton.jit
def count_empty_rows(job, NEEDS: tl.constexpr):
    """Rows without elements have no last chunk, but take the step."""
    for number in range(read(job + at.job_row_count, tl.int32)):
        row = rows_of(job) + number * at.DeviceRow
        if read(row + at.row_chunk0, tl.int32) == read(row + at.row_chunk1, tl.int32):
            count_step(row, settings_of(job, row), NEEDS)


# ---- trust ratios


@triton.jit
def trust_of(RULE: tl.constexpr, row, settings, known):
    """The ratio by which a rule scales its step; 1 unless the norms of the row's trust ratio are ``known``."""
    ratio = tl.full([], 1.0, tl.float64)
    if known:
        weight_norm = read(row + at.row_weight_norm, tl.float64)
        ratio = ratio_of(RULE, settings, weight_norm, read(row + at.row_norm, tl.float64))
    return ratio


@triton.jit
def finish_trust(job, row):
    """Put the norms of a row's trust ratio together from its chunks."""
    write(row + at.row_norm, tl.sqrt(sum_row(job, row, at.sums_sum)), tl.float64)
    write(row + at.row_weight_norm, tl.sqrt(sum_row(job, row, at.sums_weight_squares)), tl.float64)


# ---- a tile


@triton.jit
def state_of(RULE: tl.constexpr, row, N: tl.constexpr):
    """State tensor N of a row; without data where its rule has none."""
    return operand_if(N < at.rules_states // 8**RULE % 8, row + (at.row_state + N * at.Operand))


@triton.jit
def load_state(RULE: tl.constexpr, ACCESS: tl.constexpr, states, N: tl.constexpr, tile, T: tl.constexpr):
    """State tensor N; zeros where the rule has none, or does not read it."""
    if N < at.rules_states // 8**RULE % 8 and ((at.rules_unread >> RULE) & 1) == 0:
        return load(ACCESS, states[N], tile, T)
    else:
        return tl.zeros(tile.mask.shape, T)


@triton.jit
def load_states(RULE: tl.constexpr, ACCESS: tl.constexpr, states, tile, T: tl.constexpr):
    s0 = load_state(RULE, ACCESS, states, 0, tile, T)
    s1 = load_state(RULE, ACCESS, states, 1, tile, T)
    s2 = load_state(RULE, ACCESS, states, 2, tile, T)
    s3 = load_state(RULE, ACCESS, states, 3, tile, T)
    return s0, s1, s2, s3


@triton.jit
def store_state(RULE: tl.constexpr, ACCESS: tl.constexpr, states, N: tl.constexpr, tile, x):
    if N < at.rules_states // 8**RULE % 8:
        store(ACCESS, states[N], tile, x)


@triton.jit
def load_tile(ACCESS: tl.constexpr, NEEDS: tl.constexpr, r, tile, T: tl.constexpr):
    """(gradient, weights, noise) of a tile. Noise is drawn a quad at a time where every unit begins with one."""
    g = load(ACCESS, r.grad, tile, T)
    p = load_weights(ACCESS, NEEDS, r.weights, tile, T)
    z = tl.zeros(tile.mask.shape, T)
    if at.Need_noise & NEEDS:
        if ACCESS != at.DType_float64 and ACCESS < ANY:
            z = draw_quads(r.draws, quads_of(tile)).to(T)
        else:
            z = draw(r.draws, elements_of(tile)).to(T)
    return g, p, z


@triton.jit
def centred_direction(RULE: tl.constexpr, NEEDS: tl.constexpr, r, x, p, s0, s1, s2, s3, late_mean):
    """(direction, the state as it shall be), where late centring takes a mean off the gradient or off the direction."""
    if at.Need_centre_late & NEEDS:
        x = x - tl.where((r.needs & at.Need_centre_decayed) != 0, late_mean, 0.0)
    x, s0, s1, s2, s3 = direction(RULE, x, p, s0, s1, s2, s3, r.coefficients)
    if at.Need_centre_late & NEEDS:
        x = x - tl.where((r.needs & at.Need_centre_decayed) != 0, 0.0, late_mean)
    return x, s0, s1, s2, s3


# ---- a span of units


@triton.jit
def known_of(r, span, FIELD: tl.constexpr):
    """What the stats launch found of units that lie in several chunks, or are centred as a whole."""
    where = r.units + span.rank.to(tl.int64) * at.Unit + FIELD
    return tl.load(where.to(tl.pointer_type(tl.float64)), mask=span.inside, other=0.0)


@triton.jit
def unit_statistics(ACCESS: tl.constexpr, NEEDS: tl.constexpr, r, span, wide_factor):
    """(mean, factor, sum of squares) for each unit's gradient, (units, 1). Without norms by unit, the wide norm's factor."""
    T: tl.constexpr = r.stages.unscale.dtype
    HEIGHT: tl.constexpr = span.inside.shape[0]
    mean = tl.zeros([HEIGHT, 1], T)
    factor = tl.zeros([HEIGHT, 1], T) + wide_factor.to(T)
    squares = tl.zeros([HEIGHT, 1], tl.float64)
    if at.Need_centre_early & NEEDS:
        if (r.needs & at.Need_centre_early) != 0:
            if (r.needs & at.Need_split) != 0:
                mean = known_of(r, span, at.unit_mean).to(T)
            else:
                mean = mean_tiles(ACCESS, r.grad, r.stages.unscale, span).to(T)
    if at.Need_unit_norms & NEEDS:
        if (r.needs & at.Need_unit_norms) != 0:
            weight_squares = tl.zeros([HEIGHT, 1], tl.float64)
            agc = read_bool(r.settings + at.settings_agc)
            if (r.needs & at.Need_long_units) != 0:
                squares = known_of(r, span, at.unit_squares)
                weight_squares = known_of(r, span, at.unit_weight_squares)
            else:
                squares = square_tiles(ACCESS, r.grad, r.stages.unscale, mean, span)
                if agc:
                    weight_squares = square_weights(ACCESS, NEEDS, r.weights, span, T)
            norm = tl.sqrt(squares)
            if agc:
                radius = read(r.settings + at.settings_radius, tl.float64)
                factor = agc_factor(radius, tl.sqrt(weight_squares), norm).to(T)
            else:
                factor = perturb_factor(r.settings, norm).to(T)
    return mean, factor, squares


@triton.jit
def late_mean_tiles(RULE: tl.constexpr, ACCESS: tl.constexpr, NEEDS: tl.constexpr, r, span, mean, factor):
    """The mean of what is centred late of each unit, (units, 1) in float64. Nothing is written."""
    T: tl.constexpr = mean.dtype
    HEIGHT: tl.constexpr = span.inside.shape[0]
    WIDTH: tl.constexpr = span.columns.shape[1]
    total = tl.zeros([HEIGHT, WIDTH], tl.float64)
    around = tl.zeros([HEIGHT, 1], T)
    for k in range(0, span.length, WIDTH):
        tile = tile_at(span, k)
        g, p, z = load_tile(ACCESS, NEEDS, r, tile, T)
        x = transformed(NEEDS, r.stages, mean, factor, g, z, p)
        if (r.needs & at.Need_centre_decayed) == 0:
            s0, s1, s2, s3 = load_states(RULE, ACCESS, r.states, tile, T)
            x, s0, s1, s2, s3 = direction(RULE, x, p, s0, s1, s2, s3, r.coefficients)
        if k == 0:
            around = anchor(first_of(x, span.columns))
        total += tl.where(tile.mask, x - around, 0.0).to(tl.float64)
    return around.to(tl.float64) + tl.sum(total, axis=1)[:, None] / span.length


@triton.jit
def late_mean_of(RULE: tl.constexpr, ACCESS: tl.constexpr, NEEDS: tl.constexpr, r, span, mean, factor):
    """The mean that late centring takes off each unit; 0 where it does not."""
    late_mean = tl.zeros(mean.shape, mean.dtype)
    if at.Need_centre_late & NEEDS:
        if (r.needs & at.Need_centre_late) != 0:
            if (r.needs & at.Need_split) != 0:
                late_mean = known_of(r, span, at.unit_direction).to(mean.dtype)
            else:
                late_mean = late_mean_tiles(RULE, ACCESS, NEEDS, r, span, mean, factor).to(mean.dtype)
    return late_mean


@triton.jit
def step_tiles(RULE: tl.constexpr, ACCESS: tl.constexpr, NEEDS: tl.constexpr, r, span, mean, factor, late_mean):
    """Take the step of each unit of a span."""
    T: tl.constexpr = mean.dtype
    WIDTH: tl.constexpr = span.columns.shape[1]
    for k in range(0, span.length, WIDTH):
        tile = tile_at(span, k)
        g, p, z = load_tile(ACCESS, NEEDS, r, tile, T)
        s0, s1, s2, s3 = load_states(RULE, ACCESS, r.states, tile, T)
        x = transformed(NEEDS, r.stages, mean, factor, g, z, p)
        x, s0, s1, s2, s3 = centred_direction(RULE, NEEDS, r, x, p, s0, s1, s2, s3, late_mean)
        p = p * r.shrink - r.step_size * x
        store_state(RULE, ACCESS, r.states, 0, tile, s0)
        store_state(RULE, ACCESS, r.states, 1, tile, s1)
        store_state(RULE, ACCESS, r.states, 2, tile, s2)
        store_state(RULE, ACCESS, r.states, 3, tile, s3)
        store_weights(ACCESS, NEEDS, r.weights, r.grad, r.draws, tile, p)


@triton.jit
def trust_tiles(
    RULE: tl.constexpr, ACCESS: tl.constexpr, NEEDS: tl.constexpr, r, span, mean, factor, late_mean,
    squares, weight_squares,
):  # fmt: skip
    """Add a span's to the sums of squares for a trust ratio: of the weights, and of the direction with decay or the gradient."""
    T: tl.constexpr = mean.dtype
    BY_UPDATE: tl.constexpr = (at.rules_trust_update >> RULE) & 1
    WIDTH: tl.constexpr = span.columns.shape[1]
    weight_decay = read(r.settings + at.settings_weight_decay, tl.float64).to(T)
    for k in range(0, span.length, WIDTH):
        tile = tile_at(span, k)
        g, p, z = load_tile(ACCESS, NEEDS, r, tile, T)
        x = transformed(NEEDS, r.stages, mean, factor, g, z, p)
        if BY_UPDATE:
            s0, s1, s2, s3 = load_states(RULE, ACCESS, r.states, tile, T)
            x, s0, s1, s2, s3 = centred_direction(RULE, NEEDS, r, x, p, s0, s1, s2, s3, late_mean)
            x = x + weight_decay * p
        elif at.Need_centre_late & NEEDS:
            x = x - tl.where((r.needs & at.Need_centre_decayed) != 0, late_mean, 0.0)
        x = tl.where(tile.mask, x, 0.0).to(tl.float64)
        p = tl.where(tile.mask, p, 0.0).to(tl.float64)
        squares += x * x
        weight_squares += p * p
    return squares, weight_squares


# ---- a chunk


@triton.jit
def step_units(RULE: tl.constexpr, ACCESS: tl.constexpr, NEEDS: tl.constexpr, r, walk, wide_factor, slot):
    """Take the step of a chunk. Leave its sum of squares behind where norms are by unit, unless the stats launch did."""
    HEIGHT: tl.constexpr = walk.ranks.shape[0]
    total = tl.zeros([HEIGHT, 1], tl.float64)
    for unit in range(0, walk.units, HEIGHT):
        span = span_at(walk, unit)
        mean, factor, squares = unit_statistics(ACCESS, NEEDS, r, span, wide_factor)
        total += tl.where(span.inside, squares, 0.0)
        late_mean = late_mean_of(RULE, ACCESS, NEEDS, r, span, mean, factor)
        step_tiles(RULE, ACCESS, NEEDS, r, span, mean, factor, late_mean)
    if at.Need_unit_norms & NEEDS:
        if (r.needs & (at.Need_unit_norms | at.Need_measured)) == at.Need_unit_norms:
            write(slot + at.sums_squares, tl.sum(tl.sum(total, axis=1), axis=0), tl.float64)


@triton.jit
def late_mean_units(RULE: tl.constexpr, ACCESS: tl.constexpr, NEEDS: tl.constexpr, r, walk, wide_factor, slot):
    """Leave behind the mean of what is centred late: the mean of the means of units of one length, around the first's."""
    HEIGHT: tl.constexpr = walk.ranks.shape[0]
    total = tl.zeros([HEIGHT, 1], tl.float64)
    first_mean = tl.zeros([1, 1], tl.float64)
    for unit in range(0, walk.units, HEIGHT):
        span = span_at(walk, unit)
        mean, factor, _ = unit_statistics(ACCESS, NEEDS, r, span, wide_factor)
        late_mean = late_mean_tiles(RULE, ACCESS, NEEDS, r, span, mean, factor)
        if unit == 0:
            first_mean = anchor(tl.sum(tl.where(walk.ranks == 0, late_mean, 0.0), axis=0)[None, :])
        total += tl.where(span.inside, late_mean - first_mean, 0.0)
    of_chunk = tl.sum(tl.sum(first_mean, axis=1), axis=0) + tl.sum(tl.sum(total, axis=1), axis=0) / walk.units
    write(slot + at.sums_sum, of_chunk, tl.float64)


@triton.jit
def trust_units(RULE: tl.constexpr, ACCESS: tl.constexpr, NEEDS: tl.constexpr, r, walk, wide_factor, slot):
    """Leave behind the sums of squares for a trust ratio of a chunk."""
    HEIGHT: tl.constexpr = walk.ranks.shape[0]
    WIDTH: tl.constexpr = walk.columns.shape[1]
    squares = tl.zeros([HEIGHT, WIDTH], tl.float64)
    weight_squares = tl.zeros([HEIGHT, WIDTH], tl.float64)
    for unit in range(0, walk.units, HEIGHT):
        span = span_at(walk, unit)
        mean, factor, _ = unit_statistics(ACCESS, NEEDS, r, span, wide_factor)
        late_mean = late_mean_of(RULE, ACCESS, NEEDS, r, span, mean, factor)
        squares, weight_squares = trust_tiles(
            RULE, ACCESS, NEEDS, r, span, mean, factor, late_mean, squares, weight_squares
        )
    write(slot + at.sums_sum, tl.sum(tl.sum(squares, axis=1), axis=0), tl.float64)
    write(slot + at.sums_weight_squares, tl.sum(tl.sum(weight_squares, axis=1), axis=0), tl.float64)


@triton.jit
def numbers_of(RULE: tl.constexpr, PHASE: tl.constexpr, row, settings, taken, T: tl.constexpr):
    """(shrink, step size, the rule's numbers) of a row."""
    mu_product = tl.full([], 1.0, tl.float64)
    ratio = tl.full([], 1.0, tl.float64)
    if (at.rules_mu_product >> RULE) & 1:
        mu_product = mu_product_of(row, settings, taken + 1.0)
    if ((at.rules_trust_gradient | at.rules_trust_update) >> RULE) & 1:
        # The bits of a row that took the norms of its trust ratio in a phase before this one.
        BEFORE: tl.constexpr = (at.Need_early_trust | at.Need_late_trust) & ((1 << PHASE) - 1)
        ratio = trust_of(RULE, row, settings, (needs_of(row) & BEFORE) != 0)
    first = read_bool(row + at.row_first)
    return coefficients(RULE, settings, lr_of(settings), taken + 1.0, first, mu_product, ratio, T)


@triton.jit
def unit_records(job, row, begin):
    """The address of what is known of the unit that a chunk begins with, should its units lie in several chunks."""
    number = read(row + at.row_unit0, tl.int64) + begin // read(row + at.row_unit_length, tl.int64)
    return read(job + at.job_units, tl.int64) + number * at.Unit


@triton.jit
def step_chunk(
    task, unscale, wide_factor, KIND: tl.constexpr, NEEDS: tl.constexpr, PHASE: tl.constexpr, SIZE: tl.constexpr
):
    """What a launch does with a chunk: see PHASE."""
    RULE: tl.constexpr = KIND // (ACCESSES * TILES)
    ACCESS: tl.constexpr = KIND // TILES % ACCESSES
    TILE: tl.constexpr = KIND - KIND // TILES * TILES
    T: tl.constexpr = tl.float64 if ACCESS == at.DType_float64 or ACCESS == ANY_WIDE else tl.float32
    row = task.row
    settings = task.settings
    walk = walk_of(ACCESS, TILE, SIZE, task.chunk, row)
    taken = steps_taken(row)
    shrink, step_size, numbers = numbers_of(RULE, PHASE, row, settings, taken, T)
    r = RowStep(
        Operand(row + at.row_grad, task.grad, read(row + (at.row_grad + at.operand_dtype), tl.int8)),
        weights_of(NEEDS, row, settings, T),
        (state_of(RULE, row, 0), state_of(RULE, row, 1), state_of(RULE, row, 2), state_of(RULE, row, 3)),
        Draws(
            read(settings + at.settings_seed, tl.uint64), read(row + at.row_param_number, tl.int32), taken.to(tl.int64)
        ),
        stages_of(NEEDS, settings, unscale, taken, T),
        shrink,
        step_size,
        numbers,
        settings,
        unit_records(task.job, row, walk.begin),
        needs_of(row),
    )
    slot = read(task.job + at.job_sums, tl.int64) + task.index * at.Sums
    if PHASE == at.Phase_step:
        step_units(RULE, ACCESS, NEEDS, r, walk, wide_factor, slot)
    elif PHASE == at.Phase_late_means:
        late_mean_units(RULE, ACCESS, NEEDS, r, walk, wide_factor, slot)
    else:
        trust_units(RULE, ACCESS, NEEDS, r, walk, wide_factor, slot)
