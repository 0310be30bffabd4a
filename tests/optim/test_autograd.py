"""Steps under autograd and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from twins import VARIANTS, assert_same, every_backend, every_rule, loss_of, parameters, small_model, train

import gradfused


def make(variant, model, **more):
    name, options = VARIANTS[variant]
    return getattr(gradfused, name)(model.parameters(), **(options | more))


@every_backend
@every_rule
def test_version_counters_move(variant, backend):
    model = small_model()
    opt = make(variant, model, backend=backend)
    for index in range(3):
        before = [p._version for p in model.parameters()]
        train(model, opt, 1, start=index, before_step=lambda i: i == 1 and setattr(model.head.bias, "grad", None))
        moved = [p._version > v for p, v in zip(model.parameters(), before, strict=True)]
        assert moved == [True, True, True, index != 1]


@every_backend
def test_a_weight_needed_for_backward_is_noticed(backend):
    model = small_model()
    opt = make("adamw", model, backend=backend)
    train(model, opt, 1)
    loss = nn.functional.linear(model.head(model.head.weight.new_ones(1, 48)), torch.ones(3, 5)).square().sum()
    graph = (model.head.weight * model.head.weight).sum() + loss
    loss_of(model, 1).backward()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


def test_a_skipped_step_modifies_nothing():
    model = small_model()
    opt = make("adamw", model, nonfinite="skip")
    graph = (model.head.weight * model.head.weight).sum()
    loss_of(model, 1).backward()
    model.head.bias.grad.fill_(float("nan"))
    opt.step()
    opt.zero_grad()
    graph.backward()
    torch.testing.assert_close(model.head.weight.grad, 2 * model.head.weight.detach())


def test_step_on_gradients_with_a_graph():
    """create_graph=True leaves gradients that require grad; the step reads their values and keeps no graph."""
    model, twin_model = small_model(), small_model()
    opt, twin = make("adamw", model), torch.optim.AdamW(twin_model.parameters(), **VARIANTS["adamw"][1])
    for m, o in ((model, opt), (twin_model, twin)):
        grads = torch.autograd.grad(loss_of(m, 0), list(m.parameters()), create_graph=True)
        for p, g in zip(m.parameters(), grads, strict=True):
            p.grad = g
        o.step()
    assert_same(opt, twin)
    assert all(not v.requires_grad for s in opt.state.values() for v in s.values())


def test_inference_mode_and_no_grad():
    for mode in (torch.no_grad, torch.enable_grad):
        model, twin_model = small_model(), small_model()
        opt, twin = make("sgd_momentum", model), torch.optim.SGD(twin_model.parameters(), **VARIANTS["sgd_momentum"][1])
        for m, o in ((model, opt), (twin_model, twin)):
            loss_of(m, 0).backward()
            with mode():
                o.step()
        assert_same(opt, twin)


def test_optimizer_step_in_backward():
    """There is one optimizer for each parameter. A hook steps it as soon as the gradient is there."""
    model, twin_model = small_model(), small_model()
    opts = {p: gradfused.AdamW([p], lr=0.01) for p in model.parameters()}

    def step(p):
        opts[p].step()
        opts[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    twin = torch.optim.AdamW(twin_model.parameters(), lr=0.01)
    for index in range(3):
        loss_of(model, index).backward()
    train(twin_model, twin, 3)
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1.3e-6, atol=1e-5)


# ---- torch.compile


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("variant", ["sgd_momentum", "adamw"])
@pytest.mark.parametrize("recipe", [{}, {"centralize": True, "clip_norm": 0.5, "nonfinite": "skip"}])
def test_compiled_training_step(variant, recipe):
    model, twin_model = small_model(), small_model()
    opt, twin = make(variant, model, **recipe), make(variant, twin_model, **recipe)

    @torch.compile(backend="eager")
    def training_step(x, y):
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        return loss

    for index in range(4):
        torch.manual_seed(index)
        x, y = torch.randn(4, 2, 4, 4), torch.randn(4, 5)
        loss = training_step(x, y)
        twin.zero_grad()
        wanted = nn.functional.mse_loss(twin_model(x), y)
        wanted.backward()
        twin.step()
        torch.testing.assert_close(loss, wanted)
    assert_same(opt, twin)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_step_follows_the_learning_rate():
    model, twin_model = small_model(), small_model()
    opt, twin = make("adamw", model), make("adamw", twin_model)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)

    @torch.compile(backend="eager")
    def step():
        opt.step()

    for index in range(4):
        opt.zero_grad()
        loss_of(model, index).backward()
        step()
        scheduler.step()
        train(twin_model, twin, 1, start=index)
        twin.param_groups[0]["lr"] *= 0.5
    assert_same(opt, twin)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_model_with_a_plain_step():
    model, twin_model = small_model(), small_model()
    compiled = torch.compile(model, backend="eager")
    opt, twin = make("adamw", compiled), make("adamw", twin_model)
    train(compiled, opt, 3)
    train(twin_model, twin, 3)
    assert_same(opt, twin)
    assert all(p is q for p, q in zip(parameters(opt), model.parameters(), strict=True))
