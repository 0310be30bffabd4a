"""GPUs as torch names them: NVIDIA's and AMD's in torch.cuda, Intel's in torch.xpu."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

TYPES = ("cuda", "xpu")


def available() -> bool:
    """Whether torch can use a GPU."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def holds(tensor: Tensor) -> bool:
    """Whether a tensor lies on a GPU."""
    return tensor.device.type in TYPES


def selected(device: torch.device) -> AbstractContextManager[Any]:
    """A block within which kernels are launched on ``device``."""
    return torch.get_device_module(device).device(device) if device.type in TYPES else nullcontext()


def current_stream(device: torch.device) -> Any:
    """The current stream of ``device``; None on the CPU."""
    return torch.get_device_module(device).current_stream(device) if device.type in TYPES else None


def capturing() -> bool:
    """Whether a graph captures what is launched now. This does not initialise a GPU that nobody has used."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return True
    asked = getattr(torch.xpu, "is_current_stream_capturing", None)  # only where torch has graphs for Intel GPUs
    return asked is not None and torch.xpu.is_initialized() and bool(asked())


def properties(device: torch.device) -> Any:
    """torch's properties of a GPU: its name, memory, multiprocessors and so on."""
    return torch.get_device_module(device).get_device_properties(device)
