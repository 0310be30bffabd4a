"""The launch that takes the step: each gradient is transformed, the rule applied, and parameter and state written, in one pass.

What a table does not need is left out when the kernel is compiled: see ``apply``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import ACCESSES, ANY, ANY_WIDE, hyper_of, load, read, read_bool, rows_of, store
from .chunk import (
    BLOCK,
    TILES,
    access_of,
    centred_at_gradient,
    chunk_at,
    grad_of,
    is_last,
    share,
    square_tiles,
    sum_chunks,
    sum_tiles,
    tile_of,
    unscale_of,
    write,
)
from .noise import draw, draw_quads
from .rules import coefficients, direction
from .transforms import agc_factor, noise_sigma, perturb_factor, transformed

# ---- what all chunks of a launch share

GLOBAL = tl.constexpr(0)
SPOILT = tl.constexpr(1)
EVERY = tl.constexpr(2)


@triton.jit
def sum_rows(job, first, end, OF: tl.constexpr):
    """The sum of squares over rows of global scope or over every row; or how many rows forbid the step."""
    total = tl.zeros([BLOCK], tl.float64)
    rows = rows_of(job)
    hypers = read(job + at.job_hypers, tl.int64)
    squares = read(job + at.job_squares, tl.int64)
    for base in range(first, end, BLOCK):
        i = (base + tl.arange(0, BLOCK)).to(tl.int64)
        mask = i < end
        x = tl.load((squares + i * 8).to(tl.pointer_type(tl.float64)), mask=mask, other=0.0)
        group = tl.load((rows + i * at.DeviceRow + at.row_group).to(tl.pointer_type(tl.int32)), mask=mask, other=0)
        hyper = hypers + group.to(tl.int64) * at.DeviceHyper
        if OF == GLOBAL:
            scope = tl.load((hyper + at.hyper_scope).to(tl.pointer_type(tl.int8)), mask=mask, other=0)
            x = tl.where(scope == at.Scope_global, x, 0.0)
        if OF == SPOILT:
            skips = tl.load((hyper + at.hyper_skip_nonfinite).to(tl.pointer_type(tl.int8)), mask=mask, other=0)
            x = tl.where((skips != 0) & (x - x != 0.0), tl.full([], 1.0, tl.float64), 0.0)
        total += x
    return tl.sum(total, axis=0)


@triton.jit
def wide_factor(job, row, number, hyper, global_squares):
    """s(n) of a norm that is wider than a unit; 1 where there is none."""
    scope = read(hyper + at.hyper_scope, tl.int8)
    squares = global_squares
    if scope == at.Scope_group:
        squares = sum_rows(job, read(hyper + at.hyper_row0, tl.int32), read(hyper + at.hyper_row1, tl.int32), EVERY)
    if scope == at.Scope_param:
        squares = read(read(job + at.job_squares, tl.int64) + number.to(tl.int64) * 8, tl.float64)
    factor = perturb_factor(hyper, tl.sqrt(squares))
    wide = (scope == at.Scope_global) | (scope == at.Scope_group) | (scope == at.Scope_param)
    return tl.where(wide, factor, 1.0)


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
def steps_taken(row):
    zero = tl.full([], 0.0, tl.float64)
    return scalar_at(read(row + at.row_step, tl.int64), read(row + at.row_step_dtype, tl.int8), zero)


@triton.jit
def lr_of(hyper):
    lr = read(hyper + at.hyper_lr, tl.float64)
    return scalar_at(read(hyper + at.hyper_lr_at, tl.int64), read(hyper + at.hyper_lr_dtype, tl.int8), lr)


@triton.jit
def count_step(row):
    tl.store((row + at.row_first).to(tl.pointer_type(tl.int8)), 0)
    at_step = read(row + at.row_step, tl.int64)
    if at_step != 0:
        if read(row + at.row_step_dtype, tl.int8) == at.DType_float64:
            write(at_step, read(at_step, tl.float64) + 1.0, tl.float64)
        else:
            write(at_step, read(at_step, tl.float32) + 1.0, tl.float32)


@triton.jit
def count_empty_rows(job):
    """Rows without elements have no last chunk, but take the step."""
    for number in range(read(job + at.job_row_count, tl.int32)):
        row = rows_of(job) + number * at.DeviceRow
        if read(row + at.row_chunk0, tl.int32) == read(row + at.row_chunk1, tl.int32):
            count_step(row)


# ---- a tile


@triton.jit
def state_of(row, N: tl.constexpr, STATES: tl.constexpr):
    """The address of state tensor N."""
    if N < STATES:
        return read(row + (at.row_state + N * at.Operand + at.operand_data), tl.int64)
    else:
        return tl.full([], 0, tl.int64)


@triton.jit
def load_state(
    ACCESS: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, row, data, start, local, mask, like, T: tl.constexpr
):
    """State tensor N; zeros where the rule has none."""
    if N < STATES:
        return load(ACCESS, row + (at.row_state + N * at.Operand), data, start, local, mask, T)
    else:
        return tl.zeros_like(like)


@triton.jit
def store_state(ACCESS: tl.constexpr, N: tl.constexpr, STATES: tl.constexpr, row, data, start, local, x, mask):
    if N < STATES:
        store(ACCESS, row + (at.row_state + N * at.Operand), data, start, local, x, mask)


@triton.jit
def noise_tile(
    ACCESS: tl.constexpr,
    seed,
    parameter,
    step,
    start,
    length,
    k,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    T: tl.constexpr,
):
    """Normal values for a tile. Rows whose packs hold four elements or more begin at a quad's first: each is drawn once."""
    if ACCESS != at.DType_float64 and ACCESS < ANY:
        unit = tl.arange(0, HEIGHT)[:, None] * (length // 4) + tl.arange(0, WIDTH // 4)[None, :]
        return draw_quads(seed, start // 4 + k // 4 + unit.to(tl.int64), parameter, step).to(T)
    else:
        unit = tl.arange(0, HEIGHT)[:, None] * length + tl.arange(0, WIDTH)[None, :]
        return draw(seed, start + k + unit.to(tl.int64), parameter, step).to(T)


@triton.jit
def known_of(job, row, begin, unit, length, inside, FIELD: tl.constexpr):
    """What the stats launch found of units that lie in several chunks, or are centred as a whole."""
    units = read(job + at.job_units, tl.int64) + read(row + at.row_unit0, tl.int64) * at.Unit
    number = begin // read(row + at.row_length, tl.int64) + unit.to(tl.int64)
    return tl.load((units + number * at.Unit + FIELD).to(tl.pointer_type(tl.float64)), mask=inside, other=0.0)


# ---- a chunk


@triton.jit
def step_chunk(
    job, chunk, index, row, hyper, grad, unscale64, factor64,
    KIND: tl.constexpr, STATES_OF: tl.constexpr, SIZE: tl.constexpr,
    CENTRE: tl.constexpr, UNIT_NORMS: tl.constexpr, LATE: tl.constexpr, NOISE: tl.constexpr, REHEARSAL: tl.constexpr,
):  # fmt: skip
    """The step; or, for the mean of what the rule makes of a unit that takes several chunks, only that sum."""
    RULE: tl.constexpr = KIND // (ACCESSES * TILES)
    ACCESS: tl.constexpr = KIND // TILES % ACCESSES
    TILE: tl.constexpr = KIND - KIND // TILES * TILES
    STATES: tl.constexpr = STATES_OF // 16**RULE % 16
    T: tl.constexpr = tl.float64 if ACCESS == at.DType_float64 or ACCESS == ANY_WIDE else tl.float32
    PACK: tl.constexpr = (
        4 if ACCESS == at.DType_float32 else 2 if ACCESS == at.DType_float64 else 8 if ACCESS < ANY else 1
    )
    # One at a time there are addresses to hold for each element: smaller tiles keep the launch's registers few.
    SPAN: tl.constexpr = SIZE if ACCESS < ANY else SIZE // 4
    WIDTH: tl.constexpr = 8 if TILE == 1 else 32 if TILE == 2 else 256 if TILE == 3 else SPAN
    HEIGHT: tl.constexpr = SPAN // WIDTH

    # Whole packs, and said so, so that the compiler can see that accesses of 16 bytes fit.
    begin = read(chunk + at.chunk_begin, tl.int64) // PACK * PACK
    count = read(chunk + at.chunk_count, tl.int32)
    length = count // PACK * PACK
    if TILE > 0:
        length = read(row + at.row_length, tl.int64).to(tl.int32) // PACK * PACK
    units = count // length

    taken = steps_taken(row)
    lr = lr_of(hyper)
    shrink, step, c = coefficients(RULE, hyper, lr, taken + 1.0, read_bool(row + at.row_first), T)
    unscale = unscale64.to(T)
    hi = read(hyper + at.hyper_clip_value, tl.float64).to(T)
    sign = read(hyper + at.hyper_sign, tl.float64).to(T)
    decoupled = read_bool(hyper + at.hyper_decoupled)
    decay = tl.where(decoupled, 0.0, read(hyper + at.hyper_weight_decay, tl.float64)).to(T)
    sigma = tl.full([], 0.0, T)
    if NOISE:
        variance = read(hyper + at.hyper_noise, tl.float64)
        sigma = noise_sigma(variance, read(hyper + at.hyper_noise_decay, tl.float64), taken).to(T)

    seed = read(hyper + at.hyper_seed, tl.uint64)
    parameter = read(row + at.row_parameter, tl.int32)
    # Looked up before the loops: after a store the compiler would have to look again.
    param = read(row + at.row_param + at.operand_data, tl.int64)
    data0 = state_of(row, 0, STATES)
    data1 = state_of(row, 1, STATES)
    data2 = state_of(row, 2, STATES)
    stride = tl.arange(0, HEIGHT)[:, None] * length
    centred = centred_at_gradient(row, hyper)
    late = read_bool(row + at.row_centre) & (centred == 0)
    decayed = read(hyper + at.hyper_centralize_at, tl.int8) == at.Centre_decayed
    split = read_bool(row + at.row_split)
    by_unit = read(hyper + at.hyper_scope, tl.int8) == at.Scope_unit
    far = split & (read(row + at.row_length, tl.int64) > at.block_unit)
    total = tl.zeros([HEIGHT, 1], tl.float64)

    for unit in range(0, units, HEIGHT):
        start = begin + unit * length.to(tl.int64)
        rank = unit + tl.arange(0, HEIGHT)[:, None]
        inside = rank < units

        # What the units' own statistics make of the gradient.
        mean = tl.zeros([HEIGHT, 1], T)
        factor = tl.zeros([HEIGHT, 1], T) + factor64.to(T)
        if CENTRE:
            if centred:
                if split:
                    mean = known_of(job, row, begin, rank, length, inside, at.unit_mean).to(T)
                else:
                    sum = sum_tiles(ACCESS, row + at.row_grad, grad, unscale, start, stride, inside, length, WIDTH, T)
                    mean = (sum / length).to(T)
        if UNIT_NORMS:
            if by_unit:
                squares = tl.zeros([HEIGHT, 1], tl.float64)
                weights = tl.zeros([HEIGHT, 1], tl.float64)
                agc = read_bool(hyper + at.hyper_agc)
                if far:
                    squares = known_of(job, row, begin, rank, length, inside, at.unit_squares)
                    weights = known_of(job, row, begin, rank, length, inside, at.unit_weight_squares)
                else:
                    squares = square_tiles(
                        ACCESS, row + at.row_grad, grad, unscale, mean, start, stride, inside, length, WIDTH, T
                    )
                    if agc:
                        one = tl.full([], 1.0, T)
                        zero = tl.full([], 0.0, T)
                        weights = square_tiles(
                            ACCESS, row + at.row_param, param, one, zero, start, stride, inside, length, WIDTH, T
                        )
                norm = tl.sqrt(squares)
                if agc:
                    radius = read(hyper + at.hyper_radius, tl.float64)
                    factor = agc_factor(radius, tl.sqrt(weights), norm).to(T)
                else:
                    factor = perturb_factor(hyper, norm).to(T)
                if not REHEARSAL:
                    total += tl.where(inside, squares, 0.0)

        # What is centred late is worked out once for its mean, and again for the step: nothing is written in between.
        late_mean = tl.zeros([HEIGHT, 1], T)
        if LATE:
            if late:
                if split and not REHEARSAL:
                    late_mean = known_of(job, row, begin, rank, length, inside, at.unit_direction).to(T)
                else:
                    sum = tl.zeros([HEIGHT, WIDTH], tl.float64)
                    for k in range(0, length, WIDTH):
                        column = k + tl.arange(0, WIDTH)[None, :]
                        local = stride + column
                        mask = inside & (column < length)
                        g = load(ACCESS, row + at.row_grad, grad, start, local, mask, T)
                        p = load(ACCESS, row + at.row_param, param, start, local, mask, T)
                        z = tl.zeros([HEIGHT, WIDTH], T)
                        if NOISE:
                            z = noise_tile(
                                ACCESS, seed, parameter, taken.to(tl.int64), start, length, k, HEIGHT, WIDTH, T
                            )
                        x = transformed(g, z, p, unscale, mean, factor, hi, sigma, sign, decay, NOISE)
                        if not decayed:
                            s0 = load_state(ACCESS, 0, STATES, row, data0, start, local, mask, g, T)
                            s1 = load_state(ACCESS, 1, STATES, row, data1, start, local, mask, g, T)
                            s2 = load_state(ACCESS, 2, STATES, row, data2, start, local, mask, g, T)
                            x, s0, s1, s2 = direction(RULE, x, s0, s1, s2, c)
                        sum += tl.where(mask, x, 0.0).to(tl.float64)
                    sums = tl.sum(sum, axis=1)[:, None]
                    if REHEARSAL:
                        total += sums
                    late_mean = (sums / length).to(T)

        if not REHEARSAL:
            for k in range(0, length, WIDTH):
                column = k + tl.arange(0, WIDTH)[None, :]
                local = stride + column
                mask = inside & (column < length)
                g = load(ACCESS, row + at.row_grad, grad, start, local, mask, T)
                p = load(ACCESS, row + at.row_param, param, start, local, mask, T)
                s0 = load_state(ACCESS, 0, STATES, row, data0, start, local, mask, g, T)
                s1 = load_state(ACCESS, 1, STATES, row, data1, start, local, mask, g, T)
                s2 = load_state(ACCESS, 2, STATES, row, data2, start, local, mask, g, T)
                z = tl.zeros([HEIGHT, WIDTH], T)
                if NOISE:
                    z = noise_tile(ACCESS, seed, parameter, taken.to(tl.int64), start, length, k, HEIGHT, WIDTH, T)
                x = transformed(g, z, p, unscale, mean, factor, hi, sigma, sign, decay, NOISE)
                if LATE:
                    x = x - tl.where(decayed, late_mean, 0.0)
                x, s0, s1, s2 = direction(RULE, x, s0, s1, s2, c)
                if LATE:
                    x = x - tl.where(decayed, 0.0, late_mean)
                p = p * shrink - step * x
                store_state(ACCESS, 0, STATES, row, data0, start, local, s0, mask)
                store_state(ACCESS, 1, STATES, row, data1, start, local, s1, mask)
                store_state(ACCESS, 2, STATES, row, data2, start, local, s2, mask)
                store(ACCESS, row + at.row_param, param, start, local, p, mask)

    slot = read(job + at.job_sums, tl.int64) + index * at.Sums
    if REHEARSAL:
        write(slot + at.sums_sum, tl.sum(tl.sum(total, axis=1), axis=0), tl.float64)
    elif UNIT_NORMS:
        if by_unit & (read_bool(row + at.row_measured) == 0):
            write(slot + at.sums_squares, tl.sum(tl.sum(total, axis=1), axis=0), tl.float64)


# ---- a row whose last chunk is done


@triton.jit
def finish_rehearsal(job, row):
    """The means of what is centred late, where a unit takes several chunks."""
    chunk0 = read(row + at.row_chunk0, tl.int32)
    chunk1 = read(row + at.row_chunk1, tl.int32)
    length = read(row + at.row_length, tl.int64)
    numel = read(row + at.row_numel, tl.int64)
    known = read(job + at.job_units, tl.int64) + read(row + at.row_unit0, tl.int64) * at.Unit + at.unit_direction
    units = (numel // length).to(tl.int32)
    if read_bool(row + at.row_whole):
        mean = sum_chunks(job, chunk0, chunk1, at.sums_sum) / numel
        for base in range(0, units, BLOCK):
            u = base + tl.arange(0, BLOCK)
            to = (known + u.to(tl.int64) * at.Unit).to(tl.pointer_type(tl.float64))
            tl.store(to, tl.zeros([BLOCK], tl.float64) + mean, mask=u < units)
    else:
        pieces = ((length + (at.chunk_elements - 1)) // at.chunk_elements).to(tl.int32)
        for u in range(units):
            c0 = chunk0 + u * pieces
            write(known + u * at.Unit, sum_chunks(job, c0, c0 + pieces, at.sums_sum) / length, tl.float64)


@triton.jit
def finish(job, row, number, hyper, UNIT_NORMS: tl.constexpr):
    count_step(row)
    if UNIT_NORMS:
        by_unit = read(hyper + at.hyper_scope, tl.int8) == at.Scope_unit
        if by_unit & (read_bool(row + at.row_measured) == 0):
            squares = sum_chunks(
                job, read(row + at.row_chunk0, tl.int32), read(row + at.row_chunk1, tl.int32), at.sums_squares
            )
            write(read(job + at.job_squares, tl.int64) + number.to(tl.int64) * 8, squares, tl.float64)


# ---- the launch


@triton.jit
def apply(
    job, grad_scale, found_inf,
    VARIANTS: tl.constexpr, RULES: tl.constexpr, STATES: tl.constexpr,
    CENTRE: tl.constexpr, WIDE_NORMS: tl.constexpr, UNIT_NORMS: tl.constexpr, LATE: tl.constexpr, NOISE: tl.constexpr,
    SKIP: tl.constexpr, EMPTY: tl.constexpr, REHEARSAL: tl.constexpr, SIZE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Takes the step, or rehearses it.

    Args:
        job: Address of the table.
        grad_scale: float32 scalar or None: gradients are divided by it.
        found_inf: float32 scalar or None: not zero, and no step is taken.
        VARIANTS: The kinds of chunks there are, as bits of rule, access and tile: only their code is compiled.
        RULES: One more than the highest number of a rule.
        STATES: How many state tensors a rule has: 4 bits each.
        CENTRE: Something is centred.
        WIDE_NORMS: A norm is wider than a unit.
        UNIT_NORMS: A norm is of units.
        LATE: Something is centred after stage 6.
        NOISE: There is noise.
        SKIP: A step that saw inf or nan is not taken.
        EMPTY: There are parameters without elements.
        REHEARSAL: Only sum what is centred late, where its mean takes several chunks.
        SIZE: Elements of a tile.
        LAYOUT: Tells the compiler's cache one layout of tables from another.
    """
    taken = tl.full([], 1, tl.int1)
    if found_inf is not None:
        taken = tl.load(found_inf) == 0.0
    row_count = read(job + at.job_row_count, tl.int32)
    if SKIP:
        spoilt = taken & (sum_rows(job, 0, row_count, SPOILT) > 0.0)
        taken = taken & (spoilt == 0)
        if not REHEARSAL:
            if spoilt & (tl.program_id(0) == 0):
                skipped = read(job + at.job_skipped, tl.int64)
                write(skipped, read(skipped, tl.float64) + 1.0, tl.float64)
    if taken:
        global_squares = tl.full([], 0.0, tl.float64)
        if WIDE_NORMS:
            if read_bool(job + at.job_any_global):
                global_squares = sum_rows(job, 0, row_count, GLOBAL)
        if EMPTY and not REHEARSAL:
            if tl.program_id(0) == 0:
                count_empty_rows(job)
        unscale = unscale_of(grad_scale)
        first, end = share(job)
        for i in range(end - first):
            index = end - 1 - i  # last first: what the stats launch read last is still in cache
            chunk = chunk_at(job, index)
            number = read(chunk + at.chunk_row, tl.int32)
            row = rows_of(job) + number.to(tl.int64) * at.DeviceRow
            hyper = hyper_of(job, row)
            wanted = tl.full([], 1, tl.int1)
            if REHEARSAL:
                late = read(hyper + at.hyper_centralize_at, tl.int8) != at.Centre_gradient
                wanted = read_bool(row + at.row_split) & read_bool(row + at.row_centre) & late
            if wanted:
                grad = grad_of(job, number)
                factor = tl.full([], 1.0, tl.float64)
                if WIDE_NORMS:
                    factor = wide_factor(job, row, number, hyper, global_squares)
                tile = tile_of(read(row + at.row_length, tl.int64))
                tile = tl.where(read(chunk + at.chunk_lanes, tl.int16) == 0, 0, tile)
                kind = access_of(row, grad, read_bool(chunk + at.chunk_plain)) * TILES + tile
                kind += read(row + at.row_rule, tl.int8).to(tl.int32) * (ACCESSES * TILES)
                for known in tl.static_range(RULES * ACCESSES * TILES):
                    if (VARIANTS >> known) & 1:
                        if kind == known:
                            step_chunk(
                                job, chunk, index, row, hyper, grad, unscale, factor, known, STATES, SIZE,
                                CENTRE, UNIT_NORMS, LATE, NOISE, REHEARSAL,
                            )  # fmt: skip
                if is_last(job, row, number):
                    if REHEARSAL:
                        finish_rehearsal(job, row)
                    else:
                        finish(job, row, number, hyper, UNIT_NORMS)
