"""What is read of NVIDIA's, AMD's and Intel's GPUs, with made-up answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradfused import gpu
from gradfused.backends import choose_name, triton

CPU, CUDA, XPU = torch.device("cpu"), torch.device("cuda", 1), torch.device("xpu", 1)


def answer(monkeypatch: pytest.MonkeyPatch, module: Any, **answers: Any) -> None:
    for name, value in answers.items():
        monkeypatch.setattr(module, name, lambda *_, value=value: value, raising=False)


def tensor_on(device: torch.device) -> Any:
    storage = SimpleNamespace(device=device)
    return SimpleNamespace(
        device=device, dtype=torch.float32, numel=lambda: 1, data_ptr=lambda: 16, untyped_storage=lambda: storage
    )


@pytest.fixture(autouse=True)
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    triton._programs.cache_clear()
    yield
    triton._programs.cache_clear()


@pytest.mark.parametrize("device", [CUDA, XPU], ids=str)
def test_a_gpu_is_asked_by_the_module_of_its_kind(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.get_device_module(device)
    answer(monkeypatch, module, device=nullcontext("selected"), current_stream="stream", get_device_properties="all")
    with gpu.selected(device) as selected:
        assert selected == "selected"
    assert gpu.current_stream(device) == "stream"
    assert gpu.properties(device) == "all"
    assert gpu.holds(tensor_on(device))


def test_the_cpu_is_no_gpu() -> None:
    assert not gpu.holds(torch.zeros(1))
    assert gpu.current_stream(CPU) is None
    with gpu.selected(CPU) as selected:
        assert selected is None


@pytest.mark.parametrize("module", [torch.cuda, torch.xpu], ids=["cuda", "xpu"])
def test_a_capture_is_seen_on_a_gpu_that_is_in_use(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (torch.cuda, torch.xpu):
        answer(monkeypatch, each, is_initialized=False, is_current_stream_capturing=False)
    answer(monkeypatch, module, is_current_stream_capturing=True)
    assert not gpu.capturing()
    answer(monkeypatch, module, is_initialized=True)
    assert gpu.capturing()


def test_a_torch_without_graphs_for_intel_captures_none(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, torch.cuda, is_initialized=False)
    answer(monkeypatch, torch.xpu, is_initialized=True)
    monkeypatch.delattr(torch.xpu, "is_current_stream_capturing", raising=False)
    assert not gpu.capturing()


@pytest.mark.parametrize("module", [torch.cuda, torch.xpu], ids=["cuda", "xpu"])
def test_triton_runs_on_either(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "missing", lambda: None)
    for each in (torch.cuda, torch.xpu):
        answer(monkeypatch, each, is_available=False)
    assert not triton.availability().usable
    answer(monkeypatch, module, is_available=True)
    assert triton.availability().usable


def test_triton_refuses_what_is_on_no_gpu_or_on_one_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, torch.cuda, get_device_properties=SimpleNamespace(multi_processor_count=132))
    assert triton.refusal(tensor_on(CUDA)) is None
    assert triton.refusal(tensor_on(CPU)) == "works on CUDA and XPU tensors, got one on cpu"
    answer(monkeypatch, torch.xpu, get_device_properties=SimpleNamespace(name="Max 1550", has_fp64=True))
    assert triton.refusal(tensor_on(XPU)) is None
    answer(monkeypatch, torch.xpu, get_device_properties=SimpleNamespace(name="Arc A770", has_fp64=False))
    assert triton.refusal(tensor_on(XPU)) == "sums norms in float64, which Arc A770 cannot"


def test_no_warning_says_on_intel_that_cuda_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answer(monkeypatch, torch.xpu, is_available=True, get_device_properties=SimpleNamespace(name="Max", has_fp64=True))
    monkeypatch.setattr(triton, "missing", lambda: None)
    assert choose_name("auto", [tensor_on(XPU)]) == "triton"
    assert not caplog.records


@pytest.mark.parametrize(
    ("triton_version", "numpy", "able"),
    [("3.6.0", "2.4.6", False), ("3.6.0+git1", "2.3.5", True), ("3.9.0", "2.4.6", True), (None, "2.4.6", True)],
)
def test_where_the_interpreter_cannot_run_the_reason_is_numpy(
    triton_version: str | None, numpy: str, able: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        found = {"triton": triton_version, "numpy": numpy}[package]
        if found is None:
            raise PackageNotFoundError(package)
        return found

    monkeypatch.setattr(triton, "version", version)
    monkeypatch.setattr(triton, "find_spec", lambda name: name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    expected = None if able else "Triton 3.6.0 interprets with NumPy before 2.4, found 2.4.6"
    assert triton.availability().reason == expected


def test_as_many_programs_are_launched_as_a_gpu_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, torch.cuda, get_device_properties=SimpleNamespace(multi_processor_count=132))
    answer(monkeypatch, torch.xpu, get_device_properties=SimpleNamespace(gpu_subslice_count=64))
    assert triton._programs(CUDA, full=False) == 132 * triton.LEAN_PROGRAMS
    assert triton._programs(CUDA, full=True) == 132 * triton.FULL_PROGRAMS
    assert triton._programs(XPU, full=True) == 64 * triton.XE_PROGRAMS
