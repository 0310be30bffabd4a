"""What the build finds out about nvcc, and what it says where no nvcc will do."""

from __future__ import annotations

import re
from pathlib import Path

import nvcc
import pytest

# What one of CUDA 12.4 prints, on a machine where the runtime's folder is `home`.
NVCC = """\
#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {release}, V{release}.99" ;;
  *--list-gpu-arch*) printf 'compute_80\\ncompute_90\\ncompute_100\\n' ;;
  *--dryrun*) echo '#$ INCLUDES="-I{home}/bin/../include"  ' >&2; echo '#$ LIBRARIES=  "-L{home}/lib"' >&2 ;;
  *) echo "{complaint}" >&2; exit {status} ;;
esac
"""


def fake(
    monkeypatch: pytest.MonkeyPatch, home: Path, *, release: str = "12.4", complaint: str = "", runtime: bool = True
) -> None:
    program = home / "fake-nvcc"
    program.write_text(NVCC.format(release=release, home=home, complaint=complaint, status=int(bool(complaint))))
    program.chmod(0o755)
    if runtime:
        (home / "lib").mkdir()
        (home / "lib" / nvcc.RUNTIME).touch()
    monkeypatch.setenv("CUDACXX", str(program))


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "GRADFUSED_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvcc, "local_archs", lambda: "")


def test_a_toolkit_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake(monkeypatch, tmp_path)
    toolkit = nvcc.find(["c++"])
    assert toolkit.command == (str(tmp_path / "fake-nvcc"), "-ccbin", "c++")
    assert toolkit.include_dirs == (f"{tmp_path}/include",)
    assert toolkit.runtime == f"{tmp_path}/lib/{nvcc.RUNTIME}"
    assert toolkit.archs_text == nvcc.DEFAULT_ARCHS


@pytest.mark.parametrize("wish", ["80 90+PTX", "8.0;9.0+ptx", "90, 80 +PTX"])
def test_targets_may_be_spelt_in_several_ways(wish: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake(monkeypatch, tmp_path)
    monkeypatch.setenv("GRADFUSED_CUDA_ARCHS", wish)
    toolkit = nvcc.find(["c++"])
    assert toolkit.archs_text == "80 90+PTX"
    assert toolkit.target_flags == (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    )


def test_targets_that_nvcc_does_not_know_are_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fake(monkeypatch, tmp_path)
    monkeypatch.setenv("GRADFUSED_CUDA_ARCHS", "all")
    assert nvcc.find(["c++"]).archs_text == "80 90 100+PTX"
    assert "does not know compute capability 86, 89, 120: left out" in capsys.readouterr().out


def test_the_gpus_at_hand_are_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake(monkeypatch, tmp_path)
    monkeypatch.setattr(nvcc, "local_archs", lambda: "8.0 8.0 9.0")
    assert nvcc.find(["c++"]).archs_text == "80 90"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"release": "10.2"}, "is of CUDA 10.2, the kernels need 11.7 or later"),
        ({"release": "unknown"}, "says no release"),
        ({"complaint": "error: #error -- unsupported GNU version!"}, "name an older C++ compiler in CXX or NVCC_CCBIN"),
        ({"complaint": "error: cuda_runtime.h: No such file"}, "install the CUDA runtime's development files"),
        ({"complaint": "error: it is Monday"}, "cannot compile: error: it is Monday"),
        ({"runtime": False}, f"has no {nvcc.RUNTIME}"),
    ],
)
def test_what_is_missing_is_said(how: dict, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake(monkeypatch, tmp_path, **how)
    with pytest.raises(nvcc.Unavailable, match=re.escape(said)):
        nvcc.find(["c++"])


@pytest.mark.parametrize(
    ("wish", "said"), [("native", "shows no GPU"), ("37", "knows none of compute capabilities 37")]
)
def test_targets_that_cannot_be_built(wish: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake(monkeypatch, tmp_path)
    monkeypatch.setenv("GRADFUSED_CUDA_ARCHS", wish)
    with pytest.raises(nvcc.Unavailable, match=re.escape(said)):
        nvcc.find(["c++"])


def test_a_misspelt_target_ends_the_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fake(monkeypatch, tmp_path)
    monkeypatch.setenv("GRADFUSED_CUDA_ARCHS", "sm_90")
    with pytest.raises(SystemExit, match=r"'SM_90'.*as in 80 90"):
        nvcc.find(["c++"])


def test_an_nvcc_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    with pytest.raises(nvcc.Unavailable, match="CUDACXX names '/nowhere/nvcc'"):
        nvcc.find(["c++"])
    monkeypatch.delenv("CUDACXX")
    monkeypatch.setattr(nvcc.shutil, "which", lambda name: None)
    with pytest.raises(nvcc.Unavailable, match="found no nvcc"):
        nvcc.find(["c++"])
