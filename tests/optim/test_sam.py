"""SAM as an optimizer: closures, schedulers, AMP, checkpoints, and what can come between its halves."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, EMULATED_CUDA, Run, contiguous
from torch import nn
from torch.nn import Parameter
from twins import assert_identical, loss_of, parameters, small_model, snapshot

import gradfused
from gradfused import SAM, frozen_statistics

BACKENDS = ["cpu", "reference", EMULATED_CUDA]
backends = pytest.mark.parametrize("backend", BACKENDS)
RHO = 0.3


# ---- as an optimizer


def made(**options: Any) -> tuple[nn.Module, SAM]:
    model = small_model()
    return model, SAM(gradfused.AdamW(model.parameters(), lr=0.01, **options), RHO)


def closure_of(model: nn.Module, sam: SAM, index: int = 0) -> Callable[[], float]:
    def closure() -> float:
        sam.zero_grad()
        loss = loss_of(model, index)
        loss.backward()
        return float(loss.detach())

    return closure


def test_step_with_a_closure_takes_both_halves() -> None:
    (model, sam), (other, halves) = made(), made()
    first = float(loss_of(model, 0).detach())
    assert sam.step(closure_of(model, sam)) == pytest.approx(first)
    closure_of(other, halves)()
    halves.step(half="first")
    assert halves.ascended
    closure_of(other, halves)()
    halves.step(half="second")
    assert not halves.ascended
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def both(sam: SAM) -> None:
    """Take a step whose halves see the same gradients."""
    sam.first_step()
    sam.second_step()


def short(precision: str | None) -> tuple[Parameter, SAM]:
    """A bfloat16 parameter of one element, after two steps."""
    p = Parameter(torch.ones(1, dtype=torch.bfloat16))
    sam = SAM(gradfused.AdamW([p], lr=0.01, backend="cpu", precision=precision), RHO)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        both(sam)
    return p, sam


@pytest.mark.parametrize("precision", [None, "master"])
def test_a_steady_step_keeps_the_tables_of_both_halves(precision: str | None) -> None:
    p, sam = short(precision)
    tables = sam._halves._table, sam.base_optimizer._seen
    for _ in range(2):
        p.grad = torch.ones_like(p)
        both(sam)
        assert sam._halves._table is tables[0]
        assert sam.base_optimizer._seen is tables[1]


def test_another_master_of_the_same_value_is_noticed() -> None:
    p, sam = short("master")
    table, state = sam._halves._table, sam.state[p]
    state["master"] = state["master"].clone()
    p.grad = torch.ones_like(p)
    sam.first_step()
    assert sam._halves._table is not table


@pytest.mark.parametrize("at", [1, 2])
def test_an_exception_in_the_closure_restores_the_weights(at: int) -> None:
    model, sam = made()
    before, calls = [p.detach().clone() for p in model.parameters()], []
    inner = closure_of(model, sam)

    def closure() -> float:
        calls.append(1)
        if len(calls) == at:
            raise KeyError("data")
        return inner()

    with pytest.raises(KeyError):
        sam.step(closure)
    assert not sam.ascended
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)
    sam.step(inner)


def test_a_gradient_that_cannot_be_used_in_the_descent_changes_nothing() -> None:
    model, sam = made()
    closure_of(model, sam)()
    sam.first_step()
    weight = next(model.parameters())
    good = weight.grad
    weight.grad = torch.ones_like(weight).to_sparse()
    before = snapshot(sam.base_optimizer)[2]
    with pytest.raises(TypeError, match="sparse"):
        sam.second_step()
    assert_identical(snapshot(sam.base_optimizer)[2], before)
    assert sam.ascended
    weight.grad = good
    sam.second_step()


def test_halves_come_in_turn() -> None:
    model, sam = made()
    closure_of(model, sam)()
    with pytest.raises(RuntimeError, match=r"second_step\(\) without first_step\(\)"):
        sam.second_step()
    sam.first_step()
    with pytest.raises(RuntimeError, match=r"first_step\(\) twice"):
        sam.first_step()
    with pytest.raises(RuntimeError, match=r"step\(closure\) between the halves"):
        sam.step(lambda: 0.0)


def test_groups_and_schedulers_are_the_optimizers() -> None:
    model, sam = made()
    assert sam.param_groups is sam.base_optimizer.param_groups
    scheduler = torch.optim.lr_scheduler.StepLR(sam, step_size=1, gamma=0.1)
    sam.step(closure_of(model, sam))
    scheduler.step()
    assert sam.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    sam.add_param_group({"params": [Parameter(torch.ones(2))], "lr": 0.5})
    assert [g["lr"] for g in sam.base_optimizer.param_groups] == pytest.approx([0.001, 0.5])
    sam.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@backends
def test_parameters_with_a_gradient_in_one_half_only(backend: str) -> None:
    """A parameter that ascended and gets no gradient goes back; one that has its first gradient is stepped from where
    it is.
    """
    params = [Parameter(torch.ones(3)) for _ in range(3)]
    sam = SAM(gradfused.SGD(params, lr=0.5, backend=backend), RHO)
    for _ in range(2):
        for p, grad in zip(params, (1.0, 1.0, None), strict=True):
            p.grad = None if grad is None else torch.full((3,), grad)
        sam.first_step()
        assert not torch.equal(params[0].detach(), torch.ones(3))
        for p, grad in zip(params, (1.0, None, 1.0), strict=True):
            p.grad = None if grad is None else torch.full((3,), grad)
        sam.second_step()
        for p, expected in zip(params, (0.5, 1.0, 0.5), strict=True):
            torch.testing.assert_close(p.detach(), torch.full((3,), expected))
            p.data.fill_(1.0)


def test_no_gradients_at_all() -> None:
    model, sam = made()
    before = [p.detach().clone() for p in model.parameters()]
    sam.first_step()
    sam.second_step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old)


def test_accumulated_gradients_are_summed_before_each_half() -> None:
    (model, sam), (other, whole) = made(), made()

    def accumulated(m: nn.Module, parts: int) -> None:
        m.zero_grad()
        for i in range(2):
            (loss_of(m, i) / 2).backward() if parts else None
        if not parts:
            ((loss_of(m, 0) + loss_of(m, 1)) / 2).backward()

    for parts, m, s in ((2, model, sam), (0, other, whole)):
        accumulated(m, parts)
        s.first_step()
        accumulated(m, parts)
        s.second_step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_zero_grad_in_step_holds_for_both_halves() -> None:
    model, sam = made(zero_grad_in_step=True)
    for half in (sam.first_step, sam.second_step):
        loss_of(model, 0).backward()
        half()
        assert all(bool((p.grad == 0).all()) for p in model.parameters())


def test_rho_may_move() -> None:
    p = Parameter(torch.zeros(4))
    sam = SAM(gradfused.SGD([p], lr=0.0), 1.0)
    for rho in (1.0, 2.0):
        sam.rho = rho
        p.grad = torch.ones(4)
        sam.first_step()
        torch.testing.assert_close(p.detach(), torch.full((4,), rho / 2))
        sam.second_step()


# ---- AMP


@pytest.mark.parametrize("unscaled", [False, True])
def test_grad_scaler(unscaled: bool) -> None:
    """A power of two scales without rounding, so that the steps equal those without a scaler, to the bit."""
    (model, sam), (other, plain) = made(), made()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for index in range(4):
        sam.zero_grad()
        scaler.scale(loss_of(model, index // 2)).backward()
        if unscaled:
            scaler.unscale_(sam)
        half = "second" if index % 2 else "first"
        scaler.step(sam, half=half)
        scaler.update()
        plain.zero_grad()
        loss_of(other, index // 2).backward()
        plain.step(half=half)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@backends
@pytest.mark.parametrize("overflow", ["ascent", "descent"])
def test_overflow_in_either_half(overflow: str, backend: str) -> None:
    """After an overflow in the ascent an ordinary step follows; after one in the descent there is no step and the
    weights are back.
    """
    p = Parameter(torch.ones(3))
    sam = SAM(gradfused.SGD([p], lr=0.5, backend=backend), RHO)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def half(value: float) -> None:
        p.grad = torch.full((3,), 4.0 * value)
        scaler.scale(torch.ones(()))
        scaler.step(sam, half="second" if sam.ascended else "first")
        scaler.update()

    half(math.inf if overflow == "ascent" else 1.0)
    assert torch.equal(p.detach(), torch.ones(3)) == (overflow == "ascent")
    p.grad = None
    scaler.update(4.0)
    half(math.inf if overflow == "descent" else 1.0)
    assert torch.equal(p.detach(), torch.full((3,), 1.0 if overflow == "descent" else 0.5))
    assert not sam.ascended


@backends
@pytest.mark.parametrize("where", ["ascent", "descent"])
def test_nonfinite_gradients_are_skipped_where_the_recipe_says_so(where: str, backend: str) -> None:
    p = Parameter(torch.ones(3))
    sam = SAM(gradfused.SGD([p], lr=0.5, nonfinite="skip", backend=backend), RHO)
    p.grad = torch.full((3,), math.inf if where == "ascent" else 1.0)
    sam.first_step()
    p.grad = torch.full((3,), math.inf if where == "descent" else 1.0)
    sam.second_step()
    assert torch.equal(p.detach(), torch.full((3,), 1.0 if where == "descent" else 0.5))
    assert sam.base_optimizer.skipped_steps == (where == "descent")


# ---- saving


def test_state_dict_between_the_halves() -> None:
    """A run that is saved after the ascent goes on bit for bit."""
    model, sam = made()
    sam.step(closure_of(model, sam))
    closure_of(model, sam, 1)()
    sam.first_step()
    file = io.BytesIO()
    with pytest.warns(UserWarning, match=r"Call second_step\(\), or restore\(\), before saving"):
        torch.save({"model": model.state_dict(), "sam": sam.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed = made()
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["sam"])
    assert resumed.ascended
    for m, s in ((model, sam), (other, resumed)):
        closure_of(m, s, 1)()
        s.second_step()
        s.step(closure_of(m, s, 2))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_checkpoints_go_between_sam_and_its_optimizer() -> None:
    model, sam = made()
    sam.step(closure_of(model, sam))
    plain = gradfused.AdamW(small_model().parameters(), lr=0.01)
    plain.load_state_dict({k: v for k, v in sam.state_dict().items() if k != "sam"})
    sam.load_state_dict(plain.state_dict())
    assert sam.rho == RHO
    sam.step(closure_of(model, sam))


def test_a_backup_of_another_model_is_refused() -> None:
    model, sam = made()
    closure_of(model, sam)()
    sam.first_step()
    with pytest.warns(UserWarning, match="between the halves"):
        saved = sam.state_dict()
    saved["sam"]["backups"][0] = torch.ones(99)
    _, fresh = made()
    with pytest.raises(ValueError, match=r"backup of parameter 0 of group 0 has shape \(99,\)"):
        fresh.load_state_dict(saved)
    assert not fresh.ascended


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_between_the_halves(how: Callable[[Any], Any]) -> None:
    model, sam = made()
    closure_of(model, sam)()
    sam.first_step()
    twin = how(sam)
    for s in (sam, twin):
        for p in parameters(s):
            p.grad = torch.ones_like(p)
        s.second_step()
    for p, q in zip(parameters(sam), parameters(twin), strict=True):
        assert p is not q
        assert torch.equal(p, q)


def test_a_loaded_state_is_used_from_the_next_ascent_on() -> None:
    """Master copies that were replaced must no longer be read."""
    run = Run(CASES["sgd-momentum"], {"precision": "master"}, ((4, 3), (5,)), dtype=torch.bfloat16)
    sam = SAM(run.optimizer, RHO)
    run.fill()
    both(sam)
    sam.load_state_dict(copy.deepcopy(sam.state_dict()))
    for p in run.params:  # copies that belong to the weights: with half a unit in the last place they would round up
        p.data.fill_(2.0)
        sam.state[p]["master"].fill_(2.0 + 0.75 * 2.0**-7)
        p.grad = torch.ones_like(p)
    sam.rho = 0.5 * 2.0**-7 * math.sqrt(17)  # a quarter of a unit for each of 17 weights
    sam.first_step()
    for p in run.params:
        assert torch.equal(p.detach(), torch.full_like(p, 2.0 + 2.0**-6))


# ---- statistics of the second forward


def test_frozen_statistics() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(2), nn.InstanceNorm2d(2, track_running_stats=True), nn.BatchNorm2d(2, momentum=None)
    )
    x = torch.randn(3, 2, 4, 4)
    expected = copy.deepcopy(model)(x)
    before = copy.deepcopy(model.state_dict())
    with frozen_statistics(model):
        torch.testing.assert_close(model(x), expected)
    assert_identical(dict(model.state_dict()), dict(before))
    with pytest.raises(KeyError), frozen_statistics(model):
        raise KeyError
    model(x)
    assert int(model[0].num_batches_tracked) == 1


# ---- bad input


def test_refused_arguments() -> None:
    p = Parameter(contiguous((2,), torch.float32))
    with pytest.raises(TypeError, match=r"expected one of gradfused's optimizers, got AdamW"):
        SAM(torch.optim.AdamW([p]))  # type: ignore[arg-type]
    base = gradfused.SGD([p])
    for options, error, text in (
        ({"rho": -0.1}, ValueError, "rho"),
        ({"rho": math.nan}, ValueError, "rho"),
        ({"rho": "much"}, TypeError, "rho"),
        ({"eta": -1.0, "adaptive": True}, ValueError, "eta"),
        ({"eta": 0.1}, ValueError, "adaptive=True"),
    ):
        with pytest.raises(error, match=text):
            SAM(base, **options)  # type: ignore[arg-type]
