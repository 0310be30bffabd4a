"""The dtype of new and of loaded state, and state that was created in inference mode."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES, CUDA, DTYPES, SHAPES, Run, device_of
from torch.nn import Parameter

import gradfused

backends = pytest.mark.parametrize("backend", [pytest.param("cpu", marks=pytest.mark.kernels), "reference", CUDA])
short = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def moments(optimizer: torch.optim.Optimizer) -> set[torch.dtype]:
    return {s[key].dtype for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")}


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["kahan", "stochastic", "master"])
def test_new_moments_are_of_float32_beside_a_float32_copy(precision: str, dtype: str, backend: str) -> None:
    for asked in (None, "bfloat16", "float32"):
        options = {"precision": precision, "state_dtype": asked}
        run = Run(CASES["adamw"], options, SHAPES, dtype=DTYPES[dtype], backend=backend).step()
        beside_a_copy = precision == "master" and dtype in ("float16", "bfloat16")
        expected = torch.float32 if beside_a_copy else DTYPES[dtype]
        assert moments(run.optimizer) == {expected if asked is None else DTYPES[asked]}


@short
@pytest.mark.parametrize("saved", [None, "bfloat16", "float32"])
def test_moments_beside_a_float32_copy_keep_the_dtype_they_were_saved_in(saved: str | None, dtype: str) -> None:
    """Those that an older version saved in 16 bits too, unless another dtype is asked for."""
    options = {"precision": "master", "state_dtype": saved}
    run = Run(CASES["adamw"], options, SHAPES, dtype=DTYPES[dtype]).step()
    state = copy.deepcopy(run.optimizer.state_dict())
    for group in state["param_groups"]:
        group["state_dtype"] = None
    fresh = Run(CASES["adamw"], {"precision": "master"}, SHAPES, dtype=DTYPES[dtype])
    fresh.optimizer.load_state_dict(state)
    assert moments(fresh.optimizer) == {torch.float32 if saved is None else DTYPES[saved]}
    for name, tensor in fresh.outcome().items():
        if not name.startswith("parameter"):
            assert torch.equal(tensor, run.outcome()[name])
    assert moments(fresh.step().optimizer) == {torch.float32 if saved is None else DTYPES[saved]}


@short
@backends
def test_training_with_a_float32_copy_goes_as_in_float32(dtype: str, backend: str) -> None:
    """In float16 the squares of small gradients are zero: with moments in it the loss grew where float32's halves."""
    torch.manual_seed(0)
    data, target, start = torch.randn(64, 16), torch.randn(64), torch.randn(16) * 0.1

    def losses(dtype: torch.dtype, precision: str | None) -> list[float]:
        with torch.device(device_of(backend)):
            p = Parameter(start.to(dtype, copy=True))
        optimizer = gradfused.AdamW([p], lr=0.01, precision=precision, backend=backend)
        found = []
        for _ in range(40):
            w = p.detach().float().cpu().requires_grad_()
            loss = (data @ w - target).square().mean()
            (loss * 1e-4).backward()
            assert w.grad is not None
            p.grad = w.grad.to(p)
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    expected = losses(torch.float32, None)
    assert expected[-1] < 0.9 * expected[0]
    for ours, theirs in zip(losses(DTYPES[dtype], "master"), expected, strict=True):
        assert abs(ours - theirs) < 0.02 * expected[0]


@pytest.mark.parametrize("precision", [None, "kahan", "master"])
@pytest.mark.parametrize("made_in", [False, True])
@backends
def test_steps_in_inference_mode(made_in: bool, precision: str | None, backend: str) -> None:
    """Steps give the same result. State made there can be used outside, unless the parameter itself was made there."""

    def parameter() -> Parameter:
        p = Parameter(torch.linspace(1, 2, 9, dtype=torch.bfloat16, device=device_of(backend)), requires_grad=False)
        p.grad = torch.full_like(p, 0.3)
        return p

    def optimizer(p: Parameter) -> gradfused.AdamW:
        return gradfused.AdamW([p], lr=0.01, precision=precision, ema=0.9, noise=0.1, backend=backend)

    expected = parameter()
    plain = optimizer(expected)
    with torch.inference_mode(made_in):
        p = parameter()
        ours = optimizer(p)
    for step in range(3):
        with torch.inference_mode(made_in or step < 2):
            ours.step()
        plain.step()
    assert torch.equal(p, expected)
    assert not any(value.is_inference() for value in ours.state[p].values())
    for key, value in plain.state[expected].items():
        assert torch.equal(ours.state[p][key], value)
