"""Refuses to time what computes something else: every variant against the float64 oracle first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

import gradfused

from .eager import NoiseSource
from .models import Model, Shape
from .peer import Peer
from .peers import PEERS
from .recipes import NOISE_DECAY, SEED
from .workload import Case, Workload

STEPS = 5
SMALL, LARGE = 1 << 14, 1 << 18  # elements: of most cropped tensors, of the largest
# Below the floor nobody is wrong, above the ceiling everybody is, whatever torch's own error.
LIMITS = {torch.float64: (1e-10, 1e-8), torch.float32: (1e-5, 1e-3)}
LOW_PRECISION_LIMITS = (1e-3, 0.1)

Shapes = Sequence[Shape]


@dataclass(frozen=True)
class Verdict:
    """How far a variant is from the oracle.

    Attributes:
        error: Largest absolute difference of a parameter after `STEPS` steps.
        allowed: Twice torch's own error, within the limits of the dtype.
    """

    error: float
    allowed: float

    @property
    def right(self) -> bool:
        """Whether the variant may be timed."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        word = "right" if self.right else "wrong"
        return f"{word} (err {self.error:.1e}, allowed {self.allowed:.1e})"


def crop(shape: Shape, limit: int) -> Shape:
    """Drops rows until a tensor is small; keeps the length of a unit, and at least two units."""
    if not shape:
        return shape
    unit = max(1, prod(shape[1:]))
    return (min(shape[0], max(2, limit // unit)), *shape[1:])


def cropped_shapes(model: Model) -> list[Shape]:
    """Each distinct shape of a model once, cropped; the largest less, so that it spans threads."""
    distinct = list(dict.fromkeys(model.shapes))
    largest = max(distinct, key=prod)
    return [crop(shape, LARGE if shape == largest else SMALL) for shape in distinct]


class OracleNoise(NoiseSource):
    """The oracle's own noise, so that eager peers can be compared with it element by element.

    gradfused's noise depends on seed, position and step alone. A reference SGD with lr 1 on zero
    gradients steps by exactly that noise, which the public interface therefore hands out.
    """

    def __init__(self, shapes: Shapes, case: Case) -> None:
        self.recipe = case.recipe
        self.params = [
            torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64, device=case.device)) for shape in shapes
        ]
        options: dict[str, Any] = {"noise": case.recipe.noise, "noise_decay": NOISE_DECAY, "seed": SEED}
        self.optimizer = gradfused.SGD(self.params, lr=1.0, backend="reference", **options)
        self.buffers = [torch.zeros_like(param, dtype=case.dtype) for param in self.params]

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Draws one step's noise into buffers that keep their place, for compiled code."""
        for param in self.params:
            param.zero_()
            param.grad = torch.zeros_like(param)
        self.optimizer.step()
        for buffer, param in zip(self.buffers, self.params, strict=True):
            buffer.copy_(param / -self.recipe.sigma(step))

    def draw(self, index: int, grad: Tensor) -> Tensor:
        """The oracle's noise of the current step."""
        return self.buffers[index]


def check_case(case: Case) -> Case:
    """The case with steps so large that leaving out a transform or the decay shows."""
    lr = 0.1 if case.rule.class_name == "SGD" else 1e-2
    return replace(case, lr=lr, weight_decay=0.5)


@torch.no_grad()
def fill_gradients(workload: Workload, step: int, dtype: torch.dtype) -> None:
    """The same gradients for every dtype: off centre, and exact in `dtype`."""
    generator = torch.Generator().manual_seed(step)
    for grad in workload.grads.tensors:
        values = torch.randn(grad.shape, generator=generator) + 0.5
        grad.copy_(values.to(dtype))


@torch.no_grad()
def fill_parameters(workload: Workload, dtype: torch.dtype) -> None:
    """The same parameters for every dtype, exact in `dtype`."""
    generator = torch.Generator().manual_seed(STEPS)
    for param in workload.params:
        param.copy_((0.5 * torch.randn(param.shape, generator=generator)).to(dtype))


def trajectory_end(peer: Peer, case: Case, shapes: Shapes, dtype: torch.dtype) -> list[Tensor]:
    """Parameters after `STEPS` steps of a peer, in float64.

    Args:
        peer: Whose steps.
        case: What it computes.
        shapes: Of the parameters.
        dtype: In which it computes; inputs are rounded to the case's dtype first.
    """
    case_here = replace(case, dtype=dtype)
    workload = Workload(shapes, case.rule, dtype, case.device)
    fill_parameters(workload, case.dtype)
    workload.clear_state()
    source = OracleNoise(shapes, case_here) if case.recipe.noise else NoiseSource()
    step = peer.build(case_here, workload, source)
    for index in range(STEPS):
        fill_gradients(workload, index, case.dtype)
        step()
    return [param.detach().double() for param in workload.params]


def largest_error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest absolute difference; infinite where a value is not a number."""
    errors = [float((a - b).abs().max()) for a, b in zip(ours, exact, strict=True)]
    return inf if any(error != error for error in errors) else max(errors)


def limits_of(case: Case) -> tuple[float, float]:
    """Floor and ceiling of what is allowed; gradfused draws noise to float32's precision."""
    precision = torch.float32 if case.recipe.noise and case.dtype == torch.float64 else case.dtype
    return LIMITS.get(precision, LOW_PRECISION_LIMITS)


class Checker:
    """Checks the variants of one case; the oracle and torch's own error are computed once."""

    def __init__(self, case: Case) -> None:
        self.case, self.shapes = check_case(case), cropped_shapes(case.model)
        oracle = PEERS["gradfused-reference"]
        self.exact = trajectory_end(oracle, self.case, self.shapes, torch.float64)
        floor, ceiling = limits_of(case)
        self.allowed = min(max(2 * self.error(PEERS["torch-loop"]), floor), ceiling)

    def error(self, peer: Peer) -> float:
        """How far a peer ends from the oracle."""
        end = trajectory_end(peer, self.case, self.shapes, self.case.dtype)
        return largest_error(end, self.exact)

    def verdict(self, peer: Peer) -> Verdict:
        """Whether a peer may be timed."""
        return Verdict(self.error(peer), self.allowed)


def same_on_any_threads(case: Case) -> bool:
    """Whether gradfused gives the same bits on 1 thread as on 2 or more, for the full shapes."""
    threads = torch.get_num_threads()
    try:
        one, many = (bits_after_steps(case, count) for count in (1, max(2, threads)))
    finally:
        torch.set_num_threads(threads)
    return all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def bits_after_steps(case: Case, threads: int) -> list[Tensor]:
    """Parameters and state after two gradfused steps on so many threads, as integers."""
    torch.set_num_threads(threads)
    workload = Workload(case.model.shapes, case.rule, case.dtype, case.device)
    workload.reset()
    step = PEERS["gradfused"].build(case, workload, NoiseSource())
    for _ in range(2):
        step()
    slabs = [workload.weights, *workload.state.values()]
    return [slab.flat.view(torch.uint8) for slab in slabs]
