"""The first launch of a step whose recipe has a wide norm: centred sums of squares of every row, means of long units."""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import ANY_WIDE, load, read, read_bool, rows_of, settings_of
from .chunk import (
    TILES,
    access_of,
    centred_at_gradient,
    chunk_at,
    grad_of,
    is_last,
    mean_chunks,
    mean_tiles,
    share,
    square_tiles,
    squares_around,
    sum_chunks,
    sum_row,
    tile_at,
    tile_of,
    units_of,
    unscale_of,
    write,
)
from .rules import reach
from .weights import kept_of, load_kept, square_kept


@triton.jit
def square_reached(
    ACCESS: tl.constexpr, RIDERS: tl.constexpr, row, settings, kept, grad, unscale,
    start, stride, inside, length, WIDTH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """square_tiles of the gradient times what each weight may move by: adaptive SAM's."""
    eta = read(settings + at.settings_eta, tl.float64).to(T)
    total = tl.zeros([inside.shape[0], WIDTH], tl.float64)
    for k in range(0, length, WIDTH):
        column = k + tl.arange(0, WIDTH)[None, :]
        mask = inside & (column < length)
        g = load(ACCESS, row + at.row_grad, grad, start, stride + column, mask, T)
        p = load_kept(ACCESS, RIDERS, row, kept, start, stride + column, mask, T)
        x = tl.where(mask, g * reach(p, eta) * unscale, 0.0).to(tl.float64)
        total += x * x
    return tl.sum(total, axis=1)[:, None]


@triton.jit
def measure(
    job, chunk, index, row, settings, grad, unscale64,
    KIND: tl.constexpr, SIZE: tl.constexpr, AGC: tl.constexpr, ADAPTIVE: tl.constexpr, RIDERS: tl.constexpr,
):  # fmt: skip
    """Fill a chunk's slot."""
    ACCESS: tl.constexpr = KIND // TILES
    TILE: tl.constexpr = KIND - KIND // TILES * TILES
    T: tl.constexpr = tl.float64 if ACCESS == at.DType_float64 or ACCESS == ANY_WIDE else tl.float32
    ranks, columns = tile_at(ACCESS, TILE, SIZE)
    HEIGHT: tl.constexpr = ranks.shape[0]
    WIDTH: tl.constexpr = columns.shape[1]
    begin, units, length = units_of(ACCESS, TILE, chunk, row)
    unscale = unscale64.to(T)
    centre = centred_at_gradient(row, settings)
    kept = kept_of(row, RIDERS)
    stride = ranks * length
    squares = tl.zeros([HEIGHT, 1], tl.float64)
    middle = tl.zeros([HEIGHT, 1], tl.float64)
    weights = tl.zeros([HEIGHT, 1], tl.float64)
    for unit in range(0, units, HEIGHT):
        start = begin + unit * length.to(tl.int64)
        inside = unit + ranks < units
        if centre:
            middle = mean_tiles(ACCESS, row + at.row_grad, grad, unscale, start, stride, inside, length, WIDTH, T)
        mean = middle.to(T)
        adaptive = tl.full([], 0, tl.int1)
        if ADAPTIVE:
            adaptive = read_bool(settings + at.settings_adaptive)
        if adaptive:
            squares += square_reached(
                ACCESS, RIDERS, row, settings, kept, grad, unscale, start, stride, inside, length, WIDTH, T
            )
        else:
            squares += square_tiles(
                ACCESS, row + at.row_grad, grad, unscale, mean, start, stride, inside, length, WIDTH, T
            )
        if AGC:
            if read_bool(settings + at.settings_agc):
                weights += square_kept(ACCESS, RIDERS, row, kept, start, stride, inside, length, WIDTH, T)
    slot = read(job + at.job_sums, tl.int64) + index * at.Sums
    write(slot + at.sums_sum, tl.sum(tl.sum(middle, axis=1), axis=0), tl.float64)  # of the one unit, if it is a piece
    write(slot + at.sums_squares, tl.sum(tl.sum(squares, axis=1), axis=0), tl.float64)
    write(slot + at.sums_weight_squares, tl.sum(tl.sum(weights, axis=1), axis=0), tl.float64)


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
        for base in range(0, units, 256):
            u = base + tl.arange(0, 256)
            to = (known + u.to(tl.int64) * at.Unit + at.unit_mean).to(tl.pointer_type(tl.float64))
            tl.store(to, tl.zeros([256], tl.float64) + mean, mask=u < units)
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
def finish(job, row, number, centre):
    squares = tl.full([], 0.0, tl.float64)
    if read_bool(row + at.row_split):
        if centre:
            squares = finish_split(job, row, True)
        else:
            squares = finish_split(job, row, False)
    else:
        squares = sum_row(job, row, at.sums_squares)
    write(read(job + at.job_squares, tl.int64) + number.to(tl.int64) * 8, squares, tl.float64)


@triton.jit
def stats(
    job, grad_scale, KINDS: tl.constexpr, COUNT: tl.constexpr,
    AGC: tl.constexpr, ADAPTIVE: tl.constexpr, RIDERS: tl.constexpr, SIZE: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Fills ``squares`` of every measured row. The arguments are those of ``apply``; ADAPTIVE: a norm is adaptive SAM's."""
    first, end = share(job)
    unscale = unscale_of(grad_scale)
    for index in range(first, end):
        chunk = chunk_at(job, index)
        number = read(chunk + at.chunk_row, tl.int32)
        row = rows_of(job) + number.to(tl.int64) * at.DeviceRow
        if read_bool(row + at.row_measured):
            settings = settings_of(job, row)
            grad = grad_of(job, number)
            centre = centred_at_gradient(row, settings)
            by_units = centre & (read_bool(row + at.row_split) == 0)
            tile = tl.where(by_units, tile_of(read(row + at.row_unit_length, tl.int64)), 0)
            # A piece, or a chunk of units that is measured as one.
            tile = tl.where(read(chunk + at.chunk_lanes, tl.int16) == 0, 0, tile)
            kind = access_of(row, grad, read_bool(chunk + at.chunk_plain)) * TILES + tile
            for known in tl.static_range(COUNT):
                if kind == KINDS // 4096**known % 4096:
                    measure(
                        job, chunk, index, row, settings, grad, unscale,
                        KINDS // 4096**known % 4096, SIZE, AGC, ADAPTIVE, RIDERS,
                    )  # fmt: skip
            if is_last(job, row, number):
                finish(job, row, number, centre)
