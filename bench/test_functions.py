"""`pytest bench/`: forward and backward of a few ways of computing a function, each checked before it is timed."""

from __future__ import annotations

from functools import cache

import pytest
from gradfused.bench.cases import FunctionCase, FunctionPeer
from gradfused.bench.measure.functions import FunctionChecker
from gradfused.bench.peers import FUNCTIONS, SIZES
from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 7
CASES = [
    FunctionCase(FUNCTIONS["reversal"], SIZES["token-features"]),
    FunctionCase(FUNCTIONS["lpg"], SIZES["8192x1000"]),
]


@cache
def checker_of(case: FunctionCase) -> FunctionChecker:
    """The oracle of a case, computed once."""
    return FunctionChecker(case)


@pytest.mark.parametrize(
    ("case", "way"),
    [(case, way) for case in CASES for way in case.recipe.ways if not way.opt_in],
    ids=lambda value: value.name if isinstance(value, FunctionPeer) else value.recipe.name,
)
def test_function(benchmark: BenchmarkFixture, case: FunctionCase, way: FunctionPeer) -> None:
    reason = way.reason_against(case)
    if reason:
        pytest.skip(reason)
    verdict = checker_of(case).verdict(way)
    assert verdict.right, f"{way.name} is {verdict}"
    benchmark.group = f"{case.model.name}, {case.recipe.name}"
    benchmark.pedantic(way.build(), (case.tensors(),), rounds=ROUNDS, warmup_rounds=2)
    if benchmark.stats is not None:
        benchmark.extra_info["gbps"] = case.bytes_moved / benchmark.stats.stats.median / 1e9
