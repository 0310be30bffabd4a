"""Timing on an NVIDIA GPU: its clocks, CUDA graphs, and a description of the GPU for the record."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import torch

from .rounds import Clock, Meter, Step, no_collector

# Several steps a sample, so that the host runs ahead of the device as it does in training.
BURST_MS, LEAST_BURST, MOST_BURST = 10.0, 5, 200
SMI_SECONDS = 10.0  # nvidia-smi hangs if the driver does


def problem(index: int) -> str | None:
    """Why torch cannot compute on the GPU of this number, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install one with CUDA from pytorch.org"
    count = torch.cuda.device_count()
    if not count:
        return (
            "torch finds no NVIDIA GPU: see whether nvidia-smi lists one and its driver is new enough "
            f"for CUDA {torch.version.cuda}"
        )
    if index >= count:
        return f"torch sees {count} CUDA device{'s' if count > 1 else ''}, numbered from 0"
    try:
        torch.ones(1, device=torch.device("cuda", index)).add_(1).item()
    except RuntimeError as error:  # a GPU or driver that this torch has no kernels for
        return f"torch cannot compute on it: {str(error).strip().splitlines()[0]}"
    return None


def read_wall(step: Step, count: int) -> float:
    """Milliseconds a call takes by the host's clock, from an idle device until it is idle again."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / count


def read_events(step: Step, count: int) -> float:
    """Milliseconds a call takes between two CUDA events; if the device waits for the host, that is included."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / count


class Replay:
    """A captured CUDA graph; it holds the steps, and so keeps alive the memory that the graph's kernels use."""

    def __init__(self, graph: torch.cuda.CUDAGraph, steps: Sequence[Step]) -> None:
        self.graph, self.steps = graph, list(steps)

    def __call__(self) -> None:
        """Have the device repeat what was captured."""
        self.graph.replay()


class Capture:
    """Captures steps in graphs that share one pool of memory for temporaries, since no two of them run at the same time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, steps: Sequence[Step]) -> Replay:
        """Capture the steps, in order, in one graph. Each must have been taken before.

        Raises:
            RuntimeError: A step waits for the device, or does something else that no graph can hold.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # The collector could destroy something of CUDA's in the middle of the capture, which would end it.
            with no_collector(), torch.cuda.graph(graph, pool=self.pool):
                for step in steps:
                    step()
        except BaseException:
            self.recover(stream)
            raise
        return Replay(graph, steps)

    def recover(self, stream: torch.cuda.Stream) -> None:
        """Undo what a failed capture leaves behind in torch: its stream is current, its pool and generator count as in use."""
        torch.cuda.set_stream(stream)
        self.pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=self.pool):  # one that ends well frees the generator
                torch.ones(1, device=stream.device)
        except RuntimeError:
            torch.cuda.set_stream(stream)


def meter(device: torch.device) -> Meter:
    """How to time a GPU. Each case makes its own meter, so that the memory of its graphs is freed with the case."""
    return Meter(
        wall=Clock(read_wall, BURST_MS, LEAST_BURST, MOST_BURST),
        device=Clock(read_events, BURST_MS, LEAST_BURST, MOST_BURST),
        capture=Capture(),
        cache_bytes=cache_bytes(device),
    )


def cache_bytes(device: torch.device) -> int:
    """The size of the L2 cache, the last one before memory."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def describe(device: torch.device) -> dict[str, Any]:
    """The GPU's part of the environment's record, without what nvidia-smi cannot tell."""
    properties = torch.cuda.get_device_properties(device)
    told = smi(device, ("driver_version", "power.limit", "utilization.gpu"))
    known = {
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_l2_bytes": cache_bytes(device),
        "gpu_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "gpu_driver": told.get("driver_version"),
        "gpu_power_limit_w": number(told.get("power.limit")),
        "gpu_busy_before_percent": number(told.get("utilization.gpu")),
    }
    return {key: value for key, value in known.items() if value is not None}


def clocks(device: torch.device) -> dict[str, Any]:
    """The current clocks in MHz; they are worth recording right after work, before the GPU slows down."""
    fields = {"sm": "clocks.sm", "sm_max": "clocks.max.sm", "memory": "clocks.mem", "memory_max": "clocks.max.mem"}
    told = smi(device, tuple(fields.values()))
    found = {key: number(told.get(field)) for key, field in fields.items()}
    return {"gpu_clocks_mhz": found} if told else {}


def number(text: str | None) -> float | None:
    """A field of nvidia-smi's answer as a number; None for [N/A] and the like."""
    try:
        return float(text or "")
    except ValueError:
        return None


def smi(device: torch.device, fields: Sequence[str]) -> dict[str, str]:
    """Ask nvidia-smi for some fields of a GPU; returns nothing where it is missing or fails. No setting is changed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    # The UUID names the GPU, because CUDA_VISIBLE_DEVICES renumbers GPUs for torch but not for nvidia-smi.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    name = str(device.index or 0) if uuid is None else f"GPU-{str(uuid).removeprefix('GPU-')}"
    query = [f"--id={name}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        run = subprocess.run([tool, *query], capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in run.stdout.strip().split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}
