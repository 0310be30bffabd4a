"""Runs the kernels' tests over native modules built with AddressSanitizer and UBSan; `make sanitize` runs it.

The build goes to build/sanitize and leaves the usual one alone. All tests marked ``kernels`` are run on the CPU backend; the
CUDA backend's run under the emulator, and only those marked ``sanitized_cuda``, since under AddressSanitizer the emulator's
fibers take long to switch. Arguments are passed on to pytest.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
PACKAGES = BUILD / "lib"
INSIDE = "GRADFUSED_SANITIZE_INSIDE"
TESTS = "kernels and not gpu and (not cuda or sanitized_cuda)"


def build() -> None:
    """Copies the package and compiles the module; the copy is new, the objects are kept."""
    shutil.rmtree(PACKAGES, ignore_errors=True)
    command = [sys.executable, "setup.py", "--quiet", "build"]
    command += ["--build-base", str(BUILD), "--build-lib", str(PACKAGES)]
    env = {**os.environ, "GRADFUSED_SANITIZE": "1"}
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    emulator = "from cuda_emulator import build; build.build(sanitize=True)"
    subprocess.run([sys.executable, "-c", emulator], cwd=ROOT / "tests" / "support", check=True)


def runtime_library(name: str) -> str:
    """Path of a library of the compiler's."""
    cxx = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    command = [*cxx, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{cxx[0]} has no {name}: install it, or set CXX to a g++ that has it")
    return path


def sanitizer_environment() -> dict[str, str]:
    """The environment in which Python can load the sanitized module.

    libstdc++ is preloaded too: AddressSanitizer intercepts exceptions, and looks for them before
    Python has loaded any C++. Python's own allocator would hide overflows of small buffers.
    Leaks are not looked for: the interpreter's own are many.
    """
    libraries = [runtime_library(n) for n in ("libasan.so", "libubsan.so", "libstdc++.so")]
    return {
        **os.environ,
        INSIDE: "1",
        "PYTHONPATH": str(PACKAGES),
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",
    }


def assert_sanitized() -> None:
    """Fails unless what the tests will import is the sanitized module, under the sanitizer."""
    module = importlib.import_module("gradfused._cpu")
    file = Path(str(module.__file__))
    if not file.is_relative_to(PACKAGES):
        raise SystemExit(f"gradfused._cpu came from {file}, not from {PACKAGES}")
    symbols = file.read_bytes()
    missing = [s for s in (b"__asan_report", b"__ubsan_handle") if s not in symbols]
    if missing or not hasattr(ctypes.CDLL(None), "__asan_init"):
        raise SystemExit(f"{file} is not sanitized, or runs without the sanitizer's library")
    print(f"sanitized: {file.relative_to(ROOT)}", flush=True)


def pytest_configure() -> None:
    """Called by pytest in each of its processes, to which this file is a plugin."""
    assert_sanitized()


def run_tests(arguments: list[str]) -> int:
    """Runs pytest. A sanitizer writes its report to file descriptor 2 before the process ends: pytest must not capture it."""
    import pytest

    options = [
        "-m",
        TESTS,
        "-n",
        "auto",
        "--dist",
        "worksteal",
        "-p",
        "sanitize",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
    ]
    return pytest.main([*options, *arguments])


def main() -> int:
    """Builds, then starts this file again under the sanitizers."""
    if os.environ.get(INSIDE):
        return run_tests(sys.argv[1:])
    build()
    command = [sys.executable, str(Path(__file__)), *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=sanitizer_environment()).returncode


if __name__ == "__main__":
    sys.exit(main())
