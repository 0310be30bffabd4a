"""A step and a loss give the same bits whatever default device and dtype the program has set in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import CASES, CUDA, FEW_RECIPES, RECIPES, SHAPES, Run, assert_same_bits, device_of
from lpg_cases import batch
from torch import Tensor

import gradfused
from gradfused.nn import PGD, LPGCrossEntropyLoss, ReversalLinear, grad_reverse, lpg_cross_entropy

interpreted = pytest.mark.skipif(not triton_interpreter.RUNS, reason=triton_interpreter.REASON)
TRITON = pytest.param("triton", marks=interpreted)
CPU = pytest.param("cpu", marks=pytest.mark.kernels)
backends = pytest.mark.parametrize("backend", [CPU, "reference", CUDA, TRITON])


@contextmanager
def active_device(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def set_device(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


#: Meta tensors have no memory: a kernel that is given one by mistake reads address 0.
DEFAULTS = {"active": (active_device, torch.float16), "set": (set_device, torch.float64)}
defaults = pytest.mark.parametrize("default", DEFAULTS)


def within(default: str | None, work: Callable[[], Any]) -> Any:
    """The result of ``work`` under a default device or dtype, or under none."""
    if default is None:
        return work()
    make, dtype = DEFAULTS[default]
    with make(dtype):
        return work()


# ---- the optimizers


def multiply_in_float64(run: Run) -> None:
    """Give a run of NAdam a product of momenta in float64, as torch makes it under that default, since it rounds
    differently.
    """
    if not run.optimizer._rule.keeps_product:  # type: ignore[attr-defined]
        return
    for p in run.params:
        device = p.device if run.optimizer.param_groups[0]["backend"] in ("cuda", "triton") else "cpu"
        run.optimizer.state[p] = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")} | {
            "step": torch.zeros((), dtype=torch.float64, device=device),
            "mu_product": torch.ones((), dtype=torch.float64, device=device),
        }


def taken(run: Run, default: str | None) -> dict[str, Tensor]:
    """What two steps leave behind, and the norms that they reported."""
    for _ in range(2):
        run.fill()
        within(default, run.optimizer.step)
        run.taken += 1
    norms = within(default, run.optimizer.grad_norms)  # type: ignore[attr-defined]
    return run.outcome() | {f"norm of {name}": norm.double() for name, norm in norms.items()}


@cache
def usual(case: str, recipe: str, backend: str, float64: bool) -> dict[str, Tensor]:
    """The outcome without any default. If ``float64``, the state of one element has that dtype, as under that default."""
    run = Run(CASES[case], RECIPES[recipe], SHAPES, backend=backend)
    if float64:
        multiply_in_float64(run)
    return taken(run, None)


@pytest.mark.parametrize("case", CASES)
@defaults
@pytest.mark.parametrize("backend", [CPU, "reference", CUDA])
def test_every_optimizer_and_recipe(backend: str, default: str, case: str) -> None:
    # Where a step is slow, half of the recipes are tried under each default.
    recipes = FEW_RECIPES if backend == "cpu" else FEW_RECIPES[default == "set" :: 2]
    for recipe in recipes:
        run = Run(CASES[case], RECIPES[recipe], SHAPES, backend=backend)
        expected = usual(case, recipe, backend, default == "set")
        assert_same_bits(taken(run, default), expected)
        steps = [state["step"].dtype for state in run.optimizer.state.values() if "step" in state]
        assert set(steps) <= {torch.float64 if default == "set" else torch.float32}


@interpreted
@pytest.mark.parametrize("recipe", FEW_RECIPES)
@defaults
@pytest.mark.parametrize("backend", ["triton"])
def test_every_recipe_in_triton(backend: str, default: str, recipe: str) -> None:
    shapes = ((3, 5), (4,))
    outcomes = [taken(Run(CASES["adam"], RECIPES[recipe], shapes, backend=backend), which) for which in (default, None)]
    assert_same_bits(*outcomes)


RIDERS = [{"precision": kind, "ema": 0.9, "zero_grad_in_step": True} for kind in ("master", "kahan", "stochastic")]


@pytest.mark.parametrize("riders", RIDERS, ids=lambda r: r["precision"])
@defaults
@backends
def test_riders_and_the_swap_of_the_average(backend: str, default: str, riders: Mapping[str, Any]) -> None:
    outcomes = []
    for which in (default, None):
        run = Run(CASES["adamw"], riders, ((3, 5), (4,)), backend=backend, dtype=torch.bfloat16)
        taken(run, which)
        saved = within(which, run.optimizer.state_dict)
        within(which, lambda run=run, saved=saved: run.optimizer.load_state_dict(saved))
        outcome = taken(run, which)

        def averages(run: Run = run) -> list[Tensor]:
            with run.optimizer.swap_ema():  # type: ignore[attr-defined]
                return [p.detach().clone() for p in run.params]

        outcomes.append(outcome | {f"average {i}": t.double() for i, t in enumerate(within(which, averages))})
    assert_same_bits(*outcomes)


@pytest.mark.parametrize("adaptive", [False, True])
@defaults
@backends
def test_sam(backend: str, default: str, adaptive: bool) -> None:
    outcomes = []
    for which in (default, None):
        run = Run(CASES["sgd-momentum"], RECIPES["centralize-clip"], ((3, 5), (4,)), backend=backend)
        sam = within(which, lambda run=run: gradfused.SAM(run.optimizer, 0.1, adaptive=adaptive))  # type: ignore[arg-type]
        for half in (sam.first_step, sam.second_step) * (1 if backend == "triton" else 2):
            run.fill()
            within(which, half)
            run.taken += 1
        outcomes.append(run.outcome())
    assert_same_bits(*outcomes)


@defaults
@backends
def test_a_step_without_gradients(backend: str, default: str) -> None:
    run = Run(CASES["adam"], RECIPES["full"], ((3, 5),), backend=backend)
    run.optimizer.zero_grad()
    before = run.outcome()
    within(default, run.optimizer.step)
    assert_same_bits(run.outcome(), before)


# ---- LPG and reversal

MODES: dict[str, dict[str, Any]] = {
    "balanced": {},
    "balanced-by-batch": {"momentum": 0.0},
    "balanced-samples": {"scope": "sample", "radius": [0.1] * 9},
    "noisy": {"mode": "noisy", "label_smoothing": 0.1},
    "longtail": {"mode": "longtail", "counts": [5, 3, 3, 9, 1, 100, 5, 7, 4]},
    "sign": {"sign": [1, -1, 0] * 3, "weight": torch.linspace(0.5, 2, 9)},
    "solver": {"solver": PGD(3, 0.04), "reduction": "sum"},
}


def rows(backend: str) -> int:
    """The number of samples in a batch: few where the interpreter is slow."""
    return 6 if backend == "triton" and triton_interpreter.INTERPRETED else 40


def gradient(loss_of: Callable[[Tensor], Tensor], logits: Tensor, default: str | None) -> dict[str, Tensor]:
    u = logits.detach().clone().requires_grad_()
    within(default, lambda: loss_of(u).backward())
    assert u.grad is not None
    return {"gradient": u.grad.double()}


@pytest.mark.parametrize("mode", MODES)
@defaults
@pytest.mark.parametrize("backend", [CPU, "reference", TRITON])
def test_lpg_as_a_module(backend: str, default: str, mode: str) -> None:
    if backend == "triton" and mode not in ("balanced", "balanced-samples", "sign"):
        pytest.skip("reaches nothing more in these kernels")
    outcomes = []
    for which in (default, None):
        device = device_of(backend)
        loss_of = LPGCrossEntropyLoss(9, **({"radius": 0.1} | MODES[mode]), backend=backend).to(device)
        outcome = {}
        for seed in range(2):
            logits, target = (t.to(device) for t in batch(rows(backend), 9, seed=seed, ignored=2))
            found = gradient(lambda u, target=target, of=loss_of: of(u, target), logits, which)
            outcome |= {f"{name} {seed}": t for name, t in found.items()}
        signs = within(which, loss_of.signs).double()
        outcomes.append(outcome | {name: t.double() for name, t in loss_of.named_buffers()} | {"signs": signs})
    assert_same_bits(*outcomes)


@pytest.mark.parametrize("scope", ["class", "sample"])
@defaults
@pytest.mark.parametrize("backend", [CPU, "reference", TRITON])
def test_lpg_as_a_function(backend: str, default: str, scope: str) -> None:
    logits, target = (t.to(device_of(backend)) for t in batch(rows(backend), 9))

    def loss(u: Tensor) -> Tensor:
        return lpg_cross_entropy(u, target, [1, -1, 0] * 3, [0.1] * 9, scope=scope, backend=backend)  # type: ignore[arg-type]

    assert_same_bits(*(gradient(loss, logits, which) for which in (default, None)))


def test_counts_and_signs_in_lists_are_those_without_a_default() -> None:
    """All of them are exact in float32 and known to the CPU, where bad values are refused."""
    options = {"mode": "longtail", "counts": [*range(3000)]}
    expected = LPGCrossEntropyLoss(3000, 0.1, momentum=0.0, **options).signs()
    for default in DEFAULTS:
        made = within(default, lambda: LPGCrossEntropyLoss(3000, 0.1, momentum=0.0, **options))
        assert torch.equal(made.signs(), expected)
        assert made.confidence.is_meta  # modules are made where the program wants them, as torch's are
        with pytest.raises(ValueError, match=r"got 2\.0 for class 1"):
            within(default, lambda: lpg_cross_entropy(*batch(4, 3), [1, 2, 0], 0.1))


@defaults
def test_reversal(default: str) -> None:
    layer = ReversalLinear(5, 4, lambda_=0.7)
    x = torch.linspace(-1, 1, 30).view(6, 5)
    for loss_of in (lambda u: layer(u).square().sum(), lambda u: grad_reverse(u, 0.3).square().sum()):
        assert_same_bits(*(gradient(loss_of, x, which) for which in (default, None)))
