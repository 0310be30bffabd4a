"""Copies of an optimizer by deepcopy, pickle and state dicts through torch.save, and training that goes on from each."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from twins import (
    EXACT,
    VARIANTS,
    assert_identical,
    assert_same,
    assert_twins,
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

RECIPE = {
    "centralize": True,
    "perturb": "clip",
    "radius": 0.5,
    "norm_scope": "param",
    "clip_value": 0.2,
    "noise": 0.01,
    "seed": 7,
    "reverse": 0.5,
    "nonfinite": "skip",
}


def make(variant, model, **recipe):
    name, options = VARIANTS[variant]
    return getattr(gradfused, name)(model.parameters(), **options, **recipe)


def through_file(value):
    """``value`` saved and loaded with weights_only=True."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_backend
@every_rule
def test_resumed_from_a_file_as_if_never_stopped(variant, backend):
    model = small_model()
    opt = make(variant, model, **RECIPE, backend=backend)
    train(model, opt, 3)
    checkpoint = through_file({"model": model.state_dict(), "opt": opt.state_dict()})
    train(model, opt, 3, start=3)

    resumed = small_model()
    with torch.no_grad():
        resumed.head.bias.fill_(9)
    resumed.load_state_dict(checkpoint["model"])
    name, _ = VARIANTS[variant]
    other = getattr(gradfused, name)(resumed.parameters(), lr=123.0)
    other.load_state_dict(checkpoint["opt"])
    assert other.param_groups[0]["lr"] == opt.param_groups[0]["lr"]
    assert {k: other.param_groups[0][k] for k in RECIPE} == RECIPE
    train(resumed, other, 3, start=3)
    assert_same(other, opt, EXACT)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@every_rule
def test_copied_with_its_model(variant, copier):
    model = small_model()
    opt = make(variant, model, **RECIPE)
    train(model, opt, 2)
    twin_model, twin = copier((model, opt))
    assert type(twin) is type(opt)
    assert all(p is q for p, q in zip(twin_model.parameters(), parameters(twin), strict=True))
    assert_same(twin, opt, EXACT)
    with unchanged(opt):
        train(twin_model, twin, 3, start=2)
    train(model, opt, 3, start=2)
    assert_same(twin, opt, EXACT)


def test_deepcopy_before_the_first_step():
    model = small_model()
    opt = make("adamw", model)
    twin_model, twin = copy.deepcopy((model, opt))
    train(model, opt, 2)
    train(twin_model, twin, 2)
    assert_same(twin, opt, EXACT)


def test_a_copy_keeps_its_count_of_skipped_steps():
    model = small_model()
    opt = make("adamw", model, nonfinite="skip")
    loss_of(model, 0).backward()
    model.head.bias.grad[0] = float("nan")
    opt.step()
    assert opt.skipped_steps == 1
    assert pickle.loads(pickle.dumps(opt)).skipped_steps == 1
    assert copy.deepcopy(opt).skipped_steps == 1
    opt.load_state_dict(opt.state_dict())
    assert opt.skipped_steps == 1


def test_a_copy_refuses_overlapping_groups_too():
    model = small_model()
    twin_model, twin = copy.deepcopy((model, make("adamw", model)))
    with pytest.raises(ValueError, match="overlap in memory"):
        twin.add_param_group({"params": nn.Parameter(twin_model.head.weight.data[0])})


@every_rule
def test_loading_while_running(variant):
    """What the optimizer had prepared for the old state is not used again."""

    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        train(model, opt, 2)
        saved = copy.deepcopy(opt.state_dict())
        train(model, opt, 2, start=2)
        opt.load_state_dict(saved)
        train(model, opt, 2, start=4)
        return model, opt

    assert_twins(scenario, variant)


def test_loading_an_empty_state_starts_afresh():
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        saved = copy.deepcopy(opt.state_dict())
        train(model, opt, 2)
        opt.load_state_dict(saved)
        train(model, opt, 2, start=2)
        return model, opt

    opt = assert_twins(scenario, "adamw")
    assert {int(s["step"]) for s in states(opt)} == {2}


def test_loading_turns_state_into_the_parameters_dtype():
    model, double = small_model(), small_model(torch.float64)
    opt, other = make("adamw", model), make("adamw", double)
    train(model, opt, 2)
    other.load_state_dict(opt.state_dict())
    assert {s["exp_avg"].dtype for s in states(other)} == {torch.float64}
    assert {s["step"].dtype for s in states(other)} == {torch.float32}
    train(double, other, 1)
    assert {int(s["step"]) for s in states(other)} == {3}


def test_skipped_steps_do_not_make_a_state_dict_unlike_torchs():
    ours = make("adamw", small_model()).state_dict()
    theirs = torch.optim.AdamW(small_model().parameters()).state_dict()
    assert set(ours) == set(theirs)


def test_every_option_is_a_plain_value():
    opt = make("adamw", small_model(), **RECIPE)
    for key, value in opt.state_dict()["param_groups"][0].items():
        assert value is None or isinstance(value, (bool, int, float, str, tuple, list)), key


# ---- state dicts that cannot be loaded


@pytest.mark.parametrize(
    ("saver", "loader", "fragment"),
    [
        ("sgd_momentum", "adamw", "betas"),
        ("adam", "sgd", "momentum"),
        ("adamw_amsgrad", "sgd_momentum", "momentum"),
        ("sgd", "adam_amsgrad", "betas"),
    ],
)
@pytest.mark.parametrize("library", [gradfused, torch.optim])
def test_state_dict_of_another_rule(saver, loader, fragment, library):
    model, other = small_model(), small_model()
    name, options = VARIANTS[saver]
    source = getattr(library, name)(model.parameters(), **options)
    train(model, source, 2)
    opt = make(loader, other, **RECIPE)
    train(other, opt, 2)
    with refuses(opt, ValueError, f"state dict is not of {VARIANTS[loader][0]}", f"'{fragment}'", "load it into"):
        opt.load_state_dict(source.state_dict())
    train(other, opt, 1, start=2)


@pytest.mark.parametrize("name", ["Adadelta", "Adagrad", "RMSprop", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD"])
@pytest.mark.parametrize("variant", ["sgd_momentum", "adamw"])
def test_state_dict_of_torchs_other_optimizers(variant, name):
    model, other = small_model(), small_model()
    source = getattr(torch.optim, name)(model.parameters())
    train(model, source, 1)
    opt = make(variant, other)
    train(other, opt, 1)
    with refuses(opt, ValueError, f"state dict is not of {VARIANTS[variant][0]}"):
        opt.load_state_dict(source.state_dict())


def edited(opt, edit):
    """The optimizer's own state dict after ``edit(state_dict)``."""
    saved = copy.deepcopy(opt.state_dict())
    edit(saved)
    return saved


@pytest.mark.parametrize(
    ("edit", "error", "fragments"),
    [
        (
            lambda d: d["state"][3].update(exp_avg=torch.zeros(6)),
            ValueError,
            ["'exp_avg'", "3 of group 0", "(6,)", "(5,)"],
        ),
        (
            lambda d: d["state"][0].update(velocity=torch.zeros(1)),
            ValueError,
            ["'velocity'", "0 of group 0", "exp_avg_sq"],
        ),
        (lambda d: d["param_groups"][0].update(lr=-1.0), ValueError, ["lr", "-1.0"]),
        (lambda d: d["param_groups"][0].update(betas=(0.9, 1.5)), ValueError, ["betas[1]", "1.5"]),
        (lambda d: d["param_groups"][0].update(norm_scope="world"), ValueError, ["norm_scope", "'world'"]),
        (lambda d: d["param_groups"][0].update(differentiable=True), ValueError, ["differentiable=True"]),
        (lambda d: d["param_groups"].append(d["param_groups"][0]), ValueError, ["number of parameter groups"]),
        (lambda d: d["param_groups"][0]["params"].pop(), ValueError, ["size of optimizer's group"]),
    ],
)
def test_broken_state_dicts(edit, error, fragments):
    model = small_model()
    opt = make("adamw", model, **RECIPE)
    train(model, opt, 2)
    with refuses(opt, error, *fragments):
        opt.load_state_dict(edited(opt, edit))
    train(model, opt, 1, start=2)
    assert {int(s["step"]) for s in states(opt)} == {3}


def test_a_refused_load_leaves_no_hook_behind():
    model = small_model()
    opt = make("adamw", model)
    with pytest.raises(ValueError, match="state dict is not of AdamW"):
        opt.load_state_dict(torch.optim.SGD(small_model().parameters()).state_dict())
    assert not opt._optimizer_load_state_dict_pre_hooks


def test_messages_use_the_parameters_names():
    model = small_model()
    opt = gradfused.AdamW(model.named_parameters())
    train(model, opt, 1)
    with refuses(opt, ValueError, "'head.weight'"):
        opt.load_state_dict(edited(opt, lambda d: d["state"][2].update(exp_avg_sq=torch.zeros(2))))


def test_state_dict_is_not_changed_by_loading():
    model = small_model()
    source = torch.optim.AdamW(model.parameters())
    train(model, source, 1)
    saved = source.state_dict()
    before = copy.deepcopy(saved)
    make("adamw", small_model()).load_state_dict(saved)
    assert_identical(before, saved)
