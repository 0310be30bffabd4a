"""The launch that takes the step: each gradient is transformed, the rule applied, and parameter and state written, in one pass.

What a table does not need is left out when the kernel is compiled: see ``apply``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import ACCESSES, read, read_bool, rows_of, settings_of
from .chunk import (
    BLOCK,
    TILES,
    access_of,
    chunk_at,
    grad_of,
    is_last,
    mean_chunks,
    share,
    sum_row,
    tile_of,
    unscale_of,
    write,
)
from .counts import count_empty_rows, count_step, finish_weighing
from .step import REHEARSE, STEP, WEIGH, WEIGH_FIRST, step_chunk
from .transforms import perturb_factor

# ---- what all chunks of a launch share

GLOBAL = tl.constexpr(0)
SPOILT = tl.constexpr(1)
EVERY = tl.constexpr(2)


@triton.jit
def sum_rows(job, first, end, OF: tl.constexpr):
    """The sum of squares over rows of global scope or over every row; or how many rows forbid the step."""
    total = tl.zeros([BLOCK], tl.float64)
    rows = rows_of(job)
    all_settings = read(job + at.job_settings, tl.int64)
    squares = read(job + at.job_squares, tl.int64)
    for base in range(first, end, BLOCK):
        i = (base + tl.arange(0, BLOCK)).to(tl.int64)
        mask = i < end
        x = tl.load((squares + i * 8).to(tl.pointer_type(tl.float64)), mask=mask, other=0.0)
        group = tl.load((rows + i * at.DeviceRow + at.row_group).to(tl.pointer_type(tl.int32)), mask=mask, other=0)
        settings = all_settings + group.to(tl.int64) * at.DeviceSettings
        if OF == GLOBAL:
            scope = tl.load((settings + at.settings_norm_scope).to(tl.pointer_type(tl.int8)), mask=mask, other=0)
            x = tl.where(scope == at.NormScope_global, x, 0.0)
        if OF == SPOILT:
            skips = tl.load((settings + at.settings_skip_nonfinite).to(tl.pointer_type(tl.int8)), mask=mask, other=0)
            x = tl.where((skips != 0) & (x - x != 0.0), tl.full([], 1.0, tl.float64), 0.0)
        total += x
    return tl.sum(total, axis=0)


@triton.jit
def wide_factor(job, row, number, settings, global_squares):
    """s(n) of a norm that is wider than a unit; 1 where there is none."""
    scope = read(settings + at.settings_norm_scope, tl.int8)
    squares = global_squares
    if scope == at.NormScope_group:
        squares = sum_rows(
            job, read(settings + at.settings_row0, tl.int32), read(settings + at.settings_row1, tl.int32), EVERY
        )
    if scope == at.NormScope_param:
        squares = read(read(job + at.job_squares, tl.int64) + number.to(tl.int64) * 8, tl.float64)
    factor = perturb_factor(settings, tl.sqrt(squares))
    wide = (scope == at.NormScope_global) | (scope == at.NormScope_group) | (scope == at.NormScope_param)
    return tl.where(wide, factor, 1.0)


# ---- a row whose last chunk is done


@triton.jit
def finish_rehearsal(job, row):
    """The means of what is centred late, where a unit takes several chunks."""
    chunk0 = read(row + at.row_chunk0, tl.int32)
    chunk1 = read(row + at.row_chunk1, tl.int32)
    length = read(row + at.row_unit_length, tl.int64)
    numel = read(row + at.row_numel, tl.int64)
    known = read(job + at.job_units, tl.int64) + read(row + at.row_unit0, tl.int64) * at.Unit + at.unit_direction
    units = (numel // length).to(tl.int32)
    if read_bool(row + at.row_whole):
        mean = mean_chunks(job, chunk0, chunk1, numel)
        for base in range(0, units, BLOCK):
            u = base + tl.arange(0, BLOCK)
            to = (known + u.to(tl.int64) * at.Unit).to(tl.pointer_type(tl.float64))
            tl.store(to, tl.zeros([BLOCK], tl.float64) + mean, mask=u < units)
    else:
        pieces = ((length + (at.chunk_elements - 1)) // at.chunk_elements).to(tl.int32)
        for u in range(units):
            c0 = chunk0 + u * pieces
            write(known + u * at.Unit, mean_chunks(job, c0, c0 + pieces, length), tl.float64)


@triton.jit
def finish(job, row, number, settings, UNIT_NORMS: tl.constexpr, PRODUCT: tl.constexpr):
    count_step(row, settings, PRODUCT)
    if UNIT_NORMS:
        by_unit = read(settings + at.settings_norm_scope, tl.int8) == at.NormScope_unit
        if by_unit & (read_bool(row + at.row_measured) == 0):
            squares = sum_row(job, row, at.sums_squares)
            write(read(job + at.job_squares, tl.int64) + number.to(tl.int64) * 8, squares, tl.float64)


# ---- the launch


@triton.jit
def is_wanted(row, settings, PHASE: tl.constexpr):
    """Whether a launch is for this row."""
    if PHASE == REHEARSE:
        late = read(settings + at.settings_centralize_at, tl.int8) != at.Centre_gradient
        return read_bool(row + at.row_split) & read_bool(row + at.row_centre) & late
    elif PHASE == WEIGH_FIRST:
        return read_bool(row + at.row_weighed_first)
    elif PHASE == WEIGH:
        return read_bool(row + at.row_weighed)
    else:
        return tl.full([], 1, tl.int1)


@triton.jit
def apply(
    job, grad_scale, found_inf,
    KINDS: tl.constexpr, COUNT: tl.constexpr, STATES: tl.constexpr,
    CENTRE: tl.constexpr, WIDE_NORMS: tl.constexpr, UNIT_NORMS: tl.constexpr, LATE: tl.constexpr, NOISE: tl.constexpr,
    RIDERS: tl.constexpr, PRODUCT: tl.constexpr, SKIP: tl.constexpr, EMPTY: tl.constexpr, PHASE: tl.constexpr,
    SIZE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Takes the step, or finds out what must be known of whole rows before it.

    Args:
        job: Address of the table.
        grad_scale: float32 scalar or None: gradients are divided by it.
        found_inf: float32 scalar or None: not zero, and no step is taken.
        KINDS: The kinds of chunks there are, of rule, access and tile: only their code is compiled. See chunk.kinds.
        COUNT: How many they are.
        STATES: How many state tensors a rule has: 4 bits each.
        CENTRE: Something is centred.
        WIDE_NORMS: A norm is wider than a unit.
        UNIT_NORMS: A norm is of units.
        LATE: Something is centred after stage 6.
        NOISE: There is noise.
        RIDERS: Bits of what becomes of the weights besides: see weights.py.
        PRODUCT: Rows keep the product of their momenta.
        SKIP: A step that saw inf or nan is not taken.
        EMPTY: There are parameters without elements.
        PHASE: What the launch is for: see step.py.
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
        if PHASE == STEP:
            if spoilt & (tl.program_id(0) == 0):
                skipped = read(job + at.job_skipped, tl.int64)
                write(skipped, read(skipped, tl.float64) + 1.0, tl.float64)
    if taken:
        global_squares = tl.full([], 0.0, tl.float64)
        if WIDE_NORMS:
            if read_bool(job + at.job_any_global):
                global_squares = sum_rows(job, 0, row_count, GLOBAL)
        if EMPTY and PHASE == STEP:
            if tl.program_id(0) == 0:
                count_empty_rows(job, PRODUCT)
        unscale = unscale_of(grad_scale)
        first, end = share(job)
        for i in range(end - first):
            index = end - 1 - i  # last first: what the stats launch read last is still in cache
            chunk = chunk_at(job, index)
            number = read(chunk + at.chunk_row, tl.int32)
            row = rows_of(job) + number.to(tl.int64) * at.DeviceRow
            settings = settings_of(job, row)
            if is_wanted(row, settings, PHASE):
                grad = grad_of(job, number)
                factor = tl.full([], 1.0, tl.float64)
                if WIDE_NORMS:
                    factor = wide_factor(job, row, number, settings, global_squares)
                tile = tile_of(read(row + at.row_unit_length, tl.int64))
                tile = tl.where(read(chunk + at.chunk_lanes, tl.int16) == 0, 0, tile)
                kind = access_of(row, grad, read_bool(chunk + at.chunk_plain)) * TILES + tile
                kind += read(row + at.row_rule, tl.int8).to(tl.int32) * (ACCESSES * TILES)
                for known in tl.static_range(COUNT):
                    if kind == KINDS // 4096**known % 4096:
                        step_chunk(
                            job, chunk, index, row, settings, grad, unscale, factor,
                            KINDS // 4096**known % 4096, STATES, SIZE,
                            CENTRE, UNIT_NORMS, LATE, NOISE, RIDERS, PHASE,
                        )  # fmt: skip
                if is_last(job, row, number):
                    if PHASE == STEP:
                        finish(job, row, number, settings, UNIT_NORMS, PRODUCT)
                    elif PHASE == REHEARSE:
                        finish_rehearsal(job, row)
                    else:
                        finish_weighing(job, row)
