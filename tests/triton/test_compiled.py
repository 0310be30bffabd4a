"""The Triton kernels compiled ahead of time: no spill in a hot loop, and accesses of 16 bytes. No GPU is needed."""

from __future__ import annotations

import subprocess

import pytest
from triton_interpreter import uninterpreted

from gradfused.backends import triton

pytestmark = pytest.mark.skipif(triton.missing() is not None, reason=str(triton.missing()))


@pytest.fixture(scope="module")
def checked() -> subprocess.CompletedProcess[str]:
    return uninterpreted("check_triton.py")


def test_no_hot_loop_spills_and_no_access_is_narrow(checked: subprocess.CompletedProcess[str]) -> None:
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "FAULT" not in checked.stdout


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_both_kernels_compile_for(target: str, checked: subprocess.CompletedProcess[str]) -> None:
    lines = [line for line in checked.stdout.splitlines() if line.startswith(target)]
    if "left out" in lines[0]:
        pytest.skip(lines[0])
    assert {"apply", "stats"} == {word for line in lines for word in line.split() if word in ("apply", "stats")}
