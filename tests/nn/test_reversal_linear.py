"""The linear layer that reverses inside its own GEMM, against reversal followed by torch's layer, and its cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gradfused.nn import GradientReversal, ReversalLinear, grad_reverse, reversal_linear

IN, OUT = 7, 3
LAMBDAS = [0.7, 0.0, torch.tensor(0.7, dtype=torch.float64)]

Head = Callable[[Tensor, Tensor, Tensor | None, float | Tensor], Tensor]


def composed(x: Tensor, weight: Tensor, bias: Tensor | None, lambda_: float | Tensor) -> Tensor:
    return F.linear(grad_reverse(x, lambda_), weight, bias)


def tensors(*leading: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*leading, IN), (OUT, IN)] + [(OUT,)] * bias
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def call(head: Head, inputs: list[Tensor], lambda_: float | Tensor) -> Tensor:
    return head(inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else None, lambda_)


# ---- what it computes


@pytest.mark.parametrize("lambda_", LAMBDAS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (50,), (0,), (4, 5), (2, 1, 3)])
def test_equals_reversal_then_linear(leading: tuple[int, ...], bias: bool, lambda_: float | Tensor) -> None:
    inputs = tensors(*leading, bias=bias)
    results = []
    for head in (reversal_linear, composed):
        y = call(head, inputs, lambda_)
        results.append((y.detach(), *torch.autograd.grad(y.sin().sum(), inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_no_worse_than_composed(dtype: torch.dtype) -> None:
    inputs = tensors(64, dtype=dtype)
    oracle = [t.detach().double().requires_grad_() for t in inputs]
    exact = torch.autograd.grad(call(composed, oracle, 0.7).square().sum(), oracle)
    errors = []
    for head in (reversal_linear, composed):
        found = torch.autograd.grad(call(head, inputs, 0.7).square().sum(), inputs)
        errors.append([(f.double() - e).abs().max() for f, e in zip(found, exact, strict=True)])
    assert all(mine <= 2 * theirs + 1e-12 for mine, theirs in zip(*errors, strict=True))


def test_strided_inputs_and_expanded_gradients() -> None:
    x, weight, bias = tensors(4, 5)
    turned = x.detach().transpose(0, 1).requires_grad_()
    (found,) = torch.autograd.grad(reversal_linear(turned, weight, bias, 0.5).sum(), turned)  # sum expands ones
    torch.testing.assert_close(found, -0.5 * weight.sum(0).expand(5, 4, IN))


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_what_is_wanted_is_computed(wanted: int) -> None:
    inputs = [t.requires_grad_(i == wanted) for i, t in enumerate(t.detach() for t in tensors(5))]
    ops = backward_ops(call(reversal_linear, inputs, 0.7).sum())
    products = [name for name, _ in ops if name in ("mm", "addmm")]
    assert products == {0: ["addmm"], 1: ["mm"], 2: []}[wanted]


# ---- under torch's transforms


@pytest.mark.parametrize("lambda_", LAMBDAS, ids=str)
def test_second_derivatives(lambda_: float | Tensor) -> None:
    inputs = tensors(5)
    results = []
    for head in (reversal_linear, composed):
        first = torch.autograd.grad(call(head, inputs, lambda_).sin().sum(), inputs, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("lambda_", LAMBDAS, ids=str)
def test_functional_transforms(lambda_: float | Tensor) -> None:
    x, weight, bias = (t.detach() for t in tensors(5))
    places = (0, 1, 2)

    def transformed(head: Head) -> list[Any]:
        def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return head(x, weight, bias, lambda_).sin().sum()

        gradient = torch.func.grad(loss, places)
        return [
            gradient(x, weight, bias),
            torch.func.vmap(gradient, (0, None, None))(x, weight, bias),
            torch.func.vmap(gradient, (None, 0, None))(x, torch.stack([weight, -weight]), bias),
            torch.func.jvp(loss, (x, weight, bias), (x, weight, bias)),
            torch.func.hessian(loss, places)(x, weight, bias),
        ]

    torch.testing.assert_close(transformed(reversal_linear), transformed(composed))


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_gives_what_linear_gives(bias: bool) -> None:
    inputs = tensors(6, bias=bias, dtype=torch.float32)
    results = []
    for head in (reversal_linear, composed):
        with torch.autocast("cpu", torch.bfloat16):
            y = call(head, inputs, 0.5)
        assert y.dtype == torch.bfloat16
        results.append((y.detach(), *torch.autograd.grad(y.float().sum(), inputs)))
    assert all(g.dtype == torch.float32 for g in results[0][1:])
    torch.testing.assert_close(*results)


def test_autocast_leaves_float64() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert call(reversal_linear, tensors(6), 0.5).dtype == torch.float64


# ---- what it costs


class Recorder(TorchDispatchMode):
    """Records every operation that allocates memory, and the number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        fresh = isinstance(out, Tensor) and out.data_ptr() not in {a.data_ptr() for a in args if isinstance(a, Tensor)}
        if fresh:
            self.ops.append((func.overloadpacket.__name__, out.numel()))
        return out


def backward_ops(loss: Tensor) -> list[tuple[str, int]]:
    with Recorder() as recorder:
        loss.backward()
    return recorder.ops


def test_no_pass_over_the_inputs_gradient_but_the_gemms_own() -> None:
    rows, size = 50, 50 * IN

    def passes(layer: nn.Module) -> list[str]:
        x = torch.randn(rows, IN, requires_grad=True)
        return [name for name, elements in backward_ops(layer(x).square().sum()) if elements == size]

    plain = nn.Linear(IN, OUT)
    assert passes(plain) == ["mm"]
    assert passes(ReversalLinear(IN, OUT, lambda_=0.3)) == ["addmm"]
    assert passes(nn.Sequential(GradientReversal(0.3), plain)) == ["mm", "mul"]


def test_backward_allocates_what_linear_allocates() -> None:
    def allocated(layer: nn.Module) -> int:
        x = torch.randn(512, 64, requires_grad=True)
        loss = layer(x).square().sum()
        with torch.profiler.profile(profile_memory=True) as profile:
            loss.backward()
        return sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())

    layer = ReversalLinear(64, 16, lambda_=0.3)
    plain = allocated(nn.Linear(64, 16))
    assert plain >= 4 * 512 * 64
    assert 0 <= allocated(layer) - plain <= 64  # the scalar that addmm is handed
    assert allocated(nn.Sequential(GradientReversal(), nn.Linear(64, 16))) - plain >= 4 * 512 * 64


@pytest.mark.parametrize(("rows", "scaled"), [(2, 2 * OUT), (500, OUT * IN)])
def test_a_lambda_tensor_scales_the_smaller_operand(rows: int, scaled: int) -> None:
    x, weight, _ = tensors(rows)
    ops = backward_ops(reversal_linear(x, weight, None, torch.tensor(0.5)).sum())
    assert [elements for name, elements in ops if name == "mul"] == [scaled]


# ---- the layer


def test_state_dicts_are_linears() -> None:
    layer, plain = ReversalLinear(IN, OUT, lambda_=0.3), nn.Linear(IN, OUT)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(4, IN)
    assert torch.equal(layer(x), plain(x))
    assert repr(layer) == f"ReversalLinear(in_features={IN}, out_features={OUT}, bias=True, lambda_=0.3)"


def test_the_layer_takes_dtype_and_no_bias() -> None:
    layer = ReversalLinear(IN, OUT, bias=False, dtype=torch.float64)
    assert layer.bias is None
    assert layer(torch.randn(2, IN, dtype=torch.float64)).dtype == torch.float64


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ReversalLinear(IN, OUT)(torch.randn(2, IN + 1))
