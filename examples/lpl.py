"""Logit perturbation (LPL), the forerunner of LPG that the studies compare LPG with, written from its formula.

Learning to Perturb Logits (Li, Su, Wu and Zhang, "Logit Perturbation", AAAI 2022) adds one vector for each class to
the *logits*. It raises the loss of some classes, so that more is learned from them, and lowers that of others, within a bound.
The vector comes from steps of fixed length along the mean logit gradient of the class, which is computed anew for each step.
Here a step is a fifth of the bound, and the vector is a constant in the backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS = 5


def lpl_cross_entropy(logits: Tensor, target: Tensor, bound: Tensor) -> Tensor:
    """Cross-entropy of perturbed logits.

    Args:
        logits: (N, C).
        target: (N,).
        bound: (C,), the largest norm of each class's vector. A negative one makes the class easier in place of harder.
    """
    return F.cross_entropy(logits + perturbation(logits.detach(), target, bound)[target], target)


def perturbation(logits: Tensor, target: Tensor, bound: Tensor) -> Tensor:
    """The vectors of all classes, (C, C); those of absent classes are 0."""
    classes = logits.shape[1]
    members = F.one_hot(target, classes).to(logits.dtype)
    size = members.sum(dim=0).clamp(min=1)[:, None]
    vectors = torch.zeros(classes, classes)
    for _ in range(STEPS):
        gradient = (logits + vectors[target]).softmax(dim=1) - members
        vectors = vectors + bound[:, None] / STEPS * F.normalize(members.T @ gradient / size)
    return vectors


def confidence_bound(logits: Tensor, target: Tensor, bound: float) -> Tensor:
    """The paper's bounds for balanced data, (C,): classes of less than average confidence become harder, others easier."""
    classes = logits.shape[1]
    members = F.one_hot(target, classes).to(logits.dtype)
    own = logits.detach().softmax(dim=1).gather(1, target[:, None]).squeeze(1)
    size = members.sum(dim=0)
    confidence = members.T @ own / size.clamp(min=1)
    return bound * (confidence[size > 0].mean() - confidence).sign() * (size > 0)
