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
from cases import CASES, FEW_RECIPES
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Interpreted, the conformance suite takes half an hour on the Triton backend. test_triton.py has what always runs."""
    if not triton_interpreter.INTERPRETED:
        return
    late = [i for i in items if backend_of(i) == "triton" and i.path.name in ("test_conformance.py", "test_chunks.py")]
    if config.getoption("--interpret-all"):
        late = [i for i in late if "test_every_recipe" in i.name and not worth_interpreting(**i.callspec.params)]  # type: ignore[attr-defined]
    config.hook.pytest_deselected(items=late)
    items[:] = [item for item in items if item not in set(late)]


def worth_interpreting(case: str, recipe: str, **_: object) -> bool:
    """What comes before the rule is the same for all: every recipe with the first rules, a few with each of the others."""
    return recipe in FEW_RECIPES or CASES[case].optimizer in ("SGD", "Adam", "AdamW")


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
