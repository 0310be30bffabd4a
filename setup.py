"""Builds gradfused. How its native modules are compiled is in tools/build."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).parent.resolve()
os.chdir(ROOT)
sys.path.insert(0, str(ROOT / "tools" / "build"))

from build_command import NinjaBuildExt  # noqa: E402

# These top-level folders are installed inside the package, since as top-level packages their names would collide with
# other projects'.
MAPPED_PACKAGES = {"gradfused.bench": "bench", "gradfused.triton_kernels": "triton_kernels"}


def package_dirs() -> dict[str, str]:
    """Packages that are installed under another name than their folder's, with the folder of each."""
    found = dict(MAPPED_PACKAGES)
    for package, folder in MAPPED_PACKAGES.items():
        found |= {f"{package}.{inner}": f"{folder}/{inner.replace('.', '/')}" for inner in find_packages(folder)}
    return found


setup(
    packages=[*find_packages(include=["gradfused", "gradfused.*"]), *package_dirs()],
    package_dir=package_dirs(),
    ext_modules=[Extension(name, []) for name in ("gradfused._cpu", "gradfused._cuda")],
    cmdclass={"build_ext": NinjaBuildExt},
)
