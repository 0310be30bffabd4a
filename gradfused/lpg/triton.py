"""LPG cross-entropy by gradfused.triton_kernels: on a GPU, or on CPU tensors in Triton's interpreter."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from math import gcd
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import gpu
from ..backends import triton
from .problem import Measured, Perturbation, Problem, check_memory, find_stray

#: Elements of a tile, and the most rows of a piece.
TILE, PIECE = 2048, 64
_FEWEST_COLUMNS = 16


class Batch(NamedTuple):
    """Rows of logits as kernels read them.

    Attributes:
        logits: (n, C), rows ``stride`` apart.
        target: (n,).
        weight: (C,), or None.
        numbers: The label smoothing, its share for one class, and the sum of the class weights: in memory, since Triton
            would pass float64 arguments as float32.
        saved: (n, 4): the greatest logit, one over the sum of exponentials, and the probability of the classes that are
            not the row's own. The fourth is unused: with rows of three numbers ``write`` spilled registers.
        classes: C.
        stride: From row to row, in elements.
        ignore_index: The target of rows that are ignored.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    numbers: Tensor
    saved: Tensor
    classes: int
    stride: int
    ignore_index: int


class Pieces(NamedTuple):
    """Rows sorted by class and cut into n pieces, the last of which may be empty: their number is known without the device.

    Attributes:
        order: (n,): the rows in their order.
        starts: (n + 1,): where each piece begins in it.
        slot: (n,): the slot of a piece whose class has several, else -1.
        of_class: (n,): how many pieces the class has, at its first piece; 0 at the others.
        heads: (2 * n,): the first piece of each one's class; from n on, the number of rows of its class.
        sums: (slots, C): summed gradients.
        squares: (n, blocks of columns): squares of mean gradients, at the first piece of each class.
        rows: n.
    """

    order: Tensor
    starts: Tensor
    slot: Tensor
    of_class: Tensor
    heads: Tensor
    sums: Tensor
    squares: Tensor
    rows: int


@cache
def _kernels() -> Any:
    triton.kernels()  # sets up the layout that this module's kernels import
    return import_module("gradfused.triton_kernels.lpg")


def _run(device: torch.device, name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel."""
    with gpu.selected(device):
        getattr(_kernels(), name)[grid](*arguments, **constants, **triton.UNFUSED)


def tile(classes: int, wide: torch.dtype) -> tuple[int, int]:
    """Columns and rows of a tile. In float64 it has half the elements, since more would spill registers."""
    elements = TILE // 2 if wide == torch.float64 else TILE
    columns = max(_FEWEST_COLUMNS, min(elements, 1 << (classes - 1).bit_length()))
    return columns, min(PIECE, elements // columns)


def pack(classes: int, stride: int, size: int) -> int:
    """How many elements of ``size`` bytes, 16 bytes at most, may be accessed at once wherever a row begins and ends."""
    return gcd(classes, stride, 16 // size)


def _shape(problem: Problem, batch: Batch) -> dict[str, int]:
    """The constants of kernels that work on tiles."""
    block, height = tile(problem.classes, problem.wide)
    return {"BLOCK": block, "HEIGHT": height, "PACK": pack(batch.classes, batch.stride, batch.logits.itemsize)}


def _blocks(problem: Problem) -> int:
    """How many blocks of columns a row has."""
    return -(-problem.classes // tile(problem.classes, problem.wide)[0])


def _readable(tensor: Tensor) -> Tensor:
    """``tensor`` as kernels read it: in the interpreter bfloat16 as int16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 and triton.kernels().interpreted else tensor


def _sorted(problem: Problem) -> tuple[Tensor, Tensor]:
    """Each row's class, C if it is ignored, in ascending order; and the rows in that order."""
    keys, order = torch.where(problem.target == problem.ignore_index, problem.classes, problem.target).sort(stable=True)
    return keys, order


def _by_class(problem: Problem) -> tuple[Tensor, Tensor]:
    """Rows sorted by class, and where each class begins among them, (C + 1,)."""
    keys, order = _sorted(problem)
    wanted = torch.arange(problem.classes + 1, dtype=torch.int64, device=keys.device)
    return order, torch.searchsorted(keys, wanted)


def _pieces(problem: Problem, by_row: bool) -> Pieces:
    """Cut rows into pieces, in ``by_row`` each by itself, with operations of fixed shapes: nothing waits for the device."""
    n, device = problem.target.numel(), problem.target.device
    squares = torch.empty(n, _blocks(problem), dtype=problem.wide, device=device)
    # A class of several pieces has a full one, of PIECE rows, for each piece but its last.
    sums = torch.empty(0 if by_row else 2 * (n // PIECE), problem.classes, dtype=problem.wide, device=device)
    index = torch.arange(n, dtype=torch.int64, device=device)
    if by_row:
        ends = torch.arange(n + 1, dtype=torch.int64, device=device)
        ones = torch.ones_like(index)
        return Pieces(index, ends, torch.full_like(index, -1), ones, torch.cat([index, ones]), sums, squares, n)
    keys, order = _sorted(problem)
    change = torch.cat([torch.ones_like(index[:1], dtype=torch.bool), keys[1:] != keys[:-1]])
    begin = torch.where(change, index, 0).cummax(0).values  # where the class of each sorted row begins
    is_start = (index - begin) % PIECE == 0
    piece = is_start.cumsum(0) - 1
    starts = torch.full((n + 1,), n, dtype=torch.int64, device=device).scatter_reduce(0, piece, index, "amin")
    opened = starts[:-1].clamp_max(max(0, n - 1))
    heads = piece[begin[opened]]
    real = starts[:-1] < n
    rows = torch.searchsorted(keys, keys[opened], right=True) - begin[opened]
    pieces = (rows + PIECE - 1) // PIECE
    several = real & (pieces > 1) & (keys[opened] < problem.classes)
    slot = torch.where(several, several.cumsum(0) - 1, -1)
    of_class = torch.where(real & (heads == index), pieces, 0)
    return Pieces(order, starts, slot, of_class, torch.cat([heads, rows]), sums, squares, n)


def _batch(problem: Problem, saved: Tensor) -> Batch:
    logits = problem.rows
    check_memory(logits=logits, target=problem.target, weight=problem.weight)
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    s, classes, weight = problem.label_smoothing, problem.classes, problem.weight
    numbers = torch.empty(3, dtype=problem.wide, device=logits.device)
    numbers[0].fill_(s)
    numbers[1].fill_(s / classes)
    numbers[2].copy_(weight.double().sum()) if weight is not None else numbers[2].fill_(classes)
    target = problem.target.contiguous()
    return Batch(_readable(logits), target, weight, numbers, saved, classes, logits.stride(0), problem.ignore_index)


def forward(problem: Problem, tally: bool) -> Measured:
    """Read the logits once."""
    n, classes, device = problem.target.numel(), problem.classes, problem.logits.device
    stray = find_stray(problem)
    if n and device.type != "cpu":
        torch._assert_async(~stray.any())  # as torch does
    loss, saved, confidence, norm = (
        torch.empty(shape, dtype=problem.wide, device=device) for shape in (n, (n, 4), n, n)
    )
    batch = _batch(problem, saved)
    counts = torch.zeros(3, classes, dtype=torch.float64, device=device) if tally else None
    if n:
        shape = _shape(problem, batch)
        smooth = problem.label_smoothing > 0
        _run(device, "forward", (n,), batch, loss, confidence, norm, smooth, shape["BLOCK"], shape["PACK"])
    if n and counts is not None:
        order, firsts = _by_class(problem)
        _run(device, "tally", (classes,), firsts, order, confidence, norm, counts, classes, BLOCK=256)
    kept = problem.target != problem.ignore_index
    weight = kept.double()
    if problem.weight is not None:
        weight = torch.where(kept, problem.weight[torch.where(kept, problem.target, 0)].double(), 0)
    total = torch.stack((loss.double().sum(), weight.sum()))
    return Measured(loss, total, counts, (saved,))


def _deltas(problem: Problem, how: Perturbation, bound: Tensor) -> Tensor | None:
    """Each class's delta, (C, C), where the means are given."""
    if how.means is None or how.scope == "sample":
        return None
    norm = how.means.norm(dim=1)
    length = torch.where(bound < 0, -torch.minimum(-bound, norm), bound)
    return torch.where(norm > 0, length / norm, 0)[:, None] * how.means.to(problem.wide)


def backward(problem: Problem, saved: tuple[Tensor, ...], factor: Tensor, how: Perturbation) -> Tensor:
    """Compute the perturbed gradient."""
    device = problem.logits.device
    out = torch.empty(problem.logits.shape, dtype=problem.logits.dtype, device=device)
    if not problem.target.numel():
        return out
    batch, bound = _batch(problem, saved[0]), how.reachable_bound().contiguous()
    deltas, pieces = _deltas(problem, how, bound), _pieces(problem, how.scope == "sample")
    shape, grid = _shape(problem, batch), (pieces.rows, _blocks(problem))
    if deltas is None:
        if len(pieces.sums):
            _run(device, "accumulate", grid, batch, pieces, **shape)
        _run(device, "measure", grid, batch, pieces, bound, **shape)
    arguments = (batch, pieces, bound, deltas, factor.contiguous(), _readable(out))
    _run(device, "write", grid, *arguments, SMOOTH=problem.label_smoothing > 0, **shape)
    return out


def class_sums(problem: Problem, saved: tuple[Tensor, ...]) -> Tensor:
    """Sum each class's logit gradients, (C, C)."""
    to = saved[0].new_zeros(problem.classes, problem.classes)
    if problem.target.numel():
        batch = _batch(problem, saved[0])
        grid = (problem.classes, _blocks(problem))
        _run(to.device, "class_sums", grid, batch, *_by_class(problem), to, **_shape(problem, batch))
    return to
