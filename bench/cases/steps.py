"""One kind of case: an optimizer step on the parameters of a model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .models import ModelShapes
from .recipes import RECIPES, StepRecipe
from .rules import UpdateRule

CPU = torch.device("cpu")
MAX_SETS = 128  # sets of tensors that rotate past a cache; the models here need 38 at most on an H200


@dataclass(frozen=True)
class StepCase:
    """An optimizer step that every variant takes, all interleaved.

    Attributes:
        model: The model whose parameters are stepped.
        recipe: What is done to the gradients and around the step.
        rule: The update rule.
        dtype: The type of parameters, gradients and state.
        device: Where they are.
        lr: Learning rate; small, so that weights stay ordinary numbers over thousands of steps.
        weight_decay: Always on, since a wrong decay would go unnoticed without it.
        captured: The steps will be captured in a CUDA graph, which torch's optimizers have to be told.
    """

    model: ModelShapes
    recipe: StepRecipe
    rule: UpdateRule
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    lr: float = 1e-5
    weight_decay: float = 0.01
    captured: bool = False

    work = "optimizer step"

    @property
    def rule_name(self) -> str:
        """The name of the update rule."""
        return self.rule.name

    @property
    def dtype_name(self) -> str:
        """The dtype without its `torch.` prefix."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def plain(self) -> StepCase:
        """The same case without a recipe."""
        return replace(self, recipe=RECIPES["plain"])

    @property
    def tensors(self) -> StepCase:
        """The simplest case that can use the same tensors: a recipe matters only if it keeps state."""
        return self if self.recipe.state else self.plain

    @property
    def bytes_per_element(self) -> int:
        """Bytes that a step has to move for each element of the parameters."""
        return self.rule.bytes_per_element(self.recipe, self.dtype.itemsize)

    @property
    def bytes_moved(self) -> int:
        """Bytes that a step has to move."""
        return self.model.elements * self.bytes_per_element

    @property
    def title(self) -> str:
        """The heading of the case's table."""
        return (
            f"{self.model.name} | {self.recipe.name} | {self.rule.name} | {self.dtype_name} on "
            f"{self.device.type} ({len(self.model.shapes)} tensors, "
            f"{self.model.elements / 1e6:.1f}M elements, {self.bytes_per_element} bytes each)"
        )


def sets_needed(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of tensors are together more than twice as large as a cache; 1 where there is none to overflow."""
    return max(1, min(MAX_SETS, 2 * cache_bytes // max(1, set_bytes) + 1)) if cache_bytes else 1


def bytes_needed(elements: int, rule: UpdateRule, dtype: torch.dtype, copies: float = 0.0) -> int:
    """Memory of one set of parameters, gradients and state, and of a variant's temporaries.

    Args:
        elements: Elements of all parameters together.
        rule: The update rule, whose state is counted.
        dtype: The type of every tensor.
        copies: Temporaries, in multiples of the parameters' size.
    """
    return int(elements * dtype.itemsize * (2 + len(rule.state) + copies))
