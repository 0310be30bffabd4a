"""Update rules that torch.optim lacks, written in torch's multi-tensor operations as its own optimizers are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt

import torch
from torch import Tensor

from ..cases import StepCase, Workload
from ..timing import Step
from .eager import gradients

Lists = dict[str, list[Tensor]]
MakeRule = Callable[["StepCase", list[Tensor], "Lists"], Step]


def lion(case: StepCase, params: list[Tensor], state: Lists) -> Step:
    """Chen et al. 2023, algorithm 2."""
    beta1, beta2 = case.rule.options["betas"]

    def step() -> None:
        grads = gradients(params)
        updates = torch._foreach_lerp(state["exp_avg"], grads, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_lerp_(state["exp_avg"], grads, 1 - beta2)
        torch._foreach_mul_(params, 1 - case.lr * case.weight_decay)
        torch._foreach_add_(params, updates, alpha=-case.lr)

    return step


def ratios(numerators: Sequence[Tensor], denominators: Sequence[Tensor]) -> list[Tensor]:
    """Quotients of norms; 1 where either norm is zero."""
    pairs = zip(numerators, denominators, strict=True)
    return [torch.where((a > 0) & (b > 0), a / b, torch.ones_like(a)) for a, b in pairs]


def lamb(case: StepCase, params: list[Tensor], state: Lists) -> Step:
    """You et al. 2020, algorithm 2."""
    (beta1, beta2), eps, taken = case.rule.options["betas"], case.rule.options["eps"], [0]

    def step() -> None:
        taken[0] += 1
        grads = gradients(params)
        torch._foreach_lerp_(state["exp_avg"], grads, 1 - beta1)
        torch._foreach_mul_(state["exp_avg_sq"], beta2)
        torch._foreach_addcmul_(state["exp_avg_sq"], grads, grads, 1 - beta2)
        updates = torch._foreach_sqrt(state["exp_avg_sq"])
        torch._foreach_div_(updates, sqrt(1 - beta2 ** taken[0]))
        torch._foreach_add_(updates, eps)
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, state["exp_avg"])
        torch._foreach_div_(updates, 1 - beta1 ** taken[0])
        torch._foreach_add_(updates, params, alpha=case.weight_decay)
        sizes = ratios(torch._foreach_norm(params), torch._foreach_norm(updates))
        torch._foreach_mul_(updates, sizes)
        torch._foreach_add_(params, updates, alpha=-case.lr)

    return step


def lars(case: StepCase, params: list[Tensor], state: Lists) -> Step:
    """You et al. 2017, with the learning rate outside the momentum."""
    options = case.rule.options

    def step() -> None:
        grads = gradients(params)
        weights, sizes = torch._foreach_norm(params), torch._foreach_norm(grads)
        whole = [g + case.weight_decay * w + 1e-8 for g, w in zip(sizes, weights, strict=True)]
        trusted = [options["trust_coefficient"] * w for w in weights]
        decayed = torch._foreach_add(grads, params, alpha=case.weight_decay)
        torch._foreach_mul_(decayed, ratios(trusted, whole))
        torch._foreach_mul_(state["momentum_buffer"], options["momentum"])
        torch._foreach_add_(state["momentum_buffer"], decayed)
        torch._foreach_add_(params, state["momentum_buffer"], alpha=-case.lr)

    return step


def adan(case: StepCase, params: list[Tensor], state: Lists) -> Step:
    """Xie et al. 2022, as the authors' multi-tensor code has it."""
    (beta1, beta2, beta3), eps, taken = case.rule.options["betas"], case.rule.options["eps"], [0]

    def step() -> None:
        taken[0] += 1
        grads, before = gradients(params), state["neg_pre_grad"]
        torch._foreach_add_(before, grads)
        torch._foreach_lerp_(state["exp_avg"], grads, 1 - beta1)
        torch._foreach_lerp_(state["exp_avg_diff"], before, 1 - beta2)
        torch._foreach_mul_(before, beta2)
        torch._foreach_add_(before, grads)
        torch._foreach_mul_(state["exp_avg_sq"], beta3)
        torch._foreach_addcmul_(state["exp_avg_sq"], before, before, 1 - beta3)
        denominators = torch._foreach_sqrt(state["exp_avg_sq"])
        torch._foreach_div_(denominators, sqrt(1 - beta3 ** taken[0]))
        torch._foreach_add_(denominators, eps)
        rate1, rate2 = case.lr / (1 - beta1 ** taken[0]), case.lr * beta2 / (1 - beta2 ** taken[0])
        torch._foreach_addcdiv_(params, state["exp_avg"], denominators, value=-rate1)
        torch._foreach_addcdiv_(params, state["exp_avg_diff"], denominators, value=-rate2)
        torch._foreach_div_(params, 1 + case.lr * case.weight_decay)
        torch._foreach_zero_(before)
        torch._foreach_sub_(before, grads)

    return step


RULES: dict[str, MakeRule] = {"Lion": lion, "LAMB": lamb, "LARS": lars, "Adan": adan}


class EagerOptimizer:
    """One of these rules on a workload's tensors, with the `step` method of an optimizer."""

    def __init__(self, case: StepCase, workload: Workload) -> None:
        state = {key: workload.state[key].tensors for key in case.rule.state}
        self._step = RULES[case.rule.class_name](case, list(workload.params), state)

    @torch.no_grad()
    def step(self) -> None:
        """Take a step."""
        self._step()
