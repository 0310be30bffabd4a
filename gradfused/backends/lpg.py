"""LPG cross-entropy's kernels and the choice among them."""

from __future__ import annotations

from torch import Tensor

from . import choose_name, lpg_cpu, lpg_reference
from .lpg_problem import Kernels, Measured, Perturbation, Problem

__all__ = ["Kernels", "Measured", "Perturbation", "Problem", "choose"]

_KERNELS = {"cpu": lpg_cpu.KERNELS, "reference": lpg_reference.KERNELS}


def choose(request: str, logits: Tensor) -> Kernels:
    """The kernels to use for ``logits``. Raises as ``gradfused.backends.choose_name``."""
    return _KERNELS[choose_name(request, [logits], tuple(_KERNELS), "LPG cross-entropy")]
