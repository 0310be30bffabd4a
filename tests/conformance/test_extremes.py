"""Gradients of every magnitude through every rule that torch has: results are finite where torch's are, and equal them."""

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
MAGNITUDES = [0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e-22, 1e-20, 1e-19, 1e-10, 1.0, 1e10, 1e18, 1e19, 1e20, 1e22, 1e30]
SPECIAL = [torch.inf, torch.nan]
BETAS = [0.0, 0.3, 0.5, 0.6, 0.9, 0.999]
PAIRS = [(a, b) for a in BETAS for b in BETAS[1:]] + [(0.9, 0.0)]


def variants() -> dict[str, tuple[str, list[dict[str, Any]]]]:
    adam = [{"betas": pair} for pair in PAIRS]
    alphas = [
        {"alpha": beta} for beta in BETAS
    ]  # 0 with ``centered`` is left out: the variance of one gradient is rounding errors
    return {
        "sgd": ("SGD", [{}]),
        "sgd-momentum": ("SGD", [{"momentum": beta, "dampening": 0.3} for beta in BETAS[1:]]),
        "sgd-nesterov": ("SGD", [{"momentum": beta, "nesterov": True} for beta in BETAS[1:]]),
        "adam": ("Adam", adam),
        "adam-amsgrad": ("Adam", [o | {"amsgrad": True} for o in adam[::5]]),
        "adamw": ("AdamW", adam[::3]),
        "nadam": ("NAdam", [o for o in adam if o["betas"][1]]),
        "radam": ("RAdam", [o for o in adam if o["betas"][1] not in (0.0, 0.5)]),  # torch divides by 0 there
        "adagrad": ("Adagrad", [{}, {"initial_accumulator_value": 0.1}]),
        "rmsprop": ("RMSprop", alphas),
        "rmsprop-centered": ("RMSprop", [o | {"centered": True} for o in alphas[1:]]),
        "rmsprop-momentum": ("RMSprop", [o | {"momentum": 0.6} for o in alphas]),
        "rmsprop-both": ("RMSprop", [o | {"momentum": 0.6, "centered": True} for o in alphas[1:]]),
    }


VARIANTS = variants()


def gradients() -> list[Tensor]:
    """Gradients for three steps: every magnitude with either sign, followed by itself, by its neighbours or by the
    other end.
    """
    finite = torch.tensor([s * m for m in MAGNITUDES for s in (1, -1)], dtype=torch.float64)
    special = torch.tensor([s * m for m in SPECIAL for s in (1, -1)], dtype=torch.float64)
    ones = torch.ones(len(special), dtype=torch.float64)
    same = finite
    steps = [
        torch.cat([same, finite, finite, special, ones]),
        torch.cat([same, finite.roll(2), finite.flip(0), ones, special]),
        torch.cat([same, finite.roll(-2), finite, ones, ones]),
    ]
    return [s.float() for s in steps]


def stepped(make: Any, device: str) -> Tensor:
    grads = gradients()
    p = torch.nn.Parameter(torch.linspace(0.5, 1.5, len(grads[0]), device=device))
    optimizer = make([p])
    for grad in grads:
        p.grad = grad.to(device)
        optimizer.step()
    return p.detach().cpu()


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_magnitude_is_as_in_torch(variant: str, backend: str) -> None:
    name, every = VARIANTS[variant]
    for options in every[:: 5 if backend == "triton" and triton_interpreter.INTERPRETED else 1]:
        ours = stepped(
            lambda p, o=options: getattr(gradfused.optim, name)(p, lr=0.01, backend=backend, **o), device_of(backend)
        )
        theirs = stepped(lambda p, o=options: getattr(torch.optim, name)(p, lr=0.01, foreach=False, **o), "cpu")
        torch.testing.assert_close(
            ours, theirs, rtol=2e-5, atol=1e-6, equal_nan=True, msg=lambda m, o=options: f"{o}: {m}"
        )


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", ["Adam", "NAdam", "RAdam", "LAMB", "Adan"])
def test_a_beta_of_0_forgets(name: str, backend: str) -> None:
    """Nothing remains of the average, however large it was: the result is that of the new gradient, to the bit."""
    p = torch.nn.Parameter(torch.ones(40, device=device_of(backend)))
    betas = (0.0, 0.9, 0.99) if name == "Adan" else (0.0, 0.9)
    optimizer = getattr(gradfused.optim, name)([p], lr=1e-3, betas=betas, backend=backend)
    for grad in (torch.linspace(1e8, 3e8, 40), torch.linspace(0.1, 0.3, 40)):
        p.grad = grad.to(p.device)
        optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"].cpu(), grad)


@pytest.mark.kernels
@pytest.mark.parametrize("backend", ALL)
def test_an_average_that_keeps_nothing_is_the_weights(backend: str) -> None:
    p = torch.nn.Parameter(torch.linspace(1e8, 3e8, 40, device=device_of(backend)))
    optimizer = gradfused.optim.SGD([p], lr=1.0, ema=0.0, backend=backend)
    for wanted in (torch.zeros(40), torch.linspace(0.1, 0.3, 40)):
        p.grad = p.detach() - wanted.to(p.device)
        optimizer.step()
        with optimizer.swap_ema():
            average = p.detach().clone()
        assert torch.equal(average, p.detach())
