"""Weights and gradients that change between two steps are noticed: memory, layouts, shapes, dtypes, absence."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from twins import (
    EXACT,
    TOLERANCE,
    assert_same,
    assert_twins,
    every_backend,
    every_rule,
    loss_of,
    matrix_steps,
    parameters,
    small_model,
    train,
)

import gradfused


@every_backend
@every_rule
def test_data_replaced(variant, backend):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        train(model, opt, 2)
        old = [p.data for p in model.parameters()]
        kept = [t.clone() for t in old]
        for p in model.parameters():
            p.data = p.data.clone() + 0.01
        train(model, opt, 2, start=2)
        for was, now in zip(kept, old, strict=True):
            assert torch.equal(was, now)
        return model, opt

    assert_twins(scenario, variant, backend=backend)


@every_backend
@pytest.mark.parametrize("variant", ["sgd_momentum", "adamw"])
def test_channels_last_between_steps(variant, backend):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        for start, layout in ((0, torch.contiguous_format), (2, torch.channels_last), (4, torch.contiguous_format)):
            model.to(memory_format=layout)
            train(model, opt, 2, start=start)
        return model, opt

    assert_twins(scenario, variant, backend=backend)


@every_backend
def test_channels_last_from_the_start(backend):
    def scenario(make):
        model = small_model().to(memory_format=torch.channels_last)
        opt = make(model.parameters())
        train(model, opt, 3)
        return model, opt

    opt = assert_twins(scenario, "adamw_amsgrad", backend=backend)
    assert opt.state[parameters(opt)[0]]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


def transpose_gradient(p):
    """Make the gradient a transposed view of the same memory."""
    p.grad = p.grad.t()


def gradient_in_other_memory(p):
    p.grad = p.grad.clone() * 2


def gradient_with_gaps(p):
    p.grad = torch.arange(2.0 * p.numel()).reshape(*p.shape, 2)[..., 0]


def expanded_gradient(p):
    p.grad = torch.tensor([[1.0], [2.0], [3.0], [4.0]]).expand(p.shape)


def gradient_expanded_at_the_same_address(p):
    p.grad = p.grad[:1].expand(p.shape)


def gradient_as_reversed_strides(p):
    p.grad = torch.randn(p.shape[::-1], generator=torch.Generator().manual_seed(5)).t()


def weight_transposed_in_place(p):
    p.data = p.data.t()


def weight_and_gradient_transposed_in_place(p):
    p.data = p.data.t()
    p.grad = p.grad.t()


def weight_in_other_memory_and_layout(p):
    p.data = p.data.t().contiguous().t()


@every_backend
@pytest.mark.parametrize(
    "changes",
    [
        [transpose_gradient],
        [transpose_gradient, transpose_gradient],
        [gradient_in_other_memory, gradient_with_gaps, gradient_in_other_memory],
        [expanded_gradient, gradient_in_other_memory],
        [gradient_expanded_at_the_same_address, transpose_gradient],
        [gradient_as_reversed_strides, gradient_with_gaps],
        [weight_transposed_in_place],
        [weight_and_gradient_transposed_in_place],
        [weight_transposed_in_place, transpose_gradient, weight_transposed_in_place],
        [weight_in_other_memory_and_layout, gradient_in_other_memory],
    ],
    ids=lambda changes: "-".join(c.__name__ for c in changes),
)
@pytest.mark.parametrize("variant", ["sgd_momentum", "adamw"])
def test_layouts_changed_between_steps(variant, changes, backend):
    assert_twins(lambda make: matrix_steps(make, changes), variant, backend=backend)


@every_backend
def test_shape_changed_at_the_same_address(backend):
    """SGD without momentum has no state whose shape would not fit."""

    def scenario(make):
        memory = torch.arange(24.0).clone()
        p = nn.Parameter(memory[:16].view(4, 4))
        gradient = torch.ones(24)
        opt = make([p], weight_decay=0.0)
        p.grad = gradient[:16].view(4, 4)
        opt.step()
        for shape in ((2, 4), (4, 2), (3, 8), (6, 4)):
            numel = shape[0] * shape[1]
            p.grad = None
            p.data = memory[:numel].view(shape)
            p.grad = gradient[:numel].view(shape)
            opt.step()
        p.data = memory
        return nn.ParameterList([p]), opt

    assert_twins(scenario, "sgd", backend=backend)


@every_backend
def test_unit_length_changed_at_the_same_address(backend):
    """(4, 2) and (2, 4) have different rows to centralise."""
    memory, gradient = torch.zeros(8), torch.arange(8.0).square()
    p = nn.Parameter(memory.view(4, 2))
    p.grad = gradient.view(4, 2)
    opt = gradfused.SGD([p], lr=1.0, centralize=True, backend=backend)
    opt.step()
    memory.zero_()
    p.grad = None
    p.data = memory.view(2, 4)
    p.grad = gradient.view(2, 4)
    opt.step()
    wanted = p.grad - p.grad.mean(dim=1, keepdim=True)
    torch.testing.assert_close(p.detach(), -wanted)


@every_backend
def test_dtype_of_the_model_changed(backend):
    """After model.double() the old state still has the old dtype."""
    model = small_model()
    opt = gradfused.AdamW(model.parameters(), lr=0.01, backend=backend)
    train(model, opt, 2)
    exact = copy.deepcopy(model).double()
    twin = torch.optim.AdamW(exact.parameters(), lr=0.01)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    model.double()
    train(model, opt, 2, start=2)
    train(exact, twin, 2, start=2)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    for p, q in zip(parameters(opt), parameters(twin), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **TOLERANCE)


def test_zero_grad_frees_the_gradients():
    """No table, whether in use or kept for later, holds them."""
    import weakref

    for backend in ("cpu", "reference"):
        model = small_model()
        opt = gradfused.AdamW(model.parameters(), clip_norm=1.0, backend=backend)
        train(model, opt, 2)
        watched = [weakref.ref(p.grad.untyped_storage()) for p in model.parameters()]
        grads = [weakref.ref(p.grad) for p in model.parameters()]
        opt.zero_grad()
        assert all(ref() is None for ref in grads)
        assert all(ref() is None for ref in watched)


@every_backend
def test_gradients_that_come_and_go_in_turn(backend):
    """Adapters and mixtures of experts have many combinations of parameters with gradients, each of which returns."""

    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        names = [name for name, _ in model.named_parameters()]

        def drop(index):
            for bit, name in enumerate(names):
                if (index * 5 % 16) >> bit & 1:
                    model.get_parameter(name).grad = None

        train(model, opt, 20, before_step=drop)
        return model, opt

    assert_twins(scenario, "sgd_momentum", backend=backend)
    assert_twins(scenario, "adamw", backend=backend)


def test_many_models_share_nothing():
    """Tables belong to their optimizer: two take turns, over parameters at each other's former addresses."""
    models = [small_model() for _ in range(2)]
    opts = [gradfused.AdamW(m.parameters(), lr=0.01) for m in models]
    for index in range(4):
        for m, o in zip(models, opts, strict=True):
            train(m, o, 1, start=index)
    assert_same(*opts, EXACT)
    loss = loss_of(models[0], 9)
    assert torch.equal(loss, loss_of(models[1], 9))
