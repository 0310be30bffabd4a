"""Gradient reversal at a layer boundary (Ganin et al. 2016): as it is forward, times -lambda backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import gpu
from ..step.options import finite

Factor = float | Tensor  # minus lambda; in a tensor of no dims where that may move under what was recorded
_ELEMENTWISE = (torch.strided, torch.jagged)  # layouts that have a view and a product


def grad_reverse(x: Tensor, lambda_: float | Tensor = 1.0) -> Tensor:
    """Return ``x``, and on the way back multiply its gradient by ``-lambda_`` (Ganin et al. 2016, arXiv 1505.07818).

    Forward copies and saves nothing of ``x``: the result is a view of it, and like every view that a custom function
    returns it refuses to be changed in place where gradients are recorded. Forward-mode derivatives are reversed alike.

    Args:
        x: Floating point, any shape.
        lambda_: Strength, 0 or more. A tensor of no dims is read when the gradient arrives, without waiting for its
            device, so neither its values nor its sign are checked; it counts as a constant, as of this call.

    Raises:
        TypeError: ``x`` is not floating point or not strided, or ``lambda_`` is no number.
        ValueError: ``lambda_`` is negative, not finite, of 1 or more dims, or on a device that ``x`` cannot use.
    """
    _check_input("grad_reverse", x, _ELEMENTWISE)
    return _reverse(x, _factor(lambda_, x))


def reversal_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, lambda_: float | Tensor = 1.0) -> Tensor:
    """``F.linear(grad_reverse(x, lambda_), weight, bias)`` with no pass of its own over the gradient of ``x``.

    Backward, ``-lambda_`` is the alpha of the product that makes this gradient. A number goes into that GEMM itself; a
    tensor, which a GEMM cannot take without waiting for its device, scales the smaller of its two operands beforehand.
    Weight and bias get their ordinary gradients.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        lambda_: As for ``grad_reverse``.

    Returns:
        (..., out_features).

    Raises:
        TypeError, ValueError: As ``grad_reverse``; of shapes that do not fit, RuntimeError as ``F.linear``.
    """
    _check_input("reversal_linear", x)
    return _linear(x, weight, bias, _factor(lambda_, x))


class _Reversing(nn.Module):
    """Keeps lambda twice: as a number, and in a buffer for what is recorded now and played again later."""

    _lambda: Tensor

    def _keep(self, lambda_: float, device: torch.device | str | int | None) -> None:
        self._number = finite("lambda_", lambda_)
        self.register_buffer(
            "_lambda", torch.full((), self._number, dtype=torch.float32, device=device), persistent=False
        )

    @property
    def lambda_(self) -> float:
        """Strength, 0 or more. Setting it writes to the buffer in place, so nothing compiles again."""
        return self._number

    @lambda_.setter
    def lambda_(self, value: float) -> None:
        self._number = finite("lambda_", value)
        self._lambda.fill_(self._number)

    def _factor(self, x: Tensor) -> Factor:
        """The number, which kernels take as an argument; the buffer where a graph or a compiler would freeze that."""
        recorded = torch.compiler.is_compiling() or (gpu.holds(x) and gpu.capturing())
        return -self._lambda if recorded else -self._number

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Casts leave the buffer float32, and memory that ``to_empty`` has not filled gets its number."""
        super()._apply(fn, recurse)
        self._lambda = self._lambda.float()
        self._lambda.fill_(self._number)
        return self


class GradientReversal(_Reversing):
    """Gradient reversal as a layer: the identity forward, ``-lambda_`` times the gradient backward.

    Put it between a feature extractor and a domain head, and both train in one backward pass: the head to tell domains
    apart, the extractor to make them alike. ``lambda_`` is a plain attribute; ``DANNSchedule`` moves it. It is kept in a
    non-persistent buffer too, so a state dict lacks it and moving it recompiles nothing.

    Args:
        lambda_: Strength, 0 or more.

    Raises:
        TypeError: ``lambda_`` is no number; forward: the input is not floating point.
        ValueError: ``lambda_`` is negative or not finite.
    """

    def __init__(self, lambda_: float = 1.0) -> None:
        super().__init__()
        self._keep(lambda_, None)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself, as a view."""
        _check_input("GradientReversal", x, _ELEMENTWISE)
        return _reverse(x, self._factor(x))

    def extra_repr(self) -> str:
        return f"lambda_={self.lambda_:g}"


class ReversalLinear(_Reversing, nn.Linear):
    """A domain head's first layer: ``nn.Linear`` behind gradient reversal, at no more passes than ``nn.Linear`` alone.

    Its state dict is that of ``nn.Linear``.

    Args:
        in_features: Size of the input's last dim.
        out_features: Size of the output's last dim.
        bias: Whether there is one.
        lambda_: Strength, 0 or more; as in ``GradientReversal``.
        device: Of weight and bias.
        dtype: Of weight and bias.

    Raises:
        TypeError: ``lambda_`` is no number; forward: the input is not floating point.
        ValueError: ``lambda_`` is negative or not finite.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        lambda_: float = 1.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._keep(lambda_, device)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        _check_input("ReversalLinear", x)
        return _linear(x, self.weight, self.bias, self._factor(x))

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, lambda_={self.lambda_:g}"


# ---- checks


def _check_input(name: str, x: Tensor, layouts: Sequence[torch.layout] = (torch.strided,)) -> None:
    if not x.is_floating_point():
        remedy = "reverse its real and imaginary parts (torch.view_as_real)" if x.is_complex() else "convert it first"
        raise TypeError(f"{name}: expected a floating-point input, got {x.dtype}: {remedy}")
    if x.layout not in layouts:
        remedy = "use grad_reverse, then F.linear" if x.layout == torch.jagged else "use x.to_dense()"
        raise TypeError(f"{name}: expected a dense input, got layout {x.layout}: {remedy}")


def _factor(lambda_: float | Tensor, x: Tensor) -> Factor:
    """Minus lambda: of a tensor a copy, so that moving lambda before the backward pass changes nothing."""
    if not isinstance(lambda_, Tensor):
        return -finite("lambda_", lambda_)
    if not lambda_.is_floating_point():
        raise TypeError(f"lambda_: expected a number or a floating-point tensor, got {lambda_.dtype}")
    if lambda_.dim():
        raise ValueError(f"lambda_: expected a number or a tensor of no dims, got shape {tuple(lambda_.shape)}")
    if lambda_.device != x.device and lambda_.device.type != "cpu":
        raise ValueError(f"lambda_: expected a tensor on the CPU or on the input's {x.device}, got {lambda_.device}")
    return -lambda_.detach()


# ---- reversal


def _reverse(x: Tensor, factor: Factor) -> Tensor:
    function = _ReverseCompiled if torch.compiler.is_compiling() else _Reverse
    return function.apply(x, factor)  # type: ignore[no-any-return]


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient is multiplied. What is saved is the factor alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, factor: Factor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Factor], output: Tensor) -> None:
        ctx.save_for_forward(*_keep_factor(ctx, inputs[1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * _kept_factor(ctx), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Tensor | None) -> Tensor:
        return tangent * _kept_factor(ctx)


class _ReverseCompiled(torch.autograd.Function):
    """The same for torch.compile, which takes no ``jvp`` and, in older versions, no ``setup_context``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Factor) -> Tensor:
        _keep_factor(ctx, factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * _kept_factor(ctx), None


def _keep_factor(ctx: Any, factor: Factor, *others: Tensor) -> tuple[Tensor, ...]:
    """Saves the factor for the backward pass, a tensor as such: only then does vmap know it. Returns what is saved."""
    ctx.factor = None if isinstance(factor, Tensor) else factor
    saved = (*others, factor) if isinstance(factor, Tensor) else others
    ctx.save_for_backward(*saved)
    return saved


def _kept_factor(ctx: Any) -> Factor:
    return ctx.saved_tensors[-1] if ctx.factor is None else ctx.factor  # type: ignore[no-any-return]


# ---- reversal and a linear layer


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, factor: Factor) -> Tensor:
    x, weight, bias = _autocast(x, weight, bias)
    function = _LinearCompiled if torch.compiler.is_compiling() else _Linear
    return function.apply(x, weight, bias, factor)  # type: ignore[no-any-return]


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts that autocast would hide inside the function, where its backward would not see them."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _Linear(torch.autograd.Function):
    """``F.linear`` whose input's gradient is multiplied in the product that makes it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, factor: Factor) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Factor], output: Tensor) -> None:
        x, weight, _, factor = inputs
        ctx.save_for_forward(*_keep_factor(ctx, factor, x, weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors[:2]
        return _linear_backward(ctx, grad, _reverse(x, _kept_factor(ctx)), weight)  # so that second derivatives reverse

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, _: Any) -> Tensor:
        (x, weight), factor = ctx.saved_tensors[:2], _kept_factor(ctx)
        parts = [] if dx is None else [F.linear(dx, weight) * factor]
        parts += [] if dweight is None else [F.linear(_reverse(x, factor), dweight)]
        parts += [] if dbias is None else [dbias.expand(*x.shape[:-1], -1)]
        return sum(parts[1:], parts[0])


class _LinearCompiled(torch.autograd.Function):
    """The same for torch.compile: see ``_ReverseCompiled``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factor: Factor) -> Tensor:
        _keep_factor(ctx, factor, x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors[:2]
        return _linear_backward(ctx, grad, x, weight)


def _linear_backward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias and factor: two GEMMs and a sum, as of ``F.linear``."""
    rows = grad.reshape(-1, grad.shape[-1])
    of_x = of_weight = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = _scaled_product(rows, weight, _kept_factor(ctx)).view(x.shape)
    if ctx.needs_input_grad[1]:
        of_weight = rows.t() @ x.reshape(-1, x.shape[-1])
    if ctx.needs_input_grad[2]:
        of_bias = rows.sum(0)
    return of_x, of_weight, of_bias, None


def _scaled_product(a: Tensor, b: Tensor, factor: Factor) -> Tensor:
    """``factor * a @ b``, by the GEMM itself or by way of its smaller operand."""
    if not isinstance(factor, Tensor):
        # beta=0 leaves the zero unread; uninitialised memory in its place could turn into nan under vmap.
        return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=factor)
    return (a * factor) @ b if a.numel() < b.numel() else a @ (b * factor)
