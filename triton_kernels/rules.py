"""The update rules, as torch.optim computes them: for each, the numbers of a step and the direction it takes.

``coefficients`` and ``direction`` choose among them by the number that csrc/rules.def gives a rule.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import read, read_bool
from .transforms import maximum, power

# State tensors of a rule, by name.
STATES = {"sgd": 0, "sgd_momentum": 1, "adam": 2, "adam_amsgrad": 3}


@triton.jit
def divide(a, b):
    """Correctly rounded, which Triton's ``/`` is not in float32."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def sgd_coefficients(hyper, lr, step, first, T: tl.constexpr):
    return tl.full([], 1.0, T), lr.to(T), (lr.to(T),)


@triton.jit
def sgd(g, s0, s1, s2, c):
    """torch.optim.SGD without momentum."""
    return g, s0, s1, s2


@triton.jit
def sgd_momentum_coefficients(hyper, lr, step, first, T: tl.constexpr):
    momentum = read(hyper + at.hyper_momentum, tl.float64)
    fresh = tl.where(
        first, 1.0, 1.0 - read(hyper + at.hyper_dampening, tl.float64)
    )  # the first fills the buffer undamped
    ahead = tl.where(read_bool(hyper + at.hyper_nesterov), momentum, 0.0)
    return tl.full([], 1.0, T), lr.to(T), (momentum.to(T), fresh.to(T), ahead.to(T))


@triton.jit
def sgd_momentum(g, s0, s1, s2, c):
    """torch.optim.SGD with momentum (Sutskever et al. 2013)."""
    s0 = s0 * c[0] + g * c[1]
    return tl.where(c[2] != 0.0, g + s0 * c[2], s0), s0, s1, s2


@triton.jit
def adam_coefficients(hyper, lr, step, first, T: tl.constexpr):
    beta1 = read(hyper + at.hyper_beta1, tl.float64)
    beta2 = read(hyper + at.hyper_beta2, tl.float64)
    correction1 = 1.0 - power(beta1, step)
    correction2 = 1.0 - power(beta2, step)
    decay = tl.where(read_bool(hyper + at.hyper_decoupled), read(hyper + at.hyper_weight_decay, tl.float64), 0.0)
    numbers = (
        (1.0 - beta1).to(T),
        beta2.to(T),
        (1.0 - beta2).to(T),
        (1.0 / tl.sqrt(correction2)).to(T),
        read(hyper + at.hyper_eps, tl.float64).to(T),
    )
    return (1.0 - lr * decay).to(T), (lr / correction1).to(T), numbers


@triton.jit
def adam(g, s0, s1, s2, c):
    """torch.optim.Adam and AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019)."""
    s0 = s0 + (g - s0) * c[0]
    s1 = s1 * c[1] + g * c[2] * g  # in torch's order, which keeps gradients of 1e20 finite
    return divide(s0, root(s1) * c[3] + c[4]), s0, s1, s2


@triton.jit
def adam_amsgrad(g, s0, s1, s2, c):
    """The same with amsgrad=True (Reddi et al. 2018)."""
    s0 = s0 + (g - s0) * c[0]
    s1 = s1 * c[1] + g * c[2] * g
    s2 = maximum(s2, s1)
    return divide(s0, root(s2) * c[3] + c[4]), s0, s1, s2


@triton.jit
def coefficients(RULE: tl.constexpr, hyper, lr, step, first, T: tl.constexpr):
    """(shrink, step size, the rule's numbers): p becomes shrink * p - step size * direction."""
    if RULE == at.Rule_sgd:
        return sgd_coefficients(hyper, lr, step, first, T)
    elif RULE == at.Rule_sgd_momentum:
        return sgd_momentum_coefficients(hyper, lr, step, first, T)
    else:
        tl.static_assert(RULE == at.Rule_adam or RULE == at.Rule_adam_amsgrad)
        return adam_coefficients(hyper, lr, step, first, T)


@triton.jit
def direction(RULE: tl.constexpr, g, s0, s1, s2, c):
    """(direction, the state as it shall be)."""
    if RULE == at.Rule_sgd:
        return sgd(g, s0, s1, s2, c)
    elif RULE == at.Rule_sgd_momentum:
        return sgd_momentum(g, s0, s1, s2, c)
    elif RULE == at.Rule_adam:
        return adam(g, s0, s1, s2, c)
    else:
        tl.static_assert(RULE == at.Rule_adam_amsgrad)
        return adam_amsgrad(g, s0, s1, s2, c)
