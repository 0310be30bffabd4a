"""The update rules, as torch.optim or their papers have them: for each, the numbers of a step and the direction it takes.

``coefficients`` and ``direction`` choose among them by the number that csrc/rules.def gives a rule. The numbers of a step are
made of the settings of the row's group and of float64 scalars: ``lr``; ``step``, which counts from 1; ``first``, whether the
state holds nothing yet; ``mu_product``, of NAdam's momenta; and ``ratio``, by which a rule with a trust ratio scales its step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import layout as at
from .access import read, read_bool
from .transforms import maximum, mix_of, mixed, power


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
def greatest(T: tl.constexpr):
    """The greatest finite number of a dtype."""
    if T == tl.float64:
        return tl.full([], 1.7976931348623157e308, T)
    else:
        return tl.full([], 3.402823466e38, T)


@triton.jit
def option(settings, FIELD: tl.constexpr):
    return read(settings + FIELD, tl.float64)


@triton.jit
def shrunk(settings, lr, T: tl.constexpr):
    """What decoupled weight decay leaves of the weights."""
    decay = option(settings, at.settings_weight_decay)
    return tl.where(read_bool(settings + at.settings_decoupled), 1.0 - lr * decay, 1.0).to(T)


@triton.jit
def moment_numbers(settings, T: tl.constexpr):
    """The numbers of Adam's moments and eps, the first of those of a rule that has moments."""
    beta2 = option(settings, at.settings_beta2)
    mix = mix_of(1.0 - option(settings, at.settings_beta1), T)
    return mix[0], mix[1], beta2.to(T), (1.0 - beta2).to(T), option(settings, at.settings_eps).to(T)


@triton.jit
def moments(g, s0, s1, c):
    """Adam's moments after a step. In torch's order, which keeps gradients of 1e20 finite."""
    return mixed(s0, g, (c[0], c[1])), s1 * c[2] + g * c[3] * g


@triton.jit
def sgd_coefficients(settings, lr, T: tl.constexpr):
    return tl.full([], 1.0, T), lr.to(T), (lr.to(T),)


@triton.jit
def sgd(g, p, s0, s1, s2, s3, c):
    """torch.optim.SGD without momentum."""
    return g, s0, s1, s2, s3


@triton.jit
def sgd_momentum_coefficients(settings, lr, first, T: tl.constexpr):
    momentum = option(settings, at.settings_momentum)
    fresh = tl.where(first, 1.0, 1.0 - option(settings, at.settings_dampening))  # the first fills the buffer undamped
    ahead = tl.where(read_bool(settings + at.settings_nesterov), momentum, 0.0)
    return tl.full([], 1.0, T), lr.to(T), (momentum.to(T), fresh.to(T), ahead.to(T))


@triton.jit
def sgd_momentum(g, p, s0, s1, s2, s3, c):
    """torch.optim.SGD with momentum (Sutskever et al. 2013)."""
    s0 = s0 * c[0] + g * c[1]
    return tl.where(c[2] != 0.0, g + s0 * c[2], s0), s0, s1, s2, s3


@triton.jit
def adam_coefficients(settings, lr, step, T: tl.constexpr):
    correction1 = 1.0 - power(option(settings, at.settings_beta1), step)
    correction2 = 1.0 - power(option(settings, at.settings_beta2), step)
    numbers = moment_numbers(settings, T) + ((1.0 / tl.sqrt(correction2)).to(T),)
    return shrunk(settings, lr, T), (lr / correction1).to(T), numbers


@triton.jit
def adam(g, p, s0, s1, s2, s3, c):
    """torch.optim.Adam and AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019)."""
    s0, s1 = moments(g, s0, s1, c)
    return divide(s0, root(s1) * c[5] + c[4]), s0, s1, s2, s3


@triton.jit
def adam_amsgrad(g, p, s0, s1, s2, s3, c):
    """The same with amsgrad=True (Reddi et al. 2018)."""
    s0, s1 = moments(g, s0, s1, c)
    s2 = maximum(s2, s1)
    return divide(s0, root(s2) * c[5] + c[4]), s0, s1, s2, s3


@triton.jit
def adagrad_coefficients(settings, lr, step, T: tl.constexpr):
    rate = lr / (1.0 + (step - 1.0) * option(settings, at.settings_lr_decay))
    return tl.full([], 1.0, T), rate.to(T), (option(settings, at.settings_eps).to(T),)


@triton.jit
def adagrad(g, p, s0, s1, s2, s3, c):
    """torch.optim.Adagrad (Duchi et al. 2011)."""
    s0 = s0 + g * g
    return divide(g, root(s0) + c[0]), s0, s1, s2, s3


@triton.jit
def rmsprop_coefficients(settings, lr, T: tl.constexpr):
    alpha = option(settings, at.settings_beta2)
    eps = option(settings, at.settings_eps).to(T)
    momentum = option(settings, at.settings_momentum).to(T)
    mix = mix_of(1.0 - alpha, T)
    numbers = (alpha.to(T), (1.0 - alpha).to(T), eps, momentum, mix[0], mix[1])
    return tl.full([], 1.0, T), lr.to(T), numbers


@triton.jit
def rmsprop(g, p, s0, s1, s2, s3, c):
    """torch.optim.RMSprop (Hinton 2012)."""
    s0 = s0 * c[0] + g * c[1] * g
    return divide(g, root(s0) + c[2]), s0, s1, s2, s3


@triton.jit
def rmsprop_momentum(g, p, s0, s1, s2, s3, c):
    """The same with momentum."""
    d, s0, s1, s2, s3 = rmsprop(g, p, s0, s1, s2, s3, c)
    s1 = s1 * c[3] + d
    return s1, s0, s1, s2, s3


@triton.jit
def deviation(g, square, mean, c):
    """(direction, square, mean) of RMSprop with centered=True (Graves 2013)."""
    square = square * c[0] + g * c[1] * g
    mean = mixed(mean, g, (c[4], c[5]))
    # No further than the greatest finite number: where the average square is infinite, what is left of it is as well.
    of_mean = mean * mean
    of_mean = tl.where(of_mean > greatest(g.dtype), greatest(g.dtype), of_mean)
    return divide(g, root(square - of_mean) + c[2]), square, mean


@triton.jit
def rmsprop_centered(g, p, s0, s1, s2, s3, c):
    """torch.optim.RMSprop with centered=True."""
    d, s0, s1 = deviation(g, s0, s1, c)
    return d, s0, s1, s2, s3


@triton.jit
def rmsprop_centered_momentum(g, p, s0, s1, s2, s3, c):
    """The same with momentum."""
    d, s0, s2 = deviation(g, s0, s2, c)
    s1 = s1 * c[3] + d
    return s1, s0, s1, s2, s3


@triton.jit
def warmed_momentum(settings, step):
    """NAdam's momentum at a step."""
    warmth = power(step * 0.0 + 0.96, step * option(settings, at.settings_momentum_decay))
    return option(settings, at.settings_beta1) * (1.0 - 0.5 * warmth)


@triton.jit
def next_mu_product(settings, step, mu_product, dtype):
    """What the product of NAdam's momenta becomes at a step, as the scalar of ``dtype`` that keeps it holds it."""
    following = mu_product * warmed_momentum(settings, step)
    return tl.where(dtype == at.DType_float64, following, following.to(tl.float32).to(tl.float64))


@triton.jit
def nadam_coefficients(settings, lr, step, mu_product, T: tl.constexpr):
    beta2 = option(settings, at.settings_beta2)
    mu = warmed_momentum(settings, step)
    following = warmed_momentum(settings, step + 1.0)
    numbers = moment_numbers(settings, T) + (
        (1.0 / (1.0 - power(beta2, step))).to(T),
        ((1.0 - mu) / (1.0 - mu_product)).to(T),
        (following / (1.0 - mu_product * following)).to(T),
    )
    return shrunk(settings, lr, T), lr.to(T), numbers


@triton.jit
def nadam(g, p, s0, s1, s2, s3, c):
    """torch.optim.NAdam (Dozat 2016)."""
    s0, s1 = moments(g, s0, s1, c)
    return divide(g * c[6] + s0 * c[7], root(s1 * c[5]) + c[4]), s0, s1, s2, s3


@triton.jit
def radam_coefficients(settings, lr, step, T: tl.constexpr):
    """While the variance of the adaptive rate is intractable, the first steps, it is left out."""
    beta1 = option(settings, at.settings_beta1)
    beta2 = option(settings, at.settings_beta2)
    left = power(beta2, step)
    correction2 = 1.0 - left
    most = 2.0 / (1.0 - beta2) - 1.0
    length = most - 2.0 * step * left / correction2
    rectified = length > 5.0
    above = tl.where(rectified, (length - 4.0) * (length - 2.0) * most * correction2, 1.0)
    below = tl.where(rectified, (most - 4.0) * (most - 2.0) * length, 1.0)
    rate = lr / (1.0 - power(beta1, step)) * tl.sqrt(above / below)
    return shrunk(settings, lr, T), rate.to(T), moment_numbers(settings, T) + (rectified,)


@triton.jit
def radam(g, p, s0, s1, s2, s3, c):
    """torch.optim.RAdam (Liu et al. 2020)."""
    s0, s1 = moments(g, s0, s1, c)
    return divide(s0, tl.where(c[5], root(s1) + c[4], 1.0)), s0, s1, s2, s3


@triton.jit
def lion_coefficients(settings, lr, T: tl.constexpr):
    beta1 = option(settings, at.settings_beta1)
    beta2 = option(settings, at.settings_beta2)
    numbers = (beta1.to(T), (1.0 - beta1).to(T), beta2.to(T), (1.0 - beta2).to(T))
    return shrunk(settings, lr, T), lr.to(T), numbers


@triton.jit
def lion(g, p, s0, s1, s2, s3, c):
    """Lion (Chen et al. 2023). NaN stays."""
    x = s0 * c[0] + g * c[1]
    sign = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))
    return sign.to(g.dtype), s0 * c[2] + g * c[3], s1, s2, s3


@triton.jit
def trust_ratio(weight_norm, norm, over):
    """The ratio of a trust ratio's norms (You et al. 2017, 2020); 1 where either says nothing."""
    ratio = tl.full([], 1.0, tl.float64)
    if (weight_norm > 0.0) & (norm > 0.0):
        ratio = weight_norm / over
    return ratio


@triton.jit
def lamb_coefficients(settings, lr, step, ratio, T: tl.constexpr):
    correction1 = 1.0 - power(option(settings, at.settings_beta1), step)
    correction2 = 1.0 - power(option(settings, at.settings_beta2), step)
    rate = lr * ratio
    numbers = moment_numbers(settings, T) + ((1.0 / tl.sqrt(correction2)).to(T), (1.0 / correction1).to(T))
    return (1.0 - rate * option(settings, at.settings_weight_decay)).to(T), rate.to(T), numbers


@triton.jit
def lamb(g, p, s0, s1, s2, s3, c):
    """LAMB (You et al. 2020)."""
    s0, s1 = moments(g, s0, s1, c)
    return divide(s0 * c[6], root(s1) * c[5] + c[4]), s0, s1, s2, s3


@triton.jit
def lars_ratio(settings, weight_norm, norm):
    """``norm`` is that of the gradient without decay."""
    over = norm + option(settings, at.settings_weight_decay) * weight_norm + option(settings, at.settings_eps)
    return trust_ratio(option(settings, at.settings_trust_coefficient) * weight_norm, norm, over)


@triton.jit
def lars_coefficients(settings, lr, first, ratio, T: tl.constexpr):
    shrink, rate, numbers = sgd_momentum_coefficients(settings, lr, first, T)
    decay = option(settings, at.settings_weight_decay)
    return shrink, rate, (numbers[0], numbers[1], numbers[2], decay.to(T), ratio.to(T))


@triton.jit
def lars(g, p, s0, s1, s2, s3, c):
    """LARS without momentum (You et al. 2017)."""
    return (g + c[3] * p) * c[4], s0, s1, s2, s3


@triton.jit
def lars_momentum(g, p, s0, s1, s2, s3, c):
    """The same with momentum."""
    return sgd_momentum((g + c[3] * p) * c[4], p, s0, s1, s2, s3, c)


@triton.jit
def adan_coefficients(settings, lr, step, first, T: tl.constexpr):
    beta1 = option(settings, at.settings_beta1)
    beta2 = option(settings, at.settings_beta2)
    beta3 = option(settings, at.settings_beta3)
    correction1 = 1.0 - power(beta1, step)
    correction2 = 1.0 - power(beta2, step)
    decay = lr * option(settings, at.settings_weight_decay)
    proximal = read_bool(settings + at.settings_proximal)  # decays after the update
    by = tl.where(proximal, 1.0 / (1.0 + decay), 1.0)
    numbers = (
        beta1.to(T),
        (1.0 - beta1).to(T),
        beta2.to(T),
        (1.0 - beta2).to(T),
        beta3.to(T),
        (1.0 - beta3).to(T),
        (1.0 / tl.sqrt(1.0 - power(beta3, step))).to(T),
        option(settings, at.settings_eps).to(T),
        (beta2 * correction1 / correction2).to(T),
        tl.where(first, 0.0, 1.0).to(T),
    )
    return tl.where(proximal, by, 1.0 - decay).to(T), (lr / correction1 * by).to(T), numbers


@triton.jit
def adan(g, p, s0, s1, s2, s3, c):
    """Adan (Xie et al. 2022): exp_avg, exp_avg_sq, exp_avg_diff and the last gradient, negated."""
    difference = (g + s3) * c[9]
    s0 = s0 * c[0] + g * c[1]
    s2 = s2 * c[2] + difference * c[3]
    ahead = g + c[2] * difference
    s1 = s1 * c[4] + ahead * c[5] * ahead
    return divide(s0 + s2 * c[8], root(s1) * c[6] + c[7]), s0, s1, s2, -g


@triton.jit
def ascend_coefficients(settings, T: tl.constexpr):
    numbers = (option(settings, at.settings_eta).to(T), read_bool(settings + at.settings_adaptive))
    return tl.full([], 1.0, T), tl.full([], -1.0, T), numbers


@triton.jit
def reach(p, eta):
    """By how much ASAM lets a weight move (Kwon et al. 2021)."""
    return tl.abs(p) + eta


@triton.jit
def ascend(g, p, s0, s1, s2, s3, c):
    """SAM's ascent (Foret et al. 2021): what the weights were stays in the state, which is not read."""
    t = reach(p, c[0])
    return tl.where(c[1], g * t * t, g), p, s1, s2, s3


@triton.jit
def ratio_of(RULE: tl.constexpr, settings, weight_norm, norm):
    """The ratio by which a rule scales its step: by the norm of the gradient it is given, or of its direction."""
    if (at.rules_trust_gradient >> RULE) & 1:
        return lars_ratio(settings, weight_norm, norm)
    else:
        return trust_ratio(weight_norm, norm, norm)


@triton.jit
def coefficients(RULE: tl.constexpr, settings, lr, step, first, mu_product, ratio, T: tl.constexpr):
    """(shrink, step size, the rule's numbers): p becomes shrink * p - step size * direction."""
    if RULE == at.Rule_sgd:
        return sgd_coefficients(settings, lr, T)
    elif RULE == at.Rule_sgd_momentum:
        return sgd_momentum_coefficients(settings, lr, first, T)
    elif RULE == at.Rule_adam or RULE == at.Rule_adam_amsgrad:
        return adam_coefficients(settings, lr, step, T)
    elif RULE == at.Rule_adagrad:
        return adagrad_coefficients(settings, lr, step, T)
    elif (RULE == at.Rule_rmsprop or RULE == at.Rule_rmsprop_momentum) or (
        RULE == at.Rule_rmsprop_centered or RULE == at.Rule_rmsprop_centered_momentum
    ):
        return rmsprop_coefficients(settings, lr, T)
    elif RULE == at.Rule_nadam:
        return nadam_coefficients(settings, lr, step, mu_product, T)
    elif RULE == at.Rule_radam:
        return radam_coefficients(settings, lr, step, T)
    elif RULE == at.Rule_lion:
        return lion_coefficients(settings, lr, T)
    elif RULE == at.Rule_lamb:
        return lamb_coefficients(settings, lr, step, ratio, T)
    elif RULE == at.Rule_lars or RULE == at.Rule_lars_momentum:
        return lars_coefficients(settings, lr, first, ratio, T)
    elif RULE == at.Rule_adan:
        return adan_coefficients(settings, lr, step, first, T)
    else:
        tl.static_assert(RULE == at.Rule_ascend)
        return ascend_coefficients(settings, T)


@triton.jit
def direction(RULE: tl.constexpr, g, p, s0, s1, s2, s3, c):
    """(direction, the state as it shall be)."""
    if RULE == at.Rule_sgd:
        return sgd(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_sgd_momentum:
        return sgd_momentum(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_adam:
        return adam(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_adam_amsgrad:
        return adam_amsgrad(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_adagrad:
        return adagrad(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_rmsprop:
        return rmsprop(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_rmsprop_momentum:
        return rmsprop_momentum(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_rmsprop_centered:
        return rmsprop_centered(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_rmsprop_centered_momentum:
        return rmsprop_centered_momentum(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_nadam:
        return nadam(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_radam:
        return radam(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_lion:
        return lion(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_lamb:
        return lamb(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_lars:
        return lars(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_lars_momentum:
        return lars_momentum(g, p, s0, s1, s2, s3, c)
    elif RULE == at.Rule_adan:
        return adan(g, p, s0, s1, s2, s3, c)
    else:
        tl.static_assert(RULE == at.Rule_ascend)
        return ascend(g, p, s0, s1, s2, s3, c)
