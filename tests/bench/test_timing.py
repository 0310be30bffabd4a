"""How the benchmark takes time, and a case from end to end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_cases import TINY, forgets, tiny_case, workload_of
from gradfused.bench.cases import FUSED_PLAIN, OURS, ROOF
from gradfused.bench.measure import CaseResult, measure_step
from gradfused.bench.peers import PEERS, StepPeer
from gradfused.bench.timing import Budget, Clock, CpuWatch, Samples, Series, interleave, usable_cpus
from gradfused.bench.timing import rounds as timing
from gradfused.bench.timing.machine import TICKS, busy_seconds
from gradfused.bench.timing.roof import sweep

# ---- timing


def scripted_clock(times: dict[object, float], calls: list[object]) -> Clock:
    def read(step, count):
        calls.append(step)
        return times[step]

    return Clock(read)


def test_variants_take_turns_and_slow_ones_sit_out():
    def fast() -> None: ...
    def slow() -> None: ...

    calls: list[object] = []
    rounds: list[int] = []
    clock = scripted_clock({fast: 50.0, slow: 500.0}, calls)
    samples = interleave(
        {"fast": Series(fast, clock), "slow": Series(slow, clock)},
        budget=Budget(seconds=1.0),  # three rounds' worth by the script, so the fewest are taken
        on_round=lambda done, total: rounds.append(done),
    )
    assert rounds == list(range(1, timing.MIN_ROUNDS + 1))
    assert len(samples["fast"].values) == 9
    assert len(samples["slow"].values) == 5
    assert set(calls[4:6]) == {fast, slow}


def test_fixed_rounds_are_exact_and_refreshed():
    refreshed: list[int] = []

    def step() -> None: ...

    samples = interleave({"only": Series(step)}, budget=Budget(rounds=3), refresh=lambda: refreshed.append(1))
    assert len(samples["only"].values) == 3
    assert len(refreshed) == 4


def test_budget_follows_the_time_there_is():
    assert Budget(seconds=1.0).rounds_of(50.0) == 20
    assert Budget(seconds=1.0).rounds_of(1e4) == timing.MIN_ROUNDS
    assert Budget(seconds=1e6).rounds_of(50.0) == timing.MAX_ROUNDS
    assert Budget(seconds=1.0, rounds=30).rounds_of(50.0) == 30
    assert Budget(seconds=1.0).spent(9, 2.0)
    assert not Budget(seconds=1.0).spent(5, 2.0)
    assert Budget(seconds=1.0).spent(5, 4.0)
    assert not Budget(seconds=1.0).spent(4, 99.0)
    assert not Budget(seconds=1.0, rounds=30).spent(20, 99.0)


def test_short_steps_are_timed_in_bursts():
    series = Series(lambda: None)
    assert series.calls(0.1) == timing.HOST.most
    assert series.calls(1.0) == 2
    assert series.calls(500.0) == 1
    assert series.lead_in(1.0) == 1
    assert series.lead_in(500.0) == 0
    assert series.cost(1.0) == 3.0


def test_quantiles_interpolate():
    samples = Samples([5.0, 1.0, 2.0, 3.0, 4.0])
    assert samples.median == 3.0
    assert samples.quantile(0.2) == pytest.approx(1.8)


def test_other_programs_are_noticed(tmp_path):
    stat, cpus = tmp_path / "stat", usable_cpus()
    lines = [f"cpu{number} 1 2 3 50 60 4 5 6 7 8" for number in cpus]
    stat.write_text("\n".join(["cpu 9 9 9 9", *lines, "intr 1"]))
    assert busy_seconds(stat) == 21 * len(cpus) / TICKS
    assert busy_seconds(tmp_path / "none") is None
    share = CpuWatch().share_of_others()
    assert share is None or 0 <= share <= 1


# ---- a case from end to end


@pytest.fixture(scope="module")
def clip_result() -> CaseResult:
    def explode(case, workload, source):
        raise RuntimeError("no such kernel\nand more")

    peers = [
        *(PEERS[name] for name in (OURS, "torch-loop", "torch-fused")),
        replace(forgets(weight_decay=0.0), name="forgetful"),
        StepPeer("broken", "", explode),
        StepPeer("elsewhere", "", explode, absent=lambda: "not installed"),
    ]
    case = tiny_case()
    return measure_step(case, [workload_of(case)], peers, Budget(rounds=3))


def test_right_variants_get_records(clip_result):
    assert [r.variant for r in clip_result.records] == [
        OURS,
        "torch-loop",
        "torch-fused",
        FUSED_PLAIN,
        ROOF,
    ]
    for r in clip_result.records:
        assert 0 < r.ms_p20 <= r.ms_median <= r.ms_p80
        assert (r.elements, r.tensors) == (TINY.elements, 3)


def test_bandwidth_is_the_budget_by_the_median(clip_result):
    ours, roof = clip_result.records[0], clip_result.records[-1]
    # Times are rounded to 0.1 us, GB/s to 0.01.
    assert ours.gbps == pytest.approx(32 * TINY.elements / ours.ms_median / 1e6, rel=0.01, abs=0.01)
    assert roof.gbps == roof.roof_gbps == ours.roof_gbps


def test_wrong_and_broken_variants_are_not_timed(clip_result):
    reasons = {skip.variant: skip.reason for skip in clip_result.skipped}
    assert reasons["forgetful"].startswith("wrong (err ")
    assert reasons["broken"] == "failed: RuntimeError: no such kernel"
    assert reasons["elsewhere"] == "not installed"
    assert {skip.variant for skip in clip_result.skipped if skip.everywhere} == {"elsewhere"}


def test_competitors_are_peers_of_the_same_job(clip_result):
    assert {r.variant for r in clip_result.competitors()} == {"torch-loop", "torch-fused"}


# ---- the roof


def test_roof_keeps_every_value():
    written = [torch.arange(70_000.0) + i for i in range(3)]
    read = [torch.arange(70_000.0) for _ in range(2)]
    before = [t.clone() for t in written + read]
    sweep(written, read)
    assert all(torch.equal(t, b) for t, b in zip(written + read, before, strict=True))
    sweep(written, [])
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
        sweep(written, read)
