"""What lpg_cross_entropy and LPGCrossEntropyLoss refuse, and how they work with autograd, autocast and compilation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lpg_cases import batch, expected

from gradfused.backends import availability
from gradfused.nn import PGD, LPGCrossEntropyLoss, lpg_cross_entropy

SIGN = torch.ones(4)
LOGITS, TARGET = torch.zeros(3, 4), torch.tensor([0, 1, 2])
_cpu = availability()["cpu"]
needs_cpu = pytest.mark.skipif(not _cpu.usable, reason=str(_cpu.reason))
both = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpu)])


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"logits": LOGITS.long()}, TypeError, "logits: expected a tensor of float32.*got torch.int64"),
        ({"logits": [1.0]}, TypeError, "logits: .* got list"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits: expected shape .* got a 0-dim tensor"),
        ({"target": LOGITS}, TypeError, "target: .* got torch.float32: .* cannot be probabilities"),
        ({"target": TARGET.int()}, TypeError, "target: expected class indices of dtype int64, got torch.int32"),
        ({"target": TARGET[:2]}, ValueError, r"target: expected shape \(3,\) for logits of shape \(3, 4\), got \(2,\)"),
        (
            {"target": torch.tensor([0, 4, 1])},
            IndexError,
            "target: expected classes from 0 to 3 .* got 4 at position 1 of 3",
        ),
        ({"target": torch.tensor([0, 1, -1])}, IndexError, "got -1 at position 2"),
        ({"sign": torch.ones(5)}, ValueError, r"sign: expected shape \(4,\), one value a class, got \(5,\)"),
        (
            {"sign": torch.tensor([1, 0, 0.5, 0])},
            ValueError,
            "sign: expected -1, 0 or 1 for each class, got 0.5 for class 2",
        ),
        ({"sign": torch.tensor([1, 0, torch.nan, 0])}, ValueError, "sign: .* got nan for class 2"),
        ({"radius": -0.1}, ValueError, "radius: expected 0 or more and finite, got -0.1"),
        ({"radius": torch.inf}, ValueError, "radius"),
        ({"radius": "wide"}, TypeError, "radius: expected a number, got 'wide'"),
        ({"radius": torch.ones(3)}, ValueError, r"radius: expected shape \(4,\)"),
        ({"radius": torch.tensor([1.0, 2, -3, 4])}, ValueError, "radius: .* got -3.0 for class 2"),
        ({"scope": "batch"}, ValueError, "scope: expected one of 'class', 'sample', got 'batch'"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
        ({"solver": "newton"}, ValueError, "solver: expected 'closed_form', 'pgd' or"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected 0 or more|from 0 and at most 1"),
        ({"weight": torch.ones(3)}, ValueError, r"weight: expected shape \(4,\)"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
        ({"backend": "cuda"}, RuntimeError, "backend='cuda' cannot run: has no kernels for LPG cross-entropy; .*cpu"),
    ],
    ids=str,
)
@both
def test_refusals(changed: dict[str, Any], error: type[Exception], says: str, backend: str) -> None:
    arguments: dict[str, Any] = {"logits": LOGITS, "target": TARGET, "sign": SIGN, "radius": 0.1, "backend": backend}
    with pytest.raises(error, match=says):
        lpg_cross_entropy(**(arguments | changed))


class Index:
    """An object that can be used as an integer."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        return f"Index({self.value})"


WHOLE = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor([3], dtype=torch.int32), Index(3)]
NOT_WHOLE = [1.7, 3.0, True, np.float32(3), np.bool_(True), "3", None, [3], torch.tensor(3.0), np.array([3, 3]), 3j]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_integers_of_every_kind_are_taken(value: Any) -> None:
    assert PGD(value) == PGD(3)
    module = LPGCrossEntropyLoss(value, ignore_index=value)
    assert (module.num_classes, module.options.ignore_index) == (3, 3)
    target = torch.tensor([0, 3, 1])
    loss = lpg_cross_entropy(LOGITS, target, SIGN, 0.1, ignore_index=value, backend="reference")
    assert loss == F.cross_entropy(LOGITS, target, ignore_index=3)


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_integer_is_refused_by_its_type(value: Any) -> None:
    says = f"got .* of type {type(value).__name__}"
    with pytest.raises(TypeError, match=f"PGD steps: expected an int of 1 or more, {says}"):
        PGD(value)
    with pytest.raises(TypeError, match=f"num_classes: expected an int of 2 or more, {says}"):
        LPGCrossEntropyLoss(value)
    with pytest.raises(TypeError, match=f"ignore_index: expected an int, {says}"):
        LPGCrossEntropyLoss(4, ignore_index=value)
    with pytest.raises(TypeError, match=f"ignore_index: expected an int, {says}"):
        lpg_cross_entropy(LOGITS, TARGET, SIGN, 0.1, ignore_index=value)


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_are_1_or_more(steps: int) -> None:
    with pytest.raises(ValueError, match="PGD steps: expected an int of 1 or more"):
        PGD(steps)


def test_a_step_size_is_no_less_than_0() -> None:
    with pytest.raises(ValueError, match="PGD step_size"):
        PGD(3, -1.0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_classes": 1}, "num_classes: expected an int of 2 or more, got 1"),
        ({"num_classes": 4.0}, "num_classes"),
        ({"mode": "odd"}, "mode: expected one of 'balanced', 'longtail', 'noisy', got 'odd'"),
        ({"mode": "longtail"}, "mode='longtail' needs counts"),
        ({"counts": [1, 2, 3, 4]}, "mode='balanced' takes no counts"),
        ({"mode": "longtail", "counts": [1, 2, 3]}, r"counts: expected shape \(4,\)"),
        ({"mode": "longtail", "counts": [1, 2, 3, -4]}, "counts: .* got -4.0 for class 3"),
        ({"sign": [1, 0, 0, 1], "counts": [1, 2, 3, 4], "mode": "longtail"}, "sign and counts: expected one of them"),
        ({"sign": [1, 0, 2, 1]}, "sign: .* got 2.0 for class 2"),
        ({"momentum": 1.0}, "momentum: expected from 0 and below 1"),
        ({"num_classes": 2, "mode": "noisy"}, "mode='noisy' needs 3 classes or more"),
        (
            {"num_classes": 50_000, "momentum": 0.9},
            r"momentum=0.9 keeps .* \(50000, 50000\) float32, 10,000,000,000 bytes, more than 2,147,483,648; use momentum=0",
        ),
        ({"weight": torch.ones(3)}, "weight: expected shape"),
        ({"scope": "all"}, "scope"),
    ],
    ids=str,
)
def test_the_module_refuses(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        LPGCrossEntropyLoss(**({"num_classes": 4} | arguments))


def test_the_module_wants_its_classes() -> None:
    with pytest.raises(ValueError, match=r"expected 4 classes \(num_classes\), got 5 in \(2, 5\)"):
        LPGCrossEntropyLoss(4)(torch.zeros(2, 5), torch.tensor([0, 1]))


@both
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_refused_call_changes_no_statistic(momentum: float, backend: str) -> None:
    loss_of = LPGCrossEntropyLoss(4, momentum=momentum, backend=backend)
    loss_of(LOGITS, TARGET)
    before = {k: v.clone() for k, v in loss_of.state_dict().items()}
    with pytest.raises(IndexError):
        loss_of(LOGITS, torch.tensor([0, 1, 4]))
    for name, value in loss_of.state_dict().items():
        assert torch.equal(value, before[name]), name


@both
def test_it_can_be_differentiated_once(backend: str) -> None:
    u = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(lpg_cross_entropy(u, TARGET, SIGN, 0.1, backend=backend), u, create_graph=True)
    with pytest.raises(RuntimeError, match="expected to be differentiated once"):
        gradient.sum().backward()


@both
def test_logits_changed_in_place_are_noticed(backend: str) -> None:
    u = torch.randn(3, 4, requires_grad=True)
    v = u * 1
    loss = lpg_cross_entropy(v, TARGET, SIGN, 0.1, backend=backend)
    v.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@both
def test_backward_twice_over_a_retained_graph(backend: str) -> None:
    logits, target = batch(9, 4)
    u = logits.requires_grad_()
    loss = lpg_cross_entropy(u, target, SIGN, 0.1, backend=backend)
    once = torch.autograd.grad(loss, u, retain_graph=True)[0]
    assert torch.equal(once, torch.autograd.grad(loss, u)[0])


@both
def test_without_gradients(backend: str) -> None:
    logits, target = batch(9, 4)
    wanted = F.cross_entropy(logits, target)
    torch.testing.assert_close(lpg_cross_entropy(logits, target, SIGN, 0.1, backend=backend), wanted)
    module = LPGCrossEntropyLoss(4, backend=backend)
    with torch.inference_mode():
        torch.testing.assert_close(lpg_cross_entropy(logits, target, SIGN, 0.1, backend=backend), wanted)
        module(logits, target)
    assert (module.seen == 0).all()


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype: torch.dtype, backend: str) -> None:
    """As with torch's cross_entropy, the loss is float32 and the gradient has the dtype of the logits."""
    logits, target = batch(9, 4, dtype)
    u = logits.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = lpg_cross_entropy(u, target, SIGN, 0.1, backend=backend)
        theirs = F.cross_entropy(u, target)
    assert loss.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(loss, theirs)
    loss.backward()
    assert u.grad is not None
    assert u.grad.dtype == dtype


@both
def test_a_network_accumulates_gradients(backend: str) -> None:
    layer = torch.nn.Linear(5, 4, dtype=torch.float64)
    x = torch.randn(8, 5, dtype=torch.float64)
    target = torch.randint(0, 4, (8,))
    wanted = torch.zeros_like(layer.weight)
    for half in (slice(0, 4), slice(4, 8)):
        lpg_cross_entropy(layer(x[half]), target[half], SIGN, 0.1, backend=backend).backward()
        wanted += expected(layer(x[half]), target[half], SIGN, 0.1)[1].t() @ x[half]
    torch.testing.assert_close(layer.weight.grad, wanted)


@needs_cpu
def test_inside_a_compiled_function() -> None:
    module = LPGCrossEntropyLoss(4)
    layer = torch.nn.Linear(5, 4)

    @torch.compile(backend="eager")
    def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return module(layer(x * 2), target) + lpg_cross_entropy(layer(x), target, SIGN, 0.1)

    x, target = torch.randn(8, 5), torch.randint(0, 4, (8,))
    found = step(x, target)
    torch.testing.assert_close(found, F.cross_entropy(layer(x * 2), target) + F.cross_entropy(layer(x), target))
    found.backward()
    assert layer.weight.grad is not None
    assert int(module.seen.sum()) == 8


def test_auto_takes_the_reference_where_nothing_is_built(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    from gradfused import backends

    backends._log_fallback.cache_clear()
    u = LOGITS.clone().requires_grad_()
    with monkeypatch.context() as patch:
        patch.setattr(backends.cpu, "_native", None)
        patch.setattr(backends.cpu, "_error", "is not built")
        lpg_cross_entropy(u, TARGET, SIGN, 0.1).backward()
        with pytest.raises(RuntimeError, match="backend='cpu' cannot run: is not built"):
            lpg_cross_entropy(u, TARGET, SIGN, 0.1, backend="cpu")
    assert "using the slower reference backend: 'cpu' is not built" in caplog.text
