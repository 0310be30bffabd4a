"""What only a GPU can show: graphs, streams, sizes beyond 32 bits, and that no step waits for the device."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, FEW_CASES, FEW_RECIPES, RECIPES, SHAPES, Run, assert_close, assert_same_bits, oracle
from torch import nn

import gradfused
from gradfused.backends import availability, choose, cuda, triton

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.gpu,
    pytest.mark.skipif(
        not availability()["cuda"].usable or cuda.native().EMULATED, reason=f"no GPU: {availability()['cuda'].reason}"
    ),
]
RECIPE: dict[str, Any] = {"centralize": True, "clip_norm": 1.0, "noise": 1e-4, "nonfinite": "skip"}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 64), nn.Linear(64, 10)).cuda()


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator).cuda() for _ in range(count)]


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().double().cpu() for name, p in net.named_parameters()}


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> None:
    for x in data:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


# ---- plain use


def test_auto_takes_cuda() -> None:
    assert choose("auto", [torch.zeros(2, device="cuda")]) is cuda.CudaBackend


@pytest.mark.parametrize("recipe", [{}, RECIPE, {"perturb": "agc", "norm_scope": "unit", "radius": 0.01}])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_training_is_the_references(kind: str, recipe: dict[str, Any]) -> None:
    nets = [model(), model()]
    for net, backend in zip(nets, ("cuda", "reference"), strict=True):
        train(
            net,
            getattr(gradfused, kind)(net.parameters(), lr=1e-2, weight_decay=0.1, backend=backend, **recipe),
            batches(10),
        )
    for name, expected in weights(nets[1]).items():
        torch.testing.assert_close(weights(nets[0])[name], expected, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("recipe", FEW_RECIPES)
@pytest.mark.parametrize("case", FEW_CASES)
def test_the_oracle_after_twenty_steps(case: str, recipe: str) -> None:
    run = Run(CASES[case], RECIPES[recipe], SHAPES, backend="cuda").step(20)
    assert_close(
        run.outcome(), oracle(case, recipe), 1.3e-6, 1e-5,
        lambda: Run(CASES[case], RECIPES[recipe], SHAPES, backend="reference").step(20).outcome(),
    )  # fmt: skip


def test_grad_scaler() -> None:
    nets = [model(), model()]
    train(nets[1], gradfused.AdamW(nets[1].parameters(), lr=1e-2, centralize=True, clip_norm=1.0), batches(6))
    optimizer = gradfused.AdamW(nets[0].parameters(), lr=1e-2, centralize=True, clip_norm=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for x in batches(6):
        optimizer.zero_grad()
        scaler.scale(nets[0](x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    for name, expected in weights(nets[1]).items():
        torch.testing.assert_close(weights(nets[0])[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_checkpoints_go_both_ways() -> None:
    ours, theirs = model(), model()
    mine, torchs = (
        gradfused.AdamW(ours.parameters(), lr=1e-2),
        torch.optim.AdamW(theirs.parameters(), lr=1e-2, fused=True),
    )
    train(ours, mine, batches(3))
    theirs.load_state_dict(ours.state_dict())
    torchs.load_state_dict(mine.state_dict())
    for group in torchs.param_groups:
        group["fused"] = True
    train(theirs, torchs, batches(3))
    mine.load_state_dict(torchs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    train(ours, mine, batches(2))
    train(theirs, torchs, batches(2))
    for name, expected in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], expected, rtol=1e-4, atol=1e-6, msg=name)


# ---- launches, waiting


@pytest.mark.parametrize(("recipe", "most"), [({}, 1), ({"centralize": True}, 1), (RECIPE, 2)])
def test_launches_of_a_steady_step(recipe: dict[str, Any], most: int) -> None:
    net = model()
    optimizer = gradfused.AdamW(net.parameters(), **recipe)
    train(net, optimizer, batches(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert 1 <= len(kernels) <= most, [e.name for e in kernels]


def test_no_step_waits_for_the_device() -> None:
    net = model()
    optimizer = gradfused.AdamW(net.parameters(), lr=torch.tensor(1e-3, device="cuda"), **RECIPE)
    train(net, optimizer, batches(2))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0, device="cuda"), torch.tensor(0.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x in batches(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
            assert optimizer.grad_norm is not None
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- graphs


def captured(net: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> Callable[[], None]:
    """Capture a whole training step in a graph, after warming up on another stream as torch asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(net, optimizer, [x] * 3)
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        net(x).square().mean().backward()
        optimizer.step()
    return graph.replay


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("recipe", [{}, RECIPE, {"centralize": "tensor", "centralize_at": "update"}])
def test_a_captured_step_is_a_step(kind: str, recipe: dict[str, Any], backend: str) -> None:
    if backend == "triton" and triton.missing() is not None:
        pytest.skip(str(triton.missing()))
    data = batches(8)
    eager, net = model(), model()
    options = {"lr": 1e-2, "backend": backend} | recipe
    twin, optimizer = (getattr(gradfused, kind)(n.parameters(), **options) for n in (eager, net))
    static = data[0].clone()
    replay = captured(net, optimizer, static)
    train(eager, twin, [data[0]] * 3)
    for x in data:
        static.copy_(x)
        replay()
        train(eager, twin, [x])
    torch.cuda.synchronize()
    for name, expected in weights(eager).items():
        torch.testing.assert_close(weights(net)[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_a_captured_step_reads_lr_and_goes_on_beside_eager_ones() -> None:
    data = batches(4)
    eager, net = model(), model()
    rates = [torch.tensor(1e-2, device="cuda") for _ in range(2)]
    twin, optimizer = (
        gradfused.AdamW(n.parameters(), lr=r, **RECIPE) for n, r in zip((eager, net), rates, strict=True)
    )
    static = data[0].clone()
    replay = captured(net, optimizer, static)
    train(eager, twin, [data[0]] * 3)
    for i, x in enumerate(data):
        for rate in rates:
            rate.fill_(1e-2 / (i + 1))
        static.copy_(x)
        replay()
        train(net, optimizer, [x])
        train(eager, twin, [x, x])
    for name, expected in weights(eager).items():
        torch.testing.assert_close(weights(net)[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_a_first_step_cannot_be_captured() -> None:
    p = nn.Parameter(torch.ones(8, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = gradfused.AdamW([p])
    with pytest.raises(RuntimeError, match="Take a step"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert bool((p != 1).all())


# ---- streams and memory


def test_streams_in_turn() -> None:
    runs = [Run(CASES["adamw"], RECIPES["full"], SHAPES, backend="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for i in range(6):
        runs[0].step()
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[i % 2]):
            runs[1].step()
        torch.cuda.synchronize()
    assert_same_bits(runs[0].outcome(), runs[1].outcome())


def test_freed_while_at_work() -> None:
    params = [nn.Parameter(torch.ones(1 << 24, device="cuda")) for _ in range(8)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = gradfused.SGD(params, lr=0.5, clip_norm=1e9)
    optimizer.step()
    for _ in range(4):
        optimizer.step()
    del optimizer
    gc.collect()
    torch.full((1 << 22,), -1, dtype=torch.int32, device="cuda")  # lands on freed memory, in stream order
    torch.cuda.synchronize()
    assert all(bool((p == -1.5).all()) for p in params)


def test_an_unfit_stream_is_refused() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    native = cuda.native().Engine(1)
    with pytest.raises(ValueError, match="belongs to device"):
        native.apply(0, torch.cuda.Stream("cuda:1").cuda_stream, 0, 0)


@pytest.mark.parametrize("recipe", [{}, {"centralize": "tensor", "clip_norm": 1.0}])
def test_beyond_32_bits(recipe: dict[str, Any]) -> None:
    numel = 2**31 + 9
    if torch.cuda.mem_get_info()[0] < 12 * numel:
        pytest.skip("needs 24 GiB of device memory")
    p = nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.zeros_like(p)
    p.grad[-1] = p.grad[2**31] = p.grad[0] = 2.0
    gradfused.SGD([p], lr=0.25, **recipe).step()
    step = 0.25 * (2.0 if not recipe else 1 / 3**0.5)
    for i in (0, 2**31, numel - 1):
        torch.testing.assert_close(float(p[i]), -step, rtol=4e-3, atol=0)
    assert abs(float(p[1])) < 1e-6
    assert int((p.abs() > 0.1).sum()) == 3
