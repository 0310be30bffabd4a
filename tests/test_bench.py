"""The benchmark: its data, its judgement of others, its timing, its output and its command line."""

from __future__ import annotations

import csv
import json
import os
import socket
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from gradfused.bench import cli, commands, targets, timing
from gradfused.bench import train as training
from gradfused.bench.check import (
    Checker,
    OracleNoise,
    crop,
    cropped_shapes,
    same_on_any_threads,
)
from gradfused.bench.eager import FoldedTransforms, NoiseSource, Transforms
from gradfused.bench.environment import describe
from gradfused.bench.models import MODELS, Model
from gradfused.bench.peer import Peer
from gradfused.bench.peers import PEERS, chosen_peers
from gradfused.bench.quiet import TICKS, CpuWatch, busy_seconds, usable_cpus
from gradfused.bench.recipes import RECIPES, RULES
from gradfused.bench.report import print_case
from gradfused.bench.results import (
    FUSED_PLAIN,
    OURS,
    ROOF,
    CaseResult,
    Record,
    Results,
    case_fields,
)
from gradfused.bench.roof import roof_of
from gradfused.bench.runner import Plan, measure, memory_reason
from gradfused.bench.timing import Budget, Samples, interleave
from gradfused.bench.workload import ALIGNMENT, Case, Slab, Workload, bytes_needed
from rich.console import Console

TINY = Model("tiny", "a convolution, a matrix and a bias", lambda: iter([(6, 5, 3, 3), (33, 20), (33,)]))
CPU = torch.device("cpu")
TORCH_PEERS = ("torch-loop", "torch-foreach", "torch-fused", "torch-fused-gradscale")


def tiny_case(recipe: str = "clip", rule: str = "adamw", dtype: torch.dtype = torch.float32) -> Case:
    return Case(TINY, RECIPES[recipe], RULES[rule], dtype)


def workload_of(case: Case) -> Workload:
    workload = Workload(case.model.shapes, case.rule, case.dtype, case.device)
    workload.reset()
    return workload


def record(case: Case, variant: str, ms: float) -> Record:
    return Record(
        **case_fields(case),
        variant=variant,
        ms_median=ms,
        ms_p20=ms,
        ms_p80=ms,
        gbps=1.0,
        roof_gbps=2.0,
        elements=case.model.elements,
        tensors=3,
    )


# ---- data


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [
        ("small-400", 400, 211_200),
        ("resnet50", 161, 25_557_032),
        ("vit-b16", 152, 86_567_656),
        ("gpt2", 148, 124_439_808),
        ("llama-1b", 201, 1_100_048_384),
    ],
)
def test_models_have_the_published_sizes(name, tensors, elements):
    assert len(MODELS[name].shapes) == tensors
    assert MODELS[name].elements == elements


def test_gpt2_weights_are_stored_transposed():
    shapes = MODELS["gpt2"].shapes
    assert (768, 2304) in shapes
    assert (2304, 768) not in shapes


@pytest.mark.parametrize(
    ("rule", "recipe", "expected"),
    [
        ("adamw", "plain", 28),
        ("adamw", "centralize", 28),
        ("adamw", "clip", 32),
        ("adamw", "noise", 28),
        ("adamw", "full", 32),
        ("adam", "plain", 28),
        ("adamw-amsgrad", "plain", 36),
        ("sgd-momentum", "plain", 20),
        ("sgd", "plain", 12),
        ("sgd", "clip", 16),
    ],
)
def test_byte_budget_is_the_designs(rule, recipe, expected):
    assert RULES[rule].bytes_per_element(RECIPES[recipe], itemsize=4) == expected
    assert RULES[rule].bytes_per_element(RECIPES[recipe], itemsize=2) == expected // 2


def test_clip_recipe_centralises_as_well():
    assert RECIPES["clip"].options["centralize"] is True
    assert RECIPES["clip"].options["clip_norm"] == 1.0


def test_noise_anneals():
    recipe = RECIPES["noise"]
    assert recipe.sigma(0) == pytest.approx(0.1)
    assert recipe.sigma(99) == pytest.approx(0.1 * 100**-0.275)


# ---- tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_slab_tensors_are_aligned_and_apart(dtype):
    shapes = [(3,), (5, 7), (), (0, 4), (64,)]
    slab = Slab(shapes, dtype, CPU)
    for number, tensor in enumerate(slab.tensors):
        tensor.fill_(number)
        assert tensor.data_ptr() % ALIGNMENT == slab.flat.data_ptr() % ALIGNMENT
    assert [tuple(tensor.shape) for tensor in slab.tensors] == shapes
    for number, tensor in enumerate(slab.tensors):
        assert (tensor == number).all()


def test_refresh_restores_what_eager_transforms_overwrite():
    workload = workload_of(tiny_case())
    before = [param.grad.clone() for param in workload.params]
    for param in workload.params:
        param.grad.mul_(-3)
    workload.refresh()
    for param, grad in zip(workload.params, before, strict=True):
        assert torch.equal(param.grad, grad)


def test_workload_is_benign():
    workload = workload_of(tiny_case())
    for slab in (workload.weights, workload.grads, *workload.state.values()):
        assert slab.flat.isfinite().all()
        assert slab.flat.abs().max() > 1e-6
    assert (workload.state["exp_avg_sq"].flat >= 0).all()


def test_variants_share_their_state():
    case = tiny_case()
    workload = workload_of(case)
    before = workload.state["exp_avg"].flat.clone()
    PEERS[OURS].build(case, workload, NoiseSource())()
    assert not torch.equal(before, workload.state["exp_avg"].flat)


def test_roof_keeps_values_and_counts_its_streams():
    case = tiny_case()
    workload = workload_of(case)
    slabs = [workload.weights, workload.grads, *workload.state.values()]
    before = [slab.flat.clone() for slab in slabs]
    roof = roof_of(case, workload)
    roof.step()
    assert roof.moved in (7, 9)  # ours in one sweep, or torch's three
    assert all(torch.equal(a, slab.flat) for a, slab in zip(before, slabs, strict=True))


def test_roof_of_float64_is_torchs():
    case = tiny_case(dtype=torch.float64)
    workload = workload_of(case)
    roof = roof_of(case, workload)
    roof.step()
    assert roof.moved == 9


# ---- peers


def test_default_peers_leave_out_the_opt_in_ones():
    names = [peer.name for peer in chosen_peers(None)]
    assert names[0] == OURS
    assert "torch-compile" not in names
    assert "gradfused-reference" not in names


def test_chosen_peers_always_include_gradfused():
    assert [peer.name for peer in chosen_peers(["torch-loop"])] == [OURS, "torch-loop"]
    assert [peer.name for peer in chosen_peers([])] == [OURS]


def test_gradscale_peer_says_when_there_is_nothing_to_fold():
    assert "nothing to fold" in PEERS["torch-fused-gradscale"].reason_against(tiny_case("plain"))
    assert PEERS["torch-fused-gradscale"].reason_against(tiny_case("reverse")) is None


@pytest.mark.parametrize("name", ["apex", "bitsandbytes"])
def test_cuda_peers_have_a_reason_here(name):
    assert PEERS[name].reason_against(tiny_case()) is not None
    assert PEERS[name].unable(tiny_case()) == "runs on CUDA only"


def test_deepspeed_names_what_it_lacks():
    unable = PEERS["deepspeed-cpuadam"].unable
    assert unable(tiny_case(rule="sgd")) == "has no sgd"
    assert "float64" in unable(tiny_case(dtype=torch.float64))
    assert unable(replace(tiny_case(), device=torch.device("cuda"))) == "runs on CPUs only"
    assert unable(tiny_case()) is None


def test_a_peer_without_memory_has_a_reason(monkeypatch):
    monkeypatch.setattr("gradfused.bench.runner.bytes_available", lambda device: 10)
    assert "GB are free" in memory_reason(PEERS["torch-foreach"], tiny_case())


@pytest.mark.parametrize("foreach", [False, True])
def test_folding_equals_transforming(foreach):
    case = tiny_case("full")

    class Fixed(NoiseSource):
        def draw(self, index, grad):
            return torch.full_like(grad, 0.5)

    eager, folded = workload_of(case), workload_of(case)
    transforms = Transforms(case.recipe, eager.params, Fixed(), foreach=foreach)
    transforms.advance()
    transforms.apply()
    folding = FoldedTransforms(case.recipe, folded.params, Fixed(), foreach=foreach)
    folding.advance()
    divisor = folding.folded()
    for ours, theirs in zip(folded.params, eager.params, strict=True):
        torch.testing.assert_close(ours.grad / divisor, theirs.grad)


# ---- the check


def test_crop_keeps_the_length_of_a_unit():
    assert crop((50257, 768), limit=1 << 14) == (21, 768)
    assert crop((2048, 5632), limit=1 << 12) == (2, 5632)
    assert crop((1, 1, 768), limit=16) == (1, 1, 768)
    assert crop((), limit=16) == ()


def test_cropped_shapes_hold_each_shape_once():
    shapes = cropped_shapes(MODELS["resnet50"])
    assert len(shapes) == len(set(MODELS["resnet50"].shapes))
    assert sum(torch.Size(shape).numel() for shape in shapes) < 2_000_000


def test_oracle_noise_is_gradfuseds_own():
    case = tiny_case("noise", dtype=torch.float64)
    source = OracleNoise(TINY.shapes, case)
    source.advance(0)
    first = source.draw(1, None).clone()
    source.advance(1)
    assert not torch.equal(first, source.draw(1, None))
    assert abs(float(first.std()) - 1) < 0.1
    assert abs(float(first.mean())) < 0.15


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("rule", ["adamw", "adamw-amsgrad", "adam", "sgd-momentum", "sgd"])
def test_torch_peers_and_gradfused_are_right(recipe, rule):
    case = tiny_case(recipe, rule)
    checker = Checker(case)
    for name in (OURS, "gradfused-reference", *TORCH_PEERS):
        if PEERS[name].reason_against(case) is None:
            verdict = checker.verdict(PEERS[name])
            assert verdict.right, f"{name}: {verdict}"


@pytest.mark.parametrize("recipe", ["plain", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_gradfused_is_right_in_every_dtype(recipe, dtype):
    verdict = Checker(tiny_case(recipe, dtype=dtype)).verdict(PEERS[OURS])
    assert verdict.right, str(verdict)


@pytest.mark.parametrize("name", ["optimi", "pytorch_optimizer"])
def test_installed_packages_are_right(name):
    case = tiny_case("full")
    reason = PEERS[name].reason_against(case)
    if reason:
        pytest.skip(reason)
    assert Checker(case).verdict(PEERS[name]).right


def forgets(**changes: object) -> Peer:
    """torch's loop with something of the case left out."""

    def build(case, workload, source):
        return PEERS["torch-loop"].build(replace(case, **changes), workload, source)

    return Peer("forgetful", "", build)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adamw", "sgd-momentum"])
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("plain", {"weight_decay": 0.0}),
        ("centralize", {"recipe": RECIPES["plain"]}),
        ("reverse", {"recipe": RECIPES["plain"]}),
        ("full", {"recipe": RECIPES["clip"]}),
    ],
)
def test_who_leaves_something_out_is_wrong(recipe, changes, rule, dtype):
    verdict = Checker(tiny_case(recipe, rule, dtype)).verdict(forgets(**changes))
    assert not verdict.right, str(verdict)


def test_forgotten_clipping_is_wrong():
    # Adam hardly feels a constant factor, so this needs float32, or SGD.
    changes = {"recipe": RECIPES["centralize"]}
    assert not Checker(tiny_case("clip")).verdict(forgets(**changes)).right
    assert not Checker(tiny_case("clip", "sgd", torch.bfloat16)).verdict(forgets(**changes)).right


def test_nan_is_wrong():
    def build(case, workload, source):
        return lambda: workload.weights.flat.fill_(float("nan"))

    verdict = Checker(tiny_case()).verdict(Peer("nan", "", build))
    assert not verdict.right
    assert str(verdict).startswith("wrong (err inf")


def test_threads_do_not_change_bits_and_are_restored():
    threads = torch.get_num_threads()
    assert same_on_any_threads(tiny_case("full"))
    assert torch.get_num_threads() == threads


# ---- timing


def scripted_clock(times: dict[object, float], calls: list[object]):
    def clock(step, count):
        calls.append(step)
        return times[step]

    return clock


def test_variants_take_turns_and_slow_ones_sit_out():
    def fast() -> None: ...
    def slow() -> None: ...

    calls: list[object] = []
    rounds: list[int] = []
    samples = interleave(
        {"fast": fast, "slow": slow},
        budget=Budget(seconds=1e-3),
        clock=scripted_clock({fast: 50.0, slow: 500.0}, calls),
        on_round=lambda done, total: rounds.append(done),
    )
    assert rounds == list(range(1, timing.MIN_ROUNDS + 1))
    assert len(samples["fast"].values) == 9
    assert len(samples["slow"].values) == 5
    assert set(calls[4:6]) == {fast, slow}


def test_fixed_rounds_are_exact_and_refreshed():
    refreshed: list[int] = []

    def step() -> None: ...

    samples = interleave({"only": step}, budget=Budget(rounds=3), refresh=lambda: refreshed.append(1))
    assert len(samples["only"].values) == 3
    assert len(refreshed) == 4


def test_budget_follows_the_time_there_is():
    assert Budget(seconds=1.0).plan({"a": 50.0})[0] == 20
    assert Budget(seconds=1.0).plan({"a": 1e4})[0] == timing.MIN_ROUNDS
    assert Budget(seconds=1e6).plan({"a": 50.0})[0] == timing.MAX_ROUNDS
    assert Budget(seconds=1.0).spent(9, 2.0)
    assert not Budget(seconds=1.0).spent(5, 2.0)
    assert Budget(seconds=1.0).spent(5, 4.0)
    assert not Budget(seconds=1.0).spent(4, 99.0)
    assert not Budget(seconds=1.0, rounds=30).spent(20, 99.0)


def test_short_steps_are_timed_in_bursts():
    assert timing.burst_length(0.1) == timing.MAX_BURST
    assert timing.burst_length(1.0) == 2
    assert timing.burst_length(500.0) == 1
    assert timing.lead_in(1.0) == 1
    assert timing.lead_in(500.0) == 0


def test_quantiles_interpolate():
    samples = Samples([5.0, 1.0, 2.0, 3.0, 4.0])
    assert samples.median == 3.0
    assert samples.quantile(0.2) == pytest.approx(1.8)


# ---- a case from end to end


@pytest.fixture(scope="module")
def clip_result() -> CaseResult:
    def explode(case, workload, source):
        raise RuntimeError("no such kernel\nand more")

    peers = [
        *(PEERS[name] for name in (OURS, "torch-loop", "torch-fused")),
        replace(forgets(weight_decay=0.0), name="forgetful"),
        Peer("broken", "", explode),
        Peer("elsewhere", "", explode, absent=lambda: "not installed"),
    ]
    case = tiny_case()
    return measure(case, workload_of(case), Plan(peers, Budget(rounds=3)))


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


# ---- targets


def result_of(model: str, recipe: str, dtype: torch.dtype = torch.float32, **ms: float) -> CaseResult:
    case = Case(MODELS[model], RECIPES[recipe], RULES["adamw"], dtype)
    names = {"fused": "torch-fused", "plain": FUSED_PLAIN, "ours": OURS, "roof": ROOF}
    return CaseResult(case, [record(case, names[key], value) for key, value in ms.items()])


def test_targets_are_judged():
    results = Results(
        {},
        [
            result_of("gpt2", "clip", ours=100.0, fused=240.0, plain=100.0),
            result_of("gpt2", "centralize", ours=110.0, roof=100.0),
            result_of("small-400", "clip", ours=0.5, fused=20.0),
            result_of("resnet50", "full", ours=10.0, fused=9.0),
        ],
        same_on_any_threads=True,
    )
    met = {(row["case"], row["target"]): row["met"] for row in targets.evaluate(results)}
    assert met == {
        ("clip, gpt2", "times faster than torch-fused"): False,
        ("clip, gpt2", f"time relative to {FUSED_PLAIN}"): True,
        ("centralize, gpt2", "time relative to roof"): True,
        ("clip, small-400", "times faster than torch-fused"): True,
        ("clip, small-400", "ms a step"): True,
        ("full, resnet50, float32", "times faster than the best peer, torch-fused"): False,
        ("all models", "bits on 1 thread and on more"): True,
    }


def test_a_disturbed_case_is_not_judged(capsys):
    result = result_of("small-400", "clip", ours=0.5, fused=20.0)
    result.others_share = 0.4
    assert result.disturbed
    rows = targets.evaluate(Results({}, [result]))
    assert [row["met"] for row in rows] == [None, None]
    print_case(Console(width=120), result)
    assert "other programs took 40 % of the processors" in capsys.readouterr().out


def test_other_programs_are_noticed(tmp_path):
    stat, cpus = tmp_path / "stat", usable_cpus()
    lines = [f"cpu{number} 1 2 3 50 60 4 5 6 7 8" for number in cpus]
    stat.write_text("\n".join(["cpu 9 9 9 9", *lines, "intr 1"]))
    assert busy_seconds(stat) == 21 * len(cpus) / TICKS
    assert busy_seconds(tmp_path / "none") is None
    share = CpuWatch().share_of_others()
    assert share is None or 0 <= share <= 1


def test_bfloat16_must_beat_every_peer_and_nothing_else():
    results = Results({}, [result_of("gpt2", "clip", torch.bfloat16, ours=1.0, fused=1.5)])
    (row,) = targets.evaluate(results)
    assert row["met"]
    assert row["measured"] == 1.5


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "gpt3"], "unknown 'gpt3'; allowed: all, or any of small-400, resnet50"),
        (["--models", ","], "empty list"),
        (["--recipes", "plain,spicy"], "unknown 'spicy'; allowed: all, or any of plain, central"),
        (["--optimizers", "lion"], "allowed: all, or any of adamw"),
        (["--peers", "tinygrad"], "allowed: all, or any of gradfused"),
        (["--dtype", "int8"], "allowed: all, or any of float32"),
        (["--device", "tpu"], "allowed: cpu, cuda, cuda:0"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--seeds", "-1"], "'-1' is not a whole number of at least 1"),
        (["--threads", "two"], "not a whole number"),
        (["--budget", "nan"], "not a positive number of seconds"),
        (["--budget", "soon"], "not a positive number of seconds"),
        (["--json", "/no/such/folder/out.json"], "does not exist"),
        (["--csv", "."], "is a folder"),
        (["--train", "--plot", "out.png"], "--train writes no"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_that_does_not_fit_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(cli, "bytes_available", lambda device: 8 * 10**9)
    with pytest.raises(SystemExit):
        cli.main(["--models", "llama-1b"])
    message = " ".join(capsys.readouterr().err.split())
    assert "llama-1b in float32 needs 19.4 GB" in message
    assert "8.0 GB are available. Try --dtype bfloat16" in message


def test_the_default_run_stays_below_8_gib():
    elements = max(MODELS[name].elements for name in cli.DEFAULT_MODELS.split(","))
    assert bytes_needed(elements, RULES["adamw"], torch.float32, copies=2) < 4 << 30


@pytest.mark.parametrize(("module", "option"), [("rich", "--list"), ("matplotlib", "--plot=a.png")])
def test_a_missing_dependency_is_named(module, option, monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == module else name)
    with pytest.raises(SystemExit):
        cli.main([option])
    assert f"needs {module}: pip install 'gradfused[bench]'" in capsys.readouterr().err


def test_list_shows_everything(capsys):
    assert cli.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name in (*MODELS, *RECIPES, *RULES, *PEERS):
        assert name in shown
    assert "124,439,808 elements" in shown


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    return {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "png")}


def run_small(files: dict[str, Path], *more: str) -> int:
    return cli.main(
        [
            *("--models", "small-400", "--recipes", "clip", "--peers", "torch-fused,apex"),
            *("--steps", "1", "--json", str(files["json"]), "--csv", str(files["csv"])),
            *more,
        ]
    )


def test_a_run_prints_and_writes(files, capsys, monkeypatch):
    monkeypatch.setitem(PEERS, "apex", Peer("apex", "", None, absent=lambda: "no wheel"))
    pytest.importorskip("matplotlib")
    assert run_small(files, "--plot", str(files["png"])) == 0
    shown = capsys.readouterr().out
    assert "small-400 | clip | adamw | float32 on cpu (400 tensors" in shown
    assert "not here: apex: no wheel" in shown
    assert "Targets" in shown
    data = json.loads(files["json"].read_text())
    names = {field.name for field in fields(Record)}
    assert all(set(row) == names for row in data["records"])
    assert {row["variant"] for row in data["records"]} == {OURS, "torch-fused", FUSED_PLAIN, ROOF}
    assert data["skipped"][0]["reason"] == "no wheel"
    assert data["targets"]
    with files["csv"].open() as file:
        assert len(list(csv.DictReader(file))) == len(data["records"])
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_a_run_without_gradfused_fails(monkeypatch, capsys, files):
    def explode(case, workload, source):
        raise RuntimeError("no kernels")

    monkeypatch.setitem(PEERS, OURS, Peer(OURS, "", explode))
    assert run_small(files) == 1
    assert "gradfused: failed: RuntimeError: no kernels" in capsys.readouterr().out


def test_the_environment_names_no_machine():
    text = json.dumps(describe(CPU))
    assert socket.gethostname() not in text
    assert os.path.expanduser("~") not in text
    assert str(Path.cwd()) not in text
    assert '"threads"' in text


def test_cases_of_one_workload_are_neighbours():
    args = cli.make_parser().parse_args(
        ["--models", "small-400,resnet50", "--dtype", "float32,bfloat16", "--recipes", "all"]
    )
    keys = [(case.model.name, case.dtype) for case in commands.cases_of(args)]
    changes = sum(a != b for a, b in pairwise(keys))
    assert len(keys) == 2 * 2 * len(RECIPES)
    assert changes == 3


def test_threads_are_compared_on_the_richest_recipe():
    results = [result_of("small-400", name, ours=1.0) for name in ("plain", "full", "noise")]
    (case,) = commands.thread_cases(results)
    assert case.recipe.name == "full"


# ---- training


@pytest.fixture
def threads():
    """Restores the thread count; one thread keeps a busy machine from slowing tiny layers down."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_training_compares_side_by_side(monkeypatch, capsys, tmp_path):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(training, "EPOCHS", 1)
    path = tmp_path / "train.json"
    assert cli.main(["--train", "--seeds", "1", "--threads", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["train"]
    assert [(row["variant"], row["recipe"]) for row in rows] == [
        (variant, recipe) for recipe in ("plain", "clip") for variant in training.VARIANTS
    ]
    assert all(row["accuracy_mean"] > 0.5 for row in rows)
    assert all(0 < row["optimizer_seconds"] < row["seconds"] for row in rows)
    assert "test accuracy" in capsys.readouterr().out
