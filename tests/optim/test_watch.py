"""What the native watch over an optimizer notices, reading tensors through DLPack's exchange and through their methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from twins import at_the_end_of_a_large_storage, shrink_in_place

import gradfused
from gradfused.backends import base, cpu

pytestmark = pytest.mark.skipif(cpu.native_or_none() is None, reason="the native module is not built")

EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)


@pytest.fixture(params=["exchange", "exchange without shim", "methods", "methods without shim"])
def optimizer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> gradfused.AdamW:
    """An optimizer over three parameters after a step, whose table's watch reads tensors in one of the two ways."""
    if "exchange" in request.param and EXCHANGE is None:
        pytest.skip("this torch has no DLPack exchange")
    monkeypatch.setattr(base, "EXCHANGE", EXCHANGE if "exchange" in request.param else None)
    monkeypatch.setattr(base, "SHIM", "without" not in request.param)
    shapes = [(6, 1, 5), (4, 4), (8,)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    opt = gradfused.AdamW([*params, torch.nn.Parameter(torch.zeros(3))], backend="cpu")
    for p in params:
        p.data = at_the_end_of_a_large_storage(p)
        p.grad = at_the_end_of_a_large_storage(torch.randn(p.shape))
    opt.step()
    for value in (value for p in params for value in opt.state[p].values()):
        value.data = at_the_end_of_a_large_storage(value)
    opt.step()
    return opt


def param(opt: gradfused.AdamW, i: int = 0) -> Tensor:
    return opt.param_groups[0]["params"][i]


def still(opt: gradfused.AdamW) -> bool:
    """Whether the table of the last step serves the next step."""
    return opt._tables[0].backend.refresh(opt.param_groups, opt.state, {}) is not None


def swap(tensor: Tensor, new: Tensor) -> None:
    tensor.data = new


def replace_state(opt: gradfused.AdamW, key: str) -> None:
    opt.state[param(opt)][key] = opt.state[param(opt)][key].clone()


def restride(tensor: Tensor, *strides: int) -> Tensor:
    """Give a tensor other strides over the same memory."""
    return tensor.detach().as_strided(tensor.shape, strides)


CHANGES: dict[str, Callable[[gradfused.AdamW], Any]] = {
    "a parameter elsewhere": lambda o: swap(param(o), param(o).detach().clone()),
    "a parameter laid out otherwise": lambda o: swap(param(o, 1), restride(param(o, 1), 1, 4)),
    "a state tensor elsewhere": lambda o: swap(o.state[param(o)]["exp_avg"], torch.zeros(6, 1, 5)),
    "a state tensor laid out otherwise": lambda o: swap(
        o.state[param(o, 1)]["exp_avg"], restride(o.state[param(o, 1)]["exp_avg"], 1, 4)
    ),
    "a state tensor of another dtype": lambda o: swap(
        o.state[param(o)]["exp_avg"], o.state[param(o)]["exp_avg"].view(torch.int32)
    ),
    "a parameter whose storage was shrunk in place": lambda o: shrink_in_place(param(o)),
    "a state tensor whose storage was shrunk in place": lambda o: shrink_in_place(o.state[param(o)]["exp_avg_sq"]),
    "a count whose storage was shrunk in place": lambda o: shrink_in_place(o.state[param(o)]["step"]),
    "a gradient whose storage was shrunk in place": lambda o: shrink_in_place(param(o).grad),
    "another state tensor": lambda o: replace_state(o, "exp_avg_sq"),
    "another count": lambda o: replace_state(o, "step"),
    "a count elsewhere": lambda o: swap(o.state[param(o)]["step"], torch.ones(())),
    "no state": lambda o: o.state.clear(),
    "no gradient": lambda o: setattr(param(o), "grad", None),
    "one more gradient": lambda o: setattr(param(o, 3), "grad", torch.ones(3)),
    "a gradient laid out otherwise": lambda o: setattr(param(o, 1), "grad", torch.randn(4, 4).t()),
    "a gradient of another shape": lambda o: swap(param(o, 1).grad, torch.randn(2, 8)),
    "a gradient of another dtype": lambda o: swap(param(o, 1).grad, torch.randn(4, 4, dtype=torch.float64)),
    "a sparse gradient": lambda o: setattr(param(o, 1), "grad", torch.randn(4, 4).to_sparse()),
    "one more group": lambda o: o.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]}),
    "another order": lambda o: o.param_groups[0]["params"].reverse(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_change_asks_for_a_new_table(optimizer: gradfused.AdamW, change: Callable[[gradfused.AdamW], Any]) -> None:
    assert still(optimizer)
    change(optimizer)
    assert not still(optimizer)


def test_moved_gradient_is_taken_over(optimizer: gradfused.AdamW) -> None:
    p, kept = param(optimizer), optimizer._tables[0]
    before = p.detach().clone()
    p.grad = torch.full_like(p, 1e3)
    optimizer.step()
    assert optimizer._tables[0] is kept
    assert (p < before).all()


def test_view_into_a_larger_storage_stays(optimizer: gradfused.AdamW) -> None:
    """The offset counts: the view ends with its storage."""
    memory = torch.randn(30 + 8)
    param(optimizer).grad = memory[8:].view(6, 1, 5)
    assert still(optimizer)
    swap(optimizer.state[param(optimizer)]["exp_avg"], torch.randn(38)[8:].view(6, 1, 5))
    optimizer.step()
    assert still(optimizer)


def test_stride_of_a_dimension_of_one_means_nothing(optimizer: gradfused.AdamW) -> None:
    p = param(optimizer)
    p.grad = torch.randn(30).as_strided((6, 1, 5), (5, 77, 1))
    assert still(optimizer)
