"""Checkpoints of every optimizer with every option: into the same, into a plain one, through torch's, and damaged ones.

Optimizers and options are read from their declarations (declared.py), so that new ones are covered at once.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from declared import OPTIMIZERS, RECIPE, Option, own_options
from torch import Tensor, nn
from twins import EXACT, assert_same, refuses, states

from gradfused.step import options
from gradfused.step.state import RIDERS

SHAPES = ((3, 4), (5,))
CHOSEN = {"number": (0.5,), "integer": (3,), "flag": (True,)}


def values(option: Option) -> tuple[Any, ...]:
    """The values of an option that are tried in checkpoints."""
    if option.kind == "numbers":
        return ((0.5, 0.25, 0.75)[: option.count],)
    return options._CHOICES[option.name] if option.kind == "choice" else CHOSEN[option.kind]


def build(optimizer: str, dtype: torch.dtype, **given: Any) -> Any:
    params = [
        nn.Parameter(torch.linspace(-1, 1, 12, dtype=dtype)[: torch.Size(s).numel()].view(s).clone()) for s in SHAPES
    ]
    return OPTIMIZERS[optimizer](params, **given)


def train(opt: Any, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        for p in opt.param_groups[0]["params"]:
            p.grad = (torch.arange(p.numel(), dtype=torch.float64).sin() * (step + 1)).to(p.dtype).view_as(p)
        opt.step()


def variants(optimizer: str) -> Iterator[dict[str, Any]]:
    """Each value of each option, with momentum where there is one, except what cannot run here."""
    yield {}
    base = {"momentum": 0.5} if any(o.name == "momentum" for o in own_options(optimizer)) else {}
    for option in [*own_options(optimizer), *RECIPE]:
        for value in values(option):
            given = base | {option.name: value}
            if value == "agc":
                given["norm_scope"] = "unit"
            if can_run(optimizer, given):
                yield given


@cache
def _refusal(optimizer: str, given: tuple[tuple[str, Any], ...]) -> str:
    try:
        train(build(optimizer, torch.float32, **dict(given)), 1)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def can_run(optimizer: str, given: dict[str, Any]) -> bool:
    """Whether an optimizer can be stepped: a backend may be missing, and none is differentiable."""
    refusal = _refusal(optimizer, tuple(given.items()))
    assert not refusal or given.keys() & {"backend", "differentiable", "nesterov"}, refusal
    return not refusal


def through_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resumed(opt: Any, dtype: torch.dtype, saved: dict[str, Any], **given: Any) -> Any:
    """A new optimizer over copies of the weights that has loaded a state dict."""
    other = build(type(opt).__name__, dtype, **given)
    with torch.no_grad():
        for p, q in zip(other.param_groups[0]["params"], opt.param_groups[0]["params"], strict=True):
            p.copy_(q)
    other.load_state_dict(copy.deepcopy(saved))  # torch uses the loaded tensors themselves
    return other


def twin_of(opt: Any) -> Any:
    """torch's optimizer of that name, over copies of the weights; None if torch has none."""
    cls = getattr(torch.optim, type(opt).__name__, None)
    return cls and cls([p.detach().clone().requires_grad_() for p in opt.param_groups[0]["params"]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_checkpoint_goes_on_as_if_never_saved(optimizer, dtype):
    """With every option: through a file, into an optimizer made without options, and through torch's optimizer."""
    for given in variants(optimizer):
        opt = build(optimizer, dtype, **given)
        train(opt, 2)
        saved = through_file(opt.state_dict())
        others = [resumed(opt, dtype, saved, **given), resumed(opt, dtype, saved)]
        twin = twin_of(opt)
        if twin is not None:
            twin.load_state_dict(copy.deepcopy(saved))
            back = resumed(opt, dtype, through_file(twin.state_dict()), **given)
            # torch casts state to the weights' dtype, and so rounds state in another one.
            others += [back] if dtype == torch.float32 and given.get("state_dtype") != "bfloat16" else []
        train(opt, 2, start=2)
        for other in others:
            train(other, 2, start=2)
            assert_same(other, opt, EXACT)


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if hasattr(torch.optim, name)])
def test_torchs_checkpoint_loads_with_every_option(optimizer):
    """State that an option adds is missing in torch's checkpoint, and is made in the next step."""
    twin = twin_of(build(optimizer, torch.float32))
    train(twin, 2)
    for given in variants(optimizer):
        opt = build(optimizer, torch.float32, **given)
        opt.load_state_dict(copy.deepcopy(twin.state_dict()))
        train(opt, 1)


# ---- damaged


def damaged(opt: Any, key: str, left: str) -> dict[str, Any]:
    """The state dict without one value of the second parameter, or with None for it."""
    saved = copy.deepcopy(opt.state_dict())
    if left == "nothing":
        del saved["state"][1][key]
    else:
        saved["state"][1][key] = None
    return saved


@pytest.mark.parametrize("left", ["nothing", "None"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_of_which_a_part_is_missing_is_refused_by_its_key(optimizer, left):
    """Zeros in its place would start another run, with a new first moment or a step count of one."""
    opt = build(optimizer, torch.float32)
    train(opt, 2)
    for key in states(opt)[1]:
        if set(states(opt)[1]) == {key}:
            continue  # nothing is left, so that the parameter starts anew
        with refuses(opt, ValueError, f"parameter 1 of group 0 but no '{key}'", type(opt).__name__):
            opt.load_state_dict(damaged(opt, key, left))
    train(opt, 1, start=2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_that_an_option_asks_for_may_be_missing(optimizer):
    """An option that was switched on after the last step has no state yet: amsgrad's maximum, a copy in float32."""
    for given in variants(optimizer):
        opt = build(optimizer, torch.bfloat16, **given)
        train(opt, 2)
        optional = (type(opt)._rule.optional_keys | RIDERS) - ({"step"} if type(opt)._rule.counts_steps else set())
        for key in set(states(opt)[1]) & optional:
            opt.load_state_dict(damaged(opt, key, "nothing"))
            train(opt, 1)
            assert isinstance(opt.state[opt.param_groups[0]["params"][1]][key], Tensor)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_state_at_all_is_a_new_start(optimizer):
    opt = build(optimizer, torch.float32)
    train(opt, 2)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"].pop(1, None)
    opt.load_state_dict(saved)
    train(opt, 1)
    assert float(states(opt)[1].get("step", 1)) == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_parameter_listed_twice_is_refused(optimizer):
    opt = build(optimizer, torch.float32)
    train(opt, 2)
    for ids in ([0, 0], [1, 1]):
        saved = copy.deepcopy(opt.state_dict())
        saved["param_groups"][0]["params"] = ids
        with refuses(opt, ValueError, f"has parameter {ids[0]} more than once"):
            opt.load_state_dict(saved)
