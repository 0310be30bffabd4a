"""Parameters without gradients may be of any kind, as in torch.optim: quantised weights, masks, lazy modules, views."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from cases import EMULATED_CUDA
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from twins import BACKENDS, every_backend, parameters, recovers, refuses, states
from wrapped_tensor import Wrapper

import gradfused

SHAPE = (2, 3)
DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


class Packed(nn.Parameter):
    """Weights of 4 bits as bitsandbytes keeps them: a subclass over bytes, with what is needed to unpack them."""

    scale: Tensor

    def __new__(cls) -> Packed:
        self = torch.Tensor._make_subclass(cls, torch.zeros(3, 1, dtype=torch.uint8), False)
        self.scale = torch.ones(3)
        return self


def quantised() -> Tensor:
    with warnings.catch_warnings():  # newer versions of torch want another library for it
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(SHAPE), 0.5, 0, torch.qint8)


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


KINDS = {
    **{str(dtype).removeprefix("torch."): lambda d=dtype: frozen(torch.zeros(SHAPE).to(d)) for dtype in DTYPES},
    "qint8": lambda: frozen(quantised()),
    "packed": Packed,
    "wrapped": lambda: Wrapper(torch.zeros(SHAPE, dtype=torch.float8_e4m3fn)),
    "sparse": lambda: frozen(torch.eye(3).to_sparse()),
    "meta": lambda: frozen(torch.zeros(SHAPE, device="meta")),
    "expanded": lambda: frozen(torch.ones(1).expand(SHAPE)),
    "uninitialised": nn.UninitializedParameter,
    "uninitialised, frozen": lambda: nn.UninitializedParameter(requires_grad=False),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("backend", [*BACKENDS, EMULATED_CUDA, "triton"])
@every_kind
def test_steps_beside_a_parameter_of_another_kind(kind, backend):
    """Construction, steps, saving, loading and adding a group work as with torch's optimizer."""
    ours, theirs = ([nn.Parameter(torch.ones(SHAPE)), KINDS[kind]()] for _ in range(2))
    opt, twin = gradfused.AdamW(ours, lr=0.1, backend=backend), torch.optim.AdamW(theirs, lr=0.1)
    late, twins_late = KINDS[kind](), KINDS[kind]()
    for optimizer, params, more in ((opt, ours, late), (twin, theirs, twins_late)):
        for step in range(3):
            params[0].grad = torch.full(SHAPE, 0.5 + step)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            if step == 1:
                optimizer.add_param_group({"params": [more]})
    torch.testing.assert_close(ours[0], theirs[0])
    assert (
        [set(s) for s in states(opt)]
        == [set(s) for s in states(twin)]
        == [{"step", "exp_avg", "exp_avg_sq"}, set(), set()]
    )
    assert [p is q for p, q in zip(parameters(opt), [*ours, late], strict=True)] == [True] * 3


def test_sharpness_aware_steps_beside_a_frozen_parameter():
    p = nn.Parameter(torch.ones(SHAPE))
    sam = gradfused.SAM(gradfused.SGD([p, frozen(torch.zeros(SHAPE).to(torch.int8))], lr=0.1))
    p.grad = torch.ones(SHAPE)
    sam.first_step()
    sam.second_step()
    torch.testing.assert_close(p.detach(), torch.full(SHAPE, 0.9))


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_refused_when_it_has_a_gradient(dtype, backend):
    q = frozen(torch.zeros(SHAPE).to(dtype))
    p = nn.Parameter(torch.ones(SHAPE))
    opt = gradfused.AdamW([("w", p), ("codes", q)], backend=backend)
    p.grad = torch.ones(SHAPE)
    q.grad = torch.zeros(SHAPE).to(dtype)
    with refuses(opt, TypeError, "parameter 'codes' ", str(dtype)):
        opt.step()
    q.grad = None
    opt.step()
    assert float(opt.state[p]["step"]) == 1


def test_what_requires_a_gradient_is_refused_at_construction():
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match=f"parameter 'w' .*{dtype}"):
            gradfused.AdamW([("w", nn.Parameter(torch.zeros(2).to(dtype)))])


@every_backend
def test_a_lazy_module_initialised_after_its_optimizer(backend):
    """The parameter becomes another kind in place, and is stepped from then on, as torch's is."""
    outcomes = []
    for library, more in ((gradfused, {"backend": backend}), (torch.optim, {})):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(2))
        opt = library.AdamW(model.named_parameters(), lr=0.1, **more)
        opt.step()
        assert all(map(is_lazy, parameters(opt)))
        x = torch.randn(4, 5)
        model(x)
        with torch.no_grad():  # torch draws the weights in the first call
            for i, p in enumerate(model.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p) + i)
        for _ in range(2):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
        outcomes.append([p.detach() for p in model.parameters()])
    for mine, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, other)


def test_state_of_an_initialised_model_loads_beside_a_lazy_one():
    """It loads as into torch's optimizer. Whether the shapes fit is known only later, and the step checks it."""
    model = nn.Linear(5, 3)
    opt = gradfused.AdamW(model.parameters())
    model(torch.ones(2, 5)).sum().backward()
    opt.step()
    lazy = nn.LazyLinear(3)
    other = gradfused.AdamW(lazy.parameters())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    lazy(torch.ones(2, 5)).sum().backward()
    other.step()
    assert {float(s["step"]) for s in states(other)} == {2.0}


@every_backend
def test_frozen_views_of_one_another_are_refused_once_both_have_gradients(backend):
    whole = frozen(torch.ones(4))
    part = frozen(whole.detach()[1:3])
    opt = gradfused.AdamW([("whole", whole), ("part", part)], backend=backend)
    whole.grad = torch.ones(4)
    opt.step()
    part.grad = torch.ones(2)
    with refuses(opt, ValueError, "'whole' and ", "'part' overlap in memory"):
        opt.step()
    part.data = torch.ones(2)
    recovers(opt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dtype_is_asked_for_once(dtype):
    """The message is not "expected torch.float32 or torch.float32"."""
    p = nn.Parameter(torch.ones(2, dtype=dtype))
    opt = gradfused.AdamW([p])
    p.grad = torch.ones(2, dtype=dtype)
    p.grad.data = torch.ones(2, dtype=torch.float16)
    expected = {torch.float32: "expected torch.float32", torch.float64: "expected torch.float64 or torch.float32"}
    with pytest.raises(TypeError, match=f"has dtype torch.float16, {expected[dtype]}$"):
        opt.step()
