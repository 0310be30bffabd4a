"""LPG cross-entropy in plain PyTorch: the oracle (in float64) of the fused kernels, and what runs where they cannot."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Kernels, Measured, Perturbation, Problem, refuse_stray


def _kept(problem: Problem) -> tuple[Tensor, Tensor]:
    """Which rows count, and their classes: 0 where ignored."""
    kept = problem.target != problem.ignore_index
    return kept, torch.where(kept, problem.target, 0)


def _gradients(problem: Problem, log_p: Tensor, kept: Tensor, classes: Tensor) -> Tensor:
    """(n, C): softmax - target distribution; 0 where ignored."""
    towards = F.one_hot(classes, problem.classes).to(log_p.dtype)
    towards = towards * (1 - problem.label_smoothing) + problem.label_smoothing / problem.classes
    return torch.where(kept[:, None], log_p.exp() - towards, 0)


def _losses(problem: Problem, log_p: Tensor, kept: Tensor, classes: Tensor, weight: Tensor) -> Tensor:
    own = -log_p.gather(1, classes[:, None])[:, 0] * weight[classes]
    s = problem.label_smoothing
    if s:
        own = (1 - s) * own - s / problem.classes * (log_p * weight).sum(1)
    return torch.where(kept, own, 0)


def forward(problem: Problem, tally: bool) -> Measured:
    """The losses and what backward needs: the log-probabilities."""
    kept, classes = _kept(problem)
    if classes.device.type == "cpu":  # elsewhere the gather below asserts on the device
        stray = ((classes < 0) | (classes >= problem.classes)).nonzero()
        if len(stray):
            refuse_stray(problem, int(stray[0]))
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
    """(C, C): the sums of each class's logit gradients."""
    kept, classes = _kept(problem)
    g = _gradients(problem, saved[0], kept, classes)
    return g.new_zeros(problem.classes, problem.classes).index_add_(0, classes, g)


def learn(gradient: Tensor, how: Perturbation, bound: Tensor) -> Tensor:
    """The delta of each row of ``gradient``, (k, C), for signed bounds (k,)."""
    eps, sign = bound.abs()[:, None], bound.sign()[:, None]
    if not how.steps:
        norm = gradient.norm(dim=1, keepdim=True)
        length = torch.where(sign < 0, torch.minimum(eps, norm), eps)
        return torch.where(norm > 0, sign * length / norm * gradient, 0)
    step = torch.full_like(eps, how.step_size) if how.step_size is not None else 2.5 * eps / how.steps
    delta = torch.zeros_like(gradient)
    for _ in range(how.steps):
        at = gradient + delta
        norm = at.norm(dim=1, keepdim=True)
        length = torch.where(sign < 0, torch.minimum(step, norm), step)  # descending, not beyond the origin
        delta = delta + torch.where(norm > 0, sign * length / norm * at, 0)
        size = delta.norm(dim=1, keepdim=True)
        delta = torch.where(size > eps, eps / size * delta, delta)
    return delta


def _delta(g: Tensor, kept: Tensor, classes: Tensor, how: Perturbation) -> Tensor:
    """(n, C): what is added to each row of ``g``."""
    if how.scope == "sample":
        return learn(g, how, how.bound[classes])
    if how.means is not None:
        present, row = classes.unique(return_inverse=True)
        return learn(how.means[present], how, how.bound[present])[row]
    present, row, count = classes[kept].unique(return_inverse=True, return_counts=True)
    means = g.new_zeros(len(present), g.shape[1]).index_add_(0, row, g[kept]) / count[:, None]
    return torch.zeros_like(g).index_put_((kept,), learn(means, how, how.bound[present])[row])


def backward(problem: Problem, saved: tuple[Tensor, ...], factor: Tensor, how: Perturbation) -> Tensor:
    """The perturbed gradient."""
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


KERNELS = Kernels("reference", forward, backward, class_sums)
