"""``python -m gradfused`` says what this installation can run, and why not the rest."""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import sys

import pytest
import torch

import gradfused
from gradfused.__main__ import report
from gradfused.backends import availability, cpu


def test_report():
    text = report()
    assert text.startswith(f"gradfused {gradfused.__version__}, torch {torch.__version__}")
    assert platform.python_version() in text
    assert f"threads    {torch.get_num_threads()}" in text
    for name, backend in availability().items():
        line = next(line for line in text.splitlines() if line.split()[:1] == [name])
        assert ("runs" if backend.usable else backend.reason) in line
    assert f"isa {cpu.isa()}" in text


def test_an_instruction_set_the_machine_lacks_is_reported_not_raised():
    result = subprocess.run(
        [sys.executable, "-m", "gradfused"],
        env=os.environ | {"GRADFUSED_CPU_ISA": "mmx"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.startswith(f"gradfused {gradfused.__version__}")
    assert "missing: GRADFUSED_CPU_ISA" in result.stdout
    assert "'mmx'" in result.stdout


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_tree_that_was_never_built_is_reported_with_the_remedy(capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_native", None)
        patch.setattr(cpu, "_error", "cannot load the compiled module gradfused._cpu (gone): install a wheel")
        runpy.run_module("gradfused", run_name="__main__")
    assert "missing: cannot load the compiled module gradfused._cpu (gone): install a wheel" in capsys.readouterr().out


def test_version_is_one_and_the_same():
    assert gradfused.__version__ == gradfused._version.__version__
    assert set(gradfused.__all__) >= {"SGD", "Adam", "AdamW", "__version__"}
