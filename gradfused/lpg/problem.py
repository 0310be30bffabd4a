"""What the LPG kernels of a backend are given and what they return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from ..step.memory import bytes_needed, has_storage


def wide_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of all arithmetic on ``logits``: float64 for float64, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class Problem:
    """Cross-entropy over n rows of logits for C classes.

    Attributes:
        logits: (n, C), or a view (N, D, C) of dense predictions with n = N * D.
        target: (n,), int64: class indices or ``ignore_index``.
        weight: (C,) class weights in ``wide``, or None.
        label_smoothing: The part of the target distribution that is spread evenly over all classes.
        ignore_index: The target of rows that are ignored.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100

    @property
    def wide(self) -> torch.dtype:
        """The dtype of all arithmetic."""
        return wide_dtype(self.logits)

    @property
    def classes(self) -> int:
        """The number of classes, C."""
        return self.logits.shape[-1]

    @property
    def rows(self) -> Tensor:
        """The logits as (n, C): a view of dense predictions where their layout allows one, else a copy."""
        return self.logits.reshape(-1, self.logits.shape[-1])


def find_stray(problem: Problem) -> Tensor:
    """Return (n,) bools: which targets are neither a class nor ``ignore_index``.

    Raises:
        IndexError: There is one, on the CPU. On a GPU this function does not wait for the result.
    """
    target = problem.target
    stray = (target != problem.ignore_index) & ((target < 0) | (target >= problem.classes))
    if target.device.type == "cpu" and stray.any():
        refuse_stray(problem, int(stray.nonzero()[0]))
    return stray


def refuse_stray(problem: Problem, row: int) -> NoReturn:
    """Raise for a target that is neither a class nor ``ignore_index``."""
    raise IndexError(
        f"target: expected classes from 0 to {problem.classes - 1} or ignore_index={problem.ignore_index}, "
        f"got {int(problem.target[row])} at position {row} of {problem.target.numel()}"
    )


def check_memory(**tensors: Tensor | None) -> None:
    """Raise for a tensor whose storage was freed or shrunk, since kernels would read beyond its end."""
    for name, tensor in tensors.items():
        if tensor is not None and not has_storage(tensor):
            raise RuntimeError(
                f"{name}: expected a storage of {bytes_needed(tensor)} bytes or more under shape {tuple(tensor.shape)}, got "
                f"{tensor.untyped_storage().nbytes()}: keep it whole until backward has run"
            )


@dataclass(frozen=True, slots=True)
class Measured:
    """What the forward computes.

    Attributes:
        loss: (n,) losses in ``wide``, class weights included; 0 for ignored rows.
        total: (2,) float64: the sum of the losses, and the sum of the class weights of the rows that count.
        tally: (3, C) float64, if asked for: for each class its number of rows, the sum of their own-class probabilities
            and the sum of the norms of their logit gradients.
        saved: What ``backward`` needs.
    """

    loss: Tensor
    total: Tensor
    tally: Tensor | None
    saved: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Perturbation:
    """What is added to each row's logit gradient g = softmax - target distribution.

    Attributes:
        bound: (C,) in ``wide``: the radius of each class, positive to amplify it, negative to dampen it.
        scope: ``"class"``: all rows of a class get the same delta; ``"sample"``: each row gets one along its own g.
        steps: Steps of projected gradient descent that look for delta; 0 for the closed form.
        step_size: Their length, or None for ``2.5 * radius / steps``.
        means: (C, C) in ``wide``: row c is the mean gradient of class c; None for the means of the batch.
    """

    bound: Tensor
    scope: str = "class"
    steps: int = 0
    step_size: float | None = None
    means: Tensor | None = None

    def reachable_bound(self) -> Tensor:
        """``bound``, limited to how far the solver's steps can go. The closed form within it is the solver's result.

        All iterates lie on the line of the gradient, and each step has its full length until it meets the edge of the
        ball or, when dampening, the origin.
        """
        if not self.steps or self.step_size is None:
            return self.bound
        return self.bound.clamp(-self.steps * self.step_size, self.steps * self.step_size)


class Kernels(Protocol):
    """A backend's kernels; each backend is a module with these functions."""

    def forward(self, problem: Problem, tally: bool) -> Measured:
        """Read the logits once; ``tally`` asks for the tally as well."""

    def backward(self, problem: Problem, saved: tuple[Tensor, ...], factor: Tensor, how: Perturbation) -> Tensor:
        """Compute the perturbed gradient, of the shape and dtype of the logits.

        ``factor``, (n,) in ``wide``, is what each row's gradient is multiplied by: the upstream gradient and the reduction.
        """

    def class_sums(self, problem: Problem, saved: tuple[Tensor, ...]) -> Tensor:
        """Sum the logit gradients of each class, (C, C) in ``wide``."""
