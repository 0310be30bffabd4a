"""Invalid options and groups are refused, by name and with the remedy, before anything has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from twins import (
    EXACT,
    assert_same,
    every_backend,
    loss_of,
    recovers,
    refuses,
    small_model,
    train,
)

import gradfused

NAN = float("nan")


def running(**options):
    """A model after two steps, with the gradients of the third."""
    model = small_model()
    opt = gradfused.AdamW(model.named_parameters(), lr=0.01, **options)
    train(model, opt, 2)
    opt.zero_grad()
    loss_of(model, 2).backward()
    return model, opt


# ---- options made invalid in the middle of a run


INVALID = [
    ({"lr": -1.0}, ValueError, ["lr: expected", "-1.0"]),
    ({"lr": NAN}, ValueError, ["lr: expected", "nan"]),
    ({"lr": "fast"}, TypeError, ["lr: expected a number", "'fast'"]),
    ({"betas": (0.9, 1.0)}, ValueError, ["betas[1]", "1.0"]),
    ({"betas": (0.9, NAN)}, ValueError, ["betas[1]", "nan"]),
    ({"betas": None}, TypeError, ["betas: expected two numbers", "None"]),
    ({"eps": -1.0}, ValueError, ["eps: expected", "-1.0"]),
    ({"weight_decay": NAN}, ValueError, ["weight_decay: expected", "nan"]),
    ({"clip_norm": -1.0}, ValueError, ["clip_norm: expected", "-1.0"]),
    ({"clip_norm": 1.0, "perturb": "clip"}, ValueError, ["clip_norm=1.0 and perturb='clip'"]),
    ({"clip_value": NAN}, ValueError, ["clip_value: expected", "nan"]),
    ({"perturb": "agc"}, ValueError, ["perturb='agc'", "use norm_scope='unit'"]),
    ({"perturb": "squash"}, ValueError, ["perturb: expected one of", "'squash'"]),
    ({"centralize": "rows"}, ValueError, ["centralize: expected one of", "'rows'"]),
    ({"noise": -0.5}, ValueError, ["noise: expected", "-0.5"]),
    ({"seed": 1.5}, TypeError, ["seed: expected an int", "1.5"]),
    ({"reverse": -1.0}, ValueError, ["reverse: expected", "-1.0"]),
    ({"nonfinite": "ignore"}, ValueError, ["nonfinite: expected one of", "'ignore'"]),
    ({"backend": "tpu"}, ValueError, ["backend: expected one of", "'tpu'"]),
    ({"differentiable": True}, ValueError, ["differentiable=True", "torch.optim"]),
]


@every_backend
@pytest.mark.parametrize(("change", "error", "fragments"), INVALID, ids=[repr(c) for c, _, _ in INVALID])
def test_option_made_invalid(change, error, fragments, backend):
    model, opt = running(backend=backend)
    twin_model, twin = copy.deepcopy((model, opt))
    for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
        q.grad = p.grad.clone()
    group = opt.param_groups[0]
    valid = {k: group[k] for k in change}
    group.update(change)
    for _ in range(2):  # each time, not only the first
        with refuses(opt, error, *fragments):
            opt.step()
    group.update(valid)
    opt.step()
    twin.step()
    assert_same(opt, twin, EXACT)


def test_second_groups_option_is_checked_before_the_first_group_steps():
    model = small_model()
    opt = gradfused.SGD([{"params": model.conv.parameters()}, {"params": model.head.parameters()}], lr=0.1)
    train(model, opt, 1)
    opt.param_groups[1]["lr"] = NAN
    with refuses(opt, ValueError, "lr: expected", "nan"):
        opt.step()


def test_sgds_nesterov_switched_on_without_momentum():
    model = small_model()
    opt = gradfused.SGD(model.parameters(), lr=0.1)
    train(model, opt, 1)
    opt.param_groups[0]["nesterov"] = True
    with refuses(opt, ValueError, "nesterov=True", "momentum=0"):
        opt.step()


# ---- groups


@pytest.mark.parametrize(
    ("group", "error", "fragments"),
    [
        ({"lr": -1.0}, ValueError, ["lr: expected", "-1.0"]),
        ({"clip_nrom": 1.0}, TypeError, ["'clip_nrom'", "did you mean 'clip_norm'"]),
        ({"backend": "tpu"}, ValueError, ["backend: expected one of", "'tpu'"]),
        ({"differentiable": True}, ValueError, ["differentiable=True"]),
    ],
)
@pytest.mark.parametrize("used", [False, True])
def test_a_bad_group_is_not_added(group, error, fragments, used):
    model = small_model()
    opt = gradfused.AdamW(model.parameters())
    if used:
        train(model, opt, 1)
    with refuses(opt, error, *fragments):
        opt.add_param_group({"params": nn.Parameter(torch.ones(2)), **group})
    assert len(opt.param_groups) == 1
    opt.add_param_group({"params": nn.Parameter(torch.ones(2))})


def test_backends_mixed_in_groups():
    model = small_model()
    opt = gradfused.AdamW(
        [{"params": model.conv.parameters()}, {"params": model.head.parameters(), "backend": "reference"}]
    )
    loss_of(model, 0).backward()
    with refuses(opt, ValueError, "backend: expected the same in every parameter group", "auto, reference"):
        opt.step()
    opt.param_groups[0]["backend"] = "reference"
    recovers(opt)
