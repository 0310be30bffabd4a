"""Builds gradfused's native modules: pybind11 and C++17 through ninja, never torch.

Environment:
    CXX, CXXFLAGS, LDFLAGS: the compiler, and flags appended to ours.
    MAX_JOBS: parallel compiles; default: the CPUs this process may use.
    GRADFUSED_SANITIZE: "1" builds with AddressSanitizer and UBSan, without gradfused._cuda.
    GRADFUSED_CUDA, GRADFUSED_CUDA_ARCHS, CUDACXX, CUDA_HOME: see tools/nvcc.py.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
os.chdir(ROOT)
sys.path.insert(0, str(ROOT / "tools"))

import nvcc  # noqa: E402

# Top-level folders that are installed inside the package: as top-level packages their names
# would collide with other projects'.
MAPPED_PACKAGES = {"gradfused.bench": "bench", "gradfused.triton_kernels": "triton_kernels"}

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
APPLY = "csrc/cuda/apply.cu"
COMMON_LINK_FLAGS = ("-pthread", "-ldl", "-Wl,--exclude-libs,ALL")

# Hidden visibility leaves the standard library's templates exported; this hides them as well, so
# that neither our instantiations nor another extension's take the place of the other's.
EXPORTS = "{ global: PyInit_*; local: *; };\n"

# Order matters: of an inline function that several variants define, the linker keeps the first,
# so whatever escapes the per-ISA namespaces is code that every machine can run.
ISA_FLAGS: dict[str, tuple[str, ...]] = {"generic": ()}
if X86_64:
    ISA_FLAGS["avx2"] = ("-mavx2", "-mfma", "-mf16c")
    ISA_FLAGS["avx512"] = (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
        *("-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512"),
    )

NO_COMPILER = """\
gradfused: cannot build from source: {what}.
Install a C++17 compiler and Python's headers (Debian, Ubuntu: apt install g++ python3-dev;
Fedora: dnf install gcc-c++ python3-devel) or name a compiler in CXX. A gradfused wheel
installs without a compiler: python -m pip install gradfused-*.whl"""


NO_CUDA = """\
gradfused: cannot build gradfused._cuda: {why}.
GRADFUSED_CUDA=0 builds without it, for the CPU alone."""


@dataclass(frozen=True)
class Variant:
    """Sources compiled alike.

    Attributes:
        name: Folder of the objects.
        sources: Paths relative to the repository root.
        flags: Added to the common flags.
        include_dirs: Searched for headers.
        compiler: The ninja rule, of the C++ compiler or of nvcc.
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
        name: Dotted import name.
        variants: In link order.
        link_flags: Added to the common ones.
    """

    name: str
    variants: tuple[Variant, ...]
    link_flags: tuple[str, ...] = ()


def fail(message: str) -> NoReturn:
    """Ends the build with a message in place of a traceback."""
    raise SystemExit(f"\n{message}\n")


def glob(pattern: str) -> tuple[str, ...]:
    """Source files, in an order that does not depend on the file system."""
    return tuple(sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob(pattern)))


def python_include_dirs() -> tuple[str, ...]:
    """Headers that bindings need: Python's, and pybind11's or torch's copy of them."""
    try:
        import pybind11

        headers = pybind11.get_include()
    except ImportError:
        torch = importlib.util.find_spec("torch")
        headers = str(Path(str(torch and torch.origin)).parent / "include")
        if not Path(headers, "pybind11", "pybind11.h").exists():
            fail("gradfused: pybind11 is missing: python -m pip install pybind11")
    return (headers, sysconfig.get_path("include"))


def cpu_module(version: str, python_dirs: tuple[str, ...]) -> NativeModule:
    """gradfused._cpu: kernels once per instruction set, chosen at run time by the rest.

    Kernels see neither the version nor Python, so a new interpreter or pybind11 reuses them.
    """
    bindings = Variant(
        "base",
        (*glob("csrc/bind/*.cpp"), *glob("csrc/device/*.cpp"), *glob("csrc/cpu/*.cpp"), *glob("csrc/lpg/*.cpp")),
        flags=(f'-DGRADFUSED_VERSION="{version}"',),
        include_dirs=("csrc", *python_dirs),
    )
    kernels = (*glob("csrc/cpu/kernels/*.cpp"), *glob("csrc/lpg/kernels/*.cpp"))
    per_isa = (Variant(isa, kernels, flags=(f"-DGRADFUSED_ISA={isa}", *flags)) for isa, flags in ISA_FLAGS.items())
    return NativeModule("gradfused._cpu", (bindings, *per_isa))


def rule_families() -> tuple[str, ...]:
    """The families of csrc/rules.def: the rules of one are compiled together."""
    text = (ROOT / "csrc" / "rules.def").read_text()
    return tuple(dict.fromkeys(re.findall(r"^GRADFUSED_RULE\(\w+, *\w+, *(\w+)\)", text, re.MULTILINE)))


def apply_variants(toolkit: nvcc.Toolkit) -> Iterator[Variant]:
    """The step's kernels, once per family of rules and version: a full one costs half a minute a target.

    Ninja starts what comes first, so the longest does.
    """
    for full in (1, 0):
        for family in reversed(rule_families()):
            name = f"{family}_{'full' if full else 'lean'}"
            flags = (f"-DGRADFUSED_FAMILY={family}", f"-DGRADFUSED_FULL={full}", *nvcc_flags(toolkit))
            yield Variant(name, (APPLY,), flags, compiler="nvcc")


def nvcc_flags(toolkit: nvcc.Toolkit) -> tuple[str, ...]:
    """Targets, and threads for them where there are more jobs than long compiles."""
    threads = job_count() // (2 * len(rule_families()))
    parallel = (f"--threads={threads}",) if threads > 1 and len(toolkit.archs) > 1 else ()
    return (*toolkit.target_flags, *parallel)


def cuda_module(version: str, python_dirs: tuple[str, ...], toolkit: nvcc.Toolkit) -> NativeModule:
    """gradfused._cuda: every kernel for every target, in one library."""
    others = tuple(source for source in glob("csrc/cuda/*.cu") if source != APPLY)
    common = Variant("common", others, nvcc_flags(toolkit), compiler="nvcc")
    definitions = (
        f'-DGRADFUSED_VERSION="{version}"',
        f'-DGRADFUSED_CUDA_ARCHS="{toolkit.archs_text}"',
        "-DGRADFUSED_CUDA_MODULE=_cuda",
    )
    includes = ("csrc", *python_dirs, *toolkit.include_dirs)
    sources = (*glob("csrc/bind/*.cpp"), *glob("csrc/device/*.cpp"), *glob("csrc/cuda/*.cpp"))
    bindings = Variant("base", sources, definitions, includes)
    variants = (*apply_variants(toolkit), common, bindings)
    return NativeModule("gradfused._cuda", variants, link_flags=(toolkit.runtime, "-lrt", "-lpthread"))


def find_toolkit(cxx: list[str]) -> nvcc.Toolkit | None:
    """What builds gradfused._cuda; None, having said why, where it is not built."""
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


def find_compiler() -> list[str]:
    """The C++ compiler as a command, from CXX or the usual names on PATH."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    candidates = [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    if chosen:
        fail(NO_COMPILER.format(what=f"CXX names {chosen[0]!r}, which is not on PATH"))
    fail(NO_COMPILER.format(what="found no C++ compiler (tried c++, g++ and clang++)"))


def probe_compiler(cxx: list[str], python_dirs: tuple[str, ...]) -> None:
    """Refuses a compiler that lacks C++17 or cannot see Python's headers, before any work."""
    program = "#include <Python.h>\n#include <optional>\nint main() { std::optional<int> x; }\n"
    includes = [f"-I{d}" for d in python_dirs]
    result = subprocess.run(
        [*cxx, "-std=c++17", *includes, "-fsyntax-only", "-x", "c++", "-"],
        input=program,
        capture_output=True,
        text=True,
    )
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


def job_count() -> int:
    """MAX_JOBS, else the CPUs this process may run on."""
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def escape(path: str | Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell(words: tuple[str, ...]) -> str:
    """Flags as ninja hands them to the shell."""
    return shlex.join(words).replace("$", "$$")


def compile_flags(variant: Variant) -> tuple[str, ...]:
    """Everything but input and output, the user's flags last so that they win."""
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
    """Flags of the link; a release is stripped."""
    return (
        *(SANITIZE_FLAGS if SANITIZE else ("-s",)),
        *COMMON_LINK_FLAGS,
        f"-Wl,--version-script={temp / 'exports.map'}",
        *module.link_flags,
        *shlex.split(os.environ.get("LDFLAGS", "")),
    )


def module_statements(module: NativeModule, library: Path, temp: Path) -> Iterator[str]:
    """Ninja statements for one module: an object per source and variant, then the link."""
    objects = []
    for variant in module.variants:
        flags = shell(compile_flags(variant))
        for source in variant.sources:
            obj = escape(temp / module.name / variant.name / Path(source).with_suffix(".o"))
            objects.append(obj)
            yield f"build {obj}: {variant.compiler} {escape(source)}\n  flags = {flags}\n"
    flags = shell(link_flags(module, temp))
    yield f"build {escape(library)}: link {' '.join(objects)}\n  flags = {flags}\n"


def ninja_rules(compilers: dict[str, tuple[str, ...]], temp: Path) -> Iterator[str]:
    """Ninja's rules, one a compiler and the link; depfiles make it notice headers."""
    yield f"builddir = {escape(temp)}\n"
    for name, command in compilers.items():
        yield (
            f"rule {name}\n  command = {shell(command)} -MMD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = compile $out\n"
        )
    linker = shell(compilers["compile"])
    yield f"rule link\n  command = {linker} -shared -o $out $in $flags\n  description = link $out\n"


class NinjaBuildExt(build_ext):
    """build_ext that compiles every native module in one ninja run."""

    def build_extensions(self) -> None:
        """Compiles, links, and puts the libraries where setuptools expects them."""
        if sys.platform != "linux":
            fail(f"gradfused: the native modules build on Linux only, not on {sys.platform}.")
        cxx, python_dirs = find_compiler(), python_include_dirs()
        probe_compiler(cxx, python_dirs)
        version = self.distribution.get_version()
        compilers, modules = {"compile": tuple(cxx)}, [cpu_module(version, python_dirs)]
        if toolkit := find_toolkit(cxx):
            compilers["nvcc"] = toolkit.command
            modules.insert(0, cuda_module(version, python_dirs, toolkit))
        self.extensions = [e for e in self.extensions if e.name in {m.name for m in modules}]
        self.build_modules(compilers, modules)

    def build_modules(self, compilers: dict[str, tuple[str, ...]], modules: list[NativeModule]) -> None:
        """One ninja run for all of them."""
        temp = self.object_dir()
        libraries = [temp / Path(self.get_ext_filename(m.name)).name for m in modules]
        statements = [*ninja_rules(compilers, temp)]
        for module, library in zip(modules, libraries, strict=True):
            statements += module_statements(module, library, temp)
        self.run_ninja(temp, "\n".join(statements))
        for module, library in zip(modules, libraries, strict=True):
            target = Path(self.get_ext_fullpath(module.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(library), str(target))

    def object_dir(self) -> Path:
        """Folder of objects, relative to the root so that no machine's paths enter the library.

        An editable install is given a temporary folder; the usual one keeps it incremental.
        """
        usual = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        chosen = usual if self.editable_mode else self.build_temp
        return Path(os.path.relpath(chosen, ROOT))

    def run_ninja(self, temp: Path, text: str) -> None:
        """Runs ninja over the generated file; what it prints is the build's output."""
        temp.mkdir(parents=True, exist_ok=True)
        build_file = temp / "build.ninja"
        build_file.write_text(text)
        (temp / "exports.map").write_text(EXPORTS)
        jobs = str(self.parallel or job_count())
        sys.stdout.flush()
        result = subprocess.run([find_ninja(), "-f", str(build_file), "-j", jobs])
        if result.returncode:
            fail("gradfused: a native module failed to compile; the compiler's output is above.")


def package_dirs() -> dict[str, str]:
    """Folders installed under another package name, and packages inside them."""
    found = {}
    for package, folder in MAPPED_PACKAGES.items():
        if (ROOT / folder / "__init__.py").exists():
            found[package] = folder
            for inner in find_packages(folder):
                found[f"{package}.{inner}"] = f"{folder}/{inner.replace('.', '/')}"
    return found


setup(
    packages=[*find_packages(include=["gradfused", "gradfused.*"]), *package_dirs()],
    package_dir=package_dirs(),
    ext_modules=[Extension(name, []) for name in ("gradfused._cpu", "gradfused._cuda")],
    cmdclass={"build_ext": NinjaBuildExt},
)
