"""LPGCrossEntropyLoss: which classes each mode picks, what it remembers, and how processes agree."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lpg_cases import BACKENDS, assert_near, batch, device_of, expected
from processes import in_two_processes
from torch import Tensor

from gradfused.backends import availability
from gradfused.nn import DANNSchedule, GradientReversal, LPGCrossEntropyLoss, ReversalLinear

_cpu = availability()["cpu"]
needs_cpu = pytest.mark.skipif(not _cpu.usable, reason=str(_cpu.reason))
every = pytest.mark.parametrize("backend", BACKENDS)
both = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])


def with_confidence(q: list[float]) -> Tensor:
    """Logits of three classes: row i gives class i the probability q[i], and each other class half of the rest."""
    return torch.tensor([[math.log(p if i == j else (1 - p) / 2) for j in range(3)] for i, p in enumerate(q)]).double()


def gradient_of(loss_of: LPGCrossEntropyLoss, logits: Tensor, target: Tensor) -> Tensor:
    u = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(u, target), u)
    return gradient


@both
def test_balanced_by_hand(backend: str) -> None:
    """Confidences 0.2, 0.5 and 0.8: mean 0.5. The first is amplified, the second left alone, the third dampened."""
    logits, target = with_confidence([0.2, 0.5, 0.8]), torch.arange(3)
    loss_of = LPGCrossEntropyLoss(3, radius=0.1, backend=backend, reduction="sum").double()
    found = gradient_of(loss_of, logits, target)
    torch.testing.assert_close(loss_of.confidence, torch.tensor([0.2, 0.5, 0.8]).double(), rtol=1e-7, atol=0)
    assert loss_of.signs().tolist()[::2] == [1.0, -1.0]
    sign = loss_of.signs()
    assert_near(found, expected(logits, target, sign, 0.1, reduction="sum")[1], torch.float64)
    plain = expected(logits, target, torch.zeros(3), 0.1, reduction="sum")[1]
    assert found[0].norm() > plain[0].norm()
    assert found[2].norm() < plain[2].norm()


@both
def test_classes_not_seen_are_left_alone_and_do_not_count(backend: str) -> None:
    loss_of = LPGCrossEntropyLoss(5, backend=backend)
    logits = torch.zeros(2, 5)
    logits[0, 3] = 2.0
    loss_of(logits, torch.tensor([3, 1]))
    assert loss_of.signs().tolist() == [0.0, 1.0, 0.0, -1.0, 0.0]
    assert loss_of.seen.tolist() == [0, 1, 0, 1, 0]


def test_longtail_by_hand() -> None:
    """Ranks from rarest: classes 2, 0, 3, 1, split between the second and the third."""
    loss_of = LPGCrossEntropyLoss(4, radius=0.3, mode="longtail", counts=[20, 900, 5, 100])
    torch.testing.assert_close(loss_of.signs(), torch.tensor([1 / 3, -1.0, 1.0, -1 / 3]))
    assert LPGCrossEntropyLoss(3, mode="longtail", counts=[7, 7, 7]).signs().tolist() == [0.0, 0.0, 0.0]
    ties = LPGCrossEntropyLoss(4, mode="longtail", counts=torch.tensor([1, 1, 9, 9])).signs()
    torch.testing.assert_close(ties, torch.tensor([2 / 3, 2 / 3, -2 / 3, -2 / 3]))


@both
def test_longtail_bounds_each_class_by_its_rank(backend: str) -> None:
    logits, target = batch(40, 4, torch.float64)
    loss_of = LPGCrossEntropyLoss(4, radius=0.3, mode="longtail", counts=[20, 900, 5, 100], backend=backend)
    sign, share = torch.tensor([1, -1, 1, -1]), torch.tensor([1 / 3, 1, 1, 1 / 3])
    wanted = expected(logits, target, sign, 0.3 * share)[1]
    torch.testing.assert_close(gradient_of(loss_of, logits, target), wanted, rtol=1e-6, atol=1e-8)


@both
def test_noisy_finds_the_class_that_is_contradicted(backend: str) -> None:
    """All are equally confident, but class 2's missing probability is all on one wrong class: its gradient is the
    longest.
    """
    spread = torch.tensor([0.4, 0.2, 0.2, 0.2]).log()
    rows = [spread, spread.roll(1), torch.tensor([0.6, 1e-6, 0.4, 1e-6]).log(), spread.roll(3)]
    loss_of = LPGCrossEntropyLoss(4, radius=0.1, mode="noisy", backend=backend)
    loss_of(torch.stack(rows), torch.arange(4))
    torch.testing.assert_close(loss_of.confidence, torch.full((4,), 0.4), rtol=1e-5, atol=0)
    assert loss_of.gradient_norm.argmax() == 2
    assert loss_of.signs().tolist() == [0.0, 0.0, -1.0, 0.0]


@both
def test_given_signs_and_bounds(backend: str) -> None:
    logits, target = batch(30, 5, torch.float64)
    sign, radius = torch.tensor([1, 0, -1, 1, -1]), torch.linspace(0.1, 0.5, 5)
    loss_of = LPGCrossEntropyLoss(5, radius=radius, sign=sign, backend=backend)
    torch.testing.assert_close(gradient_of(loss_of, logits, target), expected(logits, target, sign, radius)[1])


@both
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"ignore_index": 2},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"weight": torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7])},
    ],
    ids=str,
)
def test_the_value_is_torch_s(options: dict[str, Any], backend: str) -> None:
    logits, target = batch(30, 5)
    theirs = torch.nn.CrossEntropyLoss(**options)(logits, target)
    loss_of = LPGCrossEntropyLoss(5, **options, backend=backend)
    torch.testing.assert_close(loss_of(logits, target), theirs)
    torch.testing.assert_close(loss_of.eval()(logits, target), theirs)


@both
def test_evaluation_is_plain_and_forgets_nothing(backend: str) -> None:
    logits, target = batch(30, 5)
    loss_of = LPGCrossEntropyLoss(5, backend=backend)
    loss_of(logits, target)
    before = copy.deepcopy(loss_of.state_dict())
    found = gradient_of(loss_of.eval(), logits.flip(0), target)
    u = logits.flip(0).requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(F.cross_entropy(u, target), u)[0])
    for name, value in loss_of.state_dict().items():
        assert torch.equal(value, before[name])


@both
def test_momentum_follows_averages(backend: str) -> None:
    """A class's first batch counts in full, later ones by 1 - momentum.

    A batch without the class leaves its average alone.
    """
    loss_of = LPGCrossEntropyLoss(4, radius=0.2, momentum=0.75, sign=[1, -1, 1, -1], backend=backend)
    means, seen = torch.zeros(4, 4).double(), set()
    for seed in range(4):
        logits, target = batch(12, 4, torch.float64, seed=seed)
        if seed == 2:
            target[target == 1] = 0
        own = logits.softmax(1) - F.one_hot(target, 4)
        for c in set(target.tolist()):
            mean = own[target == c].mean(0)
            means[c] = 0.75 * means[c] + 0.25 * mean if c in seen else mean
            seen.add(c)
        found = gradient_of(loss_of, logits, target)
        wanted = expected(logits, target, torch.tensor([1, -1, 1, -1]), 0.2, means=means)[1]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    assert loss_of.mean_gradient is not None
    torch.testing.assert_close(loss_of.mean_gradient.double(), means, rtol=1e-5, atol=1e-7)


@both
def test_a_later_forward_does_not_move_an_earlier_backward(backend: str) -> None:
    first, second = batch(12, 4, torch.float64), batch(12, 4, torch.float64, seed=1)
    alone = gradient_of(LPGCrossEntropyLoss(4, momentum=0.5, backend=backend), *first)
    loss_of = LPGCrossEntropyLoss(4, momentum=0.5, backend=backend)
    u = first[0].requires_grad_()
    loss = loss_of(u, first[1])
    loss_of(*second)
    assert torch.equal(torch.autograd.grad(loss, u)[0], alone)


@both
def test_saving_and_copying(backend: str, tmp_path: Path) -> None:
    logits, target = batch(30, 5)
    weight = torch.rand(5)
    one = LPGCrossEntropyLoss(5, momentum=0.9, weight=weight, backend=backend)
    one(logits, target)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    other = LPGCrossEntropyLoss(5, momentum=0.9, weight=torch.ones(5), backend=backend)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    copied = copy.deepcopy(one)
    logits, target = batch(30, 5, seed=4)
    wanted = gradient_of(one, logits, target)
    assert torch.equal(gradient_of(other, logits, target), wanted)
    assert torch.equal(gradient_of(copied, logits, target), wanted)
    assert set(one.state_dict()) == {"weight", "confidence", "gradient_norm", "seen", "mean_gradient"}
    assert "mean_gradient" not in LPGCrossEntropyLoss(5).state_dict()


BAD = {
    "nan": lambda x: x.fill_(math.nan),
    "one nan": lambda x: x[3, 1].fill_(math.nan),
    "inf": lambda x: x.fill_(math.inf),
    "one inf": lambda x: x[0, 0].fill_(math.inf),
    "all -inf": lambda x: x[2].fill_(-math.inf),
    "overflow": lambda x: x.mul_(1e30).mul_(1e30),
}


@every
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("momentum", [0.0, 0.75])
@pytest.mark.parametrize("mode", ["balanced", "noisy"])
def test_a_bad_batch_leaves_no_trace(mode: str, momentum: float, bad: str, backend: str) -> None:
    """After it, or before any good one, statistics and signs are those of a module that never saw it."""
    if backend == "triton" and (mode, bad) not in (("noisy", "one nan"), ("balanced", "inf")):
        pytest.skip("slow to interpret")
    ours = LPGCrossEntropyLoss(4, radius=0.2, mode=mode, momentum=momentum, backend=backend).to(device_of(backend))
    twin = copy.deepcopy(ours)
    for seed in range(4):
        logits, target = (t.to(device_of(backend)) for t in batch(12, 4, seed=seed))
        if seed in (0, 2):
            spoilt = logits.clone()
            BAD[bad](spoilt)
            gradient_of(ours, spoilt, target)
        else:
            assert torch.equal(gradient_of(ours, logits, target), gradient_of(twin, logits, target))
        for (name, value), wanted in zip(ours.state_dict().items(), twin.state_dict().values(), strict=True):
            assert torch.equal(value, wanted), name
        assert torch.equal(ours.signs().nan_to_num(), twin.signs().nan_to_num())


@every
@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_masked_classes_count(momentum: float, backend: str) -> None:
    """Classes are masked with -inf: their probability is 0, also where the target's class is masked and the loss
    infinite.
    """
    module = LPGCrossEntropyLoss(4, momentum=momentum, backend=backend).to(device_of(backend))
    logits, target = torch.zeros(4, 4, device=device_of(backend)), torch.arange(4, device=device_of(backend))
    logits[:, 3] = -math.inf
    module(logits.requires_grad_(), target)
    assert module.seen.tolist() == [1, 1, 1, 1]
    torch.testing.assert_close(module.confidence.cpu(), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))


@every
@pytest.mark.parametrize("momentum", [0.0, 0.75])
def test_a_checkpoint_with_nan_in_it_recovers(momentum: float, backend: str) -> None:
    """A class without statistics counts as not seen, and its next batch counts in full."""
    ours = LPGCrossEntropyLoss(4, radius=0.2, momentum=momentum, backend=backend).to(device_of(backend))
    twin = copy.deepcopy(ours)
    logits, target = (t.to(device_of(backend)) for t in batch(12, 4))
    gradient_of(ours, logits, target)
    for buffer in (ours.confidence, ours.gradient_norm, *([] if ours.mean_gradient is None else [ours.mean_gradient])):
        buffer.fill_(math.nan)
    assert ours.signs().nan_to_num().tolist() == [0.0] * 4
    assert torch.equal(gradient_of(ours, logits, target), gradient_of(twin, logits, target))
    for name in ("confidence", "gradient_norm"):
        there = twin.seen > 0
        assert torch.equal(getattr(ours, name)[there], getattr(twin, name)[there])


def test_nothing_that_reverses_remembers_a_batch() -> None:
    """The buffers of the other modules do not depend on what passes through them."""
    model = torch.nn.Sequential(GradientReversal(0.5), ReversalLinear(4, 3, lambda_=0.25))
    schedule = DANNSchedule(model, 10)
    before = copy.deepcopy(dict(model.named_buffers()))
    state = schedule.state_dict()
    for value in (math.nan, math.inf, -math.inf):
        model(torch.full((2, 4), value, requires_grad=True)).sum().backward()
    assert before.keys() == dict(model.named_buffers()).keys()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert schedule.state_dict() == state


@both
def test_no_statistics_come_of_an_empty_or_ignored_batch(backend: str) -> None:
    loss_of = LPGCrossEntropyLoss(5, momentum=0.5, backend=backend)
    logits, target = batch(30, 5)
    loss_of(logits, target)
    before = copy.deepcopy(loss_of.state_dict())
    loss_of(logits[:0], target[:0])
    loss_of(logits, torch.full_like(target, -100))
    for name, value in loss_of.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_what_it_says_of_itself() -> None:
    text = repr(LPGCrossEntropyLoss(5, mode="longtail", counts=range(5)))
    assert "5, radius=0.1, mode='longtail', scope='class', momentum=0" in text
    assert "sign=given" in repr(LPGCrossEntropyLoss(2, sign=[1, -1]))
    assert "radius=a class" in repr(LPGCrossEntropyLoss(2, radius=torch.ones(2)))


# ---- processes


def _synchronised(rank: int, momentum: float) -> tuple[dict[str, Tensor], list[Tensor]]:
    loss_of = LPGCrossEntropyLoss(6, momentum=momentum, sync=True)
    gradients = []
    for step in range(3):
        logits, target = batch(16, 6, torch.float64, seed=step)
        half = slice(0, 10) if rank == 0 else slice(10, 16)
        if step == 1:  # a batch that is bad in one process enters the statistics of none
            gradient_of(loss_of, logits[half] * (math.nan if rank else 1.0), target[half])
        gradients.append(gradient_of(loss_of, logits[half], target[half]))
    return loss_of.state_dict(), gradients


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_processes_agree(momentum: float, tmp_path: Path) -> None:
    """Synchronised statistics are those of one process with the whole batch. With momentum the deltas are, too."""
    found = in_two_processes(_synchronised, tmp_path, momentum)
    whole = LPGCrossEntropyLoss(6, momentum=momentum)
    for step in range(3):
        logits, target = batch(16, 6, torch.float64, seed=step)
        gradient = gradient_of(whole, logits, target)
        if momentum:
            shares = torch.cat([found[0][1][step] * 10 / 16, found[1][1][step] * 6 / 16])
            torch.testing.assert_close(shares, gradient, rtol=1e-6, atol=1e-8)
    for state, _ in found:
        torch.testing.assert_close(state, dict(whole.state_dict()))
    for name in ("confidence", "seen"):
        assert torch.equal(found[0][0][name], found[1][0][name])
