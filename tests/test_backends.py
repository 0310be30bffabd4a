"""Which backend runs, who decides, and what is said where one cannot."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from twins import assert_same, loss_of, refuses, small_model, states, train, unchanged

import gradfused
from gradfused import backends
from gradfused.backends import Availability, availability, choose, cpu, reference
from gradfused.backends.base import BackendTable


def cpu_params():
    return [nn.Parameter(torch.ones(2, 3))]


def meta_params():
    """Stand-ins for tensors on another device, wherever no GPU is."""
    return [nn.Parameter(torch.ones(2, 3, device="meta"))]


@pytest.fixture
def _fresh_log():
    backends._log_fallback.cache_clear()
    yield
    backends._log_fallback.cache_clear()


@pytest.fixture
def _unbuilt(_fresh_log):
    """As on a source tree that was never built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_native", None)
        patch.setattr(cpu, "_error", "cannot load the compiled module gradfused._cpu (gone): install a wheel")
        yield


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a new process with more in its environment."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ---- what there is


def test_availability():
    found = availability()
    assert set(found) == set(backends.NAMES) - {"auto"}
    for name, entry in found.items():
        assert isinstance(entry, Availability)
        assert entry.name == name
        assert entry.usable == (entry.reason is None)
    assert found["reference"].usable
    assert found["cpu"].usable
    assert found["cpu"].details["isa"] == cpu.isa()
    assert cpu.isa() in found["cpu"].details["isas"].split(", ")


@pytest.mark.usefixtures("_unbuilt")
def test_availability_of_a_tree_that_was_never_built():
    entry = availability()["cpu"]
    assert not entry.usable
    assert "cannot load the compiled module gradfused._cpu" in entry.reason
    assert entry.details == {}
    with pytest.raises(RuntimeError, match="backend 'cpu': cannot load the compiled module"):
        cpu.native()
    with pytest.raises(RuntimeError, match="backend 'cpu': cannot load the compiled module"):
        cpu.isa()


def test_the_reason_is_the_import_error_with_the_remedy():
    hide = "import sys; sys.modules['gradfused._cpu'] = None\n"
    result = run(hide + "from gradfused.backends import availability; print(availability()['cpu'].reason)")
    assert result.returncode == 0, result.stderr
    assert "cannot load the compiled module gradfused._cpu (" in result.stdout
    assert "install a wheel, or build from source with a C++17 compiler" in result.stdout


# ---- who decides


def test_auto_on_cpu_tensors(caplog):
    assert choose("auto", cpu_params()) is cpu.Table
    assert choose("auto", []) is cpu.Table
    assert caplog.records == []


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_explicit(name):
    table = choose(name, cpu_params())
    assert table is {"cpu": cpu.Table, "reference": reference.Table}[name]
    assert issubclass(table, BackendTable)


@pytest.mark.usefixtures("_unbuilt")
def test_fallback_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING, "gradfused"):
        for _ in range(3):
            assert choose("auto", cpu_params()) is reference.Table
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "using the slower reference backend: 'cpu'" in message
    assert "cannot load the compiled module gradfused._cpu (gone)" in message


@pytest.mark.usefixtures("_unbuilt")
def test_training_goes_on_without_the_compiled_module(caplog):
    model, twin_model = small_model(), small_model()
    opt = gradfused.AdamW(model.parameters(), lr=0.01, clip_norm=1e6)
    twin = torch.optim.AdamW(twin_model.parameters(), lr=0.01)
    train(model, opt, 3)
    train(twin_model, twin, 3)
    assert_same(opt, twin)
    assert len([r for r in caplog.records if r.name == "gradfused"]) == 1


@pytest.mark.usefixtures("_fresh_log")
def test_auto_on_another_device_names_what_is_missing(caplog):
    assert choose("auto", meta_params()) is reference.Table
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2
    assert "'cuda'" in messages[0]
    assert "'triton'" in messages[1]


@pytest.mark.usefixtures("_fresh_log")
def test_cpu_and_other_devices_mixed_run_on_the_reference():
    assert choose("auto", [*cpu_params(), *meta_params()]) is reference.Table


@pytest.mark.parametrize(("name", "reason"), [("cuda", "CUDA"), ("triton", "needs ")])
def test_explicit_backend_that_cannot_run(name, reason):
    model = small_model()
    opt = gradfused.AdamW(model.parameters(), backend=name)
    loss_of(model, 0).backward()
    with refuses(opt, RuntimeError, f"backend='{name}' cannot run", reason, "backend='auto'"):
        opt.step()
    assert not any(states(opt))
    opt.param_groups[0]["backend"] = "auto"
    opt.step()
    assert all(s for s in states(opt))


def test_explicit_cpu_on_another_device():
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run: .*works on CPU tensors, got one on meta"):
        choose("cpu", meta_params())


class Wrapper(torch.Tensor):
    """A tensor without memory of its own that runs every operator on another: what DTensor and quantised tensors are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrapped(x):
            return x.inner if isinstance(x, Wrapper) else x

        return func(*map(unwrapped, args), **(kwargs or {}))


class TraceableWrapper(Wrapper):
    """The same, as torch.compile wants them."""

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
    """They all have address 0, which is no overlap."""
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


def test_explicit_cpu_on_another_dtype():
    assert "got torch.int64" in cpu.refusal(torch.ones(2, dtype=torch.int64))
    assert cpu.refusal(torch.ones(2)) is None


@pytest.mark.usefixtures("_unbuilt")
def test_explicit_cpu_on_a_tree_that_was_never_built():
    model = small_model()
    opt = gradfused.AdamW(model.parameters(), backend="cpu")
    loss_of(model, 0).backward()
    with refuses(opt, RuntimeError, "backend='cpu' cannot run", "cannot load the compiled module gradfused._cpu"):
        opt.step()


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected one of auto, cuda, cpu, triton, reference, got 'tpu'"):
        choose("tpu", cpu_params())


# ---- GRADFUSED_BACKEND


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_environment_decides_where_the_code_says_auto(name, monkeypatch):
    monkeypatch.setenv("GRADFUSED_BACKEND", name)
    assert choose("auto", cpu_params()) is {"cpu": cpu.Table, "reference": reference.Table}[name]
    assert choose("cpu", cpu_params()) is cpu.Table
    assert choose("reference", cpu_params()) is reference.Table


@pytest.mark.parametrize("value", ["", "auto"])
def test_environment_may_say_nothing(value, monkeypatch):
    monkeypatch.setenv("GRADFUSED_BACKEND", value)
    assert choose("auto", cpu_params()) is cpu.Table


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_environment_asks_for_what_cannot_run(name, monkeypatch):
    monkeypatch.setenv("GRADFUSED_BACKEND", name)
    model = small_model()
    opt = gradfused.AdamW(model.parameters())
    loss_of(model, 0).backward()
    with refuses(opt, RuntimeError, f"GRADFUSED_BACKEND='{name}' cannot run"):
        opt.step()
    monkeypatch.delenv("GRADFUSED_BACKEND")
    opt.step()
    assert all(s for s in states(opt))


def test_environment_asks_for_what_does_not_exist(monkeypatch):
    monkeypatch.setenv("GRADFUSED_BACKEND", "tpu")
    with pytest.raises(ValueError, match=r"GRADFUSED_BACKEND: expected one of auto, .*, got 'tpu'"):
        choose("auto", cpu_params())


def test_environment_is_seen_by_a_whole_step(monkeypatch):
    model = small_model()
    opt = gradfused.AdamW(model.parameters())
    monkeypatch.setenv("GRADFUSED_BACKEND", "reference")
    train(model, opt, 1)
    assert isinstance(opt._seen.table, reference.Table)


# ---- GRADFUSED_CPU_ISA

STEP = """
import torch, gradfused
from gradfused.backends import availability
print(availability()["cpu"])
p = torch.nn.Parameter(torch.arange(100.0))
opt = gradfused.AdamW([p], lr=0.5, centralize="tensor", clip_norm=1.0)
p.grad = torch.arange(100.0).cos()
opt.step()
print("stepped", not torch.equal(p.detach(), torch.arange(100.0)))
"""


def test_isa_from_the_environment():
    result = run(STEP, GRADFUSED_CPU_ISA="generic")
    assert result.returncode == 0, result.stderr
    assert "'isa': 'generic'" in result.stdout
    assert "stepped True" in result.stdout


def test_unknown_isa_is_refused_not_replaced():
    result = run(STEP, GRADFUSED_CPU_ISA="avx9000")
    assert "got 'avx9000'" in result.stdout
    assert result.returncode != 0
    assert "stepped" not in result.stdout
    for fragment in ("RuntimeError: backend 'cpu' cannot run", "GRADFUSED_CPU_ISA", "generic", "got 'avx9000'"):
        assert fragment in result.stderr


def test_isa_can_be_chosen_in_the_process():
    native = cpu.native()
    for isa in native.isas():
        native.use_isa(isa)
        assert cpu.isa() == isa
        assert availability()["cpu"].details["isa"] == isa
    with pytest.raises(ValueError, match="got 'sse'"):
        native.use_isa("sse")
    assert cpu.isa() == native.isas()[-1]


def test_an_isa_that_is_refused_stops_auto_too(monkeypatch):
    """A mistake in the environment is no reason to go on slowly."""

    def isa():
        raise ValueError("GRADFUSED_CPU_ISA: this machine and build have generic, got 'mmx'")

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_native", SimpleNamespace(isa=isa))
        for name in ("auto", "cpu"):
            with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run: GRADFUSED_CPU_ISA: .* got 'mmx'"):
                choose(name, cpu_params())
        assert choose("reference", cpu_params()) is reference.Table


# ---- without OpenMP, and in another process


def test_imported_before_torch_and_without_its_openmp():
    """The native module alone: threads of its own, and no torch anywhere."""
    code = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("gradfused._cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from array import array
n = 300_000
values = [array("f", range(n)) for _ in range(3)]
addresses = [v.buffer_info()[0] for v in values]
module.roof(addresses[:2], addresses[2:], n, 2)
assert "torch" not in sys.modules
assert all(v == array("f", range(n)) for v in values)
print(module.isa(), len(module.rules()))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, cpu.native().__file__], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[0] in cpu.native().isas()


def test_a_process_forked_after_use():
    """An OpenMP pool does not survive fork; a step in the child neither hangs nor differs."""
    code = """
import os, torch, gradfused
torch.set_num_threads(2)
p = torch.nn.Parameter(torch.ones(200_000))
opt = gradfused.AdamW([p], lr=0.5, clip_norm=1.0)
p.grad = torch.arange(200_000.0).cos()
opt.step()
reader, writer = os.pipe()
child = os.fork()
opt.step()
torch.set_num_threads(1)  # torch's own operators do not survive it
value = p.detach().double().sum().item().hex()
if child == 0:
    os.write(writer, value.encode())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(reader, 100).decode() == value)
"""
    result = run(code, OMP_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"


# ---- the roof


def test_roof_keeps_every_value():
    written = [torch.arange(70_000.0) + i for i in range(3)]
    read = [torch.arange(70_000.0) for _ in range(2)]
    before = [t.clone() for t in written + read]
    cpu.roof(written, read)
    assert all(torch.equal(t, b) for t, b in zip(written + read, before, strict=True))
    cpu.roof(written, [])
    assert all(torch.equal(t, b) for t, b in zip(written, before, strict=False))


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        ([], [torch.ones(4)], "expected at least one stream to write, got none"),
        ([torch.ones(4)], [torch.ones(5)], r"of one length, got torch.float32 of shape \(5,\) on cpu"),
        ([torch.ones(4, dtype=torch.float64)], [], "contiguous float32 CPU tensors .* got torch.float64"),
        ([torch.ones(4, device="meta")], [], "on meta"),
        ([torch.ones(8)[::2]], [torch.ones(4)], "contiguous"),
    ],
)
def test_roof_refuses(written, read, message):
    with pytest.raises(ValueError, match=f"roof: .*{message}"):
        cpu.roof(written, read)


# ---- the base class


def test_a_backend_that_remembers_nothing_gets_a_new_table_each_step():
    model = small_model()
    opt = gradfused.AdamW(model.parameters(), backend="reference")
    train(model, opt, 1)
    table = opt._seen
    train(model, opt, 1, start=1)
    assert opt._seen is not table


def test_a_steady_step_keeps_its_table():
    model = small_model()
    opt = gradfused.AdamW(model.parameters(), backend="cpu", clip_norm=1.0)
    train(model, opt, 1)
    table = opt._seen
    for index in range(1, 4):
        opt.param_groups[0]["lr"] *= 0.5
        opt.param_groups[0]["clip_norm"] *= 0.5
        train(model, opt, 1, start=index)
        assert opt._seen is table


def test_choosing_changes_nothing():
    model = small_model()
    opt = gradfused.AdamW(model.parameters())
    with unchanged(opt):
        choose("auto", list(model.parameters()))
        availability()


def test_a_gradient_without_memory_is_noticed_between_steps():
    p = torch.nn.Parameter(torch.zeros(4))
    opt = gradfused.SGD([p], lr=1.0)
    p.grad = torch.ones(4)
    opt.step()
    p.grad = Wrapper(torch.ones(4))
    opt.step()
    assert torch.equal(p.detach(), torch.full((4,), -2.0))
