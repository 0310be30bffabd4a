"""All short sequences of what a training loop can do to an optimizer between steps, against the rules written out in
float64.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton_interpreter
from torch import Tensor, nn

import gradfused
from gradfused import gpu
from gradfused.backends import cuda

SIZES = (8, 4, 4)
SHAPES = ((2, 4), (4,), (4, 1))
ENDS = np.cumsum(SIZES)
OF_PARAM = np.repeat(np.arange(len(SIZES)), SIZES)

# The events: a step without gradients, with some or with all; a step that the device or the host finds to be skipped; and
# without a step, a changed option, and a checkpoint from which training goes on.
EVENTS = ("none", "some", "all", "device", "host", "option", "checkpoint")

OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.25, "momentum": 0.5, "dampening": 0.5, "weight_decay": 0.25},
    "Adan": {"lr": 0.25, "betas": (0.75, 0.5, 0.875), "eps": 0.25, "weight_decay": 0.25},
    "AdamW": {"lr": 0.25, "betas": (0.75, 0.5), "eps": 0.25, "weight_decay": 0.25},
}
KEYS = {
    "SGD": ("momentum_buffer",),
    "Adan": ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
}


class Oracle:
    """The three rules in float64, over all parameters as one vector. Each parameter counts the steps that it took."""

    def __init__(self, name: str, weights: np.ndarray) -> None:
        self.name, self.weights = name, weights.astype(np.float64)
        self.counts = np.zeros(len(SIZES), dtype=np.int64)
        self.state = {key: np.zeros(OF_PARAM.size) for key in KEYS[name]}
        self.skipped = 0

    def step(self, g: np.ndarray, active: np.ndarray, lr: float) -> None:
        """Take a step in which the parameters in ``active`` have a gradient."""
        self.counts += active
        stepped = active[OF_PARAM]
        t = np.maximum(self.counts, 1)[OF_PARAM]
        with np.errstate(invalid="ignore"):
            weights, state = getattr(self, "_" + self.name.lower())(g.astype(np.float64), t, lr)
        self.weights = np.where(stepped, weights, self.weights)
        self.state = {key: np.where(stepped, state[key], old) for key, old in self.state.items()}

    def _sgd(self, g: np.ndarray, t: np.ndarray, lr: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        g = g + 0.25 * self.weights
        buffer = np.where(t == 1, g, 0.5 * self.state["momentum_buffer"] + 0.5 * g)
        return self.weights - lr * buffer, {"momentum_buffer": buffer}

    def _adamw(self, g: np.ndarray, t: np.ndarray, lr: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        m = 0.75 * self.state["exp_avg"] + 0.25 * g
        v = 0.5 * self.state["exp_avg_sq"] + 0.5 * g * g
        direction = m / (1 - 0.75**t) / (np.sqrt(v / (1 - 0.5**t)) + 0.25)
        return self.weights * (1 - lr * 0.25) - lr * direction, {"exp_avg": m, "exp_avg_sq": v}

    def _adan(self, g: np.ndarray, t: np.ndarray, lr: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        difference = np.where(t == 1, 0.0, g + self.state["neg_pre_grad"])
        m = 0.75 * self.state["exp_avg"] + 0.25 * g
        d = 0.5 * self.state["exp_avg_diff"] + 0.5 * difference
        v = 0.875 * self.state["exp_avg_sq"] + 0.125 * (g + 0.5 * difference) ** 2
        direction = m / (1 - 0.75**t) + 0.5 * d / (1 - 0.5**t)
        direction = direction / (np.sqrt(v / (1 - 0.875**t)) + 0.25)
        weights = (self.weights - lr * direction) / (1 + lr * 0.25)
        return weights, {"exp_avg": m, "exp_avg_sq": v, "exp_avg_diff": d, "neg_pre_grad": -g}


def gradients(seed: int) -> tuple[np.ndarray, list[Tensor]]:
    """The gradients as one vector and as a tensor for each parameter."""
    vector = torch.randn(OF_PARAM.size, generator=torch.Generator().manual_seed(seed))
    return vector.numpy(), [part.view(shape) for part, shape in zip(vector.split(SIZES), SHAPES, strict=True)]


POOL = [gradients(seed) for seed in range(5)]
ON_DEVICE = {
    flag: torch.tensor(float(flag)) for flag in (0, 1)
}  # what a GradScaler on a GPU leaves, which only the device can read
ON_HOST = {0: [None, 0, 0.0, torch.tensor(0.0), torch.zeros(1)], 1: [1, torch.tensor(1.0), torch.tensor([2.0])]}
ALL, NONE, SOME = np.array([True] * 3), np.array([False] * 3), np.array([False, True, False])


class Walk:
    """An optimizer, together with what it should hold, taken through events."""

    def __init__(self, name: str, backend: str, guard: str) -> None:
        self.name, self.guard, self.happened = name, guard, []
        self.options = OPTIONS[name] | {"backend": backend, "nonfinite": guard}
        self.flat = torch.linspace(-1, 1, OF_PARAM.size)
        parts = self.flat.split(SIZES)
        self.params = [nn.Parameter(part.view(shape)) for part, shape in zip(parts, SHAPES, strict=True)]
        self.optimizer = getattr(gradfused, name)(self.params, **self.options)
        self.oracle = Oracle(name, self.flat.numpy())

    def take(self, event: str, number: int) -> None:
        """Take an event, which varies with its ``number``."""
        self.happened.append(event)
        {"option": self.change_option, "checkpoint": self.checkpoint}.get(event, lambda n: self.step(event, n))(number)
        self.check_weights()

    def step(self, event: str, number: int) -> None:
        vector, tensors = POOL[number % len(POOL)]
        active = {"none": NONE, "some": SOME}.get(event, ALL)
        for p, g, has in zip(self.params, tensors, active.tolist(), strict=True):
            p.grad = g if has else None
        group = self.optimizer.param_groups[0]
        self.optimizer.found_inf = self.found_inf(event, number)
        if event == "device" and self.guard == "skip":
            self.params[number % 3].grad = torch.full_like(self.params[number % 3], math.inf)
            self.oracle.skipped += 1
        self.optimizer.step()
        del self.optimizer.found_inf
        if event not in ("device", "host"):
            self.oracle.step(vector, active, group["lr"])

    def found_inf(self, event: str, number: int) -> Any:
        """What GradScaler sets, in each of the forms that it uses."""
        if event == "device":
            return None if self.guard == "skip" else ON_DEVICE[1]
        forms = ON_HOST[int(event == "host")]
        on_device = event != "host" and self.guard != "skip" and number % 2
        return ON_DEVICE[0] if on_device else forms[number % len(forms)]

    def change_option(self, number: int) -> None:
        """Change a number, or an option for which a new table is needed: a radius that no gradient reaches."""
        group = self.optimizer.param_groups[0]
        if number % 8:
            group["lr"] = 0.375 - group["lr"]
        else:
            group["clip_norm"] = None if group["clip_norm"] else 1e6

    def checkpoint(self, number: int) -> None:
        self.check_state()
        saved = self.optimizer.state_dict()
        if number % 8 == 0:
            saved = through_a_file(saved)
        elif number % 8 == 1:
            self.optimizer = self.deepcopied()
            return
        self.optimizer = getattr(gradfused, self.name)(self.params, **self.options)
        self.optimizer.load_state_dict(saved)
        self.oracle.skipped = 0

    def deepcopied(self) -> torch.optim.Optimizer:
        for p in self.params:
            p.grad = None
        self.params, optimizer = copy.deepcopy((self.params, self.optimizer))
        for p, part in zip(self.params, self.flat.split(SIZES), strict=True):  # so that its copies lie apart
            p.data = part.view(p.shape)
        return optimizer

    def check_weights(self) -> None:
        error = np.abs(self.flat.numpy() - self.oracle.weights).max()
        assert error < 1e-4, f"weights off by {error} after {self.happened}"

    def check_state(self) -> None:
        held = [self.optimizer.state.get(p) or {} for p in self.params]
        assert [bool(state) for state in held] == [count > 0 for count in self.oracle.counts], self.happened
        begin = 0
        for state, end, count in zip(held, ENDS, self.oracle.counts, strict=True):
            if state:
                assert int(state.get("step", count)) == count, self.happened
                for key in KEYS[self.name]:
                    error = np.abs(state[key].numpy().reshape(-1) - self.oracle.state[key][begin:end]).max()
                    assert error < 1e-4, f"{key} off by {error} after {self.happened}"
            begin = end
        assert self.optimizer.skipped_steps == self.oracle.skipped, self.happened


def through_a_file(saved: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def all_windows(length: int) -> list[str]:
    """A sequence that contains every sequence of ``length`` events once: a cycle of de Bruijn, opened, from Lyndon
    words.
    """
    cycle: list[int] = []
    word = [-1]
    while word:
        word[-1] += 1
        if length % len(word) == 0:
            cycle += word
        word = (word * length)[:length]
        while word and word[-1] == len(EVENTS) - 1:
            word.pop()
    return [EVENTS[i] for i in [*cycle, *cycle[: length - 1]]]


def in_pieces(events: list[str], length: int, overlap: int) -> Iterator[list[str]]:
    for begin in range(0, len(events) - overlap, length):
        yield events[begin : begin + length + overlap]


def walk_all(name: str, guard: str, backend: str, sequences: Iterable[Sequence[str]]) -> None:
    number = 0
    for events in sequences:
        walk = Walk(name, backend, guard)
        for event in events:
            walk.take(event, number)
            number += 1
        walk.check_state()


@pytest.fixture(autouse=True)
def _read_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat ON_DEVICE as if it were on a GPU, so that the host does not read it."""
    monkeypatch.setattr(gpu, "holds", lambda t: t.device.type in gpu.TYPES or any(t is x for x in ON_DEVICE.values()))


WALKS = list(itertools.product(OPTIONS, ("skip", "propagate")))
every_walk = pytest.mark.parametrize("walk", range(len(WALKS)), ids=["-".join(walk) for walk in WALKS])


def share_of(walk: int, sequences: Sequence[Any], config: pytest.Config) -> Sequence[Any]:
    """The share of the sequences that one of the walks takes: all together take all; with --interpret-all each takes
    all.
    """
    return sequences if config.getoption("--interpret-all") else sequences[walk :: len(WALKS)]


@every_walk
@pytest.mark.parametrize("backend", ["cpu", "reference", "cuda"])
def test_every_beginning(walk: int, backend: str) -> None:
    """All sequences of three events, each with new parameters: the first step may be skipped, or come late for some of
    them.
    """
    walk_all(*WALKS[walk], backend, itertools.product(EVENTS, repeat=3))


@every_walk
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_every_sequence(walk: int, backend: str, request: pytest.FixtureRequest) -> None:
    """All sequences of five events. Each optimizer takes 40 of them before a new one is made."""
    pieces = list(in_pieces(all_windows(5), 40, 4))
    walk_all(*WALKS[walk], backend, share_of(walk, pieces, request.config))


@every_walk
@pytest.mark.parametrize("backend", ["reference"])
def test_every_sequence_of_the_oracle(walk: int, backend: str, request: pytest.FixtureRequest) -> None:
    """The reference makes a table for every step, so that only the state lasts from step to step."""
    pieces = list(in_pieces(all_windows(4), 40, 3))
    walk_all(*WALKS[walk], backend, share_of(walk, pieces, request.config))


@every_walk
@pytest.mark.parametrize("backend", ["cuda"])
def test_every_sequence_on_two_devices(
    walk: int, backend: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The table believes that rows lie on two devices, and gradients move in both parts."""
    monkeypatch.setattr(cuda.CudaBackend, "_owners", staticmethod(lambda rows: [row.param_number % 2 for row in rows]))
    pieces = list(in_pieces(all_windows(3), 20, 2))
    walk_all(*WALKS[walk], backend, share_of(walk, pieces, request.config))


@pytest.mark.skipif(not triton_interpreter.RUNS, reason=triton_interpreter.REASON)
@every_walk
@pytest.mark.parametrize("backend", ["triton"])
def test_every_sequence_in_triton(walk: int, backend: str, request: pytest.FixtureRequest) -> None:
    """All sequences of two events, or of three with --interpret-all."""
    length = 3 if request.config.getoption("--interpret-all") else 2
    walk_all(*WALKS[walk], backend, in_pieces(all_windows(length), 20, length - 1))


def test_the_sequences_are_all_there() -> None:
    found = {
        events[i : i + 5] for events in map(tuple, in_pieces(all_windows(5), 40, 4)) for i in range(len(events) - 4)
    }
    assert found == set(itertools.product(EVENTS, repeat=5))
