"""Sizes at and next to every boundary at which the kernels cut their work, and gradients that are inf or nan."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import CASES, DTYPES, RECIPES, Case, Options, Run, assert_close, assert_same_bits, device_of

import gradfused
from gradfused.backends import availability, cpu, cuda

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.interpret_all,
    pytest.mark.skipif(not availability()["cpu"].usable, reason=str(availability()["cpu"].reason)),
]


needs_triton = pytest.mark.skipif(not triton_interpreter.RUNS, reason=triton_interpreter.REASON)


def lengths(*cuts: int) -> list[int]:
    """The lengths at which a row is worked on differently, each with its neighbours."""
    return [n + d for n in cuts for d in (-1, 0, 1)]


CPU_CUTS = (cpu.native().BLOCK, cpu.native().UNIT_MAX, cpu.native().CHUNK) if availability()["cpu"].usable else ()
CUDA_CUTS = (1024, 8192, 65536)  # a unit of a warp, a chunk, a unit of a block
TRITON_CUTS = (16, 128, 1024, 8192, 65536)  # the units of each tile, a chunk, a unit of a block
LENGTHS = [("cpu", n) for n in lengths(*CPU_CUTS)] + [("cuda", n) for n in lengths(*CUDA_CUTS)]
TRITON_LENGTHS = [pytest.param("triton", n, marks=needs_triton) for n in lengths(*TRITON_CUTS)]


@pytest.mark.parametrize("backend", ["cuda"])
def test_the_cuts_are_the_kernels(backend: str) -> None:
    native = cuda.native()
    assert (native.WARP_UNIT, native.CHUNK, native.BLOCK_UNIT) == CUDA_CUTS


# Where noise and gradient cancel, about once in 10000 elements, the usual eps of 1e-8 turns a rounding error into a whole step.
ADAM = Case("Adam", {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3})

# Recipes that need statistics of units or of tensors, or the number of an element in the noise.
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


def run_of(
    case: Case, recipe: Options, shapes: list[tuple[int, ...]], backend: str, steps: int = 2, **how: Any
) -> dict[str, torch.Tensor]:
    return Run(case, recipe, shapes, backend=backend, **how).step(steps).outcome()


def check(
    case: Case, recipe: Options, shapes: list[tuple[int, ...]], steps: int = 2, backend: str = "cpu", **how: Any
) -> None:
    run = partial(run_of, case, recipe, shapes, steps=steps, **how)
    assert_close(run(backend), run("reference", exact=True), 1.3e-6, 1e-5, lambda: run("reference"))


@pytest.mark.parametrize("recipe", BOUNDARY_RECIPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("backend", "size"), LENGTHS + TRITON_LENGTHS)
def test_boundaries(backend: str, size: int, form: str, recipe: str) -> None:
    check(ADAM, BOUNDARY_RECIPES[recipe], FORMS[form](size), backend=backend)


@pytest.mark.parametrize("recipe", ["unit-mean-clip", "decayed", "agc", "full"])
@pytest.mark.parametrize("layout", ["transposed-parameter", "view", "padded-rows"])
@pytest.mark.parametrize(("backend", "size"), LENGTHS[3:6] + LENGTHS[-9:-6] + LENGTHS[-3:])
def test_boundaries_of_copied_operands(backend: str, size: int, layout: str, recipe: str) -> None:
    check(CASES["sgd-momentum"], BOUNDARY_RECIPES[recipe], [(2, size)], layout=layout, backend=backend)


@pytest.mark.parametrize("backend", ["cuda"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("recipe", ["unit-mean-clip", "decayed", "agc", "full"])
@pytest.mark.parametrize("size", [504, 512, 520, 1016, 1024, 1032, 4096, 4104, 8200])
def test_boundaries_of_packed_dtypes(size: int, recipe: str, dtype: str, backend: str) -> None:
    """The dtype decides how much of a unit fits a tile and how many threads share it."""
    yardstick = partial(run_of, CASES["sgd-momentum"], BOUNDARY_RECIPES[recipe], [(3, size)], dtype=DTYPES[dtype])
    rtol, atol = (1e-11, 1e-6) if dtype == "float64" else (0.0, 1e-7)
    assert_close(yardstick(backend), yardstick("reference", exact=True), rtol, atol, lambda: yardstick("reference"))


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("recipe", ["unit-mean", "agc"])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 15, 16, 17, 63, 64, 65])
@pytest.mark.parametrize("units", [1, 7, 8, 9, 1025])
def test_short_units(units: int, length: int, recipe: str, backend: str) -> None:
    check(CASES["sgd-momentum"], BOUNDARY_RECIPES[recipe], [(units, length)], backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "cuda", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("begin", [1, 2, 3])
def test_noise_of_units_that_begin_within_a_counter(begin: int, backend: str) -> None:
    """Four elements share a counter of the noise, and units of odd length begin anywhere in it."""
    recipe = {"centralize": True, "noise": 0.2, "perturb": "clip", "norm_scope": "unit"}
    check(CASES["sgd"], recipe, [(9, begin), (300, 4 + begin), (3, 1024 + begin)], backend=backend)


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
@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
def test_skip_changes_nothing(tensor: str, place: str, value: float, recipe: str, backend: str) -> None:
    run = Run(CASES["adamw"], SKIPPING[recipe] | {"nonfinite": "skip"}, SHAPES, backend=backend)
    before = run.outcome()
    plant(run, tensor, place, value)
    run.optimizer.step()
    assert run.optimizer.skipped_steps == 1
    after = run.outcome()
    assert_same_bits({name: after[name] for name in before}, before)
    created = [t for p in run.params for t in run.optimizer.state.get(p, {}).values()]
    assert not any(t.any() for t in created)
    assert not created or backend == "cuda", "state was created"  # the host does not know it there

    before = run.step(2).outcome()
    assert all(float(run.optimizer.state[p]["step"]) == 2 for p in run.params)
    plant(run, tensor, place, value)
    run.optimizer.step()
    assert run.optimizer.skipped_steps == 2
    assert_same_bits(run.outcome(), before)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
def test_after_a_skip_steps_go_on_as_if_it_had_not_been(backend: str) -> None:
    recipe = RECIPES["full"] | {"nonfinite": "skip"}
    smooth, bumpy = (Run(CASES["adam"], recipe, SHAPES, backend=backend).step(2) for _ in range(2))
    plant(bumpy, "first", "last", math.nan)
    bumpy.optimizer.step()
    assert_same_bits(bumpy.step(2).outcome(), smooth.step(2).outcome())


@everywhere
@pytest.mark.parametrize("recipe", [*SKIPPING])
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_propagate_spreads_as_in_the_reference(
    tensor: str, place: str, value: float, recipe: str, backend: str
) -> None:
    outcomes = []
    for b in (backend, "reference"):
        run = Run(CASES["adamw"], SKIPPING[recipe] | {"nonfinite": "propagate"}, SHAPES, backend=b).step()
        plant(run, tensor, place, value)
        run.optimizer.step()
        assert run.optimizer.skipped_steps == 0
        outcomes.append(run.outcome())
    for name, expected in outcomes[1].items():
        torch.testing.assert_close(outcomes[0][name], expected, rtol=1.3e-6, atol=1e-5, equal_nan=True)
    assert any(t.isnan().any() for t in outcomes[0].values())


@everywhere
@pytest.mark.parametrize("case", ["sgd", "sgd-momentum", "adam-amsgrad", "adamw"])
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_propagate_is_torchs(tensor: str, place: str, value: float, case: str, backend: str) -> None:
    """The elements that become inf or nan are the same as in torch."""
    ours = Run(CASES[case], {}, SHAPES, backend=backend).step()
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


@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
@pytest.mark.parametrize(("group", "skipped"), [(0, 1), (1, 0)])
def test_only_guarded_groups_skip(group: int, skipped: int, backend: str) -> None:
    """One group that asks for it stops the whole step. If no group asks for it, the values pass through."""
    device = device_of(backend)
    params = [torch.nn.Parameter(torch.ones(3, 2, device=device)) for _ in range(2)]
    optimizer = gradfused.SGD(
        [{"params": params[:1], "nonfinite": "skip"}, {"params": params[1:]}],
        lr=0.1,
        weight_decay=0.1,
        backend=backend,
    )
    for p in params:
        p.grad = torch.ones(3, 2, device=device)
    params[group].grad[1, 1] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == skipped
    changed = [not torch.equal(p.cpu(), torch.ones(3, 2)) for p in params]
    assert changed == [not skipped] * 2


@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_gradients_are_finite(dtype: torch.dtype, backend: str) -> None:
    """Their squares overflow float32, which is no reason to skip the step."""
    device = device_of(backend)
    p = torch.nn.Parameter(torch.ones(40, 30, dtype=dtype, device=device))
    optimizer = gradfused.SGD([p], lr=0.1, weight_decay=0.1, clip_norm=1.0, nonfinite="skip", backend=backend)
    p.grad = torch.full((40, 30), 1e20, dtype=dtype, device=device)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    torch.testing.assert_close(optimizer.grad_norm.cpu(), torch.tensor(1e20 * math.sqrt(1200), dtype=torch.float64))
    expected = 1 - 0.1 * (1 / math.sqrt(1200) + 0.1)
    torch.testing.assert_close(p.detach(), torch.full_like(p, expected))
