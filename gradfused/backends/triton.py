"""The Triton backend: gradfused.triton_kernels over the table that the CUDA backend uses, planned by gradfused._cpu.

Triton is imported when it is first asked for, so that importing gradfused stays fast.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import gpu
from . import cpu
from . import native as natives
from .base import Availability, Row, Scaling, Settings
from .device import DeviceBackend, DevicePart, checked

OLDEST = (3, 3)

# Elements of a tile, of 128 threads: eight a thread, one 16-byte access of a 16-bit dtype and two of float32, so that AdamW has
# 128 bytes of reads under way a thread, 64 KiB a multiprocessor. AMD's warps are of 64 threads, Intel's of 32 as NVIDIA's.
TILE, THREADS = 1024, 128
# Programs a multiprocessor, each of which takes its share of the chunks: as many as are resident, by the registers that
# check_triton.py reads, up to 96 in lean kernels and 128 in those with noise, norms by unit, late centring, riders on the
# weights or four state tensors, and in those that weigh.
LEAN_PROGRAMS, FULL_PROGRAMS = 5, 4
# On Intel's GPUs for each Xe core, which runs 64 threads or more, each a warp, with 64 floats of registers a lane.
XE_PROGRAMS = 16
# In the interpreter, where they run one after the other: more than one, so that what programs leave to each other is tried.
INTERPRETED_PROGRAMS = 2


@dataclass(frozen=True)
class StepKernels:
    """The kernels, and what they were told of the table's layout."""

    stats: Any
    apply: Any
    layout: int
    interpreted: bool
    kind_of: Callable[..., int]
    kinds: Callable[[Iterable[int]], dict[str, int]]
    longest: list[int]


#: Contraction is off, as in the other backends.
UNFUSED = {"enable_fp_fusion": False}


def _version(package: str) -> tuple[int, ...] | None:
    """Major and minor; None for a build under another name: triton-rocm, triton-xpu, one's own."""
    try:
        return tuple(int(x) for x in version(package).split("+")[0].split(".")[:2])
    except PackageNotFoundError:
        return None


def missing() -> str | None:
    """Why Triton's kernels cannot be loaded, or None."""
    if not cpu.availability().usable:
        return f"needs the compiled module that plans its tables: {cpu.availability().reason}"
    if find_spec("triton") is None:
        return "needs the triton package, which is not installed: python -m pip install triton"
    found = _version("triton")
    if found is not None and found < OLDEST:
        return (
            f"needs Triton {OLDEST[0]}.{OLDEST[1]} or later, found {version('triton')}: python -m pip install -U triton"
        )
    return None


def uninterpretable() -> str | None:
    """Why Triton's interpreter, which is written in NumPy, cannot run the kernels, or None."""
    found, numpy = _version("triton"), _version("numpy")
    if found is not None and numpy is not None and found < (3, 9) and numpy >= (2, 4):
        return f"Triton {version('triton')} interprets with NumPy before 2.4, found {version('numpy')}"
    return None


@cache
def kernels() -> StepKernels:
    """The kernels, imported. Whether they are interpreted is decided now, by TRITON_INTERPRET."""
    layout, chunk, stats, apply = (
        import_module(f"gradfused.triton_kernels.{name}") for name in ("layout", "chunk", "stats", "apply")
    )
    return StepKernels(
        stats=stats.stats,
        apply=apply.apply,
        layout=layout.define(cpu.native().LAYOUT),
        interpreted=bool(layout.INTERPRETED.value),
        kind_of=chunk.kind_of,
        kinds=chunk.kinds,
        longest=list(chunk.LONGEST),
    )


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def availability() -> Availability:
    """Whether Triton is there and a GPU, or its interpreter, to run it on."""
    reason = missing()
    if reason is None and interpreting():
        reason = uninterpretable()
    elif reason is None and not gpu.available():
        reason = "needs a GPU that this torch can use, or TRITON_INTERPRET=1 to try the kernels on CPU tensors"
    details = {"interpreted": "by TRITON_INTERPRET=1"} if reason is None and interpreting() else {}
    return Availability("triton", reason, details=details)


def refusal(tensor: Tensor) -> str | None:
    """Why this backend cannot work on a parameter or gradient, or None if it can."""
    if interpreting():
        return natives.refusal(tensor, "cpu")
    reason = natives.refusal(tensor, *gpu.TYPES)
    if reason is None and tensor.device.type == "xpu":
        known = gpu.properties(tensor.device)
        reason = None if known.has_fp64 else f"sums norms in float64, which {known.name} cannot"
    return reason


def warps(amd: bool) -> int:
    """Warps of a program."""
    return THREADS // (64 if amd else 32)


def launch_options(amd: bool) -> dict[str, Any]:
    """What a launch is compiled with."""
    return {"num_warps": warps(amd), **UNFUSED}


@cache
def _programs(device: torch.device, full: bool) -> int:
    """How many programs a device runs at a time."""
    if device.type == "cpu":
        return INTERPRETED_PROGRAMS
    known = gpu.properties(device)
    if device.type == "xpu":
        return XE_PROGRAMS * int(known.gpu_subslice_count)
    return (FULL_PROGRAMS if full else LEAN_PROGRAMS) * int(known.multi_processor_count)


class TritonPart(DevicePart):
    """The rows of one GPU, stepped by Triton's kernels."""

    def __init__(
        self, device: torch.device, rows: Sequence[Row], own: Sequence[bool], settings: Sequence[Settings]
    ) -> None:
        self._kernels = kernels()
        super().__init__(device, rows, own, settings)
        self._needs: int = self.native.needs()
        self._phases: list[int] = self.native.phases()
        full = bool(self._needs & cpu.native().LAYOUT["Need_full"])
        self._grid = (max(1, min(self.native.chunks(), _programs(device, full))),)
        # What a captured graph copies from at each replay: pinned memory may not be allocated during a capture.
        size, pinned = self.native.packed_bytes(), device.type != "cpu"
        self._staged = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self._kinds = self._choose_kinds()

    @staticmethod
    def make(groups: int) -> Any:
        return cpu.native().DevicePlan(groups)

    def _choose_kinds(self) -> tuple[dict[str, int], dict[str, int]]:
        """The kinds of chunks that the stats kernel and the apply kernel are compiled for."""
        known, found = self._kernels, self.native.variants(self._kernels.longest)
        stats = known.kinds(known.kind_of(access, t) for _, access, tile in found for t in (0, tile))
        return stats, known.kinds(known.kind_of(access, tile, rule) for rule, access, tile in found)

    def _upload(self) -> None:
        """Copy what changed since the last launch: addresses of gradients, options."""
        try:
            patches = self.native.patches()
            for at, data in patches:
                self._copy(at, data)
            if patches:
                self._kinds = self._choose_kinds()
        except BaseException:
            self.native.forget_patches()
            raise

    def _copy(self, at: int, data: bytes) -> None:
        """Bytes to their address in the table."""
        host = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        start = at - self.image.data_ptr()
        place = slice(start, start + host.numel())
        if gpu.capturing():  # once: the table is the graph's from now on
            host = self._staged[place].copy_(host)
        elif self.device.type != "cpu":
            host = host.pin_memory()
        self.image[place].copy_(host, non_blocking=True)

    def _launch(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        constants |= {"NEEDS": self._needs, "SIZE": TILE, "LAYOUT": self._kernels.layout}
        with gpu.selected(self.device):
            kernel[self._grid](
                self.image.data_ptr(), *arguments, **constants, **launch_options(torch.version.hip is not None)
            )

    def stats(self, scaling: Scaling) -> None:
        self.stream()
        self._upload()
        scale = checked(scaling.grad_scale, self.device)
        adaptive = any(s is not None and s.adaptive for s in self._known)  # a table may outlive SAM's choice of it
        self._launch(self._kernels.stats, scale, ADAPTIVE=adaptive, **self._kinds[0])

    def apply(self, scaling: Scaling) -> None:
        self.stream()
        self._upload()
        scalars = checked(scaling.grad_scale, self.device), checked(scaling.found_inf, self.device)
        for phase in self._phases:
            self._launch(self._kernels.apply, *scalars, PHASE=phase, **self._kinds[1])
        self.native.count_taken()


class TritonBackend(DeviceBackend):
    """Rows in device memory, stepped by Triton's kernels."""

    part = TritonPart

    @staticmethod
    def module() -> ModuleType:
        return cpu.native()
