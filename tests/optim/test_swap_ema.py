"""The average of the weights in place of the weights: what is refused meanwhile, and how averages are loaded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, DTYPES, SHAPES, Run
from torch.nn import Parameter

import gradfused


def averaging(**options: Any) -> tuple[Parameter, Any]:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return p, gradfused.SGD([p], lr=0.5, **options)


SAVING: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "state_dict": lambda optimizer, saved: optimizer.state_dict(),
    "load_state_dict": lambda optimizer, saved: optimizer.load_state_dict(saved),
    "copying or pickling": lambda optimizer, saved: copy.deepcopy(optimizer),
    "copying or pickling the optimizer": lambda optimizer, saved: pickle.dumps(optimizer),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["alone", "sam"])
@pytest.mark.parametrize("what", SAVING)
def test_an_optimizer_inside_swap_ema_is_not_saved_or_loaded(what: str, wrapped: bool) -> None:
    """Its state belongs to weights that are put aside, and the average would be taken for them."""
    p, optimizer = averaging(ema=0.5)
    optimizer.step()
    user = gradfused.SAM(optimizer) if wrapped else optimizer
    saved = copy.deepcopy(user.state_dict())
    with optimizer.swap_ema():
        with pytest.raises(RuntimeError, match=rf"{what}.* inside swap_ema\(\).*save the model inside the block"):
            SAVING[what](user, saved)
        assert torch.equal(p.detach(), torch.full((3,), 0.75))
        with pytest.raises(RuntimeError, match=r"step\(\) inside swap_ema\(\)"):
            (user.first_step if wrapped else user.step)()
    assert torch.equal(p.detach(), torch.full((3,), 0.5))
    SAVING[what](user, saved)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["ema"], torch.full((3,), 0.375))


def test_swap_ema_that_fails_leaves_weights_and_optimizer_as_they_were() -> None:
    p, optimizer = averaging(ema=0.5)
    optimizer.step()
    optimizer.state[p]["ema"] = torch.ones(4)
    with pytest.raises(RuntimeError), optimizer.swap_ema():
        pass
    optimizer.state[p]["ema"] = torch.ones(3)
    assert torch.equal(p.detach(), torch.full((3,), 0.5))
    optimizer.step()


def test_swap_ema_leaves_alone_what_is_averaged_no_more() -> None:
    p, optimizer = averaging(ema=0.5)
    q = Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [q], "ema": 0.5})
    q.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups[0]["ema"] = None
    with optimizer.swap_ema():
        assert torch.equal(p.detach(), torch.full((3,), 0.5))
        assert torch.equal(q.detach(), torch.full((3,), 0.75))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_average_is_loaded_as_it_was_saved(dtype: str) -> None:
    """It stays in float32 and is not copied, as torch does with state in the parameters' dtype."""
    run = Run(CASES["adamw"], {"ema": 0.9}, SHAPES, dtype=DTYPES[dtype]).step(2)
    saved = run.optimizer.state_dict()
    fresh = Run(CASES["adamw"], {"ema": 0.9}, SHAPES, dtype=DTYPES[dtype])
    fresh.optimizer.load_state_dict(saved)
    for p, q in zip(fresh.params, run.params, strict=True):
        for key in ("ema", "exp_avg", "exp_avg_sq"):
            assert fresh.optimizer.state[p][key].data_ptr() == run.optimizer.state[q][key].data_ptr()
