"""Storages that were freed, shrunk, moved or exchanged between two steps are followed or refused, and no step writes
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import EMULATED_CUDA
from torch import Tensor, nn
from twins import assert_identical, at_the_end_of_a_large_storage, refuses, shrink_in_place, snapshot

import gradfused

BACKENDS = ("cpu", "reference", EMULATED_CUDA)
SIZE = 2048


def make(backend: str, *, sam: bool = False) -> tuple[Any, list[nn.Parameter]]:
    """NAdam, which has every kind of state: two moments, a count, a product, and copies of the weights."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(SIZE).bfloat16()) for _ in range(2)]
    options = {"precision": "master", "ema": 0.9, "clip_norm": 1.0, "backend": backend}
    optimizer: Any = gradfused.NAdam(list(zip("ab", params, strict=True)), lr=0.01, **options)
    take(gradfused.SAM(optimizer) if sam else optimizer, params)
    return optimizer, params


def take(optimizer: Any, params: list[nn.Parameter]) -> None:
    for p in params:
        p.grad = torch.linspace(-1, 1, SIZE, dtype=p.dtype, device="cpu")
    if isinstance(optimizer, gradfused.SAM):
        optimizer.first_step()
        optimizer.second_step()
    else:
        optimizer.step()


OPERANDS: dict[str, Callable[[Any, nn.Parameter], Tensor | None]] = {
    "parameter": lambda o, p: p,
    "gradient": lambda o, p: p.grad,
    **{key: lambda o, p, key=key: o.state[p][key] for key in ("exp_avg", "exp_avg_sq", "master", "ema", "step")},
    "mu_product": lambda o, p: o.state[p]["mu_product"],
}
every_operand = pytest.mark.parametrize("operand", OPERANDS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_backend
@every_operand
@pytest.mark.parametrize("left", [0, 1])
def test_freed_and_shrunk_storages_are_refused_and_mended(operand, left, backend):
    """Offloading code leaves such tensors: their memory is gone, or a part of it."""
    optimizer, params = make(backend)
    tensor = OPERANDS[operand](optimizer, params[1])
    assert tensor is not None
    storage, values = tensor.untyped_storage(), tensor.detach().clone()
    whole = storage.nbytes()
    storage.resize_(left)
    before = [t.detach().clone() for t in (params[0], *optimizer.state[params[0]].values())]
    what = {"parameter": "parameter 'b'", "gradient": "gradient of parameter 'b'"}.get(
        operand, f"state '{operand}' of parameter 'b'"
    )
    with pytest.raises(ValueError, match=f"{what}: expected a storage of {whole} bytes or more, got {left}"):
        optimizer.step()
    after = [t.detach() for t in (params[0], *optimizer.state[params[0]].values())]
    assert_identical(before, after)

    storage.resize_(whole)
    with torch.no_grad():
        tensor.copy_(values)
    undisturbed, _ = make(backend)
    optimizer.step()
    undisturbed.step()
    assert_identical(snapshot(optimizer)[2:], snapshot(undisturbed)[2:])


@every_backend
@every_operand
def test_storages_shrunk_in_place_are_refused(operand, backend):
    """The storage begins at its old address, so that only its size tells: a step must not write past its end."""
    optimizer, params = make(backend)
    tensor = OPERANDS[operand](optimizer, params[1])
    assert tensor is not None
    tensor.data = at_the_end_of_a_large_storage(tensor)
    optimizer.step()
    before = [t.detach().clone() for t in (params[0], *optimizer.state[params[0]].values())]
    length = tensor.untyped_storage().nbytes()
    shrink_in_place(tensor)
    with pytest.raises(
        ValueError, match=f"parameter 'b': expected a storage of {length} bytes or more, got {length - 1}"
    ):
        optimizer.step()
    assert_identical(before, [t.detach() for t in (params[0], *optimizer.state[params[0]].values())])


@every_backend
@every_operand
@pytest.mark.parametrize("how", ["share_memory_", "data"])
def test_moved_storages_are_followed(operand, how, backend):
    optimizer, params = make(backend)
    tensor = OPERANDS[operand](optimizer, params[1])
    assert tensor is not None
    address = tensor.data_ptr()
    if how == "data":
        tensor.data = tensor.data.clone()
    else:
        tensor.share_memory_()
    assert tensor.data_ptr() != address
    undisturbed, _ = make(backend)
    optimizer.step()
    undisturbed.step()
    assert_identical(snapshot(optimizer)[2:], snapshot(undisturbed)[2:])


class Wrapper(torch.Tensor):
    """A tensor without memory, like DTensor."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrapped(x: Any) -> Any:
            return x.inner if isinstance(x, Wrapper) else x

        return func(*map(unwrapped, args), **{k: unwrapped(v) for k, v in (kwargs or {}).items()})


FOREIGN: dict[str, Callable[[Tensor], Tensor]] = {
    "a wrapper": Wrapper,
    "on the meta device": lambda t: t.to("meta"),
}


@every_backend
@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("key", ["exp_avg", "master", "ema"])
def test_state_of_another_kind_is_refused(key, foreign, backend):
    optimizer, params = make(backend)
    valid = optimizer.state[params[1]][key]
    optimizer.state[params[1]][key] = FOREIGN[foreign](valid.detach())
    before = [t.detach().clone() for t in (*params, *optimizer.state[params[0]].values())]
    with pytest.raises(ValueError, match=f"state '{key}' of parameter 'b'"):
        optimizer.step()
    assert_identical(before, [t.detach() for t in (*params, *optimizer.state[params[0]].values())])
    optimizer.state[params[1]][key] = valid
    optimizer.step()
    assert not torch.equal(before[0], params[0].detach())


@every_backend
@pytest.mark.parametrize("operand", ["parameter", "gradient", "backup", "exp_avg"])
def test_storages_freed_between_the_halves(operand, backend):
    """The descent is refused, remains due, and can be taken once the memory is back."""
    base, params = make(backend)
    sam = gradfused.SAM(base, rho=0.05)
    sam.first_step()
    tensor = sam._halves.backups[params[1]] if operand == "backup" else OPERANDS[operand](base, params[1])
    assert tensor is not None
    storage, values = tensor.untyped_storage(), tensor.detach().clone()
    whole = storage.nbytes()
    storage.resize_(0)
    moment = base.state[params[0]]["exp_avg"].clone()
    with pytest.raises(ValueError, match=r"parameter 'b'.*expected a storage of"):
        sam.second_step()
    assert sam.ascended
    assert torch.equal(moment, base.state[params[0]]["exp_avg"])
    storage.resize_(whole)
    with torch.no_grad():
        tensor.copy_(values)
    sam.second_step()
    assert not torch.equal(moment, base.state[params[0]]["exp_avg"])


@every_backend
def test_autograd_learns_of_everything_that_a_step_writes(backend):
    """Parameters, state and gradients that are zeroed count as written, as in torch's fused step."""
    p = nn.Parameter(torch.ones(4))
    optimizer = gradfused.Adam([p], amsgrad=True, ema=0.9, zero_grad_in_step=True, backend=backend)
    p.grad = torch.ones(4)
    optimizer.step()
    written = {"parameter": p, "gradient": p.grad, **optimizer.state[p]}
    before = {name: t._version for name, t in written.items()}
    p.grad.fill_(1.0)
    optimizer.step()
    assert [name for name, t in written.items() if t._version == before[name]] == []


@every_backend
def test_a_graph_over_what_a_step_writes_is_refused(backend):
    p = nn.Parameter(torch.ones(4))
    optimizer = gradfused.Adam([p], zero_grad_in_step=True, backend=backend)
    p.grad = torch.ones(4)
    optimizer.step()
    for tensor in (p, optimizer.state[p]["exp_avg"], p.grad):
        x = torch.ones(4, requires_grad=True)
        loss = (x * tensor * x).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward(inputs=[x])


@every_backend
def test_a_refused_step_has_changed_nothing(backend):
    """The state of the last of three parameters is freed: the others neither move nor count nor get state."""
    params = [nn.Parameter(torch.ones(8)) for _ in range(3)]
    optimizer = gradfused.AdamW(list(zip("abc", params, strict=True)), backend=backend, clip_norm=1.0)
    params[2].grad = torch.ones(8)
    optimizer.step()
    for p in params:
        p.grad = torch.ones(8)
    storage = optimizer.state[params[2]]["exp_avg"].untyped_storage()
    optimizer.state[params[2]]["exp_avg"].zero_()
    kept = optimizer.state[params[2]]["exp_avg"]
    optimizer.state[params[2]]["exp_avg"] = torch.empty(8)
    optimizer.state[params[2]]["exp_avg"].untyped_storage().resize_(4)
    bad = optimizer.state[params[2]].pop("exp_avg")
    with refuses(optimizer, ValueError, "state 'exp_avg' of parameter 'c'", "expected a storage of 32 bytes"):
        optimizer.state[params[2]]["exp_avg"] = bad
        try:
            optimizer.step()
        finally:
            del optimizer.state[params[2]]["exp_avg"]
    assert storage.nbytes() == 32
    optimizer.state[params[2]]["exp_avg"] = kept
    optimizer.step()
    assert all(optimizer.state[p]["step"] == n for p, n in zip(params, (1, 1, 2), strict=True))
