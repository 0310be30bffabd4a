"""The first launch of a step whose recipe has a wide norm: centred sums of squares of every row, means of long units."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import ANY_WIDE, Operand, load, needs_of, read, read_bool
from .chunk import (
    BLOCK,
    TILES,
    is_last,
    kind_at,
    mean_chunks,
    mean_tiles,
    share,
    span_at,
    square_tiles,
    squares_around,
    sum_chunks,
    sum_row,
    task_at,
    tile_at,
    tile_of,
    unscale_of,
    walk_of,
    write,
    write_squares,
)
from .rules import reach
from .weights import load_weights, square_weights, weights_of


@triton.jit
def square_reached(ACCESS: tl.constexpr, NEEDS: tl.constexpr, eta, weights, grad, unscale, span):
    """square_tiles of the gradient times what each weight may move by: adaptive SAM's."""
    T: tl.constexpr = unscale.dtype
    HEIGHT: tl.constexpr = span.inside.shape[0]
    WIDTH: tl.constexpr = span.columns.shape[1]
    total = tl.zeros([HEIGHT, WIDTH], tl.float64)
    for k in range(0, span.length, WIDTH):
        tile = tile_at(span, k)
        g = load(ACCESS, grad, tile, T)
        p = load_weights(ACCESS, NEEDS, weights, tile, T)
        x = tl.where(tile.mask, g * reach(p, eta) * unscale, 0.0).to(tl.float64)
        total += x * x
    return tl.sum(total, axis=1)[:, None]


@triton.jit
def measure(task, unscale64, KIND: tl.constexpr, NEEDS: tl.constexpr, ADAPTIVE: tl.constexpr, SIZE: tl.constexpr):
    """Leave a chunk's sums behind."""
    ACCESS: tl.constexpr = KIND // TILES
    TILE: tl.constexpr = KIND - KIND // TILES * TILES
    T: tl.constexpr = tl.float64 if ACCESS == at.DType_float64 or ACCESS == ANY_WIDE else tl.float32
    walk = walk_of(ACCESS, TILE, SIZE, task.chunk, task.row)
    HEIGHT: tl.constexpr = walk.ranks.shape[0]
    unscale = unscale64.to(T)
    centre = (needs_of(task.row) & at.Need_centre_early) != 0
    description = task.row + at.row_grad
    grad = Operand(description, task.grad, read(description + at.operand_dtype, tl.int8))
    weights = weights_of(NEEDS, task.row, task.settings, T)
    squares = tl.zeros([HEIGHT, 1], tl.float64)
    middle = tl.zeros([HEIGHT, 1], tl.float64)
    weight_squares = tl.zeros([HEIGHT, 1], tl.float64)
    for unit in range(0, walk.units, HEIGHT):
        span = span_at(walk, unit)
        if centre:
            middle = mean_tiles(ACCESS, grad, unscale, span)
        mean = middle.to(T)
        adaptive = tl.full([], 0, tl.int1)
        if ADAPTIVE:
            adaptive = read_bool(task.settings + at.settings_adaptive)
        if adaptive:
            eta = read(task.settings + at.settings_eta, tl.float64).to(T)
            squares += square_reached(ACCESS, NEEDS, eta, weights, grad, unscale, span)
        else:
            squares += square_tiles(ACCESS, grad, unscale, mean, span)
        if at.Need_agc & NEEDS:
            if read_bool(task.settings + at.settings_agc):
                weight_squares += square_weights(ACCESS, NEEDS, weights, span, T)
    slot = read(task.job + at.job_sums, tl.int64) + task.index * at.Sums
    write(slot + at.sums_sum, tl.sum(tl.sum(middle, axis=1), axis=0), tl.float64)  # of the one unit, if it is a piece
    write(slot + at.sums_squares, tl.sum(tl.sum(squares, axis=1), axis=0), tl.float64)
    write(slot + at.sums_weight_squares, tl.sum(tl.sum(weight_squares, axis=1), axis=0), tl.float64)


@triton.jit
def finish_split(job, row, CENTRED: tl.constexpr):
    """Put a row's chunks together where a mean or norm of its units takes several. Returns the row's sum of squares."""
    chunk0 = read(row + at.row_chunk0, tl.int32)
    chunk1 = read(row + at.row_chunk1, tl.int32)
    length = read(row + at.row_unit_length, tl.int64)
    numel = read(row + at.row_numel, tl.int64)
    whole = read_bool(row + at.row_whole)
    units = (numel // length).to(tl.int32)
    known = read(job + at.job_units, tl.int64) + read(row + at.row_unit0, tl.int64) * at.Unit
    mean = tl.full([], 0.0, tl.float64)
    if CENTRED:
        if whole:
            mean = mean_chunks(job, chunk0, chunk1, numel)
    total = tl.full([], 0.0, tl.float64)
    if length <= at.block_unit:  # short units of a tensor centred whole: their norms are taken in the update
        for base in range(0, units, BLOCK):
            u = base + tl.arange(0, BLOCK)
            to = (known + u.to(tl.int64) * at.Unit + at.unit_mean).to(tl.pointer_type(tl.float64))
            tl.store(to, tl.zeros([BLOCK], tl.float64) + mean, mask=u < units)
        total = squares_around(job, chunk0, chunk1, mean, CENTRED)
    else:
        pieces = ((length + (at.chunk_elements - 1)) // at.chunk_elements).to(tl.int32)
        for u in range(units):
            c0 = chunk0 + u * pieces
            c1 = c0 + pieces
            if CENTRED:
                if not whole:
                    mean = mean_chunks(job, c0, c1, length)
            squares = squares_around(job, c0, c1, mean, CENTRED)
            unit = known + u * at.Unit
            write(unit + at.unit_mean, mean, tl.float64)
            write(unit + at.unit_squares, squares, tl.float64)
            write(unit + at.unit_weight_squares, sum_chunks(job, c0, c1, at.sums_weight_squares), tl.float64)
            total += squares
    return total


@triton.jit
def finish(task, centre):
    squares = tl.full([], 0.0, tl.float64)
    if (needs_of(task.row) & at.Need_split) != 0:
        if centre:
            squares = finish_split(task.job, task.row, True)
        else:
            squares = finish_split(task.job, task.row, False)
    else:
        squares = sum_row(task.job, task.row, at.sums_squares)
    write_squares(task, squares)


@triton.jit
def stats(
    job, grad_scale, KINDS: tl.constexpr, COUNT: tl.constexpr,
    NEEDS: tl.constexpr, ADAPTIVE: tl.constexpr, SIZE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Fill ``squares`` of every measured row. The arguments are those of ``apply``; ADAPTIVE: a norm is adaptive SAM's."""
    first, end = share(job)
    unscale = unscale_of(grad_scale)
    for index in range(first, end):
        task = task_at(job, index)
        needs = needs_of(task.row)
        if (needs & at.Need_measured) != 0:
            centre = (needs & at.Need_centre_early) != 0
            by_unit = centre & ((needs & at.Need_split) == 0)
            kind = kind_at(task, tl.where(by_unit, tile_of(read(task.row + at.row_unit_length, tl.int64)), 0))
            for known in tl.static_range(COUNT):
                if kind == KINDS // 4096**known % 4096:
                    measure(task, unscale, KINDS // 4096**known % 4096, NEEDS, ADAPTIVE, SIZE)
            if is_last(task):
                finish(task, centre)
