"""Checks of the memory behind tensors: whether there is any, whether it is shared, whether it may be written."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from .regions import Item, Region, Search, Undecided, region, repeats

Named = tuple[str, Tensor]
_Span = tuple[int, int, bool, str, Tensor]  # first byte, one past the last, whether it is written, name in messages


def has_values(t: Tensor) -> bool:
    """Whether a tensor holds numbers. On the meta device and under FakeTensorMode it has only a shape and a dtype."""
    try:
        return t.untyped_storage().device.type != "meta"
    except NotImplementedError:  # sparse tensors and tensors on some devices expose no storage
        return True


def address(t: Tensor) -> int:
    """Address of a tensor's first element; 0 without memory of its own: an empty or fake tensor, or a wrapper such as DTensor."""
    return t.data_ptr() if t.numel() and has_values(t) else 0


def _reach(t: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    return t.nbytes if t.is_contiguous() else region(0, t.element_size(), t.shape, t.stride()).span


def bytes_needed(t: Tensor) -> int:
    """Bytes from the start of a tensor's storage to the end of its last element."""
    return int(t.storage_offset()) * t.element_size() + _reach(t) if t.numel() else 0


def has_storage(t: Tensor) -> bool:
    """Whether a tensor's storage is large enough for its elements."""
    return t.untyped_storage().nbytes() >= bytes_needed(t)


def check_storage(name: str, t: Tensor, like: Tensor | None = None) -> None:
    """Raise ValueError if a tensor's storage is too small for it, or if it has no memory of its own although ``like`` has.

    Offloading code frees and resizes storages while tensors still refer to them. A wrapper such as DTensor has no
    memory of its own.
    """
    if not has_values(t) or t.layout != torch.strided:
        return
    if not has_storage(t):
        raise ValueError(
            f"{name}: expected a storage of {bytes_needed(t)} bytes or more, got {t.untyped_storage().nbytes()}: it was "
            "freed or resized. Bring its values back, or assign a new tensor, before the step"
        )
    if t.numel() and like is not None and address(t) == 0 and address(like):
        raise ValueError(
            f"{name}: expected a tensor of the parameter's own kind, {type(like).__name__}, got a {type(t).__name__}: "
            "convert it, with .full_tensor() or distribute_tensor say"
        )


def _region(t: Tensor) -> Region:
    if t.is_contiguous():
        return Region(t.data_ptr(), (), t.nbytes)
    return region(t.data_ptr(), t.element_size(), t.shape, t.stride())


def _check_itself(name: str, t: Tensor) -> None:
    if t.is_contiguous():
        return
    layout = f"(shape {tuple(t.shape)}, strides {t.stride()})"
    try:
        overlaps = repeats(t.shape, t.stride())
    except Undecided:
        raise ValueError(
            f"{name} may overlap itself {layout}: its strides are too tangled to decide; pass a .clone() of it"
        ) from None
    if overlaps:
        raise ValueError(f"{name} overlaps itself {layout}: pass a .clone() of it")


def _refusal(found: Sequence[_Span], sure: bool) -> ValueError:
    (_, _, a_written, a, _), (_, _, b_written, b, _) = found
    how = "overlap in memory" if sure else "may overlap in memory (their strides are too tangled to decide)"
    if a_written and b_written:
        return ValueError(f"{a} and {b} {how}: pass the tensor that holds both, once")
    read, written = (b, a) if a_written else (a, b)
    return ValueError(f"{read} and {written} {how}, and the step writes the latter: assign a .clone() of the former")


def _spans(tensors: Iterable[Named], written: bool) -> Iterator[_Span]:
    """The spans of the tensors that have memory."""
    for name, t in tensors:
        start = address(t)
        if start:
            yield start, start + _reach(t), written, name, t


def _suspects(held: Sequence[_Span]) -> list[_Span]:
    """The spans that meet another one. Most tensors have memory of their own and are looked at no further."""
    found: dict[int, _Span] = {}
    furthest, last = 0, -1
    for i, x in enumerate(held):
        if x[0] < furthest:
            found[last], found[i] = held[last], x
        if x[1] > furthest:
            furthest, last = x[1], i
    return list(found.values())


def check_disjoint(written: Iterable[Named], read: Iterable[Named] = ()) -> None:
    """Raise ValueError if a tensor that a step writes shares memory with another tensor, or two of its elements do.

    Views that interleave without touching, such as the columns of a matrix, are fine, and so are tensors that share
    memory but are only read.
    """
    held = [*_spans(written, True)]
    for _, _, _, name, t in held:
        _check_itself(name, t)
    held += _spans(read, False)
    suspects = _suspects(sorted(held, key=itemgetter(0)))
    items = {(_region(x[4]), i if x[2] else -1): Item(_region(x[4]), i, x[2]) for i, x in enumerate(suspects)}
    try:
        found, sure = Search().clash(list(items.values())), True
    except Undecided as undecided:
        found, sure = undecided.args, False
    if found:
        raise _refusal([suspects[i] for i in found], sure)


def share_memory(tensors: Sequence[Tensor], others: Sequence[Tensor] = ()) -> bool:
    """Whether one of the tensors shares memory with another of them or with one of ``others``, or overlaps itself."""
    try:
        check_disjoint([("", t) for t in tensors], [("", t) for t in others])
    except ValueError:
        return True
    return False


def same_place(a: Tensor, b: Tensor) -> bool:
    """Whether ``a`` and ``b`` are the same memory in the same layout."""
    return address(a) == address(b) != 0 and a.dtype == b.dtype and a.stride() == b.stride()


# ---- memory that cannot be written


def _foreign(t: Tensor) -> bool:
    """Whether torch did not allocate a CPU tensor's memory, which may then be a file that was opened to be read."""
    storage = t.untyped_storage()
    return not storage.resizable() and storage.device.type == "cpu"


def _unwritable() -> list[tuple[int, int]]:
    """Address ranges that this process may read but not write, in order; none where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_bytes().splitlines()
    except OSError:
        return []
    places = (line.split(b" ", 2)[0].split(b"-") for line in lines if line.split(b" ", 2)[1][1:2] != b"w")
    return [(int(first, 16), int(last, 16)) for first, last in places]


def check_writable(tensors: Iterable[Named]) -> None:
    """Raise ValueError if a CPU tensor lies in memory that cannot be written: writing it would end the process."""
    foreign = list(_spans(((name, t) for name, t in tensors if _foreign(t)), written=True))
    barred = _unwritable() if foreign else []
    for first, last, _, name, _ in foreign:
        at = bisect_right(barred, (last, 0)) - 1
        if at >= 0 and barred[at][1] > first:
            raise ValueError(
                f"{name} lies in memory that can only be read, such as a file that was mapped so: pass a .clone() of it"
            )
