"""Fixtures that choose where kernels run and restore what a test sets, and the choice of tests that are too slow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import hypothesis
import pytest
import torch
import triton_interpreter  # has to come before anything else imports Triton
from cases import FEW_RECIPES, device_of
from cuda_emulator import build

from gradfused import backends
from gradfused.backends import cpu, cuda

hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")


@cache
def emulated() -> ModuleType:
    """The native module of the CUDA backend, compiled for the CPU."""
    return build.load(sanitize=bool(os.environ.get("GRADFUSED_SANITIZE_INSIDE")))


@pytest.fixture(autouse=True)
def _kernels_of_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of ``backend="cuda"`` run on the GPU if there is one, else on CPU tensors through the emulator."""
    if backend_of(request.node) == "cuda" and not cuda.availability().usable:
        monkeypatch.setattr(cuda, "_native", emulated())


def pytest_addoption(parser: pytest.Parser) -> None:
    words = "run every interpreted test of the Triton backend, as make test-all does"
    parser.addoption("--interpret-all", action="store_true", help=words)


# A recipe takes the same code in every rule's kernel. Where kernels are slow, because they are emulated, interpreted or under
# sanitizers, every recipe is tried with these optimizers only, and the other optimizers with one recipe of every way through
# the kernels.
TRIED_WITH_EVERY_RECIPE = ("sgd", "adam")
TRIED_WITH_EVERY_OPTIMIZER = {
    *FEW_RECIPES,
    "clip-param",
    "centralize-unit-decayed",
    "centralize-unit-update",
    "full-decayed",
    "full-unit",
    "noise",
}


def backend_of(node: pytest.Item) -> object:
    """The backend that a test names in its parameters, or None."""
    parameters = getattr(node, "callspec", None)
    return None if parameters is None else parameters.params.get("backend")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test with its backend, so that ``-m`` can choose by it."""
    if (backend := backend_of(item)) in ("cuda", "triton"):
        item.add_marker(str(backend))


def _is_repetition(item: pytest.Item) -> bool:
    """Whether a combination of a case and a recipe reaches no code of a kernel that other combinations do not reach."""
    parameters = item.callspec.params  # type: ignore[attr-defined]
    case, recipe = parameters.get("case", ""), parameters.get("recipe", "plain")
    return bool(case) and not case.startswith(TRIED_WITH_EVERY_RECIPE) and recipe not in TRIED_WITH_EVERY_OPTIMIZER


def _is_left_out(item: pytest.Item, interpret_all: bool) -> bool:
    """Whether a test is too slow here for what it adds."""
    has = item.get_closest_marker
    interpreted = bool(has("triton")) and triton_interpreter.INTERPRETED
    emulated = bool(has("cuda")) and device_of("cuda") == "cpu"
    if interpreted and has("interpret_all") and not interpret_all:
        return True
    slow = interpreted or emulated or bool(os.environ.get("GRADFUSED_SANITIZE_INSIDE"))
    return slow and bool(has("combination")) and _is_repetition(item)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that are too slow here: interpreted, Triton's combinations alone take 20 minutes on two cores."""
    left_out = {item for item in items if _is_left_out(item, config.getoption("--interpret-all"))}
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _kernels_of_triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of ``backend="triton"`` run on the GPU if there is one, else on CPU tensors in Triton's interpreter."""
    if backend_of(request.node) == "triton" and triton_interpreter.INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the process's threads and instruction set, and keep the environment from choosing a backend.

    A test gets one thread unless it sets more: on shared cores waking a second takes longer than most tests.
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
    """Make ``backend="auto"`` log its fallback once in this test, not once in the process."""
    backends._log_fallback.cache_clear()
    yield
    backends._log_fallback.cache_clear()
