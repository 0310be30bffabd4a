"""LPG cross-entropy by the native CPU module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.cpu import native as native_module
from ..backends.native import DTYPES
from .problem import Kernels, Measured, Perturbation, Problem, check_memory, refuse_stray

_SAVED = 3  # numbers a row that the native forward leaves for the backward


#: Up to how many classes a lane of the kernels is a row. With more, rows are long enough for lanes of their own, and dense
#: predictions that share deltas by class, whose sums would be (C, C) for each piece, are copied to lie by row.
COLUMNS, DENSE_COLUMNS = 64, 512


def _is_dense(logits: Tensor) -> bool:
    """Neighbours in memory are rows, not classes."""
    return logits.dim() == 3 and logits.stride(1) == 1 and logits.stride(2) != 1


def _arranged(problem: Problem, sums: bool) -> Tensor:
    """The logits as the kernels take them: (N, D, C) dense, or (n, C) with rows that lie together.

    ``sums``: Sums by class are wanted.
    """
    logits = problem.logits
    if _is_dense(logits) and (problem.classes <= DENSE_COLUMNS or not sums):
        return logits
    logits = problem.rows
    return logits if logits.stride(1) == 1 or problem.classes == 1 else logits.contiguous()


def _native(problem: Problem, logits: Tensor, saved: Tensor) -> tuple[Any, list[Tensor]]:
    """The native problem, and the tensors whose memory it reads. ``logits`` are arranged."""
    target = problem.target.contiguous()
    weight = None if problem.weight is None else problem.weight.contiguous()
    saved = saved.contiguous()
    check_memory(logits=logits, target=target, weight=weight, saved=saved)
    rows, classes = target.numel(), problem.classes
    dense = logits.dim() == 3
    native = native_module().Lpg(
        logits=logits.data_ptr(),
        dtype=DTYPES[logits.dtype],
        rows=rows,
        classes=classes,
        inner=logits.shape[1] if dense else max(1, rows),
        outer_stride=logits.stride(0) if dense else 0,
        inner_stride=1 if dense else logits.stride(0),
        class_stride=logits.stride(2) if dense else 1,
        columns=dense or classes <= COLUMNS,
        target=target.data_ptr(),
        ignore_index=problem.ignore_index,
        weight=0 if weight is None else weight.data_ptr(),
        weight_sum=float(classes if weight is None else weight.double().sum()),
        smoothing=problem.label_smoothing,
        saved=saved.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return native, [logits, target, saved, *([] if weight is None else [weight])]


def forward(problem: Problem, tally: bool) -> Measured:
    """One reading of the logits."""
    rows, classes = problem.target.numel(), problem.classes
    saved = torch.empty(rows, _SAVED, dtype=problem.wide, device="cpu")
    native, _alive = _native(problem, _arranged(problem, sums=False), saved)
    stray = native.stray()
    if stray >= 0:
        refuse_stray(problem, stray)
    loss = torch.empty(rows, dtype=problem.wide, device="cpu")
    total = torch.empty(2, dtype=torch.float64, device="cpu")
    counts = torch.zeros(3, classes, dtype=torch.float64, device="cpu") if tally else None
    native.forward(loss.data_ptr(), total.data_ptr(), 0 if counts is None else counts.data_ptr())
    return Measured(loss, total, counts, (saved,))


def backward(problem: Problem, saved: tuple[Tensor, ...], factor: Tensor, how: Perturbation) -> Tensor:
    """The perturbed gradient."""
    logits = _arranged(problem, sums=how.scope == "class")
    native, _alive = _native(problem, logits, saved[0])
    shape = logits.shape
    made = shape if logits.dim() == 2 else (shape[0], shape[2], shape[1])
    out = torch.empty(made, dtype=logits.dtype, device="cpu")
    if factor.dim() and factor.stride(0) == 0:
        factor, stride = factor[:1].double(), 0
    else:
        factor, stride = factor.contiguous().double(), 1
    bound = how.reach().double().contiguous()
    means = None if how.means is None or how.scope == "sample" else how.means.to(problem.wide).contiguous()
    native.backward(
        out=out.data_ptr(),
        factor=factor.data_ptr(),
        factor_stride=stride,
        bound=bound.data_ptr(),
        by_sample=how.scope == "sample",
        means=0 if means is None else means.data_ptr(),
    )
    return out.view(problem.logits.shape) if out.dim() == 2 else out.transpose(1, 2)


def class_sums(problem: Problem, saved: tuple[Tensor, ...]) -> Tensor:
    """(C, C): the sums of each class's logit gradients."""
    native, _alive = _native(problem, _arranged(problem, sums=True), saved[0])
    sums = torch.empty(problem.classes, problem.classes, dtype=problem.wide, device="cpu")
    native.class_sums(sums.data_ptr())
    return sums


KERNELS = Kernels("cpu", forward, backward, class_sums)
