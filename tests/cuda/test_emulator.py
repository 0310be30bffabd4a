"""The emulator for the CUDA sources: right kernels give what a GPU gives, and wrong ones are reported."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable

import pytest
from repository import ROOT

HERE = ROOT / "tests/support/cuda_emulator"
CXX = shlex.split(os.environ.get("CXX", "c++"))
pytestmark = pytest.mark.skipif(shutil.which(CXX[0]) is None, reason="no C++ compiler")

BUILDS = {
    "plain": ["-O2"],
    "portable": ["-O2", "-DGRADFUSED_EMULATOR_UCONTEXT"],  # the way to switch stacks on other processors
    "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}
ORDERS = ["forward", "reverse", "shuffle:1"]

Selftest = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module", params=BUILDS)
def build(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def selftest(build: str, tmp_path_factory: pytest.TempPathFactory) -> Selftest:
    """Runs one case of the self-test."""
    program = tmp_path_factory.mktemp(build) / "selftest"
    compiler = [*CXX, "-x", "c++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *BUILDS[build], "-pthread"]
    subprocess.run([*compiler, "-I", str(HERE), str(HERE / "selftest.cu"), "-o", str(program)], check=True)

    def run(case: str, order: str = "forward") -> subprocess.CompletedProcess[str]:
        settings = {"GRADFUSED_EMULATOR_ORDER": order, "ASAN_OPTIONS": "detect_stack_use_after_return=1"}
        return subprocess.run([program, case], env=os.environ | settings, capture_output=True, text=True, check=False)

    return run


def results(run: subprocess.CompletedProcess[str]) -> list[list[str]]:
    """The words of each line that a case printed. After every case a sum must be right."""
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.split("\n")
    assert lines[-3:] == ["479604 479604", "cudaSuccess", ""], run.stdout
    return [line.split() for line in lines[:-3]]


def words(*values: int) -> list[str]:
    return [str(value) for value in values]


def shuffled(lane: int) -> list[int]:
    """What a lane of a full warp finds, after the pseudo code of shfl.sync in NVIDIA's description of PTX."""
    inside = lane % 8
    return [
        5,
        lane - inside + 5,
        lane - 3 if inside >= 3 else lane,
        lane + 3 if inside < 5 else lane,
        lane ^ 5,
        lane ^ 8 if lane & 8 else lane,
        2 * (lane ^ 1),
    ]


def voted(thread: int) -> list[int]:
    low = thread % 32 < 16
    return [0xAAAAAAAA - 2**32, 0x1111 if low else 0x01010000, int(16 <= thread < 32), int(low), 7, 0, 1]


RIGHT = {
    "sum": [["479604", "479604"]],
    "sums_beside_each_other": [["959208", "959208"]],
    "turn_around": [words(*(block + i for block in (0, 32, 64) for i in reversed(range(32))))],
    "poison": [words(-1, -1, -1)],
    "shuffles": [words(*(value for lane in range(32) for value in shuffled(lane)))],
    "votes": [words(*(value for thread in range(64) for value in voted(thread)))],
    "partial_warp": [words(*(t + (t % 16 != 15) + (100 if t % 32 >= 8 else 0) for t in range(48)))],
    "atomics": [words(512, 63, -63, 42, 7), ["6"], [str(256 << 40)], ["128"]],
    "numbers": [words(0xFFFFFFFE, 310408, 0x3F800000, 30, 1, 2, 3, 4)],
}

AT = r"\(.*selftest\.cu:\d+\)"
# What is reported, in any order of turns.
WRONG = {
    "exit_before_barrier": rf"block [01]: deadlock\n  threads 40-63: exited\n  threads 0-39: wait at __syncthreads {AT}\n",
    "different_barriers": rf"thread \d+ came to __syncthreads {AT} while thread \d+ waits at __syncthreads {AT}\n",
    "different_kinds": rf"deadlock\n.*16-31: wait at __shfl_sync {AT} with mask 0xffffffff\n.*0-15: wait at __syncthreads",
    "exited_lane": r"threads 32 34-63: wait at __shfl_xor_sync .*, of which lane 1 exited\n",
    "own_lane_missing": r"thread 3 called __shfl_sync .* with mask 0xfffffff7",
    "outside_mask": r"thread 12 reads lane 16 by __shfl_down_sync .* with mask 0x0000ffff, which leaves it out\n",
    "outside_warp": r"thread 32 reads lane 16 by __shfl_xor_sync .* with mask 0x0000ffff, which leaves it out\n",
    "different_masks": r"deadlock\n.*16-31: wait at __ballot_sync .* 0xffff0001\n.*0-15: wait at __ballot_sync .* 0xffffffff\n",
    "different_shuffles": rf"thread \d+ came to __shfl_xor_sync {AT}.* while thread \d+ waits at __shfl_xor_sync {AT}",
    "odd_width": r"thread \d+ called __shfl_sync .* and width 12",
    "throws": r"kernel kernel, block 0: thread 3 threw an exception\n",
    "trap": r"kernel trap, block 0: thread 9 called __trap\(\)\n",
    "misaligned": r"thread 0 went to a misaligned address for 16 bytes\n",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels(selftest: Selftest, case: str, order: str) -> None:
    assert results(selftest(case, order)) == [*RIGHT[case], ["cudaSuccess"], []]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_kernels_are_reported_and_the_next_launch_works(selftest: Selftest, case: str, order: str) -> None:
    run = selftest(case, order)
    assert ["cudaErrorAssert"] in results(run)
    assert re.search(WRONG[case], run.stdout), run.stdout
    assert re.search(WRONG[case], run.stderr), run.stderr


@pytest.mark.parametrize("case", ["race", "block_race"])
def test_a_race_depends_on_the_order(selftest: Selftest, case: str) -> None:
    outcomes = {order: results(selftest(case, order))[0] for order in ORDERS}
    assert len({tuple(outcome) for outcome in outcomes.values()}) == len(ORDERS)
    assert [results(selftest(case, order))[0] for order in ORDERS] == list(outcomes.values())


def test_launches_that_cannot_be(selftest: Selftest) -> None:
    assert results(selftest("too_many_threads"))[0] == ["cudaErrorInvalidConfiguration"]
    # unasked for, too much asked for, asked for
    assert results(selftest("shared_limit"))[:3] == [["cudaErrorInvalidValue"], ["cudaErrorInvalidValue"], ["-1"]]


def test_writes_beyond_dynamic_shared_memory_are_seen(selftest: Selftest, build: str) -> None:
    run = selftest("beyond_shared")
    if build == "sanitized":
        assert run.returncode != 0
        assert "heap-buffer-overflow" in run.stderr
    else:
        assert results(run)[1] == ["cudaErrorIllegalAddress"]
        assert "wrote beyond its dynamic shared memory" in run.stderr


@pytest.mark.parametrize("order", ["backward", "shuffle", "shuffle:", "shuffle:x", "shuffle:1x", "forwards"])
def test_unknown_orders_are_refused(selftest: Selftest, order: str) -> None:
    run = selftest("trap", order)
    assert run.stdout.startswith("cudaErrorInvalidValue\nkernel trap: GRADFUSED_EMULATOR_ORDER")
