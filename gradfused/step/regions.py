"""The bytes that strided tensors touch, and whether two of many tensors share one: decided by their strides alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import gcd
from typing import TypeVar

#: Up to so many regions are compared each with each; more are sorted first.
_FEW = 6
#: Limits of one search in comparisons of two regions, and of one comparison in sums. Models take a few of each.
MOST_PAIRS, MOST_SUMS = 50_000, 5_000

Loop = tuple[int, int]
Term = tuple[int, int, int]
_T = TypeVar("_T")


class Undecided(Exception):
    """Within the limits of a search it could not be decided whether two regions, whose owners are given, share a byte."""


@dataclass(frozen=True, slots=True)
class Region:
    """A set of bytes: runs of adjacent bytes that begin at ``start`` plus a sum of i * stride, i < count, over the loops.

    Attributes:
        loops: (count, stride), the longest stride first.
        run: Bytes in a run.
    """

    start: int
    loops: tuple[Loop, ...]
    run: int

    @property
    def end(self) -> int:
        """One past its last byte."""
        return self.start + self.run + sum((count - 1) * stride for count, stride in self.loops)

    @property
    def span(self) -> int:
        """Bytes from its first to its last."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Item:
    """A region and its owner.

    Attributes:
        written: No other owner may touch the region. Regions that are only read may share bytes.
    """

    region: Region
    owner: int
    written: bool


def region(start: int, size: int, shape: Sequence[int], strides: Sequence[int]) -> Region:
    """The bytes of a tensor whose elements have ``size`` bytes; strides are in elements."""
    run, loops = size, list[Loop]()
    for stride, count in sorted((s * size, n) for n, s in zip(shape, strides, strict=True) if n > 1 and s > 0):
        if not loops and stride <= run:
            run += (count - 1) * stride
        elif loops and stride % loops[-1][1] == 0 and stride <= loops[-1][0] * loops[-1][1]:
            inner, step = loops.pop()
            loops.append((inner + (count - 1) * (stride // step), step))
        else:
            loops.append((count, stride))
    return Region(start, tuple(reversed(loops)), run)


# ---- one or two regions


def repeats(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements of a tensor share memory. Raises Undecided."""
    dims = sorted(((s, n) for n, s in zip(shape, strides, strict=True) if n > 1), reverse=True)
    if dims and dims[-1][0] == 0:
        return True
    terms: list[Term] = [(s, 1 - n, n - 1) for s, n in dims]
    reach = 0
    for stride, _, most in reversed(terms):
        if stride <= reach:
            break
        reach += most * stride
    else:  # each dim steps over everything that the dims of shorter strides reach
        return False
    work = [MOST_SUMS]
    # Two index tuples that differ first in dim i, counted from the longest stride, by 1 or more.
    return any(_reaches([(s, 1, most), *terms[i + 1 :]], 0, 0, work) for i, (s, _, most) in enumerate(terms))


def meet(a: Region, b: Region) -> bool:
    """Whether two regions have a byte in common. Raises Undecided."""
    if a.end <= b.start or b.end <= a.start:
        return False
    ranges: dict[int, tuple[int, int]] = {}
    for count, stride in a.loops:
        ranges[stride] = (0, count - 1)
    for count, stride in b.loops:
        least, most = ranges.get(stride, (0, 0))
        ranges[stride] = (least - count + 1, most)
    terms = [(stride, *ranges[stride]) for stride in sorted(ranges, reverse=True)]
    apart = b.start - a.start
    return _reaches(terms, apart - a.run + 1, apart + b.run - 1, [MOST_SUMS])


def _reaches(terms: Sequence[Term], lo: int, hi: int, work: list[int]) -> bool:
    """Whether a sum of x * stride over terms (stride, least x, most x) can lie in [lo, hi]. Strides fall."""
    work[0] -= 1
    if work[0] < 0:
        raise Undecided
    least, most = sum(s * a for s, a, _ in terms), sum(s * b for s, _, b in terms)
    if hi < least or lo > most or any(a > b for _, a, b in terms):
        return False
    step = gcd(*(s for s, _, _ in terms)) or 1
    if hi // step * step < lo:
        return False
    if not terms:
        return True
    if len(terms) == 1:
        ((s, a, b),) = terms
        return max(a, -(-lo // s)) <= min(b, hi // s)
    if len(terms) == 2:
        return _two_reach(terms[0], terms[1], lo, hi)
    s, a, b = terms[0]
    first, last = max(a, -(-(lo - most + s * b) // s)), min(b, (hi - least + s * a) // s)
    return any(_reaches(terms[1:], lo - x * s, hi - x * s, work) for x in range(first, last + 1))


def _two_reach(one: Term, other: Term, lo: int, hi: int) -> bool:
    """``_reaches`` for two terms, in a number of steps that grows with the number of digits of the strides."""
    (s, a, b), (t, c, d) = one, other
    first, last = max(a, -(-(lo - d * t) // s)), min(b, (hi - c * t) // s)
    if first > last:
        return False
    # For these x, if there is a multiple of t in [lo - x * s, hi - x * s], there is one that the other term reaches.
    from_, width = -(hi - first * s) % t, hi - lo
    if from_ == 0 or from_ + width >= t:
        return True
    x = _first_within(-s % t, t, from_, from_ + width)
    return x is not None and first + x <= last


def _first_within(a: int, m: int, lo: int, hi: int) -> int | None:
    """The least x >= 0 with lo <= a * x mod m <= hi, for 0 < lo <= hi < m, by Euclid's algorithm."""
    if a == 0:
        return None
    if 2 * a > m:
        a, lo, hi = m - a, m - hi, m - lo
    x = -(-lo // a)
    if x * a <= hi:
        return x
    y = _first_within(m % a, a, -hi % a, -lo % a)
    return None if y is None else -(-(lo + m * y) // a)


# ---- many regions


class Search:
    """A search among many regions for two that share a byte and of which one is written.

    Attributes:
        pairs: The number of comparisons of two regions so far.
    """

    def __init__(self) -> None:
        self.pairs = 0

    def clash(self, items: Sequence[Item]) -> tuple[int, int] | None:
        """The owners of two such regions, or None. Raises Undecided(one owner, the other)."""
        for cluster in _clusters(items, lambda x: x.region.start, lambda x: x.region.end):
            if _matters(cluster):
                found = self._clash_of_cluster(cluster)
                if found:
                    return found
        return None

    def _clash_of_cluster(self, items: list[Item]) -> tuple[int, int] | None:
        periods = Counter(x.region.loops[0][1] for x in items if x.region.loops)
        if len(items) <= _FEW or not periods:
            return self._clash_of_pairs(items)
        period, base = periods.most_common(1)[0][0], min(x.region.start for x in items)
        tiles, odd, regular = list[_Tile](), list[Item](), list[Item]()
        for x in items:
            parts = list(_tiles(x, base, period))
            tiles += parts
            (regular if parts else odd).append(x)
        found = self._clash_of_tiles(tiles)
        for i, x in enumerate(odd):
            for y in (*odd[i + 1 :], *regular):
                found = found or self._compare(x, y)
        return found

    def _clash_of_pairs(self, items: list[Item]) -> tuple[int, int] | None:
        active: list[Item] = []
        for x in sorted(items, key=lambda x: x.region.start):
            active = [y for y in active if y.region.end > x.region.start]
            for y in active:
                if found := self._compare(y, x):
                    return found
            active.append(x)
        return None

    def _clash_of_tiles(self, tiles: list[_Tile]) -> tuple[int, int] | None:
        waiting = [tiles]
        while waiting:
            group = waiting.pop()
            if not _matters([tile.item for tile in group]):
                continue
            parts = _clusters(group, lambda t: t.item.region.start, lambda t: t.item.region.end)
            if len(parts) == 1:
                parts = _clusters(group, lambda t: t.top, lambda t: t.bottom)
            if len(parts) > 1:
                waiting += parts
                continue
            same_rows = max(t.top for t in group) < min(t.bottom for t in group)
            found = self.clash([t.item for t in group]) if same_rows else self._clash_of_few_tiles(group)
            if found:
                return found
        return None

    def _clash_of_few_tiles(self, tiles: list[_Tile]) -> tuple[int, int] | None:
        for a, b in combinations(tiles, 2):
            if a.top < b.bottom and b.top < a.bottom and (found := self._compare(a.item, b.item)):
                return found
        return None

    def _compare(self, a: Item, b: Item) -> tuple[int, int] | None:
        if a.owner == b.owner or not (a.written or b.written):
            return None
        self.pairs += 1
        try:
            if self.pairs > MOST_PAIRS:
                raise Undecided
            return (a.owner, b.owner) if meet(a.region, b.region) else None
        except Undecided:
            raise Undecided(a.owner, b.owner) from None


@dataclass(frozen=True, slots=True)
class _Tile:
    """Part of a region, with memory seen as rows of one length: the same bytes in each of rows ``top`` to ``bottom - 1``."""

    item: Item
    top: int
    bottom: int


def _tiles(x: Item, base: int, length: int) -> Iterator[_Tile]:
    """A region as tiles in rows of ``length`` bytes from ``base`` on; none if it is not a union of a few tiles."""
    r = x.region
    top, at = divmod(r.start - base, length)
    count, loops = (r.loops[0][0], r.loops[1:]) if r.loops and r.loops[0][1] == length else (1, r.loops)
    if not r.loops and r.run > length:
        yield from _tiles_of_run(x, top, at, length)
        return
    inner = Region(at, loops, r.run)
    if inner.span > length:
        return
    yield _Tile(replace(x, region=inner), top, top + count)
    if inner.end > length:  # it reaches into the next row, and is a tile there too
        yield _Tile(replace(x, region=replace(inner, start=at - length)), top + 1, top + count + 1)


def _tiles_of_run(x: Item, top: int, at: int, length: int) -> Iterator[_Tile]:
    last, rest = divmod(at + x.region.run, length)
    whole = top + (1 if at else 0)
    parts = ((top, whole, at, length - at), (whole, top + last, 0, length), (top + last, top + last + 1, 0, rest))
    for first, end, start, run in parts:
        if first < end and run:
            yield _Tile(replace(x, region=Region(start, (), run)), first, end)


def _matters(items: Sequence[Item]) -> bool:
    """Whether the items have two owners or more and any is written."""
    return len(items) > 1 and any(x.written for x in items) and any(x.owner != items[0].owner for x in items)


def _clusters(things: Sequence[_T], start: Callable[[_T], int], end: Callable[[_T], int]) -> list[list[_T]]:
    """The things grouped so that no interval of a group meets an interval of another group."""
    found: list[list[_T]] = []
    furthest = 0
    for x in sorted(things, key=start):
        if not found or start(x) >= furthest:
            found.append([])
            furthest = end(x)
        found[-1].append(x)
        furthest = max(furthest, end(x))
    return found
