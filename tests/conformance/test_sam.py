"""SAM and ASAM: both halves of a step against the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from cases import CASES, CUDA, DTYPES, LAYOUTS, RECIPES, device_of, guards_intact, values
from torch import Tensor
from torch.nn import Parameter

import gradfused
from gradfused import SAM

BACKENDS = [pytest.param("cpu", marks=pytest.mark.kernels), "reference", CUDA]
backends = pytest.mark.parametrize("backend", BACKENDS)
RHO = 0.3
STEPS = 4
SHAPES = ((6, 5), (7,), (4, 3, 2, 2), (0, 3), (9, 130), ())

Make = Callable[..., torch.optim.Optimizer]


# ---- the formula


def by_hand(
    params: list[Tensor], optimizer: torch.optim.Optimizer, gradients: Callable[[], None], adaptive: bool, eta: float
) -> None:
    """Foret et al. 2021, equation 2, and Kwon et al. 2021, algorithm 1 with the authors' eta, in plain PyTorch."""
    gradients()
    reach = [p.detach().abs() + eta if adaptive else torch.ones_like(p) for p in params]
    norm = torch.sqrt(sum(((t * p.grad) ** 2).sum() for t, p in zip(reach, params, strict=True)))
    before = [p.detach().clone() for p in params]
    with torch.no_grad():
        for t, p in zip(reach, params, strict=True):
            p += t * t * p.grad * (RHO / (norm + 1e-12))
    gradients()
    with torch.no_grad():
        for p, old in zip(params, before, strict=True):
            p.copy_(old)
    optimizer.step()


class Quadratic:
    """Weights in a layout, with gradients that are known functions of them, so that the two backward passes differ."""

    def __init__(self, dtype: torch.dtype, layout: str = "contiguous", device: str = "cpu") -> None:
        place_param, place_grad = LAYOUTS[layout]
        with torch.device(device):
            self.params = [Parameter(place_param(s, dtype)) for s in SHAPES]
            for i, p in enumerate(self.params):
                p.data.copy_(values(p.shape, i, -1))
                p.grad = place_grad(SHAPES[i], dtype)

    def gradients(self) -> None:
        for i, p in enumerate(self.params):
            assert p.grad is not None
            p.grad.copy_(p.detach() * 0.5 + values(p.shape, i, 0).to(p.device, p.dtype))


def two_halves(sam: SAM, gradients: Callable[[], None]) -> None:
    gradients()
    sam.first_step()
    gradients()
    sam.second_step()


ADAPTIVE = [(False, 0.0), (True, 0.0), (True, 0.05)]


@pytest.mark.parametrize("layout", ["contiguous", "channels-last-parameter", "view", "misaligned"])
@pytest.mark.parametrize("recipe", ["plain", "centralize-clip", "full-update", "centralize-agc"])
@pytest.mark.parametrize("adaptive", ADAPTIVE)
@backends
def test_both_halves(adaptive: tuple[bool, float], recipe: str, layout: str, backend: str) -> None:
    """The recipe is applied in the descent only: the ascent follows the raw gradient."""
    options = {"lr": 0.05, "weight_decay": 0.1} | dict(RECIPES[recipe])
    ours, exact = Quadratic(torch.float32, layout, device_of(backend)), Quadratic(torch.float64)
    sam = SAM(gradfused.AdamW(ours.params, backend=backend, **options), RHO, *adaptive)
    reference = gradfused.AdamW(exact.params, backend="reference", **options)
    for _ in range(STEPS):
        two_halves(sam, ours.gradients)
        by_hand(exact.params, reference, exact.gradients, *adaptive)
    for p, q in zip(ours.params, exact.params, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=2e-5, atol=3e-5)
        assert guards_intact(p.detach())


@pytest.mark.parametrize("precision", [None, "kahan", "master"])
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@backends
def test_dtypes(dtype: str, precision: str | None, backend: str) -> None:
    ours, exact = Quadratic(DTYPES[dtype], device=device_of(backend)), Quadratic(torch.float64)
    for p, q in zip(ours.params, exact.params, strict=True):
        q.data.copy_(p.detach())
    sam = SAM(gradfused.SGD(ours.params, lr=0.1, precision=precision, backend=backend), RHO)
    reference = torch.optim.SGD(exact.params, lr=0.1)
    for _ in range(STEPS):
        two_halves(sam, ours.gradients)
        by_hand(exact.params, reference, exact.gradients, False, 0.0)
    tolerance = {"float64": 1e-12, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    for p, q in zip(ours.params, exact.params, strict=True):
        torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_weights_beyond_the_caches(dtype: str) -> None:
    """Backups and weights that a half only writes bypass the caches, whatever their first address and length."""
    rows = torch.full((2900, 2900), math.nan, dtype=DTYPES[dtype])
    params = [Parameter(rows.view(-1)[1:-2]), Parameter(torch.empty(37, dtype=DTYPES[dtype]))]
    for p in params:
        p.data.copy_(torch.linspace(-1, 1, p.numel()))
        p.grad = torch.full_like(p, 0.5)
    before = [p.detach().clone() for p in params]
    sam = SAM(gradfused.SGD(params, lr=0.25, backend="cpu"), RHO)
    sam.first_step()
    norm = 0.5 * math.sqrt(sum(p.numel() for p in params))
    for p, old in zip(params, before, strict=True):
        up = (old.double() + RHO / norm * 0.5).to(p.dtype)
        torch.testing.assert_close(p.detach(), up, rtol=torch.finfo(p.dtype).eps, atol=1e-7)
        p.grad.fill_(1.0)
    sam.second_step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.25, rtol=torch.finfo(p.dtype).eps, atol=1e-7)
    assert rows.view(-1)[[0, -2, -1]].isnan().all()


@pytest.mark.parametrize("case", ["sgd-momentum", "lamb", "lars", "lion", "adan", "rmsprop-both"])
def test_every_optimizer_can_descend(case: str) -> None:
    """LAMB and LARS take the norms of the weights that the step starts from."""
    ours, exact = Quadratic(torch.float32), Quadratic(torch.float64)
    make = getattr(gradfused, CASES[case].optimizer)
    sam = SAM(make(ours.params, **CASES[case].options, ema=0.9), RHO)
    reference = make(exact.params, **CASES[case].options, ema=0.9, backend="reference")
    for _ in range(STEPS):
        two_halves(sam, ours.gradients)
        by_hand(exact.params, reference, exact.gradients, False, 0.0)
    for p, q in zip(ours.params, exact.params, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=2e-5, atol=3e-5)
        average = sam.state[p]["ema"].double()
        torch.testing.assert_close(average, reference.state[q]["ema"], rtol=2e-5, atol=3e-5)


@backends
def test_gradient_of_zero_and_huge_ones(backend: str) -> None:
    for value in (0.0, 1e30):
        p = Parameter(torch.ones(5, device=device_of(backend)))
        sam = SAM(gradfused.SGD([p], lr=0.0, backend=backend), RHO)
        p.grad = torch.full_like(p, value)
        sam.first_step()
        expected = 1 + (RHO / math.sqrt(5) if value else 0.0)
        torch.testing.assert_close(p.detach(), torch.full_like(p, expected))
        sam.restore()
        assert torch.equal(p.detach(), torch.ones_like(p))
