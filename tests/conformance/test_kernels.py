"""Every backend with kernels against the float64 oracle: all recipes, layouts, dtypes and instruction sets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    FEW_CASES,
    FEW_RECIPES,
    GRAD_DTYPE_MISSING,
    LAYOUTS,
    RECIPES,
    SHAPE_SETS,
    SHAPES,
    STEPS,
    Run,
    assert_close,
    can_mix_dtypes,
    layout_parameters,
)
from oracle_checks import BACKENDS, check

import gradfused
from gradfused.backends import availability, cpu

pytestmark = [pytest.mark.kernels, pytest.mark.combination, pytest.mark.interpret_all]

ISAS = cpu.native().isas() if availability()["cpu"].usable else []

backends = pytest.mark.parametrize("backend", BACKENDS)
all_cases = pytest.mark.parametrize("case", CASES)
minimizing_cases = pytest.mark.parametrize("case", [name for name in CASES if "maximize" not in name])
few_cases = pytest.mark.parametrize("case", FEW_CASES)
few_recipes = pytest.mark.parametrize("recipe", FEW_RECIPES)


@backends
@pytest.mark.parametrize("recipe", RECIPES)
@minimizing_cases
def test_every_recipe_of_every_optimizer(case: str, recipe: str, backend: str) -> None:
    check(case, recipe, backend)


@backends
@few_recipes
@pytest.mark.parametrize("case", [name for name in CASES if "maximize" in name])
def test_maximize(case: str, recipe: str, backend: str) -> None:
    check(case, recipe, backend)


@backends
@pytest.mark.parametrize("layout", layout_parameters(name for name in LAYOUTS if name != "contiguous"))
@few_recipes
@pytest.mark.parametrize("case", ["sgd-momentum", "adam"])
def test_layouts(case: str, recipe: str, layout: str, backend: str) -> None:
    check(case, recipe, backend, layout=layout)


@backends
@few_recipes
@few_cases
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes(case: str, recipe: str, dtype: str, backend: str) -> None:
    check(case, recipe, backend, dtype=DTYPES[dtype])


@backends
@pytest.mark.parametrize("layout", ["channels-last-parameter", "view", "transposed-gradient"])
@pytest.mark.parametrize("recipe", ["plain", "full", "centralize-agc"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.sanitized_cuda
def test_dtypes_in_layouts(recipe: str, layout: str, dtype: str, backend: str) -> None:
    check("adam", recipe, backend, dtype=DTYPES[dtype], layout=layout)


# Every other rule in every dtype, each in one of a few layouts. Noise is left out, as kernels draw it in float32 in every dtype.
OTHERS = [
    (case, dtype, ("contiguous", "channels-last-parameter", "view")[(i + k) % 3])
    for i, case in enumerate(name for name in CASES if not name.startswith(("sgd", "adam")))
    for k, dtype in enumerate(("float64", "float16", "bfloat16"))
]


@backends
@pytest.mark.parametrize("recipe", ["centralize-clip", "tensor-decayed-clip-unit"])
@pytest.mark.parametrize(("case", "dtype", "layout"), OTHERS)
def test_other_rules_in_dtypes_and_layouts(case: str, dtype: str, layout: str, recipe: str, backend: str) -> None:
    check(case, recipe, backend, dtype=DTYPES[dtype], layout=layout)


@backends
@few_recipes
@pytest.mark.parametrize("case", ["sgd-nesterov", "adamw"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.skipif(not can_mix_dtypes(), reason=GRAD_DTYPE_MISSING)
def test_float32_gradients_of_other_parameters(case: str, recipe: str, dtype: str, backend: str) -> None:
    check(case, recipe, backend, dtype=DTYPES[dtype], grad_dtype=torch.float32)


@backends
@pytest.mark.parametrize("recipe", ["plain", "centralize-clip", "centralize-agc", "full", "full-update"])
@few_cases
@pytest.mark.parametrize("shapes", SHAPE_SETS)
def test_numbers_of_tensors_and_empty_ones(case: str, recipe: str, shapes: str, backend: str) -> None:
    check(case, recipe, backend, shapes=SHAPE_SETS[shapes])


@pytest.mark.parametrize("isa", ISAS)
@few_recipes
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets(dtype: str, recipe: str, isa: str) -> None:
    cpu.native().use_isa(isa)
    check("adamw-amsgrad", recipe, "cpu", dtype=DTYPES[dtype])
    check("sgd-nesterov", recipe, "cpu", dtype=DTYPES[dtype])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.skipif(not can_mix_dtypes(), reason=GRAD_DTYPE_MISSING)
def test_low_precision_rounds_as_torch(dtype: torch.dtype, isa: str) -> None:
    """To nearest, ties to even: on every value, halfway to the next, and just beside; subnormals and overflow included."""
    cpu.native().use_isa(isa)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    exact = patterns[patterns.isfinite()].sort().values
    halfway = (exact[1:].double() + exact[:-1].double()).div(2).float()
    beside = [torch.nextafter(halfway, torch.tensor(side)) for side in (-math.inf, math.inf)]
    wide = torch.cat([exact, halfway, *beside, torch.tensor([65519.0, 65520.0, 3.39e38, math.inf, -math.inf])])
    p = torch.nn.Parameter(torch.zeros(len(wide), dtype=dtype))
    p.grad_dtype = torch.float32
    p.grad = -wide
    gradfused.SGD([p], lr=1.0, backend="cpu").step()
    assert torch.equal(p.detach(), wide.to(dtype))


@backends
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_state_of_low_precision_parameters(dtype: str, backend: str) -> None:
    """State that a user keeps wider than its parameter stays wide, and what is in it is used."""

    def outcome(backend: str, exact: bool) -> Run:
        run = Run(CASES["adamw"], RECIPES["full"], SHAPES, backend=backend, dtype=DTYPES[dtype], exact=exact).step()
        for state in run.optimizer.state.values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.full_like(state[key], 0.25, dtype=torch.float64 if exact else torch.float32)
        return run.step(STEPS - 1)

    run = outcome(backend, exact=False)
    wide = {key for state in run.optimizer.state.values() for key, t in state.items() if t.dtype == torch.float32}
    assert wide == {"step", "exp_avg", "exp_avg_sq"}
    expected = outcome("reference", exact=True).outcome()
    assert_close(run.outcome(), expected, 0.0, 1e-7, lambda: outcome("reference", exact=False).outcome())


@backends
@all_cases
def test_groups_with_recipes_of_their_own(case: str, backend: str) -> None:
    """Two groups share the global norm, the third is outside it; every group centralises elsewhere."""
    groups: list[dict[str, Any]] = [
        {"centralize": True, "clip_norm": 1.0, "noise": 0.01},
        {"centralize": "tensor", "centralize_at": "update", "perturb": "amplify", "norm_scope": "global"},
        {"centralize": True, "centralize_at": "decayed", "perturb": "dampen", "radius": 0.2, "norm_scope": "unit"},
        {"reverse": 0.3, "weight_decay": 0.3},
    ]

    def outcome(backend: str, exact: bool) -> dict[str, torch.Tensor]:
        run = Run(CASES[case], {}, SHAPES, backend=backend, exact=exact)
        last = [run.optimizer.param_groups[-1]["params"].pop() for _ in range(3)]
        run.optimizer.add_param_group({"params": last[:2]})
        run.optimizer.add_param_group({"params": last[2:]})
        for group, recipe in zip(run.optimizer.param_groups, groups, strict=True):
            group.update(recipe)
        return run.step(STEPS).outcome()

    assert_close(outcome(backend, False), outcome("reference", True), 1.3e-6, 1e-5, lambda: outcome("reference", False))


@backends
@pytest.mark.parametrize("recipe", ["plain", "centralize-clip", "centralize-agc", "full"])
def test_options_that_change_between_steps(recipe: str, backend: str) -> None:
    """Numbers and whole recipes move between steps, as schedulers move them."""

    def outcome(backend: str, exact: bool) -> dict[str, torch.Tensor]:
        run = Run(CASES["adam"], {}, SHAPES, backend=backend, exact=exact).step(2)
        for group in run.optimizer.param_groups:
            group.update(RECIPES[recipe])
        run.step(2)
        for group in run.optimizer.param_groups:
            group.update(lr=group["lr"] / 3, weight_decay=0.3, betas=(0.5, 0.9))
        return run.step(2).outcome()

    assert_close(outcome(backend, False), outcome("reference", True), 1.3e-6, 1e-5, lambda: outcome("reference", False))


@backends
@few_recipes
def test_norms_are_the_reference_ones(recipe: str, backend: str) -> None:
    runs = [Run(CASES["adamw"], RECIPES[recipe], SHAPES, backend=b).step(3) for b in (backend, "reference")]
    ours, theirs = (run.optimizer.grad_norms() for run in runs)
    assert ours.keys() == theirs.keys()
    for name, norm in ours.items():
        torch.testing.assert_close(norm.cpu(), theirs[name], rtol=1e-6, atol=1e-9)
    total, expected = (run.optimizer.grad_norm for run in runs)
    assert (total is None) == (expected is None) == (not ours)
    if total is not None:
        torch.testing.assert_close(total.cpu(), expected, rtol=1e-6, atol=1e-9)


@backends
@pytest.mark.parametrize("recipe", ["plain", "centralize-clip", "full", "centralize-agc"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grad_scale_is_divided_out(recipe: str, dtype: str, backend: str) -> None:
    """GradScaler's protocol: a power of two scales without rounding, so nothing may differ."""
    runs = [Run(CASES["adam"], RECIPES[recipe], SHAPES, backend=backend, dtype=DTYPES[dtype]) for _ in range(2)]
    runs[1].optimizer.grad_scale = torch.tensor(256.0)
    for _ in range(3):
        for run, scale in zip(runs, (1.0, 256.0), strict=True):
            run.fill()
            torch._foreach_mul_(run.grads, scale)
            run.optimizer.step()
            run.taken += 1
    for name, expected in runs[0].outcome().items():
        torch.testing.assert_close(runs[1].outcome()[name], expected, rtol=0, atol=0)
