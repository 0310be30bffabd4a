"""Environment variables for backends and instruction sets, and backends without torch or after a fork."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from backend_cases import cpu_params, run
from twins import loss_of, refuses, small_model, states, train

import gradfused
from gradfused.backends import availability, choose, cpu, reference

# ---- GRADFUSED_BACKEND


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_environment_decides_where_the_code_says_auto(name, monkeypatch):
    monkeypatch.setenv("GRADFUSED_BACKEND", name)
    assert choose("auto", cpu_params()) is {"cpu": cpu.CpuBackend, "reference": reference.ReferenceBackend}[name]
    assert choose("cpu", cpu_params()) is cpu.CpuBackend
    assert choose("reference", cpu_params()) is reference.ReferenceBackend


@pytest.mark.parametrize("value", ["", "auto"])
def test_environment_may_say_nothing(value, monkeypatch):
    monkeypatch.setenv("GRADFUSED_BACKEND", value)
    assert choose("auto", cpu_params()) is cpu.CpuBackend


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
    assert isinstance(opt._seen.backend, reference.ReferenceBackend)


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
    """A mistake in the environment is reported instead of running slowly."""

    def isa():
        raise ValueError("GRADFUSED_CPU_ISA: this machine and build have generic, got 'mmx'")

    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_native", SimpleNamespace(isa=isa))
        for name in ("auto", "cpu"):
            with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot run: GRADFUSED_CPU_ISA: .* got 'mmx'"):
                choose(name, cpu_params())
        assert choose("reference", cpu_params()) is reference.ReferenceBackend


# ---- without OpenMP, and in another process


def test_imported_before_torch_and_without_its_openmp():
    """The native module alone has threads of its own and needs no torch."""
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
