"""A step gives the same bits whatever the threads, the instruction set, the layout or the process."""

from __future__ import annotations

import copy
import io
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    EMULATED_CUDA,
    FEW_CASES,
    FEW_RECIPES,
    LAYOUTS,
    RECIPES,
    Run,
    assert_same_bits,
    contiguous,
)

import gradfused
from gradfused.backends import availability, cpu, reference

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not availability()["cpu"].usable, reason=str(availability()["cpu"].reason)),
]

# Enough elements for three threads, in short and long units and in one tensor of many chunks.
LARGE = ((40, 999), (70001,), (2, 20000), (8, 3, 3, 3))
SMALL = ((40, 33), (1031,), (), (8, 3, 3, 3))


def outcome(case: str, recipe: str, shapes: Any = SMALL, steps: int = 3, **how: Any) -> dict[str, torch.Tensor]:
    return Run(CASES[case], RECIPES[recipe], shapes, **how).step(steps).outcome()


# ---- threads


@pytest.mark.parametrize("recipe", RECIPES)
def test_threads(recipe: str) -> None:
    outcomes = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outcomes.append(outcome("adam", recipe, LARGE, steps=2))
    assert_same_bits(outcomes[0], outcomes[1])
    assert_same_bits(outcomes[0], outcomes[2])


@pytest.mark.parametrize("recipe", FEW_RECIPES)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed-gradient"])
def test_threads_in_other_dtypes_and_layouts(recipe: str, dtype: str, layout: str) -> None:
    outcomes = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        outcomes.append(outcome("sgd-momentum", recipe, LARGE, steps=2, dtype=DTYPES[dtype], layout=layout))
    assert_same_bits(*outcomes)


@pytest.mark.parametrize("recipe", ["full", "centralize-agc"])
def test_norms_do_not_depend_on_threads(recipe: str) -> None:
    norms = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        run = Run(CASES["adamw"], RECIPES[recipe], LARGE).step()
        norms.append({"total": run.optimizer.grad_norm, **run.optimizer.grad_norms()})
    assert_same_bits(norms[0], norms[1])
    assert_same_bits(norms[0], norms[2])


@pytest.mark.parametrize("recipe", FEW_RECIPES)
@pytest.mark.parametrize("case", FEW_CASES)
def test_twice_the_same(case: str, recipe: str) -> None:
    assert_same_bits(outcome(case, recipe), outcome(case, recipe))


def test_a_thread_other_than_main() -> None:
    torch.set_num_threads(2)
    expected = outcome("adamw", "full", LARGE)
    results: list[dict[str, torch.Tensor]] = []
    workers = [threading.Thread(target=lambda: results.append(outcome("adamw", "full", LARGE))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 2
    for result in results:
        assert_same_bits(result, expected)


# ---- instruction sets


def other_isas() -> list[str]:
    return cpu.native().isas()[1:] if availability()["cpu"].usable else []


@pytest.mark.parametrize("isa", other_isas())
@pytest.mark.parametrize("recipe", RECIPES)
def test_instruction_sets(recipe: str, isa: str) -> None:
    cases = ("sgd-nesterov", "adamw-amsgrad")
    expected = [outcome(case, recipe) for case in cases]
    cpu.native().use_isa(isa)
    for case, best in zip(cases, expected, strict=True):
        assert_same_bits(outcome(case, recipe), best)


@pytest.mark.parametrize("isa", other_isas())
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("recipe", FEW_RECIPES)
def test_instruction_sets_in_other_dtypes(recipe: str, dtype: str, isa: str) -> None:
    expected = outcome("adam", recipe, dtype=DTYPES[dtype])
    cpu.native().use_isa(isa)
    assert_same_bits(outcome("adam", recipe, dtype=DTYPES[dtype]), expected)


@pytest.mark.parametrize("isa", other_isas())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_low_precision_value_converts_alike(dtype: torch.dtype, isa: str) -> None:
    """All 65536 bit patterns as gradients, with subnormals, inf and nan among them."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    stepped = []
    for name in (cpu.isa(), isa):
        cpu.native().use_isa(name)
        p = torch.nn.Parameter(torch.zeros_like(patterns))
        p.grad = patterns.clone()
        gradfused.SGD([p], lr=1.0, backend="cpu").step()
        stepped.append(p.detach())
    assert torch.equal(stepped[0].isnan(), patterns.isnan())
    finite = ~patterns.isnan()
    assert torch.equal(stepped[0][finite], -patterns[finite])
    assert torch.equal(stepped[0].view(torch.int16)[finite], stepped[1].view(torch.int16)[finite])
    assert torch.equal(stepped[1].isnan(), patterns.isnan())


# ---- processes


@pytest.fixture
def _alarm() -> Iterator[None]:
    """A time limit: a child that waits for threads that did not survive the fork would wait for ever."""
    old = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("the forked child hangs"))
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.mark.usefixtures("_alarm")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("recipe", ["plain", "full", "centralize-agc"])
def test_a_forked_child_steps_as_its_parent(recipe: str, threads: int) -> None:
    """The parent has used its threads before; the child has none of them."""
    torch.set_num_threads(threads)
    parent, child = (Run(CASES["adamw"], RECIPES[recipe], LARGE).step() for _ in range(2))
    expected = [t.numpy().tobytes() for _, t in parent.step().tensors()]
    child.fill()
    pid = os.fork()
    if pid == 0:  # nothing of torch but the step is used, since torch's own threads did not survive either
        child.optimizer.step()
        same = [np.asarray(t).tobytes() for _, t in child.tensors()] == expected
        os._exit(0 if same else 1)
    try:
        _, status = os.waitpid(pid, 0)
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    assert os.waitstatus_to_exitcode(status) == 0
    assert_same_bits(child.step().outcome(), parent.outcome())  # the parent goes on with its threads


# ---- noise

NOISE = {"noise": 0.25, "noise_decay": 0.5, "seed": 11}


def draw(backend: str, layout: str = "contiguous", steps: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The noise of the last of several steps, which SGD applies to weights and gradients of 0."""
    place_param, place_grad = LAYOUTS[layout]
    params = [torch.nn.Parameter(place_param((6, 4, 3, 5), dtype)) for _ in range(2)]
    optimizer = gradfused.SGD(params, lr=1.0, backend=backend, **NOISE)
    for _ in range(steps):
        for p in params:
            p.data.zero_()
            p.grad = place_grad(p.shape, dtype)
            (p.grad[:1] if p.grad.stride(0) == 0 else p.grad).zero_()
        optimizer.step()
    return torch.stack([-p.detach().contiguous() for p in params])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("steps", [1, 3])
def test_noise_is_the_same_in_every_layout(layout: str, steps: int) -> None:
    assert torch.equal(draw("cpu", layout, steps), draw("cpu", steps=steps))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_noise_is_the_same_on_every_backend(steps: int) -> None:
    ours, theirs = draw("cpu", steps=steps), draw("reference", steps=steps, dtype=torch.float64)
    sigma = (NOISE["noise"] / steps ** NOISE["noise_decay"]) ** 0.5
    torch.testing.assert_close(ours.double() / sigma, theirs / sigma, rtol=0, atol=2e-6)
    assert not torch.equal(ours[0], ours[1])


@pytest.mark.parametrize("backend", [EMULATED_CUDA])
@pytest.mark.parametrize("layout", ["contiguous", "view"])
def test_cuda_draws_the_same_bits(layout: str, backend: str) -> None:
    assert torch.equal(draw(backend, layout, 3), draw("cpu", steps=3))


@pytest.mark.parametrize("backend", [EMULATED_CUDA])
@pytest.mark.parametrize("recipe", ["plain", "reverse", "clip-value", "noise"])
@pytest.mark.parametrize("case", FEW_CASES)
def test_cuda_and_cpu_round_alike(case: str, recipe: str, backend: str) -> None:
    """Everything agrees that needs no sums, whose order differs."""
    assert_same_bits(outcome(case, recipe, backend=backend), outcome(case, recipe, backend="cpu"))


def test_noise_of_long_tensors_is_the_same_on_every_backend() -> None:
    drawn = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        p = torch.nn.Parameter(contiguous((200003,), dtype).zero_())
        p.grad = torch.zeros_like(p)
        gradfused.SGD([p], lr=1.0, noise=1.0, seed=2**64 - 1, backend=backend).step()
        drawn.append(p.detach().double())
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=2e-6)


def test_noise_of_a_parameter_does_not_depend_on_the_others_gradients() -> None:
    """Noise depends on a parameter's number in the optimizer, not on its place among those with a gradient."""
    outcomes = []
    for frozen in (False, True):
        run = Run(CASES["sgd-momentum"], RECIPES["noise"], SMALL)
        run.fill()
        if frozen:
            run.params[0].grad = None
        run.optimizer.step()
        outcomes.append(run.outcome()["parameter 1"])
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("case", ["sgd", "sgd-momentum", "adam-amsgrad", "adamw"])
@pytest.mark.parametrize("recipe", ["noise", "full", "full-update"])
def test_resuming_continues_bit_for_bit(case: str, recipe: str) -> None:
    whole = Run(CASES[case], RECIPES[recipe], SMALL).step(6)
    first = Run(CASES[case], RECIPES[recipe], SMALL).step(3)
    file = io.BytesIO()
    torch.save(first.optimizer.state_dict(), file)
    file.seek(0)
    resumed = Run(CASES[case], {}, SMALL)
    for p, saved in zip(resumed.params, first.params, strict=True):
        p.data.copy_(saved.data)
    resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
    resumed.taken = 3
    assert_same_bits(resumed.step(3).outcome(), whole.outcome())


def test_a_deep_copy_continues_alike() -> None:
    run = Run(CASES["adam"], RECIPES["full"], SMALL).step(2)
    other = copy.deepcopy(run)
    for p, g in zip(other.params, other.grads, strict=True):
        p.grad = g
    assert_same_bits(other.step(2).outcome(), run.step(2).outcome())


def test_the_seed_decides() -> None:
    drawn = [reference.normal_noise(torch.Size((64,)), seed, 0, 0, torch.device("cpu")) for seed in (0, 1, 2**32)]
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
