"""LPG cross-entropy written out sample by sample in float64, and inputs to compare the backends with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from torch import Tensor

from gradfused.backends import availability

#: The largest error allowed per element, relative to the row's largest gradient.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-11, torch.float16: 2**-11, torch.bfloat16: 2**-8}

_cpu = availability()["cpu"]
BACKENDS = [
    "reference",
    pytest.param("cpu", marks=[pytest.mark.kernels, pytest.mark.skipif(not _cpu.usable, reason=str(_cpu.reason))]),
    pytest.param("triton", marks=pytest.mark.skipif(not triton_interpreter.RUNS, reason="needs Triton")),
]
backends = pytest.mark.parametrize("backend", BACKENDS)


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and not triton_interpreter.INTERPRETED else "cpu"


def batch(
    n: int, classes: int, dtype: torch.dtype = torch.float32, *, scale: float = 3.0, seed: int = 0, ignored: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits and targets. Classes repeat, class 0 has many samples, and the first ``ignored`` targets are -100."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, classes, generator=generator) * scale).to(dtype)
    target = torch.randint(0, min(classes, max(2, n // 3)), (n,), generator=generator)
    target[torch.rand(n, generator=generator) < 0.3] = 0
    target[:ignored] = -100
    return logits, target


def delta(gradient: Tensor, sign: float, eps: float) -> Tensor:
    """The change within a ball that lengthens or shortens one gradient most."""
    norm = float(gradient.norm())
    if norm == 0 or sign == 0:
        return torch.zeros_like(gradient)
    return sign * (min(eps, norm) if sign < 0 else eps) / norm * gradient


def expected(
    logits: Tensor,
    target: Tensor,
    sign: Tensor,
    radius: float | Tensor,
    *,
    scope: str = "class",
    upstream: Tensor | None = None,
    means: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of (n, C) logits, in float64: torch's own cross-entropy, and the deltas added a sample at a time.

    ``options`` are torch's.
    """
    u = logits.detach().double().requires_grad_()
    weight, label_smoothing = options.get("weight"), options.get("label_smoothing", 0.0)
    ignore_index, reduction = options.get("ignore_index", -100), options.get("reduction", "mean")
    wide = None if weight is None else weight.double()
    loss = F.cross_entropy(u, target, **options | {"weight": wide})
    upstream = torch.ones_like(loss) if upstream is None else upstream.double()
    (gradient,) = torch.autograd.grad(loss, u, upstream)
    gradient = torch.where((target == ignore_index)[:, None], 0, gradient)
    classes = u.shape[1]
    eps = torch.as_tensor(radius, dtype=torch.float64).expand(classes)
    kept = [i for i, t in enumerate(target.tolist()) if t != ignore_index]
    weights = torch.ones(classes, dtype=torch.float64) if wide is None else wide
    total = weights[target[kept]].sum()
    own = torch.zeros_like(u)
    for i in kept:
        towards = torch.full((classes,), label_smoothing / classes, dtype=torch.float64)
        towards[target[i]] += 1 - label_smoothing
        own[i] = u[i].detach().softmax(0) - towards
    for c in {int(target[i]) for i in kept}:
        rows = [i for i in kept if target[i] == c]
        mean = own[rows].mean(0) if means is None else means[c].double()
        for i in rows:
            factor = upstream[i] if reduction == "none" else upstream / (total if reduction == "mean" else 1)
            d = delta(own[i] if scope == "sample" else mean, float(sign[c]), float(eps[c]))
            gradient[i] += factor * weights[c] * d
    return loss.detach(), gradient


def assert_near(found: Tensor, wanted: Tensor, dtype: torch.dtype, times: float = 1.0) -> None:
    """Each row is within a few units in the last place of its largest gradient, or of 1e-4 if that is larger."""
    scale = wanted.abs().amax(1, keepdim=True).clamp_min(1e-4)
    error = ((found.double() - wanted) / scale).abs().max() if len(wanted) else torch.tensor(0.0)
    assert error <= times * TOLERANCE[dtype], f"off by {error:.3g} of the row's largest, allowed {TOLERANCE[dtype]:.3g}"
