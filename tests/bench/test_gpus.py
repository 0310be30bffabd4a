"""The benchmark on a GPU except its timing, tested on a CPU: peers, refusals, the machine, the report and the targets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_cases import CPU, CUDA, forgets, result_of, tiny_case
from gradfused.bench import cli, peers, request
from gradfused.bench.cases import FUSED_PLAIN, MODELS, OURS, RECIPES, ROOF, RULES
from gradfused.bench.measure import EVENTS, CaseResult, Results
from gradfused.bench.measure import steps as runner
from gradfused.bench.measure.check import Checker
from gradfused.bench.measure.results import GRAPH
from gradfused.bench.measure.steps import memory_reason
from gradfused.bench.peers import PEERS, StepPeer, chosen_peers
from gradfused.bench.peers.packages import decay_after_update
from gradfused.bench.report import print_case, print_closing, sentence, targets
from gradfused.bench.report.tables import environment_line
from gradfused.bench.request import Request
from gradfused.bench.timing import cuda
from rich.console import Console

from gradfused.backends import Availability

H200_L2 = 60 << 20
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=H200_L2,
    total_memory=150 << 30,
    uuid="1234-abcd",
)

# ---- peers


def usable(*names: str) -> Callable[[], dict[str, Availability]]:
    everyone = ("cpu", "cuda", "triton", "reference")
    return lambda: {name: Availability(name, None if name in names else "is not here") for name in everyone}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cuda", "triton"), "cuda"),
        (("triton",), "triton"),
        ((), "reference"),
    ],
)
def test_gradfused_appears_once_a_backend(names, expected, monkeypatch):
    monkeypatch.delenv("GRADFUSED_BACKEND", raising=False)
    monkeypatch.setattr(peers, "availability", usable(*names))
    monkeypatch.setattr("gradfused.bench.peers.in_torch.availability", usable(*names))
    assert peers.backend_on(CUDA) == expected
    columns = [peer.name for peer in chosen_peers(None, CUDA) if peer.name.startswith(OURS)]
    assert columns == [OURS, *(f"{OURS}-{name}" for name in ("cuda", "triton") if name != expected)]
    on_gpu = replace(tiny_case(), device=CUDA)
    runs = [name for name in columns if PEERS[name].reason_against(on_gpu) is None]
    assert runs == [OURS, *(f"{OURS}-{name}" for name in names if name != expected)]


def test_a_cpu_hears_of_no_gpu_backends():
    names = {peer.name for peer in chosen_peers(None, CPU)}
    assert not names & {f"{OURS}-cuda", f"{OURS}-triton", "transformer-engine", "deepspeed-fusedadam"}
    assert "deepspeed-cpuadam" in names
    gpu_names = {peer.name for peer in chosen_peers(None, CUDA)}
    assert {"apex", "bitsandbytes", "optimi", "transformer-engine", "deepspeed-fusedadam"} <= gpu_names
    assert "deepspeed-cpuadam" not in gpu_names
    assert PEERS[f"{OURS}-triton"].unable(tiny_case()) == "runs on CUDA only"


@pytest.mark.parametrize("name", ["transformer-engine", "deepspeed-fusedadam", "apex", "bitsandbytes"])
def test_fused_adams_name_what_they_lack(name):
    case = replace(tiny_case(), device=CUDA)
    assert PEERS[name].unable(case) is None
    assert PEERS[name].unable(replace(case, dtype=torch.float64)) == "has no float64"
    assert PEERS[name].unable(replace(case, rule=RULES["sgd"])) == "has no sgd"


def decays_last(**changes: object) -> StepPeer:
    """AdamW that decays the weights after the update."""

    def build(case, workload, source):
        bare = replace(case, weight_decay=0.0, **changes)
        step = PEERS["torch-loop"].build(bare, workload, source)

        @torch.no_grad()
        def then_decay() -> None:
            step()
            for param in workload.params:
                param.mul_(1 - case.lr * case.weight_decay)

        return then_decay

    return StepPeer("decays last", "", build, slack=decay_after_update)


def test_another_order_of_decay_is_allowed_and_nothing_else():
    checker = Checker(tiny_case("clip"))
    assert checker.verdict(decays_last()).right
    assert not checker.verdict(replace(decays_last(), slack=lambda case: 0.0)).right
    assert not checker.verdict(replace(forgets(weight_decay=0.0), slack=decay_after_update)).right
    assert not checker.verdict(decays_last(recipe=RECIPES["plain"])).right


def test_memory_of_a_peer_on_a_gpu_counts_graphs_and_own_state(monkeypatch):
    case = replace(tiny_case("full"), device=CUDA, model=MODELS["llama-1b"])
    monkeypatch.setattr(runner, "bytes_available", lambda device: 10e9)
    assert memory_reason(PEERS[OURS], case) is None
    assert "temporaries need 26.4 GB" in memory_reason(PEERS["torch-foreach"], case)  # 2 copies and noise, twice
    in_16_bits = replace(case, dtype=torch.bfloat16)
    assert "temporaries and own state need 13.2 GB" in memory_reason(PEERS["apex"], in_16_bits)
    assert memory_reason(PEERS["apex"], replace(in_16_bits, recipe=RECIPES["plain"])) is None
    assert memory_reason(PEERS["apex"], replace(in_16_bits, recipe=RECIPES["plain"]), sets=2) is not None


# ---- what is refused and left out


@pytest.mark.parametrize(
    ("version", "count", "index", "message"),
    [
        (None, 0, 0, "is built without CUDA: install one with CUDA from pytorch.org"),
        (
            "13.0",
            0,
            0,
            "torch finds no NVIDIA GPU: see whether nvidia-smi lists one and its driver is new enough for CUDA 13",
        ),
        ("13.0", 1, 1, "torch sees 1 CUDA device, numbered from 0"),
        ("13.0", 2, 7, "torch sees 2 CUDA devices"),
    ],
)
def test_a_missing_gpu_is_refused(version, count, index, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(SystemExit) as stop:
        cli.main(["--device", f"cuda:{index}"])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_gpu_that_torch_has_no_kernels_for_is_refused(monkeypatch):
    def explode(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "ones", explode)
    assert cuda.problem(0) == "torch cannot compute on it: no kernel image is available"


def parsed(*arguments: str, device: torch.device = CUDA) -> Request:
    args = cli.make_parser().parse_args(arguments)
    args.device = device
    return cli.request_from(args)


def test_defaults_follow_the_device():
    assert parsed().models == ("small-400", "resnet50", "gpt2", "llama-1b")
    assert parsed().recipes == ("plain", "centralize", "clip", "full", "reversal", "lpg")
    assert parsed(device=CPU).models == ("small-400", "resnet50", "gpt2")
    assert parsed(device=CPU).recipes == ("plain", "centralize", "clip", "reversal", "lpg")
    assert parsed("--train").recipes == ("plain", "clip")
    for choice in (*parsed().models, *parsed(device=CPU).models):
        assert choice in MODELS


def test_models_that_do_not_fit_are_left_out_and_named(monkeypatch, capsys):
    monkeypatch.setattr(request, "bytes_available", lambda device: 8 * 10**9)
    asked = cli.without_large_models(cli.make_parser(), parsed("--models", "small-400,llama-1b", device=CPU))
    assert [left["model"] for left in asked.left_out] == ["llama-1b"]
    assert {case.model.name for case in asked.step_cases()} == {"small-400"}
    environment = {"cpu": "a CPU", "threads": 2, "gradfused": "1", "isa": "avx2", "torch": "2", "python": "3"}
    print_closing(Console(width=140), Results(environment, left_out=list(asked.left_out)))
    assert "left out: llama-1b in float32 needs 19.4 GB" in capsys.readouterr().out


def test_memory_on_a_gpu_counts_the_sets(monkeypatch):
    monkeypatch.setattr(request, "bytes_available", lambda device: 100 << 20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
    assert request.memory_problem(MODELS["small-400"], "float32", ["adamw"], CPU) is None
    assert "small-400 in float32 needs 0.1 GB" in request.memory_problem(
        MODELS["small-400"], "float32", ["adamw"], CUDA
    )


def test_cases_on_a_gpu_get_equal_time():
    asked = parsed("--budget", "105")
    cases = [*asked.step_cases(), *asked.function_cases()]
    budget = asked.budgets()
    assert len(cases) == 16 + 5
    assert {budget(case).seconds for case in cases} == {5.0}


# ---- the machine


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Path:
    """A GPU and the file of its nvidia-smi, which a test may rewrite."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" >"$0.arguments"\necho "580.159.04, 700.00, 3"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tool


def test_the_gpu_is_described(gpu):
    told = cuda.describe(CUDA)
    assert told.pop("cuda", None) == torch.version.cuda
    assert told == {
        "gpu": "NVIDIA H200",
        "gpu_capability": "9.0",
        "gpu_multiprocessors": 132,
        "gpu_l2_bytes": H200_L2,
        "gpu_memory_bytes": H200.total_memory,
        "gpu_driver": "580.159.04",
        "gpu_power_limit_w": 700.0,
        "gpu_busy_before_percent": 3.0,
    }
    asked = Path(f"{gpu}.arguments").read_text().split()
    assert asked[0] == "--id=GPU-1234-abcd"
    assert all(argument.startswith(("--id=", "--query-gpu=", "--format=")) for argument in asked)


def test_a_machine_without_nvidia_smi_is_described(gpu, monkeypatch):
    monkeypatch.setattr(cuda.shutil, "which", lambda name: None)
    assert cuda.describe(CUDA)["gpu_multiprocessors"] == 132
    assert cuda.clocks(CUDA) == {}


@pytest.mark.parametrize("script", ["exit 9", "echo No devices were found", "echo '[N/A], [N/A], [N/A]'"])
def test_what_nvidia_smi_cannot_tell_is_left_out(script, gpu):
    gpu.write_text(f"#!/bin/sh\n{script}\n")
    told = cuda.describe(CUDA)
    assert told["gpu"] == "NVIDIA H200"
    assert "gpu_power_limit_w" not in told
    assert "gpu_busy_before_percent" not in told


def test_clocks_are_numbers(gpu):
    gpu.write_text("#!/bin/sh\necho '1980, 1980, 3201, [N/A]'\n")
    assert cuda.clocks(CUDA) == {
        "gpu_clocks_mhz": {"sm": 1980.0, "sm_max": 1980.0, "memory": 3201.0, "memory_max": None}
    }


def test_the_machine_in_a_line_names_the_gpu_and_the_backend():
    host = {"cpu": "a CPU", "threads": 16, "gradfused": "1.0", "isa": "avx512", "backend": "cuda"}
    versions = {"torch": "2.11.0+cu130", "python": "3.12.3", "cuda": "13.0", "gpu_driver": "580"}
    line = environment_line(host | versions | {"gpu": "NVIDIA H200"})
    assert "NVIDIA H200, CUDA 13.0, driver 580, gradfused 1.0 (backend cuda)" in line


# ---- the report and the targets


def gpu_result(model: str, recipe: str, ms: dict[str, float], gbps: float = 4000.0) -> CaseResult:
    """A case on a GPU with a copy of 4300 GB/s, where the device is busy for half of each time."""
    result = result_of(model, recipe, ms, device=CUDA)
    result.records = [
        replace(r, ms_device=r.ms_median / 2, device_clock=GRAPH, gbps=gbps, roof_gbps=4300.0) for r in result.records
    ]
    return result


def test_a_table_of_a_gpu_has_both_times(capsys):
    result = gpu_result("resnet50", "clip", {OURS: 0.3, "bitsandbytes": 9.0, FUSED_PLAIN: 0.4, ROOF: 0.2})
    result.records[1] = replace(result.records[1], device_clock=EVENTS, ms_device_p20=4.0, ms_device_p80=5.0)
    result.uncaptured["bitsandbytes"] = "it waits for the device after every tensor"
    print_case(Console(width=140), result)
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "bitsandbytes" in line and "│" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == [
        *("bitsandbytes", "9.00", "9.00 - 9.00", "30.00"),
        *("4.50 *", "4.00 - 5.00", "30.00", "4000.0", "93 %"),
    ]
    assert "roof (copy)" in shown
    assert "wall ms" in shown
    assert "bitsandbytes: * between events, not as a CUDA graph: it waits" in shown


def verdicts(*cases: CaseResult) -> dict[tuple[str, str], bool | None]:
    rows = targets.evaluate(Results({}, list(cases)))
    return {(row["case"], row["target"]): row["met"] for row in rows}


def test_targets_on_a_gpu_are_judged():
    share, torch_way = "device: share of a copy's bandwidth", "wall clock: times faster than the best torch way"
    fused = "times faster than the best of optimi, apex, bitsandbytes"
    assert verdicts(
        gpu_result("gpt2", "centralize", {OURS: 0.9}, gbps=3990.0),
        gpu_result("llama-1b", "centralize", {OURS: 8.0}, gbps=3900.0),
        gpu_result("llama-1b", "clip", {OURS: 8.0, "torch-fused": 14.0, "torch-foreach": 23.0, FUSED_PLAIN: 7.0}),
        gpu_result("resnet50", "clip", {OURS: 0.3, "torch-fused": 2.0, "torch-fused-gradscale": 1.6, "apex": 0.4}),
        gpu_result("small-400", "clip", {OURS: 0.05, "torch-fused": 0.7, "optimi": 9.0}),
        gpu_result("vit-b16", "full", {OURS: 0.5, f"{OURS}-triton": 0.4, "torch-foreach": 1.0}),
        gpu_result("gpt2", "plain", {OURS: 1.0, "apex": 1.2, "optimi": 0.995}),
        gpu_result("gpt2", "noise", {OURS: 1.0, "torch-fused": 0.5}),
    ) == {
        ("centralize, gpt2", share): True,
        ("centralize, llama-1b", share): False,
        ("clip, llama-1b", torch_way): True,
        ("clip, llama-1b", "times faster than torch-foreach"): False,
        ("clip, resnet50", torch_way): True,
        ("clip, small-400", torch_way): False,
        ("full, vit-b16", torch_way): True,
        ("plain, gpt2", f"wall clock: {fused}"): True,  # slower by less than two runs of one step may be apart
        ("plain, gpt2", f"device: {fused}"): True,
    }


def test_a_slower_plain_step_misses_its_target():
    assert list(verdicts(gpu_result("resnet50", "plain", {OURS: 1.0, "bitsandbytes": 0.9})).values()) == [False, False]


def test_a_gpus_targets_are_for_adamw_in_float32():
    result = gpu_result("resnet50", "clip", {OURS: 1.0, "torch-fused": 9.0})
    assert verdicts(replace(result, case=replace(result.case, rule=RULES["sgd"]))) == {}
    assert verdicts(replace(result, case=replace(result.case, dtype=torch.bfloat16))) == {}
    disturbed = replace(result, others_share=0.9)
    assert list(verdicts(disturbed).values()) == [None]


def test_numbers_keep_three_digits():
    values = (123.4, 12.34, 1.234, 0.1234, 0.01234, 0.9999, 0.09999)
    assert [sentence.milliseconds(value) for value in values] == [
        *("123", "12.3", "1.23", "0.123", "0.0123", "1.00", "0.100"),
    ]
