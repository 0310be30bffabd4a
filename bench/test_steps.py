"""`pytest bench/`: one optimizer step of a few variants, each checked before it is timed."""

from __future__ import annotations

import pytest
from gradfused.bench.cases import StepCase, Workload
from gradfused.bench.measure.check import Checker
from gradfused.bench.peers import PEERS, NoiseSource
from gradfused.bench.timing import roof_of
from pytest_benchmark.fixture import BenchmarkFixture

from .conftest import case_of

VARIANTS = ("gradfused", "torch-fused", "torch-fused-gradscale", "torch-foreach")
ROUNDS = 7


@pytest.mark.parametrize("name", VARIANTS)
def test_step(
    benchmark: BenchmarkFixture,
    workload: Workload,
    case: StepCase,
    checker: Checker,
    name: str,
) -> None:
    peer = PEERS[name]
    reason = peer.reason_against(case)
    if reason:
        pytest.skip(reason)
    verdict = checker.verdict(peer)
    assert verdict.right, f"{name} is {verdict}"
    workload.reset()
    step = peer.build(case, workload, NoiseSource())
    describe(benchmark, case)
    benchmark.pedantic(step, setup=workload.refresh, rounds=ROUNDS, warmup_rounds=2)
    note_bandwidth(benchmark, case.bytes_moved)


def test_roof(benchmark: BenchmarkFixture, workload: Workload, model: str) -> None:
    case = case_of(model, "plain")
    workload.reset()
    roof = roof_of(case, workload)
    describe(benchmark, case)
    benchmark.pedantic(roof.step, rounds=ROUNDS, warmup_rounds=2)
    note_bandwidth(benchmark, roof.moved)


def describe(benchmark: BenchmarkFixture, case: StepCase) -> None:
    """Puts variants of one case side by side."""
    benchmark.group = f"{case.model.name}, {case.recipe.name}"


def note_bandwidth(benchmark: BenchmarkFixture, moved: int) -> None:
    """Adds GB/s to the saved record, unless timing is switched off."""
    if benchmark.stats is not None:
        benchmark.extra_info["gbps"] = moved / benchmark.stats.stats.median / 1e9
