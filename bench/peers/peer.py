"""Optimizers as peers: what the benchmark knows of each, and how it takes over the tensors that all of them share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..cases import Peer, Slab, StepCase, Workload
from ..timing import Step
from .eager import NoiseSource, Transforms, around


class HasStep(Protocol):
    """Anything with the `step` method of an optimizer."""

    def step(self) -> Any:
        """Take a step."""


Build = Callable[[StepCase, Workload, NoiseSource], Step]


@dataclass(frozen=True)
class StepPeer(Peer):
    """One way of taking an optimizer step; `build(case, workload, source)` returns the step.

    Attributes:
        home: The only type of device on which it runs without being named, or None for every type.
        keeps: Float32 state for each parameter that it allocates itself on CUDA and shares with nobody.
        rebuilds: Its step for a CUDA graph is a different one, built from the case with `captured` on.
        uncapturable: Why no CUDA graph can hold its step, or None.
        compiles: Building it takes long, so that it is built for one set of tensors only.
        precisions: The values of a recipe's `precision` that it supports.
        slack: How much one step may differ from the oracle's besides rounding, where its rule is known to differ.
    """

    home: str | None = None
    keeps: float = 0.0
    rebuilds: bool = False
    uncapturable: str | None = None
    compiles: bool = False
    precisions: tuple[str, ...] = ()
    slack: Callable[[StepCase], float] = lambda case: 0.0

    def reason_against(self, case: StepCase) -> str | None:
        """Why it cannot be measured on a case, or None if it can."""
        return super().reason_against(case) or self.cannot_keep(case)

    def cannot_keep(self, case: StepCase) -> str | None:
        """Why it cannot keep weights as the recipe's `precision` asks, or None."""
        if case.recipe.precision is None or case.recipe.precision in self.precisions:
            return None
        return f"has no {case.recipe.precision} summation of weights"


def cuda_only(case: StepCase) -> str | None:
    """Why a peer that runs on CUDA only cannot do a case, or None."""
    return None if case.device.type == "cuda" else "runs on CUDA only"


def share_state(optimizer: Optimizer, workload: Workload, *, extra: bool = False) -> None:
    """Make an optimizer with torch's state keys use the workload's state, from step 0.

    Args:
        optimizer: The optimizer, on the workload's parameters.
        workload: The workload whose state it is to use.
        extra: The optimizer also keeps the state that the recipe adds.

    Raises:
        RuntimeError: The optimizer copied the state, so that memory would grow with every variant.
    """
    slabs = {key: slab for key, slab in workload.state.items() if extra or key in workload.rule.state}
    if not slabs:
        return
    state = {index: state_of(workload, index, slabs) for index in range(len(workload.params))}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    for key, slab in slabs.items():
        held = optimizer.state[workload.params[0]][key]
        if held.data_ptr() != slab.tensors[0].data_ptr():
            raise RuntimeError(f"the optimizer copied {key!r} when it loaded the state")


def state_of(workload: Workload, index: int, slabs: dict[str, Slab]) -> dict[str, Tensor]:
    """The entry of one parameter in a state dict."""
    scalars = {key: torch.tensor(value) for key, value in workload.rule.scalars.items()}
    return scalars | {key: slab.tensors[index] for key, slab in slabs.items()}


def transform_then_step(transforms: Transforms, optimizer: HasStep, workload: Workload) -> Step:
    """A step as users write it: transform the gradients, then step, with SAM and averaging around it if the recipe has them."""
    recipe = transforms.recipe

    def step() -> None:
        transforms.advance()
        transforms.apply()
        optimizer.step()

    return around(recipe, workload, step if recipe.active else optimizer.step, foreach=transforms.foreach)


def few_large(workload: Workload) -> bool:
    """Whether the tensors are so large that a loop over them is faster than torch's multi-tensor operations.

    On a CPU those are loops too, but each operation goes over all tensors before the next begins, so nothing stays in cache.
    """
    weights = workload.weights.flat
    return weights.device.type == "cpu" and weights.numel() > len(workload.params) << 16


def rule_options(case: StepCase) -> dict[str, object]:
    """A case's hyperparameters under torch's names."""
    options = {"lr": case.lr, "weight_decay": case.weight_decay, **case.rule.options}
    if case.dtype == torch.float16 and "eps" in options:
        options["eps"] = 1e-3  # 1e-8 is 0 in float16, and so are many second moments: everyone would compute 0 / 0
    return options


def graph_options(case: StepCase) -> dict[str, object]:
    """The option without which torch's optimizers refuse to step in a CUDA graph; those that count no steps lack it."""
    kind = getattr(torch.optim, case.rule.class_name)
    return {"capturable": True} if case.captured and "capturable" in inspect.signature(kind).parameters else {}
