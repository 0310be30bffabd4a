"""Builds gradfused._cuda with the emulator in place of CUDA: the sources of the kernels are compiled for the CPU."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).resolve().parents[3] / "tools" / "build"))

from sources import APPLY, CSRC, CUDA_FOLDERS, ROOT, apply_parts, cuda_kernels, sources

HERE = Path(__file__).parent
NAME = "_cuda_emulated"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


def compiler() -> str | None:
    """The C++ compiler, or None where there is none."""
    return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


def _units() -> list[tuple[str, Path, tuple[str, ...]]]:
    """What is compiled, the slowest first: (name of the object, source, flags)."""
    parts = [(f"apply-{name}", ROOT / APPLY, flags) for name, flags in apply_parts()]
    others = (*cuda_kernels(), *sources(CUDA_FOLDERS))
    return [*parts, *((source.replace("/", "-"), ROOT / source, ()) for source in others)]


def _sources_hash(command: list[str]) -> str:
    """A hash of the command and of everything that the sources may include."""
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted([*CSRC.rglob("*"), *HERE.glob("*.h")]):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build(sanitize: bool = False) -> Path:
    """The path of the module, which is built if it is not there. Raises CalledProcessError if the compiler fails."""
    import pybind11

    flags = ["-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += [
        "-fno-strict-aliasing",
        "-Wno-unknown-pragmas",
    ]  # packs are read as words, and the pragmas to unroll are for nvcc

    defines = ['-DGRADFUSED_VERSION="emulated"', '-DGRADFUSED_CUDA_ARCHS="none"', f"-DGRADFUSED_CUDA_MODULE={NAME}"]
    includes = [HERE, CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    command = [*shlex.split(compiler() or "c++"), *flags, *defines, *(f"-I{d}" for d in includes)]
    if sanitize:
        command += SANITIZE
    folder = ROOT / "build" / f"emulated-{_sources_hash(command)}"
    library = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:  # of several test processes only the first one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(command, library)
    return library


def _compile(command: list[str], library: Path) -> None:
    folder = library.parent

    def compile_one(unit: tuple[str, Path, tuple[str, ...]]) -> Path:
        name, source, extra = unit
        out = folder / f"{name}.o"
        subprocess.run([*command, *extra, "-x", "c++", "-c", str(source), "-o", str(out)], check=True)
        return out

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, _units()))
    unfinished = folder / "linking.so"
    subprocess.run([*command, "-shared", *map(str, objects), "-o", str(unfinished)], check=True)
    unfinished.replace(library)


def imported(path: Path) -> ModuleType:
    """The module in a file, imported."""
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(sanitize: bool = False) -> ModuleType:
    """The module, built and imported."""
    return imported(build(sanitize))
