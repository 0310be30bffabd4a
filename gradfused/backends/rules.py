"""The update rules of the reference backend: stage 7 in plain PyTorch, each as its paper or torch.optim has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..step.memory import has_values
from .base import Row, Settings

State = dict[str, Tensor]
Late = Callable[[Tensor], Tensor]
# The direction, and what p becomes of it: shrink * p - step size * direction
Direction = tuple[Tensor, float, float]


def warmed_momentum(s: Settings, step: float) -> float:
    """NAdam's momentum at a step."""
    return s.beta1 * (1.0 - 0.5 * math.pow(0.96, step * s.momentum_decay))


@dataclass(frozen=True)
class Count:
    """What a rule's numbers depend on besides the options.

    Attributes:
        step: This step's number, from 1.
        first: The state holds nothing yet.
        mu_product: Of the momenta up to this step; only NAdam keeps it.
    """

    step: float
    first: bool
    mu_product: float = 1.0

    @classmethod
    def of(cls, row: Row, s: Settings) -> Count:
        """A row's, for the step to be taken."""
        step = 1.0 + (0.0 if row.step is None else float(row.step))
        product = 1.0
        if row.mu_product is not None:  # rounded as the tensor that keeps it
            product = float((row.mu_product.double() * warmed_momentum(s, step)).to(row.mu_product.dtype))
        return cls(step, row.first, product)


def norm(x: Tensor) -> float:
    """In float64; 0 of what has no values."""
    return float(x.double().square().sum().sqrt()) if has_values(x) else 0.0


def trust_ratio(weight_norm: float, size: float, over: float) -> float:
    """1 where either norm says nothing."""
    return weight_norm / over if weight_norm > 0 and size > 0 else 1.0


def moments(g: Tensor, state: State, s: Settings) -> tuple[Tensor, Tensor]:
    """Adam's first and second moment, moved."""
    state["exp_avg"] = state["exp_avg"].lerp(g, 1.0 - s.beta1)
    state["exp_avg_sq"] = state["exp_avg_sq"] * s.beta2 + (1.0 - s.beta2) * g * g
    return state["exp_avg"], state["exp_avg_sq"]


def decoupled_shrink(s: Settings) -> float:
    """What decoupled weight decay leaves of the weights."""
    return 1.0 - s.lr * s.weight_decay if s.decoupled else 1.0


# Each takes the gradient, the weights, the state, which it moves, and `late`: what centres a direction where that is asked for.


def sgd(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """torch.optim.SGD without momentum."""
    return late(g), 1.0, s.lr


def _momentum(g: Tensor, state: State, s: Settings, now: Count) -> Tensor:
    buffer = g.clone() if now.first else state["momentum_buffer"] * s.momentum + g * (1.0 - s.dampening)
    state["momentum_buffer"] = buffer
    return g + buffer * s.momentum if s.nesterov else buffer


def sgd_momentum(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """torch.optim.SGD with momentum (Sutskever et al. 2013)."""
    return late(_momentum(g, state, s, now)), 1.0, s.lr


def _adam(g: Tensor, state: State, s: Settings, now: Count, amsgrad: bool) -> Direction:
    average, square = moments(g, state, s)
    if amsgrad:
        square = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
    correction1, correction2 = 1.0 - s.beta1**now.step, 1.0 - s.beta2**now.step
    direction = average / (square.sqrt() / math.sqrt(correction2) + s.eps)
    return direction, decoupled_shrink(s), s.lr / correction1


def adam(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """torch.optim.Adam and AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019)."""
    direction, shrink, step = _adam(g, state, s, now, amsgrad=False)
    return late(direction), shrink, step


def adam_amsgrad(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """The same with amsgrad=True (Reddi et al. 2018)."""
    direction, shrink, step = _adam(g, state, s, now, amsgrad=True)
    return late(direction), shrink, step


def adagrad(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """torch.optim.Adagrad (Duchi et al. 2011)."""
    state["sum"] = state["sum"] + g * g
    return late(g / (state["sum"].sqrt() + s.eps)), 1.0, s.lr / (1.0 + (now.step - 1.0) * s.lr_decay)


def rmsprop(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """torch.optim.RMSprop in its four variants (Hinton 2012; Graves 2013)."""
    square = state["square_avg"] = state["square_avg"] * s.beta2 + (1.0 - s.beta2) * g * g
    if "grad_avg" in state:
        mean = state["grad_avg"] = state["grad_avg"].lerp(g, 1.0 - s.beta2)
        # No further than the greatest finite number: where the average square is infinite, what is left of it is as well.
        square = square - (mean * mean).clamp(max=torch.finfo(mean.dtype).max)
    direction = g / (square.sqrt() + s.eps)
    if "momentum_buffer" in state:
        direction = state["momentum_buffer"] = state["momentum_buffer"] * s.momentum + direction
    return late(direction), 1.0, s.lr


def nadam(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """torch.optim.NAdam (Dozat 2016)."""
    average, square = moments(g, state, s)
    mu, following = warmed_momentum(s, now.step), warmed_momentum(s, now.step + 1.0)
    denominator = (square / (1.0 - s.beta2**now.step)).sqrt() + s.eps
    ahead = g * ((1.0 - mu) / (1.0 - now.mu_product)) + average * (following / (1.0 - now.mu_product * following))
    return late(ahead / denominator), decoupled_shrink(s), s.lr


def radam(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """torch.optim.RAdam (Liu et al. 2020)."""
    average, square = moments(g, state, s)
    correction1, correction2 = 1.0 - s.beta1**now.step, 1.0 - s.beta2**now.step
    most = 2.0 / (1.0 - s.beta2) - 1.0
    length = most - 2.0 * now.step * s.beta2**now.step / correction2
    direction, step = average, s.lr / correction1
    if length > 5.0:
        direction = average / (square.sqrt() + s.eps)
        step *= math.sqrt(correction2)
        step *= math.sqrt((length - 4.0) * (length - 2.0) * most / ((most - 4.0) * (most - 2.0) * length))
    return late(direction), decoupled_shrink(s), step


def lion(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """Lion (Chen et al. 2023)."""
    x = state["exp_avg"] * s.beta1 + g * (1.0 - s.beta1)
    state["exp_avg"] = state["exp_avg"] * s.beta2 + g * (1.0 - s.beta2)
    return late(torch.where(x.isnan(), x, x.sign())), decoupled_shrink(s), s.lr


def lamb(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """LAMB (You et al. 2020), algorithm 2, with phi(z) = z."""
    average, square = moments(g, state, s)
    direction = late(average / (1.0 - s.beta1**now.step) / ((square / (1.0 - s.beta2**now.step)).sqrt() + s.eps))
    size = norm(direction + s.weight_decay * p)
    rate = s.lr * trust_ratio(norm(p), size, size) if s.adapt else s.lr
    return direction, 1.0 - rate * s.weight_decay, rate


def lars(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """LARS (You et al. 2017), with and without momentum; the learning rate stands outside the momentum, as in SGD."""
    weight_norm, size = norm(p), norm(g)
    ratio = (
        trust_ratio(s.trust_coefficient * weight_norm, size, size + s.weight_decay * weight_norm + s.eps)
        if s.adapt
        else 1.0
    )
    g = (g + s.weight_decay * p) * ratio
    return late(_momentum(g, state, s, now) if "momentum_buffer" in state else g), 1.0, s.lr


def adan(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """Adan (Xie et al. 2022), algorithm 1 with the bias corrections of its authors' code."""
    difference = (g + state["neg_pre_grad"]) * (0.0 if now.first else 1.0)
    average = state["exp_avg"] = state["exp_avg"] * s.beta1 + g * (1.0 - s.beta1)
    change = state["exp_avg_diff"] = state["exp_avg_diff"] * s.beta2 + difference * (1.0 - s.beta2)
    square = (g + s.beta2 * difference) ** 2
    state["exp_avg_sq"] = state["exp_avg_sq"] * s.beta3 + square * (1.0 - s.beta3)
    state["neg_pre_grad"] = -g
    corrections = (1.0 - beta**now.step for beta in (s.beta1, s.beta2, s.beta3))
    correction1, correction2, correction3 = corrections
    denominator = state["exp_avg_sq"].sqrt() / math.sqrt(correction3) + s.eps
    direction = (average / correction1 + s.beta2 * change / correction2) / denominator
    decay = s.lr * s.weight_decay
    if s.proximal:
        return late(direction), 1.0 / (1.0 + decay), s.lr / (1.0 + decay)
    return late(direction), 1.0 - decay, s.lr


def ascend(g: Tensor, p: Tensor, state: State, s: Settings, now: Count, late: Late) -> Direction:
    """The ascent of SAM (Foret et al. 2021) and ASAM (Kwon et al. 2021) along a gradient that stage 2 brought to length rho."""
    state["backup"] = p
    return (g * (p.abs() + s.eta) if s.adaptive else g), 1.0, -1.0


RULES: dict[str, Callable[[Tensor, Tensor, State, Settings, Count, Late], Direction]] = {
    "sgd": sgd,
    "sgd_momentum": sgd_momentum,
    "adam": adam,
    "adam_amsgrad": adam_amsgrad,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "rmsprop_momentum": rmsprop,
    "rmsprop_centered": rmsprop,
    "rmsprop_centered_momentum": rmsprop,
    "nadam": nadam,
    "radam": radam,
    "lion": lion,
    "lamb": lamb,
    "lars": lars,
    "lars_momentum": lars,
    "adan": adan,
    "ascend": ascend,
}
