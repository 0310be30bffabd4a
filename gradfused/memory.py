"""Which tensors share memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _span(t: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that ``t`` may touch."""
    first = t.data_ptr()
    if t.is_contiguous():
        return first, first + t.nbytes
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return first, first + (reach + 1) * t.element_size()


def _touched(t: Tensor, start: int, items: int) -> Tensor:
    """How often ``t`` touches each of ``items`` places from address ``start``."""
    places = torch.arange(items, dtype=torch.int64, device="cpu").as_strided(
        t.shape, t.stride(), (t.data_ptr() - start) // t.element_size()
    )
    return torch.bincount(places.flatten(), minlength=items)


def _is_plain(t: Tensor) -> bool:
    """Dense in memory, so no element lies on another."""
    if t.is_contiguous():
        return True
    first, last = _span(t)
    return bool(t.nbytes == last - first and torch._debug_has_internal_overlap(t) != 1)


def _share_elements(a: Tensor, b: Tensor) -> bool:
    (a0, a1), (b0, b1) = _span(a), _span(b)
    size = a.element_size()
    if (_is_plain(a) and _is_plain(b)) or b.element_size() != size or (a0 - b0) % size:
        return True  # the spans overlap and at least one fills its own
    start, items = min(a0, b0), (max(a1, b1) - min(a0, b0)) // size
    return bool(((_touched(a, start, items) > 0) & (_touched(b, start, items) > 0)).any())


def check_disjoint(tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Raise ValueError if two of the tensors that a step writes, or two elements of one, share memory.

    Views that interleave without touching, such as the columns of a matrix, are fine.
    """
    # A wrapper such as DTensor has no memory of its own, and address 0.
    with_memory = ((name, t) for name, t in tensors if t.numel() and t.data_ptr())
    spans = sorted(((*_span(t), name, t) for name, t in with_memory), key=lambda x: x[:2])
    active: list[tuple[int, int, str, Tensor]] = []
    for first, last, name, t in spans:
        if not _is_plain(t) and bool((_touched(t, first, (last - first) // t.element_size()) > 1).any()):
            raise ValueError(
                f"{name} overlaps itself (shape {tuple(t.shape)}, strides {t.stride()}): pass a .clone() of it"
            )
        active = [x for x in active if x[1] > first]
        for _, _, other_name, other in active:
            if _share_elements(other, t):
                raise ValueError(f"{other_name} and {name} overlap in memory: pass the tensor that holds both, once")
        active.append((first, last, name, t))


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether two of the tensors, or two elements of one, share memory."""
    try:
        check_disjoint([("", t) for t in tensors])
    except ValueError:
        return True
    return False
