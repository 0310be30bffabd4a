"""The benchmark's targets, its command line and its files, and its training."""

from __future__ import annotations

import csv
import json
import os
import socket
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bench_cases import CPU, result_of
from gradfused.bench import cli, commands
from gradfused.bench import train as training
from gradfused.bench.cases.models import MODELS
from gradfused.bench.cases.recipes import RECIPES, RULES
from gradfused.bench.cases.steps import bytes_needed
from gradfused.bench.peers import PEERS
from gradfused.bench.peers.peer import Peer
from gradfused.bench.report import targets
from gradfused.bench.report.environment import describe
from gradfused.bench.report.results import FUSED_PLAIN, OURS, ROOF, Record, Results
from gradfused.bench.report.tables import print_case
from rich.console import Console

# ---- targets


def test_targets_are_judged():
    results = Results(
        {},
        [
            result_of("gpt2", "clip", {OURS: 100.0, "torch-fused": 240.0, FUSED_PLAIN: 100.0}),
            result_of("gpt2", "centralize", {OURS: 110.0, ROOF: 100.0}),
            result_of("small-400", "clip", {OURS: 0.5, "torch-fused": 20.0}),
            result_of("resnet50", "full", {OURS: 10.0, "torch-fused": 9.0}),
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
    result = result_of("small-400", "clip", {OURS: 0.5, "torch-fused": 20.0})
    result.others_share = 0.4
    assert result.disturbed
    rows = targets.evaluate(Results({}, [result]))
    assert [row["met"] for row in rows] == [None, None]
    print_case(Console(width=120), result)
    assert "other programs took 40 % of the processors" in capsys.readouterr().out


def test_bfloat16_must_beat_every_peer_and_nothing_else():
    results = Results({}, [result_of("gpt2", "clip", {OURS: 1.0, "torch-fused": 1.5}, torch.bfloat16)])
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
        (["--optimizers", "muon"], "allowed: all, or any of adamw"),
        (["--peers", "tinygrad"], "allowed: all, or any of gradfused"),
        (["--dtype", "int8"], "allowed: all, or any of float32"),
        (["--device", "tpu"], "allowed: cpu, cuda, cuda:0"),
        (["--device", "cuda:99"], "'cuda:99' cannot be used: torch"),
        (["--device", "cuda:x"], "allowed: cpu, cuda, cuda:0"),
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
    elements = max(MODELS[name].elements for name in cli.DEFAULT_MODELS["cpu"].split(","))
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
    names = {field.name for field in fields(Record) if field.default is MISSING}
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
    cli.fill_defaults(args)
    keys = [(case.model.name, case.dtype) for case in commands.cases_of(args)]
    changes = sum(a != b for a, b in pairwise(keys))
    assert len(keys) == 2 * 2 * len(RECIPES)
    assert changes == 3


def test_threads_are_compared_on_the_richest_recipe():
    results = [result_of("small-400", name, {OURS: 1.0}) for name in ("plain", "full", "noise")]
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
