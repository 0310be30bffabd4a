"""Counts of steps where float32 ends, at 2**24, and where the counter of random numbers wraps, at 2**32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton_interpreter
from torch import Tensor, nn

import gradfused
from gradfused.step import state, table

BACKENDS = [
    "cpu",
    "reference",
    "cuda",
    pytest.param("triton", marks=pytest.mark.skipif(not triton_interpreter.RUNS, reason=triton_interpreter.REASON)),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
STOP = 2**24
DRAWS: dict[str, dict[str, Any]] = {
    "noise": {"noise": 1.0, "noise_decay": 0.0},
    "stochastic": {"precision": "stochastic"},
}


def optimizer(backend: str, count: float, dtype: torch.dtype = torch.float64, **recipe: Any) -> gradfused.AdamW:
    """An optimizer whose only parameter has taken ``count`` steps."""
    p = nn.Parameter(torch.ones(16, dtype=torch.bfloat16 if "precision" in recipe else torch.float32))
    opt = gradfused.AdamW([p], lr=1e-3, weight_decay=0.0, backend=backend, **recipe)
    saved = opt.state_dict()
    moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
    saved["state"] = {0: moments | {"step": torch.tensor(float(count), dtype=dtype)}}
    opt.load_state_dict(saved)
    return opt


def step(opt: torch.optim.Optimizer) -> tuple[int, Tensor]:
    """Take a step from fixed weights and moments. Returns the count after it and the weights."""
    (p,) = opt.param_groups[0]["params"]
    with torch.no_grad():
        p.fill_(1.0)
        for key in ("exp_avg", "exp_avg_sq"):
            opt.state[p][key].zero_()
    p.grad = torch.full_like(p, 0.5)
    opt.step()
    return int(opt.state[p]["step"]), p.detach().clone()


@contextmanager
def stopping_at(stop: int) -> Iterator[None]:
    """Make counts need float64 from ``stop`` on, so that tables serve for that many steps at most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "WIDE_COUNT", stop)
        patch.setattr(table, "WIDE_COUNT", stop)
        yield


@every_backend
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_and_draws_go_on(draw: str, dtype: torch.dtype, backend: str) -> None:
    """A run that is saved on the way goes on like one that is not."""
    opt = optimizer(backend, STOP - 2, dtype, **DRAWS[draw])
    ways = []
    for count in range(STOP - 1, STOP + 4):
        reached, way = step(opt)
        assert reached == count
        ways.append(way)
        resumed = optimizer(backend, 0, **DRAWS[draw])
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        ahead = copy.deepcopy(opt)
        (there, here), (reached, way) = step(ahead), step(resumed)
        assert there == reached == count + 1
        assert torch.equal(here, way)
    assert all(not torch.equal(a, b) for i, a in enumerate(ways) for b in ways[:i])


@every_backend
def test_a_table_notices_that_its_counts_grew(backend: str) -> None:
    """The count is read when a table is made, and the table serves for as many steps as the count may still grow."""
    with stopping_at(4):
        opt = optimizer(backend, 3, torch.float32)
        (p,) = opt.param_groups[0]["params"]
        dtypes = []
        for count in range(4, 12):
            assert step(opt)[0] == count
            dtypes.append(opt.state[p]["step"].dtype)
    assert dtypes[0] == torch.float32
    assert dtypes[-1] == torch.float64
    assert dtypes == sorted(dtypes, key=str)


@every_backend
def test_small_counts_stay_as_torch_has_them(backend: str) -> None:
    opt = optimizer(backend, 5, torch.float32)
    assert step(opt)[0] == 6
    (p,) = opt.param_groups[0]["params"]
    assert opt.state[p]["step"].dtype == torch.float32


@every_backend
@pytest.mark.parametrize("draw", DRAWS)
def test_draws_wrap_after_two_to_the_32_steps(draw: str, backend: str) -> None:
    """The counter has one 32-bit word for the step: step 2**32 draws the numbers of step 0, while counts go on."""
    late, early = optimizer(backend, 2**32 - 1, **DRAWS[draw]), optimizer(backend, 2**32 - 1, **DRAWS[draw])
    assert step(late)[0] == 2**32
    wrapped = step(late)
    assert wrapped[0] == 2**32 + 1
    moved = optimizer(backend, 2**33, **DRAWS[draw])
    assert torch.equal(step(moved)[1], wrapped[1])
    assert not torch.equal(step(early)[1], wrapped[1])


@pytest.mark.parametrize("form", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_torch_goes_on_from_a_large_count(form: dict[str, bool]) -> None:
    """torch's fused implementation counts in float32, where the count stops growing."""
    opt = optimizer("cpu", STOP + 2)
    step(opt)
    twin = torch.optim.AdamW([nn.Parameter(torch.ones(16))], lr=1e-3, weight_decay=0.0, **form)
    saved = copy.deepcopy(opt.state_dict())
    saved["param_groups"][0] |= form
    twin.load_state_dict(saved)
    count, weights = step(twin)
    assert count == STOP + 4
    torch.testing.assert_close(weights, step(opt)[1])


@pytest.mark.parametrize("form", [{"foreach": False}, {"fused": True}])
def test_a_count_of_torch_that_stopped_goes_on(form: dict[str, bool]) -> None:
    twin = torch.optim.AdamW([nn.Parameter(torch.ones(16))], lr=1e-3, weight_decay=0.0, **form)
    saved = optimizer("cpu", STOP - 1, torch.float32).state_dict()
    saved["param_groups"][0] |= form
    twin.load_state_dict(copy.deepcopy(saved))
    assert [step(twin)[0] for _ in range(2)] == [STOP, STOP]
    opt = optimizer("cpu", 0)
    opt.load_state_dict(twin.state_dict())
    assert [step(opt)[0] for _ in range(2)] == [STOP + 1, STOP + 2]


def test_a_number_is_a_count() -> None:
    """Old checkpoints hold counts as plain numbers."""
    opt = optimizer("cpu", 0)
    (p,) = opt.param_groups[0]["params"]
    opt.state[p]["step"] = STOP + 1
    assert step(opt)[0] == STOP + 2
