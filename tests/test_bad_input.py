"""What a step cannot work on is refused, by name and with the remedy, before anything has changed; what only looks odd works."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from twins import (
    assert_same,
    every_backend,
    loss_of,
    parameters,
    refuses,
    small_model,
    states,
    train,
    unchanged,
)

import gradfused
from gradfused.rows import check_gradient

EXACT = {"rtol": 0, "atol": 0}
NAN = float("nan")


def named(*tensors, cls=gradfused.AdamW, **options):
    """An optimizer over parameters called a, b, c with gradients of ones."""
    params = [t if isinstance(t, nn.Parameter) else nn.Parameter(t) for t in tensors]
    for p in params:
        p.grad = torch.ones_like(p)
    return cls(list(zip("abcdef", params, strict=False)), **options), params


def recovers(opt):
    """Once mended, the optimizer steps every parameter."""
    before = [p.detach().clone() for p in parameters(opt)]
    opt.step()
    assert all(not torch.equal(p, b) for p, b in zip(parameters(opt), before, strict=True))


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
    for _ in range(2):  # not only the first time
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


# ---- parameters


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameter(dtype):
    with pytest.raises(TypeError, match=r"parameter 'b' is complex \(torch.complex.*torch.view_as_real"):
        named(torch.ones(2), torch.ones(2, dtype=dtype))
    opt, _ = named(torch.ones(2))
    with refuses(opt, TypeError, "parameter 'z' is complex", "view_as_real"):
        opt.add_param_group({"params": [("z", nn.Parameter(torch.ones(2, dtype=dtype)))]})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_parameter_of_another_dtype(dtype):
    p = nn.Parameter(torch.zeros(2).to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match=f"parameter 0 of group 0 has dtype {dtype}, expected one of float32, float64"):
        gradfused.SGD([p])


def test_sparse_parameter():
    p = nn.Parameter(torch.eye(3).to_sparse())
    with pytest.raises(
        TypeError, match=r"parameter 'w' has layout torch.sparse_coo, expected a dense tensor: call .to_dense"
    ):
        gradfused.SGD([("w", p)])


@every_backend
def test_parameter_made_complex_between_steps(backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(3), backend=backend)
    opt.step()
    valid, grad = q.data, q.grad
    q.grad = None
    q.data = torch.ones(3, dtype=torch.complex64)
    q.grad = torch.ones(3, dtype=torch.complex64)
    with refuses(opt, TypeError, "parameter 'b' is complex", "view_as_real"):
        opt.step()
    q.grad = None
    q.data, q.grad = valid, grad
    recovers(opt)


@every_backend
def test_meta_parameter(backend):
    """May be given to an optimizer, as deferred initialisation does, but not stepped."""
    model = small_model().to("meta")
    opt = gradfused.AdamW(model.named_parameters(), backend=backend)
    opt.step()  # no gradient: nothing to do
    model.head.bias.grad = torch.ones(5, device="meta")
    with refuses(opt, ValueError, "parameter 'head.bias' is on the meta device", "to_empty"):
        opt.step()


# ---- gradients


@every_backend
def test_sparse_gradient(backend):
    model = nn.Embedding(5, 3, sparse=True)
    opt = gradfused.SGD(model.named_parameters(), lr=0.1, backend=backend)
    model(torch.tensor([1, 2])).sum().backward()
    with refuses(opt, TypeError, "gradient of parameter 'weight' is sparse", "sparse=False", ".to_dense()"):
        opt.step()
    model.weight.grad = model.weight.grad.to_dense()
    opt.step()
    assert opt.skipped_steps == 0


@every_backend
def test_gradient_that_becomes_sparse(backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(3, 2), backend=backend)
    opt.step()
    dense = q.grad
    q.grad = None
    q.grad = dense.to_sparse()
    with refuses(opt, TypeError, "gradient of parameter 'b' is sparse", ".to_dense()"):
        opt.step()
    q.grad = None
    q.grad = dense
    recovers(opt)


@every_backend
@pytest.mark.parametrize("after_a_step", [False, True])
@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 2), (4, 3), (0, 3)])
def test_gradient_of_another_shape(shape, after_a_step, backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(2, 3), backend=backend)
    if after_a_step:
        opt.step()
    valid = q.data
    q.data = torch.ones(shape)  # torch refuses to assign such a gradient, but not such weights
    with refuses(opt, ValueError, "gradient of parameter 'b' has shape (2, 3)", f"expected the parameter's {shape}"):
        opt.step()
    q.data = valid
    recovers(opt)


def test_gradient_on_another_device():
    """torch itself refuses every way to get there but exotic ones, so the check is called by itself."""
    with pytest.raises(ValueError, match="gradient of parameter 'b' is on meta, expected it on the parameter's cpu"):
        check_gradient("'b'", torch.ones(2, 3), torch.ones(2, 3, device="meta"))


@every_backend
def test_gradient_of_another_dtype(backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(3), backend=backend)
    opt.step()
    valid = q.data
    q.data = torch.ones(3, dtype=torch.float16)
    q.grad.data = torch.ones(3, dtype=torch.float64)
    with refuses(opt, TypeError, "gradient of parameter 'b' has dtype torch.float64", "torch.float16 or torch.float32"):
        opt.step()
    q.data, q.grad.data = valid, torch.ones(3)
    recovers(opt)


@every_backend
def test_complex_gradient(backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(3), backend=backend)
    opt.step()
    q.grad.data = torch.ones(3, dtype=torch.complex64)
    with refuses(opt, TypeError, "gradient of parameter 'b' is complex"):
        opt.step()
    q.grad.data = torch.ones(3)
    recovers(opt)


@every_backend
def test_lazily_negated_gradient(backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(3), backend=backend)
    q.grad = torch._neg_view(torch.ones(3))
    with refuses(opt, ValueError, "parameter 'b'", ".resolve_neg()"):
        opt.step()
    q.grad = q.grad.resolve_neg()
    recovers(opt)


# ---- memory


def overlapping():
    base = torch.arange(24.0)
    return {
        "the same": (base[:6], base[:6]),
        "a view inside": (base, base[4:8]),
        "partly": (base[:6], base[5:11]),
        "another shape": (base.view(4, 6), base.view(6, 4)[2]),
        "rows and a column": (base.view(4, 6)[1], base.view(4, 6)[:, 2]),
        "columns that meet": (base.view(4, 6)[:, :3], base.view(4, 6)[:, 2:]),
        "other dtypes": (base, base.view(torch.float16)[3:5]),
        "in reverse": (base[5:11], base[:6]),
    }


@pytest.mark.parametrize("name", overlapping())
@pytest.mark.parametrize("later", [False, True])
def test_overlapping_parameters(name, later):
    a, b = (nn.Parameter(t) for t in overlapping()[name])
    if not later:
        with pytest.raises(
            ValueError, match=r"parameter '.' and parameter '.' overlap in memory: pass the tensor that holds"
        ):
            gradfused.SGD([("a", a), ("b", b)])
        return
    opt = gradfused.SGD([("a", a)])
    with refuses(opt, ValueError, "'a'", "'b'", "overlap in memory"):
        opt.add_param_group({"params": [("b", b)]})
    assert len(opt.param_groups) == 1


@every_backend
def test_parameters_made_to_overlap_between_steps(backend):
    opt, (p, q) = named(torch.ones(6), torch.ones(3), backend=backend)
    opt.step()
    valid = q.data
    q.data = p.data[2:5]
    with refuses(opt, ValueError, "parameter 'a'", "parameter 'b'", "overlap in memory"):
        opt.step()
    q.data = valid
    recovers(opt)


@every_backend
def test_state_that_overlaps(backend):
    opt, (p, q) = named(torch.ones(6), torch.ones(6), backend=backend)
    opt.step()
    valid = opt.state[q]["exp_avg"]
    for other, what in ((opt.state[p]["exp_avg"], "exp_avg of parameter 'a'"), (p.data, "parameter 'a'")):
        opt.state[q]["exp_avg"] = other
        with refuses(opt, ValueError, what, "exp_avg of parameter 'b'", "overlap in memory"):
            opt.step()
    opt.state[q]["exp_avg"] = valid
    recovers(opt)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(1).expand(4),
        lambda: torch.ones(3, 1).expand(3, 4),
        lambda: torch.arange(10.0).as_strided((4, 3), (2, 1)),
        lambda: torch.arange(10.0).unfold(0, 4, 2),
    ],
)
def test_parameter_that_overlaps_itself(make):
    with pytest.raises(ValueError, match=r"parameter 'w' overlaps itself \(shape .*, strides .*\): pass a .clone\(\)"):
        gradfused.SGD([("w", nn.Parameter(make()))])


def interleaved():
    base = torch.arange(24.0)
    return {
        "columns": (base.view(4, 6)[:, :3], base.view(4, 6)[:, 3:]),
        "every other": (base[::2], base[1::2]),
        "two of three": (base[::3], base[1::3]),
        "quarters": (
            base.view(4, 6)[:2, :3],
            base.view(4, 6)[:2, 3:],
            base.view(4, 6)[2:, :3],
            base.view(4, 6)[2:, 3:],
        ),
        "neighbours": (base[:6], base[6:12], base[12:]),
        "with an empty one": (base, base[3:3]),
    }


@every_backend
@pytest.mark.parametrize("name", interleaved())
def test_interleaved_parameters_are_fine(name, backend):
    """Each gets its own update; nothing between them is touched."""
    views, twins = interleaved()[name], [t.clone() for t in interleaved()[name]]
    results = []
    for tensors in (views, twins):
        opt, params = named(*tensors, lr=0.5, backend=backend)
        for scale, p in enumerate(params, start=1):
            p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape) * scale
        opt.step()
        opt.step()
        results.append(opt)
    assert_same(*results, EXACT)


@every_backend
def test_odd_but_valid_tensors(backend):
    """Empty, 0-dim, strided, off the vector's alignment, and with expanded gradients."""
    tensors = [
        torch.zeros(0, 3),
        torch.tensor(2.0),
        torch.zeros(4, 10)[:, ::3],
        torch.zeros(3, 1, 2).transpose(0, 2),
        torch.arange(9.0)[1:8],
    ]
    opts = []
    for values in (tensors, [t.clone(memory_format=torch.contiguous_format) for t in tensors]):
        opt, params = named(*values, lr=0.1, clip_norm=0.5, centralize=True, backend=backend)
        for p in params:
            p.grad = torch.tensor(3.0).expand(p.shape) if p.dim() < 2 else torch.arange(float(p.numel())).view(p.shape)
        opt.step()
        opts.append(opt)
    assert_same(*opts)


# ---- state


BROKEN = [
    (
        "exp_avg",
        torch.zeros(7),
        ["state 'exp_avg' of parameter 'b'", "expected a dense floating tensor of shape (2, 3)", "(7,)"],
    ),
    ("exp_avg", torch.zeros(3, 2), ["'exp_avg'", "(2, 3)", "(3, 2)"]),
    ("exp_avg_sq", 0.5, ["'exp_avg_sq' of parameter 'b'", "got 0.5"]),
    ("exp_avg_sq", [0.0] * 6, ["'exp_avg_sq'", "got [0.0"]),
    ("exp_avg_sq", torch.zeros(2, 3, dtype=torch.int64), ["'exp_avg_sq'", "torch.int64"]),
    ("exp_avg_sq", torch.zeros(2, 3, dtype=torch.complex64), ["'exp_avg_sq'", "torch.complex64"]),
    ("exp_avg_sq", torch.zeros(2, 3, device="meta"), ["'exp_avg_sq'", "on cpu", "meta"]),
    ("exp_avg_sq", torch.zeros(2, 3).to_sparse(), ["'exp_avg_sq'", "sparse_coo"]),
    ("step", "three", ["state 'step' of parameter 'b'", "'three'"]),
    ("step", torch.zeros(2), ["'step'", "one-element"]),
]


@every_backend
@pytest.mark.parametrize(("key", "value", "fragments"), BROKEN, ids=[f"{k}-{i}" for i, (k, _, _) in enumerate(BROKEN)])
def test_corrupted_state(key, value, fragments, backend):
    opt, (_, q) = named(torch.ones(2), torch.ones(2, 3), backend=backend)
    opt.step()
    valid = opt.state[q][key]
    opt.state[q][key] = value
    with refuses(opt, ValueError, *fragments):
        opt.step()
    opt.state[q][key] = valid
    recovers(opt)
    assert [float(s["step"]) for s in states(opt)] == [2.0, 2.0]


@every_backend
def test_state_that_is_missing_in_part_is_made_again(backend):
    """As torch does for max_exp_avg_sq in old checkpoints: a key that is not there starts at zero."""
    opt, (_, q) = named(torch.ones(2), torch.ones(2, 3), backend=backend)
    opt.step()
    del opt.state[q]["exp_avg"]
    opt.step()
    assert opt.state[q]["exp_avg"].shape == (2, 3)
    assert [float(s["step"]) for s in states(opt)] == [2.0, 2.0]


@every_backend
def test_state_made_before_the_refusal_is_taken_back(backend):
    """The first parameter's state exists by the time the second is found bad."""
    opt, (p, q) = named(torch.ones(2), torch.ones(2, 3), backend=backend)
    opt.state[q]["exp_avg"] = torch.zeros(5)
    with refuses(opt, ValueError, "'exp_avg'", "(5,)"):
        opt.step()
    assert p not in opt.state or not opt.state[p]
    opt.state.clear()
    recovers(opt)


@every_backend
def test_a_step_count_read_before_the_refusal_stays_as_it_was(backend):
    """A plain number becomes a tensor in a step that is taken only."""
    opt, (p, q) = named(torch.ones(2), torch.ones(2, 3), backend=backend)
    opt.step()
    opt.state[p]["step"] = 1
    valid = opt.state[q].pop("exp_avg")
    opt.state[q]["exp_avg"] = torch.zeros(5)
    with refuses(opt, ValueError, "'exp_avg'", "(5,)"):
        opt.step()
    assert opt.state[p]["step"] == 1
    assert isinstance(opt.state[p]["step"], int)
    opt.state[q]["exp_avg"] = valid
    recovers(opt)
    assert [float(s["step"]) for s in states(opt)] == [2.0, 2.0]


# ---- after a refusal


@every_backend
def test_a_bad_gradient_in_the_last_of_many(backend):
    opt, params = named(*(torch.ones(2, 3) for _ in range(6)), clip_norm=1.0, backend=backend)
    params[-1].data = torch.ones(3, 2)
    with refuses(opt, ValueError, "'f'", "(2, 3)", "(3, 2)"):
        opt.step()


@every_backend
def test_a_failing_backend_changes_nothing(backend, monkeypatch):
    """Whatever a table raises while it is made, created state is taken back."""
    from gradfused.backends import _TABLES

    def fail(self, rows, settings):
        raise MemoryError("no room")

    opt, _ = named(torch.ones(2), torch.ones(3), backend=backend)
    with monkeypatch.context() as patch:
        patch.setattr(_TABLES[backend], "__init__", fail)
        with refuses(opt, MemoryError, "no room"):
            opt.step()
    assert not any(states(opt))
    with unchanged(opt):
        assert opt.skipped_steps == 0
    recovers(opt)
