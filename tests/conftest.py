"""Shared by all tests: nothing that one of them sets outlives it."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from gradfused.backends import cpu

hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")


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
