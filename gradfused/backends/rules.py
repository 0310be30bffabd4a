"""The update rules of the reference backend: stage 7 in plain PyTorch, each as its paper or torch.optim has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..step.memory import has_values
from .base import Row, Settings

State = dict[str, Tensor]


class Update(NamedTuple):
    """A rule's update: the weights become ``shrink * p - step * direction``."""

    direction: Tensor
    step: float
    shrink: float = 1.0


def warmed_momentum(s: Settings, step: float) -> float:
    """NAdam's momentum at a step."""
    return s.beta1 * (1.0 - 0.5 * math.pow(0.96, step * s.momentum_decay))


@dataclass(frozen=True)
class Count:
    """What a rule depends on besides the gradient, its state and the settings.

    Attributes:
        step: This step's number, from 1.
        first: The state holds nothing yet.
        mu_product: Product of the momenta up to this step; only NAdam keeps it.
    """

    step: float
    first: bool
    mu_product: float = 1.0

    @classmethod
    def of(cls, row: Row, s: Settings) -> Count:
        """The count of a row for the step to be taken."""
        step = 1.0 + (0.0 if row.step is None else float(row.step))
        product = 1.0
        if row.mu_product is not None:  # rounded as the tensor that keeps it
            product = float((row.mu_product.double() * warmed_momentum(s, step)).to(row.mu_product.dtype))
        return cls(step, row.first, product)

    def correction(self, beta: float) -> float:
        """The weight that an average which began at zero has gathered by now."""
        return 1.0 - math.pow(beta, self.step)


# ---- what several rules share


def averaged(average: Tensor, new: Tensor, beta: float) -> Tensor:
    """An exponential moving average, moved."""
    return average * beta + new * (1.0 - beta)


def averaged_square(average: Tensor, g: Tensor, beta: float) -> Tensor:
    """An exponential moving average of the gradient's square, moved."""
    return average * beta + (1.0 - beta) * g * g


def moments(g: Tensor, state: State, s: Settings) -> tuple[Tensor, Tensor]:
    """Adam's first and second moment, moved."""
    state["exp_avg"] = state["exp_avg"].lerp(g, 1.0 - s.beta1)
    state["exp_avg_sq"] = averaged_square(state["exp_avg_sq"], g, s.beta2)
    return state["exp_avg"], state["exp_avg_sq"]


def momentum(g: Tensor, state: State, s: Settings, now: Count) -> Tensor:
    """SGD's direction: the gradient where no momentum is kept."""
    if "momentum_buffer" not in state:
        return g
    buffer = g.clone() if now.first else state["momentum_buffer"] * s.momentum + g * (1.0 - s.dampening)
    state["momentum_buffer"] = buffer
    return g + buffer * s.momentum if s.nesterov else buffer


def decoupled_shrink(s: Settings) -> float:
    """What decoupled weight decay leaves of the weights."""
    return 1.0 - s.lr * s.weight_decay if s.decoupled else 1.0


def norm(x: Tensor) -> float:
    """In float64; 0 for a tensor that has no values."""
    return float(x.double().square().sum().sqrt()) if has_values(x) else 0.0


def trust_ratio(weight_norm: float, size: float, over: float) -> float:
    """``weight_norm / over``; 1 where a norm of zero says nothing."""
    return weight_norm / over if weight_norm > 0 and size > 0 else 1.0


# ---- the rules: each is given the gradient, the weights and the state, which it moves


def sgd(g: Tensor, p: Tensor, state: State, s: Settings, now: Count) -> Update:
    """torch.optim.SGD (momentum: Sutskever et al. 2013)."""
    return Update(momentum(g, state, s, now), s.lr)


def adam(g: Tensor, p: Tensor, state: State, s: Settings, now: Count) -> Update:
    """torch.optim.Adam and AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019; amsgrad: Reddi et al. 2018)."""
    average, square = moments(g, state, s)
    if "max_exp_avg_sq" in state:
        square = state["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
    direction = average / (square.sqrt() / math.sqrt(now.correction(s.beta2)) + s.eps)
    return Update(direction, s.lr / now.correction(s.beta1), decoupled_shrink(s))


def adagrad(g: Tensor, p: Tensor, state: State, s: Settings, now: Count) -> Update:
    """torch.optim.Adagrad (Duchi et al. 2011)."""
    state["sum"] = state["sum"] + g * g
    return Update(g / (state["sum"].sqrt() + s.eps), s.lr / (1.0 + (now.step - 1.0) * s.lr_decay))


def rmsprop(g: Tensor, p: Tensor, state: State, s: Settings, now: Count) -> Update:
    """torch.optim.RMSprop in its four variants (Hinton 2012; Graves 2013)."""
    square = state["square_avg"] = averaged_square(state["square_avg"], g, s.beta2)
    if "grad_avg" in state:
        mean = state["grad_avg"] = state["grad_avg"].lerp(g, 1.0 - s.beta2)
        # At most the greatest finite number, so that an infinite average square stays infinite.
        square = square - (mean * mean).clamp(max=torch.finfo(mean.dtype).max)
    direction = g / (square.sqrt() + s.eps)
    if "momentum_buffer" in state:
        direction = state["momentum_buffer"] = state["momentum_buffer"] * s.momentum + direction
    return Update(direction, s.lr)


def nadam(g: Tensor, p: Tensor, state: State, s: Settings, now: Count) -> Update:
    """torch.optim.NAdam (Dozat 2016)."""
    average, square = moments(g, state, s)
    mu, following = warmed_momentum(s, now.step), warmed_momentum(s, now.step + 1.0)
    denominator = (square / now.correction(s.beta2)).sqrt() + s.eps
    ahead = g * ((1.0 - mu) / (1.0 - now.mu_product)) + average * (following / (1.0 - now.mu_product * following))
    return Update(ahead / denominator, s.lr, decoupled_shrink(s))


def radam(g: Tensor, p: Tensor, state: State, s: Settings, now: Count) -> Update:
    """torch.optim.RAdam (Liu et al. 2020)."""
    average, square = moments(g, state, s)
    most = 2.0 / (1.0 - s.beta2) - 1.0
    length = most - 2.0 * now.step * s.beta2**now.step / now.correction(s.beta2)
    direction, step = average, s.lr / now.correction(s.beta1)
    if length > 5.0:
        direction = average / (square.sqrt() + s.eps)
        step *= math.sqrt(now.correction(s.beta2))
        step *= math.sqrt((length - 4.0) * (length - 2.0) * most / ((most - 4.0) * (most - 2.0) * length))
    return Update(direction, step, decoupled_shrink(s))


def lion(g: Tensor, p: Tensor, state: State, s: Settings, now: Count) -> Update:
    """Lion (Chen et al. 2023)."""
    x = averaged(state["exp_avg"], g, s.beta1)
    state["exp_avg"] = averaged(state["exp_avg"], g, s.beta2)
    return Update(torch.where(x.isnan(), x, x.sign()), s.lr, decoupled_shrink(s))


def lamb(g: Tensor, p: Tensor, state: State, s: Settings, now: Count) -> Update:
    """LAMB (You et al. 2020), algorithm 2, with phi(z) = z; ``lamb_trusted`` takes its trust ratio."""
    average, square = moments(g, state, s)
    direction = average / now.correction(s.beta1) / ((square / now.correction(s.beta2)).sqrt() + s.eps)
    return Update(direction, s.lr, decoupled_shrink(s))


def lamb_trusted(update: Update, p: Tensor, s: Settings) -> Update:
    """LAMB's update, as long as the weights allow."""
    size = norm(update.direction + s.weight_decay * p)
    rate = s.lr * trust_ratio(norm(p), size, size)
    return Update(update.direction, rate, 1.0 - rate * s.weight_decay)


def lars(g: Tensor, p: Tensor, state: State, s: Settings, now: Count) -> Update:
    """LARS (You et al. 2017); the learning rate stands outside the momentum, as in SGD."""
    ratio = 1.0
    if s.adapt:
        weight_norm, size = norm(p), norm(g)
        ratio = trust_ratio(s.trust_coefficient * weight_norm, size, size + s.weight_decay * weight_norm + s.eps)
    return Update(momentum((g + s.weight_decay * p) * ratio, state, s, now), s.lr)


def adan(g: Tensor, p: Tensor, state: State, s: Settings, now: Count) -> Update:
    """Adan (Xie et al. 2022), algorithm 1 with the bias corrections of its authors' code."""
    difference = (g + state["neg_pre_grad"]) * (0.0 if now.first else 1.0)
    average = state["exp_avg"] = averaged(state["exp_avg"], g, s.beta1)
    change = state["exp_avg_diff"] = averaged(state["exp_avg_diff"], difference, s.beta2)
    square = state["exp_avg_sq"] = averaged(state["exp_avg_sq"], (g + s.beta2 * difference) ** 2, s.beta3)
    state["neg_pre_grad"] = -g
    denominator = square.sqrt() / math.sqrt(now.correction(s.beta3)) + s.eps
    ahead = average / now.correction(s.beta1) + s.beta2 * change / now.correction(s.beta2)
    decay = s.lr * s.weight_decay
    if s.proximal:
        return Update(ahead / denominator, s.lr / (1.0 + decay), 1.0 / (1.0 + decay))
    return Update(ahead / denominator, s.lr, 1.0 - decay)


def ascend(g: Tensor, p: Tensor, state: State, s: Settings, now: Count) -> Update:
    """The ascent of SAM (Foret et al. 2021) and ASAM (Kwon et al. 2021) along a gradient of length rho."""
    state["backup"] = p
    return Update(g * (p.abs() + s.eta) if s.adaptive else g, -1.0)


RULES: dict[str, Callable[[Tensor, Tensor, State, Settings, Count], Update]] = {
    "sgd": sgd,
    "sgd_momentum": sgd,
    "adam": adam,
    "adam_amsgrad": adam,
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
#: Trust ratios of the final direction, which late centring may have changed.
TRUSTED: dict[str, Callable[[Update, Tensor, Settings], Update]] = {"lamb": lamb_trusted}
