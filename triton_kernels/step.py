"""One chunk's way through a launch of ``apply``: the step, or the sums that the step's numbers are made of."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import ACCESSES, ANY, ANY_WIDE, load, read, read_bool, store
from .chunk import (
    TILES,
    centred_at_gradient,
    elements_of,
    first_of,
    mean_tiles,
    quads_of,
    square_tiles,
    tile_at,
    units_of,
    write,
)
from .counts import lr_of, next_mu_product, steps_taken, trust_of
from .noise import draw, draw_quads
from .rules import coefficients, direction
from .transforms import agc_factor, anchor, noise_sigma, perturb_factor, transformed
from .weights import kept_of, load_kept, riders_of, square_kept, store_weights

# What a launch is for: the step; sums of what is centred late, where its mean takes several chunks; or norms for trust ratios, of
# rows that are weighed before what is rehearsed or after it.
STEP = tl.constexpr(0)
REHEARSE = tl.constexpr(1)
WEIGH_FIRST = tl.constexpr(2)
WEIGH = tl.constexpr(3)
PHASES = {"step": 0, "rehearse": 1, "weigh_first": 2, "weigh": 3}


# ---- a tile


@triton.jit
def states_of(row, STATES: tl.constexpr):
    """The addresses of the state tensors; 0 for those that the rule does not have."""
    none = tl.full([], 0, tl.int64)
    s0 = state_of(row, 0) if STATES > 0 else none
    s1 = state_of(row, 1) if STATES > 1 else none
    s2 = state_of(row, 2) if STATES > 2 else none
    s3 = state_of(row, 3) if STATES > 3 else none
    return s0, s1, s2, s3


@triton.jit
def state_of(row, N: tl.constexpr):
    return read(row + (at.row_state + N * at.Operand + at.operand_data), tl.int64)


@triton.jit
def load_state(
    ACCESS: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, row, at_states, start, local, mask, T: tl.constexpr
):
    """State tensor N; zeros where the rule has none."""
    if N < STATES:
        return load(ACCESS, row + (at.row_state + N * at.Operand), at_states[N], start, local, mask, T)
    else:
        return tl.zeros(mask.shape, T)


@triton.jit
def load_states(ACCESS: tl.constexpr, STATES: tl.constexpr, row, at_states, start, local, mask, T: tl.constexpr):
    s0 = load_state(ACCESS, 0, STATES, row, at_states, start, local, mask, T)
    s1 = load_state(ACCESS, 1, STATES, row, at_states, start, local, mask, T)
    s2 = load_state(ACCESS, 2, STATES, row, at_states, start, local, mask, T)
    s3 = load_state(ACCESS, 3, STATES, row, at_states, start, local, mask, T)
    return s0, s1, s2, s3


@triton.jit
def store_state(ACCESS: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, row, at_states, start, local, x, mask):
    if N < STATES:
        store(ACCESS, row + (at.row_state + N * at.Operand), at_states[N], start, local, x, mask)


@triton.jit
def noise_tile(
    ACCESS: tl.constexpr, seed, parameter, step, start, length, k,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Normal values for a tile. Rows whose packs hold four elements or more begin at a quad's first: each is drawn once."""
    if ACCESS != at.DType_float64 and ACCESS < ANY:
        return draw_quads(seed, quads_of(start, length, k, HEIGHT, WIDTH), parameter, step).to(T)
    else:
        return draw(seed, elements_of(start, length, k, HEIGHT, WIDTH), parameter, step).to(T)


@triton.jit
def load_tile(
    ACCESS: tl.constexpr, NOISE: tl.constexpr, RIDERS: tl.constexpr, row, grad, kept, seed, parameter, step,
    start, stride, inside, length, k, WIDTH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """(places, mask, gradient, weights, noise) of a tile, column ``k`` of the units first."""
    HEIGHT: tl.constexpr = inside.shape[0]
    column = k + tl.arange(0, WIDTH)[None, :]
    local = stride + column
    mask = inside & (column < length)
    g = load(ACCESS, row + at.row_grad, grad, start, local, mask, T)
    p = load_kept(ACCESS, RIDERS, row, kept, start, local, mask, T)
    z = tl.zeros([HEIGHT, WIDTH], T)
    if NOISE:
        z = noise_tile(ACCESS, seed, parameter, step, start, length, k, HEIGHT, WIDTH, T)
    return local, mask, g, p, z


@triton.jit
def known_of(job, row, begin, unit, length, inside, FIELD: tl.constexpr):
    """What the stats launch found of units that lie in several chunks, or are centred as a whole."""
    units = read(job + at.job_units, tl.int64) + read(row + at.row_unit0, tl.int64) * at.Unit
    number = begin // read(row + at.row_unit_length, tl.int64) + unit.to(tl.int64)
    return tl.load((units + number * at.Unit + FIELD).to(tl.pointer_type(tl.float64)), mask=inside, other=0.0)


# ---- a chunk


@triton.jit
def weighed_by(row, PHASE: tl.constexpr):
    """Whether the norms of a row's trust ratio are known in this launch."""
    if PHASE == STEP:
        return read_bool(row + at.row_weighed_first) | read_bool(row + at.row_weighed)
    elif PHASE == REHEARSE:
        return read_bool(row + at.row_weighed_first)
    else:
        return tl.full([], 0, tl.int1)


@triton.jit
def numbers_of(RULE: tl.constexpr, row, settings, taken, PHASE: tl.constexpr, T: tl.constexpr):
    """(shrink, step size, the rule's numbers) of a row."""
    product = tl.full([], 1.0, tl.float64)
    ratio = tl.full([], 1.0, tl.float64)
    if RULE == at.Rule_nadam:
        product = next_mu_product(row, settings, taken + 1.0)
    if ((at.rules_trust_gradient | at.rules_trust_update) >> RULE) & 1:
        ratio = trust_of(RULE, row, settings, weighed_by(row, PHASE))
    return coefficients(RULE, settings, lr_of(settings), taken + 1.0, read_bool(row + at.row_first), product, ratio, T)


@triton.jit
def step_chunk(
    job, chunk, index, row, settings, grad, unscale64, factor64,
    KIND: tl.constexpr, STATES_OF: tl.constexpr, SIZE: tl.constexpr,
    CENTRE: tl.constexpr, UNIT_NORMS: tl.constexpr, LATE: tl.constexpr, NOISE: tl.constexpr, RIDERS: tl.constexpr,
    PHASE: tl.constexpr,
):  # fmt: skip
    """The step; or, of what the rule makes of a unit, only the sum of its elements or of their squares."""
    RULE: tl.constexpr = KIND // (ACCESSES * TILES)
    ACCESS: tl.constexpr = KIND // TILES % ACCESSES
    TILE: tl.constexpr = KIND - KIND // TILES * TILES
    STATES: tl.constexpr = STATES_OF // 16**RULE % 16
    READ: tl.constexpr = 0 if (at.rules_unread >> RULE) & 1 else STATES
    BY_UPDATE: tl.constexpr = (at.rules_trust_update >> RULE) & 1
    T: tl.constexpr = tl.float64 if ACCESS == at.DType_float64 or ACCESS == ANY_WIDE else tl.float32
    ranks, columns = tile_at(ACCESS, TILE, SIZE)
    HEIGHT: tl.constexpr = ranks.shape[0]
    WIDTH: tl.constexpr = columns.shape[1]
    begin, units, length = units_of(ACCESS, TILE, chunk, row)

    taken = steps_taken(row)
    shrink, step, c = numbers_of(RULE, row, settings, taken, PHASE, T)
    unscale = unscale64.to(T)
    hi = read(settings + at.settings_clip_value, tl.float64).to(T)
    sign = read(settings + at.settings_sign, tl.float64).to(T)
    decoupled = read_bool(settings + at.settings_decoupled)
    whole_decay = read(settings + at.settings_weight_decay, tl.float64).to(T)
    decay = tl.where(decoupled, 0.0, whole_decay).to(T)
    sigma = tl.full([], 0.0, T)
    if NOISE:
        variance = read(settings + at.settings_noise, tl.float64)
        sigma = noise_sigma(variance, read(settings + at.settings_noise_decay, tl.float64), taken).to(T)

    seed = read(settings + at.settings_seed, tl.uint64)
    parameter = read(row + at.row_param_number, tl.int32)
    number = taken.to(tl.int64)
    # Looked up before the loops: after a store the compiler would have to look again.
    param = read(row + at.row_param + at.operand_data, tl.int64)
    kept = kept_of(row, RIDERS)
    riders = riders_of(row, settings, RIDERS, T)
    at_states = states_of(row, STATES)
    stride = ranks * length
    centred = centred_at_gradient(row, settings)
    late = read_bool(row + at.row_centre) & (centred == 0)
    decayed = read(settings + at.settings_centralize_at, tl.int8) == at.Centre_decayed
    split = read_bool(row + at.row_split)
    by_unit = read(settings + at.settings_norm_scope, tl.int8) == at.NormScope_unit
    far = split & (read(row + at.row_unit_length, tl.int64) > at.block_unit)
    total = tl.zeros([HEIGHT, 1], tl.float64)
    squared = tl.zeros([HEIGHT, WIDTH], tl.float64)
    weights_squared = tl.zeros([HEIGHT, WIDTH], tl.float64)
    first_mean = tl.zeros([1, 1], tl.float64)

    for unit in range(0, units, HEIGHT):
        start = begin + unit * length.to(tl.int64)
        rank = unit + ranks
        inside = rank < units

        # What the units' own statistics make of the gradient.
        mean = tl.zeros([HEIGHT, 1], T)
        factor = tl.zeros([HEIGHT, 1], T) + factor64.to(T)
        if CENTRE:
            if centred:
                if split:
                    mean = known_of(job, row, begin, rank, length, inside, at.unit_mean).to(T)
                else:
                    middle = mean_tiles(
                        ACCESS, row + at.row_grad, grad, unscale, start, stride, inside, length, WIDTH, T
                    )
                    mean = middle.to(T)
        if UNIT_NORMS:
            if by_unit:
                squares = tl.zeros([HEIGHT, 1], tl.float64)
                weights = tl.zeros([HEIGHT, 1], tl.float64)
                agc = read_bool(settings + at.settings_agc)
                if far:
                    squares = known_of(job, row, begin, rank, length, inside, at.unit_squares)
                    weights = known_of(job, row, begin, rank, length, inside, at.unit_weight_squares)
                else:
                    squares = square_tiles(
                        ACCESS, row + at.row_grad, grad, unscale, mean, start, stride, inside, length, WIDTH, T
                    )
                    if agc:
                        weights = square_kept(ACCESS, RIDERS, row, kept, start, stride, inside, length, WIDTH, T)
                norm = tl.sqrt(squares)
                if agc:
                    radius = read(settings + at.settings_radius, tl.float64)
                    factor = agc_factor(radius, tl.sqrt(weights), norm).to(T)
                else:
                    factor = perturb_factor(settings, norm).to(T)
                if PHASE == STEP:
                    total += tl.where(inside, squares, 0.0)

        # What is centred late is worked out once for its mean, and again for the step: nothing is written in between.
        late_mean = tl.zeros([HEIGHT, 1], T)
        if LATE:
            if late:
                if split and PHASE != REHEARSE:
                    late_mean = known_of(job, row, begin, rank, length, inside, at.unit_direction).to(T)
                else:
                    sum = tl.zeros([HEIGHT, WIDTH], tl.float64)
                    around = tl.zeros([HEIGHT, 1], T)
                    for k in range(0, length, WIDTH):
                        local, mask, g, p, z = load_tile(
                            ACCESS, NOISE, RIDERS, row, grad, kept, seed, parameter, number,
                            start, stride, inside, length, k, WIDTH, T,
                        )  # fmt: skip
                        x = transformed(g, z, p, unscale, mean, factor, hi, sigma, sign, decay, NOISE)
                        if not decayed:
                            s0, s1, s2, s3 = load_states(ACCESS, READ, row, at_states, start, local, mask, T)
                            x, s0, s1, s2, s3 = direction(RULE, x, p, s0, s1, s2, s3, c)
                        if k == 0:
                            around = anchor(first_of(x, tl.arange(0, WIDTH)[None, :]))
                        sum += tl.where(mask, x - around, 0.0).to(tl.float64)
                    of_late = around.to(tl.float64) + tl.sum(sum, axis=1)[:, None] / length
                    if PHASE == REHEARSE:  # units of one length: their means' mean, around the first's
                        if unit == 0:
                            first_mean = anchor(tl.sum(tl.where(ranks == 0, of_late, 0.0), axis=0)[None, :])
                        total += tl.where(inside, of_late - first_mean, 0.0)
                    late_mean = of_late.to(T)

        if PHASE != REHEARSE:
            for k in range(0, length, WIDTH):
                local, mask, g, p, z = load_tile(
                    ACCESS, NOISE, RIDERS, row, grad, kept, seed, parameter, number,
                    start, stride, inside, length, k, WIDTH, T,
                )  # fmt: skip
                if PHASE == STEP or BY_UPDATE:
                    s0, s1, s2, s3 = load_states(ACCESS, READ, row, at_states, start, local, mask, T)
                x = transformed(g, z, p, unscale, mean, factor, hi, sigma, sign, decay, NOISE)
                if LATE:
                    x = x - tl.where(decayed, late_mean, 0.0)
                if PHASE == STEP or BY_UPDATE:
                    x, s0, s1, s2, s3 = direction(RULE, x, p, s0, s1, s2, s3, c)
                    if LATE:
                        x = x - tl.where(decayed, 0.0, late_mean)
                if PHASE == STEP:
                    p = p * shrink - step * x
                    store_state(ACCESS, 0, STATES, row, at_states, start, local, s0, mask)
                    store_state(ACCESS, 1, STATES, row, at_states, start, local, s1, mask)
                    store_state(ACCESS, 2, STATES, row, at_states, start, local, s2, mask)
                    store_state(ACCESS, 3, STATES, row, at_states, start, local, s3, mask)
                    store_weights(
                        ACCESS, RIDERS, row, param, grad, kept, riders, p, seed, parameter, number,
                        start, length, k, local, mask, HEIGHT, WIDTH, T,
                    )  # fmt: skip
                else:
                    if BY_UPDATE:
                        x = x + whole_decay * p
                    x = tl.where(mask, x, 0.0).to(tl.float64)
                    p = tl.where(mask, p, 0.0).to(tl.float64)
                    squared += x * x
                    weights_squared += p * p

    slot = read(job + at.job_sums, tl.int64) + index * at.Sums
    if PHASE == STEP:
        if UNIT_NORMS:
            if by_unit & (read_bool(row + at.row_measured) == 0):
                write(slot + at.sums_squares, tl.sum(tl.sum(total, axis=1), axis=0), tl.float64)
    elif PHASE == REHEARSE:
        of_chunk = tl.sum(tl.sum(first_mean, axis=1), axis=0) + tl.sum(tl.sum(total, axis=1), axis=0) / units
        write(slot + at.sums_sum, of_chunk, tl.float64)
    else:
        write(slot + at.sums_sum, tl.sum(tl.sum(squared, axis=1), axis=0), tl.float64)
        write(slot + at.sums_weight_squares, tl.sum(tl.sum(weights_squared, axis=1), axis=0), tl.float64)
