"""Shared by the tests of the choice among backends: tensors to choose for, and code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import nn


def cpu_params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 3))]


def meta_params() -> list[nn.Parameter]:
    """Stand-ins for tensors on another device, wherever no GPU is."""
    return [nn.Parameter(torch.ones(2, 3, device="meta"))]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a new process with more in its environment."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
