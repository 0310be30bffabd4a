"""Sizes on and just beside every boundary at which the kernels cut their work, and gradients that are inf or nan."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import CASES, RECIPES, Case, Options, Run, assert_close, assert_same_bits

import gradfused
from gradfused.backends import availability, cpu

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not availability()["cpu"].usable, reason=str(availability()["cpu"].reason)),
]


def boundaries() -> list[int]:
    """Every length at which a row is worked on differently, less one, itself and one more."""
    if not availability()["cpu"].usable:
        return []
    native = cpu.native()
    return [n + d for n in (native.BLOCK, native.UNIT_MAX, native.CHUNK) for d in (-1, 0, 1)]


# The usual eps of 1e-8 turns a rounding error into a whole step where noise and gradient cancel: once in some 10000 elements.
ADAM = Case("Adam", {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3})

# What needs statistics of units, of tensors, or a place in the noise.
BOUNDARY_RECIPES: dict[str, Options] = {
    "plain": {},
    "unit-mean": {"centralize": True},
    "unit-mean-clip": {"centralize": True, "clip_norm": 1.0},
    "tensor-mean-skip": {"centralize": "tensor", "nonfinite": "skip"},
    "decayed": {"centralize": True, "centralize_at": "decayed"},
    "tensor-update-noise": {"centralize": "tensor", "centralize_at": "update", "noise": 0.1},
    "agc": {"centralize": True, "perturb": "agc", "radius": 0.05, "norm_scope": "unit"},
    "tensor-mean-unit-norm": {"centralize": "tensor", "perturb": "dampen", "radius": 0.5, "norm_scope": "unit"},
    "decayed-unit-norm-noise": {
        "centralize": "tensor",
        "centralize_at": "decayed",
        "perturb": "amplify",
        "norm_scope": "unit",
        "noise": 0.1,
    },
    "full": RECIPES["full"],
}
FORMS = {
    "flat": lambda n: [(n,)],
    "two-units": lambda n: [(2, n)],
    "short-units": lambda n: [(n, 3)],
    "after-another": lambda n: [(5,), (n,), (3, 2)],
}


def check(case: Case, recipe: Options, shapes: list[tuple[int, ...]], steps: int = 2, **how: Any) -> None:
    def run(backend: str, exact: bool) -> dict[str, torch.Tensor]:
        return Run(case, recipe, shapes, backend=backend, exact=exact, **how).step(steps).outcome()

    assert_close(run("cpu", False), run("reference", True), 1.3e-6, 1e-5, lambda: run("reference", False))


@pytest.mark.parametrize("recipe", BOUNDARY_RECIPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", boundaries())
def test_boundaries(size: int, form: str, recipe: str) -> None:
    check(ADAM, BOUNDARY_RECIPES[recipe], FORMS[form](size))


@pytest.mark.parametrize("recipe", ["unit-mean-clip", "decayed", "agc", "full"])
@pytest.mark.parametrize("layout", ["transposed-parameter", "view", "padded-rows"])
@pytest.mark.parametrize("size", boundaries()[3:6])
def test_boundaries_of_copied_operands(size: int, layout: str, recipe: str) -> None:
    check(CASES["sgd-momentum"], BOUNDARY_RECIPES[recipe], [(2, size)], layout=layout)


@pytest.mark.parametrize("recipe", ["unit-mean", "agc"])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("units", [1, 7, 8, 9, 1025])
def test_short_units(units: int, length: int, recipe: str) -> None:
    check(CASES["sgd-momentum"], BOUNDARY_RECIPES[recipe], [(units, length)])


@pytest.mark.parametrize("begin", [1, 2, 3])
def test_noise_of_units_that_begin_within_a_counter(begin: int) -> None:
    """Four elements share a counter; units of odd length begin anywhere in it."""
    recipe = {"centralize": True, "noise": 0.2, "perturb": "clip", "norm_scope": "unit"}
    check(CASES["sgd"], recipe, [(9, begin), (300, 4 + begin), (3, 1024 + begin)])


# ---- gradients that are not finite

PLACES = {"first": 0, "middle": 1500, "last": -1}
SHAPES = [(60, 51), (7,), (5, 612)]
TENSORS = {"first": 0, "last": -1}
SKIPPING: dict[str, Options] = {
    "alone": {},
    "clip": {"clip_norm": 1.0},
    "unit": {"perturb": "normalize", "norm_scope": "unit"},
    "centralize": {"centralize": True, "noise": 0.1},
    "full": RECIPES["full"],
}

planted_everywhere = [
    pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan]),
    pytest.mark.parametrize("place", PLACES),
    pytest.mark.parametrize("tensor", TENSORS),
]


def everywhere(test: Any) -> Any:
    for mark in planted_everywhere:
        test = mark(test)
    return test


def plant(run: Run, tensor: str, place: str, value: float) -> None:
    run.fill()
    run.grads[TENSORS[tensor]].view(-1)[PLACES[place]] = value


@everywhere
@pytest.mark.parametrize("recipe", SKIPPING)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_skip_changes_nothing(tensor: str, place: str, value: float, recipe: str, backend: str) -> None:
    run = Run(CASES["adamw"], SKIPPING[recipe] | {"nonfinite": "skip"}, SHAPES, backend=backend)
    before = run.outcome()
    plant(run, tensor, place, value)
    run.optimizer.step()
    assert run.optimizer.skipped_steps == 1
    assert_same_bits(run.outcome(), before)
    assert not any(run.optimizer.state.get(p) for p in run.params), "state was created"

    before = run.step(2).outcome()
    assert all(float(run.optimizer.state[p]["step"]) == 2 for p in run.params)
    plant(run, tensor, place, value)
    run.optimizer.step()
    assert run.optimizer.skipped_steps == 2
    assert_same_bits(run.outcome(), before)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_after_a_skip_steps_go_on_as_if_it_had_not_been(backend: str) -> None:
    recipe = RECIPES["full"] | {"nonfinite": "skip"}
    smooth, bumpy = (Run(CASES["adam"], recipe, SHAPES, backend=backend).step(2) for _ in range(2))
    plant(bumpy, "first", "last", math.nan)
    bumpy.optimizer.step()
    assert_same_bits(bumpy.step(2).outcome(), smooth.step(2).outcome())


@everywhere
@pytest.mark.parametrize("recipe", [*SKIPPING])
def test_propagate_spreads_as_in_the_reference(tensor: str, place: str, value: float, recipe: str) -> None:
    outcomes = []
    for backend in ("cpu", "reference"):
        run = Run(CASES["adamw"], SKIPPING[recipe] | {"nonfinite": "propagate"}, SHAPES, backend=backend).step()
        plant(run, tensor, place, value)
        run.optimizer.step()
        assert run.optimizer.skipped_steps == 0
        outcomes.append(run.outcome())
    for name, expected in outcomes[1].items():
        torch.testing.assert_close(outcomes[0][name], expected, rtol=1.3e-6, atol=1e-5, equal_nan=True)
    assert any(t.isnan().any() for t in outcomes[0].values())


@everywhere
@pytest.mark.parametrize("case", ["sgd", "sgd-momentum", "adam-amsgrad", "adamw"])
def test_propagate_is_torchs(tensor: str, place: str, value: float, case: str) -> None:
    """Which elements become inf or nan is torch's affair, and ours alike."""
    ours = Run(CASES[case], {"backend": "cpu"}, SHAPES).step()
    theirs = [p.detach().clone() for p in ours.params]
    optimizer = getattr(torch.optim, CASES[case].optimizer)(theirs, **CASES[case].options)
    theirs_before = [p.clone() for p in theirs]
    plant(ours, tensor, place, value)
    for p, g in zip(theirs, ours.grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    ours.optimizer.step()
    for mine, p, before in zip(ours.params, theirs, theirs_before, strict=True):
        assert torch.equal(mine.isnan(), p.isnan())
        assert torch.equal(mine.isinf(), p.isinf())
        assert not torch.equal(p, before)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("group", "skipped"), [(0, 1), (1, 0)])
def test_only_guarded_groups_skip(group: int, skipped: int, backend: str) -> None:
    """One group that asks for it stops the whole step; a group that does not ask lets the value through."""
    params = [torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2)]
    optimizer = gradfused.SGD(
        [{"params": params[:1], "nonfinite": "skip"}, {"params": params[1:]}],
        lr=0.1,
        weight_decay=0.1,
        backend=backend,
    )
    for p in params:
        p.grad = torch.ones(3, 2)
    params[group].grad[1, 1] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == skipped
    changed = [not torch.equal(p, torch.ones(3, 2)) for p in params]
    assert changed == [not skipped] * 2


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_gradients_are_finite(dtype: torch.dtype, backend: str) -> None:
    """Their squares overflow float32, and are no reason to skip."""
    p = torch.nn.Parameter(torch.ones(40, 30, dtype=dtype))
    optimizer = gradfused.SGD([p], lr=0.1, weight_decay=0.1, clip_norm=1.0, nonfinite="skip", backend=backend)
    p.grad = torch.full((40, 30), 1e20, dtype=dtype)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    torch.testing.assert_close(optimizer.grad_norm, torch.tensor(1e20 * math.sqrt(1200), dtype=torch.float64))
    expected = 1 - 0.1 * (1 / math.sqrt(1200) + 0.1)
    torch.testing.assert_close(p.detach(), torch.full_like(p, expected))
