"""The benchmark's targets, its command line and its files, and its training."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
from dataclasses import MISSING, fields
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from bench_cases import CPU, result_of
from gradfused.bench import cli, commands, request
from gradfused.bench import train as training
from gradfused.bench.cases import FUSED_PLAIN, MODELS, OURS, RECIPES, ROOF, RULES, bytes_needed
from gradfused.bench.measure import CaseResult, Record, Results, Skipped
from gradfused.bench.peers import PEERS, StepPeer
from gradfused.bench.report import describe, print_case, targets
from gradfused.bench.report.sentence import closing_sentence
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
    monkeypatch.setattr(request, "bytes_available", lambda device: 8 * 10**9)
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
    monkeypatch.setitem(PEERS, "apex", StepPeer("apex", "", None, absent=lambda: "no wheel"))
    pytest.importorskip("matplotlib")
    assert run_small(files, "--plot", str(files["png"]), "--targets") == 0
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


def test_a_usual_run_shows_neither_targets_nor_peers_that_nobody_asked_for(monkeypatch, capsys):
    """It ends with a sentence made of its own figures."""
    for name in PEERS:
        if not name.startswith(("torch-", OURS)):
            monkeypatch.setitem(PEERS, name, StepPeer(name, "", None, absent=lambda: "no wheel"))
    assert cli.main(["--models", "small-400", "--recipes", "clip", "--steps", "1"]) == 0
    shown = capsys.readouterr().out
    assert "not here" not in shown
    assert "no wheel" not in shown
    assert "Targets" not in shown
    sentence = shown.strip().splitlines()[-1]
    assert re.search(
        r"gradfused\.AdamW with centralisation and clipping takes [\d.]+ ms a step on small-400, ", sentence
    )
    assert "torch's fused AdamW with centralisation and clip_grad_norm_" in sentence


def test_what_a_peer_says_it_cannot_do_is_told_to_those_who_ask(capsys):
    result = result_of("small-400", "plain", {OURS: 1.0})
    fields = {"model": "small-400", "recipe": "plain", "optimizer": "adamw", "dtype": "float32", "device": "cpu"}
    result.skipped += [
        Skipped(**fields, variant="torch-fused-gradscale", reason="nothing to fold", expected=True),
        Skipped(**fields, variant="optimi", reason="wrong (err 1.0e+00)"),
    ]
    print_case(Console(width=120), result)
    shown = capsys.readouterr().out
    assert "nothing to fold" not in shown
    assert "optimi: wrong" in shown
    print_case(Console(width=120), result, ["torch-fused-gradscale"])
    assert "torch-fused-gradscale: nothing to fold" in capsys.readouterr().out
    assert "expected" not in json.dumps([skip.as_json() for skip in result.skipped])


# ---- the closing sentence


def sentence_of(*cases: CaseResult) -> str:
    return closing_sentence(Results({}, list(cases)))


def test_the_sentence_compares_with_what_users_write():
    assert sentence_of(result_of("small-400", "clip", {OURS: 0.39, "torch-fused": 2.69, "torch-loop": 9.0})) == (
        "On this machine gradfused.AdamW with centralisation and clipping takes 0.390 ms a step on small-400, "
        "6.9 times as fast as torch's fused AdamW with centralisation and clip_grad_norm_."
    )


def test_the_sentence_is_honest_where_gradfused_is_slower_or_the_same():
    slower = sentence_of(result_of("gpt2", "plain", {OURS: 50.0, "torch-fused": 45.0}))
    assert slower.endswith("takes 50.0 ms a step on gpt2, 1.1 times as long as torch's fused AdamW.")
    same = sentence_of(result_of("gpt2", "plain", {OURS: 50.0, "torch-fused": 50.2}))
    assert same.endswith("takes 50.0 ms a step on gpt2, as long as torch's fused AdamW.")


def test_the_sentence_covers_every_model_and_names_a_faster_peer():
    cases = [
        result_of("small-400", "clip", {OURS: 0.5, "torch-fused": 4.0, "torch-fused-gradscale": 3.0}),
        result_of("gpt2", "clip", {OURS: 50.0, "torch-fused": 45.0, "torch-fused-gradscale": 46.0}),
        result_of("gpt2", "plain", {OURS: 1.0, "torch-fused": 99.0}),
    ]
    assert sentence_of(*cases).endswith(
        "takes 0.500 ms a step on small-400 and 50.0 ms on gpt2: 8.0 and 0.90 times as fast as torch's fused AdamW with "
        "centralisation and clip_grad_norm_, and 0.90 to 6.0 times as fast as the fastest other variant."
    )
    assert sentence_of(cases[0]).endswith(
        "takes 0.500 ms a step on small-400, 8.0 times as fast as torch's fused AdamW with centralisation and "
        "clip_grad_norm_, and 6.0 times as fast as torch-fused-gradscale, the fastest other variant."
    )


def test_the_sentence_tells_of_other_programs_and_of_other_dtypes():
    result = result_of("gpt2", "ema", {OURS: 1.0}, torch.bfloat16)
    result.others_share = 0.4
    assert sentence_of(result) == (
        "On this machine, while other programs took up to 40 % of its processors, gradfused.AdamW in bfloat16 with weight "
        "averaging takes 1.00 ms a step on gpt2."
    )
    assert sentence_of() == ""
    assert sentence_of(result_of("gpt2", "clip", {"torch-fused": 1.0})).startswith("gradfused could not be timed")


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_every_recipe_can_be_put_into_words(recipe):
    sentence = sentence_of(result_of("gpt2", recipe, {OURS: 1.0, "torch-fused": 2.0}))
    assert (" with " in sentence) == (recipe != "plain")
    assert "2.0 times as fast as torch's fused AdamW" in sentence


def test_a_run_without_gradfused_fails(monkeypatch, capsys, files):
    def explode(case, workload, source):
        raise RuntimeError("no kernels")

    monkeypatch.setitem(PEERS, OURS, StepPeer(OURS, "", explode))
    assert run_small(files) == 1
    assert "gradfused: failed: RuntimeError: no kernels" in capsys.readouterr().out


def test_the_environment_names_no_machine():
    text = json.dumps(describe(CPU))
    assert socket.gethostname() not in text
    assert os.path.expanduser("~") not in text
    assert str(Path.cwd()) not in text
    assert '"threads"' in text


def test_cases_of_one_workload_are_neighbours():
    options = ["--models", "small-400,resnet50", "--dtype", "float32,bfloat16", "--recipes", "all"]
    asked = cli.request_from(cli.make_parser().parse_args(options))
    keys = [(case.model.name, case.dtype) for case in asked.step_cases()]
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
