"""gradfused's optimizers do in ordinary training loops what torch's do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from twins import (
    assert_same,
    assert_twins,
    every_backend,
    every_rule,
    loss_of,
    parameters,
    small_model,
    states,
    train,
    trained,
)

import gradfused


@every_backend
@every_rule
def test_plain_training(variant, backend):
    opt = assert_twins(trained(steps=6), variant, backend=backend)
    assert isinstance(opt, torch.optim.Optimizer)


@every_rule
def test_positional_arguments_are_torchs(variant):
    positional = {
        "SGD": (0.05, 0.9, 0.0, 0.01, True),
        "Adam": (0.01, (0.8, 0.95), 1e-6, 0.01, True),
        "AdamW": (0.01, (0.8, 0.95), 1e-6, 0.01, True),
    }
    name = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW"}[variant.split("_")[0]]
    ours_model, theirs_model = small_model(), small_model()
    ours = getattr(gradfused, name)(ours_model.parameters(), *positional[name], maximize=True)
    theirs = getattr(torch.optim, name)(theirs_model.parameters(), *positional[name], maximize=True)
    for key, value in theirs.defaults.items():
        assert ours.defaults[key] == value
    train(ours_model, ours, 3)
    train(theirs_model, theirs, 3)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_defaults_are_torchs(name):
    ours = getattr(gradfused, name)(small_model().parameters())
    theirs = getattr(torch.optim, name)(small_model().parameters())
    for key, value in theirs.defaults.items():
        assert ours.defaults[key] == value, key
    assert set(theirs.param_groups[0]) <= set(ours.param_groups[0])


@pytest.mark.parametrize("flags", [{"foreach": True}, {"fused": True}, {"foreach": False}, {"fused": False}])
def test_torchs_implementation_flags_change_nothing(flags):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters(), **flags)
        train(model, opt, 3)
        return model, opt

    assert_twins(scenario, "adamw")


@every_rule
def test_groups_with_their_own_options(variant):
    def scenario(make):
        model = small_model()
        groups = [
            {"params": model.conv.parameters(), "lr": 0.002, "weight_decay": 0.3},
            {"params": model.head.parameters(), "maximize": True},
        ]
        opt = make(groups)
        train(model, opt, 5)
        return model, opt

    assert_twins(scenario, variant)


@every_rule
def test_group_added_between_steps(variant):
    def scenario(make):
        model = small_model()
        opt = make(model.conv.parameters())
        train(model, opt, 3)
        opt.add_param_group({"params": model.head.parameters(), "lr": 0.02})
        train(model, opt, 3, start=3)
        return model, opt

    assert_twins(scenario, variant)


def test_group_removed_between_steps():
    def scenario(make):
        model = small_model()
        opt = make([{"params": model.conv.parameters()}, {"params": model.head.parameters(), "lr": 0.1}])
        train(model, opt, 3)
        del opt.param_groups[0]
        train(model, opt, 3, start=3)
        return model, opt

    assert_twins(scenario, "adamw")


@every_backend
def test_parameter_moved_to_another_group(backend):
    def scenario(make):
        model = small_model()
        opt = make([{"params": model.conv.parameters(), "lr": 0.1}, {"params": model.head.parameters(), "lr": 0.001}])
        train(model, opt, 2)
        opt.param_groups[1]["params"].insert(0, opt.param_groups[0]["params"].pop())
        train(model, opt, 3, start=2)
        return model, opt

    assert_twins(scenario, "adamw", backend=backend)


def test_parameters_taken_out_and_put_in():
    def take_out(model, opt):
        opt.param_groups[0]["params"].pop()

    def put_in(model, opt):
        opt.param_groups[0]["params"].insert(0, model.head.bias)

    assert_twins(trained(take_out, put_in), "adamw")


def test_named_parameters():
    def scenario(make):
        model = small_model()
        opt = make(model.named_parameters())
        train(model, opt, 3)
        return model, opt

    opt = assert_twins(scenario, "adamw")
    assert opt.param_groups[0]["param_names"] == ["conv.weight", "conv.bias", "head.weight", "head.bias"]


def test_named_parameters_in_groups():
    def scenario(make):
        model = small_model()
        opt = make([{"params": model.conv.named_parameters("conv")}])
        opt.add_param_group({"params": model.head.named_parameters("head"), "lr": 0.1})
        train(model, opt, 3)
        return model, opt

    opt = assert_twins(scenario, "adamw")
    assert opt.param_groups[1]["param_names"] == ["head.weight", "head.bias"]


@every_backend
@every_rule
def test_gradients_that_are_none_in_some_steps(variant, backend):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        absent = {0: "conv.weight", 2: "head.bias", 3: "head.bias", 4: "conv.weight"}

        def drop(index):
            if index in absent:
                model.get_parameter(absent[index]).grad = None

        train(model, opt, 7, before_step=drop)
        return model, opt

    opt = assert_twins(scenario, variant, backend=backend)
    if "adam" in variant:
        assert [int(s["step"]) for s in states(opt)] == [5, 7, 7, 5]


def test_no_gradient_at_all():
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        opt.step()
        assert not any(states(opt))
        train(model, opt, 2)
        opt.zero_grad()
        opt.step()
        train(model, opt, 1, start=2)
        return model, opt

    opt = assert_twins(scenario, "adamw")
    assert {int(s["step"]) for s in states(opt)} == {3}


@every_rule
def test_freezing_and_unfreezing(variant):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        for start, frozen in ((0, True), (2, False), (4, True), (6, False)):
            model.conv.requires_grad_(not frozen)
            train(model, opt, 2, start=start)
        return model, opt

    assert_twins(scenario, variant)


@pytest.mark.parametrize("set_to_none", [True, False])
@every_rule
def test_zero_grad(variant, set_to_none):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        train(model, opt, 1)
        for index in range(1, 5):
            opt.zero_grad(set_to_none=set_to_none)
            if index == 2:  # a gradient of zeros still decays and counts; None does not
                opt.step()
            loss_of(model, index).backward()
            opt.step()
        return model, opt

    assert_twins(scenario, variant)


def test_gradients_accumulated_over_backward_passes():
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        for index in range(4):
            if index % 2 == 0:
                opt.zero_grad()
            loss_of(model, index).backward()
            opt.step()
        return model, opt

    assert_twins(scenario, "adamw")


def test_gradients_are_only_read():
    model = small_model()
    opt = gradfused.AdamW(
        model.parameters(), centralize=True, clip_norm=0.01, noise=0.1, reverse=0.5, clip_value=0.1, maximize=True
    )
    loss_of(model, 0).backward()
    before = [p.grad.clone() for p in model.parameters()]
    opt.step()
    for p, g in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.grad, g)


@every_rule
def test_tied_weights(variant):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(7, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, x):
            return self.out(self.embedding(x))

    def scenario(make):
        model = Tied()
        opt = make(model.parameters())
        for index in range(4):
            opt.zero_grad()
            ids = torch.arange(7).roll(index)
            nn.functional.cross_entropy(model(ids), ids.roll(1)).backward()
            opt.step()
        assert len(opt.param_groups[0]["params"]) == 1
        return model, opt

    assert_twins(scenario, variant)


@every_backend
def test_the_same_parameter_twice_in_a_group(backend):
    """torch warns and steps it twice. Here it is stepped once, so that a step stays one pass."""
    model, other = small_model(), small_model()
    weight, bias = model.head.parameters()
    with pytest.warns(UserWarning, match="duplicate"):
        opt = gradfused.AdamW([weight, weight, bias], backend=backend)
    once = gradfused.AdamW(other.head.parameters(), backend=backend)
    for m, o in ((model, opt), (other, once)):
        train(m, o, 3)
    assert torch.equal(weight, other.head.weight)
    assert torch.equal(bias, other.head.bias)
    assert [int(opt.state[p]["step"]) for p in (weight, bias)] == [3, 3]


def test_a_parameter_in_two_groups_is_refused_as_in_torch():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="more than one parameter group"):
        gradfused.SGD([{"params": [p]}, {"params": [p]}])
    opt = gradfused.SGD([p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [p]})
    assert len(opt.param_groups) == 1


def test_no_parameters_is_refused_as_in_torch():
    with pytest.raises(ValueError, match="empty parameter list"):
        gradfused.SGD([])


@every_rule
def test_group_without_parameters(variant):
    def scenario(make):
        model = small_model()
        opt = make([{"params": []}, {"params": model.parameters()}])
        train(model, opt, 2)
        return model, opt

    assert_twins(scenario, variant)


@every_backend
def test_float64(backend):
    ours_model, theirs_model = small_model(torch.float64), small_model(torch.float64)
    ours = gradfused.AdamW(ours_model.parameters(), lr=0.01, backend=backend)
    theirs = torch.optim.AdamW(theirs_model.parameters(), lr=0.01)
    train(ours_model, ours, 4)
    train(theirs_model, theirs, 4)
    assert {s["exp_avg"].dtype for s in states(ours)} == {torch.float64}
    assert_same(ours, theirs, {"rtol": 1e-12, "atol": 1e-12})


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype, backend):
    """torch rounds at other places, so the results agree within a few units of the dtype."""
    ours_model, theirs_model = small_model(dtype), small_model(dtype)
    ours = gradfused.SGD(ours_model.parameters(), lr=0.1, momentum=0.9, backend=backend)
    theirs = torch.optim.SGD(theirs_model.parameters(), lr=0.1, momentum=0.9)
    train(ours_model, ours, 2)
    train(theirs_model, theirs, 2)
    assert {s["momentum_buffer"].dtype for s in states(ours)} == {dtype}
    step = torch.finfo(dtype).eps
    assert_same(ours, theirs, {"rtol": 4 * step, "atol": 4 * step})


def test_parameters_of_several_dtypes_together():
    def scenario(make):
        model = small_model()
        model.head.to(torch.float64)
        opt = make(model.parameters())
        for index in range(3):
            opt.zero_grad()
            generator = torch.Generator().manual_seed(index)
            for p in parameters(opt):
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            opt.step()
        return model, opt

    assert_twins(scenario, "adamw")


def test_step_counts_follow_the_default_dtype():
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        p = nn.Parameter(torch.ones(3))
        opt = gradfused.AdamW([p])
        p.grad = torch.ones(3)
        opt.step()
        opt.step()
    finally:
        torch.set_default_dtype(previous)
    assert opt.state[p]["step"].dtype == torch.float64
    assert opt.state[p]["step"] == 2


def test_repr_and_empty_step_return_nothing():
    opt = gradfused.AdamW(small_model().parameters(), clip_norm=1.0)
    assert opt.step() is None
    assert "clip_norm: 1.0" in repr(opt)
