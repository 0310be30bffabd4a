"""LPG cross-entropy's kernels and the choice among them."""

from __future__ import annotations

import os

from torch import Tensor

from ..backends import choose_name
from ..backends import cpu as native_cpu
from ..backends import triton as native_triton
from . import cpu, reference, triton
from .problem import Kernels, Measured, Perturbation, Problem

__all__ = ["Kernels", "Measured", "Perturbation", "Problem", "choose"]

_KERNELS = {"cpu": cpu.KERNELS, "triton": triton.KERNELS, "reference": reference.KERNELS}
_chosen: dict[tuple[object, ...], Kernels] = {}


def choose(request: str, logits: Tensor) -> Kernels:
    """The kernels to use for ``logits``. Raises as ``gradfused.backends.choose_name``.

    A choice is remembered: asking what is installed takes longer than the loss of a small batch.
    """
    plain = bool(logits.numel() == 0 or logits.data_ptr())
    asked = (request, os.environ.get("GRADFUSED_BACKEND"), native_cpu.native_or_none(), native_triton.interpreting())
    key = (*asked, logits.device, logits.dtype, plain)
    if key not in _chosen:
        _chosen[key] = _KERNELS[choose_name(request, [logits], tuple(_KERNELS), "LPG cross-entropy")]
    return _chosen[key]
