"""The CUDA backend: the kernels of gradfused._cuda over a plan in device memory."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import native as natives
from .base import Availability, Scaling
from .device import DeviceBackend, DevicePart, checked

_native: ModuleType | None
_error: str | None = None
try:
    _native = import_module("gradfused._cuda")
except ImportError as error:  # a wheel or build without CUDA
    _native = None
    _error = (
        f"was not built ({error}): install a wheel with CUDA, or build from source where nvcc is (GRADFUSED_CUDA=1 "
        "says what is missing)"
    )


def native() -> ModuleType:
    """The compiled module. Raises RuntimeError, with the reason and the remedy, if it did not load."""
    if _native is None:
        raise RuntimeError(f"backend 'cuda' {_error}")
    return _native


def availability() -> Availability:
    """Whether the compiled module loads, torch has CUDA and a GPU answers; and what the module was built for."""
    if _native is None:
        return Availability("cuda", _error)
    details = {"built for compute capability": _native.ARCHS}
    if not _native.EMULATED:
        if torch.version.cuda is None:
            return Availability(
                "cuda",
                f"needs a torch with CUDA, this is {torch.__version__}: install one from pytorch.org",
                details=details,
            )
        try:
            _native.device_count()
        except RuntimeError as error:
            return Availability("cuda", str(error), details=details)
    return Availability("cuda", details=details)


def refusal(tensor: Tensor) -> str | None:
    """The reason why this backend cannot work on a parameter or gradient; None if it can."""
    return natives.refusal(tensor, "cpu" if native().EMULATED else "cuda")


def _address(scalar: Tensor | None, device: torch.device) -> int:
    """Address of a one-element float32 tensor on ``device``; 0 for None."""
    found = checked(scalar, device)
    return 0 if found is None else found.data_ptr()


class CudaPart(DevicePart):
    """The rows of one GPU, stepped by gradfused._cuda."""

    @staticmethod
    def make(groups: int) -> Any:
        return native().Engine(groups)

    def _arguments(self, scaling: Scaling) -> tuple[int, int, int, int]:
        device, stream = self.device, self.stream()
        return (
            device.index or 0,
            0 if stream is None else stream.cuda_stream,
            _address(scaling.grad_scale, device),
            _address(scaling.found_inf, device),
        )

    def stats(self, scaling: Scaling) -> None:
        self.native.stats(*self._arguments(scaling))

    def apply(self, scaling: Scaling) -> None:
        self.native.apply(*self._arguments(scaling))


class CudaBackend(DeviceBackend):
    """The rows of a step in device memory, stepped by gradfused._cuda."""

    part = CudaPart

    @staticmethod
    def module() -> ModuleType:
        return native()
