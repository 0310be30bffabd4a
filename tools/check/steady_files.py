"""Lists the files whose code runs in a steady step of AdamW with gradient clipping, for each backend.

A step is steady when parameters, gradients and options are those of the step before. Python's lines are traced. The native
modules are built for gcov in a scratch folder, without optimisation, the CUDA kernels with the tests' emulator; the generic
kernels stand for those of every instruction set. A Python file counts if one of its functions is called, a C++ file if at
least two of its lines run: those of which a single one runs, an accessor or a line of a list of rules, are printed apart.

    python tools/check/steady_files.py [cpu] [cuda] [triton] [--lines] [--most BACKEND=N ...]

It exits with 1 if a backend passes more files than ``--most`` allows.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BACKENDS = ("cpu", "cuda", "triton")
WARM_UP = 3
#: The rules that are compiled with AdamW's for CUDA. Those of the other families are left out.
FAMILY = "adam"
# Exported by an object of its own, since every module has counters of its own.
COUNTERS = """
extern "C" void __gcov_reset();
extern "C" void __gcov_dump();
extern "C" void steady_reset() { __gcov_reset(); }
extern "C" void steady_dump() { __gcov_dump(); }
"""


@dataclass(frozen=True)
class Unit:
    """One source to compile, with its own flags."""

    source: Path
    flags: tuple[str, ...] = ()

    def object_name(self) -> str:
        """A name that differs for two units of one source."""
        return "-".join([self.source.stem, self.source.parent.name, *(f.rpartition("=")[2] for f in self.flags)])


# ---- the native modules, built for gcov


def sources_of(backend: str) -> Iterator[Unit]:
    """What the module of a backend is built from."""
    other = "cuda" if backend == "cpu" else "cpu"
    for path in sorted(CSRC.rglob("*.cpp")):
        folders = path.relative_to(CSRC).parts[:-1]
        if other not in folders and not (backend == "cuda" and "lpg" in folders):
            yield Unit(path, ("-DGRADFUSED_ISA=generic",) if "kernels" in folders else ())
    if backend == "cuda":
        for path in sorted(CSRC.rglob("*.cu")):
            if "GRADFUSED_FAMILY" in path.read_text():
                yield from (Unit(path, (f"-DGRADFUSED_FAMILY={FAMILY}", f"-DGRADFUSED_FULL={full}")) for full in "10")
            else:
                yield Unit(path)


def compile_command(backend: str) -> list[str]:
    """The compiler with what every source of a module needs."""
    import pybind11

    emulator = next((ROOT / "tests").rglob("cuda_runtime.h")).parent
    includes = [CSRC, pybind11.get_include(), sysconfig.get_path("include"), *[emulator] * (backend == "cuda")]
    flags = ["-O0", "-fPIC", "--coverage", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]
    defines = ['-DGRADFUSED_VERSION="counted"', '-DGRADFUSED_CUDA_ARCHS="none"', "-DGRADFUSED_CUDA_MODULE=_cuda"]
    return [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", *flags, *defines, *(f"-I{d}" for d in includes)]


def build(backend: str, folder: Path) -> Path:
    """The path of the module of a backend, built in ``folder``."""
    counters = folder / "counters.cpp"
    counters.write_text(COUNTERS)
    command = compile_command(backend)

    def compile_one(unit: Unit) -> Path:
        out = folder / f"{unit.object_name()}.o"
        subprocess.run([*command, *unit.flags, "-x", "c++", "-c", str(unit.source), "-o", str(out)], check=True)
        return out

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))) as pool:
        objects = list(pool.map(compile_one, [*sources_of(backend), Unit(counters)]))
    stubs = folder / "stubs.cpp"
    stubs.write_text(
        "".join(f'extern "C" void {name}() {{ __builtin_trap(); }}\n' for name in missing_symbols(objects))
    )
    library = folder / f"_{backend}{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*command, "-shared", *map(str, objects), "-x", "c++", str(stubs), "-o", str(library)], check=True)
    return library


def missing_symbols(objects: list[Path]) -> set[str]:
    """The launchers of the families that are not compiled."""

    def symbols(which: str) -> set[str]:
        run = subprocess.run(["nm", which, *map(str, objects)], capture_output=True, text=True, check=True)
        return set(re.findall(r" [A-Za-z] (_ZN9gradfused\w+)$", run.stdout, re.MULTILINE))

    return symbols("--undefined-only") - symbols("--defined-only")


def executed_lines(folder: Path) -> dict[str, set[int]]:
    """The lines of csrc that ran since the counters were reset, by file."""
    data = [str(path) for path in folder.glob("*.gcda")]
    found = subprocess.run(["gcov", "--json-format", "--stdout", *data], capture_output=True, check=True, cwd=folder)
    lines: dict[str, set[int]] = {}
    for report in found.stdout.splitlines():
        for file in json.loads(report)["files"]:
            path = Path(file["file"]).resolve()
            ran = {line["line_number"] for line in file["lines"] if line["count"]}
            if ran and path.is_relative_to(CSRC):
                lines.setdefault(path.relative_to(ROOT).as_posix(), set()).update(ran)
    return lines


# ---- the step


def load(backend: str, library: Path) -> ctypes.CDLL:
    """Import a built module in place of the package's, and return what resets and writes its counters."""
    name = f"gradfused._{backend}"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return ctypes.CDLL(str(library))


def steady_optimizer(backend: str) -> Any:
    """An optimizer that has taken a few steps with the same gradients."""
    import torch

    import gradfused

    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 33), (64,), (8, 4, 3, 3))]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = gradfused.AdamW(params, lr=1e-3, clip_norm=1.0, backend=backend)
    for _ in range(WARM_UP):
        optimizer.step()
    return optimizer


def python_lines(optimizer: Any) -> dict[str, set[int]]:
    """The lines of the package that run in a step, by file."""
    lines: dict[str, set[int]] = {}

    def note(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            lines.setdefault(frame.f_code.co_filename, set()).add(frame.f_lineno)
        return note

    sys.settrace(note)
    try:
        optimizer.step()
    finally:
        sys.settrace(None)
    ours = (str(ROOT / "gradfused"), str(ROOT / "triton_kernels"))
    return {Path(f).relative_to(ROOT).as_posix(): ran for f, ran in lines.items() if f.startswith(ours)}


def trace(backend: str, folder: Path) -> dict[str, list[int]]:
    """The lines that run in a steady step, by file."""
    import torch

    torch.set_num_threads(1)
    counters = load(backend, build(backend, folder)) if backend != "triton" else None
    optimizer = steady_optimizer(backend)
    if counters:
        counters.steady_reset()
    lines = python_lines(optimizer)
    if counters:
        counters.steady_dump()
        lines |= executed_lines(folder)
    return {file: sorted(ran) for file, ran in lines.items()}


def traced(backend: str) -> dict[str, list[int]]:
    """The same, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, "--inside", folder, backend]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=folder)
    return dict(json.loads(run.stdout.splitlines()[-1]))


def report(backend: str, most: int | None, with_lines: bool) -> bool:
    """Print a backend's files. Returns whether they are no more than ``most``."""
    files = traced(backend)
    passed = [file for file in sorted(files) if file.endswith(".py") or len(files[file]) > 1]
    print(f"{backend}: {len(passed)} files" + (f" (at most {most})" if most is not None else ""))
    for file in passed:
        print(f"    {file}" + (f": {' '.join(map(str, files[file]))}" if with_lines else ""))
    print("  not counted:", *(f"{file}:{lines[0]}" for file, lines in sorted(files.items()) if file not in passed))
    return most is None or len(passed) <= most


def main() -> int:
    """Print the lists. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backends", nargs="*", choices=[*BACKENDS, []], default=[], help="default: all of them")
    parser.add_argument("--lines", action="store_true", help="name the lines that run")
    parser.add_argument("--most", nargs="*", default=[], metavar="BACKEND=N", help="limits to check")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    backends = asked.backends or list(BACKENDS)
    if asked.inside:
        print(json.dumps(trace(backends[0], Path(asked.inside))))
        return 0
    limits = {name: int(most) for name, most in (item.split("=") for item in asked.most)}
    within = [report(backend, limits.get(backend), asked.lines) for backend in backends]
    return int(not all(within))


if __name__ == "__main__":
    raise SystemExit(main())
