"""The build_ext of setup.py: compiles the native modules with pybind11 and C++17 through ninja, and never needs torch.

Environment:
    CXX, CXXFLAGS, LDFLAGS: the compiler, and flags that are appended to ours.
    MAX_JOBS: how many compilers run at a time; default: the number of CPUs that this process may use.
    GRADFUSED_SANITIZE: "1" builds gradfused._cpu alone, with AddressSanitizer and UBSan.
    GRADFUSED_CUDA, GRADFUSED_CUDA_ARCHS, CUDACXX, CUDA_HOME: see nvcc.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ninja_file
from native_modules import NativeModule, cpu_module, cuda_module, find_toolkit
from setuptools.command.build_ext import build_ext
from sources import ROOT
from toolchain import fail, find_compiler, find_ninja, job_count, probe_compiler, python_include_dirs

# Hidden visibility leaves the standard library's templates exported; this hides them as well, so
# that neither our instantiations nor another extension's take the place of the other's.
EXPORTS = "{ global: PyInit_*; local: *; };\n"


class NinjaBuildExt(build_ext):
    """A build_ext that compiles every native module in one run of ninja."""

    def build_extensions(self) -> None:
        """Compiles and links the modules, and puts the libraries where setuptools expects them."""
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
        """Builds the modules in one run of ninja, so that all their sources compile in parallel."""
        temp = self.object_dir()
        libraries = [temp / Path(self.get_ext_filename(m.name)).name for m in modules]
        statements = [*ninja_file.rules(compilers, temp)]
        for module, library in zip(modules, libraries, strict=True):
            statements += ninja_file.statements(module, library, temp)
        self.run_ninja(temp, "\n".join(statements))
        for module, library in zip(modules, libraries, strict=True):
            target = Path(self.get_ext_fullpath(module.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(library), str(target))

    def object_dir(self) -> Path:
        """The folder of objects, relative to the root so that no machine's paths enter the library.

        setuptools gives an editable install a temporary folder; the usual one keeps later builds incremental.
        """
        usual = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"
        chosen = usual if self.editable_mode else self.build_temp
        return Path(os.path.relpath(chosen, ROOT))

    def run_ninja(self, temp: Path, text: str) -> None:
        """Runs ninja over the generated file and lets it print to the build's output."""
        temp.mkdir(parents=True, exist_ok=True)
        build_file = temp / "build.ninja"
        build_file.write_text(text)
        (temp / "exports.map").write_text(EXPORTS)
        jobs = str(self.parallel or job_count())
        sys.stdout.flush()
        result = subprocess.run([find_ninja(), "-f", str(build_file), "-j", jobs])
        if result.returncode:
            fail("gradfused: a native module failed to compile; the compiler's output is above.")
