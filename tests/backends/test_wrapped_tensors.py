"""Tensors without memory: the reference backend works on them, and the others refuse them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from wrapped_tensor import Wrapper

import gradfused
from gradfused.backends import choose, cpu


class TraceableWrapper(Wrapper):
    """A Wrapper that torch.compile can trace."""

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return TraceableWrapper(inner["inner"])


@pytest.mark.parametrize("cls", [Wrapper, TraceableWrapper])
@pytest.mark.parametrize("which", ["param", "grad"])
def test_explicit_cpu_on_a_tensor_without_memory(cls, which):
    assert f"got a {cls.__name__}" in cpu.refusal(cls(torch.ones(2)))
    if which == "param":
        with pytest.raises(RuntimeError, match=f"backend='cpu' cannot run: .*got a {cls.__name__}"):
            choose("cpu", [cls(torch.ones(2))])
        return
    p = nn.Parameter(torch.zeros(2))
    opt = gradfused.SGD([p], lr=1.0, backend="cpu")
    p.grad = cls(torch.ones(2))
    with pytest.raises(RuntimeError, match=f"backend='cpu' cannot run: .*got a {cls.__name__}"):
        opt.step()
    assert torch.equal(p.detach(), torch.zeros(2))


@pytest.mark.usefixtures("_fresh_log")
def test_auto_runs_gradients_without_memory_on_the_reference():
    p = nn.Parameter(torch.zeros(2))
    opt = gradfused.SGD([p], lr=1.0)
    p.grad = Wrapper(torch.ones(2))
    opt.step()
    assert torch.equal(p.detach(), torch.full((2,), -1.0))


@pytest.mark.usefixtures("_fresh_log")
def test_auto_runs_parameters_without_memory_on_the_reference():
    """All of them have address 0, which does not count as an overlap."""
    inner = [torch.zeros(3), torch.zeros(3)]
    wrappers = [Wrapper(t) for t in inner]
    opt = gradfused.SGD(wrappers, lr=1.0, momentum=0.5)
    for scale in (1.0, 2.0):
        for w in wrappers:
            w.grad = torch.full((3,), scale)
        opt.step()
    for t in inner:
        assert torch.equal(t, torch.full((3,), -3.5))


def test_plain_subclasses_have_memory():
    class Mine(torch.Tensor):
        pass

    p = nn.Parameter(torch.zeros(2))
    opt = gradfused.SGD([p], lr=1.0, backend="cpu")
    p.grad = torch.ones(2).as_subclass(Mine)
    opt.step()
    opt.step()
    assert torch.equal(p.detach(), torch.full((2,), -2.0))


def test_a_gradient_without_memory_is_noticed_between_steps():
    p = torch.nn.Parameter(torch.zeros(4))
    opt = gradfused.SGD([p], lr=1.0)
    p.grad = torch.ones(4)
    opt.step()
    p.grad = Wrapper(torch.ones(4))
    opt.step()
    assert torch.equal(p.detach(), torch.full((4,), -2.0))
