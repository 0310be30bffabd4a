"""LPG when its inputs change between forward and backward.

A change that autograd sees is an error, as in F.cross_entropy. One that it cannot see changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lpg_cases import backends, batch, device_of
from torch import Tensor

from gradfused.nn import LPGCrossEntropyLoss, lpg_cross_entropy

INT64 = torch.iinfo(torch.int64)
# (rows, classes): for the CPU's kernels by column and by row, and a class large enough to be cut into pieces.
SIZES = [(9, 5), (40, 100), (700, 200)]
VALUES = [10**9, INT64.min, -(10**9), -1, -100, 3, INT64.max]


class Call:
    """A loss of fresh tensors, and what became of the call."""

    def __init__(self, backend: str, size: tuple[int, int], scope: str = "class", **options: Any) -> None:
        device, classes = device_of(backend), size[1]
        logits, target = batch(*size, ignored=2)
        self.leaf = logits.to(device).requires_grad_()
        self.logits = self.leaf * 1
        self.target = target.to(device)
        self.weight = torch.linspace(0.5, 2, classes, device=device)
        self.sign = (torch.arange(classes, device=device) % 3 - 1).float()
        self.radius = torch.linspace(0.1, 0.3, classes, device=device)
        self.loss = lpg_cross_entropy(
            self.logits,
            self.target,
            self.sign,
            self.radius,
            weight=self.weight,
            scope=scope,
            backend=backend,
            **options,
        )

    def gradient(self) -> Tensor:
        return torch.autograd.grad(self.loss.sum(), self.leaf, retain_graph=True)[0]


SEEN: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda t: t.add_(1),
    "zero_": lambda t: t.zero_(),
    "copy_": lambda t: t.copy_(t.clone()),
    "an element": lambda t: t[0].fill_(1),
    "a view": lambda t: t.view(-1)[1:].mul_(2),
    "detached": lambda t: t.detach().fill_(0),
}


@backends
@pytest.mark.parametrize("change", SEEN)
@pytest.mark.parametrize("name", ["target", "weight"])
def test_what_autograd_sees_is_an_error_as_in_torch(name: str, change: str, backend: str) -> None:
    call = Call(backend, (9, 5))
    theirs = F.cross_entropy(call.logits, call.target, weight=call.weight)
    SEEN[change](getattr(call, name))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        theirs.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        call.gradient()


@backends
@pytest.mark.parametrize("change", [c for c in SEEN if c != "detached"])
def test_logits_too_since_they_are_not_copied(change: str, backend: str) -> None:
    """F.cross_entropy keeps log-probabilities of its own instead."""
    call = Call(backend, (9, 5))
    SEEN[change](call.logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        call.gradient()


@backends
@pytest.mark.parametrize("name", ["target", "weight"])
def test_the_module_s_inputs_alike(name: str, backend: str) -> None:
    logits, target = batch(9, 5)
    given = {"target": target.to(device_of(backend)), "weight": torch.ones(5, device=device_of(backend))}
    module = LPGCrossEntropyLoss(5, weight=given["weight"], backend=backend).to(device_of(backend))
    loss = module(logits.to(device_of(backend)).requires_grad_(), given["target"])
    given[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@backends
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("scope", ["class", "sample"])
def test_targets_that_change_unseen_are_as_they_were(scope: str, size: tuple[int, int], backend: str) -> None:
    """Backward uses the targets of forward, whatever the buffer holds by then: a data loader may have filled it again."""
    if backend == "triton" and size != SIZES[0]:
        pytest.skip("slow to interpret")
    call = Call(backend, size, scope)
    wanted = call.gradient()
    for value in VALUES[:2] if backend == "triton" else VALUES:
        call.target.data.fill_(value)
        assert torch.equal(call.gradient(), wanted), value


@backends
@pytest.mark.parametrize("name", ["weight", "sign", "radius"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_a_class_is_given_may_change_unseen(reduction: str, name: str, backend: str) -> None:
    wanted = Call(backend, (9, 5), reduction=reduction).gradient()
    call = Call(backend, (9, 5), reduction=reduction)
    getattr(call, name).data.fill_(torch.nan)
    assert torch.equal(call.gradient(), wanted)


@backends
def test_a_numpy_buffer_may_be_filled_again(backend: str) -> None:
    if device_of(backend) != "cpu":
        pytest.skip("NumPy's arrays are in the CPU's memory")
    logits, target = batch(9, 5)
    buffer = target.numpy().copy()
    u = logits.requires_grad_()
    module = LPGCrossEntropyLoss(5, momentum=0.5, backend=backend)
    wanted = torch.autograd.grad(LPGCrossEntropyLoss(5, momentum=0.5, backend=backend)(u, target), u)[0]
    loss = module(u, torch.from_numpy(buffer))
    buffer[:] = 2**40
    assert torch.equal(torch.autograd.grad(loss, u)[0], wanted)


@backends
@pytest.mark.parametrize("classes", [5, 600])
def test_dense_targets_may_change_unseen(classes: int, backend: str) -> None:
    def run(change: bool) -> Tensor:
        u = torch.linspace(-3, 3, 2 * classes * 6, device=device_of(backend)).view(2, classes, 2, 3).requires_grad_()
        target = (torch.arange(12, device=device_of(backend)) % 4).view(2, 2, 3)
        loss = lpg_cross_entropy(u, target, torch.ones(classes), 0.1, backend=backend)
        if change:
            target.data.fill_(-(10**9))
        return torch.autograd.grad(loss, u)[0]

    assert torch.equal(run(change=True), run(change=False))


@backends
@pytest.mark.parametrize("shape", [(1, 5), (4000, 5), (9, 4), (9, 7000)], ids=str)
def test_logits_of_another_shape_are_refused(shape: tuple[int, int], backend: str) -> None:
    leaf = batch(9, 5)[0].to(device_of(backend)).requires_grad_()
    target = batch(9, 5)[1].to(device_of(backend))
    loss = lpg_cross_entropy(leaf, target, torch.ones(5), 0.1, backend=backend)
    leaf.data = torch.zeros(shape, device=leaf.device)
    with pytest.raises(RuntimeError, match=r"backward expected a tensor that forward saved, .* of shape \(9, 5\)"):
        loss.backward()


@backends
def test_a_storage_that_shrank_is_refused(backend: str) -> None:
    if backend == "reference":
        pytest.skip("reads through torch alone")
    for size in (0, 16):
        call = Call(backend, (9, 5))
        call.logits.untyped_storage().resize_(size)
        with pytest.raises(RuntimeError, match="logits: expected a storage of 180 bytes or more"):
            call.gradient()


@backends
@pytest.mark.parametrize("made", [torch.Tensor.bfloat16, lambda t: t[:1], lambda t: t[..., None]])
def test_hooks_that_give_back_something_else_are_refused(made: Any, backend: str) -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, made):
        call = Call(backend, (9, 5))
    with pytest.raises(RuntimeError, match="backward expected a tensor that forward saved"):
        call.gradient()


@backends
def test_hooks_that_keep_tensors_elsewhere_are_fine(backend: str) -> None:
    wanted = Call(backend, (9, 5)).gradient()
    with torch.autograd.graph.save_on_cpu():
        call = Call(backend, (9, 5))
    assert torch.equal(call.gradient(), wanted)
