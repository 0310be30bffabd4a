"""LPG cross-entropy: from rows of logits to the perturbed gradient, with no softmax in memory.

The backward visits rows sorted by class, in pieces: runs of up to a fixed number of rows of one class. Each piece of a class
that has several sums its gradients into a slot of its own. Arguments come in the bundles of gradfused/lpg/triton.py: ``batch``
and ``pieces``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import narrow_bfloat16, widen_bfloat16


@triton.jit
def load(pointer, where, mask, other, T: tl.constexpr):
    """Load logits as T. The interpreter is given bfloat16 as int16, since it does not round bfloat16 as hardware does."""
    if at.INTERPRETED and pointer.dtype.element_ty == tl.int16:
        x = widen_bfloat16(tl.load(pointer + where, mask=mask, other=0)).to(T)
        return tl.where(mask, x, other)
    else:
        return tl.load(pointer + where, mask=mask, other=other).to(T)


@triton.jit
def store(pointer, where, x, mask):
    """Store gradients, rounded."""
    if at.INTERPRETED and pointer.dtype.element_ty == tl.int16:
        tl.store(pointer + where, narrow_bfloat16(x.to(tl.float32)), mask=mask)
    else:
        tl.store(pointer + where, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def in_packs(n, PACK: tl.constexpr):
    """``n``, a multiple of ``PACK``, so that the compiler knows it is one; else it would access rows one element at a time."""
    return n // PACK * PACK


@triton.jit
def log_of_one_and(x):
    """log(1 + x) for x >= 0, accurate also where 1 + x rounds to 1."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1, u - 1)))


@triton.jit
def of_own_class(own, rest, numbers):
    """The gradient at a row's own class, from the smaller of its probability and the rest, so that nothing large cancels."""
    s = tl.load(numbers)
    share = tl.load(numbers + 1)
    return tl.where(own < rest, own - (1 - s + share), s - share - rest)


@triton.jit
def forward(batch, loss, confidence, norm, SMOOTH: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr):
    """One row: its loss, in one reading by blocks of columns with a running maximum."""
    T: tl.constexpr = loss.dtype.element_ty
    classes = in_packs(batch.classes, PACK)
    row = tl.program_id(0).to(tl.int64)
    kept = tl.load(batch.target + row) != batch.ignore_index
    y = tl.where(kept, tl.load(batch.target + row), 0)
    x0 = batch.logits + row * in_packs(batch.stride, PACK)
    greatest = tl.full([], -3.4e38, T)
    origin = greatest
    others = tl.full([], 0, T)
    squares = tl.full([], 0, T)
    weighted = tl.full([], 0, T)
    for begin in range(0, classes, BLOCK):
        cols = begin + tl.arange(0, BLOCK)
        inside = cols < classes
        x = load(x0, cols, inside, float("-inf"), T)
        most = tl.maximum(greatest, tl.max(x, 0))
        e = tl.where(inside & (cols != y), tl.exp(x - most), 0)
        shrink = tl.exp(greatest - most)
        others = others * shrink + tl.sum(e, 0)
        squares = squares * shrink * shrink + tl.sum(e * e, 0)
        greatest = most
        if SMOOTH:
            origin = tl.where(begin == 0, most, origin)
            d = tl.where(inside, x - origin, 0)
            if batch.weight is not None:
                d = d * tl.load(batch.weight + cols, mask=inside, other=0)
            weighted += tl.sum(d, 0)
    own_logit = load(x0, y, kept, 0.0, T)
    own = tl.exp(own_logit - greatest)
    total = others + own
    rest = others / total
    log_sum = tl.where(own == 1, log_of_one_and(others), tl.log(total))
    found = log_sum + (greatest - own_logit)
    if batch.weight is not None:
        found = found * tl.load(batch.weight + y)
    s = tl.load(batch.numbers)
    share = tl.load(batch.numbers + 1)
    if SMOOTH:
        found = tl.where(s == 1, 0, (1 - s) * found)
        found += share * (tl.load(batch.numbers + 2) * (log_sum + (greatest - origin)) - weighted)
    tl.store(loss + row, tl.where(kept, found, 0))
    saved = batch.saved + row * 4
    tl.store(saved, greatest)
    tl.store(saved + 1, 1 / total)
    tl.store(saved + 2, rest)
    of_others = squares / (total * total)
    if SMOOTH:
        of_others += share * (share * (classes - 1) - 2 * rest)
    of_own = of_own_class(own / total, rest, batch.numbers)
    tl.store(confidence + row, own / total)
    tl.store(norm + row, tl.sqrt(tl.maximum(of_others, 0) + of_own * of_own))


@triton.jit
def tally(firsts, order, confidence, norm, to, classes, BLOCK: tl.constexpr):
    """One class: the number of its rows, their summed confidence and norm."""
    y = tl.program_id(0).to(tl.int64)
    first = tl.load(firsts + y)
    last = tl.load(firsts + y + 1)
    q = tl.zeros([BLOCK], tl.float64)
    g = tl.zeros([BLOCK], tl.float64)
    for begin in range(first, last, BLOCK):
        places = begin + tl.arange(0, BLOCK)
        there = places < last
        rows = tl.load(order + places, mask=there, other=0)
        q += tl.load(confidence + rows, mask=there, other=0).to(tl.float64)
        g += tl.load(norm + rows, mask=there, other=0).to(tl.float64)
    tl.store(to + y, (last - first).to(tl.float64))
    tl.store(to + classes + y, tl.sum(q, 0))
    tl.store(to + 2 * classes + y, tl.sum(g, 0))


@triton.jit
def probabilities(batch, rows, there, cols, T: tl.constexpr, PACK: tl.constexpr):
    """A tile: its probabilities, each row's probability of the classes that are not its own, and which elements exist."""
    mask = there[:, None] & (cols < in_packs(batch.classes, PACK))[None, :]
    greatest = tl.load(batch.saved + rows * 4, mask=there, other=0)
    scale = tl.load(batch.saved + rows * 4 + 1, mask=there, other=0)
    rest = tl.load(batch.saved + rows * 4 + 2, mask=there, other=0)
    where = rows[:, None] * in_packs(batch.stride, PACK) + cols[None, :]
    x = load(batch.logits, where, mask, float("-inf"), T)
    return tl.exp(x - greatest[:, None]) * scale[:, None], rest[:, None], mask


@triton.jit
def sum_gradients(batch, order, first, last, y, cols, HEIGHT: tl.constexpr, PACK: tl.constexpr):
    """The sums of the gradients of rows ``order[first:last]``, which are of class y, by column.

    Gradients are summed, not probabilities: where gradients are much smaller, the rounding errors of summed probabilities
    would be left.
    """
    T: tl.constexpr = batch.saved.dtype.element_ty
    sums = tl.zeros([cols.shape[0]], T)
    share = tl.load(batch.numbers + 1)
    for begin in range(first, last, HEIGHT):
        places = begin + tl.arange(0, HEIGHT)
        there = places < last
        rows = tl.load(order + places, mask=there, other=0)
        p, rest, mask = probabilities(batch, rows, there, cols, T, PACK)
        g = tl.where(cols[None, :] == y, of_own_class(p, rest, batch.numbers), p - share)
        sums += tl.sum(tl.where(mask, g, 0), 0)
    return sums


@triton.jit
def class_sums(batch, order, firsts, to, BLOCK: tl.constexpr, HEIGHT: tl.constexpr, PACK: tl.constexpr):
    """One class, a block of columns: its summed logit gradients. ``firsts[c]`` is where class c begins in the order."""
    y = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(firsts + y)
    last = tl.load(firsts + y + 1)
    sums = sum_gradients(batch, order, first, last, y, cols, HEIGHT, PACK)
    classes = in_packs(batch.classes, PACK)
    tl.store(to + y * classes + cols, sums, mask=cols < classes)


@triton.jit
def accumulate(batch, pieces, BLOCK: tl.constexpr, HEIGHT: tl.constexpr, PACK: tl.constexpr):
    """A piece of a class that has several, a block of columns: its sums, into its slot."""
    piece = tl.program_id(0).to(tl.int64)
    slot = tl.load(pieces.slot + piece)
    if slot >= 0:
        classes = in_packs(batch.classes, PACK)
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        first = tl.load(pieces.starts + piece)
        last = tl.load(pieces.starts + piece + 1)
        y = tl.load(batch.target + tl.load(pieces.order + first))
        sums = sum_gradients(batch, pieces.order, first, last, y, cols, HEIGHT, PACK)
        tl.store(pieces.sums + slot * classes + cols, sums, mask=cols < classes)


@triton.jit
def measure(batch, pieces, bound, BLOCK: tl.constexpr, HEIGHT: tl.constexpr, PACK: tl.constexpr):
    """The first piece of a class, a block of columns: the squares of the class's mean gradient.

    The slots of a class are added up into its first one.
    """
    T: tl.constexpr = batch.saved.dtype.element_ty
    classes = in_packs(batch.classes, PACK)
    piece = tl.program_id(0).to(tl.int64)
    count = tl.load(pieces.of_class + piece)
    first = tl.load(pieces.starts + piece)
    if count > 0 and first < pieces.rows:
        y = tl.load(batch.target + tl.load(pieces.order + first))
        if y != batch.ignore_index:
            if tl.load(bound + y) != 0:
                cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
                inside = cols < classes
                slot = tl.load(pieces.slot + piece)
                last = tl.load(pieces.starts + piece + count)
                if slot >= 0:
                    total = tl.zeros([BLOCK], tl.float64)
                    for k in range(count):
                        sums = pieces.sums + (slot + k) * classes + cols
                        total += tl.load(sums, mask=inside, other=0).to(tl.float64)
                    mean = total.to(T)
                    tl.store(pieces.sums + slot * classes + cols, mean, mask=inside)
                else:
                    mean = sum_gradients(batch, pieces.order, first, last, y, cols, HEIGHT, PACK)
                mean = tl.where(inside, mean / (last - first).to(T), 0)
                to = pieces.squares + piece * tl.num_programs(1) + tl.program_id(1)
                tl.store(to, tl.sum(mean * mean, 0))


@triton.jit
def norm_of(squares, piece, blocks, T: tl.constexpr, BLOCK: tl.constexpr):
    """The root of a piece's squares, summed over its blocks of columns in order."""
    total = tl.full([], 0, tl.float64)
    for begin in range(0, blocks, BLOCK):
        which = begin + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(squares + piece * blocks + which, mask=which < blocks, other=0).to(tl.float64), 0)
    return tl.sqrt(total).to(T)


@triton.jit
def learn(batch, pieces, piece, y, eps, cols, HEIGHT: tl.constexpr, PACK: tl.constexpr):
    """The delta of a piece's class y, whose signed radius is eps, from the batch's mean, a block of columns."""
    T: tl.constexpr = batch.saved.dtype.element_ty
    classes = in_packs(batch.classes, PACK)
    head = tl.load(pieces.heads + piece)
    slot = tl.load(pieces.slot + head)
    if slot >= 0:
        mean = tl.load(pieces.sums + slot * classes + cols, mask=cols < classes, other=0)
        count = tl.load(pieces.heads + pieces.rows + piece).to(T)
    else:
        first = tl.load(pieces.starts + piece)
        last = tl.load(pieces.starts + piece + 1)
        mean = sum_gradients(batch, pieces.order, first, last, y, cols, HEIGHT, PACK)
        count = (last - first).to(T)
    mean = mean / count
    norm = norm_of(pieces.squares, head, tl.num_programs(1), T, 256)
    length = tl.where(eps < 0, -tl.minimum(-eps, norm), eps)
    # 0 for a gradient of 0, and for one that is nan, which then stays in the rows it comes from.
    return tl.where(norm > 0, length / tl.where(norm > 0, norm, 1) * mean, 0)


@triton.jit
def write(
    batch, pieces, bound, deltas, factor, out,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr, HEIGHT: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """A piece, a block of columns: its gradients. ``deltas``, if given, holds the delta of each class."""
    T: tl.constexpr = batch.saved.dtype.element_ty
    classes = in_packs(batch.classes, PACK)
    piece = tl.program_id(0).to(tl.int64)
    first = tl.load(pieces.starts + piece)
    last = tl.load(pieces.starts + piece + 1)
    if first < pieces.rows:
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        y = tl.load(batch.target + tl.load(pieces.order + first))
        kept = y != batch.ignore_index
        y = tl.where(kept, y, 0)
        s = tl.load(batch.numbers)
        share = tl.load(batch.numbers + 1)
        weight_sum = tl.load(batch.numbers + 2)
        eps = tl.where(kept, tl.load(bound + y), 0)
        delta = tl.zeros([BLOCK], T)
        if eps != 0:
            if deltas is not None:
                delta = tl.load(deltas + y * classes + cols, mask=cols < classes, other=0)
            else:
                delta = learn(batch, pieces, piece, y, eps, cols, HEIGHT, PACK)
        own_weight = tl.full([], 1, T)
        if batch.weight is not None:
            own_weight = tl.load(batch.weight + y)
        slope = (1 - s) * own_weight + share * weight_sum
        towards = own_weight * delta - share
        if SMOOTH and batch.weight is not None:
            towards = own_weight * delta - share * tl.load(batch.weight + cols, mask=cols < classes, other=0)
        for begin in range(first, last, HEIGHT):
            places = begin + tl.arange(0, HEIGHT)
            there = places < last
            row = tl.load(pieces.order + places, mask=there, other=0)
            p, rest, mask = probabilities(batch, row, there, cols, T, PACK)
            # Not p - 1: what is left of it near 1 is the probability of the other classes.
            own = share * (weight_sum * p - own_weight) - (1 - s) * own_weight * rest
            g = tl.where(cols[None, :] == y, own + (own_weight * delta)[None, :], slope * p + towards[None, :])
            f = tl.load(factor + row, mask=there, other=0)  # here, or a kernel for sm_100 spills
            g = tl.where(kept, f[:, None] * g, 0)
            store(out, row[:, None] * classes + cols[None, :], g, mask)
