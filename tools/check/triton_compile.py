"""Kernels of Triton compiled ahead of time: for which targets, and the registers, spills and access widths of what came of it.

Import it before Triton: it sees to it that kernels are compiled and not interpreted, and that this checkout's package is found.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import check_sass
import triton
import triton.language as tl
from triton.compiler import ASTSource

from gradfused.backends import triton as backend

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass
class Report:
    """What a compilation resulted in.

    Attributes:
        registers: Of a thread.
        wide_loads: Accesses of 16 bytes.
        wide_stores: The same, written.
        spills: Accesses of local memory; on AMD spilt vector registers.
        inside: Those within hot loops; on AMD all.
        narrow: Narrower accesses of global memory in hot loops.
    """

    registers: int
    wide_loads: int
    wide_stores: int
    spills: int
    inside: int = 0
    narrow: Counter[str] = field(default_factory=Counter)


@triton.jit
def probe(to):
    """The smallest kernel: if it does not compile, the fault is the compiler's and not our kernels'."""
    tl.store(to, 1.0)


def compiled(source: Any, target: str, options: dict[str, Any] | None = None) -> Report:
    """Compile an ASTSource and read it."""
    from triton.backends.compiler import GPUTarget

    cuda = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if cuda else GPUTarget("hip", target, 64)
    kernel = triton.compile(source, target=gpu, options=options)
    return read_cuda(kernel) if cuda else read_amd(kernel)


def cuobjdump() -> str | None:
    """The path of the cuobjdump in Triton's package, or None."""
    found = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(found) if found.exists() else None


def read_cuda(kernel: Any) -> Report:
    """Reads a kernel's machine code for NVIDIA; see check_sass.py."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(cuobjdump()), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [(_, _, code)] = check_sass.parse(text.splitlines())
    # The choice among kinds of chunks may be a jump table. It lies around the hot loops, so it need not be followed.
    hot = check_sass.hot_loops([i._replace(opcode="EXIT") if i.base in ("BRX", "BRXU") else i for i in code])
    wide = [i for i in code if i.bits >= check_sass.WIDE]
    loads = sum(i.is_load for i in wide)
    return Report(
        registers=int(re.findall(r"REG:(\d+)", text)[0]),
        wide_loads=loads,
        wide_stores=len(wide) - loads,
        spills=sum(i.is_local for i in code),
        inside=sum(loop.local for loop in hot),
        narrow=sum((Counter(loop.narrow) for loop in hot), Counter()),
    )


def read_amd(kernel: Any) -> Report:
    """Reads a kernel's assembly for AMD and its metadata."""
    text = kernel.asm["amdgcn"]
    numbers = {key: int(n) for key, n in re.findall(r"\.(vgpr_(?:count|spill_count)): +(\d+)", text)}
    counts = Counter(re.findall(r"\b((?:global|buffer|flat)_(?:load|store)_\w+)", text))
    wide = {name: n for name, n in counts.items() if name.endswith("dwordx4")}
    spills = numbers["vgpr_spill_count"]  # a scalar register goes into a lane of a vector register, not to memory
    return Report(
        registers=numbers["vgpr_count"],
        wide_loads=sum(n for name, n in wide.items() if "load" in name),
        wide_stores=sum(n for name, n in wide.items() if "store" in name),
        spills=spills,
        inside=spills,
    )


def unable(target: str) -> str | None:
    """Why this Triton cannot compile for a target, or None."""
    if target.startswith("sm_") and cuobjdump() is None:
        return "this Triton comes without cuobjdump"
    try:
        compiled(ASTSource(fn=probe, signature={"to": "*fp32"}), target)
    except Exception as error:  # whatever a compiler that lacks the target says
        return said(error)
    return None


def said(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def attempt(
    check: Callable[[Any, str], tuple[Report, list[str]]], variant: Any, target: str
) -> tuple[Report, list[str]]:
    """The report on a variant and its faults, of which a failed compilation is one."""
    try:
        return check(variant, target)
    except Exception as error:
        return Report(0, 0, 0, 0), [f"does not compile: {said(error)}"]


def main(
    description: str | None,
    variants: Callable[[str, bool], Iterable[Any]],
    check: Callable[[Any, str], tuple[Report, list[str]]],
) -> None:
    """Print a line a kernel; exit with a message if one is at fault.

    Args:
        description: Of the command line.
        variants: What to compile for a target; True: all there is, not only what most models run.
        check: Compiles a variant for a target; what came of it, and what is wrong with that.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every variant, not only what most models run")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="default: the CPUs at hand")
    options = parser.parse_args()
    if reason := backend.missing():
        raise SystemExit(f"triton {reason}")
    wrong = 0
    print(f"{'target':8}{'registers':>10}{'spills':>8}{'in loops':>10}{'16-byte loads':>15}{'stores':>8}  kernel")
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        for target in options.target:
            if reason := unable(target):
                print(f"{target:8} left out: {reason}", flush=True)
                continue
            chosen = list(dict.fromkeys(variants(target, options.all)))
            found = pool.map(attempt, repeat(check), chosen, repeat(target))
            for variant, (report, bad) in zip(chosen, found, strict=True):
                wrong += bool(bad)
                spills = f"{report.registers:>10}{report.spills:>8}{report.inside:>10}"
                accesses = f"{report.wide_loads:>15}{report.wide_stores:>8}"
                faults = (f"         FAULT: {fault}" for fault in bad)
                print(f"{target:8}{spills}{accesses}  {variant}", *faults, sep="\n", flush=True)
    if wrong:
        raise SystemExit(f"{wrong} kernels at fault")
