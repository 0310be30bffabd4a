"""A chunk's way through a launch: tiles of (units, elements of each), whose shape fits the length of the units.

A unit is walked in tiles of one width. There are five, so that a row of a tile is at least half used and loops are short:

    tile   units of length        a tile
    0      pieces, no units       1 x SIZE
    1      up to 16               SIZE/8 x 8      8: one 16-byte access of a 16-bit dtype
    2      up to 128              SIZE/32 x 32
    3      up to 1024             SIZE/256 x 256
    4      longer                 1 x SIZE

Where elements are accessed one at a time a tile has a quarter of SIZE.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import layout as at
from .access import ACCESSES, ANY, ANY_WIDE, Tile, load, read, read_bool, rows_of, settings_of
from .transforms import anchor

LONGEST = (16, 128, 1024)
LONGEST_0, LONGEST_1, LONGEST_2 = (tl.constexpr(n) for n in LONGEST)
TILES = tl.constexpr(len(LONGEST) + 2)


def kind_of(access: int, tile: int, rule: int = 0) -> int:
    """The number of a kind of chunk."""
    return (rule * ACCESSES.value + access) * TILES.value + tile


def kinds(known: Iterable[int]) -> dict[str, int]:
    """KINDS and COUNT of a kernel: the numbers of the kinds of chunks that it is compiled for, as digits to base 4096."""
    numbers = sorted(set(known))
    return {"KINDS": sum(n * 4096**i for i, n in enumerate(numbers)), "COUNT": len(numbers)}


@triton.jit
def tile_of(length):
    return 1 + (length > LONGEST_0).to(tl.int32) + (length > LONGEST_1).to(tl.int32) + (length > LONGEST_2).to(tl.int32)


class ChunkTask(NamedTuple):
    """A chunk that a program works on: addresses of the chunk, its row, their group's settings and gradient; both numbers."""

    job: Any
    chunk: Any
    index: Any
    row: Any
    number: Any
    settings: Any
    grad: Any


class Walk(NamedTuple):
    """A chunk as ``units`` of one length, from element ``begin`` of the row on, and the ranks and columns of a tile of them."""

    begin: Any
    units: Any
    length: Any
    ranks: Any
    columns: Any


class Span(NamedTuple):
    """The units that a tile of a walk is high: their ranks in the chunk, and which of them there are, as (units, 1)."""

    start: Any
    offsets: Any
    rank: Any
    inside: Any
    length: Any
    columns: Any


@triton.jit
def walk_of(ACCESS: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, chunk, row):
    """The walk of a chunk. Whole packs, and said so, so that the compiler sees that 16 bytes fit."""
    # One at a time there are addresses to hold for each element: smaller tiles keep the launch's registers few.
    AREA: tl.constexpr = SIZE if ACCESS < ANY else SIZE // 4
    WIDTH: tl.constexpr = 8 if TILE == 1 else 32 if TILE == 2 else 256 if TILE == 3 else AREA
    PACK: tl.constexpr = (
        4 if ACCESS == at.DType_float32 else 2 if ACCESS == at.DType_float64 else 8 if ACCESS < ANY else 1
    )
    begin = read(chunk + at.chunk_begin, tl.int64) // PACK * PACK
    count = read(chunk + at.chunk_count, tl.int32)
    length = count // PACK * PACK
    if TILE > 0:
        length = read(row + at.row_unit_length, tl.int64).to(tl.int32) // PACK * PACK
    return Walk(begin, count // length, length, tl.arange(0, AREA // WIDTH)[:, None], tl.arange(0, WIDTH)[None, :])


@triton.jit
def span_at(walk, unit):
    """Units ``unit`` and following of a walk."""
    rank = unit + walk.ranks
    start = walk.begin + unit * walk.length.to(tl.int64)
    return Span(start, walk.ranks * walk.length, rank, rank < walk.units, walk.length, walk.columns)


@triton.jit
def tile_at(span, column):
    """Columns ``column`` and following of a span."""
    columns = column + span.columns
    return Tile(span.start, span.offsets + columns, span.inside & (columns < span.length), span.length, column)


@triton.jit
def elements_of(tile):
    """The numbers in the row of a tile's elements."""
    return tile.start + tile.local.to(tl.int64)


@triton.jit
def quads_of(tile):
    """The numbers of a tile's groups of four neighbours, where units begin with one."""
    HEIGHT: tl.constexpr = tile.mask.shape[0]
    WIDTH: tl.constexpr = tile.mask.shape[1]
    unit = tl.arange(0, HEIGHT)[:, None] * (tile.length // 4) + tl.arange(0, WIDTH // 4)[None, :]
    return tile.start // 4 + tile.column // 4 + unit.to(tl.int64)


@triton.jit
def share(job):
    """The chunks of this program: neighbours, so that a program seldom changes rows."""
    count = read(job + at.job_chunk_count, tl.int32)
    each = count // tl.num_programs(0)
    more = count - each * tl.num_programs(0)
    pid = tl.program_id(0)
    first = pid * each + tl.minimum(pid, more)
    return first, first + each + (pid < more).to(tl.int32)


@triton.jit
def task_at(job, index):
    chunk = read(job + at.job_chunks, tl.int64) + index * at.Chunk
    number = read(chunk + at.chunk_row, tl.int32)
    row = rows_of(job) + number.to(tl.int64) * at.DeviceRow
    grad = read(read(job + at.job_grads, tl.int64) + number.to(tl.int64) * 8, tl.int64)
    return ChunkTask(job, chunk, index, row, number, settings_of(job, row), grad)


@triton.jit
def write_squares(task, squares):
    """Keep a row's sum of squares for the norms that are wider than a unit."""
    write(read(task.job + at.job_squares, tl.int64) + task.number.to(tl.int64) * 8, squares, tl.float64)


@triton.jit
def kind_at(task, tile):
    """``kind_of`` a chunk without its rule. A piece, or a chunk of units that is measured as one, has tile 0."""
    dtype = read(task.row + at.row_param + at.operand_dtype, tl.int8).to(tl.int32)
    slow = tl.where(dtype == at.DType_float64, ANY_WIDE, ANY)
    plain = read_bool(task.chunk + at.chunk_plain) & (task.grad % 16 == 0)
    tile = tl.where(read(task.chunk + at.chunk_lanes, tl.int16) == 0, 0, tile)
    return tl.where(plain, dtype, slow) * TILES + tile


@triton.jit
def unscale_of(grad_scale):
    if grad_scale is None:
        return tl.full([], 1.0, tl.float64)
    else:
        return 1.0 / tl.load(grad_scale).to(tl.float64)


@triton.jit
def first_of(x, column):
    """The first column of a tile, (units, 1)."""
    return tl.sum(tl.where(column == 0, x, 0.0), axis=1)[:, None].to(x.dtype)


@triton.jit
def mean_tiles(ACCESS: tl.constexpr, x, unscale, span):
    """The mean of each unit of a span, (units, 1) in float64."""
    T: tl.constexpr = unscale.dtype
    HEIGHT: tl.constexpr = span.inside.shape[0]
    WIDTH: tl.constexpr = span.columns.shape[1]
    first = anchor(load(ACCESS, x, Tile(span.start, span.offsets, span.inside, span.length, 0), T) * unscale)
    total = tl.zeros([HEIGHT, WIDTH], tl.float64)
    for k in range(0, span.length, WIDTH):
        tile = tile_at(span, k)
        values = load(ACCESS, x, tile, T)
        total += tl.where(tile.mask, values * unscale - first, 0.0).to(tl.float64)
    return first.to(tl.float64) + tl.sum(total, axis=1)[:, None] / span.length


@triton.jit
def square_tiles(ACCESS: tl.constexpr, x, unscale, mean, span):
    """Each unit's sum of squares around ``mean``, (units, 1) in float64: no gradient in float32 is too large for it."""
    HEIGHT: tl.constexpr = span.inside.shape[0]
    WIDTH: tl.constexpr = span.columns.shape[1]
    total = tl.zeros([HEIGHT, WIDTH], tl.float64)
    for k in range(0, span.length, WIDTH):
        tile = tile_at(span, k)
        values = load(ACCESS, x, tile, unscale.dtype)
        values = tl.where(tile.mask, values * unscale - mean, 0.0).to(tl.float64)
        total += values * values
    return tl.sum(total, axis=1)[:, None]


# ---- rows put together: every chunk has a slot of its own, and the program that finishes a row's last chunk adds them in order

BLOCK = tl.constexpr(256)


@triton.jit
def sum_chunks(job, first, end, FIELD: tl.constexpr):
    """The sum of a slot's field over chunks [first, end)."""
    total = tl.zeros([BLOCK], tl.float64)
    sums = read(job + at.job_sums, tl.int64) + FIELD
    for base in range(first, end, BLOCK):
        c = base + tl.arange(0, BLOCK)
        total += tl.load((sums + c.to(tl.int64) * at.Sums).to(tl.pointer_type(tl.float64)), mask=c < end, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def sum_row(job, row, FIELD: tl.constexpr):
    """The same over a row's chunks."""
    return sum_chunks(job, read(row + at.row_chunk0, tl.int32), read(row + at.row_chunk1, tl.int32), FIELD)


@triton.jit
def mean_chunks(job, first, end, numel):
    """The mean of ``numel`` elements in chunks [first, end), from each one's."""
    total = tl.zeros([BLOCK], tl.float64)
    sums = read(job + at.job_sums, tl.int64) + at.sums_sum
    chunks = read(job + at.job_chunks, tl.int64) + at.chunk_count
    around = anchor(read(sums + first.to(tl.int64) * at.Sums, tl.float64))
    for base in range(first, end, BLOCK):
        c = base + tl.arange(0, BLOCK)
        mask = c < end
        mean = tl.load((sums + c.to(tl.int64) * at.Sums).to(tl.pointer_type(tl.float64)), mask=mask, other=0.0)
        n = tl.load((chunks + c.to(tl.int64) * at.Chunk).to(tl.pointer_type(tl.int32)), mask=mask, other=0)
        total += tl.where(mask, n.to(tl.float64) * (mean - around), 0.0)
    return around + tl.sum(total, axis=0) / numel


@triton.jit
def squares_around(job, first, end, mean, CENTRED: tl.constexpr):
    """The sum of squares, moved from each chunk's mean to ``mean`` (Chan et al. 1979)."""
    total = tl.zeros([BLOCK], tl.float64)
    sums = read(job + at.job_sums, tl.int64)
    chunks = read(job + at.job_chunks, tl.int64)
    for base in range(first, end, BLOCK):
        c = base + tl.arange(0, BLOCK)
        mask = c < end
        slot = sums + c.to(tl.int64) * at.Sums
        squares = tl.load((slot + at.sums_squares).to(tl.pointer_type(tl.float64)), mask=mask, other=0.0)
        if CENTRED:
            n = tl.load(
                (chunks + c.to(tl.int64) * at.Chunk + at.chunk_count).to(tl.pointer_type(tl.int32)), mask=mask, other=1
            ).to(tl.float64)
            of_chunk = tl.load((slot + at.sums_sum).to(tl.pointer_type(tl.float64)), mask=mask, other=0.0)
            off = tl.where(mask, of_chunk - mean, 0.0)
            squares += n * off * off
        total += squares
    return tl.sum(total, axis=0)


@triton.jit
def is_last(task):
    """Whether this program has just finished the last chunk of a row, so that all of them can be read. Integers only."""
    tl.debug_barrier()
    ticket = read(task.job + at.job_tickets, tl.int64) + (task.number.to(tl.int64) + 1) * 4
    chunks = read(task.row + at.row_chunk1, tl.int32) - read(task.row + at.row_chunk0, tl.int32)
    last = tl.atomic_add(ticket.to(tl.pointer_type(tl.int32)), 1, sem="acq_rel") == chunks - 1
    if last:
        tl.store(ticket.to(tl.pointer_type(tl.int32)), 0)
        tl.debug_barrier()
    return last


@triton.jit
def write(address, value, T: tl.constexpr):
    tl.store(address.to(tl.pointer_type(T)), value.to(T))
