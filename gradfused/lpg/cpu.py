"""LPG cross-entropy by the native CPU module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends.cpu import native as native_module
from ..backends.native import DTYPES
from .problem import Measured, Perturbation, Problem, check_memory, refuse_stray

_SAVED = 3  # numbers that the native forward leaves for the backward, for each row

#: Up to this many classes the kernels' lanes are rows. With more classes a row is long enough to fill the lanes by itself.
COLUMNS = 64
#: Beyond this many classes dense predictions that share deltas by class, whose sums would take (C, C) for each piece of
#: rows, are copied so that each row lies together.
DENSE_COLUMNS = 512


def _arranged(problem: Problem, sums: bool) -> Tensor:
    """The logits in a layout that the kernels take: (N, D, C) with neighbouring rows, or (n, C) with contiguous rows.

    ``sums``: whether sums by class are wanted.
    """
    logits = problem.logits
    dense = logits.dim() == 3 and logits.stride(1) == 1 and logits.stride(2) != 1
    if dense and (problem.classes <= DENSE_COLUMNS or not sums):
        return logits
    logits = problem.rows
    return logits if logits.stride(1) == 1 or problem.classes == 1 else logits.contiguous()


def _native(problem: Problem, logits: Tensor, saved: Tensor) -> tuple[Any, list[Tensor]]:
    """The native problem for ``logits`` as arranged, and tensors that must live as long as it."""
    target = problem.target.contiguous()
    weight = None if problem.weight is None else problem.weight.contiguous()
    saved = saved.contiguous()
    check_memory(logits=logits, target=target, weight=weight, saved=saved)
    dense = logits.dim() == 3
    sizes, strides = (logits.shape, logits.stride()) if dense else ((1, *logits.shape), (0, logits.stride(0), 1))
    native = native_module().Lpg(
        logits=(logits.data_ptr(), DTYPES[logits.dtype], sizes, strides),
        by_column=dense or problem.classes <= COLUMNS,
        target=target.data_ptr(),
        ignore_index=problem.ignore_index,
        weight=0 if weight is None else weight.data_ptr(),
        weight_sum=float(problem.classes if weight is None else weight.double().sum()),
        smoothing=problem.label_smoothing,
        saved=saved.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return native, [logits, target, saved, *([] if weight is None else [weight])]


def forward(problem: Problem, tally: bool) -> Measured:
    """Read the logits once."""
    rows, classes = problem.target.numel(), problem.classes
    saved = torch.empty(rows, _SAVED, dtype=problem.wide, device="cpu")
    native, _alive = _native(problem, _arranged(problem, sums=False), saved)
    stray = native.find_stray()
    if stray >= 0:
        refuse_stray(problem, stray)
    loss = torch.empty(rows, dtype=problem.wide, device="cpu")
    total = torch.empty(2, dtype=torch.float64, device="cpu")
    counts = torch.zeros(3, classes, dtype=torch.float64, device="cpu") if tally else None
    native.forward(loss.data_ptr(), total.data_ptr(), 0 if counts is None else counts.data_ptr())
    return Measured(loss, total, counts, (saved,))


def backward(problem: Problem, saved: tuple[Tensor, ...], factor: Tensor, how: Perturbation) -> Tensor:
    """Compute the perturbed gradient."""
    by_sample = how.scope == "sample"
    logits = _arranged(problem, sums=not by_sample)
    native, _alive = _native(problem, logits, saved[0])
    shape = logits.shape if logits.dim() == 2 else (logits.shape[0], logits.shape[2], logits.shape[1])
    out = torch.empty(shape, dtype=logits.dtype, device="cpu")
    factor_stride = 1 if factor.stride(0) else 0
    factor = (factor if factor_stride else factor[:1]).double().contiguous()
    bound = how.reachable_bound().double().contiguous()
    means = None if how.means is None or by_sample else how.means.to(problem.wide).contiguous()
    native.backward(
        out=out.data_ptr(),
        factor=factor.data_ptr(),
        factor_stride=factor_stride,
        bound=bound.data_ptr(),
        by_sample=by_sample,
        means=0 if means is None else means.data_ptr(),
    )
    return out.view(problem.logits.shape) if out.dim() == 2 else out.transpose(1, 2)


def class_sums(problem: Problem, saved: tuple[Tensor, ...]) -> Tensor:
    """Sum each class's logit gradients, (C, C)."""
    native, _alive = _native(problem, _arranged(problem, sums=True), saved[0])
    sums = torch.empty(problem.classes, problem.classes, dtype=problem.wide, device="cpu")
    native.class_sums(sums.data_ptr())
    return sums
