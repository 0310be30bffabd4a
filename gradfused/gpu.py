"""GPUs as torch names them: NVIDIA's and AMD's in torch.cuda, Intel's in torch.xpu."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

TYPES = ("cuda", "xpu")


def available() -> bool:
    """Whether torch can use one."""
    return torch.cuda.is_available() or torch.xpu.is_available()


def holds(tensor: Tensor) -> bool:
    """Whether a tensor lies on one."""
    return tensor.device.type in TYPES


def selected(device: torch.device) -> AbstractContextManager[Any]:
    """Within the block, launches go to ``device``."""
    return torch.get_device_module(device).device(device) if device.type in TYPES else nullcontext()


def current_stream(device: torch.device) -> Any:
    """The current stream of ``device``; None on the CPU."""
    return torch.get_device_module(device).current_stream(device) if device.type in TYPES else None


def capturing() -> bool:
    """Whether what is launched now goes into a graph. Does not wake a GPU that nobody uses."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return True
    asked = getattr(torch.xpu, "is_current_stream_capturing", None)  # where torch has graphs for Intel's
    return asked is not None and torch.xpu.is_initialized() and bool(asked())


def properties(device: torch.device) -> Any:
    """What torch knows of one."""
    return torch.get_device_module(device).get_device_properties(device)
