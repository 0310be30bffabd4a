"""SAM inside trainers: which half a call of step() takes, and where attributes are kept."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EMULATED_CUDA
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook
from twins import assert_identical, assert_same, loss_of, small_model
from wrappers import WRAPPERS, Accelerated, Copying, Forwarding, Inheriting, MixedPrecision

import gradfused
from gradfused import SAM

backends = pytest.mark.parametrize("backend", ["cpu", "reference", EMULATED_CUDA])
RHO = 0.3


def made(**options: Any) -> tuple[nn.Module, SAM]:
    model = small_model()
    return model, SAM(gradfused.AdamW(model.parameters(), lr=0.01, **options), RHO)


def backward(model: nn.Module, index: int, amp: torch.amp.GradScaler | None = None) -> float:
    model.zero_grad()
    loss = loss_of(model, index)
    (loss if amp is None else amp.scale(loss)).backward()
    return float(loss.detach())


def weights(model: nn.Module) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(steps: int) -> SAM:
    """The result that a trainer should arrive at."""
    model, sam = made()
    for index in range(steps):
        sam.step(lambda i=index: backward(model, i))
    return sam


# ---- step() once a batch


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=256.0)


def bare(sam: SAM) -> Callable[[], object]:
    return sam.step


def bare_scaled(sam: SAM) -> Callable[[], object]:
    amp = scaler()
    amp.scale(torch.ones(()))
    return lambda: amp.step(sam)


def accelerated(sam: SAM) -> Callable[[], object]:
    return Accelerated(sam).step


def accelerated_scaled(sam: SAM) -> Callable[[], object]:
    amp = scaler()
    amp.scale(torch.ones(()))
    return Accelerated(sam, amp).step


def forwarded(sam: SAM) -> Callable[[], object]:
    return Forwarding(sam).step


@pytest.mark.parametrize("loop", [bare, bare_scaled, accelerated, accelerated_scaled, forwarded])
@backends
def test_step_once_a_batch_is_refused_at_once(loop: Callable[[SAM], Callable[[], object]], backend: str) -> None:
    model, sam = made(backend=backend)
    step, before = loop(sam), weights(model)
    for index in range(2):
        backward(model, index)
        with pytest.raises(RuntimeError, match=r"without first_step\(\).*second_step\(\).*step\(closure\)"):
            step()
        assert_identical(weights(model), before)
        assert not sam.ascended
        assert not any(sam.state.values())


@pytest.mark.parametrize("loop", [bare, bare_scaled, accelerated, accelerated_scaled, forwarded])
@backends
def test_step_after_a_first_step_is_the_second(loop: Callable[[SAM], Callable[[], object]], backend: str) -> None:
    """So a trainer's own call of step() may take the descent, once the ascent was called by its name."""
    model, sam = made(backend=backend)
    step = loop(sam)
    backward(model, 0)
    sam.first_step()
    backward(model, 0)
    if loop in (bare_scaled, accelerated_scaled):
        for p in model.parameters():
            p.grad.mul_(256.0)
    step()
    assert_same(sam, trained(1))
    assert not sam.ascended


@backends
def test_accelerate_and_an_overflow_in_the_descent(backend: str) -> None:
    """The step is called, so that the weights go back, and training goes on."""
    model, sam = made(backend=backend)
    amp, before = scaler(), weights(model)
    wrapped = Accelerated(sam, amp)
    backward(model, 0)
    sam.first_step()
    backward(model, 0, amp)
    model.head.bias.grad.fill_(math.inf)
    wrapped.step()
    assert not sam.ascended
    assert_identical(weights(model), before)
    backward(model, 0)
    sam.first_step()
    backward(model, 0, amp)
    wrapped.step()
    assert_same(sam, trained(1))


@pytest.mark.parametrize("scaled", [False, True])
def test_lightning_with_automatic_optimization(scaled: bool) -> None:
    """It passes a closure, except to a scaler."""
    model, sam = made()
    plugin = MixedPrecision(model, scaler() if scaled else None)
    wrapped = Inheriting(sam, plugin.optimizer_step)
    for index in range(1 if scaled else 3):
        if scaled:
            with pytest.raises(RuntimeError, match=r'scaler\.step\(sam, half="first"\)'):
                wrapped.step(lambda i=index: backward(model, i, plugin.scaler))
        else:
            wrapped.step(lambda i=index: backward(model, i))
    assert_same(sam, trained(0 if scaled else 3))


@pytest.mark.parametrize("how", ["methods", "half"])
@pytest.mark.parametrize("scaled", [False, True])
def test_lightning_with_manual_optimization(scaled: bool, how: str) -> None:
    model, sam = made()
    plugin = MixedPrecision(model, scaler() if scaled and how == "half" else None)
    wrapped = Inheriting(sam, plugin.optimizer_step)
    for index in range(3):
        for half in ("first", "second"):
            backward(model, index, plugin.scaler)
            wrapped.step(half=half) if how == "half" else getattr(wrapped, f"{half}_step")()
    assert_same(sam, trained(3))


def test_lightnings_closure_that_does_nothing_is_refused() -> None:
    """It makes one up for step() without a closure, with which both halves would see the same gradients."""
    model, sam = made()
    wrapped, before = Inheriting(sam), weights(model)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="closure returned None and left the gradients as they were"):
        wrapped.step()
    assert_identical(weights(model), before)
    assert not sam.ascended


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_closure_that_returns_none_may_work(set_to_none: bool) -> None:
    model, sam = made()

    def closure(index: int) -> None:
        sam.zero_grad(set_to_none=set_to_none)
        loss_of(model, index).backward()

    for index in range(3):
        assert sam.step(lambda i=index: closure(i)) is None
    assert_same(sam, trained(3))


def test_a_closure_under_a_scaler_is_refused() -> None:
    model, sam = made()
    amp = scaler()
    backward(model, 0, amp)
    with pytest.raises(RuntimeError, match="the scaler looks for an overflow before the closure"):
        amp.step(sam, lambda: backward(model, 0, amp))
    assert not sam.ascended
    sam.step(lambda: backward(model, 0))  # no scale was left behind
    assert_same(sam, trained(1))


def test_half_of_another_name() -> None:
    with pytest.raises(ValueError, match="half: expected 'first' or 'second', got 1"):
        made()[1].step(half=1)


@backends
def test_gradients_of_zero_take_the_optimizers_step(backend: str) -> None:
    """The ascent does not move the weights, so one gradient is enough. Code that makes an optimizer's state does this."""
    (model, sam), (other, plain) = made(backend=backend), made(backend=backend)
    for m in (model, other):
        for p in m.parameters():
            p.grad = torch.zeros_like(p)
    sam.step(closure=None)
    plain.base_optimizer.step()
    assert_same(sam, plain)
    assert all(sam.state[p] for p in model.parameters())
    assert not sam.ascended
    sam.zero_grad()
    sam.step()  # nor is there anything to do without gradients


# ---- where attributes are kept


@pytest.mark.parametrize("kind", WRAPPERS)
def test_halves_through_a_wrapper(kind: type) -> None:
    """The halves are called through the wrapper and without it, in turns."""
    model, sam = made()
    wrapped = kind(sam)
    for index in range(4):
        backward(model, index)
        (wrapped if index % 2 else sam).first_step()
        assert sam.ascended
        assert wrapped.ascended
        backward(model, index)
        (wrapped if index % 3 else sam).second_step()
        assert not sam.ascended
        assert not wrapped.ascended
    assert_same(sam, trained(4))
    before = weights(model)
    wrapped.first_step()
    wrapped.restore()
    assert_identical(weights(model), before)


@pytest.mark.parametrize("kind", [Inheriting, Copying])
def test_what_is_assigned_through_a_wrapper_is_the_optimizers(kind: type) -> None:
    _, sam = made()
    wrapped = kind(sam)
    wrapped.adaptive, wrapped.rho, wrapped.eta = True, 0.7, 0.01
    assert (sam.rho, sam.adaptive, sam.eta) == (0.7, True, 0.01)
    assert wrapped.param_groups is sam.base_optimizer.param_groups
    groups = [dict(group) for group in sam.param_groups]
    wrapped.param_groups = groups
    assert sam.base_optimizer.param_groups is groups


@pytest.mark.parametrize("kind", WRAPPERS)
def test_saving_through_a_wrapper(kind: type) -> None:
    (model, sam), (other, fresh) = made(), made()
    sam.step(lambda: backward(model, 0))
    sam.rho = 0.7
    other.load_state_dict(model.state_dict())
    kind(fresh).load_state_dict(copy.deepcopy(kind(sam).state_dict()))
    assert fresh.rho == 0.7
    for m, s in ((model, sam), (other, fresh)):
        s.step(lambda m=m: backward(m, 1))
    assert_same(sam, fresh)


def test_what_is_read_of_the_optimizer() -> None:
    model, sam = made(clip_norm=0.1, ema=0.9, nonfinite="skip")
    assert sam.grad_norm is None
    sam.step(lambda: backward(model, 0))
    base = sam.base_optimizer
    assert float(sam.grad_norm) == float(base.grad_norm) > 0
    assert sam.grad_norms() == base.grad_norms() != {}
    with sam.swap_ema():
        assert torch.equal(model.head.bias, sam.state[model.head.bias]["ema"])
    backward(model, 1)
    sam.first_step()
    model.head.bias.grad.fill_(math.inf)
    sam.second_step()
    assert sam.skipped_steps == base.skipped_steps == 1


def test_halves_are_refused_inside_swap_ema() -> None:
    """A backup of the average would be taken for the weights."""
    model, sam = made(ema=0.9)
    sam.step(lambda: backward(model, 0))
    before = weights(model)
    with sam.swap_ema(), pytest.raises(RuntimeError, match=r"first_step\(\) inside swap_ema\(\)"):
        sam.first_step()
    assert_identical(weights(model), before)
    assert not sam.ascended
    sam.first_step()
    up = weights(model)
    with sam.swap_ema():
        for half in ("second_step", "restore"):
            with pytest.raises(RuntimeError, match=rf"{half}\(\) inside swap_ema\(\)"):
                getattr(sam, half)()
    assert_identical(weights(model), up)
    assert sam.ascended
    sam.restore()
    assert_identical(weights(model), before)


# ---- schedulers and hooks


def by_closure(model: nn.Module, sam: SAM) -> None:
    sam.step(lambda: backward(model, 0))


def by_methods(model: nn.Module, sam: SAM) -> None:
    backward(model, 0)
    sam.first_step()
    backward(model, 0)
    sam.second_step()


def by_halves(model: nn.Module, sam: SAM) -> None:
    for half in ("first", "second"):
        backward(model, 0)
        sam.step(half=half)


ways = pytest.mark.parametrize("way", [by_closure, by_methods, by_halves])


@ways
@pytest.mark.parametrize("on", ["sam", "base"])
def test_schedulers_see_the_steps(on: str, way: Callable[[nn.Module, SAM], None]) -> None:
    model, sam = made()
    scheduler = StepLR(sam if on == "sam" else sam.base_optimizer, step_size=1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            way(model, sam)
            scheduler.step()
    assert sam.param_groups[0]["lr"] == 0.01 / 8


@pytest.mark.parametrize("on", ["sam", "base"])
def test_a_scheduler_before_the_first_step_warns(on: str) -> None:
    model, sam = made()
    scheduler = StepLR(sam if on == "sam" else sam.base_optimizer, step_size=1)
    backward(model, 0)
    sam.first_step()
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


@ways
def test_step_hooks(way: Callable[[nn.Module, SAM], None]) -> None:
    """The optimizer's are called once a step, around the descent, as for its own steps; SAM's are called around
    ``step``.
    """
    model, sam = made()
    calls: list[tuple[str, Any, bool]] = []
    for name, optimizer in (("sam", sam), ("base", sam.base_optimizer)):
        optimizer.register_step_pre_hook(lambda o, a, k, n=name: calls.append((f"before {n}", (a, k), sam.ascended)))
        optimizer.register_step_post_hook(lambda o, a, k, n=name: calls.append((f"after {n}", (a, k), sam.ascended)))
    handle = register_optimizer_step_post_hook(lambda o, a, k: calls.append((f"all {type(o).__name__}", 0, True)))
    way(model, sam)
    handle.remove()
    descent = ["before base", "after base", "all AdamW"]
    expected = {
        by_closure: ["before sam", *descent, "after sam", "all SAM"],
        by_methods: descent,
        by_halves: ["before sam", "after sam", "all SAM", "before sam", *descent, "after sam", "all SAM"],
    }
    assert [name for name, _, _ in calls] == expected[way]
    assert all(seen == ((sam.base_optimizer,), {}) for name, seen, _ in calls if name.endswith("base"))
    assert all(ascended for name, _, ascended in calls if name.endswith("base"))


def test_a_hook_may_bring_a_closure() -> None:
    model, sam = made()
    calls = []
    sam.base_optimizer.register_step_pre_hook(lambda o, a, k: ((o, lambda: calls.append(torch.is_grad_enabled())), k))
    by_methods(model, sam)
    assert calls == [True]


def test_the_profiler_sees_both() -> None:
    model, sam = made()
    with torch.autograd.profiler.profile() as profile:
        by_closure(model, sam)
    names = [event.name for event in profile.function_events if event.name.startswith("Optimizer.step")]
    assert sorted(names) == ["Optimizer.step#AdamW.step", "Optimizer.step#SAM.step"]


def test_state_dict_hooks() -> None:
    model, sam = made()
    by_closure(model, sam)
    calls = []
    sam.register_state_dict_pre_hook(lambda o: calls.append(o))
    sam.register_state_dict_post_hook(lambda o, saved: saved | {"more": 1})
    sam.register_load_state_dict_pre_hook(lambda o, saved: saved | {"sam": saved["sam"] | {"rho": 0.9}})
    sam.register_load_state_dict_post_hook(lambda o: calls.append(o))
    saved = sam.state_dict()
    assert saved["more"] == 1
    sam.load_state_dict(saved)
    assert sam.rho == 0.9
    assert calls == [sam, sam]


# ---- saving between the halves


def test_a_warning_once_between_the_halves() -> None:
    model, sam = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam.state_dict()
        by_closure(model, sam)
        sam.state_dict()
    sam.first_step()
    with pytest.warns(UserWarning, match="the model holds the weights of the ascent") as seen:
        sam.state_dict()
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sam.state_dict()


def test_no_warning_after_an_ascent_that_an_overflow_forbade() -> None:
    model, sam = made()
    amp = scaler()
    backward(model, 0, amp)
    model.head.bias.grad.fill_(math.inf)
    amp.step(sam, half="first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sam.state_dict()["sam"]["ascended"]
