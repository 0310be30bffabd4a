"""Work in two processes that know each other."""

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
    """What ``work(rank, *arguments)`` returns in each of two processes, joined by Gloo; files are left in ``folder``."""
    # By file: a test's module has a name that only pytest can import.
    source = inspect.getsourcefile(work)
    torch.multiprocessing.spawn(_process, (source, work.__name__, str(folder), *arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _process(rank: int, source: str, name: str, folder: str, *arguments: Any) -> None:
    work = runpy.run_path(source)[name]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    # Unless the work failed, which spawn reports. A group's destructor may hold the interpreter's lock while it waits for a
    # thread that waits for that lock.
    os._exit(0)
