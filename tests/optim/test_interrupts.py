"""A step is taken whole or not at all, wherever it is interrupted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from cases import EMULATED_CUDA
from torch import Tensor, nn
from twins import assert_identical, snapshot

import gradfused

PACKAGE = str(Path(str(gradfused.__file__)).parent)
BACKENDS = ("cpu", "reference", EMULATED_CUDA)
every_backend = pytest.mark.parametrize("backend", BACKENDS)

KINDS: dict[str, tuple[type, torch.dtype, dict[str, Any]]] = {
    "adamw": (gradfused.AdamW, torch.float32, {"clip_norm": 1.0}),
    "sgd": (gradfused.SGD, torch.float32, {"momentum": 0.9, "nonfinite": "skip"}),
    "nadam": (gradfused.NAdam, torch.float32, {"zero_grad_in_step": True}),
    "lion": (gradfused.Lion, torch.float32, {"noise": 0.1}),
    "master": (gradfused.AdamW, torch.bfloat16, {"precision": "master", "ema": 0.9}),
    "kahan": (gradfused.AdamW, torch.bfloat16, {"precision": "kahan"}),
}


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line of the package that runs during a call, or only counts lines if n is
    None.
    """

    def __init__(self, at: int | None) -> None:
        self.at, self.lines = at, 0

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace

    def run(self, call: Callable[[], object]) -> bool:
        """Call a function, and say whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


def made(kind: str, backend: str, steps: int) -> Any:
    """An optimizer that has taken steps and has new gradients."""
    cls, dtype, options = KINDS[kind]
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 4).to(dtype)) for _ in range(2)]
    optimizer = cls(params, lr=0.1, backend=backend, **options)
    for _ in range(steps):
        fill(optimizer)
        optimizer.step()
    fill(optimizer)
    return optimizer


def fill(optimizer: Any) -> None:
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = torch.linspace(-1.0, 1.0 + i, 12).view(3, 4).to(p.dtype)


def places(lines: int, count: int) -> list[int]:
    """``count`` lines spread over all of them, and each of the last lines, among which the step is taken."""
    return sorted({*range(1, lines, max(1, lines // count)), *range(max(1, lines - 30), lines + 1)})


def lines_of(call: Callable[[], object]) -> int:
    counter = Interrupter(None)
    assert not counter.run(call)
    return counter.lines


def values(optimizer: Any) -> list[Any]:
    """What a step writes, as values."""
    return snapshot(optimizer)[2:]


def same(a: Any, b: Any) -> bool:
    try:
        assert_identical(a, b)
    except AssertionError:
        return False
    return True


def switched_off(optimizer: Any) -> None:
    """Change the options, so that the next step makes a new table and drops what was kept beside the weights."""
    optimizer.param_groups[0].update(precision=None, ema=None, weight_decay=0.5)


SITUATIONS: dict[str, tuple[int, Callable[[Any], None]]] = {
    "first": (0, lambda optimizer: None),
    "steady": (2, lambda optimizer: None),
    "options changed": (2, switched_off),
}


@every_backend
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_taken_whole_or_not_at_all(kind, situation, backend):
    if backend == "cuda" and kind not in ("adamw", "master"):
        pytest.skip("emulated: two kinds stand for all")
    steps, change = SITUATIONS[situation]

    def ready() -> Any:
        optimizer = made(kind, backend, steps)
        change(optimizer)
        return optimizer

    before, whole = ready(), ready()
    lines = lines_of(whole.step)
    after, twice = values(whole), ready()
    start = values(before)
    for _ in range(2):
        fill(twice)
        twice.step()
    fill(before)
    before.step()
    outcomes = set()
    for at in places(lines, 30):
        optimizer = ready()
        assert Interrupter(at).run(optimizer.step)
        now = values(optimizer)
        taken = same(now, after)
        assert taken or same(now, start), f"line {at} of {lines}"
        outcomes.add(taken)
        fill(optimizer)
        optimizer.step()
        assert same(values(optimizer), values(twice if taken else before)), f"after line {at} of {lines}"
    assert outcomes == {False, True}


@every_backend
@pytest.mark.parametrize("half", ["first", "second"])
def test_half_a_step_of_sam_is_taken_whole_or_not_at_all(half, backend):
    """No backup is lost: restore() brings the weights back whenever they are perturbed."""

    def ready() -> Any:
        base = made("adamw", backend, 1)
        sam = gradfused.SAM(base, rho=0.05)
        if half == "second":
            sam.first_step()
            fill(base)
        return sam

    def weights(sam: Any) -> list[Tensor]:
        return [p.detach().clone() for p in sam.param_groups[0]["params"]]

    def call(sam: Any) -> Callable[[], None]:
        return sam.first_step if half == "first" else sam.second_step

    bottom, whole, start = weights(made("adamw", backend, 1)), ready(), weights(ready())
    lines = lines_of(call(whole))
    end, outcomes = weights(whole), set()
    for at in places(lines, 60):
        sam = ready()
        assert Interrupter(at).run(call(sam))
        now = weights(sam)
        taken = same(now, end)
        assert taken or same(now, start), f"line {at} of {lines}"
        if half == "first":
            assert sam.ascended or not taken
            sam.restore()
            assert same(weights(sam), bottom), f"line {at} of {lines}"
        elif taken:
            assert not sam.ascended
        else:
            assert sam.ascended
            sam.second_step()
            assert same(weights(sam), end), f"line {at} of {lines}"
        outcomes.add(taken)
    assert outcomes == {False, True}


@every_backend
@pytest.mark.parametrize("factory", ["empty_like", "empty", "zeros", "tensor", "full_like", "zeros_like"])
@pytest.mark.parametrize("kind", ["adamw", "master", "kahan"])
def test_a_first_step_without_memory_changes_nothing(kind, factory, backend, monkeypatch):
    """Each allocation of a first step fails in turn, until the step succeeds without a failure."""
    original = getattr(torch, factory)
    for failing in range(40):
        optimizer, calls = made(kind, backend, 0), 0

        def limited(*args: Any, failing: int = failing, **kwargs: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == failing + 1:
                raise MemoryError("made up")
            return original(*args, **kwargs)

        before = values(optimizer)
        monkeypatch.setattr(torch, factory, limited)
        try:
            optimizer.step()
        except MemoryError:
            monkeypatch.setattr(torch, factory, original)
            assert same(values(optimizer), before)
            optimizer.step()
            assert not same(values(optimizer), before)
        else:
            monkeypatch.setattr(torch, factory, original)
            break
    assert calls <= failing
