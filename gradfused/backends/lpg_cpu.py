"""LPG cross-entropy by the native CPU module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu
from .lpg_problem import Kernels, Measured, Perturbation, Problem, refuse_stray
from .native import DTYPES

_SAVED = 3  # numbers a row that the native forward leaves for the backward


def _native(problem: Problem, saved: Tensor) -> tuple[Any, list[Tensor]]:
    """The native problem, and the tensors whose memory it reads."""
    logits = problem.logits
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        logits = logits.contiguous()
    target = problem.target.contiguous()
    weight = None if problem.weight is None else problem.weight.contiguous()
    rows, classes = logits.shape
    native = cpu.native().Lpg(
        logits=logits.data_ptr(),
        dtype=DTYPES[logits.dtype],
        rows=rows,
        classes=classes,
        stride=logits.stride(0),
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
    rows, classes = problem.logits.shape
    saved = torch.empty(rows, _SAVED, dtype=problem.wide)
    native, _alive = _native(problem, saved)
    stray = native.stray()
    if stray >= 0:
        refuse_stray(problem, stray)
    loss = torch.empty(rows, dtype=problem.wide)
    total = torch.empty(2, dtype=torch.float64)
    counts = torch.zeros(3, classes, dtype=torch.float64) if tally else None
    native.forward(loss.data_ptr(), total.data_ptr(), 0 if counts is None else counts.data_ptr())
    return Measured(loss, total, counts, (saved,))


def backward(problem: Problem, saved: tuple[Tensor, ...], factor: Tensor, how: Perturbation) -> Tensor:
    """The perturbed gradient."""
    native, _alive = _native(problem, saved[0])
    out = torch.empty(problem.logits.shape, dtype=problem.logits.dtype)
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
    return out


def class_sums(problem: Problem, saved: tuple[Tensor, ...]) -> Tensor:
    """(C, C): the sums of each class's logit gradients."""
    native, _alive = _native(problem, saved[0])
    sums = torch.empty(problem.classes, problem.classes, dtype=problem.wide)
    native.class_sums(sums.data_ptr())
    return sums


KERNELS = Kernels("cpu", forward, backward, class_sums)
