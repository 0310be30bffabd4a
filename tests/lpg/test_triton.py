"""What only LPG's Triton kernels do: classes cut into pieces, and code for GPUs that need not be there."""

from __future__ import annotations

import subprocess

import pytest
import torch
import triton_interpreter
from lpg_cases import assert_near, batch, expected

from gradfused.backends import triton
from gradfused.lpg import cpu as lpg_cpu
from gradfused.lpg import triton as lpg_triton
from gradfused.lpg.problem import Perturbation, Problem
from gradfused.nn import LPGCrossEntropyLoss

DEVICE = "cpu" if triton_interpreter.INTERPRETED else "cuda"
runs = pytest.mark.skipif(not triton_interpreter.RUNS, reason="needs Triton")
# The fixture that turns the interpreter on reads this.
triton_backend = pytest.mark.parametrize("backend", ["triton"])


def pieces_of(target: list[int], classes: int, ignore_index: int = -100) -> lpg_triton.Pieces:
    return lpg_triton._pieces(
        Problem(torch.zeros(len(target), classes), torch.tensor(target), ignore_index=ignore_index), by_row=False
    )


def test_pieces_of_one_class_each() -> None:
    target = [2] * 130 + [0] + [5] * 64 + [-100] * 70 + [1] * 65
    found = pieces_of(target, 6)
    # in order: class 0 (1), 1 (65), 2 (130), 5 (64), ignored (70)
    assert found.starts[:10].tolist() == [0, 1, 65, 66, 130, 194, 196, 260, 324, len(target)]
    assert (found.starts[9:] == len(target)).all()
    assert found.slot[:9].tolist() == [-1, 0, 1, 2, 3, 4, -1, -1, -1]
    assert found.of_class[:9].tolist() == [1, 2, 0, 3, 0, 0, 1, 2, 0]
    assert (found.of_class[9:] == 0).all()
    assert found.heads[:9].tolist() == [0, 1, 1, 3, 3, 3, 6, 7, 7]
    assert len(found.sums) >= 5


@pytest.mark.parametrize("sizes", [[65], [64, 64], [65, 65, 65, 1], [129, 66], [1] * 300, [640]], ids=str)
def test_there_are_slots_enough(sizes: list[int]) -> None:
    found = pieces_of([c for c, size in enumerate(sizes) for _ in range(size)], len(sizes))
    assert int(found.slot.max()) + 1 <= len(found.sums)


@runs
@triton_backend
@pytest.mark.parametrize("size", [(300, 5), (90, 2500)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_classes(size: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    logits, target = batch(*size, dtype)
    target[: size[0] * 4 // 5] = 1
    target[:3] = -100
    sign = torch.ones(size[1])
    sign[0] = -1
    problem = Problem(logits.to(DEVICE), target.to(DEVICE))
    saved = lpg_triton.forward(problem, False).saved
    bound = (0.05 * sign).to(problem.wide).to(DEVICE)
    factor = torch.ones((), dtype=problem.wide, device=DEVICE).expand(size[0])
    found = lpg_triton.backward(problem, saved, factor, Perturbation(bound))
    wanted = expected(logits, target, sign, bound.abs().cpu()[0].item(), reduction="sum")[1]
    assert_near(found.cpu(), wanted, dtype)


@runs
@triton_backend
@pytest.mark.parametrize("mode", ["balanced", "noisy"])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_module_does_as_on_the_cpu(momentum: float, mode: str, backend: str) -> None:
    ours = LPGCrossEntropyLoss(7, mode=mode, momentum=momentum, label_smoothing=0.1, backend="triton").to(DEVICE)
    theirs = LPGCrossEntropyLoss(7, mode=mode, momentum=momentum, label_smoothing=0.1, backend="reference")
    for seed in range(3):
        logits, target = batch(40, 7, torch.float64, seed=seed, ignored=2)
        gradients = []
        for loss_of, device in ((ours, DEVICE), (theirs, "cpu")):
            u = logits.to(device).requires_grad_()
            gradients.append(torch.autograd.grad(loss_of(u, target.to(device)), u)[0].cpu())
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value.cpu(), theirs.state_dict()[name], rtol=1e-6, atol=1e-7)


@runs
@triton_backend
def test_sums_and_tallies_are_the_cpu_s(backend: str) -> None:
    logits, target = batch(150, 6, torch.float64, ignored=4)
    problem = Problem(logits, target, None, 0.1)
    there = Problem(logits.to(DEVICE), target.to(DEVICE), None, 0.1)
    ours, theirs = lpg_triton.forward(there, True), lpg_cpu.forward(problem, True)
    assert ours.tally is not None
    torch.testing.assert_close(ours.tally.cpu(), theirs.tally, rtol=1e-9, atol=1e-9)
    sums = lpg_triton.class_sums(there, ours.saved).cpu()
    torch.testing.assert_close(sums, lpg_cpu.class_sums(problem, theirs.saved), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def checked() -> subprocess.CompletedProcess[str]:
    return triton_interpreter.uninterpreted("check_triton_lpg.py")


@pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_kernels_compile_and_none_spills(target: str, checked: subprocess.CompletedProcess[str]) -> None:
    assert checked.returncode == 0, checked.stdout + checked.stderr
    lines = [line for line in checked.stdout.splitlines() if line.startswith(target)]
    if "left out" in lines[0]:
        pytest.skip(lines[0])
    assert {"forward", "accumulate", "measure", "write"} <= {word for line in lines for word in line.split()}
