"""The native sources: which folders a module is made of, and which rules are compiled together."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

CPU_FOLDERS = ("bind", "plan", "cpu", "lpg")
#: Compiled once per instruction set.
CPU_KERNEL_FOLDERS = ("cpu/kernels", "lpg/kernels")
CUDA_FOLDERS = ("bind", "plan", "cuda")
#: Compiled once per family of rules, lean and full.
APPLY = "csrc/cuda/apply.cu"


def sources(folders: tuple[str, ...], pattern: str = "*.cpp") -> tuple[str, ...]:
    """Source files relative to the repository root, in an order that does not depend on the file system."""
    found = (path for folder in folders for path in sorted((CSRC / folder).glob(pattern)))
    return tuple(path.relative_to(ROOT).as_posix() for path in found)


def cuda_kernels() -> tuple[str, ...]:
    """The CUDA sources that are compiled once, in contrast to APPLY."""
    return tuple(source for source in sources(("cuda",), "*.cu") if source != APPLY)


def rules() -> list[tuple[str, str, str]]:
    """(name, C++ type, family) of each rule in csrc/rules.def."""
    text = (CSRC / "rules.def").read_text()
    return re.findall(r"^GRADFUSED_RULE\((\w+), *(\w+), *(\w+)", text, re.MULTILINE)


def rule_families() -> dict[str, list[str]]:
    """The families of rules, each with the C++ types of its rules."""
    return {family: [rule for _, rule, its in rules() if its == family] for _, _, family in rules()}


def apply_parts() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(name, definitions) of each compilation of APPLY: a family of rules, in its full or in its lean version.

    A full version takes half a minute a target, and ninja starts what comes first: the longest come first.
    """
    return tuple(
        (f"{family}_{'full' if full else 'lean'}", (f"-DGRADFUSED_FAMILY={family}", f"-DGRADFUSED_FULL={full}"))
        for full in (1, 0)
        for family in reversed(rule_families())
    )
