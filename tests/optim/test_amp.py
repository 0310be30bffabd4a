"""GradScaler's protocol for fused optimizers, and steps that are skipped because gradients are not finite."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from twins import (
    EXACT,
    VARIANTS,
    assert_same,
    every_backend,
    every_rule,
    loss_of,
    parameters,
    refuses,
    small_model,
    states,
    train,
    unchanged,
)

import gradfused

INF, NAN = float("inf"), float("nan")


def scaler(scale=2.0**10, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100, **options)


def scaled_step(model, opt, amp, index, *, unscale, poison=None, clip=None):
    opt.zero_grad()
    amp.scale(loss_of(model, index)).backward()
    if poison is not None:
        next(model.parameters()).grad.view(-1)[-1] = poison
    if unscale:
        amp.unscale_(opt)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
    amp.step(opt)
    amp.update()


def make(variant, model, library=gradfused, **more):
    name, options = VARIANTS[variant]
    return getattr(library, name)(model.parameters(), **(options | more))


@every_backend
@pytest.mark.parametrize("unscale", [False, True])
@every_rule
def test_scaled_training_is_plain_training(variant, unscale, backend):
    model, twin_model = small_model(), small_model()
    opt, twin = make(variant, model, backend=backend), make(variant, twin_model, torch.optim)
    amp = scaler()
    for index in range(4):
        scaled_step(model, opt, amp, index, unscale=unscale)
    train(twin_model, twin, 4)
    assert_same(opt, twin)
    assert not hasattr(opt, "grad_scale") or opt.grad_scale is None
    assert not hasattr(opt, "found_inf") or opt.found_inf is None


@every_backend
@pytest.mark.parametrize("unscale", [False, True])
def test_clip_norm_and_grad_norm_are_of_the_unscaled_gradient(unscale, backend):
    model, twin_model = small_model(), small_model()
    opt = make("adamw", model, clip_norm=0.5, backend=backend)
    twin = make("adamw", twin_model, torch.optim)
    amp = scaler()
    norms = []
    for index in range(3):
        scaled_step(model, opt, amp, index, unscale=unscale)
        train(
            twin_model,
            twin,
            1,
            start=index,
            before_step=lambda _: norms.append(nn.utils.clip_grad_norm_(twin_model.parameters(), 0.5)),
        )
        torch.testing.assert_close(opt.grad_norm, norms[-1].double(), rtol=1e-5, atol=0)
    assert_same(opt, twin)


@pytest.mark.parametrize("poison", [INF, -INF, NAN])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
@every_rule
def test_overflow_skips_the_step(variant, unscale, poison, clip_norm):
    model = small_model()
    opt = make(variant, model, clip_norm=clip_norm)
    amp = scaler()
    scaled_step(model, opt, amp, 0, unscale=unscale)
    weights = [p.detach().clone() for p in model.parameters()]
    before = [{k: v.clone() for k, v in s.items()} for s in states(opt)]
    scaled_step(model, opt, amp, 1, unscale=unscale, poison=poison)
    assert amp.get_scale() == 2.0**9
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    for now, was in zip(states(opt), before, strict=True):
        assert now.keys() == was.keys()
        assert all(torch.equal(now[k], was[k]) for k in was)
    assert opt.skipped_steps == 0  # GradScaler skips it and lowers its scale
    scaled_step(model, opt, amp, 2, unscale=unscale)
    assert any(not torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


@pytest.mark.parametrize("unscale", [False, True])
def test_overflow_in_the_first_step_creates_no_state(unscale):
    model = small_model()
    opt = make("adamw", model)
    scaled_step(model, opt, scaler(), 0, unscale=unscale, poison=INF)
    assert not any(states(opt))


@pytest.mark.parametrize("unscale", [False, True])
def test_training_through_overflows_equals_torch_fused(unscale):
    model, twin_model = small_model(), small_model()
    opt, twin = make("adamw", model), make("adamw", twin_model, torch.optim, fused=True)
    amps = scaler(), scaler()
    for index in range(6):
        poison = INF if index in (0, 3) else None
        scaled_step(model, opt, amps[0], index, unscale=unscale, poison=poison)
        scaled_step(twin_model, twin, amps[1], index, unscale=unscale, poison=poison)
    assert amps[0].get_scale() == amps[1].get_scale() == 2.0**8
    assert_same(opt, twin)


def test_a_scaler_that_is_off():
    model, twin_model = small_model(), small_model()
    opt, twin = make("adamw", model), make("adamw", twin_model, torch.optim)
    amp = scaler(enabled=False)
    for index in range(2):
        scaled_step(model, opt, amp, index, unscale=True)
    train(twin_model, twin, 2)
    assert_same(opt, twin)


@every_backend
def test_preset_grad_scale(backend):
    """Setting ``grad_scale`` by hand, to fold a factor into the step, works as in torch."""
    model, twin_model = small_model(), small_model()
    opt, twin = make("adamw", model, backend=backend), make("adamw", twin_model, torch.optim)
    for index in range(3):
        opt.grad_scale = torch.tensor(4.0)
        train(model, opt, 1, start=index)
        train(
            twin_model, twin, 1, start=index, before_step=lambda _: [p.grad.div_(4.0) for p in twin_model.parameters()]
        )
    assert_same(opt, twin)
    opt.grad_scale = None
    train(model, opt, 1, start=3)
    train(twin_model, twin, 1, start=3)
    assert_same(opt, twin)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_gradients_are_unscaled_without_rounding(dtype):
    """Scaled gradients can stand for values that are too small for their dtype."""
    p = nn.Parameter(torch.zeros(4))
    p32 = nn.Parameter(torch.zeros(4, dtype=dtype))
    values = torch.tensor([1.0, 2.0, -3.0, 4.0]) * 2.0**-30
    opt = gradfused.AdamW([p], lr=0.5, eps=1e-12)
    low = gradfused.AdamW([p32], lr=0.5, eps=1e-12)
    for o, q in ((opt, p), (low, p32)):
        q.grad = (values * 2.0**20).to(q.dtype)
        o.grad_scale = torch.tensor(2.0**20)
        o.step()
    torch.testing.assert_close(p32.detach().float(), p.detach(), rtol=4e-3, atol=0)


# What GradScaler or a user may leave in ``optimizer.found_inf`` and ``optimizer.grad_scale``.
ABSENT = [None, 0, 0.0, False, torch.tensor(0.0), torch.zeros(1), torch.zeros((), dtype=torch.float64)]
PRESENT = [1, 2.0, True, torch.tensor(1.0), torch.ones(1), torch.full((1, 1), 2.0), torch.ones((), dtype=torch.int64)]


@every_backend
@pytest.mark.parametrize("found_inf", [*ABSENT, *PRESENT], ids=repr)
@pytest.mark.parametrize("grad_scale", [None, 4, 4.0, torch.tensor(4.0), torch.full((1,), 4.0, dtype=torch.float64)])
def test_every_form_of_what_a_scaler_says(found_inf, grad_scale, backend):
    model, twin_model = small_model(), small_model()
    opt, twin = make("sgd_momentum", model, backend=backend), make("sgd_momentum", twin_model, torch.optim)
    loss_of(model, 0).backward()
    loss_of(twin_model, 0).backward()
    for p in model.parameters() if grad_scale is not None else ():
        p.grad.mul_(4.0)
    opt.found_inf, opt.grad_scale = found_inf, grad_scale
    opt.step()
    if not any(found_inf is x for x in PRESENT):
        twin.step()
    assert_same(opt, twin)


@every_backend
@pytest.mark.parametrize("name", ["found_inf", "grad_scale"])
@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(0), "0"], ids=repr)
def test_what_no_scaler_says_is_refused(wrong, name, backend):
    model = small_model()
    opt = make("sgd_momentum", model, backend=backend)
    loss_of(model, 0).backward()
    setattr(opt, name, wrong)
    with refuses(opt, ValueError, f"optimizer.{name}: expected None, a number or a tensor of one element"):
        opt.step()


@every_backend
@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaled_step_without_gradients(unscale, backend):
    """The scaler then passes plain zeros in place of tensors, as torch's fused optimizers accept them."""
    model, twin_model = small_model(), small_model()
    opt, twin = make("adamw", model, backend=backend), make("adamw", twin_model, torch.optim, fused=True)
    amp, other = scaler(), scaler()
    for o, a in ((opt, amp), (twin, other)):
        a.scale(torch.ones(()))
        if unscale:
            a.unscale_(o)
        a.step(o)
    assert not any(states(opt))
    amp, other = scaler(), scaler()
    scaled_step(model, opt, amp, 0, unscale=unscale)
    scaled_step(twin_model, twin, other, 0, unscale=unscale)
    assert_same(opt, twin)


# ---- nonfinite="skip"


@every_backend
@pytest.mark.parametrize("recipe", [{}, {"clip_norm": 1.0}, {"centralize": True, "noise": 0.1}, {"clip_value": 1.0}])
@pytest.mark.parametrize("poison", [INF, -INF, NAN])
@every_rule
def test_skip(variant, poison, recipe, backend):
    model = small_model()
    opt = make(variant, model, nonfinite="skip", backend=backend, **recipe)
    for index, poisoned in enumerate([True, False, True, True, False]):
        loss = loss_of(model, index)
        opt.zero_grad()
        loss.backward()
        if poisoned:
            parameters(opt)[-1 if index else 0].grad.view(-1)[0] = poison
            skipped = opt.skipped_steps
            weights = [p.detach().clone() for p in model.parameters()]
            kept = [{k: v.clone() for k, v in s.items()} for s in states(opt)]
            opt.step()
            assert opt.skipped_steps == skipped + 1
            assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
            assert [set(s) for s in states(opt)] == [set(s) for s in kept]
            for now, was in zip(states(opt), kept, strict=True):
                assert all(torch.equal(now[k], was[k]) for k in was)
        else:
            before = model.head.bias.detach().clone()
            opt.step()
            assert not torch.equal(before, model.head.bias)
    assert opt.skipped_steps == 3
    if "adam" in variant:
        assert {int(s["step"]) for s in states(opt)} == {2}


@every_backend
def test_a_skipped_first_step_leaves_no_trace(backend):
    """The next step counts as the first: the momentum of SGD starts as the gradient, without dampening."""
    model, clean_model = small_model(), small_model()
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "nonfinite": "skip", "backend": backend}
    opt, clean = gradfused.SGD(model.parameters(), **options), gradfused.SGD(clean_model.parameters(), **options)
    loss_of(model, 0).backward()
    model.conv.weight.grad.fill_(NAN)
    with torch.no_grad():
        opt.step()
    assert not any(states(opt))
    assert opt.skipped_steps == 1
    train(model, opt, 2)
    train(clean_model, clean, 2)
    assert_same(opt, clean, EXACT)


@every_backend
def test_propagate_lets_them_through(backend):
    model = small_model()
    opt = make("adamw", model, backend=backend)
    loss_of(model, 0).backward()
    model.head.bias.grad[2] = NAN
    opt.step()
    assert torch.isnan(model.head.bias).tolist() == [False, False, True, False, False]
    assert opt.skipped_steps == 0


@every_backend
def test_one_group_that_skips_holds_back_the_others(backend):
    """A step is taken whole or not at all. Only the gradients of groups that ask for skipping decide."""
    model = small_model()
    opt = gradfused.AdamW(
        [{"params": model.conv.parameters(), "nonfinite": "skip"}, {"params": model.head.parameters()}],
        backend=backend,
    )
    train(model, opt, 1)
    loss_of(model, 1).backward()
    model.conv.bias.grad[0] = INF
    weights = [p.detach().clone() for p in model.parameters()]
    opt.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert opt.skipped_steps == 1
    opt.zero_grad()
    loss_of(model, 1).backward()
    model.head.bias.grad[0] = INF
    opt.step()
    assert opt.skipped_steps == 1
    assert torch.isfinite(model.conv.weight).all()
    assert not torch.isfinite(model.head.bias[0])


@every_backend
def test_skip_with_amp(backend):
    """GradScaler finds the gradient first, and both skip the step."""
    model = small_model()
    opt = make("adamw", model, nonfinite="skip", clip_norm=1.0, backend=backend)
    amp = scaler()
    scaled_step(model, opt, amp, 0, unscale=False)
    loss = loss_of(model, 1)
    opt.zero_grad()
    amp.scale(loss).backward()
    model.conv.bias.grad[0] = INF
    with unchanged(opt):
        amp.step(opt)
    amp.update()
    assert amp.get_scale() == 2.0**9


@every_backend
def test_gradients_too_large_to_square_are_finite(backend):
    """The square of 1e30 overflows float32, which is no reason to skip the step."""
    p = nn.Parameter(torch.zeros(3))
    opt = gradfused.SGD([p], lr=1.0, clip_norm=1.0, nonfinite="skip", backend=backend)
    p.grad = torch.tensor([3e30, 0.0, -4e30])
    opt.step()
    assert opt.skipped_steps == 0
    torch.testing.assert_close(p.detach(), torch.tensor([-0.6, 0.0, 0.8]))
    torch.testing.assert_close(opt.grad_norm, torch.tensor(5e30, dtype=torch.float64), rtol=1e-6, atol=0)
