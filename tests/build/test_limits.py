"""Functions stay short, no name of a class is used twice, and nothing cites what is not in the repository."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from cpp_outline import Class, Function, outline
from repository import ROOT

MOST_LINES, MOST_PARAMETERS = 80, 10
FOLDERS = ("gradfused", "csrc", "triton_kernels", "bench", "tools", "examples", "tests", "docs")
LIBRARY = ("gradfused", "csrc", "triton_kernels")
#: Signatures that are those of torch.optim and torch.nn with options of our own: keywords, which nobody counts off.
PUBLIC_SIGNATURES = (
    "gradfused/optim/*.py:__init__",
    "gradfused/lpg/module.py:__init__",
    "gradfused/lpg/function.py:lpg_cross_entropy",
)


def files(*suffixes: str, folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    """The files of some folders and of the root, relative to it."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    if folders == FOLDERS:
        found += ROOT.iterdir()
    return sorted(path.relative_to(ROOT) for path in found if path.suffix in suffixes and path.is_file())


PYTHON, CPP = files(".py"), files(".h", ".cpp", ".cu")


@cache
def python_functions(path: Path) -> list[tuple[str, int, int]]:
    """(name, lines, parameters) of every function, lambdas apart."""
    nodes = [n for n in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(n, ast.FunctionDef)]
    return [(n.name, (n.end_lineno or 0) - n.lineno + 1, len(list(_parameters(n.args)))) for n in nodes]


def _parameters(arguments: ast.arguments) -> Iterator[ast.arg]:
    yield from (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)


@cache
def cpp_outline(path: Path) -> list[Function | Class]:
    return list(outline((ROOT / path).read_text()))


def is_public_signature(path: Path, name: str) -> bool:
    return any(path.match(pattern.split(":")[0]) and name == pattern.split(":")[1] for pattern in PUBLIC_SIGNATURES)


@pytest.mark.parametrize("path", PYTHON, ids=str)
def test_python_functions_are_short(path: Path) -> None:
    for name, lines, parameters in python_functions(path):
        assert lines <= MOST_LINES, f"{name} has {lines} lines"
        assert parameters <= MOST_PARAMETERS or is_public_signature(path, name), f"{name} has {parameters} parameters"


@pytest.mark.parametrize("path", CPP, ids=str)
def test_cpp_functions_are_short(path: Path) -> None:
    for function in (found for found in cpp_outline(path) if isinstance(found, Function)):
        assert function.lines <= MOST_LINES, function
        assert function.parameters <= MOST_PARAMETERS, function


def twice(names: Iterator[tuple[str, str]]) -> dict[str, list[str]]:
    """Names that are given in several places."""
    places: dict[str, list[str]] = {}
    for name, place in names:
        places.setdefault(name, []).append(place)
    return {name: found for name, found in places.items() if len(found) > 1}


def test_no_class_of_python_has_the_name_of_another() -> None:
    nodes = (
        (node, path)
        for path in files(".py", folders=LIBRARY)
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
    )
    assert not twice((node.name, f"{path}:{node.lineno}") for node, path in nodes if isinstance(node, ast.ClassDef))


def test_no_class_of_cpp_has_the_name_of_another() -> None:
    """The engines of the CPU and of CUDA apart, each the only one in its namespace."""
    found = ((found, path) for path in files(".h", ".cpp", ".cu", folders=LIBRARY) for found in cpp_outline(path))
    names = twice((found.name, f"{path}:{found.line}") for found, path in found if isinstance(found, Class))
    names.pop("Engine", None)
    assert not names


@pytest.mark.parametrize("path", files(".py", ".pyi", ".h", ".cpp", ".cu", ".def", ".md", ".toml"), ids=str)
def test_nothing_cites_a_page_that_is_not_here(path: Path) -> None:
    assert not re.search(r"\bDESIGN [1-9]", (ROOT / path).read_text())


# ---- what finds the functions of C++

SOURCE = """
#define IGNORED(x) { x
namespace gradfused {
// a brace in a comment {
struct Range {
  Range(int begin, int end) : begin_{begin}, end_(end) {}
  int size() const { return end_ - begin_; }
  enum class Inner { one };
};
template <class T, int kCount> static bool
matches(const Pair<int, T>& at, char quote = '{', void (*then)(int, int) = nullptr) {
  const auto same = [](int a, int b) { return a == b; };
  for (int i = 0; i < kCount; ++i) { if (same(i, 0)) return true; }
  return at.first == std::string("}").size();
}
template <> struct Special<int> { int x; };
}  // namespace gradfused
extern "C" void launch() {}
"""


def test_the_outline_of_a_source() -> None:
    found = Counter(outline(SOURCE))
    assert found == Counter(
        [
            Function("Range", 6, 1, 2),
            Function("size", 7, 1, 0),
            Class("Range", 5),
            Function("matches", 10, 6, 3),
            Function("launch", 18, 1, 0),
        ]
    )
