"""A rule is in the places that docs/adding-a-rule.md names and in no others, and the page's walk-through adds one."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import rule_places
import torch
from cuda_emulator import build
from repository import ROOT

import gradfused

OPTIMIZERS = [
    name for name, kind in vars(gradfused).items() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
]


@pytest.mark.parametrize("rule", rule_places.rules())
def test_a_rule_is_in_its_places_and_in_no_others(rule: str) -> None:
    assert not list(rule_places.problems(rule))


def test_there_are_at_most_ten_places() -> None:
    assert len(rule_places.places("any")) <= 10


def test_no_other_file_lists_the_rules() -> None:
    assert not list(rule_places.lists())


@pytest.mark.parametrize("path", rule_places.LISTS)
def test_files_that_name_most_rules_are_there(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("page", ["docs/options.md", "CHANGELOG.md"])
def test_pages_name_every_optimizer(name: str, page: str) -> None:
    text = (ROOT / page).read_text()
    assert f"`{name}`" in text or f"gradfused.{name}" in text or f"`{name}(" in text


# ---- the walk-through


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the rule of the page."""
    folder = tmp_path_factory.mktemp("with a rule")
    rule_places.try_out(folder)
    return folder


def run(*command: str, inside: Path) -> None:
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=inside)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_oracle_of_the_page_is_right(copy: Path) -> None:
    tests = "tests/conformance/test_papers.py"
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", "sign-sgd", inside=copy)


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_the_header_of_the_page_compiles(copy: Path) -> None:
    flags = ("-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Icsrc", "-DGRADFUSED_ISA=generic")
    run(*shlex.split(build.compiler() or "c++"), *flags, "csrc/cpu/kernels/kernels.cpp", inside=copy)


def test_blocks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a\nb\n")
    rule_places.Block("diff", "file", " a\n+new\n b\n").apply(tmp_path)
    assert (tmp_path / "file").read_text() == "a\nnew\nb\n"
    with pytest.raises(ValueError, match="expected these lines once in file:\na\nb\n"):
        rule_places.Block("diff", "file", " a\n+new\n b\n").apply(tmp_path)
