"""Hooks and closures: when they are called, what they see, and what they may change."""

from __future__ import annotations

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from twins import assert_same, assert_twins, every_backend, every_rule, loss_of, refuses, small_model, states, train

import gradfused


def test_step_hooks_are_called_in_order_with_torchs_arguments():
    model = small_model()
    opt = gradfused.AdamW(model.parameters())
    calls = []

    def pre(optimizer, args, kwargs):
        calls.append(("pre", optimizer, args, kwargs, model.head.bias.detach().clone()))

    def post(optimizer, args, kwargs):
        calls.append(("post", optimizer, args, kwargs, model.head.bias.detach().clone()))

    handles = opt.register_step_pre_hook(pre), opt.register_step_post_hook(post)
    train(model, opt, 1)
    assert [c[0] for c in calls] == ["pre", "post"]
    assert all(c[1] is opt and c[3] == {} for c in calls)
    assert not torch.equal(calls[0][4], calls[1][4])
    for handle in handles:
        handle.remove()
    train(model, opt, 1, start=1)
    assert len(calls) == 2


def test_global_step_hooks_are_called():
    model = small_model()
    opt = gradfused.SGD(model.parameters(), lr=0.1)
    calls = []
    handles = (
        register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: calls.append(("pre", optimizer))),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: calls.append(("post", optimizer))),
    )
    try:
        train(model, opt, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert calls == [("pre", opt), ("post", opt)]


@every_rule
def test_pre_hook_may_change_gradients_and_options(variant):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())

        def halve(optimizer, args, kwargs):
            for p in model.parameters():
                p.grad = p.grad * 0.5
            optimizer.param_groups[0]["lr"] *= 0.9

        opt.register_step_pre_hook(halve)
        train(model, opt, 4)
        return model, opt

    assert_twins(scenario, variant)


def test_pre_hook_may_replace_the_arguments():
    model = small_model()
    opt = gradfused.SGD(model.parameters(), lr=0.1)
    opt.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: 42.0), {}))
    assert opt.step() == 42.0


def test_post_hook_may_change_weights():
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())

        @torch.no_grad()
        def shrink(optimizer, args, kwargs):
            for p in model.parameters():
                p.clamp_(-0.1, 0.1)

        opt.register_step_post_hook(shrink)
        train(model, opt, 4)
        return model, opt

    assert_twins(scenario, "adamw")


def test_state_dict_hooks():
    model = small_model()
    opt = gradfused.AdamW(model.parameters())
    train(model, opt, 1)
    order = []
    opt.register_state_dict_pre_hook(lambda optimizer: order.append("pre"))

    def post(optimizer, state_dict):
        order.append("post")
        return state_dict | {"mine": 1}

    opt.register_state_dict_post_hook(post)
    assert opt.state_dict()["mine"] == 1
    assert order == ["pre", "post"]


def test_load_state_dict_hooks():
    source, target = (gradfused.AdamW(small_model().parameters()) for _ in range(2))
    order = []

    def pre(optimizer, state_dict):
        order.append("pre")
        state_dict["param_groups"] = [g | {"lr": 0.25} for g in state_dict["param_groups"]]
        return state_dict

    target.register_load_state_dict_pre_hook(pre)
    target.register_load_state_dict_post_hook(lambda optimizer: order.append("post"))
    saved = source.state_dict()
    target.load_state_dict(saved)
    assert order == ["pre", "post"]
    assert target.param_groups[0]["lr"] == 0.25
    assert saved["param_groups"][0]["lr"] == 1e-3


def test_load_pre_hook_may_put_another_order_right():
    """In torch's documented way of loading by name, what the hook returns is checked and loaded."""
    model, other = small_model(), small_model()
    saver = gradfused.AdamW(reversed(list(model.named_parameters())))
    train(model, saver, 2)
    opt = gradfused.AdamW(other.named_parameters())

    def by_name(optimizer, state_dict):
        saved = state_dict["param_groups"][0]
        number = dict(zip(saved["param_names"], saved["params"], strict=True))
        names = optimizer.param_groups[0]["param_names"]
        state = {i: state_dict["state"][number[name]] for i, name in enumerate(names)}
        group = saved | {"params": list(range(len(names))), "param_names": names}
        return {"state": state, "param_groups": [group]}

    opt.register_load_state_dict_pre_hook(by_name)
    opt.load_state_dict(saver.state_dict())
    other.load_state_dict(model.state_dict())
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(saver.state[p]["exp_avg"], opt.state[q]["exp_avg"]), name


# ---- closures


@every_backend
@every_rule
def test_closure(variant, backend):
    losses = []

    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        for index in range(3):

            def closure(index=index):
                assert torch.is_grad_enabled()
                opt.zero_grad()
                loss = loss_of(model, index)
                loss.backward()
                return loss

            with torch.no_grad():
                losses.append(opt.step(closure))
            assert isinstance(losses[-1], torch.Tensor)
        return model, opt

    assert_twins(scenario, variant, backend=backend)
    torch.testing.assert_close(losses[:3], losses[3:])


def test_closure_by_keyword_returns_what_it_returns():
    opt = gradfused.SGD(small_model().parameters())
    assert opt.step(closure=lambda: 1.5) == 1.5


@every_rule
def test_closure_that_raises_changes_nothing(variant):
    model, twin = small_model(), small_model()
    name, options = ("SGD", {"lr": 0.1, "momentum": 0.9}) if "sgd" in variant else ("AdamW", {"lr": 0.1})
    opt, theirs = (
        getattr(gradfused, name)(model.parameters(), **options),
        getattr(torch.optim, name)(twin.parameters(), **options),
    )

    def closure():
        raise OSError("the disk is full")

    loss_of(model, 0).backward()
    with refuses(opt, OSError, "the disk is full"):
        opt.step(closure)
    assert not any(states(opt))
    train(model, opt, 2)
    train(twin, theirs, 2)
    with refuses(opt, OSError, "the disk is full"):
        opt.step(closure)
    train(model, opt, 1, start=2)
    train(twin, theirs, 1, start=2)
    assert_same(opt, theirs)


def test_hook_that_raises_changes_nothing():
    model = small_model()
    opt = gradfused.AdamW(model.parameters())
    train(model, opt, 1)
    loss_of(model, 1).backward()

    def fail(optimizer, args, kwargs):
        raise KeyError("hook")

    handle = opt.register_step_pre_hook(fail)
    with refuses(opt, KeyError, "hook"):
        opt.step()
    handle.remove()
    opt.step()
    assert {int(s["step"]) for s in states(opt)} == {2}


def test_profiler_names_the_step():
    model = small_model()
    opt = gradfused.AdamW(model.parameters())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, opt, 1)
    assert any(e.key == "Optimizer.step#AdamW.step" for e in profile.key_averages())


def test_step_needs_no_grad_mode_of_its_own():
    model = small_model()
    opt = gradfused.AdamW(model.parameters())
    loss_of(model, 0).backward()
    opt.step()
    assert torch.is_grad_enabled()
    assert all(p.requires_grad and p.is_leaf and p.grad_fn is None for p in model.parameters())


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_nested_hooks_on_subclasses(name):
    """A user's subclass keeps working: it inherits hooks, the profiler's name and the step."""

    class Mine(getattr(gradfused, name)):
        def step(self, closure=None):
            self.seen = getattr(self, "seen", 0) + 1
            return super().step(closure)

    model = small_model()
    opt = Mine(model.parameters(), lr=0.01)
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append(1))
    before = model.head.bias.detach().clone()
    train(model, opt, 2)
    assert opt.seen == 2
    assert calls
    assert not torch.equal(before, model.head.bias)
