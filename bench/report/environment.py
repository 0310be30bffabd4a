"""A description of the machine and of the versions that a measurement was taken with."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import gradfused
from gradfused.backends import cpu

from ..peers import backend_on
from ..timing import cuda, usable_cpus

PEER_PACKAGES = (
    "torch-optimi",
    "pytorch_optimizer",
    "pytorch-revgrad",
    "deepspeed",
    "apex",
    "bitsandbytes",
    "transformer-engine",
    "triton",
)


def describe(device: torch.device) -> dict[str, Any]:
    """What a reader needs in order to compare figures; it holds no host name and no path."""
    environment: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "gradfused": gradfused.__version__,
        "backend": backend_on(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": len(usable_cpus()),
        "threads": torch.get_num_threads(),
        "isa": native_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "peers": peer_versions(),
    }
    return environment | (cuda.describe(device) if device.type == "cuda" else {})


def cpu_name() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def native_isa() -> str | None:
    """The instruction set for which gradfused chose its kernels, or None if they do not load here."""
    return cpu.isa() if cpu.availability().usable else None


def peer_versions() -> dict[str, str]:
    """The versions of those peers' packages that are installed."""
    found = {}
    for package in PEER_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
