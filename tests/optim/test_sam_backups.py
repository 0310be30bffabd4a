"""SAM's options, wherever they are given, and its backups of parameters that change or disappear."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from cases import EMULATED_CUDA
from torch import nn
from torch.nn import Parameter
from twins import loss_of, small_model

import gradfused
from gradfused import SAM

backends = pytest.mark.parametrize("backend", ["cpu", "reference", EMULATED_CUDA])
RHO = 0.3


# ---- options


BAD = [
    ("rho", -0.1, ValueError),
    ("rho", math.nan, ValueError),
    ("rho", math.inf, ValueError),
    ("rho", "much", TypeError),
    ("rho", None, TypeError),
    ("rho", True, TypeError),
    ("eta", -1.0, ValueError),
    ("eta", math.nan, ValueError),
    ("eta", "some", TypeError),
    ("adaptive", 1, TypeError),
    ("adaptive", "yes", TypeError),
    ("adaptive", False, ValueError),  # eta is set
]


def whole_step(model: nn.Module, sam: SAM) -> None:
    def closure() -> float:
        sam.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return float(loss.detach())

    sam.step(closure)


@pytest.mark.parametrize("how", ["made", "assigned", "loaded"])
@pytest.mark.parametrize(("name", "value", "error"), BAD)
def test_options_are_checked_wherever_they_come_from(name: str, value: Any, error: type, how: str) -> None:
    good = {"rho": 0.5, "adaptive": True, "eta": 0.01}
    model = small_model()
    base = gradfused.AdamW(model.parameters(), lr=0.01)
    sam = SAM(base, **good)
    whole_step(model, sam)
    saved = sam.state_dict()
    saved["sam"] |= {name: value}
    saved["param_groups"][0]["lr"] = 0.5
    ways = {
        "made": lambda: SAM(base, **good | {name: value}),
        "assigned": lambda: setattr(sam, name, value),
        "loaded": lambda: sam.load_state_dict(saved),
    }
    with pytest.raises(error, match=rf"{name}(:|=True)"):
        ways[how]()
    assert {key: getattr(sam, key) for key in good} == good
    assert base.param_groups[0]["lr"] == 0.01
    whole_step(model, sam)


def test_options_move_between_steps() -> None:
    p = Parameter(torch.tensor([2.0, 1.0]))
    sam = SAM(gradfused.SGD([p], lr=0.0), 1.0)
    for adaptive, eta, rho, expected in (
        (False, 0.0, 1.0, [2.6, 1.8]),
        (True, 0.0, 0.5, [2 + 0.5 * 12 / math.sqrt(52), 1 + 0.5 * 4 / math.sqrt(52)]),
        (True, 1.0, 1, [2 + 27 / math.sqrt(145), 1 + 16 / math.sqrt(145)]),
    ):
        sam.adaptive, sam.eta, sam.rho = adaptive, eta, rho
        p.grad = torch.tensor([3.0, 4.0])
        sam.first_step()
        torch.testing.assert_close(p.detach(), torch.tensor(expected))
        sam.second_step()


# ---- parameters that are replaced


def step(sam: SAM, params: list[Parameter]) -> None:
    for half in (sam.first_step, sam.second_step):
        for p in params:
            p.grad = torch.ones_like(p)
        half()


@backends
@pytest.mark.parametrize("how", ["replaced", "removed", "regrouped"])
def test_backups_of_parameters_that_left_are_freed(how: str, backend: str) -> None:
    kept = Parameter(torch.ones(4))
    params = [kept, Parameter(torch.ones(3))]
    sam = SAM(gradfused.SGD(params, lr=0.5, backend=backend), RHO)
    step(sam, params)
    assert set(sam._halves._state) == set(params)
    for size in range(5, 8):
        params = [kept] if how == "removed" else [kept, Parameter(torch.ones(size))]
        if how == "regrouped":
            sam.param_groups[0]["params"] = params[:1]
            sam.param_groups[1:] = []
            sam.add_param_group({"params": params[1:]})
        else:
            sam.param_groups[0]["params"] = params
        step(sam, params)
        assert set(sam._halves._state) == set(params)


def test_everything_goes_with_the_optimizer() -> None:
    """Everything is freed without the garbage collector, since there is no cycle."""
    gc.collect()
    gc.disable()
    try:
        params = [Parameter(torch.ones(4))]
        sam = SAM(gradfused.AdamW(params, lr=0.5), RHO)
        step(sam, params)
        gone = [weakref.ref(x) for x in (params[0], sam, sam.base_optimizer, sam._halves._state[params[0]]["backup"])]
        del sam, params
        assert [ref() for ref in gone] == [None] * 4
    finally:
        gc.enable()


@backends
@pytest.mark.parametrize("change", [torch.float64, torch.ones(7, 2)], ids=["dtype", "shape"])
def test_a_parameter_may_change_between_steps(change: Any, backend: str) -> None:
    """Pruning and casting do so through ``.data``: the backup is made anew."""
    p = Parameter(torch.ones(3))
    sam = SAM(gradfused.SGD([p], lr=0.5, backend=backend), RHO)
    step(sam, [p])
    p.grad = None
    p.data = p.data.to(change) if isinstance(change, torch.dtype) else change.clone()
    before = p.detach().clone()
    step(sam, [p])
    torch.testing.assert_close(p.detach(), before - 0.5)


@backends
def test_a_parameter_that_changes_between_the_halves_is_refused(backend: str) -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(2))
    sam = SAM(gradfused.SGD([p, q], lr=0.5, backend=backend), RHO)
    p.grad, q.grad = torch.ones(3), torch.ones(2)
    sam.first_step()
    up = q.detach().clone()
    p.grad = None
    p.data = torch.ones(7)
    p.grad = torch.ones(7)
    for half in (sam.second_step, sam.restore):
        with pytest.raises(ValueError, match=r"parameter 0 of group 0 are kept .* shape \(3,\).*replace it after"):
            half()
        assert sam.ascended
        assert torch.equal(q.detach(), up)
