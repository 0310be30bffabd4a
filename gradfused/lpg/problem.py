"""What kernels of LPG cross-entropy are given, and what they give back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ..step.memory import bytes_needed, has_storage


@dataclass(frozen=True, slots=True)
class Problem:
    """Cross-entropy over rows of logits. ``n`` rows, ``C`` classes.

    Attributes:
        logits: (n, C), or a view (N, D, C) of dense predictions with n = N * D.
        target: (n,), int64: class indices or ``ignore_index``.
        weight: (C,) class weights in ``wide``, or None.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100

    @property
    def wide(self) -> torch.dtype:
        """The dtype of all arithmetic: float64 for float64 logits, else float32."""
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32

    @property
    def classes(self) -> int:
        """C."""
        return self.logits.shape[-1]

    @property
    def rows(self) -> Tensor:
        """The logits as (n, C): copied if dense predictions lie otherwise."""
        return self.logits.reshape(-1, self.logits.shape[-1])


def refuse_stray(problem: Problem, row: int) -> NoReturn:
    """Raise for a target that is no class."""
    raise IndexError(
        f"target: expected classes from 0 to {problem.classes - 1} or ignore_index={problem.ignore_index}, "
        f"got {int(problem.target[row])} at position {row} of {problem.target.numel()}"
    )


def check_memory(**tensors: Tensor | None) -> None:
    """Raise for a tensor whose storage has been freed or shrunk under it: kernels would read beyond its end."""
    for name, tensor in tensors.items():
        if tensor is not None and not has_storage(tensor):
            raise RuntimeError(
                f"{name}: expected a storage of {bytes_needed(tensor)} bytes or more under shape {tuple(tensor.shape)}, got "
                f"{tensor.untyped_storage().nbytes()}: keep it whole until backward has run"
            )


@dataclass(frozen=True, slots=True)
class Measured:
    """What one reading of the logits found.

    Attributes:
        loss: (n,) losses in ``wide``, class weight included; 0 where ignored.
        total: (2,) float64: the sum of the losses, and of the class weights of rows that count.
        tally: (3, C) float64, if asked for: of each class's rows their number, the sum of their own-class probabilities
            and the sum of their logit gradients' norms.
        saved: What ``backward`` wants back.
    """

    loss: Tensor
    total: Tensor
    tally: Tensor | None
    saved: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Perturbation:
    """What is added to each row's logit gradient g = softmax - target distribution.

    Attributes:
        bound: (C,) in ``wide``: eps_c with the sign of its direction, positive where class c is amplified.
        scope: ``"class"``: all rows of a class share one delta; ``"sample"``: each row follows its own g.
        steps: Steps of projected gradient descent that look for delta; 0 for the closed form.
        step_size: Their length, or None for ``2.5 * eps_c / steps``.
        means: (C, C) in ``wide``: class c's mean gradient in row c; None for the batch's own.
    """

    bound: Tensor
    scope: str = "class"
    steps: int = 0
    step_size: float | None = None
    means: Tensor | None = None

    def reach(self) -> Tensor:
        """``bound`` shortened to what the solver's steps can cover: its result is the closed form within that.

        Every iterate lies on the line of the gradient, and every step along it is of full length until it meets the
        ball's edge or, where it dampens, the origin.
        """
        if not self.steps or self.step_size is None:
            return self.bound
        return self.bound.clamp(-self.steps * self.step_size, self.steps * self.step_size)


@dataclass(frozen=True, slots=True)
class Kernels:
    """One backend's three calls.

    Attributes:
        forward: (problem, whether a tally is wanted) -> what the logits hold.
        backward: (problem, saved, factor, perturbation) -> the gradient, as the logits and in the logits' dtype. ``factor``, (n,)
            in ``wide``, is what each row's loss is multiplied by on its way to the scalar that is differentiated.
        class_sums: (problem, saved) -> (C, C) in ``wide``: the sums of each class's logit gradients.
    """

    name: str
    forward: Callable[[Problem, bool], Measured]
    backward: Callable[[Problem, tuple[Tensor, ...], Tensor, Perturbation], Tensor]
    class_sums: Callable[[Problem, tuple[Tensor, ...]], Tensor]
