"""Faults of other implementations, each as a test that ours is right."""

from __future__ import annotations

import math

import pytest
import torch
from cases import EMULATED_CUDA
from torch import Tensor

import gradfused
from gradfused.backends import availability

pytestmark = pytest.mark.kernels

BACKENDS = [
    pytest.param(
        name, marks=pytest.mark.skipif(not availability()[name].usable, reason=str(availability()[name].reason))
    )
    for name in ("cpu", "reference")
] + [EMULATED_CUDA]
backends = pytest.mark.parametrize("backend", BACKENDS)

OPTIMIZERS = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("Adam", {"lr": 1e-3, "weight_decay": 0.1}),
    ("AdamW", {"lr": 1e-3, "weight_decay": 0.1}),
]
optimizers = pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=[name for name, _ in OPTIMIZERS])


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loop_in_torch(name: str, options: dict[str, float], p: Tensor, grads: list[Tensor]) -> Tensor:
    """torch's plain loop over contiguous copies, which has none of these faults."""
    q = torch.nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    optimizer = getattr(torch.optim, name)([q], foreach=False, **options)
    for g in grads:
        q.grad = g.clone(memory_format=torch.contiguous_format)
        optimizer.step()
    return q.detach()


def steps(name: str, options: dict[str, float], p: torch.nn.Parameter, grads: list[Tensor], backend: str) -> None:
    optimizer = getattr(gradfused, name)([p], backend=backend, **options)
    for g in grads:
        p.grad = g
        optimizer.step()


@backends
@optimizers
@pytest.mark.parametrize("of", ["parameter", "gradient"])
def test_a_gradient_in_another_memory_format_than_its_parameter(
    of: str, name: str, options: dict[str, float], backend: str
) -> None:
    """torch's fused CPU step silently pairs elements by their place in memory."""
    p, grads = seeded(8, 3, 5, 5), [seeded(8, 3, 5, 5, seed=i) for i in range(1, 4)]
    expected = loop_in_torch(name, options, p, grads)
    if of == "parameter":
        p = p.contiguous(memory_format=torch.channels_last)
    else:
        grads = [g.contiguous(memory_format=torch.channels_last) for g in grads]
    ours = torch.nn.Parameter(p)
    steps(name, options, ours, grads, backend)
    torch.testing.assert_close(ours.detach().contiguous(), expected)


@backends
@optimizers
def test_a_strided_view_leaves_the_memory_between_its_elements(
    name: str, options: dict[str, float], backend: str
) -> None:
    """torch's fused SGD writes over that memory on a CPU."""
    base = seeded(6, 8)
    before = base.clone()
    p = torch.nn.Parameter(base[::2, ::2])
    assert p.data_ptr() == base.data_ptr()
    grads = [seeded(3, 4, seed=i) for i in range(1, 4)]
    expected = loop_in_torch(name, options, p, grads)
    steps(name, options, p, grads, backend)
    torch.testing.assert_close(p.detach(), expected)
    between = torch.ones(6, 8, dtype=torch.bool)
    between[::2, ::2] = False
    assert torch.equal(base[between], before[between])


@backends
@pytest.mark.parametrize("scope", ["global", "group", "param", "unit"])
def test_clipping_gradients_of_1e20(scope: str, backend: str) -> None:
    """clip_grad_norm_ finds their norm to be inf and sets every gradient to 0."""
    p = torch.nn.Parameter(torch.zeros(4, 25))
    p.grad = torch.full((4, 25), 1e20)
    optimizer = gradfused.SGD([p], lr=1.0, perturb="clip", norm_scope=scope, backend=backend)
    optimizer.step()
    each = 1 / math.sqrt(25 if scope == "unit" else 100)
    torch.testing.assert_close(p.detach(), torch.full((4, 25), -each))
    torch.testing.assert_close(optimizer.grad_norm, torch.tensor(1e21, dtype=torch.float64))


@backends
def test_one_nan_need_not_make_every_gradient_nan(backend: str) -> None:
    """clip_grad_norm_ spreads a nan over all gradients; ``nonfinite="skip"`` skips the step."""
    params = [torch.nn.Parameter(seeded(5, 4, seed=i)) for i in range(3)]
    before = [p.detach().clone() for p in params]
    optimizer = gradfused.AdamW(params, lr=0.1, weight_decay=0.1, clip_norm=1.0, nonfinite="skip", backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[2, 3] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    params[1].grad[2, 3] = 1.0
    optimizer.step()
    assert all(bool(p.isfinite().all()) and not torch.equal(p, b) for p, b in zip(params, before, strict=True))


@backends
def test_norms_of_float16_gradients_do_not_overflow(backend: str) -> None:
    """The total norm that clip_grad_norm_ computes is a float16, whose largest value is 65504."""
    params = [torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.float16)) for _ in range(2)]
    for p in params:
        p.grad = torch.full_like(p, 2000.0)
    norm = 2000.0 * math.sqrt(2 * 64 * 64)
    assert norm > torch.finfo(torch.float16).max
    optimizer = gradfused.SGD(params, lr=1.0, clip_norm=100.0, backend=backend)
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(norm)
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, -100.0 * 2000.0 / norm))


@backends
@optimizers
def test_a_preset_grad_scale_divides(name: str, options: dict[str, float], backend: str) -> None:
    """Setting ``grad_scale`` to fold clipping into torch's fused step works here too, without a GradScaler."""
    p, g = seeded(5, 4), seeded(5, 4, seed=1)
    expected = loop_in_torch(name, options, p, [g / 4.0])
    ours = torch.nn.Parameter(p)
    optimizer = getattr(gradfused, name)([ours], backend=backend, **options)
    optimizer.grad_scale = torch.tensor(4.0)
    ours.grad = g
    optimizer.step()
    torch.testing.assert_close(ours.detach(), expected)
    assert torch.equal(ours.grad, g), "gradients are read, never written"


@backends
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_empty_tensor_drops_no_other(place: int, backend: str) -> None:
    """An empty tensor in the last slot loses or corrupts the launch of apex and TransformerEngine."""
    shapes: list[tuple[int, ...]] = [(3, 4), (5,)]
    shapes.insert(place, (0, 4))
    params = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    gradfused.SGD(params, lr=0.5, weight_decay=0.1, clip_norm=1e9, backend=backend).step()
    for p in params:
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - 0.5 * 1.1))


@backends
def test_weight_decay_comes_before_the_update_on_every_backend(backend: str) -> None:
    """bitsandbytes applies weight decay after the update in CUDA and before it on a CPU."""
    p = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
    p.grad = torch.tensor([1.0, -1.0])
    gradfused.AdamW([p], lr=0.5, weight_decay=0.5, eps=0.0, backend=backend).step()
    torch.testing.assert_close(p.detach(), torch.tensor([2.0 * 0.75 - 0.5, -3.0 * 0.75 + 0.5]))
