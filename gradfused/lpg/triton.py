"""LPG cross-entropy by gradfused.triton_kernels: on a GPU, or on CPU tensors in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from math import gcd
from typing import Any

import torch
from torch import Tensor

from .. import gpu
from ..backends import triton
from .problem import Kernels, Measured, Perturbation, Problem, check_memory, refuse_stray

#: Elements of a tile, and rows of a piece: what one program sums before another takes over.
TILE, PIECE = 2048, 64
_FEWEST_COLUMNS = 16


@cache
def _kernels() -> Any:
    triton.kernels()  # the layout first
    return import_module("gradfused.triton_kernels.lpg")


def _run(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel where its first argument, a tensor, lies."""
    with gpu.selected(arguments[0].device):
        getattr(_kernels(), name)[grid](*arguments, **constants, **triton.UNFUSED)


def tile(classes: int, wide: torch.dtype) -> tuple[int, int]:
    """Columns and rows of a tile; float64's has half the elements, or its registers would spill."""
    elements = TILE // 2 if wide == torch.float64 else TILE
    columns = max(_FEWEST_COLUMNS, min(elements, 1 << (classes - 1).bit_length()))
    return columns, min(PIECE, elements // columns)


def pack(classes: int, stride: int, size: int) -> int:
    """How many elements of ``size`` bytes an access of at most 16 may take, wherever a row begins and ends."""
    return gcd(classes, stride, 16 // size)


def _shape(problem: Problem, logits: Tensor) -> dict[str, int]:
    """What kernels that go over pieces of rows are compiled for."""
    block, height = tile(problem.classes, problem.wide)
    return {"BLOCK": block, "HEIGHT": height, "PACK": pack(problem.classes, logits.stride(0), logits.itemsize)}


def _readable(tensor: Tensor) -> Tensor:
    """``tensor`` as the kernels want it: bfloat16 as int16 in the interpreter."""
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 and triton.kernels().interpreted else tensor


@dataclass(frozen=True, slots=True)
class _Order:
    """Rows by class: positions in ``order``, and where each class begins in it, (C + 1,)."""

    order: Tensor
    firsts: Tensor


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Runs of one class in the order, and at the end pieces of no rows: their number is known without asking the device.

    Attributes:
        starts: Where each begins, and an end more.
        slot: Where a piece of a class with several adds up, or -1.
        count: In a class's first piece how many it has, else 0.
        heads: The first piece of each one's class; behind them, from index n on, the rows of its class.
    """

    order: Tensor
    starts: Tensor
    slot: Tensor
    count: Tensor
    heads: Tensor
    slots: int

    def __len__(self) -> int:
        return len(self.count)


def _keys(problem: Problem) -> Tensor:
    """Each row's class, C where it is ignored."""
    return torch.where(problem.target == problem.ignore_index, problem.classes, problem.target)


def _by_class(problem: Problem) -> _Order:
    keys, order = _keys(problem).sort(stable=True)
    wanted = torch.arange(problem.classes + 1, dtype=torch.int64, device=keys.device)
    return _Order(order, torch.searchsorted(keys, wanted))


def _pieces(problem: Problem, by_row: bool) -> _Pieces:
    """Cut rows into pieces with operations of fixed shapes, so that nothing waits for the device."""
    n, device = problem.target.numel(), problem.target.device
    at = torch.arange(n, dtype=torch.int64, device=device)
    if by_row:
        ends = torch.arange(n + 1, dtype=torch.int64, device=device)
        ones = torch.ones_like(at)
        return _Pieces(at, ends, torch.full_like(at, -1), ones, torch.cat([at, ones]), 0)
    keys, order = _keys(problem).sort(stable=True)
    change = torch.cat([torch.ones_like(at[:1], dtype=torch.bool), keys[1:] != keys[:-1]])
    begin = torch.where(change, at, 0).cummax(0).values  # of each row's class, in the order
    is_start = (at - begin) % PIECE == 0
    piece = is_start.cumsum(0) - 1
    last = torch.full((n + 1,), n, dtype=torch.int64, device=device)
    starts = last.scatter_reduce(0, piece, at, "amin")
    opened = starts[:-1].clamp_max(max(0, n - 1))
    heads = piece[begin[opened]]
    real = starts[:-1] < n
    class_ends = torch.searchsorted(keys, keys[opened], right=True)
    rows = class_ends - begin[opened]
    pieces = (rows + PIECE - 1) // PIECE
    several = real & (pieces > 1) & (keys[opened] < problem.classes)
    slot = torch.where(several, several.cumsum(0) - 1, -1)
    first = real & (heads == at)
    # A class of several pieces has a full one, of PIECE rows, for each but the last.
    slots = 2 * (n // PIECE)
    return _Pieces(order, starts, slot, torch.where(first, pieces, 0), torch.cat([heads, rows]), slots)


def _numbers(problem: Problem) -> Tensor:
    """Label smoothing, its share of a class, and the weights' sum, where kernels read them in full."""
    made = torch.empty(3, dtype=problem.wide, device=problem.logits.device)
    made[0].fill_(problem.label_smoothing)
    made[1].fill_(problem.label_smoothing / problem.classes)
    if problem.weight is None:
        made[2].fill_(problem.classes)
    else:
        made[2].copy_(problem.weight.double().sum())
    return made


def _rows(problem: Problem) -> tuple[Tensor, Tensor]:
    logits = problem.rows
    check_memory(logits=logits, target=problem.target, weight=problem.weight)
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    return _readable(logits), problem.target.contiguous()


def _check(problem: Problem) -> None:
    """Raise for a target that is no class; on a GPU by an assertion there, as torch does."""
    target = problem.target
    stray = (target != problem.ignore_index) & ((target < 0) | (target >= problem.classes))
    if target.device.type == "cpu":
        if stray.any():
            refuse_stray(problem, int(stray.nonzero()[0]))
    elif target.numel():
        torch._assert_async(~stray.any())


def _tally(problem: Problem, confidence: Tensor, norm: Tensor) -> Tensor:
    by_class = _by_class(problem)
    to = torch.empty(3, problem.classes, dtype=torch.float64, device=confidence.device)
    arguments = (by_class.firsts, by_class.order, confidence, norm, to, problem.classes)
    _run("tally", (problem.classes,), *arguments, BLOCK=256)
    return to


def forward(problem: Problem, tally: bool) -> Measured:
    """One reading of the logits."""
    _check(problem)
    n, classes = problem.target.numel(), problem.classes
    device = problem.logits.device
    logits, target = _rows(problem)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=problem.wide, device=device)

    loss, saved, confidence, norm = new(n), new(n, 4), new(n), new(n)
    counts = torch.zeros(3, classes, dtype=torch.float64, device=device) if tally else None
    if n:
        arguments = (logits, target, problem.weight, _numbers(problem), loss, saved, confidence, norm)
        shape = _shape(problem, logits)
        _run(
            "forward", (n,), *arguments, classes, logits.stride(0), problem.ignore_index,
            SMOOTH=problem.label_smoothing > 0, TALLY=tally, BLOCK=shape["BLOCK"], PACK=shape["PACK"],
        )  # fmt: skip
        counts = _tally(problem, confidence, norm) if tally else None
    kept = target != problem.ignore_index
    weight = kept.double()
    if problem.weight is not None:
        weight = torch.where(kept, problem.weight[torch.where(kept, target, 0)].double(), 0)
    total = torch.stack((loss.double().sum(), weight.sum()))
    return Measured(loss, total, counts, (saved,))


def _along(how: Perturbation) -> Tensor | None:
    """(C,): the closed form as a multiple of each class's given mean."""
    if how.means is None or how.scope == "sample":
        return None
    bound, norm = how.reach(), how.means.norm(dim=1)
    length = torch.where(bound < 0, -torch.minimum(-bound, norm), bound)
    return torch.where(norm > 0, length / norm, 0)


def backward(problem: Problem, saved: tuple[Tensor, ...], factor: Tensor, how: Perturbation) -> Tensor:
    """The perturbed gradient."""
    out = torch.empty(problem.logits.shape, dtype=problem.logits.dtype, device=problem.logits.device)
    if problem.target.numel():
        _write(problem, saved[0], factor, how, _readable(out))
    return out


def _write(problem: Problem, saved: Tensor, factor: Tensor, how: Perturbation, out: Tensor) -> None:
    classes = problem.classes
    logits, target = _rows(problem)
    numbers, bound, along = _numbers(problem), how.reach().contiguous(), _along(how)
    pieces = _pieces(problem, how.scope == "sample")
    shape = _shape(problem, logits)
    grid = (len(pieces), -(-classes // shape["BLOCK"]))
    sums = saved.new_empty(max(1, pieces.slots), classes)
    squares = saved.new_empty(grid)
    if along is None:
        layout = (pieces.order, pieces.starts, pieces.slot)
        if pieces.slots:
            _run("accumulate", grid, logits, target, saved, numbers, *layout, sums, classes, logits.stride(0), **shape)
        _run(
            "measure", grid, logits, target, bound, saved, numbers, *layout, pieces.count, sums, squares, len(target),
            classes, logits.stride(0), problem.ignore_index, **shape,
        )  # fmt: skip
    means = None if along is None or how.means is None else how.means.to(problem.wide).contiguous()
    _run(
        "write", grid, logits, target, problem.weight, bound, means, along, saved, numbers, pieces.order, pieces.starts,
        pieces.slot, pieces.heads, sums, squares, factor, out, len(target), classes, logits.stride(0), factor.stride(0),
        problem.ignore_index, SMOOTH=problem.label_smoothing > 0, **shape,
    )  # fmt: skip


def class_sums(problem: Problem, saved: tuple[Tensor, ...]) -> Tensor:
    """(C, C): the sums of each class's logit gradients."""
    classes = problem.classes
    to = saved[0].new_zeros(classes, classes)
    if not problem.target.numel():
        return to
    logits, target = _rows(problem)
    by_class = _by_class(problem)
    shape = _shape(problem, logits)
    grid = (classes, -(-classes // shape["BLOCK"]))
    _run(
        "class_sums", grid, logits, target, saved[0], _numbers(problem), by_class.order, by_class.firsts, to, classes,
        logits.stride(0), **shape,
    )  # fmt: skip
    return to


KERNELS = Kernels("triton", forward, backward, class_sums)
