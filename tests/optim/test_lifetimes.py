"""What was replaced is freed: an optimizer keeps only what its groups and its state hold."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton_interpreter
from cases import EMULATED_CUDA
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

import gradfused

TRITON = pytest.param("triton", marks=pytest.mark.skipif(not triton_interpreter.RUNS, reason=triton_interpreter.REASON))
BACKENDS = ("cpu", "reference", EMULATED_CUDA, TRITON)
every_backend = pytest.mark.parametrize("backend", BACKENDS)

KINDS: dict[str, tuple[type, torch.dtype, dict[str, Any]]] = {
    "adamw": (gradfused.AdamW, torch.float32, {"clip_norm": 1.0}),
    "sgd": (gradfused.SGD, torch.float32, {"momentum": 0.9}),
    "nadam": (gradfused.NAdam, torch.float32, {}),
    "master": (gradfused.AdamW, torch.bfloat16, {"precision": "master", "ema": 0.9}),
    "kahan": (gradfused.AdamW, torch.bfloat16, {"precision": "kahan", "zero_grad_in_step": True}),
}
FEW = ("adamw",)


class Training:
    """An optimizer over three parameters, with or without SAM around it."""

    def __init__(self, kind: str, backend: str, sam: bool = False) -> None:
        cls, self.dtype, options = KINDS[kind]
        self.base = cls([self.parameter() for _ in range(3)], lr=0.1, backend=backend, **options)
        self.sam = gradfused.SAM(self.base, rho=0.05) if sam else None

    def parameter(self, size: int = 6) -> nn.Parameter:
        return nn.Parameter(torch.ones(size, 4, dtype=self.dtype))

    @property
    def params(self) -> list[Tensor]:
        return self.base.param_groups[0]["params"]

    def step(self, but: int | None = None) -> None:
        """Take a step on new gradients. The parameter number ``but`` gets none."""
        for half in ("first_step", "second_step") if self.sam else ("step",):
            for i, p in enumerate(self.params):
                p.grad = None if i == but else torch.full_like(p, 0.5)
            getattr(self.sam or self.base, half)()

    def refs(self, i: int) -> list[Callable[[], Any]]:
        """Weak references to a parameter, its gradient and its state."""
        p = self.params[i]
        tensors = [p, p.grad, *(v for v in self.base.state[p].values() if isinstance(v, Tensor))]
        return [TensorWeakRef(t) for t in tensors if t is not None]


def replaced(training: Training) -> None:
    training.base.state.pop(training.params[1], None)
    training.params[1] = training.parameter()


def pruned(training: Training) -> None:
    """Shorten a parameter and its state, as in Gaussian splatting."""
    old = training.params[1]
    state = training.base.state.pop(old)
    new = nn.Parameter(old.detach()[:3].clone())
    training.base.state[new] = {k: v[:3].clone() if v.dim() else v.clone() for k, v in state.items()}
    training.params[1] = new


def removed(training: Training) -> None:
    training.base.state.pop(training.params[1], None)
    del training.params[1]


def swapped_group(training: Training) -> None:
    group = dict(training.base.param_groups[0])
    training.base.state.pop(training.params[1], None)
    training.base.param_groups[0] = group | {"params": [p for i, p in enumerate(training.params) if i != 1]}


def alive(refs: list[Callable[[], Any]]) -> int:
    return sum(ref() is not None for ref in refs)


@every_backend
@pytest.mark.parametrize("sam", [False, True])
@pytest.mark.parametrize("change", [replaced, pruned, removed, swapped_group])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_replaced_is_free_after_the_next_step(kind, change, sam, backend):
    if backend == "triton" and (kind not in FEW or sam):
        pytest.skip("interpreted: one kind stands for all")
    training = Training(kind, backend, sam)
    gc.disable()  # the optimizer has to be freed without the garbage collector
    try:
        for but in (None, 0, None, 2, 0):  # so that there are several tables
            training.step(but)
        refs = training.refs(1)
        change(training)
        training.step()
        assert alive(refs) == 0
        training.step()
    finally:
        gc.enable()


@every_backend
@pytest.mark.parametrize("kind", KINDS)
def test_without_sam_it_is_free_at_once(kind, backend):
    if backend == "triton" and kind not in FEW:
        pytest.skip("interpreted: one kind stands for all")
    training = Training(kind, backend)
    training.step()
    refs = training.refs(1)
    replaced(training)
    assert alive(refs) == 0


@every_backend
def test_gradients_are_free_when_they_are_cleared(backend):
    training = Training("adamw", backend)
    training.step()
    refs = [TensorWeakRef(p.grad) for p in training.params if p.grad is not None]
    training.base.zero_grad(set_to_none=True)
    assert len(refs) == 3
    assert alive(refs) == 0


@every_backend
@pytest.mark.parametrize("sam", [False, True])
def test_an_optimizer_that_is_deleted_frees_everything(sam, backend):
    training = Training("adamw", backend, sam)
    training.step()
    training.step(0)
    refs = [ref for i in range(3) for ref in training.refs(i)]
    refs.append(weakref.ref(training.base))
    del training
    gc.collect()  # torch's own hooks make an optimizer part of a cycle
    assert alive(refs) == 0


@every_backend
def test_a_step_that_is_refused_keeps_nothing(backend):
    training = Training("adamw", backend)
    training.step()
    training.params[0].grad = torch.ones(6, 4).to_sparse()
    refs = training.refs(1)
    with pytest.raises(TypeError, match="sparse"):
        training.base.step()
    replaced(training)
    assert alive(refs) == 0


def tensors_alive() -> Iterator[Tensor]:
    gc.collect()
    return (o for o in gc.get_objects() if isinstance(o, Tensor))


@pytest.mark.parametrize("sam", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_replacing_parameters_again_and_again_takes_no_memory(kind, sam):
    training = Training(kind, "cpu", sam)
    change = (replaced, pruned)
    counts = []
    for i in range(60):
        training.step(but=(None, 0, 2)[i % 3])
        change[i % 2](training)
        if i in (11, 35, 59):
            counts.append(sum(1 for _ in tensors_alive()))
    assert counts[0] == counts[1] == counts[2]


@every_backend
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("when", ["apply", "stats"])
def test_a_step_that_fails_holds_no_gradient(when, error, backend, monkeypatch):
    """The table that norms are asked of does not keep them either."""
    training = Training("adamw", backend)
    training.step()

    def fail(self: Any, scaling: Any) -> bool:
        raise error("made up")

    with monkeypatch.context() as patch:
        patch.setattr(type(training.base._seen.backend), when, fail)
        with pytest.raises(error):
            training.step()
    grads = [TensorWeakRef(p.grad) for p in training.params]
    training.base.zero_grad()
    gc.collect()
    assert all(ref() is None for ref in grads)
    assert training.base.grad_norm is not None
    training.step()
