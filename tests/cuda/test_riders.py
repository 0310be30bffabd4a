"""What the CUDA kernels do besides applying rules to plain weights: precision, averages, trust ratios and ascents."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    EMULATED_CUDA,
    LAYOUTS,
    RECIPES,
    SHAPES,
    Run,
    assert_close,
    assert_same_bits,
    layout_parameters,
    values,
)
from cuda_emulator import build
from torch import Tensor
from torch.nn import Parameter

from gradfused.backends import Scaling, Settings, cuda
from gradfused.step.groups import GroupOptions
from gradfused.step.state import SHORT, States
from gradfused.step.table import StepTable

pytestmark = [pytest.mark.kernels, pytest.mark.parametrize("backend", [EMULATED_CUDA])]

# Units of a warp, of a block and of several chunks; sizes beside a chunk's end; many chunks.
LARGE = ((40, 33), (3, 3000), (2, 70000), (8191,), (8193,), (70001,), (8, 3, 3, 3), ())
RIDERS: dict[str, dict[str, Any]] = {
    "kahan": {"precision": "kahan"},
    "stochastic": {"precision": "stochastic", "seed": 11},
    "master": {"precision": "master"},
    "all": {"precision": "kahan", "ema": 0.9, "zero_grad_in_step": True},
    "master-ema": {"precision": "master", "ema": 0.9, "state_dtype": "float32"},
}
short = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def outcomes(case: str, options: Mapping[str, Any], shapes: Any, steps: int = 3, **how: Any) -> list[dict[str, Tensor]]:
    """The outcomes of the CUDA kernels and of the CPU's."""
    runs = [Run(CASES[case], options, shapes, backend=b, **how).step(steps) for b in ("cuda", "cpu")]
    assert all(run.guards_intact() for run in runs)
    return [run.outcome() for run in runs]


# ---- riders: no operation differs from the CPU's, so neither may a bit


@short
@pytest.mark.parametrize("rider", RIDERS)
@pytest.mark.parametrize("case", ["sgd-nesterov", "adamw-amsgrad", "rmsprop-both", "adan", "lion"])
def test_riders_are_the_cpus(case: str, rider: str, dtype: str, backend: str) -> None:
    assert_same_bits(*outcomes(case, RIDERS[rider], LARGE, steps=2, dtype=DTYPES[dtype]))


@short
@pytest.mark.parametrize("rider", RIDERS)
@pytest.mark.parametrize(
    "layout", layout_parameters(["channels-last-parameter", "view", "misaligned", "misaligned-gradient"])
)
def test_riders_in_layouts(layout: str, rider: str, dtype: str, backend: str) -> None:
    assert_same_bits(*outcomes("adam", RIDERS[rider], SHAPES, layout=layout, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("recipe", ["full-unit", "full-update", "tensor-decayed-clip-unit"])
@pytest.mark.parametrize("rider", RIDERS)
def test_riders_with_recipes(rider: str, recipe: str, backend: str) -> None:
    cuda_, cpu = outcomes("adamw", RECIPES[recipe] | RIDERS[rider], SHAPES, dtype=torch.bfloat16)
    assert_close(cuda_, cpu, 2.0**-7, 1e-3)  # sums are taken in another order: a weight may round to the other side


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.sanitized_cuda
def test_an_average_of_wider_weights(dtype: str, backend: str) -> None:
    assert_same_bits(*outcomes("adamw", {"ema": 0.9, "zero_grad_in_step": True}, LARGE, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("shape", [(9, 130), (3, 40000)])
def test_gradients_that_share_elements_are_read_before_they_are_zeroed(shape: tuple[int, int], backend: str) -> None:
    options = {"zero_grad_in_step": True}
    runs = [Run(CASES["adam"], o, (shape,), backend=backend, layout="expanded-gradient").step(2) for o in (options, {})]
    assert bool((runs[0].grads[0] == 0).all())
    assert_same_bits(runs[0].outcome(), runs[1].outcome())


@pytest.mark.parametrize("rider", RIDERS)
@pytest.mark.parametrize("how", ["nonfinite", "found_inf"])
def test_a_refused_step_changes_nothing(how: str, rider: str, backend: str) -> None:
    options = RIDERS[rider] | {"nonfinite": "skip"}
    run = Run(CASES["lamb"], options, SHAPES, backend=backend, dtype=torch.bfloat16).step(2)
    before = run.outcome()
    run.fill()
    if how == "nonfinite":
        run.grads[-1].view(-1)[-1] = math.inf
    else:
        run.optimizer.found_inf = torch.ones(())
    run.optimizer.step()
    assert_same_bits(run.outcome(), before)


@pytest.mark.parametrize("case", ["nadam", "nadamw"])
def test_a_refused_step_leaves_the_product_of_momenta(case: str, backend: str) -> None:
    run = Run(CASES[case], {"nonfinite": "skip"}, SHAPES, backend=backend).step(2)
    before = {name: t for name, t in run.outcome().items() if name.startswith("mu_product")}
    assert before
    run.grads[0].fill_(math.nan)
    run.optimizer.step()
    after = run.outcome()
    assert_same_bits({name: after[name] for name in before}, before)


# ---- trust ratios


@pytest.mark.parametrize(
    "recipe", ["plain", "clip-param", "centralize-agc", "full-update", "full-decayed", "full-unit"]
)
@pytest.mark.parametrize("case", ["lamb", "lars", "lars-plain"])
def test_trust_ratios_of_long_rows(case: str, recipe: str, backend: str) -> None:
    """Units longer than those of a block, rows of many chunks, and rows that end next to a chunk's end."""
    ours = Run(CASES[case], RECIPES[recipe], LARGE, backend=backend).step(2).outcome()
    exact = Run(CASES[case], RECIPES[recipe], LARGE, backend="reference", exact=True).step(2).outcome()

    def yardstick() -> dict[str, Tensor]:
        return Run(CASES[case], RECIPES[recipe], LARGE, backend="reference").step(2).outcome()

    assert_close(ours, exact, 1.3e-6, 1e-5, yardstick)


@pytest.mark.parametrize("case", ["lamb", "lars"])
@pytest.mark.sanitized_cuda
def test_ratios_are_one_where_a_norm_is_zero(case: str, backend: str) -> None:
    for zero in ("weights", "gradients"):
        results = []
        for name in ("cuda", "cpu"):
            run = Run(CASES[case], {}, ((6, 5), (70,)), backend=name)
            for p, g in zip(run.params, run.grads, strict=True):
                (p.data if zero == "weights" else g).zero_()
                if zero == "weights":
                    g.fill_(0.25)
            run.optimizer.step()
            results.append(run.outcome())
        assert_close(*results, 1e-6, 1e-7)


# ---- orders and grids

ORDERED = [
    ("lamb", RECIPES["full-update"], torch.float32),
    ("lars", RECIPES["full-decayed"], torch.float32),
    ("adan", RECIPES["full"] | RIDERS["stochastic"], torch.bfloat16),
    ("nadam", RECIPES["centralize-agc"] | RIDERS["all"], torch.float16),
    ("adamw", RECIPES["tensor-update-agc"] | RIDERS["master-ema"], torch.bfloat16),
]
ordered = pytest.mark.parametrize(("case", "options", "dtype"), ORDERED, ids=[case for case, *_ in ORDERED])


@ordered
def test_no_order_of_threads_changes_a_bit(
    case: str, options: dict[str, Any], dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for order in ("forward", "reverse", "shuffle:7"):
        monkeypatch.setenv("GRADFUSED_EMULATOR_ORDER", order)
        found.append(Run(CASES[case], options, LARGE, backend=backend, dtype=dtype).step(2).outcome())
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


@ordered
def test_no_grid_changes_a_bit(
    case: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    expected = Run(CASES[case], options, LARGE, backend=backend, dtype=dtype).step(2).outcome()
    own = tmp_path / cuda.native().__file__.rpartition("/")[2]  # another file: a library of its own
    shutil.copy(cuda.native().__file__, own)
    monkeypatch.setenv("GRADFUSED_EMULATOR_PROCESSORS", "13")
    monkeypatch.setattr(cuda, "_native", build.imported(own))
    assert_same_bits(Run(CASES[case], options, LARGE, backend=backend, dtype=dtype).step(2).outcome(), expected)


# ---- ascents


class Ascent:
    """Parameters, their gradients, and the table of an ascent over them; with copies of the weights to read, if asked
    for.
    """

    def __init__(
        self, backend: str, dtype: torch.dtype, *, layout: str = "contiguous", sources: bool = False, **options: Any
    ) -> None:
        place_param, place_grad = LAYOUTS[layout]
        self.params = [Parameter(place_param(shape, dtype)) for shape in LARGE]
        for i, p in enumerate(self.params):
            p.data.copy_(values(p.shape, i, -1))
            p.grad = place_grad(p.shape, dtype)
            p.grad.copy_(values(p.shape, i, 0))
        self.state: dict[Any, dict[str, Any]] = {p: {} for p in self.params}
        self.sources = {p: p.detach().float() * 1.001 for p in self.params} if sources else None
        settings = Settings(norm_scope="global", perturb=(0.0, 0.05, 1e-12, 0.0, math.inf), decoupled=True, **options)
        group = GroupOptions("ascend", ("backup",), False, "off", backend, settings, copied=dtype in SHORT)
        self.table = StepTable([{"params": self.params}], States(self.state), [group], self.sources)  # type: ignore[arg-type]

    def climb(self, scaling: Scaling | None = None) -> dict[str, Tensor]:
        self.table.backend.stats(scaling or Scaling())
        self.table.backend.apply(scaling or Scaling())
        found = {f"parameter {i}": p.detach().double() for i, p in enumerate(self.params)}
        return found | {f"backup {i}": self.state[p]["backup"].double() for i, p in enumerate(self.params)}


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"adaptive": True, "eta": 0.01}], ids=str)
@pytest.mark.parametrize("layout", layout_parameters(["contiguous", "channels-last-gradient", "view", "misaligned"]))
@pytest.mark.parametrize("dtype", DTYPES)
def test_ascents(dtype: str, layout: str, options: dict[str, Any], backend: str) -> None:
    ours, exact = (
        Ascent(backend, DTYPES[dtype], layout=layout, **options),
        Ascent("reference", torch.float64, **options),
    )
    for p, q in zip(exact.params, ours.params, strict=True):
        p.data.copy_(q.detach())
        assert p.grad is not None
        p.grad.copy_(q.grad)
    eps = torch.finfo(DTYPES[dtype]).eps
    assert_close(ours.climb(), exact.climb(), max(eps / 2, 1e-12) * 1.01, eps * 1e-2)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ascents_from_copies_of_the_weights(dtype: str, adaptive: bool, backend: str) -> None:
    """16-bit weights have copies in float32."""
    ours, theirs = (Ascent(b, DTYPES[dtype], sources=True, adaptive=adaptive) for b in (backend, "reference"))
    eps = torch.finfo(DTYPES[dtype]).eps
    assert_close(ours.climb(), theirs.climb(), eps * 1.01, eps * 1e-2)
    for ascent in (ours, theirs):
        assert ascent.sources is not None
        for p, kept in ascent.sources.items():
            assert torch.equal(ascent.state[p]["backup"], kept.to(p.dtype))


def test_an_ascent_that_overflowed_changes_nothing(backend: str) -> None:
    ascent = Ascent(backend, torch.float32)
    before = [p.detach().clone() for p in ascent.params]
    ascent.climb(Scaling(torch.tensor(2.0), torch.tensor(1.0)))
    assert all(torch.equal(p.detach(), q) for p, q in zip(ascent.params, before, strict=True))
    assert all(not bool(ascent.state[p]["backup"].any()) for p in ascent.params)
