"""Which views of a storage share memory: compared with sets of bytes, and with how much work."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradfused.step import memory, regions
from gradfused.step.regions import Item, Search, meet, region, repeats

Layout = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # start, size of an element, shape, strides


def elements(layout: Layout) -> list[int]:
    """The first byte of each element."""
    start, size, shape, strides = layout
    return [start + size * sum(i * s for i, s in zip(at, strides, strict=True)) for at in product(*map(range, shape))]


def touched(layout: Layout) -> set[int]:
    return {first + byte for first in elements(layout) for byte in range(layout[1])}


@st.composite
def layouts(draw: st.DrawFn, most: int = 24) -> Layout:
    """Any layout: the strides need not be those of a slice of a matrix."""
    size = draw(st.sampled_from([1, 2, 4]))
    dims = draw(st.integers(0, 4))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=dims, max_size=dims)))
    strides = tuple(draw(st.lists(st.integers(0, most), min_size=dims, max_size=dims)))
    return size * draw(st.integers(0, 60)), size, shape, strides


@st.composite
def slices(draw: st.DrawFn) -> Layout:
    """Layouts that slicing, stepping, diagonals and transposing make from a small array."""
    base = torch.empty(draw(st.sampled_from([(120,), (6, 20), (10, 12), (2, 5, 12), (4, 3, 2, 5)])), dtype=torch.int8)
    cuts = tuple(
        slice(draw(st.integers(0, n - 1)), draw(st.integers(1, n)), draw(st.integers(1, 3))) for n in base.shape
    )
    t = base[cuts]
    if t.dim() > 1 and draw(st.booleans()):
        t = t.transpose(0, 1)
    if t.dim() > 1 and 0 not in t.shape and draw(st.booleans()):
        t = t.diagonal(draw(st.integers(0, t.shape[1] - 1)))
    return t.storage_offset(), 1, tuple(t.shape), t.stride()


@settings(max_examples=300)
@given(layouts())
@example((0, 4, (2, 2), (3, 2)))
@example((0, 4, (4, 3), (2, 1)))
def test_a_region_has_the_bytes_of_its_tensor(layout: Layout) -> None:
    r = region(*layout)
    runs = elements((0, 1, tuple(n for n, _ in r.loops), tuple(s for _, s in r.loops)))
    assert {r.start + first + byte for first in runs for byte in range(r.run)} == touched(layout)
    assert (r.start, r.end) == (min(touched(layout)), max(touched(layout)) + 1)
    assert repeats(*layout[2:]) == (len(set(elements(layout))) < len(elements(layout)))


@settings(max_examples=500)
@given(layouts(), layouts())
def test_two_regions_meet_where_their_bytes_do(a: Layout, b: Layout) -> None:
    assert meet(region(*a), region(*b)) == bool(touched(a) & touched(b))


@settings(max_examples=500)
@given(st.lists(st.tuples(st.one_of(slices(), slices(), layouts(40)), st.booleans()), min_size=2, max_size=14))
def test_a_search_finds_a_clash_where_there_is_one(found: list[tuple[Layout, bool]]) -> None:
    """Among many views a clash is found without comparing each with each; which of several is found does not matter."""
    found = [(layout, written) for layout, written in found if 0 not in layout[2]]
    sets = [touched(layout) for layout, _ in found]
    clashing = {
        (i, j)
        for i, j in product(range(len(found)), repeat=2)
        if i != j and (found[i][1] or found[j][1]) and sets[i] & sets[j]
    }
    clash = Search().clash([Item(region(*layout), i, written) for i, (layout, written) in enumerate(found)])
    assert clash in clashing if clashing else clash is None


@st.composite
def cut(draw: st.DrawFn, block: tuple[slice, ...]) -> list[tuple[slice, ...]]:
    """A block of an array cut in two, and each part again: pieces that fit together without gaps."""
    dim = draw(st.integers(0, len(block) - 1))
    first, last, step = block[dim].start, block[dim].stop, block[dim].step
    if draw(st.integers(0, 3)) == 0 or last - first <= step:
        return [block]
    if draw(st.booleans()) and step < 4:
        halves = slice(first, last, 2 * step), slice(first + step, last, 2 * step)
    else:
        at = first + step * draw(st.integers(1, (last - first - 1) // step))
        halves = slice(first, at, step), slice(at, last, step)
    return [p for half in halves for p in draw(cut((*block[:dim], half, *block[dim + 1 :])))]


@settings(max_examples=300)
@given(st.data())
def test_pieces_of_one_array(data: st.DataObject) -> None:
    """The pieces do not clash. Moved by one element some of them do, and that is found."""
    base = torch.empty(data.draw(st.sampled_from([(64,), (8, 12), (12, 8), (4, 5, 6), (3, 4, 2, 5)])))
    pieces = [base[p] for p in data.draw(cut(tuple(slice(0, n, 1) for n in base.shape)))]
    assert not memory.share_memory(pieces)
    moved = data.draw(st.integers(0, len(pieces) - 1))
    piece = pieces[moved]
    if piece.storage_offset() == 0:
        return
    strayed = piece.as_strided(piece.shape, piece.stride(), piece.storage_offset() - 1)
    assert memory.share_memory([*pieces[:moved], strayed, *pieces[moved + 1 :]])


# ---- the amount of work

MATRIX = torch.empty(2048, 2048)
MANY: dict[str, Callable[[int], list[Tensor]]] = {
    "rows": lambda k: list(MATRIX[: 2048 // k * k].chunk(k)),
    "columns": lambda k: list(MATRIX[:, : 2048 // k * k].chunk(k, dim=1)),
    "columns with gaps": lambda k: [MATRIX[:, i * (2048 // k) :][:, : max(1, 2048 // k - 1)] for i in range(k)],
    "columns of a part": lambda k: list(MATRIX[100:900, 7 : 7 + 2000 // k * k].chunk(k, dim=1)),
    "transposed": lambda k: [c.t() for c in MATRIX[:, : 2048 // k * k].chunk(k, dim=1)],
    "diagonals": lambda k: [MATRIX.diagonal(i - k // 2) for i in range(k)],
    "interleaved": lambda k: [MATRIX.view(-1)[i::k] for i in range(k)],
    "interleaved runs": lambda k: [MATRIX.view(-1)[: 4_000_000].view(-1, 4 * k)[:, 4 * i :][:, :4] for i in range(k)],
    "interleaved in two dims": lambda k: [MATRIX[i % 32 :: 32, i // 32 :: 64] for i in range(k)],
    "tiles": lambda k: [MATRIX[i % 32 * 64 :, i // 32 * 64 :][:64, :64] for i in range(k)],
    "units, rows and runs of rows": lambda k: [
        MATRIX[i * 2 : i * 2 + 1, 5:] if i % 2 else MATRIX.view(-1)[i * 4096 :][:4096] for i in range(k)
    ],
    "inner blocks": lambda k: list(MATRIX.view(64, 1024, 64)[:, : 1024 // k * k].chunk(k, dim=1)),
}  # fmt: skip


@pytest.mark.parametrize("count", [2, 16, 1000])
@pytest.mark.parametrize("views", MANY)
def test_work_grows_with_the_number_of_views_alone(views: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows neither with the square of their number nor with their bytes: few are compared, and none is written out."""
    compared, sums = [], []
    monkeypatch.setattr(regions, "meet", lambda a, b: compared.append((a, b)) or meet(a, b))
    reaches = regions._reaches
    monkeypatch.setattr(regions, "_reaches", lambda *x: sums.append(x) or reaches(*x))
    made = MANY[views](count)
    assert len(made) == count
    assert not memory.share_memory(made)
    assert len(compared) <= count
    assert len(sums) <= 4 * count
    sums.clear()
    last = made[-1]
    assert memory.share_memory([*made, last.flatten()[-1:] if last.is_contiguous() else last[..., -1:]])
    assert len(compared) <= 4 * count


@pytest.mark.parametrize("count", [2, 16, 1000])
def test_one_written_element_among_many_views_that_are_read(count: int) -> None:
    """Gradients may share memory with each other, as expanded and tied ones do, but not with anything that is written."""
    read = [torch.empty(1).expand(7) for _ in range(count)] + [MATRIX[0:3].expand(3, 2048)] * count
    aside = [MATRIX[3 + i] for i in range(count)]
    assert not memory.share_memory(aside, read)
    assert memory.share_memory([*aside, MATRIX[2, 2047:]], read)


@pytest.mark.parametrize("limit", ["MOST_PAIRS", "MOST_SUMS"])
def test_what_cannot_be_decided_is_refused_and_said(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, limit, 0)
    views = [("weight", MATRIX[:, :5]), ("bias", MATRIX[:, 9:11])]
    with pytest.raises(ValueError, match=r"weight and bias may overlap in memory \(their strides are too tangled"):
        memory.check_disjoint(views)
    with pytest.raises(ValueError, match=r"gradient and weight may overlap in memory .*, and the step writes the lat"):
        memory.check_disjoint([("weight", MATRIX[:, :5])], [("gradient", MATRIX[:, 9:11])])


def test_a_tensor_that_may_overlap_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "MOST_SUMS", 0)
    tangled = torch.empty(100).as_strided((2, 2, 2), (5, 4, 2))
    with pytest.raises(ValueError, match=r"w may overlap itself \(shape \(2, 2, 2\), strides \(5, 4, 2\)\): .*clone"):
        memory.check_disjoint([("w", tangled)])
