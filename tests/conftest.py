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

from gradfused import backends
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


# What a recipe does is the same code for all rules: emulated, interpreted or under sanitizers, all recipes run with these
# alone, the other rules with one recipe of every way through the kernels.
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


def _repeats(item: pytest.Item) -> bool:
    """Whether a conformance test reaches no code of a kernel that others do not."""
    asked = item.callspec.params  # type: ignore[attr-defined]
    case, recipe = asked.get("case", ""), asked.get("recipe", "plain")
    return bool(case) and not case.startswith(EVERY_RECIPE) and recipe not in SHARED_RECIPES


def _is_late(item: pytest.Item, interpret_all: bool) -> bool:
    """Whether a test is left out: it repeats others in a slow way, or all of its kind are too slow for every run."""
    backend, file = backend_of(item), item.path.name
    if backend == "triton" and triton_interpreter.INTERPRETED and file in ("test_kernels.py", "test_chunks.py"):
        return not interpret_all or _repeats(item)
    slow = bool(os.environ.get("GRADFUSED_SANITIZE_INSIDE")) or (backend == "cuda" and device_of("cuda") == "cpu")
    return slow and file == "test_kernels.py" and item.path.parent.name == "conformance" and _repeats(item)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Interpreted, Triton's conformance suite takes some 20 minutes on two cores. The folder triton has what always runs."""
    late = {item for item in items if _is_late(item, config.getoption("--interpret-all"))}
    config.hook.pytest_deselected(items=[item for item in items if item in late])
    items[:] = [item for item in items if item not in late]


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


@pytest.fixture
def _fresh_log() -> Iterator[None]:
    """What auto falls back to is logged once a process: here, once a test."""
    backends._log_fallback.cache_clear()
    yield
    backends._log_fallback.cache_clear()
