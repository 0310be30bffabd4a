"""Tensors that overlap in memory are refused, by name, before anything has changed; tensors that only look odd are
accepted.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import triton_interpreter
from cases import CASES, EMULATED_CUDA, FEW_RECIPES, RECIPES, Run, assert_same_bits, values
from torch import Tensor, nn
from twins import (
    EXACT,
    assert_same,
    every_backend,
    named,
    recovers,
    refuses,
)

import gradfused
from gradfused.step import memory

interpreted = pytest.mark.skipif(not triton_interpreter.INTERPRETED, reason=triton_interpreter.REASON)
all_backends = pytest.mark.parametrize(
    "backend", ["cpu", "reference", EMULATED_CUDA, pytest.param("triton", marks=interpreted)]
)


def overlapping():
    base = torch.arange(24.0)
    return {
        "the same": (base[:6], base[:6]),
        "a view inside": (base, base[4:8]),
        "partly": (base[:6], base[5:11]),
        "another shape": (base.view(4, 6), base.view(6, 4)[2]),
        "rows and a column": (base.view(4, 6)[1], base.view(4, 6)[:, 2]),
        "columns that meet": (base.view(4, 6)[:, :3], base.view(4, 6)[:, 2:]),
        "other dtypes": (base, base.view(torch.float16)[3:5]),
        "in reverse": (base[5:11], base[:6]),
    }


@pytest.mark.parametrize("name", overlapping())
@pytest.mark.parametrize("later", [False, True])
def test_overlapping_parameters(name, later):
    a, b = (nn.Parameter(t) for t in overlapping()[name])
    if not later:
        with pytest.raises(
            ValueError, match=r"parameter '.' and parameter '.' overlap in memory: pass the tensor that holds"
        ):
            gradfused.SGD([("a", a), ("b", b)])
        return
    opt = gradfused.SGD([("a", a)])
    with refuses(opt, ValueError, "'a'", "'b'", "overlap in memory"):
        opt.add_param_group({"params": [("b", b)]})
    assert len(opt.param_groups) == 1


@every_backend
def test_parameters_made_to_overlap_between_steps(backend):
    opt, (p, q) = named(torch.ones(6), torch.ones(3), backend=backend)
    opt.step()
    valid = q.data
    q.data = p.data[2:5]
    with refuses(opt, ValueError, "parameter 'a'", "parameter 'b'", "overlap in memory"):
        opt.step()
    q.data = valid
    recovers(opt)


@every_backend
def test_state_that_overlaps(backend):
    opt, (p, q) = named(torch.ones(6), torch.ones(6), backend=backend)
    opt.step()
    valid = opt.state[q]["exp_avg"]
    for other, what in ((opt.state[p]["exp_avg"], "exp_avg of parameter 'a'"), (p.data, "parameter 'a'")):
        opt.state[q]["exp_avg"] = other
        with refuses(opt, ValueError, what, "exp_avg of parameter 'b'", "overlap in memory"):
            opt.step()
    opt.state[q]["exp_avg"] = valid
    recovers(opt)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(1).expand(4),
        lambda: torch.ones(3, 1).expand(3, 4),
        lambda: torch.arange(10.0).as_strided((4, 3), (2, 1)),
        lambda: torch.arange(10.0).unfold(0, 4, 2),
    ],
)
def test_parameter_that_overlaps_itself(make):
    with pytest.raises(ValueError, match=r"parameter 'w' overlaps itself \(shape .*, strides .*\): pass a .clone\(\)"):
        gradfused.SGD([("w", nn.Parameter(make()))])


def interleaved():
    base = torch.arange(24.0)
    return {
        "columns": (base.view(4, 6)[:, :3], base.view(4, 6)[:, 3:]),
        "every other": (base[::2], base[1::2]),
        "two of three": (base[::3], base[1::3]),
        "quarters": (
            base.view(4, 6)[:2, :3],
            base.view(4, 6)[:2, 3:],
            base.view(4, 6)[2:, :3],
            base.view(4, 6)[2:, 3:],
        ),
        "neighbours": (base[:6], base[6:12], base[12:]),
        "with an empty one": (base, base[3:3]),
    }


@every_backend
@pytest.mark.parametrize("name", interleaved())
def test_interleaved_parameters_are_fine(name, backend):
    """Each parameter gets its own update, and nothing between them is touched."""
    views, twins = interleaved()[name], [t.clone() for t in interleaved()[name]]
    results = []
    for tensors in (views, twins):
        opt, params = named(*tensors, lr=0.5, backend=backend)
        for scale, p in enumerate(params, start=1):
            p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape) * scale
        opt.step()
        opt.step()
        results.append(opt)
    assert_same(*results, EXACT)


@every_backend
def test_odd_but_valid_tensors(backend):
    """Tensors that are empty, without dims, strided or misaligned, and gradients that are expanded."""
    tensors = [
        torch.zeros(0, 3),
        torch.tensor(2.0),
        torch.zeros(4, 10)[:, ::3],
        torch.zeros(3, 1, 2).transpose(0, 2),
        torch.arange(9.0)[1:8],
    ]
    opts = []
    for given in (tensors, [t.clone(memory_format=torch.contiguous_format) for t in tensors]):
        opt, params = named(*given, lr=0.1, clip_norm=0.5, centralize=True, backend=backend)
        for p in params:
            p.grad = torch.tensor(3.0).expand(p.shape) if p.dim() < 2 else torch.arange(float(p.numel())).view(p.shape)
        opt.step()
        opts.append(opt)
    assert_same(*opts)


# ---- gradients


def lying_on(opt: torch.optim.Optimizer, p: Tensor, q: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Pairs of a tensor that a step writes and a gradient of p that overlaps it."""
    base = torch.as_strided(p.detach(), (13,), (1,), p.storage_offset())
    yield "parameter 'a'", base[1:13].view(3, 4)
    yield "parameter 'a'", p.detach().view(4, 3).t()
    yield "parameter 'b'", q.detach()[:12].view(3, 4)
    yield "parameter 'b'", q.detach()[3].expand(3, 4)
    yield "exp_avg of parameter 'a'", opt.state[p]["exp_avg"]
    yield "exp_avg_sq of parameter 'b'", opt.state[q]["exp_avg_sq"][:12].view(3, 4)


def two(backend: str, **options: object) -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
    base = torch.linspace(-1, 1, 40)
    return named(base[:12].view(3, 4), base[20:], backend=backend, **options)


@pytest.mark.parametrize("which", range(6))
@all_backends
def test_gradient_that_lies_on_what_is_written(backend: str, which: int) -> None:
    """The gradient overlaps it from the beginning, or from between two steps on."""
    fresh, params = two(backend)
    opt, (p, q) = two(backend)
    opt.step()
    fresh_gradient = params[0].grad
    for optimizer, a, b in ((opt, p, q), (fresh, *params)):
        if optimizer is fresh:
            optimizer.load_state_dict(opt.state_dict())
        what, gradient = list(lying_on(optimizer, a, b))[which]
        a.grad = gradient
        with refuses(
            optimizer, ValueError, "gradient of parameter 'a'", what, "overlap in memory", "assign a .clone()"
        ):
            optimizer.step()
    p.grad, params[0].grad = torch.ones(3, 4), fresh_gradient
    recovers(opt)
    recovers(fresh)


@pytest.mark.parametrize("recipe", FEW_RECIPES)
@pytest.mark.parametrize("case", ["sgd-nesterov", "adamw-amsgrad", "lamb", "adan"])
@all_backends
def test_gradient_that_is_the_parameter_itself(backend: str, case: str, recipe: str) -> None:
    """Each element is read before it is written, so that the result is that of a copy of the gradient."""
    if backend == "triton" and recipe != dict(zip(CASES, FEW_RECIPES * 9, strict=False))[case]:
        pytest.skip("one recipe an optimizer, interpreted")
    outcomes = []
    for copied in (False, True):
        run = Run(CASES[case], RECIPES[recipe], ((6, 5), (4, 3, 2, 2), (9,)), backend=backend)
        for _ in range(2):
            for p in run.params:
                p.grad = p.detach().clone() if copied else p.detach()
            run.optimizer.step()
        outcomes.append(run.outcome())
    assert_same_bits(*outcomes)


@pytest.mark.parametrize("precision", ["master", "kahan", "stochastic"])
@all_backends
def test_gradient_that_is_the_parameter_itself_in_16_bits(backend: str, precision: str) -> None:
    outcomes = []
    for copied in (False, True):
        options = {"precision": precision, "ema": 0.9, "clip_norm": 1.0}
        run = Run(CASES["adamw"], options, ((6, 5), (9,)), backend=backend, dtype=torch.bfloat16)
        sam = gradfused.SAM(run.optimizer, 0.1)
        for half in (sam.first_step, sam.second_step):
            for p in run.params:
                p.grad = p.detach().clone() if copied else p.detach()
            half()
        outcomes.append(run.outcome())
    assert_same_bits(*outcomes)


@all_backends
def test_gradient_that_is_the_parameter_itself_cannot_be_left_at_zero(backend: str) -> None:
    opt, (p,) = named(torch.ones(3, 4), backend=backend, zero_grad_in_step=True)
    p.grad = p.detach()
    with refuses(opt, ValueError, "gradient of parameter 'a' and parameter 'a' overlap", "assign a .clone()"):
        opt.step()
    p.grad = torch.ones(3, 4)
    recovers(opt)


Share = Callable[[Tensor], Tensor]
SHARED: dict[str, Share] = {"the same": lambda g: g, "a part": lambda g: g[:3], "in reverse order": lambda g: g[2:7]}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("zeroed", [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("part", SHARED)
@all_backends
def test_gradients_that_share_memory(backend: str, part: str, zeroed: tuple[bool, bool], late: bool) -> None:
    """Each parameter is stepped with what its gradient held, whichever group zeroes it, and in whatever order."""
    gradient = values((7,), 3, 0).clone()
    both = {"shared": (gradient, SHARED[part](gradient)), "apart": (gradient.clone(), SHARED[part](gradient).clone())}
    outcomes = []
    for grads in both.values():
        params = [nn.Parameter(torch.ones_like(g)) for g in grads]
        groups = [{"params": [p], "zero_grad_in_step": zero} for p, zero in zip(params, zeroed, strict=True)]
        opt = gradfused.Adam(groups, lr=0.1, backend=backend)
        if late:  # they share it only from between two steps on
            for p in params:
                p.grad = torch.ones_like(p)
            opt.step()
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        opt.step()
        outcomes.append({f"parameter {i}": p.detach().double() for i, p in enumerate(params)})
        cleared = [g for g, zero in zip(grads, zeroed, strict=True) if zero]
        assert not any(g.any() for g in cleared)
    assert_same_bits(*outcomes)


# ---- state


@all_backends
def test_parameters_that_were_given_one_count_of_steps(backend: str) -> None:
    """Each parameter counts its own steps from there on. torch counts such a tensor twice in a step."""
    opt, (p, q) = named(torch.ones(6), torch.ones(3), cls=gradfused.NAdam, backend=backend)
    opt.step()
    for key in ("step", "mu_product"):
        opt.state[q][key] = opt.state[p][key]
    twin, _ = named(torch.ones(6), torch.ones(3), cls=gradfused.NAdam, backend=backend)
    for _ in range(3):
        twin.step()
    for _ in range(2):
        opt.step()
    assert float(opt.state[p]["step"]) == float(opt.state[q]["step"]) == 3
    assert opt.state[p]["step"].data_ptr() != opt.state[q]["step"].data_ptr()
    assert_same(opt, twin, EXACT)


@all_backends
def test_count_of_steps_that_lies_in_a_parameter(backend: str) -> None:
    opt, (p, q) = named(torch.ones(6), torch.ones(3), backend=backend)
    opt.step()
    valid = opt.state[q]["step"]
    opt.state[q]["step"] = p.data[2]
    with refuses(opt, ValueError, "parameter 'a'", "step of parameter 'b'", "overlap in memory"):
        opt.step()
    opt.state[q]["step"] = valid
    recovers(opt)


# ---- memory that can only be read


def mapped(folder: Path, mode: str) -> Tensor:
    """Ones in a file that is mapped into memory."""
    np.ones(6, dtype=np.float32).tofile(folder / "ones")
    file = np.memmap(folder / "ones", dtype=np.float32, mode=mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns, once a process, if the memory may not be written
        return torch.from_numpy(file)


@pytest.mark.parametrize(
    ("operand", "late"), [("parameter", False), ("parameter", True), ("exp_avg", True), ("gradient", False)]
)
@all_backends
def test_memory_that_can_only_be_read(backend: str, operand: str, late: bool, tmp_path: Path) -> None:
    """Writing to it would end the process. A gradient may lie there unless it is to be zeroed."""
    opt, (p, _) = named(torch.ones(6), torch.ones(3), backend=backend, zero_grad_in_step=operand == "gradient")
    if late:
        opt.step()
    readable = mapped(tmp_path, "r")
    valid = {"parameter": p.data, "gradient": p.grad, "exp_avg": opt.state.get(p, {}).get("exp_avg")}[operand]

    def put(t: Tensor) -> None:
        if operand == "parameter":
            p.data = t
        elif operand == "gradient":
            p.grad = t
        else:
            opt.state[p]["exp_avg"] = t

    put(readable)
    with refuses(opt, ValueError, f"{operand}", "parameter 'a'", "can only be read", "pass a .clone()"):
        opt.step()
    put(valid)
    recovers(opt)


@all_backends
def test_mapped_memory_that_may_be_written_or_need_not_be(backend: str, tmp_path: Path) -> None:
    for mode in ("r+", "c"):
        opt, (p,) = named(mapped(tmp_path, mode), backend=backend)
        p.grad = mapped(tmp_path, "r")
        recovers(opt)
    shared = torch.ones(6).share_memory_()
    opt, _ = named(shared, backend=backend)
    recovers(opt)


def test_memory_is_looked_up_only_where_another_than_torch_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a table of tensors that torch allocated, the system's list of writable memory is not read."""
    looked = []
    monkeypatch.setattr(memory, "_unwritable", lambda: looked.append(1) or [])
    opt, _ = named(torch.ones(6), torch.ones(3))
    opt.step()
    assert not looked
    opt, _ = named(torch.from_numpy(np.ones(6, dtype=np.float32)))
    opt.step()
    opt.step()
    assert looked == [1]
