"""The CPU kernels of LPG give the same bits whatever the threads and the instruction set; the accuracy of their exp."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lpg_cases import assert_near, batch, expected
from torch import Tensor

from gradfused.backends import availability, cpu
from gradfused.lpg import cpu as lpg_cpu
from gradfused.lpg.problem import Perturbation, Problem
from gradfused.nn import LPGCrossEntropyLoss, lpg_cross_entropy

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not availability()["cpu"].usable, reason=str(availability()["cpu"].reason)),
]


def all_of(logits: Tensor, target: Tensor, smoothing: float) -> list[Tensor]:
    """All results of the kernels for a batch."""
    classes = logits.shape[-1]
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(2)).to(
        torch.float64 if logits.dtype == torch.float64 else torch.float32
    )
    problem = Problem(logits, target, weight, smoothing)
    measured = lpg_cpu.forward(problem, True)
    bound = torch.where(torch.arange(classes) % 3 == 0, -0.2, 0.1).to(problem.wide)
    factor = torch.linspace(0.5, 2, len(target), dtype=problem.wide)
    found = [measured.loss, measured.total, measured.tally, *measured.saved]
    for scope in ("class", "sample"):
        found.append(lpg_cpu.backward(problem, measured.saved, factor, Perturbation(bound, scope)))
    if classes < 3000:
        found.append(lpg_cpu.class_sums(problem, measured.saved))
        how = Perturbation(bound, means=found[-1])
        found.append(lpg_cpu.backward(problem, measured.saved, factor, how))
    return [t for t in found if t is not None]


# The first class is larger than one piece of 16 to 512 rows, and alone has several.
SIZES = [(5000, 3), (3000, 129), (400, 1000), (70, 9000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_threads_change_nothing(size: tuple[int, int], dtype: torch.dtype) -> None:
    logits, target = batch(*size, dtype, ignored=5)
    alone = all_of(logits, target, 0.1)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for one, many in zip(alone, all_of(logits, target, 0.1), strict=True):
            assert torch.equal(one, many)


def dense(n: int, classes: int, pixels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits (n, C, pixels) viewed as (n, pixels, C), and targets by row."""
    logits, target = batch(n * pixels, classes, dtype, ignored=5)
    return logits.view(n, pixels, classes).transpose(1, 2).contiguous().transpose(1, 2), target


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(2, 3, 4500), (3, 70, 37), (1, 5, 1), (2, 600, 20)], ids=str)
def test_dense_predictions_are_rows(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The result is that of rows in every layout and for any number of threads, up to rounding, as sums run over other
    pieces.
    """
    logits, target = dense(*size, dtype)
    alone = all_of(logits, target, 0.1)
    torch.set_num_threads(2)
    for one, many in zip(alone, all_of(logits, target, 0.1), strict=True):
        assert torch.equal(one, many)
    rows = all_of(logits.reshape(-1, size[1]), target, 0.1)
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}.get(dtype, 2e-2)
    for one, row in zip(alone, rows, strict=True):
        torch.testing.assert_close(one.reshape(row.shape), row, rtol=tolerance, atol=tolerance)


def test_dense_predictions_are_not_copied() -> None:
    logits, target = dense(2, 12, 3000, torch.float32)
    u = logits.transpose(1, 2).requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        lpg_cross_entropy(u, target.view(2, 3000), torch.ones(12), 0.1, backend="cpu").backward()
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
    assert allocated < 2 * 4 * logits.numel()
    assert u.grad is not None
    assert u.grad.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(300, 3), (200, 1000), (20, 5000)], ids=str)
def test_instruction_sets_agree(size: tuple[int, int], dtype: torch.dtype) -> None:
    logits, target = batch(*size, dtype, ignored=5)
    found = {}
    for isa in cpu.native().isas():
        cpu.native().use_isa(isa)
        found[isa] = all_of(logits, target, 0.1) + all_of(*dense(2, size[1], 33, dtype), 0.1)
    for isa in found:
        for one, other in zip(found["generic"], found[isa], strict=True):
            assert torch.equal(one, other), isa


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scope", ["class", "sample"])
def test_large_classes(size: tuple[int, int], scope: str) -> None:
    logits, target = batch(*size, torch.float64, ignored=5)
    sign = torch.ones(size[1])
    sign[0] = -1
    u = logits.requires_grad_()
    torch.set_num_threads(2)
    (gradient,) = torch.autograd.grad(lpg_cross_entropy(u, target, sign, 0.05, scope=scope, backend="cpu"), u)
    wanted = expected(logits, target, sign, 0.05, scope=scope)[1]
    assert_near(gradient * len(target), wanted * len(target), torch.float64)


def probabilities(x: Tensor) -> Tensor:
    """exp of float32 numbers of 0 or less as the kernels compute it: each is the logit of a class whose rival has logit
    0.
    """
    logits = torch.cat([torch.zeros(1), x])[None]
    problem = Problem(logits, torch.zeros(1, dtype=torch.long))
    measured = lpg_cpu.forward(problem, False)
    how = Perturbation(torch.zeros(logits.shape[1]))
    total = 1 + measured.saved[0][0, 1].double()
    return lpg_cpu.backward(problem, measured.saved, total.float().expand(1), how)[0, 1:]


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_exp_is_near(isa: str) -> None:
    if isa not in cpu.native().isas():
        pytest.skip(f"this machine has no {isa}")
    cpu.native().use_isa(isa)
    x = -torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 87.3
    x = torch.cat([x, -torch.logspace(-9, 1.9, 50_000)])
    relative = (probabilities(x).double() / x.double().exp() - 1).abs().max()
    assert relative < 2.5 * 2**-23


def test_exp_at_its_ends() -> None:
    x = torch.tensor([0.0, -0.0, -87.3, -87.4, -104.0, -1e30, -torch.inf])
    found = probabilities(x)
    assert found[:2].tolist() == [1.0, 1.0]
    assert found[2] > 1e-38
    assert found[3:].tolist() == [0.0] * 4


def test_memory_around_is_untouched() -> None:
    """Nothing beyond the end of a row is read or written, though the kernels work on sixteen numbers at a time."""
    for classes in (1, 2, 15, 16, 17, 31, 33):
        logits, target = batch(5, max(2, classes))
        frame = torch.full((7, logits.shape[1] + 40), torch.nan)
        frame[1:6, 20:-20] = logits
        view = frame[1:6, 20:-20].requires_grad_()
        loss = lpg_cross_entropy(view, target, torch.ones(logits.shape[1]), 0.1, backend="cpu")
        (gradient,) = torch.autograd.grad(loss, view)
        assert loss.isfinite()
        assert_near(gradient, expected(logits, target, torch.ones(logits.shape[1]), 0.1)[1], torch.float32)


def test_one_class_has_no_gradient() -> None:
    u = torch.randn(3, 1, requires_grad=True)
    loss = lpg_cross_entropy(u, torch.zeros(3, dtype=torch.long), torch.ones(1), 0.1, backend="cpu")
    (gradient,) = torch.autograd.grad(loss, u)
    assert loss == 0
    assert (gradient == 0).all()


def test_sums_of_classes_are_the_reference_s() -> None:
    from gradfused.lpg import reference as lpg_reference

    logits, target = batch(900, 12, torch.float64, ignored=9)
    problem = Problem(logits, target, None, 0.1)
    found = [k.class_sums(problem, k.forward(problem, True).saved) for k in (lpg_cpu, lpg_reference)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
    tallies = [k.forward(problem, True).tally for k in (lpg_cpu, lpg_reference)]
    torch.testing.assert_close(*tallies, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.5}], ids=str)
def test_no_pass_makes_a_softmax(options: dict[str, Any]) -> None:
    """Forward allocates a few numbers for each row, and backward only the gradient: nothing else of size (n, C)."""
    logits, target = batch(2000, 100)
    loss_of = LPGCrossEntropyLoss(100, backend="cpu", **options)
    u = logits.requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = loss_of(u, target)
    forward = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
    with torch.profiler.profile(profile_memory=True) as profile:
        loss.backward()
    backward = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
    size = logits.numel() * 4
    assert forward < size * (0.9 if options else 0.2)
    assert size <= backward < 1.3 * size
