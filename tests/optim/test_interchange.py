"""In the middle of a run, torch.optim's state dicts load into ours, and ours into torch.optim."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from twins import VARIANTS, assert_same, every_backend, every_rule, small_model, states, train

import gradfused

RECIPE = {"centralize": "conv", "clip_norm": 0.7, "noise": 0.25, "seed": 3, "nonfinite": "skip", "reverse": 0.1}


def make(library, variant, model, **more):
    name, options = VARIANTS[variant]
    return getattr(library, name)(model.parameters(), **(options | more))


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_bitwise(ours, theirs):
    """Both have the same keys and values, to the bit and in dtype and shape, step counts included."""
    assert [set(s) for s in states(ours)] == [set(s) for s in states(theirs)]
    for mine, other in zip(states(ours), states(theirs), strict=True):
        for key, value in other.items():
            assert torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(value)), key
            assert mine[key].dtype == value.dtype
            assert mine[key].shape == value.shape


def handed_over(source, target, variant, *, through_file, recipe):
    """Train with ``source``, hand its weights and state to ``target``, and go on with both."""
    first, second = small_model(), small_model()
    before = make(source, variant, first)
    train(first, before, 3)
    after = make(target, variant, second, lr=77.0, **recipe)
    train(second, after, 1, start=50)  # the target has taken steps, whose state is replaced
    second.load_state_dict(first.state_dict())
    after.load_state_dict((saved_and_loaded if through_file else copy.deepcopy)(before.state_dict()))
    assert_bitwise(after, before)
    return first, before, second, after


@pytest.mark.parametrize("through_file", [False, True])
@every_backend
@every_rule
def test_torch_to_ours(variant, backend, through_file):
    first, theirs, second, ours = handed_over(
        torch.optim, gradfused, variant, through_file=through_file, recipe={"backend": backend}
    )
    train(first, theirs, 4, start=3)
    train(second, ours, 4, start=3)
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"]
    assert_same(ours, theirs)


@pytest.mark.parametrize("through_file", [False, True])
@every_rule
def test_ours_to_torch(variant, through_file):
    first, ours, second, theirs = handed_over(gradfused, torch.optim, variant, through_file=through_file, recipe={})
    train(first, ours, 4, start=3)
    train(second, theirs, 4, start=3)
    assert_same(ours, theirs)


@every_rule
def test_there_and_back_again(variant):
    """Each goes on from the other's state: what is handed over is equal to the bit, and the result close to torch's."""
    alone_model, model = small_model(), small_model()
    alone = make(torch.optim, variant, alone_model)
    train(alone_model, alone, 6)
    state = None
    for start, library in ((0, torch.optim), (2, gradfused), (4, torch.optim)):
        opt = make(library, variant, model)
        if state is not None:
            opt.load_state_dict(state)
        train(model, opt, 2, start=start)
        state = copy.deepcopy(opt.state_dict())
    assert_same(opt, alone)


@every_rule
def test_recipe_survives_torchs_checkpoint(variant):
    _, _, _, ours = handed_over(torch.optim, gradfused, variant, through_file=True, recipe=RECIPE)
    for name, value in RECIPE.items():
        assert ours.param_groups[0][name] == value
    assert ours.defaults["clip_norm"] == 0.7


@every_rule
def test_state_and_groups_have_torchs_keys_and_shapes(variant):
    dicts = []
    for library in (gradfused, torch.optim):
        model = small_model()
        opt = make(library, variant, model)
        train(model, opt, 2)
        dicts.append(opt.state_dict())
    ours, theirs = dicts
    assert set(theirs) <= set(ours)
    for mine, other in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert set(other) <= set(mine)
        assert mine["params"] == other["params"]
        assert {k: mine[k] for k in other} == other
    for index, other in theirs["state"].items():
        mine = {k: v for k, v in ours["state"].get(index, {}).items() if v is not None}
        assert set(mine) == {k for k, v in other.items() if v is not None}
        for key, value in mine.items():
            assert value.shape == other[key].shape
            assert value.dtype == other[key].dtype


def test_momentum_buffer_that_torch_never_filled():
    """torch saves momentum_buffer=None for a parameter that has not had a gradient, and before the first step."""
    model, other = small_model(), small_model()
    theirs = make(torch.optim, "sgd_momentum", model)

    def drop(index):
        model.conv.weight.grad = None

    train(model, theirs, 2, before_step=drop)
    saved = copy.deepcopy(theirs.state_dict())
    saved["state"][0] = {"momentum_buffer": None}
    ours = make(gradfused, "sgd_momentum", other)
    other.load_state_dict(model.state_dict())
    ours.load_state_dict(saved)
    train(model, theirs, 3, start=2)
    train(other, ours, 3, start=2)
    assert_same(ours, theirs)


def test_adam_and_adamw_checkpoints_keep_their_own_decay():
    """Both have the same keys, and torch tells them apart by decoupled_weight_decay.

    AdamW ignores it, Adam takes what is saved.
    """
    for library in (torch.optim, gradfused):
        model, other, plain = small_model(), small_model(), small_model()
        adam = make(library, "adam", model)
        train(model, adam, 2)
        opt = make(gradfused, "adamw", other)
        opt.load_state_dict(copy.deepcopy(adam.state_dict()))
        twin = torch.optim.AdamW(plain.parameters(), **VARIANTS["adam"][1])
        twin.load_state_dict(
            copy.deepcopy(adam.state_dict()) | {"param_groups": [twin.state_dict()["param_groups"][0]]}
        )
        train(other, opt, 2)
        train(plain, twin, 2)
        assert_same(opt, twin)


def test_groups_with_names_both_ways():
    model, other = small_model(), small_model()
    theirs = torch.optim.AdamW(model.named_parameters())
    train(model, theirs, 1)
    ours = gradfused.AdamW(other.named_parameters(), clip_norm=1.0)
    ours.load_state_dict(theirs.state_dict())
    assert_bitwise(ours, theirs)
    assert ours.param_groups[0]["param_names"] == theirs.param_groups[0]["param_names"]
    theirs.load_state_dict(ours.state_dict())
    assert theirs.param_groups[0]["clip_norm"] == 1.0
    train(model, theirs, 1, start=1)


def test_amsgrad_checkpoint_into_plain_adam_and_back():
    model, other = small_model(), small_model()
    theirs = make(torch.optim, "adamw_amsgrad", model)
    train(model, theirs, 2)
    ours = make(gradfused, "adamw", other)
    other.load_state_dict(model.state_dict())
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["amsgrad"] is True
    train(model, theirs, 2, start=2)
    train(other, ours, 2, start=2)
    assert_same(ours, theirs)


@every_backend
def test_step_counts_saved_as_plain_numbers(backend):
    """torch saved counts so until 1.12; apex and others still do."""
    model, other = small_model(), small_model()
    theirs = make(torch.optim, "adamw", model)
    train(model, theirs, 2)
    saved = copy.deepcopy(theirs.state_dict())
    for state in saved["state"].values():
        state["step"] = 2
    ours = make(gradfused, "adamw", other, backend=backend)
    other.load_state_dict(model.state_dict())
    ours.load_state_dict(saved)
    train(model, theirs, 2, start=2)
    train(other, ours, 2, start=2)
    assert_same(ours, theirs)
    assert all(isinstance(s["step"], torch.Tensor) for s in states(ours))
