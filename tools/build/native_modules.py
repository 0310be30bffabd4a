"""The native modules: what each is compiled from, and with which flags."""

from __future__ import annotations

import os
import platform
import shlex
from dataclasses import dataclass
from pathlib import Path

import nvcc
from sources import APPLY, CPU_FOLDERS, CPU_KERNEL_FOLDERS, CUDA_FOLDERS, apply_parts, cuda_kernels, sources
from toolchain import fail, job_count

SANITIZE = os.environ.get("GRADFUSED_SANITIZE") == "1"
X86_64 = platform.machine().lower() in ("x86_64", "amd64")

COMMON_FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    *(("-DGRADFUSED_X86=1",) if X86_64 else ()),
)
RELEASE_FLAGS = ("-O3", "-g0", "-DNDEBUG")
SANITIZE_FLAGS = (
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-omit-frame-pointer",
    "-fno-sanitize-recover=undefined",
)
# --fmad=false is the C++ compiler's -ffp-contract=off: CPU and GPU round alike.
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "--fmad=false",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
)
COMMON_LINK_FLAGS = ("-pthread", "-ldl", "-Wl,--exclude-libs,ALL")

# Order matters: of an inline function that several variants define, the linker keeps the first,
# so whatever escapes the per-ISA namespaces is code that every machine can run.
ISA_FLAGS: dict[str, tuple[str, ...]] = {"generic": ()}
if X86_64:
    ISA_FLAGS["avx2"] = ("-mavx2", "-mfma", "-mf16c")
    ISA_FLAGS["avx512"] = (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    )

NO_CUDA = """\
gradfused: cannot build gradfused._cuda: {why}.
GRADFUSED_CUDA=0 builds without it, for the CPU alone."""


@dataclass(frozen=True)
class Variant:
    """Sources that are compiled with the same flags.

    Attributes:
        name: The folder of the objects.
        sources: Paths relative to the repository root.
        flags: Added to the common flags.
        include_dirs: Searched for headers.
        compiler: The ninja rule: "compile" for the C++ compiler, or "nvcc".
    """

    name: str
    sources: tuple[str, ...]
    flags: tuple[str, ...] = ()
    include_dirs: tuple[str, ...] = ("csrc",)
    compiler: str = "compile"


@dataclass(frozen=True)
class NativeModule:
    """One shared library that Python imports.

    Attributes:
        name: Its import name, with dots.
        variants: In link order.
        link_flags: Added to the common link flags.
    """

    name: str
    variants: tuple[Variant, ...]
    link_flags: tuple[str, ...] = ()


def cpu_module(version: str, python_dirs: tuple[str, ...]) -> NativeModule:
    """gradfused._cpu: the kernels compiled once per instruction set, and the code that chooses among them at run time.

    The kernels see neither the version nor Python's headers, so that their objects serve every interpreter and pybind11.
    """
    definitions = (f'-DGRADFUSED_VERSION="{version}"',)
    base = Variant("base", sources(CPU_FOLDERS), definitions, ("csrc", *python_dirs))
    kernels = sources(CPU_KERNEL_FOLDERS)
    per_isa = (Variant(isa, kernels, (f"-DGRADFUSED_ISA={isa}", *flags)) for isa, flags in ISA_FLAGS.items())
    return NativeModule("gradfused._cpu", (base, *per_isa))


def nvcc_flags(toolkit: nvcc.Toolkit) -> tuple[str, ...]:
    """The targets, and several threads for them where there are more jobs than long compiles."""
    threads = job_count() // len(apply_parts())
    parallel = (f"--threads={threads}",) if threads > 1 and len(toolkit.archs) > 1 else ()
    return (*toolkit.target_flags, *parallel)


def cuda_module(version: str, python_dirs: tuple[str, ...], toolkit: nvcc.Toolkit) -> NativeModule:
    """gradfused._cuda: every kernel for every target, in one library."""
    targets = nvcc_flags(toolkit)
    parts = [Variant(name, (APPLY,), (*flags, *targets), compiler="nvcc") for name, flags in apply_parts()]
    common = Variant("common", cuda_kernels(), targets, compiler="nvcc")
    definitions = (
        f'-DGRADFUSED_VERSION="{version}"',
        f'-DGRADFUSED_CUDA_ARCHS="{toolkit.archs_text}"',
        "-DGRADFUSED_CUDA_MODULE=_cuda",
    )
    base = Variant("base", sources(CUDA_FOLDERS), definitions, ("csrc", *python_dirs, *toolkit.include_dirs))
    return NativeModule("gradfused._cuda", (*parts, common, base), (toolkit.runtime, "-lrt", "-lpthread"))


def find_toolkit(cxx: list[str]) -> nvcc.Toolkit | None:
    """The toolkit that builds gradfused._cuda; None where it is not built, after saying why."""
    wish = os.environ.get("GRADFUSED_CUDA") or "auto"
    if wish not in ("auto", "0", "1"):
        fail(f"gradfused: GRADFUSED_CUDA is {wish!r}: expected auto, 0 or 1")
    if wish == "0" or SANITIZE:
        return None
    try:
        toolkit = nvcc.find(cxx)
    except nvcc.Unavailable as why:
        if wish == "1":
            fail(NO_CUDA.format(why=why))
        print(f"gradfused: without CUDA: {why}", flush=True)
        return None
    print(f"gradfused: CUDA kernels for compute capability {toolkit.archs_text}, by {toolkit.command[0]}", flush=True)
    return toolkit


def compile_flags(variant: Variant) -> tuple[str, ...]:
    """All flags but the input and the output; the user's come last, so that they win."""
    includes = (f"-I{d}" for d in variant.include_dirs)
    if variant.compiler == "nvcc":
        return (*NVCC_FLAGS, *variant.flags, *includes)
    return (
        *(SANITIZE_FLAGS if SANITIZE else RELEASE_FLAGS),
        *COMMON_FLAGS,
        *variant.flags,
        *includes,
        *shlex.split(os.environ.get("CXXFLAGS", "")),
    )


def link_flags(module: NativeModule, temp: Path) -> tuple[str, ...]:
    """The flags of the link; a release is stripped."""
    return (
        *(SANITIZE_FLAGS if SANITIZE else ("-s",)),
        *COMMON_LINK_FLAGS,
        f"-Wl,--version-script={temp / 'exports.map'}",
        *module.link_flags,
        *shlex.split(os.environ.get("LDFLAGS", "")),
    )
