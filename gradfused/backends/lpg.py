"""LPG cross-entropy's kernels and the choice among them."""

from __future__ import annotations

import os

from torch import Tensor

from . import choose_name, cpu, lpg_cpu, lpg_reference, lpg_triton, triton
from .lpg_problem import Kernels, Measured, Perturbation, Problem

__all__ = ["Kernels", "Measured", "Perturbation", "Problem", "choose"]

_KERNELS = {"cpu": lpg_cpu.KERNELS, "triton": lpg_triton.KERNELS, "reference": lpg_reference.KERNELS}
_chosen: dict[tuple[object, ...], Kernels] = {}


def choose(request: str, logits: Tensor) -> Kernels:
    """The kernels to use for ``logits``. Raises as ``gradfused.backends.choose_name``.

    A choice is remembered: asking what is installed takes longer than the loss of a small batch.
    """
    plain = bool(logits.numel() == 0 or logits.data_ptr())
    asked = (request, os.environ.get("GRADFUSED_BACKEND"), cpu.native_or_none(), triton.interpreting())
    key = (*asked, logits.device, logits.dtype, plain)
    if key not in _chosen:
        _chosen[key] = _KERNELS[choose_name(request, [logits], tuple(_KERNELS), "LPG cross-entropy")]
    return _chosen[key]
