"""What one run is asked to measure, with every default filled in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from math import sqrt
from pathlib import Path

import torch

from .cases import CPU, MODELS, RECIPES, RULES, Case, FunctionCase, ModelShapes, StepCase, bytes_needed, sets_needed
from .peers import FUNCTIONS
from .timing import Budget, bytes_available, cuda

HEADROOM = 1.1  # times a workload's memory: the rest is for the interpreter, torch and the largest temporary


@dataclass(frozen=True)
class Outputs:
    """Where results go.

    Attributes:
        json: File for records and environment, or None.
        csv: File for records, or None.
        plot: File for the bar chart, or None.
        targets: Print how the figures compare with the project's targets.
    """

    json: Path | None = None
    csv: Path | None = None
    plot: Path | None = None
    targets: bool = False


@dataclass(frozen=True)
class Request:
    """One run of the benchmark or of the training comparison.

    Attributes:
        models: Models whose optimizer steps are measured.
        sizes: Sizes that functions are measured on; a function of which none is named is measured on all its sizes.
        recipes: Recipes of optimizer steps, and functions.
        optimizers: Update rules.
        dtypes: Types of the tensors.
        device: Where everything runs.
        peers: The peers asked for by name; empty for gradfused alone, None for all that are installed and not opt-in.
        seconds: About how long timing may take in all.
        rounds: How many samples each variant gets, or None for as many as fit.
        seeds: How many runs each training gets.
        outputs: Where results go.
        left_out: The models that do not fit into memory, each with its dtype and the reason.
    """

    models: tuple[str, ...]
    sizes: tuple[str, ...]
    recipes: tuple[str, ...]
    optimizers: tuple[str, ...] = ("adamw",)
    dtypes: tuple[str, ...] = ("float32",)
    device: torch.device = CPU
    peers: tuple[str, ...] | None = None
    seconds: float = 75.0
    rounds: int | None = None
    seeds: int = 3
    outputs: Outputs = Outputs()
    left_out: tuple[dict[str, str], ...] = ()

    @property
    def step_recipes(self) -> list[str]:
        """The recipes of optimizer steps."""
        return [name for name in self.recipes if name in RECIPES]

    @property
    def functions(self) -> list[str]:
        """The functions."""
        return [name for name in self.recipes if name in FUNCTIONS]

    def step_cases(self) -> list[StepCase]:
        """Every optimizer step asked for, without the models left out; cases that can share tensors are neighbours."""
        out = {(left["model"], left["dtype"]) for left in self.left_out}
        return [
            StepCase(MODELS[model], RECIPES[recipe], RULES[rule], getattr(torch, dtype), self.device)
            for model, rule, dtype, recipe in product(self.models, self.optimizers, self.dtypes, self.step_recipes)
            if (model, dtype) not in out
        ]

    def function_cases(self) -> list[FunctionCase]:
        """Every function asked for, on each of its sizes that is named, or on all of them if none is."""
        functions = [FUNCTIONS[name] for name in self.functions]
        return [
            FunctionCase(function, size, getattr(torch, dtype), self.device)
            for function, dtype in product(functions, self.dtypes)
            for size in [size for size in function.sizes if size.name in self.sizes] or function.sizes
        ]

    def budgets(self) -> Callable[[Case], Budget]:
        """Each case's share of the time.

        On a CPU it is in proportion to the square root of the case's size, so that small cases get some as well. On a GPU,
        where small steps wait for the host as large ones do for memory, all cases get the same.
        """

        def weight(case: Case) -> float:
            return 1.0 if case.device.type == "cuda" else sqrt(case.model.elements)

        cases: list[Case] = [*self.step_cases(), *self.function_cases()]
        total = sum(map(weight, cases))
        return lambda case: Budget(seconds=self.seconds * weight(case) / total, rounds=self.rounds)

    def too_large(self) -> Iterator[dict[str, str]]:
        """The models that do not fit into memory, each with its dtype and the reason."""
        for name, dtype in product(self.models, self.dtypes):
            reason = memory_problem(MODELS[name], dtype, self.optimizers, self.device)
            if reason:
                yield {"model": name, "dtype": dtype, "reason": reason}


def memory_problem(model: ModelShapes, dtype: str, rules: tuple[str, ...], device: torch.device) -> str | None:
    """Why a model does not fit into a device's memory, with what would help, or None."""
    sizes = (bytes_needed(model.elements, RULES[rule], getattr(torch, dtype)) for rule in rules)
    cache = cuda.cache_bytes(device) if device.type == "cuda" else 0
    needed, free = HEADROOM * max(size * sets_needed(size, cache) for size in sizes), bytes_available(device)
    if needed <= free:
        return None
    return (
        f"{model.name} in {dtype} needs {needed / 1e9:.1f} GB for parameters, gradients and "
        f"state; {free / 1e9:.1f} GB are available. Try --dtype bfloat16 or a smaller model."
    )
