"""Learning rates and other options that change between steps: by schedulers, by hand, and as tensors that change in
place.
"""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler
from twins import EXACT, assert_same, assert_twins, every_backend, every_rule, loss_of, refuses, small_model, train

import gradfused


def trained_with(schedule):
    """A scenario of 6 steps, with a step of ``schedule(opt)`` after each."""

    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        scheduler = schedule(opt)
        for index in range(6):
            train(model, opt, 1, start=index)
            scheduler.step()
        return model, opt

    return scenario


SCHEDULERS = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, step_size=2, gamma=0.5),
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda i: 1 / (1 + i)),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, total_iters=3),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("variant", ["sgd_momentum", "adamw"])
def test_scheduler(variant, name):
    assert_twins(trained_with(SCHEDULERS[name]), variant)


@every_backend
@pytest.mark.parametrize("variant", ["sgd_momentum", "adam", "adamw_amsgrad"])
def test_one_cycle_moves_momentum_and_betas_too(variant, backend):
    seen = []

    def schedule(opt):
        scheduler = lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=8, cycle_momentum=True)
        group = opt.param_groups[0]
        seen.append(group["betas"][0] if "betas" in group else group["momentum"])
        return scheduler

    opt = assert_twins(trained_with(schedule), variant, backend=backend)
    group = opt.param_groups[0]
    assert (group["betas"][0] if "betas" in group else group["momentum"]) != seen[0]


def test_cyclic_momentum():
    def schedule(opt):
        return lr_scheduler.CyclicLR(opt, 0.01, 0.1, step_size_up=2, cycle_momentum=True)

    assert_twins(trained_with(schedule), "sgd_momentum")


def test_reduce_on_plateau():
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        scheduler = lr_scheduler.ReduceLROnPlateau(opt, patience=0, factor=0.5)
        for index, metric in enumerate([1.0, 1.0, 1.0, 0.5, 0.6]):
            train(model, opt, 1, start=index)
            scheduler.step(metric)
        assert opt.param_groups[0]["lr"] == pytest.approx(0.01 / 8)
        return model, opt

    assert_twins(scenario, "adamw")


def test_scheduler_warns_of_no_wrong_order(recwarn):
    model = small_model()
    opt = gradfused.AdamW(model.parameters())
    scheduler = lr_scheduler.StepLR(opt, 1)
    train(model, opt, 1)
    scheduler.step()
    assert [str(w.message) for w in recwarn if "lr_scheduler" in str(w.message)] == []


def test_group_added_under_a_scheduler():
    def scenario(make):
        model = small_model()
        opt = make(model.conv.parameters())
        train(model, opt, 1)
        opt.add_param_group({"params": model.head.parameters(), "lr": 0.5})
        scheduler = lr_scheduler.LambdaLR(opt, [lambda i: 0.5**i, lambda i: 0.1**i])
        for index in range(1, 4):
            train(model, opt, 1, start=index)
            scheduler.step()
        return model, opt

    assert_twins(scenario, "adamw")


@every_backend
@every_rule
def test_lr_as_a_tensor_changed_in_place(variant, backend):
    def scenario(make):
        model = small_model()
        lr = torch.tensor(0.1)
        opt = make(model.parameters(), lr=lr)
        for index in range(4):
            train(model, opt, 1, start=index)
            lr.mul_(0.3)
        assert opt.param_groups[0]["lr"] is lr
        return model, opt

    assert_twins(scenario, variant, backend=backend)


def test_scheduler_moves_a_tensor_lr_in_place():
    def scenario(make):
        model = small_model()
        lr = torch.tensor(0.1)
        opt = make(model.parameters(), lr=lr)
        scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
        for index in range(4):
            train(model, opt, 1, start=index)
            scheduler.step()
        assert isinstance(opt.param_groups[0]["lr"], torch.Tensor)
        return model, opt

    assert_twins(scenario, "adamw")


@every_backend
def test_betas_as_tensors_changed_in_place(backend):
    """torch accepts tensors as betas in fewer combinations, so the result is compared with that of floats."""
    with_tensors, with_floats = small_model(), small_model()
    beta1, beta2 = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.99, dtype=torch.float64)
    ours = gradfused.AdamW(with_tensors.parameters(), lr=0.01, betas=(beta1, beta2), backend=backend)
    theirs = torch.optim.AdamW(with_floats.parameters(), lr=0.01, betas=(0.9, 0.99))
    for index in range(4):
        train(with_tensors, ours, 1, start=index)
        train(with_floats, theirs, 1, start=index)
        beta1.mul_(0.5)
        beta2.mul_(0.9)
        theirs.param_groups[0]["betas"] = (beta1.item(), beta2.item())
    assert_same(ours, theirs)


def test_weight_decay_as_a_tensor():
    def scenario(make):
        model = small_model()
        opt = make(model.parameters(), weight_decay=torch.tensor(0.25))
        train(model, opt, 3)
        return model, opt

    assert_twins(scenario, "sgd_momentum")


@pytest.mark.parametrize("option", ["lr", "radius", "noise", "clip_value", "reverse"])
def test_a_recipes_numbers_can_be_tensors(option):
    recipe = {"perturb": "clip", "radius": 0.5, "noise": 0.01, "clip_value": 0.01, "reverse": 0.3, "lr": 0.25}
    models = small_model(), small_model()
    a = gradfused.SGD(models[0].parameters(), **recipe)
    b = gradfused.SGD(models[1].parameters(), **(recipe | {option: torch.tensor(recipe[option], dtype=torch.float64)}))
    train(models[0], a, 2)
    train(models[1], b, 2)
    assert_same(b, a, EXACT)


def test_a_tensor_lr_made_invalid_in_place_is_refused():
    model = small_model()
    lr = torch.tensor(0.1)
    opt = gradfused.AdamW(model.parameters(), lr=lr)
    train(model, opt, 2)
    loss_of(model, 2).backward()
    lr.fill_(float("nan"))
    with refuses(opt, ValueError, "lr", "nan"):
        opt.step()
    lr.fill_(0.1)
    opt.step()
    assert {int(opt.state[p]["step"]) for p in model.parameters()} == {3}


def test_a_tensor_lr_of_several_elements_is_refused():
    with pytest.raises(
        ValueError, match=r"lr: expected a number or a tensor of one element, got a Tensor of shape \(2,\)"
    ):
        gradfused.SGD(small_model().parameters(), lr=torch.tensor([0.1, 0.2]))
