"""A unit whose elements are all equal is centred to exact zeros: in every dtype, at every length and on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_interpreter
from cases import device_of
from oracle_checks import BACKENDS
from torch import Tensor

import gradfused

ALL = ["reference", *BACKENDS]
# Lengths around those of a register, of what lanes share, of a block and of the pieces that units are cut into.
SHAPES = [
    (3, 1),
    (2, 3),
    (9, 5),
    (4, 17),
    (3, 64),
    (2, 65),
    (2, 1000),
    (3, 2, 3, 3),
    (2, 4, 33, 31),
    (1, 16385),
    (2, 70001),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SGD = ("SGD", {"lr": 1.0})
ADAM = ("Adam", {"lr": 0.5, "eps": 1e-30})
COUPLED = ("SGD", {"lr": 1.0, "weight_decay": 0.3})
LAMB = ("LAMB", {"lr": 0.5, "eps": 1e-30})
RULES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "gradient": [SGD, ADAM],
    "decayed": [COUPLED],
    "update": [ADAM, LAMB],
}


def constants(shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """One value for each unit, in float64. They span many magnitudes, and none of them has few digits."""
    generator = torch.Generator().manual_seed(seed)
    units = (1,) if kind == "tensor" else (shape[0],)
    exponents = torch.rand(units, generator=generator, dtype=torch.float64) * 8 - 6
    values = (torch.rand(units, generator=generator, dtype=torch.float64) - 0.5) * 10**exponents
    return values.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def shapes_for(kind: str, at: str, dtype: torch.dtype, slow: bool) -> list[tuple[int, ...]]:
    """Interpreted, long units take seconds: there is one of several chunks, and the tensors that are centred whole have
    several.
    """
    wanted = [s for s in SHAPES if kind != "conv" or len(s) == 4]
    if not slow:
        return wanted
    longest = [(1, 65552)] if (kind, at, dtype) == ("unit", "gradient", torch.float32) else []
    longest += [(3, 3001)] if kind == "tensor" and dtype == torch.float32 else []
    return [s for s in wanted if s in ((3, 1), (9, 5), (2, 65), (3, 2, 3, 3))] + longest


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", RULES)
@pytest.mark.parametrize("kind", ["unit", "conv", "tensor"])
def test_equal_elements_centre_to_zeros(kind: str, at: str, dtype: torch.dtype, backend: str) -> None:
    """Two steps with different constants, and a scale that is divided out, do not change a bit of the weights."""
    if kind == "conv" and dtype != torch.float32:
        pytest.skip("the same as unit")
    slow = backend == "triton" and triton_interpreter.INTERPRETED
    for name, options in RULES[at][:1] if slow else RULES[at]:
        for scope in ({},) if slow else ({}, {"perturb": "clip", "norm_scope": "unit", "radius": 1e30}):
            shapes = shapes_for(kind, at, dtype, slow)
            weights = (constants(s, kind, i).to(device_of(backend), dtype) for i, s in enumerate(shapes))
            params = [torch.nn.Parameter(w.contiguous()) for w in weights]
            before = [p.detach().clone() for p in params]
            recipe = {"centralize": kind, "centralize_at": at, "backend": backend, **scope}
            optimizer = getattr(gradfused.optim, name)(params, **options, **recipe)
            optimizer.grad_scale = torch.tensor(3.0, device=params[0].device)
            for step in range(1 if slow else 2):
                for i, p in enumerate(params):
                    p.grad = constants(tuple(p.shape), kind, 100 + 50 * step + i).to(p).contiguous()
                optimizer.step()
            for p, old in zip(params, before, strict=True):
                assert torch.equal(p, old), (name, scope, tuple(p.shape))


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_what_is_not_finite_spoils_its_own_unit_alone(place: int, value: float, backend: str) -> None:
    """As with g - g.mean(), a unit becomes nan where its gradient is infinite and infinite elsewhere.

    Other units stay right.
    """
    for length in (7, 100) if backend == "triton" and triton_interpreter.INTERPRETED else (7, 100, 70001):
        p = torch.nn.Parameter(torch.zeros(2, length, device=device_of(backend)))
        grad = torch.linspace(-1, 1, 2 * length, device=p.device).view(2, length)
        grad[1, place] = value
        p.grad = grad.clone()
        gradfused.optim.SGD([p], lr=1.0, centralize=True, backend=backend).step()
        wanted = -(grad - grad.mean(1, keepdim=True))
        torch.testing.assert_close(p.detach(), wanted, equal_nan=True)


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("length", [100, 70001])
def test_adaptive_clipping_counts_what_rounding_took_off(length: int, backend: str) -> None:
    """Norms of weights with a Kahan remainder are those of the sum of the two, in short units and in long ones."""
    if backend == "triton" and triton_interpreter.INTERPRETED and length > 100:
        pytest.skip("slow to interpret")
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.full((2, length), 1.0, dtype=torch.bfloat16, device=device_of(backend)))
    grads = torch.randn(2, length, generator=generator).to(p)
    options = {"lr": 1.0, "precision": "kahan", "perturb": "agc", "norm_scope": "unit", "radius": 1e-3}
    optimizer = gradfused.optim.SGD([p], backend=backend, **options)
    p.grad = torch.full_like(p, -(2.0**-9) * 1e3)  # clipped to 1e-3 of the weights, which lie in the remainder alone
    optimizer.step()
    rest = next(v for k, v in optimizer.state[p].items() if v.shape == p.shape)
    weights = p.detach().double() + rest.double()
    assert (rest.double().abs() >= 9e-4).all()
    optimizer.param_groups[0]["radius"] = 0.1
    p.grad = grads
    optimizer.step()
    rest = next(v for k, v in optimizer.state[p].items() if v.shape == p.shape)
    factor = 0.1 * weights.norm(dim=1, keepdim=True) / grads.double().norm(dim=1, keepdim=True)
    moved = weights - (p.detach().double() + rest.double())
    error = (moved.norm(dim=1) / (factor[:, 0] * grads.double().norm(dim=1)) - 1).abs().max()
    assert error < 2e-4, error  # 1e-3 without the remainder


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_trust_ratio_magnifies_rounding_by_no_more_than_centring_does(
    decay: float, spread: float, backend: str
) -> None:
    """LAMB brings a centred direction to a fixed length, however little centring has left of it.

    The remaining part was rounded as the whole direction was. So the error of the step is the rounding error times the
    norm of the direction over the norm of that part. Of equal elements nothing remains, and the weights do not move.
    """
    generator = torch.Generator().manual_seed(0)
    grads = 0.5 + spread * torch.rand(4, 50, generator=generator, dtype=torch.float64)
    start = torch.linspace(0.5, 1.5, 200, dtype=torch.float64).view(4, 50)

    def moved(dtype: torch.dtype, name: str, eps: float) -> Tensor:
        p = torch.nn.Parameter(start.to(device_of(name), dtype, copy=True))
        recipe = {"centralize": True, "centralize_at": "update", "weight_decay": decay, "backend": name}
        optimizer = gradfused.optim.LAMB([p], lr=0.01, eps=eps, **recipe)
        p.grad = grads.to(p)
        optimizer.step()
        return p.detach().cpu().double() - start.to(dtype).double()

    for eps in (1e-6, 1e-3, 1.0):
        direction = grads / (grads + eps)
        left = direction - direction.mean(1, keepdim=True)
        kept = (left + decay * start).norm()
        wanted, found = moved(torch.float64, "reference", eps), moved(torch.float32, backend, eps)
        if kept == 0:
            assert not found.any()
            continue
        magnified = torch.finfo(torch.float32).eps * float(direction.norm() / kept) * float(wanted.norm())
        assert (found - wanted).norm() <= 4 * magnified + 1e-6
