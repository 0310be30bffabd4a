"""The Triton backend, interpreted where there is no GPU: precision and averages of weights, and SAM's ascent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import CASES, DTYPES, GRAD_DTYPE_MISSING, Run, assert_close, assert_same_bits, can_mix_dtypes, device_of
from kept_oracle import float32_average_of_float64_weights

import gradfused
from gradfused.backends.base import Scaling, Settings
from gradfused.step.groups import GroupOptions
from gradfused.step.state import States
from gradfused.step.table import Outcome, StepTable

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not triton_interpreter.RUNS, reason=triton_interpreter.REASON),
    pytest.mark.parametrize("backend", ["triton"]),
]

# Packs, one at a time, units of several tiles; a scalar and an empty one.
SHAPES = ((16, 8), (7,), (), (0, 3), (2, 264))
RIDERS: dict[str, dict[str, Any]] = {
    "kahan": {"precision": "kahan"},
    "stochastic": {"precision": "stochastic", "seed": 2**63 + 5},
    "master": {"precision": "master"},
    "ema": {"ema": 0.9},
    "zero": {"zero_grad_in_step": True},
    "kahan-late": {"precision": "kahan", "ema": 0.9, "centralize": True, "centralize_at": "update"},
    "master-agc": {"precision": "master", "ema": 0.9, "perturb": "agc", "radius": 0.05, "norm_scope": "unit"},
    "all-noisy": {"precision": "stochastic", "ema": 0.9, "zero_grad_in_step": True, "clip_norm": 1.0, "noise": 0.1},
}


def run(backend: str, case: str, rider: str, dtype: str, **how: Any) -> Run:
    return Run(CASES[case], RIDERS[rider], SHAPES, backend=backend, dtype=DTYPES[dtype], **how).step(2)


def assert_as_on_the_cpu(case: str, rider: str, dtype: str, backend: str, **how: Any) -> None:
    """The arithmetic is that of the CPU: only the last bit of float32 may differ, where a sum in float64 did."""
    ours, theirs = (run(b, case, rider, dtype, **how) for b in (backend, "cpu"))
    assert_close(ours.outcome(), theirs.outcome(), 1e-6, 1e-6)
    assert ours.guards_intact()
    zeroed = RIDERS[rider].get("zero_grad_in_step", False)
    assert all(bool((g == 0).all()) == zeroed for g in ours.grads if g.numel())


def test_an_average_that_began_in_float32_follows_weights_made_float64(backend: str) -> None:
    float32_average_of_float64_weights(backend)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rider", RIDERS)
def test_short_weights(rider: str, dtype: str, backend: str) -> None:
    assert_as_on_the_cpu("adamw", rider, dtype, backend)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rider", ["master", "kahan-late", "all-noisy"])
def test_weights_that_are_precise_already(rider: str, dtype: str, backend: str) -> None:
    assert_as_on_the_cpu("sgd-momentum", rider, dtype, backend)


@pytest.mark.parametrize("layout", ["view", "channels-last-parameter", "misaligned-gradient"])
@pytest.mark.parametrize("rider", ["kahan", "stochastic", "master-agc", "all-noisy"])
def test_layouts(rider: str, layout: str, backend: str) -> None:
    assert_as_on_the_cpu("sgd-momentum", rider, "bfloat16", backend, layout=layout)


@pytest.mark.parametrize("case", ["lamb", "lars", "adan", "nadam"])
def test_rules_on_short_weights(case: str, backend: str) -> None:
    """The norms are those of the weights with their remainder."""
    assert_as_on_the_cpu(case, "kahan", "bfloat16", backend)


def test_riders_of_their_own(backend: str) -> None:
    """Each group keeps its weights in another way, one of them plainly, in two dtypes: one kernel handles all."""

    def outcome(backend: str) -> dict[str, torch.Tensor]:
        made = Run(CASES["adamw"], {}, SHAPES, backend=backend, dtype=torch.bfloat16)
        params = [p for group in made.optimizer.param_groups for p in group["params"]]
        wide = torch.nn.Parameter(torch.linspace(-1, 1, 24, device=params[0].device).view(4, 6))
        wide.grad = torch.full_like(wide, 0.5)
        groups = [
            {"params": params[:1], "precision": "kahan"},
            {"params": params[1:2], "precision": "stochastic", "zero_grad_in_step": True},
            {"params": params[2:4], "precision": "master"},
            {"params": params[4:]},
            {"params": [wide], "precision": "master", "ema": 0.5},
        ]
        made.optimizer = gradfused.AdamW(groups, lr=0.01, backend=backend)
        return made.step(2).outcome() | {"wide": wide.detach().double().cpu()}

    assert_close(outcome(backend), outcome("cpu"), 1e-6, 1e-7)


@pytest.mark.parametrize("layout", ["contiguous", "view"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.skipif(not can_mix_dtypes(), reason=GRAD_DTYPE_MISSING)
def test_random_rounding_is_that_of_the_cpu(dtype: torch.dtype, layout: str, backend: str) -> None:
    """The results are equal to the bit on every exponent: subnormals, overflow, infinities and NaN."""
    special = [0.0, -0.0, 65504.0, 65519.0, 3.3895e38, -3.4e38, 1e-45, -1e-40, math.inf, -math.inf, math.nan]
    numbers = torch.tensor([s * (1 + m / 7) * 2.0**e for e in range(-149, 127) for m in range(4) for s in (1, -1)])
    numbers = torch.cat([numbers, torch.tensor(special).repeat(5)])

    def outcome(backend: str) -> dict[str, torch.Tensor]:
        place = torch.zeros(2 * len(numbers), dtype=dtype, device=device_of(backend))
        p = torch.nn.Parameter(place[::2] if layout == "view" else place[: len(numbers)])
        p.grad_dtype = torch.float32
        p.grad = -numbers.to(p.device)
        gradfused.SGD([p], lr=1.0, precision="stochastic", seed=11, backend=backend).step()
        return {"p": p.detach().double().cpu()}

    ours, theirs = outcome(backend), outcome("cpu")
    assert torch.equal(ours["p"].isnan(), theirs["p"].isnan())
    assert_same_bits({"p": ours["p"].nan_to_num(7.0)}, {"p": theirs["p"].nan_to_num(7.0)})


# ---- SAM


def ascent(params: list[torch.nn.Parameter], state: Any, backend: str, settings: Settings) -> StepTable:
    options = GroupOptions("ascend", ("backup",), counts=False, centre="off", backend=backend, settings=settings)
    return StepTable([{"params": params}], States(state), [options])


def copies(name: str, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name} {i}": t.detach().double().cpu().clone() for i, t in enumerate(tensors)}


def take(table: StepTable) -> None:
    assert table.step(Scaling()) is Outcome.TAKEN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_ascent_and_descent(adaptive: bool, dtype: torch.dtype, backend: str) -> None:
    """The weights go up by rho along the gradient, and down from the backup to where a single step would lead."""
    rho = (0.0, 0.05, 1e-12, 0.0, math.inf)
    settings = Settings(norm_scope="global", perturb=rho, adaptive=adaptive, eta=0.01 * adaptive)

    def outcome(backend: str) -> Iterator[dict[str, torch.Tensor]]:
        made = Run(CASES["adamw"], {"clip_norm": 1.0}, SHAPES, backend=backend, dtype=dtype).step(2)
        made.fill()
        backups: dict[torch.Tensor, dict[str, Any]] = {p: {} for p in made.params}
        take(ascent(made.params, backups, backend, settings))
        yield copies("up", made.params)
        yield copies("backup", [backups[p]["backup"] for p in made.params])
        made.optimizer._take_step(Scaling(), {p: backups[p]["backup"] for p in made.params})
        yield made.outcome()

    moved = [dict(part) for part in outcome(backend)]
    for ours, theirs in zip(moved, outcome("cpu"), strict=True):
        assert_close(ours, theirs, 1e-6, 1e-7)
    plain = Run(CASES["adamw"], {"clip_norm": 1.0}, SHAPES, backend=backend, dtype=dtype).step(2)
    assert_same_bits(moved[1], copies("backup", plain.params))
    assert_same_bits(moved[2], plain.step().outcome())
    assert not torch.equal(moved[0]["up 0"], moved[1]["backup 0"])
