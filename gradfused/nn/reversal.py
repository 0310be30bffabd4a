"""Gradient reversal at a layer boundary: the identity forward, gradients times -lambda backward (Ganin et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import gpu
from ..step.options import finite

Factor = float | Tensor  # minus lambda; a 0-dim tensor where lambda may change after a graph was recorded
_ELEMENTWISE = (torch.strided, torch.jagged)  # layouts that allow a view and an elementwise product


def grad_reverse(x: Tensor, lambda_: float | Tensor = 1.0) -> Tensor:
    """Return ``x``; in the backward pass its gradient is multiplied by ``-lambda_`` (Ganin et al. 2016, arXiv 1505.07818).

    Forward neither copies nor saves ``x``. The result is a view of it, which cannot be changed in place while gradients
    are recorded, like every view that a custom function returns. Forward-mode derivatives are reversed as well.

    Args:
        x: Floating point, any shape.
        lambda_: Strength, 0 or more. A 0-dim tensor is copied by this call and treated as a constant. It is not read on
            the host, which would wait for its device, so neither its value nor its sign is checked.

    Raises:
        TypeError: ``x`` is not floating point or not strided, or ``lambda_`` is not a number.
        ValueError: ``lambda_`` is negative, not finite, of 1 or more dims, or on a device that ``x`` cannot use.
    """
    _check_input("grad_reverse", x, _ELEMENTWISE)
    return _reverse(x, _factor(lambda_, x))


def reversal_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, lambda_: float | Tensor = 1.0) -> Tensor:
    """``F.linear(grad_reverse(x, lambda_), weight, bias)`` without an extra pass over the gradient of ``x``.

    In the backward pass a number ``-lambda_`` is the alpha of the GEMM that computes this gradient. A GEMM could not take
    a tensor without waiting for its device, so a tensor scales the smaller of the two operands beforehand. Weight and
    bias get their ordinary gradients.

    Args:
        x: (..., in_features).
        weight: (out_features, in_features).
        bias: (out_features,) or None.
        lambda_: As in ``grad_reverse``.

    Returns:
        (..., out_features).

    Raises:
        TypeError, ValueError: As ``grad_reverse``.
        RuntimeError: Shapes do not fit, as ``F.linear``.
    """
    _check_input("reversal_linear", x)
    return _linear(x, weight, bias, _factor(lambda_, x))


class _Reversing(nn.Module):
    """A module with a lambda, which it keeps as a number and in a buffer, for graphs that are recorded once and replayed."""

    _lambda: Tensor

    def _keep(self, lambda_: float, device: torch.device | str | int | None) -> None:
        self._number = finite("lambda_", lambda_)
        self.register_buffer(
            "_lambda", torch.full((), self._number, dtype=torch.float32, device=device), persistent=False
        )

    @property
    def lambda_(self) -> float:
        """Strength, 0 or more. Setting it writes to the buffer in place, so that nothing is recompiled."""
        return self._number

    @lambda_.setter
    def lambda_(self, value: float) -> None:
        self._number = finite("lambda_", value)
        self._lambda.fill_(self._number)

    def _factor(self, x: Tensor) -> Factor:
        """Minus lambda: the number, or the buffer while a compiler or a CUDA graph records and would freeze the number."""
        recorded = torch.compiler.is_compiling() or (gpu.holds(x) and gpu.capturing())
        return -self._lambda if recorded else -self._number

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Keep the buffer float32 under casts, and fill it after ``to_empty``."""
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
        lambda_: Strength, a number of 0 or more.
    """

    def __init__(self, lambda_: float = 1.0) -> None:
        super().__init__()
        self._keep(lambda_, None)

    def forward(self, x: Tensor) -> Tensor:
        """Return a view of ``x``."""
        _check_input("GradientReversal", x, _ELEMENTWISE)
        return _reverse(x, self._factor(x))

    def extra_repr(self) -> str:
        return f"lambda_={self.lambda_:g}"


class ReversalLinear(_Reversing, nn.Linear):
    """``nn.Linear`` behind gradient reversal, in as few passes as ``nn.Linear``: the first layer of a domain head.

    Its state dict and its arguments are those of ``nn.Linear``, and ``lambda_`` is as in ``GradientReversal``.
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
        """Map (..., in_features) to (..., out_features)."""
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
    """Minus lambda. A tensor is copied, so that changing it before the backward pass has no effect."""
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
    """The identity, whose gradient is multiplied by the factor, which is all that is saved."""

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
    """``_Reverse`` for torch.compile, which supports neither ``jvp`` nor, in older versions, ``setup_context``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Factor) -> Tensor:
        _keep_factor(ctx, factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * _kept_factor(ctx), None


def _keep_factor(ctx: Any, factor: Factor, *others: Tensor) -> tuple[Tensor, ...]:
    """Save ``others`` and the factor for backward; return what was saved. vmap tracks a tensor only if it is saved as one."""
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
    """Cast as autocast would. It would do so inside the function, where the backward would not see it."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _Linear(torch.autograd.Function):
    """``F.linear``, the gradient of whose input is multiplied in the product that computes it."""

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
    """``_Linear`` for torch.compile: see ``_ReverseCompiled``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factor: Factor) -> Tensor:
        _keep_factor(ctx, factor, x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors[:2]
        return _linear_backward(ctx, grad, x, weight)


def _linear_backward(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias and factor: two GEMMs and a sum, as for ``F.linear``."""
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
    """``factor * a @ b``: a number is multiplied by the GEMM itself, a tensor with the smaller operand."""
    if not isinstance(factor, Tensor):
        # With beta=0 the zero is not read. Uninitialised memory in its place could become nan under vmap.
        return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=factor)
    return (a * factor) @ b if a.numel() < b.numel() else a @ (b * factor)
