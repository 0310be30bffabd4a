"""Update rules with their hyperparameters, and what a step of each has to move through memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import gradfused

from .recipes import StepRecipe

START = {"step": 0.0, "mu_product": 1.0}  # what one-element state holds before the first step, by torch's key
UPDATE, GRADIENT = "update", "gradient"


@dataclass(frozen=True)
class UpdateRule:
    """An update rule and its hyperparameters.

    Attributes:
        name: Its name for `--optimizers`.
        class_name: The name of its class in gradfused, and in `torch.optim` if torch has it.
        options: Keyword arguments besides `lr` and `weight_decay`, under torch's names.
        trust: `UPDATE` or `GRADIENT` where the length of a step depends on that one's norm and the weights'; else None.
        check_lr: A learning rate so large that a mistake of a few steps shows.
    """

    name: str
    class_name: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    trust: str | None = None
    check_lr: float = 1e-2

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        """What gradfused's optimizer keeps for a parameter of two elements after one step."""
        param = torch.nn.Parameter(torch.zeros(2))
        param.grad = torch.ones(2)
        optimizer = getattr(gradfused, self.class_name)([param], **self.options, backend="reference")
        optimizer.step()
        return dict(optimizer.state[param])

    @property
    def state(self) -> tuple[str, ...]:
        """Keys of the per-element state, as gradfused's optimizer names them."""
        return tuple(key for key, value in self._state.items() if value.dim())

    @property
    def scalars(self) -> dict[str, float]:
        """What the one-element state of a parameter holds before the first step."""
        return {key: START[key] for key, value in self._state.items() if not value.dim()}

    @property
    def streams(self) -> int:
        """Passes over a parameter-sized tensor that one step needs at least.

        It reads the gradient, and reads and writes the weights and each state tensor.
        """
        return 1 + 2 * (1 + len(self.state))

    def bytes_per_element(self, recipe: StepRecipe, itemsize: int) -> int:
        """Bytes that a step has to move for each element of the parameters.

        That is what the rule and the recipe stream, and what a trust ratio reads before the step: the weights and the gradient,
        and where the update's norm is needed, the state too.
        """
        before = 0 if self.trust is None else 2 + len(self.state) * (self.trust == UPDATE)
        wider = 2 * max(0, 4 - itemsize) if recipe.ema is not None else 0  # averages of 16-bit weights are float32
        return (self.streams + recipe.extra_streams + before) * itemsize + wider


BETAS = {"betas": (0.9, 0.999), "eps": 1e-8}
_ALL = (
    UpdateRule("adamw", "AdamW", BETAS),
    UpdateRule("adamw-amsgrad", "AdamW", BETAS | {"amsgrad": True}),
    UpdateRule("adam", "Adam", BETAS),
    UpdateRule("sgd-momentum", "SGD", {"momentum": 0.9}, check_lr=0.1),
    UpdateRule("sgd", "SGD", check_lr=0.1),
    UpdateRule("adagrad", "Adagrad", {"eps": 1e-10}),
    UpdateRule("rmsprop", "RMSprop", {"alpha": 0.99, "eps": 1e-8}),
    UpdateRule("nadam", "NAdam", BETAS | {"momentum_decay": 4e-3}),
    UpdateRule("radam", "RAdam", BETAS),
    UpdateRule("lion", "Lion", {"betas": (0.9, 0.99)}),
    UpdateRule("lamb", "LAMB", BETAS | {"eps": 1e-6}, trust=UPDATE),
    UpdateRule("lars", "LARS", {"momentum": 0.9, "trust_coefficient": 1e-3}, trust=GRADIENT),
    UpdateRule("adan", "Adan", {"betas": (0.98, 0.92, 0.99), "eps": 1e-8}),
)
RULES = {rule.name: rule for rule in _ALL}
