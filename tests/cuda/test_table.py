"""What the CUDA backend does around its kernels: launches, uploads and devices. No grid and no order changes a result."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import CASES, FEW_RECIPES, RECIPES, SHAPES, Run, assert_devices_share_norms, assert_same_bits, device_of
from cuda_emulator import build

import gradfused
from gradfused.backends import choose, cuda
from gradfused.backends.base import Scaling

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler: the emulator cannot be built"),
    pytest.mark.parametrize("backend", ["cuda"]),
]

# Units of a warp, a block and several chunks; one tensor of many chunks.
LARGE = ((40, 33), (3, 3000), (2, 70000), (70001,), (8, 3, 3, 3), ())
emulated_only = pytest.mark.skipif(device_of("cuda") != "cpu", reason="counts or arranges what the emulator does")


def outcome(recipe: str, backend: str, case: str = "adam", steps: int = 2) -> dict[str, torch.Tensor]:
    return Run(CASES[case], RECIPES[recipe], LARGE, backend=backend).step(steps).outcome()


# ---- no order and no grid changes a bit


@emulated_only
@pytest.mark.parametrize("recipe", [*FEW_RECIPES, "tensor-update-agc", "centralize-unit-update", "clip-group"])
def test_results_do_not_depend_on_the_order_of_threads(
    recipe: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for order in ("forward", "reverse", "shuffle:7"):
        monkeypatch.setenv("GRADFUSED_EMULATOR_ORDER", order)
        outcomes.append(outcome(recipe, backend))
    assert_same_bits(outcomes[0], outcomes[1])
    assert_same_bits(outcomes[0], outcomes[2])


@pytest.fixture
def other_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], ModuleType]:
    """Loads the emulated module once more, for a device with another number of processors."""

    def load(processors: int) -> ModuleType:
        path = build.build()
        own = tmp_path / str(processors) / path.name  # another file: a library of its own
        own.parent.mkdir()
        shutil.copy(path, own)
        monkeypatch.setenv("GRADFUSED_EMULATOR_PROCESSORS", str(processors))
        return build.imported(own)

    return load


@emulated_only
@pytest.mark.parametrize("recipe", [*FEW_RECIPES, "tensor-update-agc"])
def test_results_do_not_depend_on_the_grid(
    recipe: str, backend: str, other_grid: Callable[[int], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outcome(recipe, backend)
    for processors in (1, 13):
        monkeypatch.setattr(cuda, "_native", other_grid(processors))
        assert_same_bits(outcome(recipe, backend), expected)


# ---- launches and uploads


def launches(work: Callable[[], object]) -> int:
    before = cuda.native()._launches()
    work()
    return int(cuda.native()._launches() - before)


@emulated_only
@pytest.mark.parametrize(
    ("recipe", "most"),
    [("plain", 1), ("centralize-unit-gradient", 1), ("centralize-agc", 1), ("noise", 1), ("reverse", 1), ("full", 2)],
)
@pytest.mark.sanitized_cuda
def test_launches_of_a_steady_step(recipe: str, most: int, backend: str) -> None:
    """There is one launch, or two with a norm of several rows, whatever the number of tensors and groups."""
    run = Run(CASES["adamw"], RECIPES[recipe], SHAPES * 20, backend=backend).step()
    assert launches(run.optimizer.step) == most


@emulated_only
def test_launches_where_a_late_mean_takes_several_chunks(backend: str) -> None:
    run = Run(CASES["adamw"], RECIPES["full-update"], ((200, 500),), backend=backend).step()
    assert launches(run.optimizer.step) == 3  # statistics, rehearsal, step


@emulated_only
@pytest.mark.parametrize(
    ("case", "recipe", "expected"),
    [
        ("lamb", {}, 2),  # sums for the trust ratios, step
        ("lars", {}, 2),
        ("lamb-plain", {}, 1),
        ("lamb", {"clip_norm": 1.0}, 3),
        ("lamb", {"centralize": True, "centralize_at": "update"}, 2),
        (
            "lamb",
            {"centralize": "tensor", "centralize_at": "update", "clip_norm": 1.0},
            4,
        ),  # the mean takes several chunks
        ("adan", {"clip_norm": 1.0}, 2),
        ("adamw", {"precision": "kahan", "ema": 0.9, "zero_grad_in_step": True}, 1),
        ("adamw", {"precision": "stochastic", "clip_norm": 1.0}, 2),
    ],
)
def test_launches_of_rules_and_riders(case: str, recipe: dict[str, Any], expected: int, backend: str) -> None:
    shapes = (*SHAPES, (200, 500))
    run = Run(CASES[case], recipe, shapes, backend=backend, dtype=torch.bfloat16).step()
    assert launches(run.optimizer.step) == expected


@emulated_only
def test_gradients_that_moved_are_uploaded_once(backend: str) -> None:
    run = Run(CASES["adamw"], RECIPES["plain"], SHAPES, backend=backend).step()
    for p in run.params:
        p.grad = p.grad.clone()
    assert launches(run.optimizer.step) == 2
    assert launches(run.optimizer.step) == 1


@emulated_only
def test_many_addresses_take_several_uploads(backend: str) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(1200)]
    optimizer = gradfused.SGD(params, lr=0.5, backend=backend)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones(3)
        kept = [p.grad for p in params]
        optimizer.step()
    assert launches(optimizer.step) == 1
    assert kept
    assert all(torch.equal(p, torch.full((3,), -0.5)) for p in params)


@pytest.mark.sanitized_cuda
def test_a_gradient_may_come_back_misaligned(backend: str) -> None:
    """Each step checks whether accesses of 16 bytes are possible."""
    straight, crooked = (
        Run(CASES["adam"], RECIPES["centralize-clip"], LARGE, backend=backend).step() for _ in range(2)
    )
    for p in crooked.params:
        moved = torch.empty(p.numel() + 1, device=p.device)[1:].view(p.shape)
        p.grad = moved.copy_(p.grad)
    crooked.grads = [p.grad for p in crooked.params]
    for (name, expected), got in zip(straight.step().outcome().items(), crooked.step().outcome().values(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7, msg=name)


def test_lr_is_read_where_it_lies(backend: str) -> None:
    run, twin = (Run(CASES["adamw"], RECIPES["full"], SHAPES, backend=backend).step() for _ in range(2))
    lr = torch.tensor(0.25, device=run.params[0].device)
    table = run.optimizer._tables[0].backend
    for part in table._parts:
        for group in range(len(run.optimizer.param_groups)):
            part.native.lr_from(group, lr.data_ptr(), "float32")
    for value in (0.25, 0.0, 1.5):
        lr.fill_(value)
        run.fill()
        table.stats(Scaling())
        table.apply(Scaling())
        run.taken += 1
        for group in twin.optimizer.param_groups:
            group["lr"] = value
        twin.step()
    assert_same_bits(run.outcome(), twin.outcome())


def test_lr_on_another_device_is_refused(backend: str) -> None:
    run = Run(CASES["adamw"], RECIPES["plain"], SHAPES, backend=backend).step()
    table = run.optimizer._tables[0].backend
    elsewhere = [replace(s, lr_tensor=torch.tensor(0.1, device="meta")) for s in table.settings]
    before = run.outcome()
    with pytest.raises(ValueError, match="lr of group 0 is a tensor on meta, its parameters are on"):
        table.configure(elsewhere)
    assert_same_bits(run.outcome(), before)


# ---- several devices


@pytest.mark.parametrize(
    "recipe", ["plain", "centralize-clip", "full", "full-decayed", "centralize-agc", "tensor-update-agc"]
)
def test_devices_share_norms(recipe: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_devices_share_norms(cuda.CudaBackend, recipe, backend, 3, monkeypatch)


def test_one_device_skips_for_all(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.CudaBackend, "_owners", staticmethod(lambda rows: [i % 2 for i, _ in enumerate(rows)]))
    run = Run(CASES["adam"], RECIPES["full"], SHAPES, backend=backend).step()
    before = run.outcome()
    run.fill()
    run.grads[0].view(-1)[3] = math.nan
    run.optimizer.step()
    assert run.optimizer.skipped_steps == 1
    assert_same_bits(run.outcome(), before)


# ---- as an optimizer


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_overflow_is_heeded_on_the_device(found: float, backend: str) -> None:
    run, twin = (Run(CASES["adamw"], RECIPES["full"], SHAPES, backend=backend).step() for _ in range(2))
    device = run.params[0].device
    table = run.optimizer._tables[0].backend
    before = run.outcome()
    run.fill()
    scaling = Scaling(torch.tensor(1.0, device=device), torch.tensor(found, device=device))
    table.stats(scaling)
    assert table.apply(scaling)
    assert_same_bits(run.outcome(), before if found else twin.step().outcome())
    assert run.optimizer.skipped_steps == 0


def test_skipped_steps_outlive_tables_and_copies(backend: str) -> None:
    run = Run(CASES["sgd"], {"nonfinite": "skip"}, ((5, 3), (4,), (2,)), backend=backend)
    run.fill()
    for pattern in range(1, 8):  # more patterns of gradients than tables are kept
        for i, p in enumerate(run.params):
            p.grad = torch.full_like(p, math.inf) if pattern >> i & 1 else None
        run.optimizer.step()
        assert run.optimizer.skipped_steps == pattern
    assert copy.deepcopy(run.optimizer).skipped_steps == 7
    run.optimizer.load_state_dict(run.optimizer.state_dict())
    assert run.optimizer.skipped_steps == 7


def test_steps_are_counted_on_the_device(backend: str) -> None:
    """A checkpoint of torch, which counts on the CPU, can be continued."""
    run = Run(CASES["adamw"], RECIPES["plain"], SHAPES, backend=backend)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in run.params]
    twin = torch.optim.AdamW([{"params": theirs[:4]}, {"params": theirs[4:], "lr": 0.005}], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        run.fill()
        for p, g in zip(theirs, run.grads, strict=True):
            p.grad = g.clone()
        twin.step()
        run.taken += 1
    for p, q in zip(run.params, theirs, strict=True):
        p.data.copy_(q.data)
    run.optimizer.load_state_dict(twin.state_dict())
    run.step(2)
    counts = [s["step"] for s in run.optimizer.state.values()]
    assert all(c.device == run.params[0].device and float(c) == 5 for c in counts)


def test_families_do_not_mix(backend: str) -> None:
    table = cuda.native().Engine(1)
    p = torch.zeros(4, device=device_of(backend))
    for rule, states in (("sgd", 0), ("adam", 2)):
        operand = (p.data_ptr(), "float32", [], [])
        table.add(
            rule=rule, param=operand, grad=operand, state=[operand] * states, numel=4, unit_length=4, group=0,
            param_number=0, centre=False, whole=False, first=True, step=None, mu_product=None, source=None, master=None,
            kahan_comp=None, ema=None, precision="none",
        )  # fmt: skip
    with pytest.raises(ValueError, match="two families"):
        table.bytes()


def test_tensors_elsewhere_are_refused(backend: str) -> None:
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run: works on"):
        choose(backend, [torch.zeros(2, device="meta")])


@pytest.mark.parametrize("wrong", [torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0, device="meta")])
def test_scaling_is_checked(wrong: torch.Tensor, backend: str) -> None:
    with pytest.raises(ValueError, match="grad_scale and found_inf: expected float32 on cpu"):
        cuda._address(wrong, torch.device("cpu"))
