"""What a peer is to the benchmark, and how it takes over the tensors that all peers share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..cases.steps import Case, Slab, Workload
from ..timing.rounds import Step
from .around import around
from .eager import NoiseSource, Transforms


class Steps(Protocol):
    """An optimizer, as far as its step goes."""

    def step(self) -> Any:
        """Take a step."""


Build = Callable[[Case, Workload, NoiseSource], Step]


@dataclass(frozen=True)
class Peer:
    """One way of taking a step.

    Attributes:
        name: What `--peers` and the tables call it.
        about: One line for `--list`.
        build: Makes the step of a case on a workload's tensors.
        absent: Why this machine lacks it, or None.
        unable: Why it cannot do a case, or None.
        opt_in: Runs only where `--peers` names it.
        home: The only type of device where it runs without being named, or None for every one.
        copies: Memory of its temporaries, in multiples of the parameters' size.
        keeps: Float32 state for each parameter that it allocates itself on CUDA and shares with nobody.
        rebuilds: Its step for a CUDA graph is another: it is built from the case with `captured` on.
        uncapturable: Why no CUDA graph can hold its step, or None.
        compiles: It takes long to build, so that one set of tensors must do.
        precisions: Ways of keeping 16-bit weights that it has besides rounding them.
        slack: What a step may differ from the oracle's on top of rounding, where its rule is known to differ.
    """

    name: str
    about: str
    build: Build
    absent: Callable[[], str | None] = lambda: None
    unable: Callable[[Case], str | None] = lambda case: None
    opt_in: bool = False
    home: str | None = None
    copies: float = 0.0
    keeps: float = 0.0
    rebuilds: bool = False
    uncapturable: str | None = None
    compiles: bool = False
    precisions: tuple[str, ...] = ()
    slack: Callable[[Case], float] = lambda case: 0.0

    def reason_against(self, case: Case) -> str | None:
        """Why it will not be measured on a case, or None if it can."""
        return self.absent() or self.unable(case) or self.cannot_keep(case)

    def cannot_keep(self, case: Case) -> str | None:
        """Why it lacks the recipe's precision, or None."""
        if case.recipe.precision is None or case.recipe.precision in self.precisions:
            return None
        return f"has no {case.recipe.precision} summation of weights"


def needs(module: str, package: str) -> Callable[[], str | None]:
    """The `absent` of a peer that is another package; does not import it."""

    def absent() -> str | None:
        return None if find_spec(module) else f"not installed (pip install --no-deps {package})"

    return absent


def cuda_only(case: Case) -> str | None:
    """The `unable` of what runs on CUDA alone."""
    return None if case.device.type == "cuda" else "runs on CUDA only"


def share_state(optimizer: Optimizer, workload: Workload, *, extra: bool = False) -> None:
    """Has an optimizer with torch's state keys use the workload's state, from step 0.

    Args:
        optimizer: On the workload's parameters.
        workload: Whose state.
        extra: The recipe's own state is the optimizer's, too.

    Raises:
        RuntimeError: The optimizer copied the state: memory would grow with every variant.
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
    """One parameter's entry in a state dict."""
    scalars = {key: torch.tensor(value) for key, value in workload.rule.scalars.items()}
    return scalars | {key: slab.tensors[index] for key, slab in slabs.items()}


def transform_then_step(transforms: Transforms, optimizer: Steps, workload: Workload) -> Step:
    """The eager way: transform the gradients, step, and whatever else the recipe has, before and after."""
    recipe = transforms.recipe

    def step() -> None:
        transforms.advance()
        transforms.apply()
        optimizer.step()

    return around(recipe, workload, step if recipe.transforms else optimizer.step, foreach=transforms.foreach)


def few_large(workload: Workload) -> bool:
    """Whether tensors are so large that a loop over them beats torch's multi-tensor operations.

    On a CPU those loop too, but trip through memory twice where a loop finds the tensor in cache.
    """
    weights = workload.weights.flat
    return weights.device.type == "cpu" and weights.numel() > len(workload.params) << 16


def rule_options(case: Case) -> dict[str, object]:
    """A case's hyperparameters, in torch's names."""
    options = {"lr": case.lr, "weight_decay": case.weight_decay, **case.rule.options}
    if case.dtype == torch.float16 and "eps" in options:
        options["eps"] = 1e-3  # 1e-8 is 0 there, and so is many a second moment: 0 / 0 for everyone
    return options


def graph_options(case: Case) -> dict[str, object]:
    """What torch's optimizers ask for before a CUDA graph may hold their step; SGD counts none and asks for nothing."""
    return {"capturable": True} if case.captured and case.rule.class_name != "SGD" else {}


def grads_of(workload: Workload) -> list[Tensor]:
    """The gradients that the workload's parameters hold."""
    return [param.grad for param in workload.params if param.grad is not None]
