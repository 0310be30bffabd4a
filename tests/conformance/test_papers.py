"""Rules that torch.optim lacks: the oracle against the papers' algorithms, written in plain Python numbers for one
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

import gradfused

WEIGHTS = [0.5, -1.25, 2.0, 0.0]
GRADIENTS = [[0.1, -0.4, 0.0, 2.0], [0.3, 0.2, -0.1, -1.0], [-0.2, 0.5, 0.3, 0.25]]

Numbers = list[float]


def length(x: Numbers) -> float:
    return math.sqrt(sum(v * v for v in x))


def lion(w: Numbers, lr: float, decay: float, b1: float, b2: float) -> None:
    """Chen et al. 2023, algorithm 2."""
    m = [0.0] * len(w)
    for g in GRADIENTS:
        for i in range(len(w)):
            c = b1 * m[i] + (1 - b1) * g[i]
            w[i] -= lr * ((c > 0) - (c < 0) + decay * w[i])
            m[i] = b2 * m[i] + (1 - b2) * g[i]


def lamb(w: Numbers, lr: float, decay: float, b1: float, b2: float, eps: float, adapt: bool) -> None:
    """You et al. 2020, algorithm 2."""
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t, g in enumerate(GRADIENTS, 1):
        u = []
        for i in range(len(w)):
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * g[i] ** 2
            u.append(m[i] / (1 - b1**t) / (math.sqrt(v[i] / (1 - b2**t)) + eps) + decay * w[i])
        ratio = length(w) / length(u) if adapt else 1.0
        for i in range(len(w)):
            w[i] -= lr * ratio * u[i]


def lars(
    w: Numbers, lr: float, decay: float, momentum: float, trust: float, eps: float, adapt: bool, nesterov: bool
) -> None:
    """You et al. 2017, with the learning rate outside the momentum. The first gradient fills the buffer."""
    buffer = [0.0] * len(w)
    for g in GRADIENTS:
        ratio = trust * length(w) / (length(g) + decay * length(w) + eps) if adapt else 1.0
        for i in range(len(w)):
            x = ratio * (g[i] + decay * w[i])
            buffer[i] = momentum * buffer[i] + x
            w[i] -= lr * (x + momentum * buffer[i] if nesterov else buffer[i])


def adan(w: Numbers, lr: float, decay: float, b1: float, b2: float, b3: float, eps: float, proximal: bool) -> None:
    """Xie et al. 2022, algorithm 1, with beta in place of 1 - beta and the authors' bias corrections."""
    n = len(w)
    m, v, s, before = [0.0] * n, [0.0] * n, [0.0] * n, list(GRADIENTS[0])
    for t, g in enumerate(GRADIENTS, 1):
        for i in range(n):
            d = g[i] - before[i]
            m[i] = b1 * m[i] + (1 - b1) * g[i]
            v[i] = b2 * v[i] + (1 - b2) * d
            s[i] = b3 * s[i] + (1 - b3) * (g[i] + b2 * d) ** 2
            u = (m[i] / (1 - b1**t) + b2 * v[i] / (1 - b2**t)) / (math.sqrt(s[i] / (1 - b3**t)) + eps)
            w[i] = (w[i] - lr * u) / (1 + lr * decay) if proximal else w[i] * (1 - lr * decay) - lr * u
        before = list(g)


CASES: dict[str, tuple[Callable[[Numbers], None], Callable[..., torch.optim.Optimizer]]] = {
    "lion": (
        lambda w: lion(w, 0.1, 0.2, 0.8, 0.9),
        lambda p: gradfused.Lion(p, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), backend="reference"),
    ),
    **{
        f"lamb-{adapt}": (
            lambda w, adapt=adapt: lamb(w, 0.1, 0.2, 0.8, 0.9, 1e-3, adapt),
            lambda p, adapt=adapt: gradfused.LAMB(
                p, lr=0.1, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-3, adapt=adapt, backend="reference"
            ),
        )
        for adapt in (True, False)
    },
    **{
        f"lars-{momentum}-{adapt}-{nesterov}": (
            lambda w, m=momentum, a=adapt, n=nesterov: lars(w, 0.7, 0.2, m, 0.3, 1e-3, a, n),
            lambda p, m=momentum, a=adapt, n=nesterov: gradfused.LARS(
                p, 0.7, m, weight_decay=0.2, trust_coefficient=0.3, eps=1e-3, adapt=a, nesterov=n, backend="reference"
            ),
        )
        for momentum, adapt, nesterov in (
            (0.9, True, False),
            (0.9, True, True),
            (0.9, False, False),
            (0.0, True, False),
        )
    },
    **{
        f"adan-{proximal}": (
            lambda w, x=proximal: adan(w, 0.1, 0.2, 0.9, 0.8, 0.95, 1e-3, x),
            lambda p, x=proximal: gradfused.Adan(
                p, lr=0.1, weight_decay=0.2, betas=(0.9, 0.8, 0.95), eps=1e-3, no_prox=not x, backend="reference"
            ),
        )
        for proximal in (True, False)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_paper_says_the_same(case: str) -> None:
    by_hand, make = CASES[case]
    expected = list(WEIGHTS)
    by_hand(expected)
    p = torch.nn.Parameter(torch.tensor(WEIGHTS, dtype=torch.float64))
    optimizer = make([p])
    for g in GRADIENTS:
        p.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["LAMB", "LARS"])
@pytest.mark.parametrize("zero", ["weights", "gradient"])
def test_a_norm_of_zero_says_nothing(name: str, zero: str) -> None:
    """The trust ratio is 1 where a norm is zero, so that weights of zero can move."""
    p = torch.nn.Parameter(torch.zeros(3) if zero == "weights" else torch.ones(3))
    p.grad = torch.zeros(3) if zero == "gradient" else torch.ones(3)
    getattr(gradfused, name)([p], lr=0.5, weight_decay=0.0, backend="reference").step()
    assert bool(torch.isfinite(p).all())
    assert bool((p != 0).all())
