"""Checks of state dicts, copies and hooks; see torch_checks.py."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch_checks import STEPS, Optimizer, assert_same_steps, check, check_once, twins
from torch_optimizers import Subject, parameters, take_steps
from twins import assert_identical, assert_same, states

EXACT = {"rtol": 0.0, "atol": 0.0}


def copied(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """New parameters with the same values."""
    return [nn.Parameter(p.detach().clone()) for p in params]


def params_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def goes_on(subject: Subject, first: Optimizer, saved: Any, **more: Any) -> Optimizer:
    """A new optimizer that loads the state dict continues as the first one does, to the bit."""
    second = subject.ours(copied(params_of(first)), **more)
    second.load_state_dict(saved)
    assert_same(take_steps(second, 4, 3), take_steps(first, 4, 3), EXACT)
    return second


# ---- state dicts


@check
def state_is_not_empty(subject: Subject) -> None:
    """After a step the state has torch's keys, each with a tensor of its parameter's shape or of one element."""
    ours, theirs = twins(subject)
    take_steps(ours, 2)
    take_steps(theirs, 2)
    assert [s.keys() for s in states(ours)] == [s.keys() for s in states(theirs)]
    for p, state in zip(params_of(ours), states(ours), strict=True):
        for key, value in state.items():
            assert isinstance(value, Tensor), key
            assert value.shape == p.shape or value.numel() == 1, key


@check
def state_dicts_have_torchs_form(subject: Subject) -> None:
    ours, theirs = twins(subject)
    mine, other = take_steps(ours, 2).state_dict(), take_steps(theirs, 2).state_dict()
    assert mine.keys() == other.keys()
    assert mine["state"].keys() == {k for k, v in other["state"].items() if any(x is not None for x in v.values())}
    for group, twin in zip(mine["param_groups"], other["param_groups"], strict=True):
        assert twin.keys() <= group.keys()
        assert group["params"] == twin["params"]


@check
def resumes_are_deterministic(subject: Subject) -> None:
    first = take_steps(subject.ours(parameters()), 3)
    goes_on(subject, first, copy.deepcopy(first.state_dict()))


@check_once
def resumes_into_other_options(subject: Subject) -> None:
    """The saved options replace those of the optimizer that loads them."""
    first = take_steps(subject.ours(parameters()), 3)
    second = goes_on(subject, first, copy.deepcopy(first.state_dict()), lr=0.5, weight_decay=0.9)
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"]


@check
def older_state_dicts(subject: Subject) -> None:
    """A state dict without the options that torch added over the years can be loaded."""
    first = take_steps(subject.ours(parameters()), 3)
    saved = copy.deepcopy(first.state_dict())
    for flag in subject.info.not_og_supported_flags:
        for group in saved["param_groups"]:
            if not (flag == "maximize" and group.get(flag)):
                group.pop(flag, None)
    goes_on(subject, first, saved)


@check
def counts_that_are_plain_numbers(subject: Subject) -> None:
    first = take_steps(subject.ours(parameters()), 3)
    saved = copy.deepcopy(first.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    second = goes_on(subject, first, saved)
    assert all(isinstance(state["step"], Tensor) for state in states(second) if "step" in state)


@check
def files_read_with_weights_only(subject: Subject) -> None:
    first = take_steps(subject.ours(parameters()), 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_identical(loaded["state"], first.state_dict()["state"])
    goes_on(subject, first, loaded)


@check
def state_dicts_of_the_twin(subject: Subject) -> None:
    """In the middle of a run torch's state dict can be loaded by ours, and ours by torch's."""
    ours, theirs = twins(subject)
    assert_same_steps(ours, theirs, 3)
    crossed = subject.ours(copied(params_of(theirs))), subject.theirs(copied(params_of(ours)))
    for new, old in zip(crossed, (theirs, ours), strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert_same_steps(*crossed, 3, 3)


@check_once
def names_in_either_state_dict(subject: Subject) -> None:
    """A state dict with parameter names can be loaded where there are none, and the other way round, as in torch."""
    for named_first in (True, False):
        found = []
        for make in (subject.ours, subject.theirs):
            first = take_steps(make(_named(parameters()) if named_first else parameters()), 3)
            params = copied(params_of(first))
            second = make(params if named_first else _named(params))
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            assert_same(take_steps(second, 3, 3), take_steps(first, 3, 3), EXACT)
            found.append(second.param_groups[0].get("param_names"))
        assert found[0] == found[1]


def _named(params: list[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return list(zip("abcde", params, strict=True))


@check_once
def state_dicts_that_do_not_fit(subject: Subject) -> None:
    """A state dict with another number of groups, or of parameters in a group, is refused with ValueError, as in torch."""
    for make in (subject.ours, subject.theirs):
        saved = take_steps(make(parameters()), 1).state_dict()
        for params in (parameters()[:3], [{"params": parameters()[:3]}, {"params": parameters()[3:]}]):
            optimizer = make(params)
            try:
                optimizer.load_state_dict(copy.deepcopy(saved))
            except ValueError:
                continue
            raise AssertionError("nothing was raised, expected ValueError")


# ---- copies


@check
def deepcopies(subject: Subject) -> None:
    """A copy has all public attributes and its own tensors, and continues as the original does."""
    first = take_steps(subject.ours(parameters()), 3)
    second = copy.deepcopy(first)
    public = {name for name in vars(first) if not name.startswith("_")}
    assert public <= set(vars(second))
    assert all(p is not q for p, q in zip(params_of(first), params_of(second), strict=True))
    assert_same(take_steps(second, 4, 3), take_steps(first, 4, 3), EXACT)


@check
def pickles(subject: Subject) -> None:
    first = take_steps(subject.ours(parameters()), 3)
    second = pickle.loads(pickle.dumps(first))
    assert_same(take_steps(second, 4, 3), take_steps(first, 4, 3), EXACT)


# ---- hooks


@check_once
def hooks_of_the_step(subject: Subject) -> None:
    """Global hooks and the optimizer's, before and after a step, are called once each, in torch's order, with its arguments."""
    orders = []
    for make in (subject.ours, subject.theirs):
        order: list[str] = []

        def note(what: str, order: list[str] = order) -> Any:
            def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                order.append(what)

            return hook

        optimizer = make(parameters())
        handles = [
            register_optimizer_step_pre_hook(note("pre of all")),
            register_optimizer_step_post_hook(note("post of all")),
            optimizer.register_step_pre_hook(note("pre")),
            optimizer.register_step_post_hook(note("post")),
        ]
        try:
            take_steps(optimizer, 2)
        finally:
            for handle in handles:
                handle.remove()
        take_steps(optimizer, 1, 2)
        orders.append(order)
    assert orders[0] == orders[1]
    assert len(orders[0]) == 8


@check_once
def hooks_that_change_the_arguments(subject: Subject) -> None:
    """The step is called with what a hook before it returns."""
    for make in (subject.ours, subject.theirs):
        optimizer, calls = make(parameters()), []

        def hook(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], calls: list[str] = calls) -> Any:
            return args[:1], {"closure": lambda: calls.append("called") or 3.0}

        optimizer.register_step_pre_hook(hook)
        assert optimizer.step() == 3.0
        assert calls == ["called"]


@check_once
def hooks_of_state_dict(subject: Subject) -> None:
    for make in (subject.ours, subject.theirs):
        optimizer, calls = take_steps(make(parameters()), 1), []
        optimizer.register_state_dict_pre_hook(lambda _, calls=calls: calls.append("pre"))
        optimizer.register_state_dict_post_hook(lambda _, saved: saved | {"more": 1})
        optimizer.register_state_dict_pre_hook(lambda _, calls=calls: calls.append("first"), prepend=True)
        assert optimizer.state_dict()["more"] == 1
        assert calls == ["first", "pre"]


@check_once
def hooks_of_load_state_dict(subject: Subject) -> None:
    """Hooks before loading may change the state dict, hooks after it see what was loaded, and ``prepend`` puts one first."""
    for make in (subject.ours, subject.theirs):
        saved = take_steps(make(parameters()), 1).state_dict()
        optimizer, calls = make(parameters()), []

        def slower(_: Optimizer, loaded: dict[str, Any], calls: list[str] = calls) -> dict[str, Any]:
            calls.append("slower")
            loaded = copy.deepcopy(loaded)
            loaded["param_groups"][0]["lr"] = 0.125
            return loaded

        optimizer.register_load_state_dict_pre_hook(slower)
        optimizer.register_load_state_dict_pre_hook(lambda *_, calls=calls: calls.append("first"), prepend=True)
        optimizer.register_load_state_dict_post_hook(lambda o, calls=calls: calls.append(str(o.param_groups[0]["lr"])))
        optimizer.load_state_dict(copy.deepcopy(saved))
        assert calls == ["first", "slower", "0.125"]


@check_once
def state_dicts_of_parameters_on_a_gpu(subject: Subject) -> None:
    """State is loaded to the device of its parameters."""
    first = take_steps(subject.ours(parameters()), 3)
    second = subject.ours([nn.Parameter(p.detach().cuda()) for p in params_of(first)])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    take_steps(first, STEPS, 3)
    take_steps(second, STEPS, 3)
    for p, q in zip(params_of(first), params_of(second), strict=True):
        torch.testing.assert_close(q.detach().cpu(), p.detach(), rtol=1e-5, atol=1e-5)
