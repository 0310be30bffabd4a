"""What a step does in the same pass: 16-bit weights kept precisely, state in another dtype, an average of the weights,
zeroed gradients.
"""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from cases import CASES, CUDA, DTYPES, FEW_CASES, RECIPES, SHAPES, Run, assert_close, device_of, values
from kept_oracle import float32_average_of_float64_weights
from torch import Tensor
from torch.nn import Parameter

import gradfused

BACKENDS = [pytest.param("cpu", marks=pytest.mark.kernels), "reference", CUDA]
backends = pytest.mark.parametrize("backend", BACKENDS)
short = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
precisions = pytest.mark.parametrize("precision", ["kahan", "stochastic", "master"])
STEPS = 6
LAYOUTS = ("contiguous", "channels-last-parameter", "view", "misaligned")


def exact(case: str, recipe: dict[str, Any]) -> dict[str, Tensor]:
    return Run(CASES[case], recipe, SHAPES, backend="reference", exact=True).step(STEPS).outcome()


# ---- precision of 16-bit weights


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("recipe", ["plain", "centralize-clip", "full-update"])
@pytest.mark.parametrize("case", FEW_CASES)
@short
@precisions
@backends
def test_weights_are_those_of_the_oracle(
    precision: str, dtype: str, case: str, recipe: str, layout: str, backend: str
) -> None:
    """Master copies agree to float32's accuracy, Kahan sums to twice the digits, stochastic rounding with the
    reference's.
    """
    options = RECIPES[recipe] | {"precision": precision, "state_dtype": "float32", "seed": 11}

    def run(backend: str) -> Run:
        return Run(CASES[case], options, SHAPES, backend=backend, dtype=DTYPES[dtype], layout=layout).step(STEPS)

    ours = run(backend)
    assert ours.guards_intact()
    mine, theirs = ours.outcome(), run("reference").outcome()
    if precision == "stochastic":
        assert_nearly_equal(mine, theirs, DTYPES[dtype])
        return
    ideal = Run(
        CASES[case], RECIPES[recipe] | {"seed": 11}, SHAPES, backend="reference", dtype=DTYPES[dtype], exact=True
    )
    for name, expected in ideal.step(STEPS).outcome().items():
        if not name.startswith("parameter"):
            continue
        kept = mine.get(f"master of {name}")
        rtol, atol = 4e-6, 2e-5
        if precision == "kahan":
            kept, rtol, atol = mine[name] + mine[f"kahan_comp of {name}"], 2.0**-13, 2.0**-11
        assert kept is not None
        torch.testing.assert_close(kept, expected, rtol=rtol, atol=atol)
        ulp = torch.finfo(DTYPES[dtype]).eps * kept.abs() + 2.0**-24
        assert bool(((kept - mine[name]).abs() <= ulp / 2).all())


def assert_nearly_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype) -> None:
    """The two are equal except where rounding seldom met the other side of a boundary: by one unit in the last place."""
    assert mine.keys() == theirs.keys()
    for name in mine:
        if not name.startswith("parameter") or not mine[name].numel():
            continue
        off = (mine[name] - theirs[name]).abs()
        limit = torch.finfo(dtype).eps * theirs[name].abs() * STEPS + torch.finfo(dtype).tiny
        assert bool((off <= limit).all()), name
        assert float((off > 0).double().mean()) <= max(0.02, 1.5 / off.numel()), name


def rounded(x: Tensor, dtype: torch.dtype, backend: str, seed: int = 3) -> Tensor:
    """``x`` after stochastic rounding: a step from weights of zero that goes all the way to ``x``."""
    with torch.device(device_of(backend)):
        p = Parameter(torch.zeros(x.shape, dtype=dtype))
        p.grad_dtype = torch.float32
        p.grad = -x.to(p.device)
    gradfused.SGD([p], lr=1.0, precision="stochastic", seed=seed, backend=backend).step()
    return p.detach().cpu()


needs_mixed = pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no Tensor.grad_dtype")


@needs_mixed
@short
@pytest.mark.parametrize("backend", ["cpu", CUDA])
def test_stochastic_rounding_of_every_kind_of_number(dtype: str, backend: str) -> None:
    """The result is the oracle's, bit for bit, for subnormals, overflow, infinities and NaN too."""
    exponents = torch.arange(-150, 129, dtype=torch.float64)
    x = (torch.tensor([1.0, -1.1, 1.9999999, 1.5])[:, None].double() * 2.0**exponents).flatten().float()
    x = torch.cat([x, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 65504.0, 65519.0, -65535.0, 3.4e38])])
    for seed in range(5):
        mine, theirs = rounded(x, DTYPES[dtype], backend, seed), rounded(x, DTYPES[dtype], "reference", seed)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
        finite = torch.isfinite(x)
        assert bool(torch.isfinite(mine[finite]).all())
        assert bool(((mine.double() == x.double()) | ~torch.isinf(x))[~torch.isnan(x)].all())


@needs_mixed
@short
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_stochastic_rounding_has_no_bias(dtype: str, backend: str) -> None:
    """A quarter of the way to the next number is rounded up in a quarter of the cases, to five standard deviations."""
    n, ulp = 40_000, torch.finfo(DTYPES[dtype]).eps
    x = torch.full((n,), 1 + ulp / 4)
    up = rounded(x, DTYPES[dtype], backend) > 1
    assert abs(float(up.double().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    assert not torch.equal(up, rounded(x, DTYPES[dtype], backend, seed=4) > 1)


@short
@backends
def test_small_steps_are_not_lost(dtype: str, backend: str) -> None:
    """A weight of 1 takes 400 steps of a tenth of its last digit: rounded to nearest it stays, kept precisely it
    arrives.
    """
    step = torch.finfo(DTYPES[dtype]).eps / 20
    goal = 1 - 400 * step
    ends = {}
    for precision in (None, "kahan", "stochastic", "master"):
        with torch.device(device_of(backend)):
            p = Parameter(torch.ones(256, dtype=DTYPES[dtype]))
            p.grad = torch.ones(256, dtype=DTYPES[dtype])
        optimizer = gradfused.SGD([p], lr=step, precision=precision, backend=backend)
        for _ in range(400):
            optimizer.step()
        ends[precision] = float(p.detach().double().mean())
    assert ends.pop(None) == 1
    for precision, end in ends.items():
        assert abs(end - goal) < 0.15 * (1 - goal), precision


@precisions
def test_precision_means_nothing_to_wider_weights(precision: str) -> None:
    run, plain = (Run(CASES["adamw"], o, SHAPES).step(3) for o in ({"precision": precision}, {}))
    for name, tensor in plain.outcome().items():
        assert torch.equal(run.outcome()[name], tensor)


@pytest.mark.parametrize("precision", ["kahan", "master"])
@pytest.mark.parametrize("between", ["model", "nothing", "sam", "ema"])
def test_weights_that_are_loaded_in_mid_run_are_stepped_from(precision: str, between: str) -> None:
    """A copy that no longer belongs to the weights would bring the old ones back; one that does keeps its digits."""
    p = Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = gradfused.SGD([p], lr=2.0**-9, precision=precision, ema=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    loaded = 2.0 if precision == "master" else 2.0**-6  # the remainder is more than half a unit there
    if between == "model":
        with torch.no_grad():
            p.fill_(loaded)
    if between == "sam":
        sam = gradfused.SAM(optimizer, 0.5)
        sam.first_step()
        sam.restore()
    if between == "ema":
        with optimizer.swap_ema():
            pass
    optimizer.step()
    kept = optimizer.state[p]["master"] if precision == "master" else p.double() + optimizer.state[p]["kahan_comp"]
    expected = loaded - 2.0**-9 if between == "model" else 1 - 2.0**-8
    assert kept.tolist() == [expected] * 3


# ---- dtype of the state


@backends
@pytest.mark.parametrize("case", ["adamw-amsgrad", "rmsprop-both", "adan"])
def test_state_in_bfloat16(case: str, backend: str) -> None:
    run = Run(CASES[case], {"state_dtype": "bfloat16"}, SHAPES, backend=backend).step(STEPS)
    moments = [t for name, t in run.tensors() if " of " in name and t.dim() and "step" not in name]
    assert {t.dtype for t in moments} == {torch.bfloat16}
    reference = Run(CASES[case], {"state_dtype": "bfloat16"}, SHAPES, backend="reference").step(STEPS).outcome()
    assert_close(run.outcome(), reference, 1e-2, 1e-4)


@precisions
@pytest.mark.parametrize("state", [None, "bfloat16", "float32"])
def test_training_goes_on_from_a_checkpoint_bit_for_bit(precision: str, state: str | None) -> None:
    options = {"precision": precision, "state_dtype": state, "ema": 0.9}
    ours = Run(CASES["adamw"], options, SHAPES, dtype=torch.bfloat16).step(3)
    resumed = Run(CASES["adamw"], options, SHAPES, dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.save(ours.optimizer.state_dict(), file)
    file.seek(0)
    resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(resumed.params, ours.params, strict=True):
        p.data.copy_(q.detach())
    resumed.taken = ours.taken
    expected = ours.step(3).outcome()
    for name, tensor in resumed.step(3).outcome().items():
        assert torch.equal(tensor, expected[name]), name


def test_copies_are_of_the_optimizer_alone() -> None:
    run = Run(CASES["adamw"], {"precision": "master", "ema": 0.9}, SHAPES, dtype=torch.bfloat16).step(2)
    twin = copy.deepcopy(run.optimizer)
    before = run.outcome()
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    twin.step()
    for name, tensor in run.outcome().items():
        assert torch.equal(tensor, before[name])


# ---- the average of the weights


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", ["plain", "full", "centralize-agc"])
def test_average_of_the_weights(recipe: str, dtype: str, backend: str) -> None:
    """It equals one kept by hand after each step.

    That of 16-bit weights is in float32, as it moves by less than they can.
    """
    options = RECIPES[recipe] | ({"precision": "master"} if dtype in ("float16", "bfloat16") else {})
    run = Run(CASES["adamw"], options | {"ema": 0.9}, SHAPES, backend=backend, dtype=DTYPES[dtype])

    def weights() -> list[Tensor]:
        state = run.optimizer.state
        return [state.get(p, {}).get("master", p).detach().double().cpu().clone() for p in run.params]

    expected = [p.detach().double().cpu().clone() for p in run.params]
    for _ in range(STEPS):
        run.step()
        for average, p in zip(expected, weights(), strict=True):
            average += (p - average) * (1 - 0.9)
    for p, average in zip(run.params, expected, strict=True):
        kept = run.optimizer.state[p]["ema"]
        assert kept.dtype == (torch.float64 if dtype == "float64" else torch.float32)
        torch.testing.assert_close(kept.double().cpu(), average, rtol=3e-6, atol=1e-6)


@backends
def test_an_average_that_began_in_float32_follows_weights_made_float64(backend: str) -> None:
    float32_average_of_float64_weights(backend)


def averaging(**options: Any) -> tuple[Parameter, Any]:
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    return p, gradfused.SGD([p], lr=0.5, **options)


def test_swap_ema() -> None:
    p, optimizer = averaging(ema=0.5)
    optimizer.step()
    with optimizer.swap_ema():
        assert torch.equal(p.detach(), torch.full((3,), 0.75))
    assert torch.equal(p.detach(), torch.full((3,), 0.5))
    optimizer.step()
    assert torch.equal(optimizer.state[p]["ema"], torch.full((3,), 0.375))


def test_swap_ema_gives_the_weights_back_after_an_exception() -> None:
    p, optimizer = averaging(ema=0.5)
    optimizer.step()
    with pytest.raises(KeyError), optimizer.swap_ema():
        raise KeyError
    assert torch.equal(p.detach(), torch.full((3,), 0.5))
    optimizer.step()


def test_swap_ema_refuses_what_would_lose_weights() -> None:
    p, optimizer = averaging(ema=0.5)
    optimizer.step()
    with optimizer.swap_ema():
        with pytest.raises(RuntimeError, match=r"step\(\) inside swap_ema\(\)"):
            optimizer.step()
        with pytest.raises(RuntimeError, match=r"swap_ema\(\) inside swap_ema\(\)"), optimizer.swap_ema():
            pass
    assert torch.equal(p.detach(), torch.full((3,), 0.5))
    with pytest.raises(RuntimeError, match="no parameter group keeps an average"), averaging()[1].swap_ema():
        pass


def test_the_average_can_begin_later() -> None:
    """An average that is asked for later begins with the weights of that time."""
    p, optimizer = averaging()
    optimizer.step()
    optimizer.param_groups[0]["ema"] = 0.5
    optimizer.step()
    assert torch.equal(optimizer.state[p]["ema"], torch.full((3,), 0.25))


@pytest.mark.parametrize("ema", [-0.1, 1.1, math.nan])
def test_share_of_the_average_is_checked(ema: float) -> None:
    with pytest.raises(ValueError, match="ema"):
        averaging(ema=ema)
    with pytest.raises(TypeError, match="ema"):
        averaging(ema="much")


# ---- gradients left at zero


@backends
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded-gradient"])
@pytest.mark.parametrize("recipe", ["plain", "centralize-clip", "full-update", "centralize-agc"])
def test_gradients_are_left_at_zero(recipe: str, layout: str, backend: str) -> None:
    runs = [
        Run(CASES["adam"], RECIPES[recipe] | {"zero_grad_in_step": zero}, SHAPES, backend=backend, layout=layout).step(
            3
        )
        for zero in (True, False)
    ]
    assert runs[0].guards_intact()
    assert all(bool((g == 0).all()) for g in runs[0].grads)
    for name, tensor in runs[0].outcome().items():
        assert torch.equal(tensor, runs[1].outcome()[name])


@backends
@pytest.mark.parametrize("how", ["nonfinite", "found_inf"])
def test_gradients_of_a_skipped_step_go_too(how: str, backend: str) -> None:
    """If they stayed, backward would add the next step's gradients to them."""
    run = Run(CASES["adam"], {"zero_grad_in_step": True, "nonfinite": "skip"}, SHAPES, backend=backend).step()
    before = run.outcome()
    run.fill()
    if how == "nonfinite":
        run.grads[0].fill_(math.inf)
    else:
        run.optimizer.found_inf = torch.ones((), device=run.params[0].device)
    run.optimizer.step()
    assert all(bool((g == 0).all()) for g in run.grads)
    for name, tensor in run.outcome().items():
        assert torch.equal(tensor, before[name])


def test_values_are_what_the_tests_think() -> None:
    """The gradients are not zero before the step."""
    assert bool((values((6, 5), 0, 0) != 0).any())
