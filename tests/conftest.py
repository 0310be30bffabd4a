"""Shared by all tests: nothing that one of them sets outlives it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import hypothesis
import pytest
import torch
import triton_interpreter  # before anything else imports Triton
from cases import FEW_RECIPES, device_of
from cuda_emulator import build

from gradfused.backends import cpu, cuda

hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")


@cache
def emulated() -> ModuleType:
    """The CUDA kernels compiled for the CPU."""
    return build.load(sanitize=bool(os.environ.get("GRADFUSED_SANITIZE_INSIDE")))


@pytest.fixture(autouse=True)
def _kernels_of_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of ``backend="cuda"`` run on the GPU if there is one, else on CPU tensors through the emulator."""
    if backend_of(request.node) == "cuda" and not cuda.availability().usable:
        monkeypatch.setattr(cuda, "_native", emulated())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--interpret-all", action="store_true", help="every test of the Triton backend, interpreted: see make test-all"
    )


# What a recipe does is the same code for all rules: under the emulator all recipes run with these alone, the other rules with
# one recipe of every way through the kernels.
EVERY_RECIPE = ("sgd", "adam")
SHARED_RECIPES = {
    *FEW_RECIPES,
    "clip-param",
    "centralize-unit-decayed",
    "centralize-unit-update",
    "full-decayed",
    "full-unit",
    "noise",
}


def _is_repetitive(item: pytest.Item) -> bool:
    """Whether an emulated test reaches no code that others of its kind do not."""
    if backend_of(item) != "cuda" or device_of("cuda") != "cpu" or item.path.name != "test_conformance.py":
        return False
    asked = item.callspec.params  # type: ignore[attr-defined]
    case, recipe = asked.get("case", ""), asked.get("recipe", "plain")
    return not case.startswith(EVERY_RECIPE) and bool(case) and recipe not in SHARED_RECIPES


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what would repeat itself, and what takes too long.

    Interpreted, the conformance suite takes half an hour on the Triton backend. test_triton.py has what always runs.
    """
    repetitive = [] if config.getoption("--interpret-all") else [item for item in items if _is_repetitive(item)]
    config.hook.pytest_deselected(items=repetitive)
    items[:] = [item for item in items if item not in set(repetitive)]
    if config.getoption("--interpret-all") or not triton_interpreter.INTERPRETED:
        return
    late = [i for i in items if backend_of(i) == "triton" and i.path.name in ("test_conformance.py", "test_chunks.py")]
    config.hook.pytest_deselected(items=late)
    items[:] = [item for item in items if item not in set(late)]


def backend_of(node: pytest.Item) -> object:
    """The backend that a test is for, if it says so."""
    asked = getattr(node, "callspec", None)
    return None if asked is None else asked.params.get("backend")


@pytest.fixture(autouse=True)
def _kernels_of_triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of ``backend="triton"`` run on the GPU if there is one, else on CPU tensors in Triton's interpreter."""
    if backend_of(request.node) == "triton" and triton_interpreter.INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads and instruction set are the process's; the environment may not choose a backend for the tests.

    One thread, unless a test says otherwise: on shared cores waking a second takes longer than most tests.
    """
    monkeypatch.delenv("GRADFUSED_BACKEND", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    isa = cpu.isa() if cpu.availability().usable else None
    yield
    torch.set_num_threads(threads)
    if isa is not None:
        cpu.native().use_isa(isa)
