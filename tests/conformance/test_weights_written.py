"""State that is kept beside 16-bit weights is used only while it belongs to them, whoever writes the weights.

All ways of saving, loading or copying an optimizer, of writing weights and of changing ``precision`` and ``ema``, before
the first step and after some, are compared to the bit with the rules in ``kept_oracle``, which know nothing of saving.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import DTYPES, EMULATED_CUDA
from kept_oracle import Oracle
from torch import Tensor, nn

import gradfused

_needs_interpreter = pytest.mark.skipif(not triton_interpreter.RUNS, reason=triton_interpreter.REASON)
TRITON = pytest.param("triton", marks=[_needs_interpreter, pytest.mark.kernels])
CPU = pytest.param("cpu", marks=pytest.mark.kernels)
backends = pytest.mark.parametrize("backend", [CPU, "reference", EMULATED_CUDA])
backends_and_triton = pytest.mark.parametrize("backend", [CPU, "reference", EMULATED_CUDA, TRITON])
short = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])

LR = 2.0**-6  # exact in products
SHAPES = ((3, 24), (7,))  # one row of packs, and one that is walked element by element
SEEDS = itertools.count()


def numbers(seed: int, spread: float = 8.0) -> list[Tensor]:
    """Numbers of many magnitudes, one tensor for each parameter."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator)
        * 2.0 ** torch.empty(shape).uniform_(-spread, spread, generator=generator)
        for shape in SHAPES
    ]


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(x.to(dtype)) for x in numbers(0))


class Training:
    """A model, its optimizer and the oracles of its parameters."""

    def __init__(self, dtype: str, backend: str, precision: str | None, ema: float | None = None) -> None:
        self.options = {"lr": LR, "precision": precision, "ema": ema, "backend": backend}
        self.model = Model(DTYPES[dtype])
        self.optimizer = self.fresh_optimizer()
        self.oracles = [Oracle(p.detach(), precision, ema) for p in self.params]
        self.taken = 0

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def fresh_optimizer(self) -> gradfused.SGD:
        return gradfused.SGD(self.params, **self.options)  # type: ignore[arg-type]

    def choose(self, precision: str | None, ema: float | None) -> None:
        for group in self.optimizer.param_groups:
            group.update(precision=precision, ema=ema)
        for oracle in self.oracles:
            oracle.choose(precision, ema)

    def fill(self) -> None:
        for p, g in zip(self.params, numbers(1000 + self.taken), strict=True):
            p.grad = g.to(p.dtype)

    def step(self, count: int = 1) -> Training:
        for _ in range(count):
            self.fill()
            self.optimizer.step()
            self.follow()
        return self

    def follow(self) -> None:
        """Let the oracles take the step."""
        for oracle, p in zip(self.oracles, self.params, strict=True):
            assert p.grad is not None
            oracle.step(p.grad, LR)
        self.taken += 1

    def check(self) -> None:
        """The weights and all state kept beside them are the oracles', and there is no other state."""
        for oracle, p in zip(self.oracles, self.params, strict=True):
            torch.testing.assert_close(p.detach(), oracle.param, rtol=0, atol=0, equal_nan=True)
            state = self.optimizer.state.get(p, {})
            kept = {key: value for key, value in state.items() if key in ("master", "kahan_comp", "ema")}
            assert kept.keys() == oracle.kept.keys()
            for key, value in kept.items():
                # The products of the average are not exact, but the weights that enter it are.
                tolerance = 1e-6 if key == "ema" else 0.0
                torch.testing.assert_close(value, oracle.kept[key], rtol=tolerance, atol=0, equal_nan=True)


# ---- what happens between two steps and does not change the training


def nothing(_: Training) -> None:
    pass


def load_state_dict(t: Training) -> None:
    t.optimizer.load_state_dict(copy.deepcopy(t.optimizer.state_dict()))


def load_into_another(t: Training) -> None:
    saved = copy.deepcopy(t.optimizer.state_dict())
    t.optimizer = t.fresh_optimizer()
    t.optimizer.load_state_dict(saved)


def deepcopy(t: Training) -> None:
    t.model, t.optimizer = copy.deepcopy((t.model, t.optimizer))


def unpickle(t: Training) -> None:
    t.model, t.optimizer = pickle.loads(pickle.dumps((t.model, t.optimizer)))


def checkpoint(*order: str) -> Callable[[Training], None]:
    def resume(t: Training) -> None:
        file = io.BytesIO()
        torch.save({"model": t.model.state_dict(), "optimizer": t.optimizer.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        t.model = Model(t.params[0].dtype)
        t.optimizer = t.fresh_optimizer()
        for name in order:
            getattr(t, name).load_state_dict(saved[name])

    return resume


def swap_ema(t: Training) -> None:
    if any(group["ema"] is not None for group in t.optimizer.param_groups):
        with t.optimizer.swap_ema():
            pass


def ascend_and_restore(t: Training) -> None:
    t.fill()
    sam = gradfused.SAM(t.optimizer, rho=0.5)
    sam.first_step()
    sam.restore()


EVENTS: dict[str, Callable[[Training], None]] = {
    "nothing": nothing,
    "load_state_dict": load_state_dict,
    "load_into_another": load_into_another,
    "deepcopy": deepcopy,
    "pickle": unpickle,
    "model-then-optimizer": checkpoint("model", "optimizer"),
    "optimizer-then-model": checkpoint("optimizer", "model"),
    "swap_ema": swap_ema,
    "sam": ascend_and_restore,
}
few_events = pytest.mark.parametrize("event", ["nothing", "deepcopy", "optimizer-then-model"])

# ---- ways in which the weights are written from outside


def assign_data(p: nn.Parameter, new: Tensor) -> None:
    p.data = new.clone()


def copy_to_data(p: nn.Parameter, new: Tensor) -> None:
    p.data.copy_(new)


@torch.no_grad()
def copy_in_place(p: nn.Parameter, new: Tensor) -> None:
    p.copy_(new)


def load_model(p: nn.Parameter, new: Tensor) -> None:
    module = nn.Module()
    module.weight = p
    module.load_state_dict({"weight": new})


WRITERS = (assign_data, copy_to_data, copy_in_place, load_model)


def half_of_them(p: nn.Parameter, seed: int) -> Tensor:
    """Some weights stay as they are, others move a little, and others become anything."""
    at = [tuple(p.shape) == shape for shape in SHAPES].index(True)
    which = torch.arange(p.numel()).view(p.shape) % 3
    eps = torch.finfo(p.dtype).eps
    near = p.detach() * (1 + eps)
    return torch.where(which == 0, p.detach(), torch.where(which == 1, near, numbers(seed)[at].to(p.dtype)))


@torch.no_grad()
def less_than_half_a_unit(p: nn.Parameter) -> Tensor:
    """Add so little that the weights round to what they were."""
    moved = p + p * (torch.finfo(p.dtype).eps / 8)
    assert torch.equal(moved, p)
    return moved


def writings() -> Iterator[tuple[str, Callable[[Training], None]]]:
    yield "none", nothing
    for writer in WRITERS:

        def write(t: Training, writer: Callable[[nn.Parameter, Tensor], None] = writer) -> None:
            for p, oracle in zip(t.params, t.oracles, strict=True):
                new = half_of_them(p, 17 + t.taken)
                writer(p, new)
                oracle.write(new)

        yield writer.__name__, write

    def add(t: Training) -> None:
        for p in t.params:
            copy_in_place(p, less_than_half_a_unit(p))

    yield "noise", add


# ---- the kind


@short
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("precision", [None, "kahan", "master"])
@backends
def test_written_saved_and_stepped(precision: str | None, event: str, dtype: str, backend: str) -> None:
    """Weights are written before something is saved and after it, before the first step and after two."""
    every = dict(writings())
    if not (backend == "cpu" and dtype == "bfloat16"):  # backend and dtype only differ in how elements are walked
        every = {name: every[name] for name in ("none", "assign_data", "load_model")}
    for first, (before, after) in itertools.product((0, 2), itertools.product(every, repeat=2)):
        if "none" not in (before, after):
            continue
        t = Training(dtype, backend, precision, ema=0.5).step(first)
        every[before](t)
        EVENTS[event](t)
        every[after](t)
        t.step(2).check()


@few_events
@pytest.mark.parametrize("precision", ["kahan", "master"])
@pytest.mark.parametrize("backend", [TRITON])
def test_written_saved_and_stepped_by_triton(precision: str, event: str, backend: str) -> None:
    t = Training("bfloat16", backend, precision, ema=0.5).step()
    EVENTS[event](t)
    dict(writings())["copy_to_data"](t)
    t.step(2).check()


def phases() -> list[tuple[tuple[str | None, float | None], ...]]:
    """(precision, ema) of three phases: every change of one of them, there and back, together with every change of the
    other.
    """
    precisions = [(a, b, c) for a, b, c in itertools.product((None, "kahan", "master"), repeat=3) if a != b != c]
    found = [tuple((p, 0.5) for p in three) for three in precisions]
    found += [tuple((p, None) for p in three) for three in precisions]
    return found + [tuple((p, e) for e in (0.5, None, 0.25)) for p in (None, "kahan", "master")]


@short
@pytest.mark.parametrize("event", EVENTS)
@backends
def test_options_switched_and_back(event: str, dtype: str, backend: str) -> None:
    """The next step drops state that no option asks for. A copy or an average that is asked for again begins anew."""
    for three in phases()[:: 1 if backend == "cpu" and dtype == "bfloat16" else 5]:
        t = Training(dtype, backend, *three[0])
        for options in three:
            t.choose(*options)
            EVENTS[event](t)
            t.step(2).check()


@pytest.mark.parametrize("options", [{"precision": "master"}, {"precision": "kahan"}, {"ema": 0.5}], ids=str)
@backends_and_triton
def test_options_switched_many_times(options: dict[str, Any], backend: str) -> None:
    """Tables of earlier phases are still kept: none of them brings back what came after it."""
    t = Training("bfloat16", backend, None)
    for on in (False, True, False, True, False):
        t.choose(options.get("precision") if on else None, options.get("ema") if on else None)
        t.step().check()


@pytest.mark.parametrize("off", [{"precision": None}, {"ema": None}], ids=str)
@backends
def test_a_step_that_is_not_taken_forgets_nothing(off: dict[str, Any], backend: str) -> None:
    t = Training("bfloat16", backend, "master", ema=0.5).step(2)
    before = {(p, key): value for p in t.params for key, value in t.optimizer.state[p].items()}
    t.optimizer.param_groups[0].update(off, nonfinite="skip")
    t.fill()
    t.optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    t.optimizer.step()
    del t.optimizer.found_inf  # type: ignore[attr-defined]
    if backend != "cuda":  # only the device knows it there; options count as changed
        t.params[0].grad.fill_(math.inf)  # type: ignore[union-attr]
        t.optimizer.step()
        after = {(p, key): value for p in t.params for key, value in t.optimizer.state[p].items()}
        assert after.keys() == before.keys()
        assert all(after[key] is before[key] for key in before)
    t.choose(off.get("precision", "master"), off.get("ema", 0.5))
    t.step(2).check()


# ---- SAM


@short
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("precision", [None, "kahan", "master"])
@backends
def test_sam_descends_from_the_weights_that_were_written(
    precision: str | None, event: str, dtype: str, backend: str
) -> None:
    """The ascent begins at the present weights, and the descent shows no trace of it."""
    every = dict(writings())
    writing_ways = ("none", "copy_in_place", "assign_data") if backend == "cpu" else ("assign_data",)
    for first, writing in itertools.product((0, 2), writing_ways):
        t = Training(dtype, backend, precision, ema=0.5).step(first)
        EVENTS[event](t)
        every[writing](t)
        for adaptive in (False, True):
            sam = gradfused.SAM(t.optimizer, rho=0.5, adaptive=adaptive)
            t.fill()
            sam.first_step()
            backups = [sam._halves.backups[p] for p in t.params]
            assert all(torch.equal(b, o.param) for b, o in zip(backups, t.oracles, strict=True))
            sam.second_step()
            t.follow()
            t.check()


@backends_and_triton
def test_sam_ascends_from_the_copy(backend: str) -> None:
    """The ascent begins at the copy if it belongs to the weights, and else at the weights."""
    p = nn.Parameter(torch.full((16,), 1.0, dtype=torch.bfloat16))
    optimizer = gradfused.SGD([p], lr=2.0**-9, precision="master", backend=backend)
    p.grad = torch.full_like(p, -1.0)
    optimizer.step()
    optimizer.step()  # 1 + 2^-8 is half a unit above 1
    p.data[8:] = 3.0
    sam = gradfused.SAM(optimizer, rho=2.0**-8 * 4)  # 2^-8 for each element
    sam.first_step()
    assert p.tolist() == [1.0] * 8 + [3.0] * 8
    p.grad = torch.full_like(p, -1.0)
    sam.second_step()
    assert optimizer.state[p]["master"].tolist() == [1 + 3 * 2.0**-9] * 8 + [3 + 2.0**-9] * 8


# ---- norms


@pytest.mark.parametrize("length", [64, 70_000])  # a unit that is measured in its step, and one of several chunks
@pytest.mark.parametrize("precision", ["kahan", "master"])
@pytest.mark.parametrize("backend", [CPU, EMULATED_CUDA, TRITON])
def test_norms_are_of_the_weights_that_were_written(precision: str, length: int, backend: str) -> None:
    """Adaptive clipping and adaptive SAM, with copies and remainders of weights that were a thousand times as large."""

    def outcome(backend: str) -> list[Tensor]:
        weights = torch.linspace(1, 2, length).bfloat16()
        found = []
        for adaptive in (False, True):
            p = nn.Parameter(weights.clone())
            agc = {} if adaptive else {"perturb": "agc", "radius": 0.01, "norm_scope": "unit"}
            optimizer = gradfused.SGD([p], lr=1.0, precision=precision, backend=backend, **agc)  # type: ignore[arg-type]
            kept = {"master": 1000 * weights.float()} if precision == "master" else {"kahan_comp": 1000 * weights}
            optimizer.state[p].update(kept)
            p.grad = torch.linspace(-1, 1, length).bfloat16()
            if adaptive:
                gradfused.SAM(optimizer, rho=1.0, adaptive=True).first_step()
            else:
                optimizer.step()
            found.append(p.detach().float())
        return found

    for ours, theirs in zip(outcome(backend), outcome("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2.0**-8, atol=0)


# ---- numbers of every kind


def kinds_of_numbers(dtype: torch.dtype) -> list[float]:
    info = torch.finfo(dtype)
    tiny, least, top = info.tiny, info.smallest_normal * info.eps, info.max
    found = [0.0, 1.0, 1.5, 2.0 - info.eps, tiny, 2 * tiny, 8 * tiny, least, 5 * least, top, top / 2]
    return [sign * x for x in found for sign in (1.0, -1.0)] + [math.inf, -math.inf, math.nan]


def believed(kind: str, weights: Tensor, kept: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The weights after a step that moves nothing, and the kept state after it."""
    p = nn.Parameter(weights.clone())
    optimizer = gradfused.SGD([p], lr=0.0, precision="master" if kind == "master" else "kahan", backend=backend)
    optimizer.state[p][kind] = kept.clone()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    return p.detach(), optimizer.state[p][kind]


@short
@pytest.mark.parametrize("layout", ["packed", "odd"])
@backends_and_triton
def test_copies_of_every_kind_of_number(layout: str, dtype: str, backend: str) -> None:
    """A copy is used where it rounds to the weight, ties and overflow included. Else the weight is used."""
    values = torch.tensor(kinds_of_numbers(DTYPES[dtype]), dtype=torch.float64)
    units = [0.0, 0.25, 0.49999, 0.5, 0.50001, 0.75, 1.0, -0.25, -0.5, -0.50001, -1.0]
    eps = torch.finfo(DTYPES[dtype]).eps
    copies = torch.cat([values * (1 + u * eps) for u in units] + [values.new_tensor([65519.0, 65520.0, 3.4e38])])
    weights, kept = torch.cartesian_prod(values, copies.float().double()).unbind(1)
    weights, kept = weights.to(DTYPES[dtype]), kept.float()
    if layout == "odd":
        weights, kept = weights[1:], kept[1:]
    expected = torch.where(kept.to(weights.dtype) == weights, kept, weights.float())
    new, copy_after = believed("master", weights, kept, backend)
    torch.testing.assert_close(copy_after, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(new, weights, rtol=0, atol=0, equal_nan=True)


@short
@pytest.mark.parametrize("layout", ["packed", "odd"])
@backends_and_triton
def test_remainders_of_every_kind_of_number(layout: str, dtype: str, backend: str) -> None:
    """Remainders are used up to half a unit in the last place of the weight.

    Larger ones and those that are not finite count as 0.
    """
    values = torch.tensor(kinds_of_numbers(DTYPES[dtype]), dtype=DTYPES[dtype])
    sizes = torch.tensor([0.0, *(2.0**k for k in range(-140, 20, 3)), math.inf, math.nan])
    rests = torch.cat([sizes, -sizes, values.float() * (torch.finfo(DTYPES[dtype]).eps / 2), values.float()])
    weights, kept = torch.cartesian_prod(values.double(), rests.double()).unbind(1)
    weights, kept = weights.to(DTYPES[dtype]), kept.to(DTYPES[dtype])
    if layout == "odd":
        weights, kept = weights[1:], kept[1:]
    oracle = Oracle(weights, "kahan")
    oracle.kept = {"kahan_comp": kept}
    oracle.step(torch.zeros_like(weights), 0.0)
    new, rest = believed("kahan_comp", weights, kept, backend)
    torch.testing.assert_close(new, oracle.param, rtol=0, atol=0, equal_nan=True)
    finite = oracle.param.isfinite()
    torch.testing.assert_close(rest[finite], oracle.kept["kahan_comp"][finite], rtol=0, atol=0)


@backends_and_triton
def test_a_sum_that_overflowed_stays_infinite(backend: str) -> None:
    """The remainder of an infinity is infinite too. Adding it would give nan."""
    p = nn.Parameter(torch.full((9,), 65504.0, dtype=torch.float16))
    optimizer = gradfused.SGD([p], lr=1.0, precision="kahan", backend=backend)
    for _ in range(3):
        p.grad = torch.full_like(p, -100.0)
        optimizer.step()
    assert p.tolist() == [math.inf] * 9
