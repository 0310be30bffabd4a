"""Runs a function in two processes that are joined by torch.distributed."""

from __future__ import annotations

import inspect
import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def in_two_processes(work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What ``work(rank, *arguments)`` returns in each of two processes joined by Gloo. They exchange files in ``folder``."""
    # The function is passed by file and name: only pytest can import a test's module by its name.
    source = inspect.getsourcefile(work)
    torch.multiprocessing.spawn(_process, (source, work.__name__, str(folder), *arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _process(rank: int, source: str, name: str, folder: str, *arguments: Any) -> None:
    work = runpy.run_path(source)[name]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    # The process ends without cleaning up, since the destructor of a process group may hold the interpreter's lock while
    # it waits for a thread that waits for that lock. If the work failed, this is not reached and spawn reports it.
    os._exit(0)
