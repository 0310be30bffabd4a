"""The choice among the backends that have LPG kernels."""

from __future__ import annotations

import os

from torch import Tensor

from ..backends import choose_name
from ..backends import cpu as native_cpu
from ..backends import triton as native_triton
from . import cpu, reference, triton
from .problem import Kernels

_KERNELS: dict[str, Kernels] = {"cpu": cpu, "triton": triton, "reference": reference}
_chosen: dict[tuple[object, ...], Kernels] = {}


def choose(request: str, logits: Tensor) -> Kernels:
    """The kernels to use for ``logits``. Raises as ``gradfused.backends.choose_name``.

    Choices are cached, since finding out what can run takes longer than the loss of a small batch.
    """
    plain = bool(logits.numel() == 0 or logits.data_ptr())
    asked = (request, os.environ.get("GRADFUSED_BACKEND"), native_cpu.native_or_none(), native_triton.interpreting())
    key = (*asked, logits.device, logits.dtype, plain)
    if key not in _chosen:
        _chosen[key] = _KERNELS[choose_name(request, [logits], tuple(_KERNELS), "LPG cross-entropy")]
    return _chosen[key]
