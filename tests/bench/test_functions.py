"""The benchmark's functions: their oracles, the ways of computing them, and how they run beside optimizer steps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from gradfused.bench import cli
from gradfused.bench.cases import (
    CROSS_ENTROPY,
    MODELS,
    NO_REVERSAL,
    OURS,
    RECIPES,
    ROOF,
    FunctionCase,
    FunctionPeer,
    Size,
)
from gradfused.bench.measure import CaseResult, Record, Results, measure_function
from gradfused.bench.measure import functions as function_runner
from gradfused.bench.measure.functions import FunctionChecker
from gradfused.bench.measure.results import bytes_moved, case_fields
from gradfused.bench.peers import FUNCTIONS, SIZES, WAYS, chosen_ways
from gradfused.bench.peers import lpg as lpg_case
from gradfused.bench.peers.lpg import LPG
from gradfused.bench.peers.reversal import LAMBDA, REVERSAL
from gradfused.bench.report import targets
from gradfused.bench.request import Request
from gradfused.bench.timing import Budget
from torch.nn import functional as F

HEAD = Size("head", "a small head", (40, 12), 5)
ALONE = Size("alone", "reversal alone", (6, 4, 3, 3))
LOGITS = Size("logits", "few classes", (200, 11))
TINY = {"reversal": (HEAD, ALONE), "lpg": (LOGITS,)}
CASES = [FunctionCase(FUNCTIONS[name], size) for name, sizes in TINY.items() for size in sizes]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.model.name)


def way_of(case: FunctionCase, name: str) -> FunctionPeer:
    return next(way for way in case.recipe.ways if way.name == name)


# ---- what is measured


def test_sizes_and_names_are_as_documented():
    assert SIZES["8192x1000"].shape == (8192, 1000)
    assert SIZES["2048x32000"].elements == 65_536_000
    assert SIZES["pooled-features"].shapes == [(256, 2048), (1024, 2048), (1024,)]
    assert not set(SIZES) & set(MODELS)
    assert not set(FUNCTIONS) & set(RECIPES)


@pytest.mark.parametrize(("size", "per_element"), [(HEAD, 12), (ALONE, 8)])
def test_bytes_are_what_has_to_move(size, per_element):
    case = FunctionCase(REVERSAL, size)
    assert case.bytes_moved == per_element * size.elements
    assert replace(case, dtype=torch.bfloat16).bytes_moved == per_element * size.elements // 2


def test_cropping_keeps_rows_whole_and_two_of_them():
    assert SIZES["8192x1000"].cropped.shape == (1048, 1000)
    assert SIZES["feature-map"].cropped.shape == (2, 256, 56, 56)
    assert HEAD.cropped == HEAD


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_oracle_gets_the_same_values(case, dtype):
    case = replace(case, dtype=dtype)
    exact = case.tensors(torch.float64)
    for name, tensor in case.tensors().items():
        assert torch.equal(tensor.detach().double(), exact[name].detach().double())
        assert tensor.requires_grad == exact[name].requires_grad


def test_classes_have_a_long_tail():
    counts = LPG.make(SIZES["8192x1000"], torch.float32, torch.device("cpu"))["target"].bincount(minlength=1000)
    assert counts[0] > 5 * counts[10] > 0
    assert (counts[500:] < 10).all()


# ---- oracles


def test_the_oracle_of_reversal_is_autograds():
    tensors = FunctionCase(REVERSAL, HEAD).tensors(torch.float64)
    y = F.linear(tensors["x"], tensors["weight"], tensors["bias"])
    leaves = [tensors[name] for name in ("x", "weight", "bias")]
    of_x, *others = torch.autograd.grad(y, leaves, tensors["upstream"], retain_graph=True)
    torch.testing.assert_close(REVERSAL.oracle(tensors, True), [y.detach(), of_x, *others])
    torch.testing.assert_close(REVERSAL.oracle(tensors, False), [y.detach(), -LAMBDA * of_x, *others])


def test_the_oracle_of_lpg_moves_class_means_by_their_radius():
    tensors = FunctionCase(LPG, LOGITS).tensors(torch.float64)
    target, radius, sign = tensors["target"], tensors["radius"], tensors["sign"]
    loss, plain = LPG.oracle(tensors, True)
    torch.testing.assert_close(loss, F.cross_entropy(tensors["logits"].detach(), target))
    torch.testing.assert_close(
        [plain], list(torch.autograd.grad(F.cross_entropy(tensors["logits"], target), tensors["logits"]))
    )
    _, perturbed = LPG.oracle(tensors, False)
    dampened_away = 0
    for c in target.unique().tolist():
        before, after = ((g[target == c] * len(target)).mean(0).norm() for g in (plain, perturbed))
        torch.testing.assert_close(after, (before + sign[c] * radius[c]).clamp(min=0))
        dampened_away += bool(sign[c] < 0 and radius[c] > before)
    assert dampened_away  # the bound that only dampening has is reached


# ---- ways


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_way_that_is_here_is_right(case, dtype):
    case = replace(case, dtype=dtype)
    checker = FunctionChecker(case)
    for way in case.recipe.ways:
        if not way.opt_in and way.reason_against(case) is None:
            assert checker.verdict(way).right, f"{way.name} is {checker.verdict(way)}"


@every_case
def test_compiled_ways_are_right(case):
    assert FunctionChecker(case).verdict(way_of(case, "torch-compile")).right


@every_case
def test_what_leaves_out_the_point_is_wrong(case):
    checker = FunctionChecker(case)
    (yardstick,) = (way for way in case.recipe.ways if way.yardstick)
    assert not checker.verdict(replace(yardstick, yardstick=False)).right
    assert not checker.verdict(replace(way_of(case, OURS), yardstick=True)).right


def test_a_nan_is_wrong():
    case = FunctionCase(REVERSAL, ALONE)
    broken = replace(way_of(case, OURS), build=lambda: lambda tensors: [tensors["x"], tensors["x"] * float("nan")])
    assert FunctionChecker(case).error(broken) == float("inf")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, [OURS, "eager-lpg", "eager-lpg-frugal", CROSS_ENTROPY]),
        ([], [OURS]),
        (["torch-fused"], [OURS, CROSS_ENTROPY]),
        (["torch-compile"], [OURS, "torch-compile", CROSS_ENTROPY]),
    ],
)
def test_ways_are_chosen_like_peers(names, expected):
    assert [way.name for way in chosen_ways(LPG, names)] == expected


def test_what_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(function_runner, "bytes_available", lambda device: 1 << 20)
    result = measure_function(FunctionCase(LPG, Size("large", "", (1000, 1000))), [OURS], Budget(rounds=1))
    assert [r.variant for r in result.records] == [ROOF]
    assert result.skipped[0].reason == "it needs 0.0 GB, 0.0 GB are free"


# ---- a case from end to end


@pytest.fixture(scope="module")
def reversal_result() -> CaseResult:
    def explode():
        raise RuntimeError("no such layer\nand more")

    extra = (
        FunctionPeer("broken", "", explode),
        FunctionPeer("elsewhere", "", explode, absent=lambda: "not installed"),
        replace(way_of(CASES[0], NO_REVERSAL), name="forgetful", yardstick=False),
    )
    mine = tuple(way for way in REVERSAL.ways if way.name != "pytorch-revgrad")
    recipe = replace(REVERSAL, ways=(*mine, *extra))
    return measure_function(FunctionCase(recipe, ALONE), None, Budget(rounds=3))


def test_right_ways_get_records_and_the_others_reasons(reversal_result):
    assert [r.variant for r in reversal_result.records] == [OURS, "autograd-function", NO_REVERSAL, ROOF]
    for r in reversal_result.records:
        assert 0 < r.ms_p20 <= r.ms_median <= r.ms_p80
        assert (r.recipe, r.optimizer, r.elements, r.tensors) == ("reversal", "none", ALONE.elements, 1)
    reasons = {skip.variant: skip.reason for skip in reversal_result.skipped}
    assert reasons["gradfused-layer"] == "is gradfused itself where no linear layer follows"
    assert reasons["broken"] == "failed: RuntimeError: no such layer"
    assert reasons["elsewhere"] == "not installed"
    assert reasons["forgetful"].startswith("wrong (err ")
    assert {skip.variant for skip in reversal_result.skipped if skip.everywhere} == {"elsewhere"}


def test_yardsticks_are_no_competitors_and_move_nothing(reversal_result):
    assert {r.variant for r in reversal_result.competitors()} == {"autograd-function"}
    moved = {name: bytes_moved(reversal_result.case, name) for name in (OURS, NO_REVERSAL)}
    assert moved == {OURS: 8 * ALONE.elements, NO_REVERSAL: 0}
    assert bytes_moved(FunctionCase(REVERSAL, HEAD), NO_REVERSAL) > 0


# ---- targets


def lpg_result(size: str, ms: dict[str, float], dtype: torch.dtype = torch.float32) -> CaseResult:
    case = FunctionCase(LPG, SIZES[size], dtype)
    values = {"ms_p20": 1.0, "ms_p80": 1.0, "gbps": 1.0, "roof_gbps": 2.0, "elements": 1, "tensors": 1}
    return CaseResult(case, [Record(**case_fields(case), variant=v, ms_median=t, **values) for v, t in ms.items()])


def test_lpg_has_targets():
    results = [
        lpg_result("8192x1000", {OURS: 10.0, "eager-lpg": 29.0, CROSS_ENTROPY: 10.0}),
        lpg_result("2048x32000", {OURS: 12.0, "eager-lpg": 60.0, CROSS_ENTROPY: 10.0}),
        lpg_result("2048x32000", {OURS: 99.0, "eager-lpg": 1.0}, torch.bfloat16),
    ]
    met = {(row["case"], row["target"]): row["met"] for row in targets.evaluate(Results({}, results))}
    assert met == {
        ("lpg, 8192x1000", "times faster than eager-lpg"): False,
        ("lpg, 8192x1000", f"time relative to {CROSS_ENTROPY}"): True,
        ("lpg, 2048x32000", "times faster than eager-lpg"): True,
        ("lpg, 2048x32000", f"time relative to {CROSS_ENTROPY}"): False,
    }


# ---- the command line


def parsed(*arguments: str) -> Request:
    return cli.request_from(cli.make_parser().parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "recipes", "sizes"),
    [
        ([], ["plain", "centralize", "clip", "reversal", "lpg"], list(SIZES)),
        (["--models", "gpt2"], ["plain", "centralize", "clip"], []),
        (["--models", "2048x32000"], ["lpg"], ["2048x32000"]),
        (["--models", "gpt2,feature-map"], ["plain", "centralize", "clip", "reversal"], ["feature-map"]),
        (["--models", "gpt2", "--recipes", "clip,lpg"], ["clip", "lpg"], ["8192x1000", "2048x32000"]),
        (["--train"], ["plain", "clip"], []),
    ],
)
def test_defaults_follow_what_is_named(arguments, recipes, sizes):
    request = parsed(*arguments)
    assert list(request.recipes) == recipes
    assert [case.model.name for case in request.function_cases()] == sizes


def test_steps_take_the_usual_models_where_only_sizes_are_named():
    request = parsed("--models", "8192x1000", "--recipes", "clip,lpg")
    assert [case.model.name for case in request.step_cases()] == cli.DEFAULT_MODELS["cpu"].split(",")


def test_training_takes_no_function(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--train", "--recipes", "lpg"])
    assert "--train takes recipes of optimizer steps: any of plain" in capsys.readouterr().err


def test_functions_run_next_to_steps(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, sizes in TINY.items():
        monkeypatch.setitem(FUNCTIONS, name, replace(FUNCTIONS[name], sizes=sizes))
    path, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--recipes", "clip,reversal,lpg", "--models", "small-400", "--steps", "1"]
    peers = ["--peers", "autograd-function,eager-lpg"]
    assert cli.main([*arguments, *peers, "--json", str(path), "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out
    assert "logits | lpg | forward and backward | float32 on cpu (few classes: 0.0M elements, 12 bytes each)" in shown
    assert "F.cross_entropy, no LPG" in shown
    data = json.loads(path.read_text())
    found = {(row["model"], row["recipe"], row["variant"]) for row in data["records"]}
    assert {("alone", "reversal", OURS), ("head", "reversal", NO_REVERSAL), ("small-400", "clip", OURS)} <= found
    assert ("logits", "lpg", "eager-lpg") in found
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_list_shows_functions_and_their_ways(capsys):
    assert cli.main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name in (*FUNCTIONS, *SIZES, *WAYS):
        assert name in shown


def test_eager_lpg_knows_all_signs():
    tensors = FunctionCase(LPG, LOGITS).tensors(torch.float64)
    tensors["sign"] = torch.arange(11) % 3 - 1
    _, perturbed = lpg_case.frugally(lpg_case.frugal_lpg)(tensors)
    _, plain = LPG.oracle(tensors, True)
    left = (tensors["sign"] == 0)[tensors["target"]]
    torch.testing.assert_close(perturbed[left], plain[left])
    assert (perturbed[~left] - plain[~left]).abs().amax(1).min() > 0
