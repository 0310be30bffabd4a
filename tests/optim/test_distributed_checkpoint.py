"""torch.distributed.checkpoint, which makes an optimizer's state by a step on zero gradients and loads into its
tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from twins import assert_identical, loss_of, small_model

import gradfused

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

RECIPES = {
    "plain": (torch.float32, {}),
    "master-ema": (torch.bfloat16, {"precision": "master", "ema": 0.9}),
    "kahan": (torch.bfloat16, {"precision": "kahan"}),
    "noise-bfloat16-state": (torch.float32, {"noise": 0.1, "state_dtype": "bfloat16"}),
}
RULES = {"SGD": {"momentum": 0.9}, "AdamW": {}, "NAdam": {}, "LARS": {"momentum": 0.9}, "Adan": {}}
LAYOUTS = {
    "by-parameter": StateDictOptions(),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}
with_sam = pytest.mark.parametrize("sam", [False, True], ids=["alone", "sam"])


@pytest.fixture(autouse=True)
def process_group() -> Iterator[None]:
    """A process group of this process only."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def made(rule: str, recipe: str, sam: bool) -> tuple[nn.Module, Any]:
    dtype, options = RECIPES[recipe]
    model = small_model(dtype)
    optimizer = getattr(gradfused, rule)(model.parameters(), lr=0.01, **RULES[rule], **options)
    return model, gradfused.SAM(optimizer, 0.1) if sam else optimizer


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for index in steps:

        def closure(index: int = index) -> float:
            optimizer.zero_grad()
            loss = loss_of(model, index)
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters()}


KINDS = [("AdamW", recipe, layout) for recipe in RECIPES for layout in LAYOUTS]
KINDS += [(rule, "master-ema", "by-parameter") for rule in RULES if rule != "AdamW"]


@pytest.mark.parametrize(("rule", "recipe", "layout"), KINDS)
@with_sam
def test_round_trip_into_a_fresh_optimizer(sam: bool, rule: str, recipe: str, layout: str) -> None:
    """The state comes back whole, and training goes on bit for bit."""
    model, optimizer = made(rule, recipe, sam)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=LAYOUTS[layout]))
    other, resumed = made(rule, recipe, sam)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, optim_state_dict=saved, options=LAYOUTS[layout])
    assert_identical(state_of(other, resumed), state_of(model, optimizer))
    train(model, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    assert_identical(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("recipe", RECIPES)
@with_sam
def test_state_is_made_without_moving_the_weights(sam: bool, recipe: str) -> None:
    model, optimizer = made("AdamW", recipe, sam)
    before = copy.deepcopy(model.state_dict())
    get_optimizer_state_dict(model, optimizer)
    assert_identical(dict(model.state_dict()), dict(before))
    trained, theirs = made("AdamW", recipe, sam)
    train(trained, theirs, range(1))
    expected = {name: state.keys() for name, state in state_of(trained, theirs).items()}
    assert {name: state.keys() for name, state in state_of(model, optimizer).items()} == expected
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert not (sam and optimizer.ascended)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@with_sam
def test_saved_and_loaded_in_place(sam: bool, tmp_path: Path) -> None:
    """Loading writes into the tensors of state that was made for it."""
    model, optimizer = made("AdamW", "master-ema", sam)
    train(model, optimizer, range(2))
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.save(saved, checkpoint_id=tmp_path / "saved", no_dist=True)
    other, resumed = made("AdamW", "master-ema", sam)
    loaded = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, resumed)}
    checkpoint.load(loaded, checkpoint_id=tmp_path / "saved", no_dist=True)
    other.load_state_dict(loaded["model"])
    set_optimizer_state_dict(other, resumed, optim_state_dict=loaded["optimizer"])
    assert_identical(state_of(other, resumed), state_of(model, optimizer))
    train(model, optimizer, range(2, 4))
    train(other, resumed, range(2, 4))
    assert_identical(dict(other.state_dict()), dict(model.state_dict()))
