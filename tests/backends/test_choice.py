"""Which backend runs, who decides, and what is reported where one cannot run."""

from __future__ import annotations

import logging

import pytest
import torch
from backend_cases import cpu_params, meta_params, run
from twins import assert_same, loss_of, refuses, small_model, states, train, unchanged

import gradfused
from gradfused import backends
from gradfused.backends import Availability, availability, choose, cpu, reference
from gradfused.backends.base import Backend


@pytest.fixture
def _unbuilt(_fresh_log):
    """Makes the package look like a source tree that was never built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_native", None)
        patch.setattr(cpu, "_error", "cannot load the compiled module gradfused._cpu (gone): install a wheel")
        yield


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
    assert choose("auto", cpu_params()) is cpu.CpuBackend
    assert choose("auto", []) is cpu.CpuBackend
    assert caplog.records == []


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_explicit(name):
    table = choose(name, cpu_params())
    assert table is {"cpu": cpu.CpuBackend, "reference": reference.ReferenceBackend}[name]
    assert issubclass(table, Backend)


@pytest.mark.usefixtures("_unbuilt")
def test_fallback_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING, "gradfused"):
        for _ in range(3):
            assert choose("auto", cpu_params()) is reference.ReferenceBackend
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
    assert choose("auto", meta_params()) is reference.ReferenceBackend
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2
    assert "'cuda'" in messages[0]
    assert "'triton'" in messages[1]


@pytest.mark.usefixtures("_fresh_log")
def test_cpu_and_other_devices_mixed_run_on_the_reference():
    assert choose("auto", [*cpu_params(), *meta_params()]) is reference.ReferenceBackend


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
