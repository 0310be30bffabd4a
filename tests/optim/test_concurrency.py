"""Other threads during a step: nothing is used after it was freed, and steps, loads and swaps wait for each other."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import device_of
from torch import Tensor
from torch.nn import Parameter

import gradfused
from gradfused import backends

pytestmark = pytest.mark.kernels

SANITIZED = bool(os.environ.get("GRADFUSED_SANITIZE_INSIDE"))
SECONDS = 1.6 if SANITIZED else 0.12  # how many disturbed steps each optimizer takes
NAMES = gradfused.optim.__all__
CLIP = {"perturb": "clip", "radius": 0.5, "norm_scope": "global"}
BACKENDS = ["cpu", "cuda", "reference", "triton"]


def parameters(count: int, numel: int, backend: str = "cpu") -> list[Parameter]:
    """Parameters with gradients, the same in every call."""
    draw = torch.Generator().manual_seed(5)
    params = [Parameter(torch.randn(numel, generator=draw).to(device_of(backend))) for _ in range(count)]
    for p in params:
        p.grad = torch.randn(numel, generator=draw).to(p.device)
    return params


def make(name: str, params: list[Parameter], **options: Any) -> Any:
    """An optimizer by its name; "SAM" is SAM around AdamW."""
    if name == "SAM":
        return gradfused.SAM(gradfused.AdamW(params, lr=1e-3, **options), rho=0.01)
    return getattr(gradfused, name)(params, lr=1e-3, **options)


def together(*works: Callable[[], None]) -> None:
    """Run each function in a thread of its own, and raise what one of them raises."""
    raised: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


# ---- anything may happen, at any time


class Disturber:
    """Removes and replaces, at random, what an optimizer's steps work on."""

    def __init__(self, optimizer: Any, seed: int) -> None:
        self.optimizer = optimizer
        self.params = optimizer.param_groups[0]["params"]
        self.original = list(self.params)
        self.random = random.Random(seed)

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.replace_gradients()

    def replace_gradients(self) -> None:
        for p in list(self.params):
            p.grad = torch.full_like(p, self.random.uniform(-1, 1))

    def clear_some_gradients(self) -> None:
        for p in self.random.sample(self.params, 3):
            p.grad = None

    def replace_state(self) -> None:
        for p in list(self.params):
            state = self.optimizer.state.get(p, {})
            for key, value in list(state.items()):
                state[key] = value.clone()

    def replace_parameters(self) -> None:
        for i in self.random.sample(range(len(self.params)), 2):
            new = Parameter(self.original[i].detach().clone())
            new.grad = torch.ones_like(new)
            old, self.params[i] = self.params[i], new
            if old is not self.original[i]:
                self.optimizer.state.pop(old, None)

    def put_parameters_back(self) -> None:
        for i, p in enumerate(self.original):
            old, self.params[i] = self.params[i], p
            if old is not p:
                self.optimizer.state.pop(old, None)

    def disturb(self) -> None:
        actions = [
            self.clear_gradients,
            self.replace_gradients,
            self.clear_some_gradients,
            self.replace_state,
            self.replace_parameters,
            self.put_parameters_back,
        ]
        self.random.choice(actions)()
        if self.random.random() < 0.05:
            gc.collect()


class Stepper:
    """Takes steps, and counts those that were taken and those that were refused as documented."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.taken = self.refused = 0

    def step(self) -> None:
        try:
            if isinstance(self.optimizer, gradfused.SAM):
                self.optimizer.step(half="second" if self.optimizer.ascended else "first")
            else:
                self.optimizer.step()
            self.taken += 1
        except (ValueError, TypeError, RuntimeError):
            self.refused += 1
            if isinstance(self.optimizer, gradfused.SAM):
                self.optimizer._halves.begin()


@pytest.fixture
def at_work(monkeypatch: pytest.MonkeyPatch) -> threading.Lock:
    """A lock that others can take only while the CPU's kernels are at work, to disturb them.

    torch itself crashes where one thread reads ``p.grad`` while another one clears it, so no disturbed step may be reading.
    """
    lock = threading.Lock()

    def meanwhile_free(method: Callable[..., Any]) -> Callable[..., Any]:
        def free(self: Any, *args: Any) -> Any:
            lock.release()
            try:
                return method(self, *args)
            finally:
                lock.acquire()

        return free

    for name in ("stats", "apply"):
        monkeypatch.setattr(backends.cpu.CpuBackend, name, meanwhile_free(getattr(backends.cpu.CpuBackend, name)))
    return lock


@pytest.mark.parametrize("name", [*NAMES, "SAM"])
def test_steps_while_other_threads_replace_what_they_work_on(name: str, at_work: threading.Lock) -> None:
    """Tensors are large enough that others act during the kernels, which run without the interpreter's lock."""
    optimizer = make(name, parameters(8, 65_536), **CLIP)
    stepper, disturbers = Stepper(optimizer), [Disturber(optimizer, seed) for seed in range(2)]
    disturbers[1].replace_parameters = disturbers[1].replace_gradients  # type: ignore[method-assign]
    disturbers[1].put_parameters_back = disturbers[1].replace_gradients  # type: ignore[method-assign]
    end, counts = time.monotonic() + SECONDS, [0, 0]

    def going() -> bool:
        enough = stepper.taken >= 5 and min(counts) >= 5
        return time.monotonic() < end or (not enough and time.monotonic() < end + 60)

    def step() -> None:
        with at_work:
            while going():
                stepper.step()

    def disturb(which: int) -> None:
        while going():
            with at_work:
                disturbers[which].disturb()
            counts[which] += 1
            time.sleep(5e-4)  # otherwise these two threads would keep the interpreter's lock from the steps

    together(step, lambda: disturb(0), lambda: disturb(1))
    assert stepper.taken >= 5
    assert min(counts) >= 5
    for p in [*optimizer.param_groups[0]["params"], *disturbers[0].original]:
        assert bool(torch.isfinite(p).all())


# ---- the worst events, at the worst time


def take_away(optimizer: Any) -> list[Tensor]:
    """Drop every reference to gradients and state that a user can reach, and write NaN to the freed memory."""
    shapes = [p.shape for p in optimizer.param_groups[0]["params"]]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = None
    optimizer.state.clear()
    gc.collect()
    return [torch.full(shape, float("nan")) for shape in [*shapes, torch.Size()] for _ in range(50)]


def stepped(name: str, backend: str, before: int, at: str, disturb: Callable[[Any], Any] | None) -> list[Tensor]:
    """The weights, and all else that is written, after a step or a half of SAM's that is disturbed before the backend
    does ``at``.
    """
    if name.startswith("SAM"):
        optimizer = make("SAM", parameters(3, 300, backend), backend=backend, **CLIP)
        before = 2 * before + (name == "SAM second")
    else:
        optimizer = make(name, parameters(3, 300, backend), backend=backend, **CLIP)
    stepper = Stepper(optimizer)
    for _ in range(before):
        stepper.step()
    params = list(optimizer.param_groups[0]["params"])
    base = getattr(optimizer, "base_optimizer", optimizer)
    kind = backends.choose(backend, params)
    original, seen, kept = getattr(kind, at), [], []

    def disturbed(table: Any, scaling: Any) -> Any:
        if disturb is not None:
            kept.extend(disturb(optimizer))
        result = original(table, scaling)
        tables = [optimizer._halves._table] if name == "SAM first" else base._tables
        seen.extend(t.clone() for t in tables[0].held.written)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, at, disturbed)
        stepper.step()
    assert stepper.refused == 0
    assert seen
    return [*(p.detach().clone() for p in params), *seen]


def cases() -> list[Any]:
    """(optimizer, backend, steps before, what is disturbed). There are few for Triton, whose interpreter is slow."""
    found = [
        (name, backend, before, at)
        for backend in ("cpu", "cuda", "reference")
        for name in ("AdamW", "NAdam", "SGD", "SAM first", "SAM second")
        for before in (0, 2)
        for at in ("stats", "apply")
    ]
    needs_triton = pytest.mark.skipif(not triton_interpreter.RUNS, reason=triton_interpreter.REASON)
    return [*found, pytest.param("AdamW", "triton", 2, "apply", marks=needs_triton)]


@pytest.mark.parametrize(("name", "backend", "before", "at"), cases())
def test_what_is_taken_away_during_a_step_serves_it_to_its_end(name: str, backend: str, before: int, at: str) -> None:
    """The same thread disturbs the step at a fixed time: after the table was compared with the optimizer, or after the
    norms.
    """
    expected = stepped(name, backend, before, at, None)
    got = stepped(name, backend, before, at, take_away)
    assert len(got) == len(expected)
    for left, right in zip(got, expected, strict=True):
        assert bool(torch.isfinite(left).all())
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_garbage_collection_while_the_table_is_compared(backend: str) -> None:
    """Before Python 3.12 any new container may start a collection, whose callbacks may replace what is being compared."""
    optimizer = make("AdamW", parameters(3, 300, backend), backend=backend)
    optimizer.step()
    group, table = optimizer.param_groups[0], optimizer._tables[0].backend

    def replace(phase: str, info: dict[str, int]) -> None:
        for i, p in enumerate(group["params"]):
            group["params"][i] = None
            optimizer.state.pop(p, None)

    threshold = gc.get_threshold()
    gc.callbacks.append(replace)
    try:
        gc.set_threshold(1)
        held = table.refresh(optimizer.param_groups, optimizer.state, {})
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(replace)
    if held is not None:
        assert all(bool(torch.isfinite(t).all()) for t in [*held.written, *held.read])


# ---- one at a time


def outcome(optimizer: Any) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    return [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]


@pytest.mark.parametrize("backend", ["cpu", "cuda", "reference"])
def test_steps_of_four_threads_come_one_after_another(backend: str) -> None:
    """The result is that of as many steps in one thread, to the bit, though another thread looks at the state
    meanwhile.
    """
    each = 50 if backend == "cpu" else 10
    alone, shared = (make("AdamW", parameters(4, 300, backend), backend=backend, **CLIP) for _ in range(2))
    for _ in range(4 * each):
        alone.step()

    def step() -> None:
        for _ in range(each):
            shared.step()

    def look() -> None:
        for _ in range(each):
            state = shared.state_dict()["state"]
            assert len(state) in (0, 4)
            assert all(set(mine) == {"step", "exp_avg", "exp_avg_sq"} for mine in state.values())

    together(*[step] * 4, look)
    for left, right in zip(outcome(shared), outcome(alone), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_whole_steps_of_sam_come_one_after_another(backend: str) -> None:
    """If the halves of two threads were mixed, gradients would belong to other weights, or a half would be refused."""

    def make_step() -> tuple[Any, Callable[[], float]]:
        params = parameters(2, 300, backend)
        sam = make("SAM", params, backend=backend)

        def closure() -> float:
            for p in params:
                p.grad = p.detach() * 0.1
            time.sleep(1e-4)  # lets the other thread go on if it can
            return 0.0

        return sam, closure

    (alone, one), (shared, other) = make_step(), make_step()
    for _ in range(40):
        alone.step(one)

    def step() -> None:
        for _ in range(20):
            shared.step(other)

    together(step, step)
    for left, right in zip(outcome(shared), outcome(alone), strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)


def swap(optimizer: Any) -> None:
    with optimizer.swap_ema():
        pass


WAITING: dict[str, Callable[[Any, Any], Any]] = {
    "step": lambda optimizer, saved: Stepper(optimizer).step(),
    "state_dict": lambda optimizer, saved: optimizer.state_dict(),
    "load_state_dict": lambda optimizer, saved: optimizer.load_state_dict(saved),
    "swap_ema": lambda optimizer, saved: swap(optimizer),
    "add_param_group": lambda optimizer, saved: optimizer.add_param_group({"params": parameters(1, 3)}),
}


@pytest.mark.filterwarnings("ignore:SAM.state_dict")
@pytest.mark.parametrize("name", ["AdamW", "SAM"])
@pytest.mark.parametrize("what", WAITING)
def test_what_another_thread_does_waits_for_the_step(what: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make(name, parameters(2, 30), backend="cpu", ema=0.9)
    for _ in range(2):
        Stepper(optimizer).step()
    saved = copy.deepcopy(optimizer.state_dict())
    done = threading.Event()
    original, threads = backends.cpu.CpuBackend.apply, []

    def work() -> None:
        WAITING[what](optimizer, saved)
        done.set()

    def apply(table: Any, scaling: Any) -> bool:
        if not threads:
            threads.append(threading.Thread(target=work))
            threads[0].start()
            assert not done.wait(0.03)
        return original(table, scaling)

    monkeypatch.setattr(backends.cpu.CpuBackend, "apply", apply)
    Stepper(optimizer).step()
    assert done.wait(30)
    threads[0].join()
    if what == "load_state_dict":
        count = optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]
        assert count == saved["state"][0]["step"]


# ---- copies


@pytest.mark.parametrize("name", ["AdamW", "SAM"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_have_a_lock_of_their_own(name: str, copied: Callable[[Any], Any]) -> None:
    optimizer = make(name, parameters(2, 30))
    other = copied(optimizer)
    base, other_base = (getattr(o, "base_optimizer", o) for o in (optimizer, other))
    assert base._lock is not other_base._lock
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in other.param_groups[0]["params"]]
    with base._lock:  # this thread holds it, and another thread steps the copy without waiting
        together(lambda: Stepper(other).step())
    assert all(not torch.equal(p, old) for p, old in zip(other.param_groups[0]["params"], before, strict=True))


def test_a_wrapper_that_copies_the_attributes_shares_the_lock() -> None:
    optimizer = make("AdamW", parameters(2, 30))
    kind = type("Wrapper", (gradfused.AdamW,), {"__init__": lambda self, inner: self.__dict__.update(inner.__dict__)})
    wrapper = kind(optimizer)
    assert wrapper._lock is optimizer._lock
    wrapper.load_state_dict(optimizer.state_dict())
    assert wrapper._lock is optimizer._lock
