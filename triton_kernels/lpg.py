"""LPG cross-entropy: rows of logits in, perturbed gradient out, no softmax in memory.

Rows are visited by class, in *pieces*: runs of one class in the sorted order, of at most a fixed number of rows. ``starts[i]``
is where piece i begins in that order; pieces beyond the last begin at the end. A class of several pieces adds up its
gradients in slots.

``saved`` holds four numbers a row: the greatest logit, one over the sum of exponentials, and of the other classes the
probability and the sum of its squares. ``numbers`` holds the label smoothing, its share of each class, and the sum of the
class weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import narrow_bfloat16, widen_bfloat16


@triton.jit
def load(pointer, where, mask, other, T: tl.constexpr):
    """Logits, in T. The interpreter is given bfloat16 as int16: it rounds it otherwise than hardware."""
    if at.INTERPRETED and pointer.dtype.element_ty == tl.int16:
        x = widen_bfloat16(tl.load(pointer + where, mask=mask, other=0)).to(T)
        return tl.where(mask, x, other)
    else:
        return tl.load(pointer + where, mask=mask, other=other).to(T)


@triton.jit
def store(pointer, where, x, mask):
    """The gradient, rounded."""
    if at.INTERPRETED and pointer.dtype.element_ty == tl.int16:
        tl.store(pointer + where, narrow_bfloat16(x.to(tl.float32)), mask=mask)
    else:
        tl.store(pointer + where, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def in_packs(n, PACK: tl.constexpr):
    """A multiple of ``PACK``, which the compiler thereby knows it to be: else rows are accessed an element at a time."""
    return n // PACK * PACK


@triton.jit
def log_of_one_and(x):
    """log(1 + x) for x of 0 or more, exact where 1 + x is 1."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1, u - 1)))


@triton.jit
def of_own_class(own, rest, numbers):
    """The gradient for a row's own class, from the smaller of its probability and the others': no difference of large ones."""
    s = tl.load(numbers)
    share = tl.load(numbers + 1)
    return tl.where(own < rest, own - (1 - s + share), s - share - rest)


@triton.jit
def forward(
    logits, target, weight, numbers, loss, saved, confidence, norm, classes, stride, ignore_index,
    SMOOTH: tl.constexpr, TALLY: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """One row: its loss in one reading, block by block with a running maximum."""
    T: tl.constexpr = loss.dtype.element_ty
    classes = in_packs(classes, PACK)
    stride = in_packs(stride, PACK)
    row = tl.program_id(0).to(tl.int64)
    kept = tl.load(target + row) != ignore_index
    y = tl.where(kept, tl.load(target + row), 0)
    x0 = logits + row * stride
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
            if weight is not None:
                d = d * tl.load(weight + cols, mask=inside, other=0)
            weighted += tl.sum(d, 0)
    own_logit = load(x0, y, kept, 0.0, T)
    own = tl.exp(own_logit - greatest)
    total = others + own
    rest = others / total
    log_sum = tl.where(own == 1, log_of_one_and(others), tl.log(total))
    found = log_sum + (greatest - own_logit)
    if weight is not None:
        found = found * tl.load(weight + y)
    if SMOOTH:
        s = tl.load(numbers)
        share = tl.load(numbers + 1)
        found = tl.where(s == 1, 0, (1 - s) * found)
        found += share * (tl.load(numbers + 2) * (log_sum + (greatest - origin)) - weighted)
    tl.store(loss + row, tl.where(kept, found, 0))
    tl.store(saved + row * 4, greatest)
    tl.store(saved + row * 4 + 1, 1 / total)
    tl.store(saved + row * 4 + 2, rest)
    tl.store(saved + row * 4 + 3, squares / (total * total))
    if TALLY:
        tl.store(confidence + row, own / total)
        of_others = squares / (total * total)
        of_own = of_own_class(own / total, rest, numbers)
        if SMOOTH:
            share = tl.load(numbers + 1)
            of_others += share * (share * (classes - 1) - 2 * rest)
        tl.store(norm + row, tl.sqrt(tl.maximum(of_others, 0) + of_own * of_own))


@triton.jit
def gradients(
    logits, saved, order, first, last, y, cols, classes, stride, numbers, T: tl.constexpr, HEIGHT: tl.constexpr
):
    """The summed gradients of rows ``order[first:last]``, of class y, by column.

    Summed probabilities would leave their rounding errors where gradients are small beside them.
    """
    sums = tl.zeros([cols.shape[0]], T)
    share = tl.load(numbers + 1)
    inside = cols < classes
    for begin in range(first, last, HEIGHT):
        places = begin + tl.arange(0, HEIGHT)
        there = places < last
        rows = tl.load(order + places, mask=there, other=0)
        greatest = tl.load(saved + rows * 4, mask=there, other=0)
        scale = tl.load(saved + rows * 4 + 1, mask=there, other=0)
        mask = there[:, None] & inside[None, :]
        x = load(logits, rows[:, None] * stride + cols[None, :], mask, float("-inf"), T)
        rest = tl.load(saved + rows * 4 + 2, mask=there, other=0)
        p = tl.exp(x - greatest[:, None]) * scale[:, None]
        g = tl.where(cols[None, :] == y, of_own_class(p, rest[:, None], numbers), p - share)
        sums += tl.sum(tl.where(mask, g, 0), 0)
    return sums


@triton.jit
def class_sums(
    logits, target, saved, numbers, order, firsts, to, classes, stride,
    BLOCK: tl.constexpr, HEIGHT: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """One class's summed logit gradients, a block of columns: ``firsts[c]`` is where class c begins in the order."""
    T: tl.constexpr = to.dtype.element_ty
    classes = in_packs(classes, PACK)
    stride = in_packs(stride, PACK)
    y = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(firsts + y)
    last = tl.load(firsts + y + 1)
    sums = gradients(logits, saved, order, first, last, y, cols, classes, stride, numbers, T, HEIGHT)
    tl.store(to + y * classes + cols, sums, mask=cols < classes)


@triton.jit
def tally(firsts, order, confidence, norm, to, classes, BLOCK: tl.constexpr):
    """One class's rows: their number, summed confidence and norm."""
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
def accumulate(
    logits, target, saved, numbers, order, starts, slot, sums, classes, stride,
    BLOCK: tl.constexpr, HEIGHT: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """A piece of a class that has several: its sums into its slot, a block of columns. Others have slot -1."""
    T: tl.constexpr = sums.dtype.element_ty
    classes = in_packs(classes, PACK)
    stride = in_packs(stride, PACK)
    piece = tl.program_id(0).to(tl.int64)
    mine = tl.load(slot + piece)
    if mine >= 0:
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        first = tl.load(starts + piece)
        last = tl.load(starts + piece + 1)
        y = tl.load(target + tl.load(order + first))
        found = gradients(logits, saved, order, first, last, y, cols, classes, stride, numbers, T, HEIGHT)
        tl.store(sums + mine * classes + cols, found, mask=cols < classes)


@triton.jit
def measure(
    logits, target, bound, saved, numbers, order, starts, slot, pieces, sums, squares, rows, classes, stride,
    ignore_index, BLOCK: tl.constexpr, HEIGHT: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """The first piece of a class: the squares of its mean gradient, a block of columns; slots are added up into the first.

    ``pieces`` holds for each piece how many the class has from there on in the first, else 0.
    """
    T: tl.constexpr = saved.dtype.element_ty
    classes = in_packs(classes, PACK)
    stride = in_packs(stride, PACK)
    piece = tl.program_id(0).to(tl.int64)
    count = tl.load(pieces + piece)
    first = tl.load(starts + piece)
    if count > 0 and first < rows:
        y = tl.load(target + tl.load(order + first))
        if y != ignore_index:
            if tl.load(bound + y) != 0:
                cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
                inside = cols < classes
                mine = tl.load(slot + piece)
                last = tl.load(starts + piece + count)
                if mine >= 0:
                    total = tl.zeros([BLOCK], tl.float64)
                    for k in range(count):
                        total += tl.load(sums + (mine + k) * classes + cols, mask=inside, other=0).to(tl.float64)
                    mean = total.to(T)
                    tl.store(sums + mine * classes + cols, mean, mask=inside)
                else:
                    mean = gradients(logits, saved, order, first, last, y, cols, classes, stride, numbers, T, HEIGHT)
                mean = tl.where(inside, mean / (last - first).to(T), 0)
                tl.store(squares + piece * tl.num_programs(1) + tl.program_id(1), tl.sum(mean * mean, 0))


@triton.jit
def norm_of(squares, piece, blocks, T: tl.constexpr, BLOCK: tl.constexpr):
    """The root of a piece's squares, summed over the blocks of columns in order."""
    total = tl.full([], 0, tl.float64)
    for begin in range(0, blocks, BLOCK):
        which = begin + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(squares + piece * blocks + which, mask=which < blocks, other=0).to(tl.float64), 0)
    return tl.sqrt(total).to(T)


@triton.jit
def write(
    logits, target, weight, bound, means, along, saved, numbers, order, starts, slot, heads, sums, squares, factor, out,
    rows, classes, stride, factor_stride, ignore_index,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr, HEIGHT: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """A piece's gradients, a block of columns. ``heads`` names the first piece of each one's class."""
    T: tl.constexpr = saved.dtype.element_ty
    classes = in_packs(classes, PACK)
    stride = in_packs(stride, PACK)
    piece = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + piece)
    last = tl.load(starts + piece + 1)
    if first < rows:
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = cols < classes
        y = tl.load(target + tl.load(order + first))
        kept = y != ignore_index
        y = tl.where(kept, y, 0)
        s = tl.load(numbers)
        share = tl.load(numbers + 1)
        eps = tl.where(kept, tl.load(bound + y), 0)
        delta = tl.zeros([BLOCK], T)
        if eps != 0:
            if means is not None:
                delta = tl.load(means + y * classes + cols, mask=inside, other=0)
                delta = tl.load(along + y) * delta
            else:
                head = tl.load(heads + piece)
                mine = tl.load(slot + head)
                if mine >= 0:
                    mean = tl.load(sums + mine * classes + cols, mask=inside, other=0)
                    count = tl.load(heads + rows + piece).to(T)
                else:
                    mean = gradients(logits, saved, order, first, last, y, cols, classes, stride, numbers, T, HEIGHT)
                    count = (last - first).to(T)
                mean = mean / count
                norm = norm_of(squares, head, tl.num_programs(1), T, 256)
                length = tl.where(eps < 0, -tl.minimum(-eps, norm), eps)
                # 0 where the gradient is, and where it is no number: that stays with the rows it comes from.
                delta = tl.where(norm > 0, length / tl.where(norm > 0, norm, 1) * mean, 0)
        own_weight = tl.full([], 1, T)
        if weight is not None:
            own_weight = tl.load(weight + y)
        slope = (1 - s) * own_weight + share * tl.load(numbers + 2)
        towards = own_weight * delta - share
        if SMOOTH and weight is not None:
            towards = own_weight * delta - share * tl.load(weight + cols, mask=inside, other=0)
        for begin in range(first, last, HEIGHT):
            places = begin + tl.arange(0, HEIGHT)
            there = places < last
            row = tl.load(order + places, mask=there, other=0)
            mask = there[:, None] & inside[None, :]
            where = row[:, None] * stride + cols[None, :]
            greatest = tl.load(saved + row * 4, mask=there, other=0)
            scale = tl.load(saved + row * 4 + 1, mask=there, other=0)
            rest = tl.load(saved + row * 4 + 2, mask=there, other=0)
            f = tl.load(factor + row * factor_stride, mask=there, other=0)
            x = load(logits, where, mask, float("-inf"), T)
            p = tl.exp(x - greatest[:, None]) * scale[:, None]
            # Not p - 1: what is left of it near 1 is the other classes' probability.
            own = share * (tl.load(numbers + 2) * p - own_weight) - ((1 - s) * own_weight * rest)[:, None]
            g = tl.where(cols[None, :] == y, own + (own_weight * delta)[None, :], slope * p + towards[None, :])
            g = tl.where(kept, f[:, None] * g, 0)
            store(out, row[:, None] * classes + cols[None, :], g, mask)
