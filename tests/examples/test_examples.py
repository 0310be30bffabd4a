"""The case studies run at tiny scale, and docs/techniques.md shows what their records hold."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from statistics import fmean

import pytest
import torch
from repository import ROOT
from torch import nn

import gradfused

EXAMPLES, RECORDS, PAGE = ROOT / "examples", ROOT / "docs/techniques", ROOT / "docs/techniques.md"
NAMES = (
    "digits_centralization",
    "digits_rnn",
    "domain_adaptation",
    "long_tail",
    "medical",
    "noisy_labels",
    "sam",
)
TINY = ["--seeds", "2", "--epochs", "1", "--tuning-seeds", "1"]
MOST_BYTES = 150_000  # of an image in the repository


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    """Lets the scripts import each other as they do when run from the command line."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def module(name):
    return importlib.import_module(name)


def study_of(name):
    return module(name).STUDY


def published(name):
    return json.loads((RECORDS / f"{name}.json").read_text())


def metrics_of(record, arm, key):
    return [run["metrics"][key] for run in record["runs"] if run["arm"] == arm]


def check(record, study):
    """A record is complete, and its summary follows from its runs."""
    seeds = list(range(record["settings"]["seeds"]))
    assert record["study"] == study.name
    assert record["metrics"] == {key: asdict(metric) for key, metric in study.metrics.items()}
    assert list(record["summary"]) == list(record["arms"]) == list(study.arms)
    for name, arm in study.arms.items():
        assert record["arms"][name]["candidates"] == [dict(options) for options in arm.candidates]
        assert record["arms"][name]["chosen"] in record["arms"][name]["candidates"]
        assert [run["seed"] for run in record["runs"] if run["arm"] == name] == seeds
        assert record["summary"][name].get("minus") == arm.baseline
        for key in study.metrics:
            values = metrics_of(record, name, key)
            assert record["summary"][name]["mean"][key] == pytest.approx(module("study").interval(values))
            if arm.baseline:
                before = metrics_of(record, arm.baseline, key)
                mean = fmean(a - b for a, b in zip(values, before, strict=True))
                assert record["summary"][name]["difference"][key][0] == pytest.approx(mean, rel=1e-5, abs=1e-9)


# ---- running


@pytest.fixture
def few_images(monkeypatch):
    """A fifth of the digits, for speed."""
    digits = module("digits")
    part = digits.digits()
    few = digits.Digits(part.images[::5], part.labels[::5], part.test_images[::5], part.test_labels[::5])
    monkeypatch.setattr(digits, "digits", lambda: few)


@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("name", NAMES)
def test_a_study_runs_and_records(name, tmp_path, capsys):
    study = study_of(name)
    assert module("study").main(study, [*TINY, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / f"{name}.json").read_text())
    check(record, study)
    assert record["settings"] == {"seeds": 2, "epochs": 1, "tuning_seeds": [100], "confidence": 0.95}
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "2 seeds, 1 epochs" in printed
    assert "minus" in printed


def test_no_study_is_left_out():
    assert {path.stem for path in EXAMPLES.glob("*.py") if "STUDY = Study(" in path.read_text()} == set(NAMES)


def test_the_quickstart_prints_what_the_recipe_changed(capsys):
    module("quickstart").main()
    plain, recipe = capsys.readouterr().out.splitlines()
    found = r"(.*): training loss ([\d.]+), ([\d.]+) % of new images read correctly"
    (without, loss, right), (options, new_loss, new_right) = (
        re.fullmatch(found, line).groups() for line in (plain, recipe)
    )
    assert without == "plain SGD"
    assert options == "centralize=True, clip_norm=1"
    assert float(new_loss) < float(loss)
    assert float(new_right) > float(right) > 60


def test_a_script_starts_from_the_command_line():
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "medical.py"), "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "--tuning-seeds" in run.stdout


@pytest.mark.usefixtures("few_images")
def test_a_seed_decides_everything():
    study, run = module("study"), module("study").Run("LPG", {"radius": 0.1}, 3, 1, False)
    first, again = (study.train(study_of("long_tail"), run) for _ in range(2))
    other = study.train(study_of("long_tail"), replace(run, seed=4))
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "'1' is not a whole number of at least 2: an interval needs two runs"),
        (["--epochs", "0"], "'0' is not a whole number of at least 1"),
        (["--threads", "many"], "'many' is not a whole number of at least 1"),
        (["--tuning-seeds", "-1"], "'-1' is not a whole number of at least 1"),
        (["--out", __file__], "cannot be used as a folder: File exists"),
        (["--lr", "1"], "unrecognized arguments: --lr 1"),
    ],
)
def test_bad_arguments_say_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        module("study").main(study_of("medical"), arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


# ---- the protocol


def made_up(higher, outcome):
    """A study whose runs are computed instead of trained."""
    study = module("study")
    candidates = tuple({"x": x} for x in (1.0, 2.0, 3.0))
    return study.Study(
        "made_up",
        "Made up",
        {"score": study.Metric("score", higher=higher), "other": study.Metric("other")},
        {"a": study.Arm(None, candidates), "b": study.Arm("a")},
        lambda run: study.Outcome(outcome(run)),
        lambda record, path: None,
        epochs=1,
    )


@pytest.mark.parametrize(("higher", "best"), [(True, 2.0), (False, 1.0)])
def test_tuning_takes_the_best_on_validation_data(higher, best):
    scores = {1.0: 5.0, 2.0: 9.0, 3.0: 5.0}  # of the two worst the first wins

    def outcome(run):
        assert run.tuning == (run.seed >= 100)
        return {"score": scores[run.options["x"]] if run.tuning else run.seed + (run.arm == "b"), "other": 0.0}

    record = module("study").perform(made_up(higher, outcome), 3, 1, [100, 101], lambda what: None)
    assert record["arms"]["a"]["chosen"] == {"x": best}
    assert record["summary"]["a"]["mean"]["score"] == pytest.approx((1.0, 2.48414), rel=1e-5)  # t(2) = 4.30265
    assert record["summary"]["b"]["difference"]["score"] == (1.0, 0.0)


def test_a_run_that_is_not_finite_stops_the_study():
    study = made_up(True, lambda run: {"score": 1.0, "other": float("nan")})
    with pytest.raises(RuntimeError, match=r"'a' with \{'x': 1.0\}, seed 0: other is not finite"):
        module("study").perform(study, 2, 1, [100], lambda what: None)


def test_progress_knows_how_many_runs_there_are():
    study, told = made_up(True, lambda run: {"score": 1.0, "other": 1.0}), []
    module("study").perform(study, 4, 1, [100, 101], told.append)
    assert len(told) == module("study").count_runs(study, 4, [100, 101]) == 3 * 2 + 4 * 2


def test_tuning_sees_no_test_image():
    digits = module("digits")
    everything = digits.digits()
    test = {image.numpy().tobytes() for image in everything.test_images}
    tuning = digits.data_for(100, tuning=True)
    used = [image.numpy().tobytes() for image in torch.cat([tuning.images, tuning.test_images])]
    assert len(used) == len(everything.images)
    assert test.isdisjoint(used)
    assert digits.data_for(5, tuning=False) is everything


# ---- what is measured


class Falling(nn.Module):
    """Two classes, whose loss is given."""

    def __init__(self, losses):
        super().__init__()
        self.losses = iter(losses)

    def forward(self, images):
        own = torch.tensor(-next(self.losses)).exp()
        return torch.stack([own, 1 - own]).log().expand(len(images), 2)


def traced(*losses):
    digits = module("digits")
    images, labels = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long)
    trace = digits.LossTrace(Falling(losses), digits.Digits(images, labels, images, labels))
    for _ in losses[1:]:
        trace.record()
    return trace


def test_oscillation_is_what_the_loss_climbs():
    assert traced(2.0, 1.5, 1.0, 0.5).oscillation() == 0
    assert traced(2.0, 1.0, 1.5, 0.5, 0.7).oscillation() == pytest.approx(0.35)
    assert traced(2.0, float("nan")).oscillation() == pytest.approx(9.0)
    assert traced(2.0, 1.0, 0.39, 1.0).steps_to(0.2) == 2
    assert traced(2.0, 1.0).steps_to(0.2) == 1


def test_logit_perturbation_keeps_its_bound_and_moves_the_loss():
    lpl = module("lpl")
    torch.manual_seed(0)
    logits, target = torch.randn(40, 4), torch.arange(40) % 3
    bound = torch.tensor([1.0, -1.0, 0.0, 2.0])
    vectors = lpl.perturbation(logits, target, bound)
    assert (vectors.norm(dim=1) <= bound.abs() + 1e-6).all()
    assert not vectors[2:].any()  # no bound; no member
    for label, sign in ((0, 1), (1, -1)):
        own, same = logits[target == label], target[target == label]
        before = nn.functional.cross_entropy(own, same)
        assert sign * (lpl.lpl_cross_entropy(own, same, bound) - before) > 0


def test_rare_classes_are_rare():
    long_tail, data = module("long_tail"), module("digits").digits()
    torch.manual_seed(0)
    _, labels, order = long_tail.long_tailed(data.images, data.labels)
    counts = labels.bincount(minlength=10)[order]
    assert (counts.diff() < 0).all()
    assert counts[0] / counts[-1] == pytest.approx(long_tail.IMBALANCE, rel=0.1)


def test_labels_are_wrong_as_often_as_said():
    noisy, labels = module("noisy_labels"), torch.arange(10).repeat(2000)
    torch.manual_seed(0)
    moved = noisy.mislabelled(labels)
    assert float((moved != labels).double().mean()) == pytest.approx(noisy.WRONG, abs=0.01)
    assert set(moved.tolist()) == set(range(10))


def test_a_rotation_turns_and_a_quarter_turn_is_exact(monkeypatch):
    shifts = module("domain_adaptation")
    images = torch.rand(3, 1, 8, 8)
    monkeypatch.setattr(shifts, "ANGLE", 90.0)
    torch.testing.assert_close(shifts.rotated(images), images.rot90(1, (2, 3)), rtol=0, atol=1e-5)
    torch.testing.assert_close(shifts.inverted(images) + images, torch.ones_like(images))


def test_domains_share_no_image():
    study, shifts = module("study"), module("domain_adaptation")
    torch.manual_seed(1)
    data = shifts.domains(study.Run("rotated, DANN", {}, 1, 1, False), lambda images: images)
    images = [{image.numpy().tobytes() for image in part} for part in (data.source, data.target, data.test)]
    assert not images[0] & images[1] | images[1] & images[2] | images[0] & images[2]


def test_measuring_sharpness_leaves_the_weights():
    sam, digits = module("sam"), module("digits")
    torch.manual_seed(0)
    network, data = digits.cnn(), digits.digits()
    before = [weight.detach().clone() for weight in network.parameters()]
    assert sam.sharpness(network, data.images[:50], data.labels[:50]) > 0
    for weight, old in zip(network.parameters(), before, strict=True):
        torch.testing.assert_close(weight.detach(), old, rtol=0, atol=1e-6)


# ---- what is published


@pytest.mark.parametrize("name", NAMES)
def test_published_records_are_those_of_the_scripts(name):
    study, record = study_of(name), published(name)
    check(record, study)
    assert record["settings"]["seeds"] == study.seeds >= 10
    assert record["settings"]["epochs"] == study.epochs
    assert record["settings"]["tuning_seeds"] == list(module("study").TUNING_SEEDS)
    assert (RECORDS / f"{name}.png").stat().st_size < MOST_BYTES
    page = PAGE.read_text()
    assert f"<!-- table: {name} -->" in page
    assert f"](techniques/{name}.png)" in page


def test_the_tables_of_the_page_are_the_records():
    report, page = module("study_report"), PAGE.read_text()
    assert len(report.MARKER.findall(page)) == len(NAMES)
    assert report.with_tables(page, RECORDS) == page, "run: python examples/study_report.py docs/techniques.md"


def test_the_code_of_the_page_names_what_there_is():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        compile(block, str(PAGE), "exec")
        for name in re.findall(r"\bgradfused\.(\w+)\(", block):
            assert hasattr(gradfused, name)
        for line in re.findall(r"^from gradfused.* import .*$", block, re.MULTILINE):
            exec(line, {})


def test_a_record_becomes_a_table():
    record = {
        "metrics": {"x": {"label": "score", "higher": True, "digits": 1}},
        "arms": {
            "off": {"candidates": [{"lr": 1}, {"lr": 2}], "chosen": {"lr": 2}},
            "on": {"candidates": [{}], "chosen": {}},
        },
        "summary": {
            "off": {"mean": {"x": [1.0, 0.25]}},
            "on": {"mean": {"x": [2.0, 0.5]}, "minus": "off", "difference": {"x": [1.0, 0.5]}},
        },
    }
    assert module("study_report").markdown(record).splitlines() == [
        "| | score ↑ |",
        "|---|---:|",
        "| off (lr 2) | 1.0 ± 0.2 |",
        "| on | 2.0 ± 0.5 |",
        "| *minus off* | **+1.00 ± 0.50** |",
    ]
