"""Logit perturbation, the forerunner of LPG, from its formula: what the studies compare LPG with.

Learning to Perturb Logits (Li, Su, Wu and Zhang, "Logit Perturbation", AAAI 2022) adds one vector a class to the *logits*, so
as to raise the loss of some classes (more is learned of them) and to lower that of others, within a bound. The vector comes from
steps of fixed length along the class's mean logit gradient, computed anew at each step. Here a step is a fifth of the bound, and
the vector counts as a constant in the backward pass.
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
        bound: (C,): the norm that a class's vector may have; a class with a negative one is made easier, not harder.
    """
    return F.cross_entropy(logits + perturbation(logits.detach(), target, bound)[target], target)


def perturbation(logits: Tensor, target: Tensor, bound: Tensor) -> Tensor:
    """(C, C): the vector of every class; 0 for classes that are absent."""
    classes = logits.shape[1]
    members = F.one_hot(target, classes).to(logits.dtype)
    size = members.sum(dim=0).clamp(min=1)[:, None]
    vectors = torch.zeros(classes, classes)
    for _ in range(STEPS):
        gradient = (logits + vectors[target]).softmax(dim=1) - members
        vectors = vectors + bound[:, None] / STEPS * F.normalize(members.T @ gradient / size)
    return vectors


def confidence_bound(logits: Tensor, target: Tensor, bound: float) -> Tensor:
    """(C,): the paper's choice for balanced data: classes of less than average confidence are made harder, the others easier."""
    classes = logits.shape[1]
    members = F.one_hot(target, classes).to(logits.dtype)
    own = logits.detach().softmax(dim=1).gather(1, target[:, None]).squeeze(1)
    size = members.sum(dim=0)
    confidence = members.T @ own / size.clamp(min=1)
    return bound * (confidence[size > 0].mean() - confidence).sign() * (size > 0)
