"""How the benchmark takes time on a GPU, tested on a CPU with made-up clocks and graphs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench_cases import CPU, TINY, tiny_case, workload_of
from gradfused.bench import cli, commands
from gradfused.bench.cases import MODELS, OURS, ROOF, RULES, Workload, bytes_needed, make_sets, sets_needed
from gradfused.bench.cases.steps import MAX_SETS
from gradfused.bench.measure import EVENTS, CaseResult, Results, measure_step
from gradfused.bench.measure.results import GRAPH
from gradfused.bench.measure.running import first_of, told
from gradfused.bench.peers import PEERS, StepPeer
from gradfused.bench.peers.in_torch import torch_optimizer
from gradfused.bench.timing import Budget, Clock, Meter, Series, Step, cuda, in_turn, interleave
from gradfused.bench.timing.roof import copy_on

H200_L2 = 60 << 20

# ---- sets of tensors that rotate past the cache


@pytest.mark.parametrize(
    ("set_bytes", "cache_bytes", "expected"),
    [(100, 0, 1), (100, 49, 1), (100, 50, 2), (100, 1000, 21), (1 << 30, 60 << 20, 1), (1, 1 << 30, MAX_SETS)],
)
def test_sets_overflow_the_cache_twice(set_bytes, cache_bytes, expected):
    assert sets_needed(set_bytes, cache_bytes) == expected
    if cache_bytes and expected < MAX_SETS:
        assert expected * set_bytes > 2 * cache_bytes >= (expected - 1) * set_bytes


def test_only_small_models_rotate_on_an_h200():
    counts = {
        name: sets_needed(bytes_needed(model.elements, RULES["adamw"], torch.float32), H200_L2)
        for name, model in MODELS.items()
    }
    assert counts == {"small-400": 38, "resnet50": 1, "vit-b16": 1, "gpt2": 1, "llama-1b": 1}


def test_sets_have_memory_of_their_own():
    sets = make_sets(tiny_case(), cache_bytes=2 * 16 * TINY.elements)
    assert len(sets) == 5
    assert len({workload.weights.flat.data_ptr() for workload in sets}) == 5
    assert len(make_sets(tiny_case(), cache_bytes=0)) == 1


def test_steps_are_taken_in_turn():
    taken: list[int] = []
    step = in_turn([lambda number=number: taken.append(number) for number in range(3)])
    for _ in range(7):
        step()
    assert taken == [0, 1, 2, 0, 1, 2, 0]

    def only() -> None: ...

    assert in_turn([only]) is only


# ---- timing with a device clock


def made_up_clock(ms: float, calls: list[int]) -> Clock:
    """A clock that takes the steps and then claims that each call took `ms`."""

    def read(step: Step, count: int) -> float:
        for _ in range(count):
            step()
        calls.append(count)
        return ms

    return Clock(read, burst_ms=10.0, least=5, most=200)


def test_a_call_that_holds_many_steps_is_timed_by_the_step():
    calls: list[int] = []
    clock = made_up_clock(66.0, calls)
    samples = interleave({"graph": Series(lambda: None, clock, holds=33)}, budget=Budget(rounds=2))
    assert samples["graph"].values == [2.0, 2.0]
    assert calls == [1, 1, 1, 1]


def test_samples_on_a_gpu_are_of_several_steps():
    series = Series(lambda: None, made_up_clock(0.0, []))
    assert series.calls(7.0) == 5
    assert series.calls(1.0) == 10
    assert series.calls(0.001) == 200
    assert replace(series, holds=38).calls(0.001) == 6  # 200 steps, in whole graphs
    assert replace(series, holds=38).lead_in(1.0) == 0  # 38 ms of work leave nothing in cache
    assert series.lead_in(1.0) == 1


class FakeEvent:
    """A CUDA event on a clock that the steps of a test move."""

    log: list[str]
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = 0.0

    def record(self) -> None:
        type(self).log.append("record")
        self.at = type(self).now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@pytest.fixture
def log(monkeypatch) -> list[str]:
    """What a clock did, recorded by a made-up torch.cuda."""
    entries: list[str] = []
    FakeEvent.log, FakeEvent.now = entries, 0.0
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: entries.append("synchronize"))
    return entries


def test_events_are_read_when_the_device_is_done(log):
    def step() -> None:
        log.append("step")
        FakeEvent.now += 3.0

    assert cuda.read_events(step, 4) == 3.0
    assert log == ["synchronize", "record", *["step"] * 4, "record", "synchronize"]


def test_the_wall_clock_starts_and_ends_on_an_idle_device(log, monkeypatch):
    ticks = iter([1.0, 1.006])

    def now() -> float:
        log.append("clock")
        return next(ticks)

    monkeypatch.setattr(cuda.time, "perf_counter", now)
    assert cuda.read_wall(lambda: log.append("step"), 2) == pytest.approx(3.0)
    assert log == ["synchronize", "clock", "step", "step", "synchronize", "clock"]


# ---- capturing


class FakeGraph:
    """A CUDA graph that counts its replays."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch) -> list[tuple[FakeGraph, int]]:
    """The graphs captured without an error by a made-up torch.cuda, each with its pool."""
    captured: list[tuple[FakeGraph, int]] = []
    pools = iter(range(9))
    here = SimpleNamespace(current="usual", device=CPU)

    @contextmanager
    def graph(graph: FakeGraph, pool: int) -> Iterator[None]:
        here.current = "capturing"
        yield  # torch's own leaves its stream current too when a step raises
        here.current = "usual"
        captured.append((graph, pool))

    for name, value in {
        "CUDAGraph": FakeGraph,
        "graph": graph,
        "graph_pool_handle": lambda: next(pools),
        "current_stream": lambda: SimpleNamespace(device=CPU, name=here.current),
        "set_stream": lambda stream: setattr(here, "current", stream.name),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return captured


def test_a_capture_holds_every_step_and_is_replayed(graphs):
    taken: list[str] = []
    capture = cuda.Capture()
    replay = capture([lambda: taken.append("a"), lambda: taken.append("b")])
    replay()
    replay()
    assert taken == ["a", "b"]
    assert replay.graph.replays == 2
    capture([lambda: None])
    assert [pool for _, pool in graphs] == [0, 0]


def test_a_failed_capture_leaves_nothing_behind(graphs):
    def wait() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    capture = cuda.Capture()
    with pytest.raises(RuntimeError, match="not permitted"):
        capture([wait])
    assert torch.cuda.current_stream().name == "usual"
    capture([lambda: None])
    assert [pool for _, pool in graphs] == [1, 1]  # one to mend what the first left, in a new pool


def test_the_reason_is_the_first_error():
    error = RuntimeError("capture invalidated")
    error.__context__ = ValueError("a step waits\nfor the device")
    assert told(error) == "RuntimeError: capture invalidated"
    assert told(first_of(error)) == "ValueError: a step waits"


@pytest.mark.parametrize("rule", ["adamw", "adam", "sgd-momentum", "sgd"])
def test_torch_is_told_that_it_will_be_captured(rule):
    case = tiny_case(rule=rule)
    optimizer = torch_optimizer(replace(case, captured=True), workload_of(case), foreach=True)
    assert optimizer.defaults.get("capturable") is (None if "sgd" in rule else True)
    assert not torch_optimizer(case, workload_of(case), foreach=True).defaults.get("capturable")


# ---- a case from end to end, on a device that is not there


def capture_here(steps: Sequence[Step]) -> Step:
    return lambda: [step() for step in steps]


def refuse_to_capture(steps: Sequence[Step]) -> Step:
    raise RuntimeError("no graphs here\nat all")


def fused_here() -> StepPeer:
    """torch's fused step; on a CPU it could not be captured as it is on a GPU."""
    return replace(PEERS["torch-fused"], rebuilds=False)


def measured(capture: Callable[[Sequence[Step]], Step], *others: StepPeer) -> tuple[CaseResult, list[Workload]]:
    meter = Meter(made_up_clock(4.0, []), made_up_clock(6.0, []), capture, cache_bytes=2 * 16 * TINY.elements)
    case = tiny_case()
    sets = make_sets(case, meter.cache_bytes)
    return measure_step(case, sets, [PEERS[OURS], *others], Budget(rounds=3), meter=meter), sets


@pytest.fixture(scope="module")
def on_gpu() -> tuple[CaseResult, list[Workload]]:
    waits = replace(fused_here(), name="waits", uncapturable="it waits")
    return measured(capture_here, fused_here(), waits, replace(PEERS["torch-loop"], name="rebuilt"))


def test_both_times_are_recorded(on_gpu):
    result, sets = on_gpu
    assert len(sets) == 5
    ours, fused = result.of(OURS), result.of("torch-fused")
    for record in (ours, fused):
        assert record.ms_median == 4.0
        assert (record.ms_device_p20, record.ms_device, record.ms_device_p80) == (1.2, 1.2, 1.2)  # 6 ms, 5 steps
        assert record.device_clock == GRAPH
        assert record.gbps == pytest.approx(32 * TINY.elements / 1.2 / 1e6, abs=0.01)
        assert record.roof_gbps == result.of(ROOF).gbps
    assert result.of(ROOF).ms_device is None


def test_who_cannot_be_captured_is_timed_by_events(on_gpu):
    result, _ = on_gpu
    waits = result.of("waits")
    assert (waits.ms_device, waits.device_clock) == (6.0, EVENTS)
    assert result.uncaptured["waits"] == "it waits"
    assert result.of("rebuilt").device_clock == EVENTS  # torch's loop, capturable: CUDA only
    assert "capturable" in result.uncaptured["rebuilt"]
    assert OURS not in result.uncaptured


def test_every_set_is_stepped(on_gpu):
    _, sets = on_gpu
    pattern = sets[0].pattern * 10
    for workload in sets:
        assert not torch.equal(workload.weights.flat[:100], pattern[:100])


def test_a_failed_capture_costs_only_the_graph():
    result, _ = measured(refuse_to_capture)
    assert result.of(OURS).device_clock == EVENTS
    assert result.uncaptured == {OURS: "capturing failed: RuntimeError: no graphs here"}


def test_what_compiles_for_minutes_takes_no_turns():
    result, _ = measured(capture_here, replace(PEERS["torch-fused"], name="compiled", compiles=True))
    assert result.of("compiled") is None
    assert "compiles anew for each of the 5 sets" in result.skipped[0].reason


def test_a_run_takes_sets_in_turn(monkeypatch, tmp_path):
    small = bytes_needed(MODELS["small-400"].elements, RULES["adamw"], torch.float32)
    clocks = Meter(made_up_clock(4.0, []), made_up_clock(6.0, []), capture_here, cache_bytes=small)
    monkeypatch.setattr(commands, "meter_for", lambda device: clocks)
    path = tmp_path / "out.json"
    options = ("--models", "small-400", "--recipes", "plain,clip", "--peers", "none", "--steps", "1")
    assert cli.main([*options, "--json", str(path)]) == 0
    rows = [row for row in json.loads(path.read_text())["records"] if row["variant"] == OURS]
    assert [(row["recipe"], row["ms_median"], row["ms_device"]) for row in rows] == [
        ("plain", 4.0, 2.0),
        ("clip", 4.0, 2.0),
    ]


def test_json_has_the_devices_times_where_there_are_any(on_gpu, tmp_path):
    result, _ = on_gpu
    Results({}, [result], left_out=[{"model": "x", "dtype": "float32", "reason": "huge"}]).write_json(tmp_path / "a")
    data = json.loads((tmp_path / "a").read_text())
    rows = {row["variant"]: row for row in data["records"]}
    assert rows[OURS]["ms_device"] == 1.2
    assert rows[OURS]["device_clock"] == "graph"
    assert "ms_device" not in rows[ROOF]
    assert {row["variant"]: row["reason"] for row in data["uncaptured"]}["waits"] == "it waits"
    assert data["left_out"][0]["reason"] == "huge"
    Results({}, [result]).write_csv(tmp_path / "b")
    assert "ms_device_p20" in (tmp_path / "b").read_text()


def test_the_roof_of_a_gpu_is_a_copy():
    roof = copy_on(CPU, largest=1 << 16)
    assert roof.moved == 2 << 16
    assert torch.equal(roof.step(), roof.step())
