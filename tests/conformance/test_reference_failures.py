"""A step of the reference backend that fails on its way changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradfused

CASES: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "plain": ("AdamW", torch.float32, {}),
    "noise": ("AdamW", torch.float32, {"noise": 0.1}),
    "unit": ("NAdam", torch.float32, {"perturb": "agc", "norm_scope": "unit", "centralize": True}),
    "clip": ("SGD", torch.float32, {"momentum": 0.9, "dampening": 0.5, "clip_norm": 0.5, "ema": 0.9}),
    "zero": ("Adan", torch.float32, {"zero_grad_in_step": True, "nonfinite": "skip"}),
    "master": ("LAMB", torch.bfloat16, {"precision": "master", "ema": 0.9}),
    "kahan": ("Lion", torch.bfloat16, {"precision": "kahan"}),
    "stochastic": ("LARS", torch.bfloat16, {"lr": 0.1, "momentum": 0.9, "precision": "stochastic"}),
}
# Philox takes some 300 operators: where a step draws random numbers, every 11th operator fails in turn.
STRIDE = {"noise": 11, "stochastic": 11}
every_case = pytest.mark.parametrize("case", CASES)


class Failure(Exception):
    """What an operator raises when it is made to fail."""


class FailingAfter(TorchDispatchMode):
    """Within the block the operator after ``left`` others fails, like one that a tensor subclass does not implement."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= func.namespace != "profiler"  # those that torch calls around every optimizer's step
        if self.left < 0:
            self.left = 10**6
            raise Failure
        return func(*args, **(kwargs or {}))


def plain(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def everything(opt: torch.optim.Optimizer) -> list[Any]:
    """Everything that a step may change."""
    params = opt.param_groups[0]["params"]
    held = [{k: plain(v) for k, v in opt.state.get(p, {}).items()} for p in params]
    return [[plain(p) for p in params], [plain(p.grad) for p in params], held, opt.skipped_steps]


def assert_equal(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, check_device=False)


def values(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 2), (4,), (2, 2))]


def fill(opt: torch.optim.Optimizer, seed: int) -> None:
    for p, g in zip(opt.param_groups[0]["params"], values(opt.param_groups[0]["params"][0].dtype, seed), strict=True):
        p.grad = g


def made(case: str, wrap: Any = nn.Parameter) -> torch.optim.Optimizer:
    name, dtype, options = CASES[case]
    return getattr(gradfused, name)([wrap(w) for w in values(dtype, 0)], backend="reference", **options)


def failing_after(case: str, taken: int, left: int) -> bool:
    """Whether the step after ``taken`` steps fails if its operator after ``left`` others does; then it must have
    changed nothing.
    """
    opt, twin = made(case), made(case)
    for seed in range(taken):
        for o in (opt, twin):
            fill(o, seed)
            o.step()
    for o in (opt, twin):
        fill(o, taken)
    before = everything(opt)
    try:
        with FailingAfter(left):
            opt.step()
        return False
    except Failure:
        assert_equal(everything(opt), before)
    opt.step()
    twin.step()
    assert_equal(everything(opt), everything(twin))
    return True


@pytest.mark.parametrize("taken", [0, 1])
@every_case
def test_a_failure_at_any_operator_changes_nothing(case: str, taken: int) -> None:
    """The step that is taken in its place is also that of a run in which nothing failed."""
    failed = 0
    while failing_after(case, taken, failed):
        failed += STRIDE.get(case, 1)
    assert failed > 60


# ---- DTensors


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A mesh of this process only."""
    if not distributed.is_available() or distributed.is_initialized():
        pytest.skip("needs torch.distributed, not yet in use")
    from torch.distributed.device_mesh import init_device_mesh

    meeting = Path(tmp_path_factory.mktemp("mesh")) / "meet"
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@every_case
def test_distributed_tensors_step_as_plain_ones(case: str, mesh: Any) -> None:
    """Norms, units, noise and random rounding are those of the whole tensors."""
    from torch.distributed.tensor import Shard, distribute_tensor

    def spread(w: Tensor) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(w, mesh, [Shard(0)]))

    opt, twin = made(case, spread), made(case)
    for seed in range(3):
        fill(twin, seed)
        fill(opt, seed)
        for p in opt.param_groups[0]["params"]:
            p.grad, g = None, p.grad
            p.grad = distribute_tensor(g, mesh, [Shard(0)])
        opt.step()
        twin.step()
    assert_equal(everything(opt), everything(twin))
