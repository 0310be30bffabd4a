"""What trainers ask of an optimizer: who unscales, whether a step was skipped, where attributes are kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import assert_same, every_backend, loss_of, small_model, train
from wrappers import WRAPPERS, Accelerated, Inheriting, MixedPrecision

import gradfused

INF = float("inf")
SCHEDULES = ("none", "before", "after")


def scaler(scale: float = 256.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale)


def backward(model: nn.Module, amp: torch.amp.GradScaler | None, index: int, poison: bool = False) -> None:
    model.zero_grad()
    loss = loss_of(model, index)
    (loss if amp is None else amp.scale(loss)).backward()
    if poison:
        next(model.parameters()).grad.view(-1)[0] = INF


def pair(backend: str, **options: Any) -> list[tuple[nn.Module, torch.optim.Optimizer]]:
    """Our optimizer and torch's on the same weights."""
    ours, theirs = small_model(), small_model()
    return [
        (ours, gradfused.AdamW(ours.parameters(), lr=0.01, backend=backend, **options)),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01)),
    ]


# ---- Lightning


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("scaled", [False, True])
@every_backend
def test_lightnings_mixed_precision(scaled: bool, clip: float, backend: str) -> None:
    """It clips the gradients that it has unscaled, and an overflow skips the step."""
    runs = pair(backend)
    for model, opt in runs:
        plugin = MixedPrecision(model, scaler() if scaled else None, clip)
        wrapped = Inheriting(opt, plugin.optimizer_step)
        for index in range(4):
            wrapped.step(lambda m=model, p=plugin, i=index: backward(m, p.scaler, i, scaled and i == 1))
    assert_same(runs[0][1], runs[1][1])


# ---- Accelerate


def schedule(opt: torch.optim.Optimizer) -> None:
    torch.optim.lr_scheduler.StepLR(opt, step_size=1)


@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("scheduled", SCHEDULES)
@every_backend
def test_accelerate_sees_that_a_step_was_skipped(scheduled: str, unscaled: bool, backend: str) -> None:
    runs, seen = pair(backend), []
    for model, opt in runs:
        amp = scaler()
        if scheduled == "before":
            schedule(opt)
        wrapped = Accelerated(opt, amp)
        if scheduled == "after":
            schedule(opt)
        skipped = []
        for index in range(5):
            backward(model, amp, index, poison=index in (0, 3))
            if unscaled:
                amp.unscale_(opt)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            wrapped.step()
            skipped.append(wrapped.step_was_skipped)
        seen.append(skipped)
    expected = [True, False, False, True, False]
    assert seen == [expected, expected]
    assert_same(runs[0][1], runs[1][1])


@every_backend
def test_zero_grad_in_step_comes_before_step_was_skipped(backend: str) -> None:
    """A step that is not called cannot zero infinite gradients, which would then stay for good."""
    model, opt = pair(backend, zero_grad_in_step=True)[0]
    amp = scaler()
    wrapped = Accelerated(opt, amp)
    for index in range(3):
        amp.scale(loss_of(model, index)).backward()
        if index == 0:
            next(model.parameters()).grad.view(-1)[0] = INF
        wrapped.step()
        assert not wrapped.step_was_skipped
        assert not any(bool(p.grad.any()) for p in model.parameters())
    assert amp.get_scale() == 128.0


# ---- GradScaler alone


def calls_of(opt: torch.optim.Optimizer) -> list[Tensor | None]:
    """Record the scale that each call of the optimizer's step finds."""
    calls: list[Tensor | None] = []
    opt.register_step_pre_hook(lambda optimizer, args, kwargs: calls.append(getattr(optimizer, "grad_scale", None)))
    return calls


class OwnUnscale(torch.amp.GradScaler):
    """A GradScaler like FSDP's, which tells every process of an overflow in any: here in another process."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        super().unscale_(optimizer)
        for found in self._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            found.fill_(1.0)


@pytest.mark.parametrize("kind", [torch.amp.GradScaler, torch.cuda.amp.GradScaler, torch.cpu.amp.GradScaler])
def test_the_scaler_leaves_unscaling_to_the_step(kind: type[torch.amp.GradScaler]) -> None:
    amp = torch.amp.GradScaler("cpu", init_scale=256.0)
    amp.__class__ = kind
    model, opt = pair("cpu")[0]
    calls = calls_of(opt)
    for index in range(2):
        backward(model, amp, index, poison=index == 1)
        amp.step(opt)
        amp.update()
    assert [float(scale) for scale in calls] == [256.0, 256.0]  # with an overflow too, as the step skips itself
    assert not opt._step_supports_amp_scaling  # what a trainer is told


def test_a_scaler_with_its_own_unscaling_uses_it() -> None:
    model, opt = pair("cpu")[0]
    calls, amp = calls_of(opt), OwnUnscale("cpu", init_scale=256.0)
    backward(model, amp, 0)
    amp.step(opt)
    assert calls == []


def test_the_answer_may_be_overwritten() -> None:
    """Users do so to make the scaler unscale."""
    model, opt = pair("cpu")[0]
    calls, amp = calls_of(opt), scaler()
    opt._step_supports_amp_scaling = False
    backward(model, amp, 0)
    amp.step(opt)
    assert calls == [None]


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_scaler_that_is_given_a_wrapper(kind: type) -> None:
    """The scale would be set on the wrapper: the gradients are unscaled before."""
    runs = pair("cpu")
    for model, opt in runs:
        amp, wrapped = scaler(), kind(opt)
        for index in range(4):
            backward(model, amp, index, poison=index == 1)
            amp.step(wrapped)
            amp.update()
    assert_same(runs[0][1], runs[1][1])


def test_a_refused_step_leaves_no_scale_behind() -> None:
    """It would divide the next gradients once more."""
    model, other = small_model(), small_model()
    opt, plain = (gradfused.SGD(m.parameters(), lr=0.05) for m in (model, other))
    amp = scaler()
    for how in ("plain", "scaled"):
        opt.param_groups[0]["clip_norm"] = -1.0
        backward(model, amp, 0)
        with pytest.raises(ValueError, match="clip_norm"):
            amp.step(opt)
        opt.param_groups[0]["clip_norm"] = None
        if how == "plain":
            train(model, opt, 1)
        else:
            amp.step(opt)
        train(other, plain, 1)
        assert_same(opt, plain)


# ---- the average of the weights, through a wrapper


@pytest.mark.parametrize("kind", WRAPPERS)
def test_swap_ema_through_a_wrapper(kind: type) -> None:
    """The optimizer itself must know: a step meanwhile is refused, and master weights keep their digits."""
    p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = gradfused.SGD([p], lr=2.0**-9, precision="master", ema=0.5)
    wrapped = kind(opt)
    p.grad = torch.ones_like(p)
    opt.step()
    with wrapped.swap_ema(), pytest.raises(RuntimeError, match="inside swap_ema"):
        opt.step()
    opt.step()
    assert opt.state[p]["master"].tolist() == [1 - 2.0**-8] * 3
