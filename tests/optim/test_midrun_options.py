"""Options that change between two steps are noticed; the same is done by hand to torch's optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from twins import (
    assert_same,
    assert_twins,
    centralise,
    every_backend,
    small_model,
    states,
    train,
)

import gradfused


def trained_with_changes(name, options, backend, changes, steps=2):
    """Ours after changed options, and torch's after the same change to its options or gradients by hand."""
    model, twin_model = small_model(), small_model()
    ours = getattr(gradfused, name)(model.parameters(), **options, backend=backend)
    theirs = getattr(torch.optim, name)(twin_model.parameters(), **options)
    start = 0
    for change_ours, change_theirs, by_hand in changes:
        change_ours(ours.param_groups[0])
        change_theirs(theirs.param_groups[0])
        train(model, ours, steps, start=start)
        train(
            twin_model,
            theirs,
            steps,
            start=start,
            before_step=lambda index, by_hand=by_hand: by_hand(list(twin_model.parameters())),
        )
        start += steps
    return ours, theirs


def nothing(*_):
    return None


@every_backend
@pytest.mark.parametrize(
    "changes",
    [
        [("momentum", 0.9), ("momentum", 0.5)],
        [("momentum", 0.9), ("nesterov", True), ("nesterov", False)],
        [("lr", 0.5), ("weight_decay", 0.1), ("maximize", True), ("maximize", False)],
    ],
)
def test_sgds_options_changed(changes, backend):
    steps = [(nothing, nothing, nothing)]
    for key, value in changes:
        steps.append((*[lambda group, k=key, v=value: group.update({k: v})] * 2, nothing))
    ours, theirs = trained_with_changes("SGD", {"lr": 0.1}, backend, steps)
    assert_same(ours, theirs)


def test_momentum_switched_off_keeps_its_buffer():
    def scenario(make):
        model = small_model()
        opt = make(model.parameters(), dampening=0.0)
        for start, momentum in ((0, 0.9), (2, 0.0), (4, 0.9)):
            opt.param_groups[0]["momentum"] = momentum
            train(model, opt, 2, start=start)
        return model, opt

    assert_twins(scenario, "sgd_momentum")


@every_backend
def test_adams_options_changed(backend):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        for index, change in enumerate(
            [{"betas": (0.5, 0.9)}, {"eps": 0.1}, {"weight_decay": 0.5}, {"maximize": True}, {"lr": 0.5}]
        ):
            train(model, opt, 2, start=2 * index)
            opt.param_groups[0].update(change)
        train(model, opt, 2, start=20)
        return model, opt

    assert_twins(scenario, "adamw", backend=backend)
    assert_twins(scenario, "adam_amsgrad", backend=backend)


@every_backend
def test_amsgrad_switched_on(backend):
    """torch fails because max_exp_avg_sq is missing.

    Ours starts it at zero, so that the first maximum is the present second moment.
    """
    model, twin_model = small_model(), small_model()
    ours = gradfused.AdamW(model.parameters(), lr=0.01, backend=backend)
    theirs = torch.optim.AdamW(twin_model.parameters(), lr=0.01)
    train(model, ours, 2)
    train(twin_model, theirs, 2)
    ours.param_groups[0]["amsgrad"] = theirs.param_groups[0]["amsgrad"] = True
    for p in twin_model.parameters():
        theirs.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)
    train(model, ours, 3, start=2)
    train(twin_model, theirs, 3, start=2)
    assert_same(ours, theirs)
    ours.param_groups[0]["amsgrad"] = theirs.param_groups[0]["amsgrad"] = False
    train(model, ours, 1, start=5)
    train(twin_model, theirs, 1, start=5)
    assert_same(ours, theirs)


@every_backend
def test_centralize_switched_on_and_off(backend):
    ours, theirs = trained_with_changes(
        "AdamW",
        {"lr": 0.01},
        backend,
        [
            (nothing, nothing, nothing),
            (lambda group: group.update(centralize=True), nothing, centralise),
            (
                lambda group: group.update(centralize="conv"),
                nothing,
                lambda params: centralise(p for p in params if p.dim() == 4),
            ),
            (lambda group: group.update(centralize=False), nothing, nothing),
        ],
    )
    assert_same(ours, theirs)


@every_backend
def test_clip_norm_switched_on_moved_and_off(backend):
    ours, theirs = trained_with_changes(
        "AdamW",
        {"lr": 0.01},
        backend,
        [
            (nothing, nothing, nothing),
            (lambda group: group.update(clip_norm=0.5), nothing, lambda params: nn.utils.clip_grad_norm_(params, 0.5)),
            (lambda group: group.update(clip_norm=0.1), nothing, lambda params: nn.utils.clip_grad_norm_(params, 0.1)),
            (
                lambda group: group.update(clip_norm=None, perturb="clip", radius=0.1, norm_scope="param"),
                nothing,
                lambda params: [nn.utils.clip_grad_norm_(p, 0.1) for p in params],
            ),
            (
                lambda group: group.update(perturb=None, clip_value=0.01),
                nothing,
                lambda params: nn.utils.clip_grad_value_(params, 0.01),
            ),
            (lambda group: group.update(clip_value=None), nothing, nothing),
        ],
    )
    assert_same(ours, theirs)


@every_backend
def test_reverse_switched_on_and_off(backend):
    def reverse(params):
        for p in params:
            p.grad.mul_(-0.5)

    ours, theirs = trained_with_changes(
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        backend,
        [
            (nothing, nothing, nothing),
            (lambda group: group.update(reverse=0.5), nothing, reverse),
            (lambda group: group.update(reverse=None), nothing, nothing),
        ],
    )
    assert_same(ours, theirs)


@every_backend
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_noise_switched_on_and_off(name, backend):
    """Steps with noise differ from steps without. Without it again, the run goes on from there as torch's does."""
    model = small_model()
    opt = getattr(gradfused, name)(model.parameters(), lr=0.01, backend=backend)
    train(model, opt, 2)
    quiet = copy.deepcopy((model, opt))
    opt.param_groups[0]["noise"] = 0.5
    train(model, opt, 2, start=2)
    train(*quiet, 2, start=2)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), quiet[0].parameters(), strict=True))
    assert {int(s["step"]) for s in states(opt)} == {2 if name == "SGD" else 4}  # SGD counts steps while there is noise
    opt.param_groups[0]["noise"] = 0.0
    twin_model = copy.deepcopy(model)
    twin = getattr(torch.optim, name)(twin_model.parameters(), lr=0.01)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, 2, start=4)
    train(twin_model, twin, 2, start=4)
    assert_same(opt, twin)


def test_seed_and_noise_decay_changed():
    def run(**change):
        model = small_model()
        opt = gradfused.SGD(model.parameters(), lr=0.1, noise=1.0)
        train(model, opt, 1)
        opt.param_groups[0].update(change)
        train(model, opt, 1, start=1)
        return model.head.weight.detach()

    plain = run()
    assert torch.equal(plain, run())
    assert not torch.equal(plain, run(seed=1))
    assert not torch.equal(plain, run(noise_decay=2.0))


def test_backend_changed():
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        for index, backend in enumerate(("cpu", "reference", "auto", "reference")):
            opt.param_groups[0]["backend"] = backend
            train(model, opt, 2, start=2 * index)
        return model, opt

    for variant in ("sgd_momentum", "adamw"):
        assert_twins(scenario, variant)


@every_backend
def test_options_changed_while_a_parameter_is_away(backend):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        for index in range(6):
            opt.param_groups[0]["lr"] = 0.01 * (index + 1)
            train(
                model,
                opt,
                1,
                start=index,
                before_step=lambda i: i % 2 and setattr(model.head.weight, "grad", None),
            )
        return model, opt

    assert_twins(scenario, "adamw", backend=backend)


@every_backend
def test_options_of_two_groups_exchanged(backend):
    def scenario(make):
        model = small_model()
        opt = make([{"params": model.conv.parameters(), "lr": 0.1}, {"params": model.head.parameters(), "lr": 0.001}])
        train(model, opt, 2)
        opt.param_groups.reverse()
        train(model, opt, 2, start=2)
        first, second = opt.param_groups
        first["lr"], second["lr"] = second["lr"], first["lr"]
        train(model, opt, 2, start=4)
        opt.param_groups.reverse()
        return model, opt

    assert_twins(scenario, "adamw", backend=backend)


@every_backend
def test_keys_of_the_users_own_in_a_group(backend):
    def scenario(make):
        model = small_model()
        opt = make([{"params": model.parameters(), "name": "everything", "schedule": {"warmup": 3}}])
        train(model, opt, 2)
        opt.param_groups[0]["note"] = "added later"
        train(model, opt, 2, start=2)
        return model, opt

    opt = assert_twins(scenario, "adamw", backend=backend)
    assert opt.param_groups[0]["note"] == "added later"
