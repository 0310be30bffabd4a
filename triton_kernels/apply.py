"""The launch that takes the step: each gradient is transformed, the rule applied, and parameter and state written, in one pass.

What a table does not need is left out when the kernel is compiled: see ``apply``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import ACCESSES, needs_of, read, read_bool, rows_of
from .chunk import (
    BLOCK,
    TILES,
    is_last,
    kind_at,
    mean_chunks,
    share,
    sum_row,
    task_at,
    tile_of,
    unscale_of,
    write,
    write_squares,
)
from .step import count_empty_rows, count_step, finish_trust, step_chunk
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
    squares = read(job + at.job_squares, tl.int64)
    for base in range(first, end, BLOCK):
        i = (base + tl.arange(0, BLOCK)).to(tl.int64)
        mask = i < end
        x = tl.load((squares + i * 8).to(tl.pointer_type(tl.float64)), mask=mask, other=0.0)
        needs = tl.load((rows + i * at.DeviceRow + at.row_needs).to(tl.pointer_type(tl.int32)), mask=mask, other=0)
        if OF == GLOBAL:
            x = tl.where((needs & at.Need_global_norm) != 0, x, 0.0)
        if OF == SPOILT:
            spoils = ((needs & at.Need_skip) != 0) & (x - x != 0.0)
            x = tl.where(spoils, tl.full([], 1.0, tl.float64), 0.0)
        total += x
    return tl.sum(total, axis=0)


@triton.jit
def wide_factor(task, global_squares):
    """s(n) of a norm that is wider than a unit; 1 where there is none."""
    scope = read(task.settings + at.settings_norm_scope, tl.int8)
    squares = global_squares
    if scope == at.NormScope_group:
        first = read(task.settings + at.settings_row0, tl.int32)
        squares = sum_rows(task.job, first, read(task.settings + at.settings_row1, tl.int32), EVERY)
    if scope == at.NormScope_param:
        squares = read(read(task.job + at.job_squares, tl.int64) + task.number.to(tl.int64) * 8, tl.float64)
    factor = perturb_factor(task.settings, tl.sqrt(squares))
    return tl.where((needs_of(task.row) & at.Need_wide_norm) != 0, factor, 1.0)


# ---- a row whose last chunk is done


@triton.jit
def finish_late_means(job, row):
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


# ---- the launch


@triton.jit
def is_taken(job, found_inf, NEEDS: tl.constexpr, PHASE: tl.constexpr):
    """Whether GradScaler and the norms let the step be taken. The launch of the step counts those that a norm forbids."""
    taken = tl.full([], 1, tl.int1)
    if found_inf is not None:
        taken = tl.load(found_inf) == 0.0
    if at.Need_skip & NEEDS:
        spoilt = taken & (sum_rows(job, 0, read(job + at.job_row_count, tl.int32), SPOILT) > 0.0)
        taken = taken & (spoilt == 0)
        if PHASE == at.Phase_step:
            if spoilt & (tl.program_id(0) == 0):
                skipped = read(job + at.job_skipped, tl.int64)
                write(skipped, read(skipped, tl.float64) + 1.0, tl.float64)
    return taken


@triton.jit
def finish_row(task, NEEDS: tl.constexpr, PHASE: tl.constexpr):
    if PHASE == at.Phase_step:
        count_step(task.row, task.settings, NEEDS)
        if at.Need_unit_norms & NEEDS:
            if (needs_of(task.row) & (at.Need_unit_norms | at.Need_measured)) == at.Need_unit_norms:
                write_squares(task, sum_row(task.job, task.row, at.sums_squares))
    elif PHASE == at.Phase_late_means:
        finish_late_means(task.job, task.row)
    else:
        finish_trust(task.job, task.row)


@triton.jit
def apply(
    job, grad_scale, found_inf, KINDS: tl.constexpr, COUNT: tl.constexpr,
    NEEDS: tl.constexpr, PHASE: tl.constexpr, SIZE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Take the step, or find out what must be known of whole rows before it.

    Args:
        job: Address of the table.
        grad_scale: float32 scalar or None: gradients are divided by it.
        found_inf: float32 scalar or None: not zero, and no step is taken.
        KINDS: The kinds of chunks there are, of rule, access and tile: only their code is compiled. See chunk.kinds.
        COUNT: How many they are.
        NEEDS: Bits of what some row of the table needs, of csrc/plan/needs.h: only their code is compiled.
        PHASE: What the launch is for, a Phase of csrc/plan/needs.h.
        SIZE: Elements of a tile.
        LAYOUT: Tells the compiler's cache one layout of tables from another.
    """
    if is_taken(job, found_inf, NEEDS, PHASE):
        global_squares = tl.full([], 0.0, tl.float64)
        if at.Need_global_norm & NEEDS:
            global_squares = sum_rows(job, 0, read(job + at.job_row_count, tl.int32), GLOBAL)
        if at.Need_empty & NEEDS and PHASE == at.Phase_step:
            if tl.program_id(0) == 0:
                count_empty_rows(job, NEEDS)
        unscale = unscale_of(grad_scale)
        first, end = share(job)
        for i in range(end - first):
            index = end - 1 - i  # last first: what the stats launch read last is still in cache
            task = task_at(job, index)
            if ((needs_of(task.row) >> PHASE) & 1) != 0:
                factor = tl.full([], 1.0, tl.float64)
                if at.Need_wide_norm & NEEDS:
                    factor = wide_factor(task, global_squares)
                kind = kind_at(task, tile_of(read(task.row + at.row_unit_length, tl.int64)))
                kind += read(task.row + at.row_rule, tl.int8).to(tl.int32) * (ACCESSES * TILES)
                for known in tl.static_range(COUNT):
                    if kind == KINDS // 4096**known % 4096:
                        step_chunk(task, unscale, factor, KINDS // 4096**known % 4096, NEEDS, PHASE, SIZE)
                if is_last(task):
                    finish_row(task, NEEDS, PHASE)
