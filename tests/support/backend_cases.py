"""What the tests of the backends share: parameters on several devices, and a way to run code in a new process."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from torch import nn


def cpu_params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 3))]


def meta_params() -> list[nn.Parameter]:
    """Parameters on the meta device, which stands in for a GPU where there is none."""
    return [nn.Parameter(torch.ones(2, 3, device="meta"))]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new process with ``environment`` added to this one's."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
