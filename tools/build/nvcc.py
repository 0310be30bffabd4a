"""Finds NVIDIA's compiler and what it can build; the build asks it about gradfused._cuda.

Environment:
    GRADFUSED_CUDA: "auto", the default, builds where nvcc is found; "1" insists; "0" leaves it out.
    GRADFUSED_CUDA_ARCHS: compute capabilities to build for, "80 90" or "8.0 9.0"; with "+PTX" also
        what later GPUs compile for themselves; "native": this machine's GPUs; "all": a wheel's.
        Default: native where there is a GPU, else 90.
    CUDACXX, CUDA_HOME: where nvcc is, if not on PATH or in /usr/local/cuda.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

# __grid_constant__ came with 11.7; C++17 and the dependency files that ninja reads are older.
OLDEST = (11, 7)
RELEASE_ARCHS = "80 86 89 90 100 120+PTX"
DEFAULT_ARCHS = "90"
RUNTIME = "libcudart_static.a"


class Unavailable(Exception):
    """The reason why gradfused._cuda cannot be built here, with the remedy."""


@dataclass(frozen=True)
class Toolkit:
    """What a build needs to know of a CUDA toolkit.

    Attributes:
        command: nvcc, with the host compiler named.
        include_dirs: Where cuda_runtime.h is, for the C++ compiler.
        runtime: The static runtime library.
        archs: Compute capabilities without the point, lowest first.
        ptx: Whether PTX of the highest goes in too.
    """

    command: tuple[str, ...]
    include_dirs: tuple[str, ...]
    runtime: str
    archs: tuple[int, ...]
    ptx: bool

    @property
    def archs_text(self) -> str:
        """The targets as GRADFUSED_CUDA_ARCHS takes them."""
        return " ".join(map(str, self.archs)) + ("+PTX" if self.ptx else "")

    @property
    def target_flags(self) -> tuple[str, ...]:
        """Flags for the machine code of each compute capability, and for the PTX."""
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.archs]
        if self.ptx:
            flags.append(f"-gencode=arch=compute_{self.archs[-1]},code=compute_{self.archs[-1]}")
        return tuple(flags)


def output_of(*command: str, timeout: float = 60) -> tuple[int, str]:
    """The exit status of a command and everything that it printed."""
    try:
        result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    return result.returncode, result.stdout


def find_nvcc() -> str:
    """The path of nvcc: where the user points, else in the usual places."""
    if chosen := os.environ.get("CUDACXX"):
        if found := shutil.which(chosen):
            return found
        raise Unavailable(f"CUDACXX names {chosen!r}, which is no program")
    homes = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")))
    for place in (*(f"{home}/bin/nvcc" for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if found := shutil.which(place):
            return found
    raise Unavailable(
        "found no nvcc (tried CUDACXX, CUDA_HOME, PATH and /usr/local/cuda): install the CUDA toolkit, or say where it is"
    )


def check_version(nvcc: str) -> None:
    """Refuses an nvcc too old for the kernels."""
    _, text = output_of(nvcc, "--version")
    match = re.search(r"release (\d+)\.(\d+)", text)
    if not match:
        raise Unavailable(f"{nvcc} --version says no release: {text.strip()[:200]!r}")
    version = (int(match[1]), int(match[2]))
    if version < OLDEST:
        raise Unavailable(f"{nvcc} is of CUDA {match[1]}.{match[2]}, the kernels need {OLDEST[0]}.{OLDEST[1]} or later")


def with_host_compiler(nvcc: str, cxx: list[str]) -> tuple[str, ...]:
    """The nvcc command that uses our C++ compiler, after checking that nvcc accepts it."""
    # A CXX of several words (ccache g++) is more than -ccbin takes: nvcc then finds its own.
    named = len(cxx) == 1 and "NVCC_CCBIN" not in os.environ
    command = (nvcc, "-ccbin", cxx[0]) if named else (nvcc,)
    status, text = output_of(*command, "-std=c++17", "-E", "-x", "cu", os.devnull, "-o", os.devnull)
    if status == 0:
        return command
    said = next((line.strip() for line in text.splitlines() if "error" in line), text.strip()[-200:])
    if "unsupported" in said:
        raise Unavailable(
            f"nvcc does not take {shlex.join(cxx)} ({said}): name an older C++ compiler in CXX or NVCC_CCBIN"
        )
    if "cuda_runtime.h" in said:
        raise Unavailable(f"{nvcc} has no headers ({said}): install the CUDA runtime's development files")
    raise Unavailable(f"{shlex.join(command)} cannot compile: {said}")


def folders(command: tuple[str, ...], cxx: list[str]) -> tuple[tuple[str, ...], str]:
    """Include folders and the static runtime library, as nvcc itself would find them."""
    _, text = output_of(*command, "--dryrun", "-x", "cu", "-c", os.devnull)
    lines = dict(re.findall(r"^#\$ (\w+)= *(.*)$", text, re.MULTILINE))
    includes, libraries = (
        [os.path.normpath(word[2:]) for word in shlex.split(lines.get(name, "")) if word.startswith(flag)]
        for name, flag in (("INCLUDES", "-I"), ("LIBRARIES", "-L"))
    )
    # Distributions keep it among the system's libraries, where the compiler looks by itself.
    _, at_home = output_of(cxx[0], f"-print-file-name={RUNTIME}")
    for place in (*(Path(folder, RUNTIME) for folder in libraries), Path(at_home.strip())):
        if place.is_absolute() and place.exists():
            return tuple(includes), str(place)
    raise Unavailable(f"{command[0]} has no {RUNTIME} (in {libraries}): install the CUDA runtime's development files")


def local_archs() -> str:
    """The compute capabilities of the GPUs here; empty without any."""
    status, text = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return " ".join(re.findall(r"^\d+\.\d+$", text, re.MULTILINE)) if status == 0 else ""


def wanted_archs() -> tuple[set[int], bool]:
    """What GRADFUSED_CUDA_ARCHS asks for, and whether with PTX."""
    text = os.environ.get("GRADFUSED_CUDA_ARCHS", "").strip()
    if text == "native" and not (text := local_archs()):
        raise Unavailable("GRADFUSED_CUDA_ARCHS is native, and nvidia-smi shows no GPU here")
    if text == "all":
        text = RELEASE_ARCHS
    text = text or local_archs() or DEFAULT_ARCHS
    words = re.split(r"[\s,;]+", text.upper().replace("+PTX", " +PTX"))
    archs = [word for word in words if word != "+PTX"]
    if wrong := [a for a in archs if not re.fullmatch(r"\d{2,3}|\d{1,2}\.\d", a)]:
        # Not a reason to build without CUDA, as what is missing here is: somebody asked for it, and misspelt.
        raise SystemExit(
            f"GRADFUSED_CUDA_ARCHS holds {wrong[0]!r}: give compute capabilities as in 80 90, native or all"
        )
    return {int(a.replace(".", "")) for a in archs}, "+PTX" in words


def listed(archs: set[int]) -> str:
    """Compute capabilities in order, with commas."""
    return ", ".join(map(str, sorted(archs)))


def find(cxx: list[str]) -> Toolkit:
    """The toolkit to build with.

    Args:
        cxx: The C++ compiler as a command.

    Raises:
        Unavailable: If nothing can be built, with the reason.
    """
    nvcc = find_nvcc()
    check_version(nvcc)
    command = with_host_compiler(nvcc, cxx)
    include_dirs, runtime = folders(command, cxx)
    wanted, ptx = wanted_archs()
    known = {int(a) for a in re.findall(r"compute_(\d+)\b", output_of(nvcc, "--list-gpu-arch")[1])}
    if unknown := wanted - known:
        print(f"gradfused: {nvcc} does not know compute capability {listed(unknown)}: left out", flush=True)
    if not wanted & known:
        raise Unavailable(f"{nvcc} knows none of compute capabilities {listed(wanted)}, only {listed(known)}")
    return Toolkit(command, include_dirs, runtime, tuple(sorted(wanted & known)), ptx)
