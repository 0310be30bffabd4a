"""What changes between two steps is noticed: tensors, layouts, state and options."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from twins import (
    TOLERANCE,
    assert_same,
    assert_twins,
    centralise,
    every_backend,
    every_rule,
    loss_of,
    parameters,
    small_model,
    states,
    train,
)

import gradfused

# ---- tensors


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


def matrix_steps(make, changes, shape=(4, 4)):
    """A step with a plain gradient, then one after each of ``changes(p, gradient)``."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    opt = make([p])
    p.grad = torch.randn(shape)
    opt.step()
    for change in changes:
        change(p)
        opt.step()
    return nn.ParameterList([p]), opt


def transpose_gradient(p):
    """The same memory, read the other way."""
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
    """SGD without momentum has no state that would object."""

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
    """(4, 2) and (2, 4) have other rows to centralise."""
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
    """As after model.double(): old state has the old dtype."""
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
    """No table, current or kept, holds on to them."""
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


# ---- state


@every_backend
@pytest.mark.parametrize("how", ["replaced", "data swapped", "in place", "layout"])
@pytest.mark.parametrize("variant", ["sgd_momentum", "adam_amsgrad"])
def test_state_changed_by_hand(variant, how, backend):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        train(model, opt, 2)
        for p in model.parameters():
            for key, value in opt.state[p].items():
                if key == "step":
                    continue
                if how == "replaced":
                    opt.state[p][key] = value * 0.5
                elif how == "data swapped":
                    value.data = value.data * 0.5
                elif how == "in place":
                    value.mul_(0.5)
                elif value.dim() == 4:
                    opt.state[p][key] = value.contiguous(memory_format=torch.channels_last)
        train(model, opt, 2, start=2)
        return model, opt

    assert_twins(scenario, variant, backend=backend)


@every_backend
def test_square_state_replaced_by_its_transposed_view(backend):
    def scenario(make):
        def transpose(p):
            state = opt_of[0].state[p]
            state |= {key: value.t() for key, value in state.items() if key != "step"}

        opt_of = []

        def remember(params, **options):
            opt_of[:] = [make(params, **options)]
            return opt_of[0]

        return matrix_steps(remember, [transpose, transpose])

    assert_twins(scenario, "adamw", backend=backend)


@every_backend
@pytest.mark.parametrize("value", [torch.tensor(7.0), torch.tensor(7.0, dtype=torch.float64), "in place"])
def test_step_count_changed_by_hand(value, backend):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        train(model, opt, 2)
        for p in model.parameters():
            if isinstance(value, str):
                opt.state[p]["step"].fill_(7.0)
            else:
                opt.state[p]["step"] = value.clone()
        train(model, opt, 2, start=2)
        return model, opt

    opt = assert_twins(scenario, "adamw", backend=backend)
    assert {float(s["step"]) for s in states(opt)} == {9.0}


@every_backend
@every_rule
@pytest.mark.parametrize("whole", [True, False])
def test_state_deleted(variant, whole, backend):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        train(model, opt, 2)
        if whole:
            opt.state.clear()
        else:
            opt.state.pop(model.head.weight, None)
        train(model, opt, 2, start=2)
        return model, opt

    assert_twins(scenario, variant, backend=backend)


# ---- options. torch's twin gets what they mean by hand


def trained_with_changes(make_ours, make_theirs, changes, steps=2):
    """Ours after changed options against torch after the same done to its options or gradients by hand."""
    model, twin_model = small_model(), small_model()
    ours, theirs = make_ours(model.parameters()), make_theirs(twin_model.parameters())
    start = 0
    for change_ours, change_theirs, by_hand in changes:
        change_ours(ours.param_groups[0])
        change_theirs(theirs.param_groups[0])
        train(model, ours, steps, start=start)
        train(
            twin_model,
            theirs,
            steps,
            start=start,
            before_step=lambda index, by_hand=by_hand: by_hand(list(twin_model.parameters())),
        )
        start += steps
    return ours, theirs


def nothing(*_):
    return None


@every_backend
@pytest.mark.parametrize(
    "changes",
    [
        [("momentum", 0.9), ("momentum", 0.5)],
        [("momentum", 0.9), ("nesterov", True), ("nesterov", False)],
        [("lr", 0.5), ("weight_decay", 0.1), ("maximize", True), ("maximize", False)],
    ],
)
def test_sgds_options_changed(changes, backend):
    steps = [(nothing, nothing, nothing)]
    for key, value in changes:
        steps.append((*[lambda group, k=key, v=value: group.update({k: v})] * 2, nothing))
    ours, theirs = trained_with_changes(
        lambda p: gradfused.SGD(p, lr=0.1, backend=backend), lambda p: torch.optim.SGD(p, lr=0.1), steps
    )
    assert_same(ours, theirs)


def test_momentum_switched_off_keeps_its_buffer():
    def scenario(make):
        model = small_model()
        opt = make(model.parameters(), dampening=0.0)
        for start, momentum in ((0, 0.9), (2, 0.0), (4, 0.9)):
            opt.param_groups[0]["momentum"] = momentum
            train(model, opt, 2, start=start)
        return model, opt

    assert_twins(scenario, "sgd_momentum")


@every_backend
def test_adams_options_changed(backend):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        for index, change in enumerate(
            [{"betas": (0.5, 0.9)}, {"eps": 0.1}, {"weight_decay": 0.5}, {"maximize": True}, {"lr": 0.5}]
        ):
            train(model, opt, 2, start=2 * index)
            opt.param_groups[0].update(change)
        train(model, opt, 2, start=20)
        return model, opt

    assert_twins(scenario, "adamw", backend=backend)
    assert_twins(scenario, "adam_amsgrad", backend=backend)


@every_backend
def test_amsgrad_switched_on(backend):
    """torch fails for want of max_exp_avg_sq; ours starts it at zero, so the first maximum is the present second moment."""
    model, twin_model = small_model(), small_model()
    ours = gradfused.AdamW(model.parameters(), lr=0.01, backend=backend)
    theirs = torch.optim.AdamW(twin_model.parameters(), lr=0.01)
    train(model, ours, 2)
    train(twin_model, theirs, 2)
    ours.param_groups[0]["amsgrad"] = theirs.param_groups[0]["amsgrad"] = True
    for p in twin_model.parameters():
        theirs.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)
    train(model, ours, 3, start=2)
    train(twin_model, theirs, 3, start=2)
    assert_same(ours, theirs)
    ours.param_groups[0]["amsgrad"] = theirs.param_groups[0]["amsgrad"] = False
    train(model, ours, 1, start=5)
    train(twin_model, theirs, 1, start=5)
    assert_same(ours, theirs)


@every_backend
def test_centralize_switched_on_and_off(backend):
    ours, theirs = trained_with_changes(
        lambda p: gradfused.AdamW(p, lr=0.01, backend=backend),
        lambda p: torch.optim.AdamW(p, lr=0.01),
        [
            (nothing, nothing, nothing),
            (lambda group: group.update(centralize=True), nothing, centralise),
            (
                lambda group: group.update(centralize="conv"),
                nothing,
                lambda params: centralise(p for p in params if p.dim() == 4),
            ),
            (lambda group: group.update(centralize=False), nothing, nothing),
        ],
    )
    assert_same(ours, theirs)


@every_backend
def test_clip_norm_switched_on_moved_and_off(backend):
    ours, theirs = trained_with_changes(
        lambda p: gradfused.AdamW(p, lr=0.01, backend=backend),
        lambda p: torch.optim.AdamW(p, lr=0.01),
        [
            (nothing, nothing, nothing),
            (lambda group: group.update(clip_norm=0.5), nothing, lambda params: nn.utils.clip_grad_norm_(params, 0.5)),
            (lambda group: group.update(clip_norm=0.1), nothing, lambda params: nn.utils.clip_grad_norm_(params, 0.1)),
            (
                lambda group: group.update(clip_norm=None, perturb="clip", radius=0.1, norm_scope="param"),
                nothing,
                lambda params: [nn.utils.clip_grad_norm_(p, 0.1) for p in params],
            ),
            (
                lambda group: group.update(perturb=None, clip_value=0.01),
                nothing,
                lambda params: nn.utils.clip_grad_value_(params, 0.01),
            ),
            (lambda group: group.update(clip_value=None), nothing, nothing),
        ],
    )
    assert_same(ours, theirs)


@every_backend
def test_reverse_switched_on_and_off(backend):
    def reverse(params):
        for p in params:
            p.grad.mul_(-0.5)

    ours, theirs = trained_with_changes(
        lambda p: gradfused.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, backend=backend),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        [
            (nothing, nothing, nothing),
            (lambda group: group.update(reverse=0.5), nothing, reverse),
            (lambda group: group.update(reverse=None), nothing, nothing),
        ],
    )
    assert_same(ours, theirs)


@every_backend
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_noise_switched_on_and_off(name, backend):
    """Steps with noise differ from those without; off again, the run goes on as torch's from there."""
    model = small_model()
    opt = getattr(gradfused, name)(model.parameters(), lr=0.01, backend=backend)
    train(model, opt, 2)
    quiet = copy.deepcopy((model, opt))
    opt.param_groups[0]["noise"] = 0.5
    train(model, opt, 2, start=2)
    train(*quiet, 2, start=2)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), quiet[0].parameters(), strict=True))
    assert {int(s["step"]) for s in states(opt)} == {2 if name == "SGD" else 4}  # SGD counts while there is noise
    opt.param_groups[0]["noise"] = 0.0
    twin_model = copy.deepcopy(model)
    twin = getattr(torch.optim, name)(twin_model.parameters(), lr=0.01)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, 2, start=4)
    train(twin_model, twin, 2, start=4)
    assert_same(opt, twin)


def test_seed_and_noise_decay_changed():
    def run(**change):
        model = small_model()
        opt = gradfused.SGD(model.parameters(), lr=0.1, noise=1.0)
        train(model, opt, 1)
        opt.param_groups[0].update(change)
        train(model, opt, 1, start=1)
        return model.head.weight.detach()

    plain = run()
    assert torch.equal(plain, run())
    assert not torch.equal(plain, run(seed=1))
    assert not torch.equal(plain, run(noise_decay=2.0))


def test_backend_changed():
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        for index, backend in enumerate(("cpu", "reference", "auto", "reference")):
            opt.param_groups[0]["backend"] = backend
            train(model, opt, 2, start=2 * index)
        return model, opt

    for variant in ("sgd_momentum", "adamw"):
        assert_twins(scenario, variant)


@every_backend
def test_gradients_that_come_and_go_in_turn(backend):
    """Adapters, mixtures of experts: many combinations of parameters, each returning."""

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


@every_backend
def test_options_changed_while_a_parameter_is_away(backend):
    def scenario(make):
        model = small_model()
        opt = make(model.parameters())
        for index in range(6):
            opt.param_groups[0]["lr"] = 0.01 * (index + 1)
            train(
                model,
                opt,
                1,
                start=index,
                before_step=lambda i: i % 2 and setattr(model.head.weight, "grad", None),
            )
        return model, opt

    assert_twins(scenario, "adamw", backend=backend)


@every_backend
def test_options_of_two_groups_exchanged(backend):
    def scenario(make):
        model = small_model()
        opt = make([{"params": model.conv.parameters(), "lr": 0.1}, {"params": model.head.parameters(), "lr": 0.001}])
        train(model, opt, 2)
        opt.param_groups.reverse()
        train(model, opt, 2, start=2)
        first, second = opt.param_groups
        first["lr"], second["lr"] = second["lr"], first["lr"]
        train(model, opt, 2, start=4)
        opt.param_groups.reverse()
        return model, opt

    assert_twins(scenario, "adamw", backend=backend)


@every_backend
def test_keys_of_the_users_own_in_a_group(backend):
    def scenario(make):
        model = small_model()
        opt = make([{"params": model.parameters(), "name": "everything", "schedule": {"warmup": 3}}])
        train(model, opt, 2)
        opt.param_groups[0]["note"] = "added later"
        train(model, opt, 2, start=2)
        return model, opt

    opt = assert_twins(scenario, "adamw", backend=backend)
    assert opt.param_groups[0]["note"] == "added later"


def test_many_models_share_nothing():
    """Tables belong to their optimizer: two in turn, over parameters at each other's old addresses."""
    models = [small_model() for _ in range(2)]
    opts = [gradfused.AdamW(m.parameters(), lr=0.01) for m in models]
    for index in range(4):
        for m, o in zip(models, opts, strict=True):
            train(m, o, 1, start=index)
    assert_same(opts[0], opts[1], {"rtol": 0, "atol": 0})
    loss = loss_of(models[0], 9)
    assert torch.equal(loss, loss_of(models[1], 9))
