"""Models with shapes but no values, as memory estimators make them, can be stepped without touching memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from declared import OPTIMIZERS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from twins import states

import gradfused
from gradfused.step.memory import has_values

RECIPES = [
    {},
    {"clip_norm": 1.0},
    {"nonfinite": "skip", "norm_scope": "param", "perturb": "normalize"},
    {"centralize": "tensor", "centralize_at": "update", "perturb": "agc", "norm_scope": "unit", "clip_value": 1.0},
    {"noise": 0.1, "precision": "stochastic", "reverse": 0.5},
    {"precision": "master", "ema": 0.9, "zero_grad_in_step": True},
    {"precision": "kahan", "state_dtype": "bfloat16"},
]


@pytest.fixture(autouse=True)
def _no_address_is_read() -> Iterator[None]:
    """Makes torch's warning an error: it warns whenever somebody reads the address of a fake tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*data pointer.*")
        yield


def stepped(library: object, name: str, **given: object) -> torch.optim.Optimizer:
    """An optimizer after three steps with a fake model."""
    with FakeTensorMode():
        model = nn.Linear(4, 3, dtype=torch.bfloat16)
        opt = getattr(library, name)(model.parameters(), **given)
        for _ in range(3):
            model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
            opt.step()
            opt.zero_grad()
    return opt


# Every recipe with a plain rule and with one that takes norms; the other rules with two recipes each, in turns.
CASES = [
    (name, recipe)
    for i, name in enumerate(OPTIMIZERS)
    for j, recipe in enumerate(RECIPES)
    if name in ("AdamW", "LAMB") or j in (0, 1 + i % (len(RECIPES) - 1))
]


@pytest.mark.parametrize(
    ("name", "recipe"), CASES, ids=[f"{name}-{'-'.join(recipe) or 'plain'}" for name, recipe in CASES]
)
def test_every_optimizer_steps(name, recipe):
    """State gets the shapes and dtypes it would have. There is nothing to clip, skip or scale by."""
    opt = stepped(gradfused, name, **recipe)
    real = OPTIMIZERS[name](nn.Linear(4, 3, dtype=torch.bfloat16).parameters(), **recipe)
    for p in real.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    real.step()
    for fake, made in zip(states(opt), states(real), strict=True):
        assert {k: (v.shape, v.dtype) for k, v in fake.items()} == {k: (v.shape, v.dtype) for k, v in made.items()}
        assert all(isinstance(v, FakeTensor) for v in fake.values())
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if hasattr(torch.optim, name)])
def test_state_is_as_torchs(name):
    ours, theirs = stepped(gradfused, name), stepped(torch.optim, name)
    for mine, other in zip(states(ours), states(theirs), strict=True):
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {k: (v.shape, v.dtype) for k, v in other.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_after_the_mode_was_left(name):
    """Steps go on as torch's do; computing a norm of fake gradients needs the mode."""
    with FakeTensorMode():
        model = nn.Linear(4, 3)
        opt = OPTIMIZERS[name](model.parameters())
        model(torch.ones(2, 4)).sum().backward()
    for _ in range(2):
        opt.step()
    assert all(isinstance(p, FakeTensor) for p in model.parameters())


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_a_compiled_backend_that_is_asked_for_says_that_it_cannot(backend):
    with pytest.raises(RuntimeError, match=f"backend='{backend}' cannot run"):
        stepped(gradfused, "AdamW", backend=backend)


def test_which_tensors_hold_values():
    with FakeTensorMode():
        fake = torch.empty(3)
    assert not has_values(fake)
    assert not has_values(torch.empty(3, device="meta"))
    assert has_values(torch.empty(3))
    assert has_values(torch.empty(0))
    assert has_values(torch.eye(3).to_sparse())
