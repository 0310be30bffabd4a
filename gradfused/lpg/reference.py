"""LPG cross-entropy in plain PyTorch: the oracle of the fused kernels (in float64), and the fallback where they cannot run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Measured, Perturbation, Problem, find_stray


def _kept(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return which rows count and the class of each row, 0 for ignored rows."""
    kept = problem.target != problem.ignore_index
    return kept, torch.where(kept, problem.target, 0)


def _gradients(problem: Problem, log_p: Tensor, kept: Tensor, classes: Tensor) -> Tensor:
    """Return (n, C): softmax - target distribution; 0 for ignored rows."""
    distribution = F.one_hot(classes, problem.classes).to(log_p.dtype)
    distribution = distribution * (1 - problem.label_smoothing) + problem.label_smoothing / problem.classes
    return torch.where(kept[:, None], log_p.exp() - distribution, 0)


def _losses(problem: Problem, log_p: Tensor, kept: Tensor, classes: Tensor, weight: Tensor) -> Tensor:
    own = -log_p.gather(1, classes[:, None])[:, 0] * weight[classes]
    s = problem.label_smoothing
    if s:
        own = (1 - s) * own - s / problem.classes * (log_p * weight).sum(1)
    return torch.where(kept, own, 0)


def forward(problem: Problem, tally: bool) -> Measured:
    """Compute the losses; save the log-probabilities."""
    find_stray(problem)  # on a GPU the gather below asserts
    kept, classes = _kept(problem)
    log_p = F.log_softmax(problem.rows.to(problem.wide), 1)
    weight = log_p.new_ones(problem.classes) if problem.weight is None else problem.weight
    loss = _losses(problem, log_p, kept, classes, weight)
    total = torch.stack((loss.double().sum(), torch.where(kept, weight[classes], 0).double().sum()))
    counts = None
    if tally:
        norms = _gradients(problem, log_p, kept, classes).norm(dim=1)
        own = log_p.gather(1, classes[:, None])[:, 0].exp()
        values = torch.stack((torch.ones_like(own), own, norms)).double()
        counts = values.new_zeros(3, problem.classes).index_add_(1, classes, torch.where(kept, values, 0))
    return Measured(loss, total, counts, (log_p,))


def class_sums(problem: Problem, saved: tuple[Tensor, ...]) -> Tensor:
    """Sum each class's logit gradients, (C, C)."""
    kept, classes = _kept(problem)
    g = _gradients(problem, saved[0], kept, classes)
    return g.new_zeros(problem.classes, problem.classes).index_add_(0, classes, g)


def learn(gradient: Tensor, how: Perturbation, bound: Tensor) -> Tensor:
    """Return the delta of each row of ``gradient``, (k, C), for signed bounds (k,)."""
    eps, sign = bound.abs()[:, None], bound.sign()[:, None]
    if not how.steps:
        norm = gradient.norm(dim=1, keepdim=True)
        length = torch.where(sign < 0, torch.minimum(eps, norm), eps)
        return torch.where(norm > 0, sign * length / norm * gradient, 0)
    step = torch.full_like(eps, how.step_size) if how.step_size is not None else 2.5 * eps / how.steps
    delta = torch.zeros_like(gradient)
    for _ in range(how.steps):
        moved = gradient + delta
        norm = moved.norm(dim=1, keepdim=True)
        length = torch.where(sign < 0, torch.minimum(step, norm), step)  # when dampening, not beyond the origin
        delta = delta + torch.where(norm > 0, sign * length / norm * moved, 0)
        size = delta.norm(dim=1, keepdim=True)
        delta = torch.where(size > eps, eps / size * delta, delta)
    return delta


def _delta(g: Tensor, kept: Tensor, classes: Tensor, how: Perturbation) -> Tensor:
    """Return (n, C): what is added to each row of ``g``."""
    if how.scope == "sample":
        return learn(g, how, how.bound[classes])
    if how.means is not None:
        present, row = classes.unique(return_inverse=True)
        return learn(how.means[present], how, how.bound[present])[row]
    present, row, count = classes[kept].unique(return_inverse=True, return_counts=True)
    means = g.new_zeros(len(present), g.shape[1]).index_add_(0, row, g[kept]) / count[:, None]
    return torch.zeros_like(g).index_put_((kept,), learn(means, how, how.bound[present])[row])


def backward(problem: Problem, saved: tuple[Tensor, ...], factor: Tensor, how: Perturbation) -> Tensor:
    """Compute the perturbed gradient."""
    log_p = saved[0]
    kept, classes = _kept(problem)
    g = _gradients(problem, log_p, kept, classes)
    delta = _delta(g, kept, classes, how)
    if problem.weight is None:
        out = g + delta
    else:
        own, s = problem.weight[classes][:, None], problem.label_smoothing
        p = log_p.exp()
        one_hot = F.one_hot(classes, problem.classes)
        out = (1 - s) * own * (p - one_hot) + own * delta
        if s:
            out = out + s / problem.classes * (problem.weight.sum() * p - problem.weight)
    out = torch.where(kept[:, None], factor[:, None] * out, 0).to(problem.logits.dtype)
    return out.view(problem.logits.shape)
