"""The check before the timing: every variant takes a few steps, and its weights are compared with a float64 oracle's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

import gradfused

from ..cases import CPU, NOISE_DECAY, SEED, ModelShapes, Shape, StepCase, StepRecipe, Workload, workload_of
from ..peers import PEERS, NoiseSource, StepPeer

STEPS = 5
SMALL, LARGE = 1 << 14, 1 << 18  # elements of most cropped tensors, and of the largest
# An error below the floor is never wrong and one above the ceiling always is, whatever torch's own error.
LIMITS = {torch.float64: (1e-10, 1e-8), torch.float32: (1e-5, 1e-3)}
LOW_PRECISION_LIMITS = (1e-3, 0.1)

Shapes = Sequence[Shape]


@dataclass(frozen=True)
class Verdict:
    """How far a variant is from the oracle.

    Attributes:
        error: The largest absolute difference of a parameter after `STEPS` steps.
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
    """A shape with fewer rows, so that it has about `limit` elements; units keep their length, and at least two remain."""
    if not shape:
        return shape
    unit = max(1, prod(shape[1:]))
    return (min(shape[0], max(2, limit // unit)), *shape[1:])


def cropped_shapes(model: ModelShapes) -> list[Shape]:
    """Each distinct shape of a model once, cropped; the largest is cropped less, so that several threads work on it."""
    distinct = list(dict.fromkeys(model.shapes))
    largest = max(distinct, key=prod)
    return [crop(shape, LARGE if shape == largest else SMALL) for shape in distinct]


class NoiseTape:
    """The oracle's own noise, step by step, drawn once for all variants that are compared with it.

    gradfused's noise depends only on the seed, the position and the step. A reference SGD with lr 1 on zero gradients steps by
    exactly that noise, so it can be had through the public interface.
    """

    def __init__(self, shapes: Shapes, recipe: StepRecipe) -> None:
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
    """Gives eager peers the oracle's noise, so that they can be compared with it element by element."""

    def __init__(self, tape: NoiseTape, case: StepCase) -> None:
        self.tape = tape
        self.buffers = [torch.zeros_like(param, dtype=case.dtype, device=case.device) for param in tape.params]

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Copy the noise of one step into buffers whose addresses stay, as compiled code needs them."""
        for buffer, noise in zip(self.buffers, self.tape.of(step), strict=True):
            buffer.copy_(noise)

    def draw(self, index: int, grad: Tensor) -> Tensor:
        """The oracle's noise of the current step."""
        return self.buffers[index]


def check_case(case: StepCase) -> StepCase:
    """The case with steps so large that leaving out a transform or the decay shows."""
    return replace(case, lr=case.rule.check_lr, weight_decay=0.5)


@torch.no_grad()
def fill_gradients(workload: Workload, step: int, dtype: torch.dtype) -> None:
    """Fill in gradients that are the same whatever the workload's dtype: off centre, and rounded to `dtype`."""
    generator = torch.Generator().manual_seed(step)
    for grad in workload.grads.tensors:
        values = torch.randn(grad.shape, generator=generator) + 0.5
        grad.copy_(values.to(dtype))


@torch.no_grad()
def fill_parameters(workload: Workload, dtype: torch.dtype) -> None:
    """Fill in parameters that are the same whatever the workload's dtype, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(STEPS)
    for param in workload.params:
        param.copy_((0.5 * torch.randn(param.shape, generator=generator)).to(dtype))


def on_cpu(case: StepCase) -> StepCase:
    """The case on the CPU, where the oracle computes whatever is checked against it."""
    return replace(case, device=CPU)


def trajectory_end(peer: StepPeer, case: StepCase, shapes: Shapes, dtype: torch.dtype, tape: NoiseTape) -> list[Tensor]:
    """Parameters, and their averages if the recipe has some, after `STEPS` steps of a peer, in float64 on the CPU.

    Args:
        peer: The peer that takes the steps.
        case: The case; inputs are rounded to its dtype.
        shapes: The shape of each parameter.
        dtype: The dtype that the peer computes in.
        tape: The noise, if the recipe has any.
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


def limits_of(case: StepCase) -> tuple[float, float]:
    """Floor and ceiling of the allowed error; gradfused draws noise in float32, even for float64."""
    precision = torch.float32 if case.recipe.noise and case.dtype == torch.float64 else case.dtype
    return LIMITS.get(precision, LOW_PRECISION_LIMITS)


def yardstick(case: StepCase) -> StepPeer:
    """The peer whose error shows what rounding does: torch's loop, or the oracle in the case's dtype if torch lacks the rule."""
    theirs = PEERS["torch-loop"]
    return PEERS["gradfused-reference"] if theirs.reason_against(case) else theirs


class Checker:
    """Checks the variants of one case; the oracle's weights and the allowed error are computed once."""

    def __init__(self, case: StepCase) -> None:
        self.case, self.shapes = check_case(case), cropped_shapes(case.model)
        oracle = PEERS["gradfused-reference"]
        self.tape = NoiseTape(self.shapes, case.recipe)
        self.exact = trajectory_end(oracle, on_cpu(self.case), self.shapes, torch.float64, self.tape)
        floor, ceiling = limits_of(case)
        # Weights that are kept more precisely may be as far off as torch's: some peers still compute in 16 bits.
        usual = replace(self.case, recipe=replace(self.case.recipe, precision=None))
        end = trajectory_end(yardstick(usual), usual, self.shapes, case.dtype, self.tape)
        self.allowed = min(max(2 * largest_error(end, self.exact), floor), ceiling)

    def error(self, peer: StepPeer, captured: bool = False) -> float:
        """How far a peer ends from the oracle."""
        case = replace(self.case, captured=captured)
        end = trajectory_end(peer, case, self.shapes, case.dtype, self.tape)
        return largest_error(end, self.exact)

    def verdict(self, peer: StepPeer, captured: bool = False) -> Verdict:
        """Whether a peer may be timed; with `captured`, whether the steps that it takes in a CUDA graph may."""
        return Verdict(self.error(peer, captured), self.allowed + STEPS * peer.slack(self.case))


def same_on_any_threads(case: StepCase) -> bool:
    """Whether gradfused computes the same bits on 1 thread as on 2 or more, on the full shapes."""
    threads = torch.get_num_threads()
    try:
        one, many = (bits_after_steps(case, count) for count in (1, max(2, threads)))
    finally:
        torch.set_num_threads(threads)
    return all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def bits_after_steps(case: StepCase, threads: int) -> list[Tensor]:
    """Parameters and state as bytes, after two steps of gradfused on so many threads."""
    torch.set_num_threads(threads)
    workload = workload_of(case)
    workload.reset()
    step = PEERS["gradfused"].build(case, workload, NoiseSource())
    for _ in range(2):
        step()
    slabs = [workload.weights, *workload.state.values()]
    return [slab.flat.view(torch.uint8) for slab in slabs]
