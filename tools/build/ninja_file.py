"""Writes the ninja file that compiles and links native modules."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from native_modules import NativeModule, compile_flags, link_flags


def escape(path: str | Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell(words: tuple[str, ...]) -> str:
    """A command line as ninja passes it to the shell."""
    return shlex.join(words).replace("$", "$$")


def rules(compilers: dict[str, tuple[str, ...]], temp: Path) -> Iterator[str]:
    """Ninja's rules: one for each compiler, and the link. Through the dependency files ninja notices changed headers."""
    yield f"builddir = {escape(temp)}\n"
    for name, command in compilers.items():
        yield (
            f"rule {name}\n  command = {shell(command)} -MMD -MF $out.d $flags -c $in -o $out\n"
            "  depfile = $out.d\n  deps = gcc\n  description = compile $out\n"
        )
    linker = shell(compilers["compile"])
    yield f"rule link\n  command = {linker} -shared -o $out $in $flags\n  description = link $out\n"


def statements(module: NativeModule, library: Path, temp: Path) -> Iterator[str]:
    """Ninja's statements for one module: an object for each source of each variant, then the link."""
    objects = []
    for variant in module.variants:
        flags = shell(compile_flags(variant))
        for source in variant.sources:
            obj = escape(temp / module.name / variant.name / Path(source).with_suffix(".o"))
            objects.append(obj)
            yield f"build {obj}: {variant.compiler} {escape(source)}\n  flags = {flags}\n"
    flags = shell(link_flags(module, temp))
    yield f"build {escape(library)}: link {' '.join(objects)}\n  flags = {flags}\n"
