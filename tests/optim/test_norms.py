"""grad_norm and grad_norms(): the norms that a step measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from twins import centralise, every_backend, loss_of, small_model, train

import gradfused


def gradient_norms(model):
    return {name: p.grad.double().norm() for name, p in model.named_parameters() if p.grad is not None}


@every_backend
@pytest.mark.parametrize("radius", [0.1, 1e6])
def test_equals_what_clip_grad_norm_returns(radius, backend):
    model, twin_model = small_model(), small_model()
    opt = gradfused.AdamW(model.parameters(), clip_norm=radius, backend=backend)
    twin = torch.optim.AdamW(twin_model.parameters())
    returned = []
    for index in range(3):
        train(
            twin_model,
            twin,
            1,
            start=index,
            before_step=lambda _: returned.append(nn.utils.clip_grad_norm_(twin_model.parameters(), radius)),
        )
        train(model, opt, 1, start=index)
        torch.testing.assert_close(opt.grad_norm, returned[-1].double(), rtol=1e-5, atol=0)


@every_backend
def test_what_it_is(backend):
    model = small_model()
    opt = gradfused.AdamW(model.parameters(), clip_norm=1.0, backend=backend)
    assert opt.grad_norm is None
    assert opt.grad_norms() == {}
    train(model, opt, 1)
    assert isinstance(opt.grad_norm, torch.Tensor)
    assert opt.grad_norm.shape == ()
    assert opt.grad_norm.dtype == torch.float64
    assert not opt.grad_norm.requires_grad
    assert opt.grad_norm.device == model.head.bias.device


@every_backend
def test_none_without_a_norm(backend):
    model = small_model()
    opt = gradfused.AdamW(model.parameters(), centralize=True, clip_value=1.0, noise=0.1, backend=backend)
    train(model, opt, 1)
    assert opt.grad_norm is None
    assert opt.grad_norms() == {}


@every_backend
@pytest.mark.parametrize(
    ("perturb", "scope"),
    [(p, s) for p in ("clip", "normalize", "amplify", "dampen") for s in ("global", "group", "param", "unit")]
    + [("agc", "unit")],
)
def test_every_scope_and_kind_by_name(perturb, scope, backend):
    model = small_model()
    opt = gradfused.AdamW(model.named_parameters(), perturb=perturb, radius=0.1, norm_scope=scope, backend=backend)
    for index in range(2):
        train(model, opt, 1, start=index)
        wanted = gradient_norms(model)
        norms = opt.grad_norms()
        assert list(norms) == ["conv.weight", "conv.bias", "head.weight", "head.bias"]
        for name, value in norms.items():
            assert value.shape == ()
            torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=0)
        torch.testing.assert_close(opt.grad_norm, torch.stack(list(wanted.values())).norm(), rtol=1e-6, atol=0)


def test_unnamed_parameters_are_called_by_their_place():
    model = small_model()
    opt = gradfused.SGD([{"params": model.conv.parameters()}, {"params": model.head.parameters()}], clip_norm=1.0)
    train(model, opt, 1)
    assert list(opt.grad_norms()) == ["0 of group 0", "1 of group 0", "0 of group 1", "1 of group 1"]


@every_backend
def test_is_of_the_centred_unperturbed_gradient(backend):
    model = small_model()
    opt = gradfused.SGD(
        model.named_parameters(),
        centralize=True,
        clip_norm=0.01,
        noise=9.0,
        reverse=3.0,
        clip_value=0.001,
        backend=backend,
    )
    train(model, opt, 1)
    norms, total = opt.grad_norms(), opt.grad_norm
    centralise(model.parameters())
    wanted = gradient_norms(model)
    for name, value in norms.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=0)
    torch.testing.assert_close(total, torch.stack(list(wanted.values())).norm(), rtol=1e-5, atol=0)


@every_backend
def test_only_groups_that_measure_count(backend):
    model = small_model()
    opt = gradfused.AdamW(
        [
            {"params": model.conv.named_parameters("conv"), "perturb": "clip", "radius": 0.1},
            {"params": model.head.named_parameters("head")},
        ],
        backend=backend,
    )
    train(model, opt, 1)
    wanted = gradient_norms(model)
    assert list(opt.grad_norms()) == ["conv.weight", "conv.bias"]
    torch.testing.assert_close(
        opt.grad_norm, torch.stack([wanted["conv.weight"], wanted["conv.bias"]]).norm(), rtol=1e-6, atol=0
    )


@every_backend
def test_only_parameters_with_a_gradient_count(backend):
    model = small_model()
    opt = gradfused.AdamW(model.named_parameters(), clip_norm=1.0, backend=backend)
    train(model, opt, 1)
    train(model, opt, 1, start=1, before_step=lambda _: setattr(model.conv.weight, "grad", None))
    assert list(opt.grad_norms()) == ["conv.bias", "head.weight", "head.bias"]
    torch.testing.assert_close(
        opt.grad_norm, torch.stack(list(gradient_norms(model).values())).norm(), rtol=1e-6, atol=0
    )


@every_backend
def test_skip_alone_measures(backend):
    model = small_model()
    opt = gradfused.AdamW(model.named_parameters(), nonfinite="skip", backend=backend)
    train(model, opt, 1)
    torch.testing.assert_close(
        opt.grad_norm, torch.stack(list(gradient_norms(model).values())).norm(), rtol=1e-6, atol=0
    )


@every_backend
def test_a_skipped_step_shows_what_it_saw(backend):
    model = small_model()
    opt = gradfused.AdamW(model.named_parameters(), clip_norm=1.0, nonfinite="skip", backend=backend)
    train(model, opt, 2)
    opt.zero_grad()
    loss_of(model, 2).backward()
    model.head.bias.grad[0] = float("nan")
    opt.step()
    assert torch.isnan(opt.grad_norm)
    assert torch.isnan(opt.grad_norms()["head.bias"])
    assert torch.isfinite(opt.grad_norms()["head.weight"])


@every_backend
def test_a_skipped_first_step_shows_what_it_saw(backend):
    model = small_model()
    opt = gradfused.AdamW(model.named_parameters(), clip_norm=1.0, nonfinite="skip", backend=backend)
    loss_of(model, 0).backward()
    model.head.bias.grad[0] = float("inf")
    opt.step()
    assert opt.skipped_steps == 1
    assert opt.grad_norm is not None
    assert torch.isinf(opt.grad_norms()["head.bias"])


@every_backend
def test_a_logged_norm_does_not_change_later(backend):
    model = small_model()
    opt = gradfused.AdamW(model.named_parameters(), clip_norm=1.0, backend=backend)
    train(model, opt, 1)
    norm, norms = opt.grad_norm, opt.grad_norms()
    kept = norm.item(), {k: v.item() for k, v in norms.items()}
    train(model, opt, 2, start=1)
    assert norm.item() == kept[0]
    assert {k: v.item() for k, v in norms.items()} == kept[1]


@every_backend
def test_a_norm_that_is_switched_off_is_gone(backend):
    model = small_model()
    opt = gradfused.AdamW(model.parameters(), clip_norm=1.0, backend=backend)
    train(model, opt, 1)
    opt.param_groups[0]["clip_norm"] = None
    train(model, opt, 1, start=1)
    assert opt.grad_norm is None


@every_backend
def test_a_group_without_gradients(backend):
    """Of two groups with norm_scope="group" one has no gradients."""
    model = small_model()
    groups = [{"params": model.conv.named_parameters("conv")}, {"params": model.head.named_parameters("head")}]
    opt = gradfused.AdamW(groups, perturb="clip", radius=0.1, norm_scope="group", backend=backend)
    model.conv.requires_grad_(False)
    train(model, opt, 1)
    assert list(opt.grad_norms()) == ["head.weight", "head.bias"]


@every_backend
def test_empty_and_scalar_parameters(backend):
    empty, scalar = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(2.0))
    opt = gradfused.SGD([("empty", empty), ("scalar", scalar)], lr=1.0, clip_norm=1.0, backend=backend)
    empty.grad, scalar.grad = torch.zeros(0, 3), torch.tensor(-5.0)
    opt.step()
    assert {k: v.item() for k, v in opt.grad_norms().items()} == {"empty": 0.0, "scalar": 5.0}
    assert opt.grad_norm.item() == 5.0
    assert scalar.item() == pytest.approx(3.0, rel=1e-5)
