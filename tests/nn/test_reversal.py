"""Gradient reversal as a function and as a layer: what it computes, under every transform, and what it costs."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import in_two_processes
from torch import Tensor, nn
from torch._dynamo.utils import counters

import gradfused
from gradfused.nn import GradientReversal, ReversalLinear, grad_reverse

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


# ---- what it computes


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 0, 2), (2, 3, 4)])
def test_forward_is_the_input_and_backward_minus_lambda_times(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = leaf(*shape, dtype=dtype)
    grad = leaf(*shape, dtype=dtype).detach() + 1
    y = grad_reverse(x, 0.3)
    y.backward(grad)
    assert torch.equal(y, x)
    assert x.grad is not None
    assert torch.equal(x.grad, -0.3 * grad)


@pytest.mark.parametrize("lambda_", [0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64)])
def test_forward_copies_and_saves_nothing_but_lambda(lambda_: float | Tensor) -> None:
    saved: list[Tensor] = []
    x = leaf(4, 5, dtype=torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = grad_reverse(x, lambda_)
    assert y.data_ptr() == x.data_ptr()
    assert y._base is x
    assert all(tensor.dim() == 0 for tensor in saved)
    assert len(saved) == isinstance(lambda_, Tensor)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, -0.25))


def test_any_layout_stays() -> None:
    x = leaf(2, 3, 4, 5).detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = grad_reverse(x)
    assert y.stride() == x.stride()
    y.square().sum().backward()
    assert torch.equal(x.grad, -2 * x.detach())


@given(st.floats(0, 1e3), st.floats(0, 1e3))
def test_two_reversals_multiply(first: float, second: float) -> None:
    x = leaf(3)
    grad_reverse(grad_reverse(x, first), second).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, first * second))


def test_moving_a_lambda_tensor_after_the_call_changes_nothing() -> None:
    x, lambda_ = leaf(3), torch.tensor(0.5)
    y = grad_reverse(x, lambda_)
    lambda_.fill_(100.0)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, -0.5))


def test_a_lambda_tensor_is_a_constant() -> None:
    x, lambda_ = leaf(3), torch.tensor(0.5, requires_grad=True)
    grad_reverse(x, lambda_).sum().backward()
    assert lambda_.grad is None


def test_an_input_without_gradient_passes() -> None:
    x = leaf(3).detach()
    y = GradientReversal()(x)
    assert not y.requires_grad
    y.add_(1)  # a view: the input moves along
    assert torch.equal(x, y)


def test_in_place_on_the_result_is_refused_not_wrong() -> None:
    x = leaf(3) * 1
    with pytest.raises(RuntimeError, match="view"):
        grad_reverse(x).relu_()
    y = grad_reverse(x).clone().relu_()
    assert y.requires_grad


def test_in_place_on_the_input_is_noticed() -> None:
    x = leaf(3) * 1
    y = grad_reverse(x).square()  # saves its input, which shares memory with x
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified inplace"):
        y.sum().backward()


# ---- under torch's transforms


def objective(x: Tensor) -> Tensor:
    return grad_reverse(x.sin(), 0.7).pow(3).sum()


def reversed_gradient(x: Tensor) -> Tensor:
    return -0.7 * 3 * x.sin().square() * x.cos()


def test_func_grad_and_vmap() -> None:
    x = leaf(4, 3).detach()
    torch.testing.assert_close(torch.func.grad(objective)(x), reversed_gradient(x))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(objective))(x), reversed_gradient(x))


def test_vmap_over_lambda() -> None:
    def gradient(x: Tensor, lambda_: Tensor) -> Tensor:
        return torch.func.grad(lambda x: grad_reverse(x, lambda_).sum())(x)

    lambdas = torch.tensor([0.0, 0.5, 2.0])
    result = torch.func.vmap(gradient)(torch.ones(3, 2), lambdas)
    assert torch.equal(result, -lambdas[:, None].expand(3, 2))


def test_forward_mode_reverses_alike() -> None:
    x = leaf(5).detach()
    _, along = torch.func.jvp(objective, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(along, reversed_gradient(x).sum())


def test_second_derivatives_reverse_twice() -> None:
    x = leaf(5)
    (first,) = torch.autograd.grad(grad_reverse(x, 0.7).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, -0.7 * 2 * x)
    torch.testing.assert_close(second, torch.full_like(x, 0.7**2 * 2))
    hessian = torch.func.hessian(lambda x: grad_reverse(x, 0.7).square().sum())(x.detach())
    torch.testing.assert_close(hessian, 0.7**2 * 2 * torch.eye(5, dtype=x.dtype))


def test_autocast() -> None:
    x, head = leaf(4, 3, dtype=torch.float32), nn.Linear(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = head(GradientReversal(0.5)(x))
        plain = head(x)
    assert y.dtype == torch.bfloat16
    (reversed_, ordinary) = (torch.autograd.grad(out.float().sum(), x)[0] for out in (y, plain))
    assert reversed_.dtype == torch.float32
    assert torch.equal(reversed_, -0.5 * ordinary)


def compiled_layers() -> list[nn.Module]:
    return [
        GradientReversal(0.5),
        ReversalLinear(3, 4, lambda_=0.5),
        nn.Sequential(GradientReversal(0.5), nn.Linear(3, 4)),
    ]


@pytest.mark.parametrize("layer", compiled_layers(), ids=lambda m: type(m).__name__)
def test_compiles_whole_and_once_while_lambda_moves(layer: nn.Module) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = leaf(6, 3, dtype=torch.float32)
    (moved,) = (m for m in layer.modules() if isinstance(m, (GradientReversal, ReversalLinear)))
    for lambda_ in (0.5, 0.0, 1.0, 0.123):
        moved.lambda_ = lambda_
        (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
        (found,) = torch.autograd.grad(compiled(x).square().sum(), x)
        torch.testing.assert_close(found, expected)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_lambda_moved_before_the_backward_is_the_old_one_or_refused(compiled: bool) -> None:
    torch._dynamo.reset()
    layer, x = GradientReversal(0.5), leaf(3, dtype=torch.float32)
    y = (torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer)(x)
    layer.lambda_ = 3.0
    if compiled:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        y.sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, -0.5))


def test_the_function_compiles() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(grad_reverse, fullgraph=True, backend="aot_eager")
    x = leaf(6, dtype=torch.float32)
    for lambda_ in (0.5, torch.tensor(0.5)):
        (found,) = torch.autograd.grad(compiled(x, lambda_).sum(), x)
        assert torch.equal(found, torch.full_like(x, -0.5))


def test_inductor_agrees() -> None:
    torch._dynamo.reset()
    layer, x = ReversalLinear(3, 4, lambda_=0.7), leaf(6, 3, dtype=torch.float32)
    inputs = (x, *layer.parameters())
    expected = torch.autograd.grad(layer(x).square().sum(), inputs)
    found = torch.autograd.grad(torch.compile(layer, fullgraph=True)(x).square().sum(), inputs)
    torch.testing.assert_close(found, expected)


def test_export() -> None:
    layer, x = GradientReversal(0.5), leaf(3, dtype=torch.float32)
    program = torch.export.export(layer, (x,))
    assert torch.equal(program.module()(x), x)


# ---- DDP


def train_rank(rank: int) -> list[Tensor | None]:
    """What one of two processes does: half of the batch and a step in DDP. Returns the gradients."""
    model = domain_model()
    parallel = nn.parallel.DistributedDataParallel(model)
    half = leaf(8, 5, dtype=torch.float32).detach().chunk(2)[rank]
    for lambda_ in (0.1, 0.8):  # forward broadcasts buffers; the second pass must see the new lambda
        model.zero_grad()
        model[1].lambda_ = model[3].lambda_ = lambda_
        parallel(half).square().mean().backward()
    return [p.grad for p in model.parameters()]


def domain_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), GradientReversal(), nn.Linear(4, 3), ReversalLinear(3, 2))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ddp_averages_reversed_gradients(tmp_path) -> None:
    found = in_two_processes(train_rank, tmp_path)
    model = domain_model()
    model[1].lambda_ = model[3].lambda_ = 0.8
    model(leaf(8, 5, dtype=torch.float32).detach()).square().mean().backward()
    for gradients in found:
        torch.testing.assert_close(gradients, [p.grad for p in model.parameters()])


# ---- the layer


def test_lambda_moves_in_place_and_is_not_saved() -> None:
    layer = GradientReversal(0.5)
    (buffer,) = layer.buffers()
    layer.lambda_ = 0.1
    assert layer.lambda_ == 0.1
    assert next(layer.buffers()) is buffer
    assert buffer.item() == pytest.approx(0.1)
    assert not layer.state_dict()
    assert repr(layer) == "GradientReversal(lambda_=0.1)"


@pytest.mark.parametrize("make", [GradientReversal, lambda lambda_: ReversalLinear(3, 2, lambda_=lambda_)])
def test_lambda_survives_copies_casts_and_deferred_memory(make) -> None:
    layer = make(0.1)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half(), layer.double()):
        assert other.lambda_ == 0.1
        (buffer,) = other.buffers()
        assert buffer.dtype == torch.float32
        assert buffer.item() == pytest.approx(0.1)
    with torch.device("meta"):
        deferred = make(0.3)
    (buffer,) = deferred.to_empty(device="cpu").buffers()
    assert buffer.item() == pytest.approx(0.3)


def test_the_layer_is_not_the_optimizers_reverse() -> None:
    """They agree for an extractor on the domain loss alone; the optimizer reverses a task's loss too."""

    def moved(layer: bool, with_task: bool) -> Tensor:
        extractor = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        optimizer = gradfused.SGD([extractor], lr=0.1, reverse=None if layer else 0.5)
        loss = (grad_reverse(extractor, 0.5) if layer else extractor).square().sum()
        loss = loss + extractor.sum() if with_task else loss
        loss.backward()
        optimizer.step()
        return extractor.detach()

    torch.testing.assert_close(moved(layer=True, with_task=False), moved(layer=False, with_task=False))
    apart = moved(layer=True, with_task=True) - moved(layer=False, with_task=True)
    torch.testing.assert_close(apart, torch.full_like(apart, -0.1 * 1.5))


# ---- what is refused


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
@pytest.mark.parametrize(
    "reverse", [grad_reverse, GradientReversal(), ReversalLinear(2, 2)], ids=lambda r: type(r).__name__
)
def test_inputs_that_have_no_real_gradient_are_named(reverse, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"expected a floating-point input, got {dtype}"):
        reverse(torch.zeros(3, 2, dtype=dtype))


def test_sparse_inputs_are_named() -> None:
    with pytest.raises(TypeError, match=r"got layout torch.sparse_coo: use x.to_dense\(\)"):
        grad_reverse(torch.eye(2).to_sparse())


def test_nested_tensors_are_reversed_but_not_multiplied() -> None:
    rows = [torch.randn(2, 3), torch.randn(4, 3)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    GradientReversal(0.5)(x).values().sum().backward()
    assert torch.equal(x.grad.values(), torch.full((6, 3), -0.5))
    with pytest.raises(TypeError, match=r"got layout torch.jagged: use grad_reverse, then F.linear"):
        ReversalLinear(3, 2)(x)


@pytest.mark.parametrize(
    ("lambda_", "error", "message"),
    [
        (-0.5, ValueError, "lambda_: expected 0 or more and finite, got -0.5"),
        (math.nan, ValueError, "got nan"),
        (math.inf, ValueError, "got inf"),
        ("1", TypeError, "expected a number, got '1'"),
        (True, TypeError, "expected a number, got True"),
        (None, TypeError, "expected a number, got None"),
    ],
)
def test_bad_lambdas_are_refused(lambda_, error: type[Exception], message: str) -> None:
    layer = GradientReversal(0.5)
    for call in (
        GradientReversal,
        lambda v: ReversalLinear(2, 2, lambda_=v),
        lambda v: grad_reverse(torch.zeros(2), v),
    ):
        with pytest.raises(error, match=message):
            call(lambda_)
    with pytest.raises(error, match=message):
        layer.lambda_ = lambda_
    assert layer.lambda_ == next(layer.buffers()).item() == 0.5


@pytest.mark.parametrize(
    ("lambda_", "error", "message"),
    [
        (torch.ones(1), ValueError, r"a tensor of no dims, got shape \(1,\)"),
        (torch.tensor(1), TypeError, "floating-point tensor, got torch.int64"),
        (torch.tensor(1j), TypeError, "floating-point tensor, got torch.complex64"),
        (torch.ones((), device="meta"), ValueError, "on the CPU or on the input's cpu, got meta"),
    ],
)
def test_bad_lambda_tensors_are_refused(lambda_: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grad_reverse(torch.zeros(2), lambda_)
