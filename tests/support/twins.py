"""Runs a training scenario with our optimizer and with torch's, its twin, and compares the two."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradfused

# Every rule, with each of its own numbers different from the default.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.05, "weight_decay": 0.01}),
    "sgd_momentum": ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "adam": ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.01}),
    "adam_amsgrad": ("Adam", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "amsgrad": True}),
    "adamw": ("AdamW", {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}),
    "adamw_amsgrad": ("AdamW", {"lr": 0.01, "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True}),
}
every_rule = pytest.mark.parametrize("variant", VARIANTS)
BACKENDS = ("cpu", "reference")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
TOLERANCE = {"rtol": 1.3e-6, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 0}

Make = Callable[..., torch.optim.Optimizer]
Scenario = Callable[[Make], tuple[nn.Module, torch.optim.Optimizer]]


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A convolution and a linear layer with fixed weights. Sets one thread, since waking a second takes longer than a test."""
    torch.set_num_threads(1)  # conftest.py restores it
    torch.manual_seed(0)
    layers = OrderedDict(
        conv=nn.Conv2d(2, 3, 3, padding=1), act=nn.Tanh(), flat=nn.Flatten(), head=nn.Linear(3 * 4 * 4, 5)
    )
    return nn.Sequential(layers).to(dtype)


def batch(index: int) -> tuple[Tensor, Tensor]:
    """The input and the target of batch ``index``."""
    generator = torch.Generator().manual_seed(1000 + index)
    return torch.randn(4, 2, 4, 4, generator=generator), torch.randn(4, 5, generator=generator)


def loss_of(model: nn.Module, index: int) -> Tensor:
    x, y = batch(index)
    dtype = next(model.parameters()).dtype
    return nn.functional.mse_loss(model(x.to(dtype)), y.to(dtype))


def train(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    steps: int,
    start: int = 0,
    before_step: Callable[[int], object] | None = None,
) -> None:
    """Run the usual training loop over batches ``start`` to ``start + steps``."""
    for index in range(start, start + steps):
        opt.zero_grad()
        loss_of(model, index).backward()
        if before_step is not None:
            before_step(index)
        opt.step()


def trained(*changes: Callable[[nn.Module, torch.optim.Optimizer], object], steps: int = 2) -> Scenario:
    """A scenario: ``steps`` steps with the small model, and as many after each of ``changes(model, opt)``."""

    def scenario(make: Make) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = small_model()
        opt = make(model.parameters())
        train(model, opt, steps)
        for index, change in enumerate(changes, start=1):
            change(model, opt)
            train(model, opt, steps, start=index * steps)
        return model, opt

    return scenario


def matrix_steps(
    make: Make, changes: Iterable[Callable[[nn.Parameter], object]], shape: tuple[int, ...] = (4, 4)
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A scenario: a step with a plain gradient, then one after each of ``changes(p, gradient)``."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(shape))
    opt = make([p])
    p.grad = torch.randn(shape)
    opt.step()
    for change in changes:
        change(p)
        opt.step()
    return nn.ParameterList([p]), opt


def centralise(params: Any) -> None:
    """Gradient centralisation written by hand."""
    for p in params:
        if p.grad is not None and p.dim() >= 2:
            p.grad -= p.grad.mean(dim=tuple(range(1, p.dim())), keepdim=True)


def parameters(opt: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def states(opt: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Each parameter's state, in the order of the groups; empty where there is none."""
    return [{k: v for k, v in opt.state.get(p, {}).items() if v is not None} for p in parameters(opt)]


def assert_same_state(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], **tolerance: float) -> None:
    """Both have the same keys and step counts, and values within ``tolerance``."""
    assert [set(s) for s in ours] == [set(s) for s in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.get("step") == other.get("step")
        for key, value in other.items():
            torch.testing.assert_close(mine[key], value, msg=lambda m, key=key: f"{key}: {m}", **tolerance)


def assert_same(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, tolerance: dict[str, float] | None = None
) -> None:
    """Weights and state of the two optimizers agree."""
    tolerance = TOLERANCE if tolerance is None else tolerance
    for index, (p, q) in enumerate(zip(parameters(ours), parameters(theirs), strict=True)):
        torch.testing.assert_close(p.detach(), q.detach(), msg=lambda m, i=index: f"parameter {i}: {m}", **tolerance)
    assert_same_state(states(ours), states(theirs), **tolerance)


def assert_twins(scenario: Scenario, variant: str, **recipe: Any) -> torch.optim.Optimizer:
    """Run ``scenario`` with our optimizer and with torch's; weights and state must agree. Returns ours.

    The scenario is given a function ``make(params, **options)`` that makes the optimizer. Only ours is given ``recipe``.
    """
    name, options = VARIANTS[variant]
    before = [p.detach().clone() for p in small_model().parameters()]
    _, ours = scenario(lambda params, **more: getattr(gradfused, name)(params, **(options | recipe | more)))
    _, theirs = scenario(lambda params, **more: getattr(torch.optim, name)(params, **(options | more)))
    assert any(p.shape != q.shape or not torch.equal(p, q) for p, q in zip(parameters(ours), before, strict=False))
    assert_same(ours, theirs)
    return ours


# ---- nothing changed


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def snapshot(opt: torch.optim.Optimizer) -> list[Any]:
    """Copies of everything that a step may change, and of the gradients and options, which it must not change."""
    params = parameters(opt)
    options = [{k: _copied(v) for k, v in g.items() if k not in ("params", "param_names")} for g in opt.param_groups]
    return [
        [id(p) for p in params],
        options,
        [_copied(p) for p in params],
        [_copied(p.grad) for p in params],
        [{k: _copied(v) for k, v in opt.state.get(p, {}).items()} for p in params],
        sum(1 for value in opt.state.values() if value),
        getattr(opt, "skipped_steps", 0),
    ]


def assert_identical(a: Any, b: Any) -> None:
    """The two are equal to the last bit, also within lists and dicts; nan equals nan."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        if not a.is_meta:
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert a == b or (a != a and b != b)


@contextmanager
def unchanged(opt: torch.optim.Optimizer) -> Iterator[None]:
    """The block changes no weight, gradient, state or option."""
    before = snapshot(opt)
    yield
    assert_identical(before, snapshot(opt))


@contextmanager
def refuses(opt: torch.optim.Optimizer, error: type[Exception], *fragments: str) -> Iterator[None]:
    """The block raises ``error``, with every fragment in its message, and changes nothing."""
    with unchanged(opt):
        with pytest.raises(error) as caught:
            yield
        for fragment in fragments:
            assert fragment in str(caught.value)


# ---- parameters of which one is made bad and then mended


def named(
    *tensors: Tensor, cls: type[torch.optim.Optimizer] = gradfused.AdamW, **options: Any
) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    """An optimizer over parameters named a, b and c, with gradients of ones."""
    params = [t if isinstance(t, nn.Parameter) else nn.Parameter(t) for t in tensors]
    for p in params:
        p.grad = torch.ones_like(p)
    return cls(list(zip("abcdef", params, strict=False)), **options), params


def recovers(opt: torch.optim.Optimizer) -> None:
    """Once the bad parameter is mended, the optimizer steps every parameter."""
    before = [p.detach().clone() for p in parameters(opt)]
    opt.step()
    assert all(not torch.equal(p, b) for p, b in zip(parameters(opt), before, strict=True))


def shrink_in_place(tensor: Tensor) -> None:
    """Shrink a tensor's storage so that it ends a byte before the tensor does, and leave the tensor at its address.

    The storage is resized to nothing and then to less than it had, since allocators often give the same address again. They
    certainly do if the tensor lies at the end of a large storage: see `at_the_end_of_a_large_storage`.
    """
    storage = tensor.untyped_storage()
    address, length = storage.data_ptr(), storage.nbytes()
    for _ in range(64):
        storage.resize_(0)
        storage.resize_(length - 1)
        if storage.data_ptr() == address:
            return
    pytest.skip("the allocator does not give the old address again")


def at_the_end_of_a_large_storage(tensor: Tensor) -> Tensor:
    """The same values in a view whose storage begins 64 MiB earlier.

    An allocator gets so much memory from the system and returns it at once. Only the end of it is ever touched.
    """
    before = (64 << 20) // tensor.element_size()
    memory = torch.empty(before + tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return memory[before:].view(tensor.shape).copy_(tensor.detach())
