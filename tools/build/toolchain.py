"""Finds the C++ compiler, Python's and pybind11's headers and ninja, and says what to install where one is missing."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import NoReturn

NO_COMPILER = """\
gradfused: cannot build from source: {what}.
Install a C++17 compiler and Python's headers (Debian, Ubuntu: apt install g++ python3-dev;
Fedora: dnf install gcc-c++ python3-devel) or name a compiler in CXX. A gradfused wheel
installs without a compiler: python -m pip install gradfused-*.whl"""


def fail(message: str) -> NoReturn:
    """Ends the build with a message in place of a traceback."""
    raise SystemExit(f"\n{message}\n")


def job_count() -> int:
    """How many compilers run at a time: MAX_JOBS, else the number of CPUs that this process may use."""
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def python_include_dirs() -> tuple[str, ...]:
    """Folders of the headers that bindings need: pybind11's, or torch's copy of them, and Python's."""
    try:
        import pybind11

        headers = pybind11.get_include()
    except ImportError:
        torch = importlib.util.find_spec("torch")
        headers = str(Path(str(torch and torch.origin)).parent / "include")
        if not Path(headers, "pybind11", "pybind11.h").exists():
            fail("gradfused: pybind11 is missing: python -m pip install pybind11")
    return (headers, sysconfig.get_path("include"))


def find_compiler() -> list[str]:
    """The C++ compiler as a command: CXX, or the first of the usual names that is on PATH."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    candidates = [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    if chosen:
        fail(NO_COMPILER.format(what=f"CXX names {chosen[0]!r}, which is not on PATH"))
    fail(NO_COMPILER.format(what="found no C++ compiler (tried c++, g++ and clang++)"))


def probe_compiler(cxx: list[str], python_dirs: tuple[str, ...]) -> None:
    """Ends the build at once if the compiler lacks C++17 or does not find Python's headers."""
    program = "#include <Python.h>\n#include <optional>\nint main() { std::optional<int> x; }\n"
    includes = [f"-I{d}" for d in python_dirs]
    command = [*cxx, "-std=c++17", *includes, "-fsyntax-only", "-x", "c++", "-"]
    result = subprocess.run(command, input=program, capture_output=True, text=True)
    if result.returncode == 0:
        return
    if "Python.h" in result.stderr:
        fail(NO_COMPILER.format(what=f"{python_dirs[-1]} has no Python.h"))
    reason = result.stderr.strip() or f"exit status {result.returncode}"
    fail(NO_COMPILER.format(what=f"{shlex.join(cxx)} does not compile C++17 ({reason})"))


def find_ninja() -> str:
    """The ninja executable of the PyPI package, else the one on PATH."""
    try:
        import ninja

        bundled = Path(ninja.BIN_DIR) / "ninja"
        if bundled.exists():
            return str(bundled)
    except ImportError:
        pass
    on_path = shutil.which("ninja")
    return on_path or fail("gradfused: ninja is missing: python -m pip install ninja")
