"""DANN's schedule, on layers and on optimizers."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from repository import ROOT
from torch import nn

import gradfused
from gradfused.nn import DANNSchedule, GradientReversal, ReversalLinear


def formula(progress: float, gamma: float = 10.0, lo: float = 0.0, hi: float = 1.0) -> float:
    return lo + (hi - lo) * (2 / (1 + math.exp(-gamma * progress)) - 1)


def two_groups(**second: object) -> gradfused.SGD:
    groups = [{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(2))], **second}]
    return gradfused.SGD(groups, lr=0.1)


# ---- what it moves


@pytest.mark.parametrize("options", [{}, {"gamma": 3.0, "lo": 0.2, "hi": 0.1}, {"hi": 5.0}])
def test_follows_the_papers_formula_and_stays_at_its_end(options: dict[str, float]) -> None:
    layer = GradientReversal(7.0)
    schedule = DANNSchedule(layer, 8, **options)
    for step in range(12):
        assert layer.lambda_ == schedule.lambda_ == pytest.approx(formula(min(1.0, step / 8), **options), abs=1e-15)
        schedule.step()


def test_moves_every_reversal_in_a_module() -> None:
    model = nn.Sequential(GradientReversal(), nn.ModuleDict({"head": ReversalLinear(3, 2)}), nn.Linear(2, 2))
    schedule = DANNSchedule(model, 4)
    schedule.step()
    assert model[0].lambda_ == model[1]["head"].lambda_ == pytest.approx(formula(0.25))


def test_what_a_layer_does_moves_along() -> None:
    layer = GradientReversal()
    schedule = DANNSchedule(layer, 2)
    for expected in (0.0, formula(0.5), formula(1.0)):
        x = torch.ones(3, requires_grad=True)
        layer(x).sum().backward()
        torch.testing.assert_close(x.grad, torch.full_like(x, -expected))
        schedule.step()


def test_moves_the_groups_that_reverse() -> None:
    optimizer = two_groups(reverse=1.0)
    schedule = DANNSchedule(optimizer, 4)
    schedule.step()
    assert [group["reverse"] for group in optimizer.param_groups] == [None, pytest.approx(formula(0.25))]
    _, adversary = (p for group in optimizer.param_groups for p in group["params"])
    adversary.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(adversary.detach(), torch.full((2,), 1 + 0.1 * formula(0.25)))


def test_moves_one_group_that_is_named() -> None:
    optimizer = two_groups(reverse=3.0)
    DANNSchedule((optimizer, 0), 4, lo=0.5)
    assert [group["reverse"] for group in optimizer.param_groups] == [0.5, 3.0]


def test_groups_that_a_checkpoint_replaced_still_move() -> None:
    optimizer = two_groups(reverse=1.0)
    schedule = DANNSchedule(optimizer, 4)
    optimizer.load_state_dict(optimizer.state_dict())
    schedule.step()
    assert optimizer.param_groups[1]["reverse"] == pytest.approx(formula(0.25))


# ---- saving


def test_goes_on_where_it_was_saved() -> None:
    schedule = DANNSchedule(GradientReversal(), 9, gamma=5.0, lo=0.1, hi=2.0)
    for _ in range(4):
        schedule.step()
    layer = GradientReversal()
    other = DANNSchedule(layer, 100)
    other.load_state_dict(schedule.state_dict())
    assert layer.lambda_ == schedule.lambda_
    for one in (schedule, other):
        one.step()
    assert other.lambda_ == schedule.lambda_ == pytest.approx(formula(5 / 9, 5.0, 0.1, 2.0))
    assert (
        other.state_dict()
        == schedule.state_dict()
        == {"total_steps": 9, "gamma": 5.0, "lo": 0.1, "hi": 2.0, "steps": 5}
    )


def test_a_state_dict_loads_from_a_file(tmp_path) -> None:
    schedule = DANNSchedule(GradientReversal(), 9)
    schedule.step()
    torch.save(schedule.state_dict(), tmp_path / "schedule.pt")
    assert torch.load(tmp_path / "schedule.pt", weights_only=True) == schedule.state_dict()
    assert repr(schedule) == f"DANNSchedule(1 of 9 steps, lambda_={formula(1 / 9):g})"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": 0}, "total_steps: expected 1 or more, got 0"),
        ({"hi": -1.0}, "hi: expected 0 or more"),
        ({"last_epoch": 3}, "not of DANNSchedule: expected total_steps, gamma, lo, hi, steps, got"),
    ],
)
def test_a_bad_state_dict_changes_nothing(changes: dict[str, float], message: str) -> None:
    layer = GradientReversal()
    schedule = DANNSchedule(layer, 9)
    schedule.step()
    before = schedule.state_dict()
    with pytest.raises(ValueError, match=message):
        schedule.load_state_dict(before | changes)
    assert schedule.state_dict() == before
    assert layer.lambda_ == schedule.lambda_


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_steps": 0}, ValueError, "total_steps: expected 1 or more, got 0"),
        ({"total_steps": 10.0}, TypeError, "total_steps: expected an int, got 10.0"),
        ({"total_steps": True}, TypeError, "total_steps: expected an int, got True"),
        ({"gamma": -1.0}, ValueError, "gamma: expected 0 or more and finite, got -1.0"),
        ({"gamma": math.inf}, ValueError, "gamma: expected 0 or more and finite, got inf"),
        ({"lo": math.nan}, ValueError, "lo: expected 0 or more and finite, got nan"),
        ({"hi": "1"}, TypeError, "hi: expected a number, got '1'"),
    ],
)
def test_bad_numbers_are_refused_and_nothing_moves(options, error: type[Exception], message: str) -> None:
    layer = GradientReversal(0.4)
    with pytest.raises(error, match=message):
        DANNSchedule(layer, **({"total_steps": 10} | options))
    assert layer.lambda_ == 0.4


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), ValueError, "Linear has no GradientReversal and no ReversalLinear inside"),
        (lambda: two_groups(), ValueError, "no group of the optimizer reverses; give one reverse="),
        (lambda: (two_groups(), 2), ValueError, "expected a group from 0 to 1, got 2"),
        (lambda: (two_groups(), -1), ValueError, "expected a group from 0 to 1, got -1"),
        (lambda: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), ValueError, "SGD cannot reverse; use"),
        (lambda: two_groups(reverse=1.0).param_groups[1], TypeError, "got dict; a group itself would be replaced"),
        (lambda: (two_groups(), "1"), TypeError, "got tuple"),
        (lambda: None, TypeError, "expected a module, a gradfused optimizer or"),
    ],
)
def test_targets_with_nothing_to_move_are_refused(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DANNSchedule(make(), 10)


# ---- the documentation's example


def test_the_example_runs_and_trains() -> None:
    text = (ROOT / "docs" / "reversal.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    torch.manual_seed(0)
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(5)]
    names = {
        "extractor": nn.Linear(4, 256),
        "label_head": nn.Linear(256, 3),
        "loader": batches,
        "target_loader": [x for x, _ in batches],
        "epochs": 1,
    }
    before = names["extractor"].weight.clone()
    exec(code[1], names)
    assert names["schedule"].steps == 5
    assert names["domain_head"][0].lambda_ == pytest.approx(formula(1.0))
    assert not torch.equal(before, names["extractor"].weight)


@pytest.mark.parametrize("total", [np.int64(10), np.array(10), torch.tensor(10)], ids=["numpy", "array", "tensor"])
def test_whole_numbers_of_every_kind_count_steps(total: object) -> None:
    schedule = DANNSchedule(GradientReversal(), total_steps=total)
    assert schedule.state_dict() == DANNSchedule(GradientReversal(), total_steps=10).state_dict()
    assert type(schedule.total_steps) is int
