"""The backends that can be checked here, and the check of a combination of options against the float64 oracle."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import CASES, RECIPES, SHAPES, STEPS, Run, assert_close, oracle
from cuda_emulator import build

from gradfused.backends import availability, reference

# A new backend is added here. The kernels of CUDA and Triton need no GPU: see conftest.py.
RUNS = {
    "cpu": availability()["cpu"].usable,
    "cuda": availability()["cuda"].usable or build.compiler() is not None,
    "triton": triton_interpreter.RUNS,
}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not runs, reason=str(availability()[name].reason)))
    for name, runs in RUNS.items()
]

FEW_STEPS = 3
NOISE_ERROR = 2e-6  # only the oracle draws noise in float64


def tolerance(dtype: torch.dtype, recipe: str) -> tuple[float, float]:
    """(rtol, atol) within which a result needs no further comparison."""
    if dtype == torch.float32:
        return 1.3e-6, 1e-5
    if dtype == torch.float64:
        noise = RECIPES[recipe].get("noise", 0.0)
        return 1e-11, 1e-11 + NOISE_ERROR * math.sqrt(noise)
    return 0.0, 1e-7


def check(case: str, recipe: str, backend: str, shapes: Any = SHAPES, **how: Any) -> None:
    """Run one combination and compare it with the oracle. The reference in the same dtype shows how large errors may be."""
    # An interpreted step takes a tenth of a second or more.
    steps = FEW_STEPS if backend == "triton" and triton_interpreter.INTERPRETED else STEPS
    run = Run(CASES[case], RECIPES[recipe], shapes, backend=backend, **how).step(steps)
    yardstick = partial(_reference_outcome, case, recipe, shapes, steps, dict(how))
    rtol, atol = tolerance(run.dtype, recipe)
    how["layout"] = (
        "expanded-gradient" if run.repeats else "contiguous"
    )  # the only layout that changes the oracle's outcome
    assert_close(run.outcome(), oracle(case, recipe, shapes, steps=steps, **how), rtol, atol, yardstick)
    assert run.guards_intact()


def _reference_outcome(case: str, recipe: str, shapes: Any, steps: int, how: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The reference's outcome in the same dtype, with as much error in the noise as is allowed.

    The noise may nearly cancel a gradient by which the rule divides, so that a small error in it grows.
    """
    exact = reference.normal_noise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "normal_noise", lambda *args: exact(*args) * (1.0 + NOISE_ERROR))
        return Run(CASES[case], RECIPES[recipe], shapes, backend="reference", **how).step(steps).outcome()
