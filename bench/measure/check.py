"""Refuses to time what computes something else: every variant against the float64 oracle first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

import gradfused

from ..cases.models import Model, Shape
from ..cases.recipes import NOISE_DECAY, SEED, Recipe
from ..cases.steps import CPU, Case, Workload, workload_of
from ..peers import PEERS
from ..peers.eager import NoiseSource
from ..peers.peer import Peer

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


class NoiseTape:
    """The oracle's own noise, step by step, drawn once for all who are compared with it.

    gradfused's noise depends on seed, position and step alone. A reference SGD with lr 1 on zero
    gradients steps by exactly that noise, which the public interface therefore hands out.
    """

    def __init__(self, shapes: Shapes, recipe: Recipe) -> None:
        self.recipe, self.steps = recipe, list[list[Tensor]]()
        self.params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
        options: dict[str, Any] = {"noise": recipe.noise, "noise_decay": NOISE_DECAY, "seed": SEED}
        self.optimizer = gradfused.SGD(self.params, lr=1.0, backend="reference", **options)

    @torch.no_grad()
    def of(self, step: int) -> list[Tensor]:
        """The standard normal noise of a step for each parameter, in float64 on the CPU."""
        while len(self.steps) <= step:
            for param in self.params:
                param.zero_()
                param.grad = torch.zeros_like(param)
            self.optimizer.step()
            self.steps.append([param / -self.recipe.sigma(len(self.steps)) for param in self.params])
        return self.steps[step]


class OracleNoise(NoiseSource):
    """Hands eager peers the oracle's noise, so that they can be compared with it element by element."""

    def __init__(self, tape: NoiseTape, case: Case) -> None:
        self.tape = tape
        self.buffers = [torch.zeros_like(param, dtype=case.dtype, device=case.device) for param in tape.params]

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Puts one step's noise into buffers that keep their place, for compiled code."""
        for buffer, noise in zip(self.buffers, self.tape.of(step), strict=True):
            buffer.copy_(noise)

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


def on_cpu(case: Case) -> Case:
    """The case where the oracle computes: one place, whatever is checked against it."""
    return replace(case, device=CPU)


def trajectory_end(peer: Peer, case: Case, shapes: Shapes, dtype: torch.dtype, tape: NoiseTape) -> list[Tensor]:
    """Parameters, and their averages if the recipe has some, after `STEPS` steps of a peer, in float64 on the CPU.

    Args:
        peer: Whose steps.
        case: What it computes.
        shapes: Of the parameters.
        dtype: In which it computes; inputs are rounded to the case's dtype first.
        tape: The noise, where the recipe has any.
    """
    case_here = replace(case, dtype=dtype)
    workload = workload_of(case_here, shapes)
    fill_parameters(workload, case.dtype)
    workload.clear_state()
    source = OracleNoise(tape, case_here) if case.recipe.noise else NoiseSource()
    step = peer.build(case_here, workload, source)
    for index in range(STEPS):
        fill_gradients(workload, index, case.dtype)
        step()
    kept = [*workload.params, *(t for key in case.recipe.state for t in workload.state[key].tensors if key == "ema")]
    return [tensor.detach().cpu().double() for tensor in kept]


def largest_error(ours: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest absolute difference; infinite where a value is not a number."""
    errors = [float((a - b).abs().max()) for a, b in zip(ours, exact, strict=True)]
    return inf if any(error != error for error in errors) else max(errors)


def limits_of(case: Case) -> tuple[float, float]:
    """Floor and ceiling of what is allowed; gradfused draws noise to float32's precision."""
    precision = torch.float32 if case.recipe.noise and case.dtype == torch.float64 else case.dtype
    return LIMITS.get(precision, LOW_PRECISION_LIMITS)


def yardstick(case: Case) -> Peer:
    """Whose own error says what rounding does: torch's, or the oracle's in the case's dtype where torch lacks the rule.

    Weights that are kept more precisely may still be as wrong as torch's, which are not: some compute in 16 bits.
    """
    theirs = PEERS["torch-loop"]
    return PEERS["gradfused-reference"] if theirs.reason_against(case) else theirs


class Checker:
    """Checks the variants of one case; the oracle and torch's own error are computed once."""

    def __init__(self, case: Case) -> None:
        self.case, self.shapes = check_case(case), cropped_shapes(case.model)
        oracle = PEERS["gradfused-reference"]
        self.tape = NoiseTape(self.shapes, case.recipe)
        self.exact = trajectory_end(oracle, on_cpu(self.case), self.shapes, torch.float64, self.tape)
        floor, ceiling = limits_of(case)
        usual = replace(self.case, recipe=replace(self.case.recipe, precision=None))
        end = trajectory_end(yardstick(usual), usual, self.shapes, case.dtype, self.tape)
        self.allowed = min(max(2 * largest_error(end, self.exact), floor), ceiling)

    def error(self, peer: Peer, captured: bool = False) -> float:
        """How far a peer ends from the oracle."""
        case = replace(self.case, captured=captured)
        end = trajectory_end(peer, case, self.shapes, case.dtype, self.tape)
        return largest_error(end, self.exact)

    def verdict(self, peer: Peer, captured: bool = False) -> Verdict:
        """Whether a peer may be timed, or its steps for a CUDA graph may be captured."""
        return Verdict(self.error(peer, captured), self.allowed + STEPS * peer.slack(self.case))


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
    workload = workload_of(case)
    workload.reset()
    step = PEERS["gradfused"].build(case, workload, NoiseSource())
    for _ in range(2):
        step()
    slabs = [workload.weights, *workload.state.values()]
    return [slab.flat.view(torch.uint8) for slab in slabs]
