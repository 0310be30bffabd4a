"""Runs a study: tunes its arms on equal terms, trains them with the same seeds, and writes a table, a plot and a record.

An *arm* is one way of training. Each arm has the same number of candidate settings. The candidate that is best on validation
data, over seeds that are used for nothing else, is trained again and judged by test data. Arms with the same seed start from the
same weights and see the same batches. So the effect of an arm is its difference to the baseline *seed by seed*, and the table
gives an interval for that difference.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from scipy.stats import t as student_t

import gradfused

TUNING_SEEDS = (100, 101, 102)  # not used by published runs
CONFIDENCE = 0.95

Options = Mapping[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A number that every run is judged by.

    Attributes:
        label: Its name, with the unit.
        higher: Whether higher is better.
        digits: Decimals in tables.
    """

    label: str
    higher: bool = True
    digits: int = 1


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        baseline: The arm it is compared with; None for a baseline.
        candidates: Settings to choose from on validation data. A single one is used without tuning.
    """

    baseline: str | None = None
    candidates: tuple[Options, ...] = ({},)


def arms_against(baseline: str, candidates: Mapping[str, tuple[Options, ...]]) -> dict[str, Arm]:
    """One arm for each name, all but the baseline compared with it."""
    return {name: Arm(None if name == baseline else baseline, options) for name, options in candidates.items()}


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        arm: The name of the arm.
        options: The arm's candidate to train with.
        seed: Decides the weights, the order of batches and everything else that is random.
        epochs: How many epochs to train.
        tuning: Whether to judge by validation data in place of test data.
    """

    arm: str
    options: Options
    seed: int
    epochs: int
    tuning: bool


@dataclass(frozen=True)
class Outcome:
    """The result of a training run.

    Attributes:
        metrics: The value of each of the study's metrics. A run that tunes need only give the first.
        extra: Anything else that the plot needs, in types that JSON has.
    """

    metrics: dict[str, float]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """An experiment.

    Attributes:
        name: What its files are called.
        title: One line that describes it.
        metrics: The metrics by key. The first decides between candidates.
        arms: The arms by name.
        train: Trains once; torch has been seeded before.
        draw: Draws a record into a file.
        epochs: How long a published run trains.
        seeds: How many runs of each arm are published.
    """

    name: str
    title: str
    metrics: dict[str, Metric]
    arms: dict[str, Arm]
    train: Callable[[Run], Outcome]
    draw: Callable[[Record, Path], None]
    epochs: int
    seeds: int = 10


# ---- numbers


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least two values, and half the width of its confidence interval by Student's t."""
    spread = statistics.stdev(values) / sqrt(len(values))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread
    return rounded(statistics.fmean(values)), rounded(half)


def summary(study: Study, runs: Sequence[Record]) -> Record:
    """For each arm, (mean, half-width) of its metrics and of their differences to the baseline seed by seed."""

    def values(arm: str, key: str) -> list[float]:
        return [run["metrics"][key] for run in runs if run["arm"] == arm]

    def differences(arm: str, baseline: str, key: str) -> list[float]:
        return [a - b for a, b in zip(values(arm, key), values(baseline, key), strict=True)]

    rows: Record = {}
    for name, arm in study.arms.items():
        rows[name] = {"mean": {key: interval(values(name, key)) for key in study.metrics}}
        if arm.baseline is not None:
            rows[name]["minus"] = arm.baseline
            rows[name]["difference"] = {key: interval(differences(name, arm.baseline, key)) for key in study.metrics}
    return rows


# ---- running


def train(study: Study, run: Run) -> Outcome:
    """Seed torch and train once."""
    torch.manual_seed(run.seed)
    outcome = study.train(run)
    keys = list(study.metrics)[: 1 if run.tuning else None]
    bad = [key for key in keys if not isfinite(outcome.metrics[key])]
    if bad:
        raise RuntimeError(f"{run.arm!r} with {dict(run.options)}, seed {run.seed}: {', '.join(bad)} is not finite")
    return replace(outcome, metrics={key: rounded(outcome.metrics[key]) for key in keys})


def rounded(value: float) -> float:
    """The value to six digits, so that records stay readable and a summary follows exactly from its runs."""
    return float(f"{value:.6g}")


def tune(study: Study, epochs: int, seeds: Sequence[int], on_run: Callable[[str], object]) -> dict[str, Options]:
    """For each arm the candidate that is best on validation data, or the first of those that are equally good."""
    key, metric = next(iter(study.metrics.items()))

    def score(name: str, options: Options) -> float:
        total = 0.0
        for seed in seeds:
            on_run(f"{name}: choosing, {options}")
            total += train(study, Run(name, options, seed, epochs, tuning=True)).metrics[key]
        return total if metric.higher else -total

    def best(name: str, candidates: Sequence[Options]) -> Options:
        return max(candidates, key=lambda options: score(name, options)) if len(candidates) > 1 else candidates[0]

    return {name: best(name, arm.candidates) for name, arm in study.arms.items()}


def perform(
    study: Study, seeds: int, epochs: int, tuning_seeds: Sequence[int], on_run: Callable[[str], object]
) -> Record:
    """Tune the arms, train them and make the record."""
    chosen = tune(study, epochs, tuning_seeds, on_run)
    runs = []
    for seed in range(seeds):
        for name in study.arms:
            on_run(f"{name}: seed {seed}")
            outcome = train(study, Run(name, chosen[name], seed, epochs, tuning=False))
            runs.append({"arm": name, "seed": seed} | asdict(outcome))
    return {
        "study": study.name,
        "title": study.title,
        "settings": {"seeds": seeds, "epochs": epochs, "tuning_seeds": list(tuning_seeds), "confidence": CONFIDENCE},
        "environment": environment(),
        "metrics": {key: asdict(metric) for key, metric in study.metrics.items()},
        "arms": {
            name: {"candidates": list(arm.candidates), "chosen": chosen[name]} for name, arm in study.arms.items()
        },
        "summary": summary(study, runs),
        "runs": runs,
    }


def count_runs(study: Study, seeds: int, tuning_seeds: Sequence[int]) -> int:
    """How many training runs a study takes, tuning included."""
    swept = (len(arm.candidates) for arm in study.arms.values() if len(arm.candidates) > 1)
    return sum(swept) * len(tuning_seeds) + seeds * len(study.arms)


def environment() -> Record:
    """The versions and settings that the figures depend on."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "gradfused": gradfused.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


# ---- the command line


def at_least(low: int, why: str = "") -> Callable[[str], int]:
    """An argparse type: a whole number from low on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}{why}")
        return int(text)

    return parse


def folder(text: str) -> Path:
    """An argparse type: a folder that is there or can be made."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used as a folder: {error.strerror}") from None
    return path


def parse_arguments(study: Study, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line, the same for all studies."""
    parser = argparse.ArgumentParser(prog=f"{study.name}.py", description=study.title)
    add = parser.add_argument
    two = at_least(2, ": an interval needs two runs")
    add("--seeds", type=two, default=study.seeds, metavar="N", help=f"runs of every arm; default: {study.seeds}")
    add("--epochs", type=at_least(1), default=study.epochs, metavar="N", help=f"default: {study.epochs}")
    tuning = len(TUNING_SEEDS)
    add("--tuning-seeds", type=at_least(1), default=tuning, metavar="N", help=f"runs a candidate; default: {tuning}")
    add("--threads", type=at_least(1), default=1, metavar="N", help="torch's threads; default: 1")
    add(
        "--out",
        type=folder,
        default="build/examples",
        metavar="FOLDER",
        help=f"where {study.name}.json and {study.name}.png go; default: build/examples",
    )
    return parser.parse_args(arguments)


def progress(study: Study, total: int) -> tuple[Progress, Callable[[str], None]]:
    """A progress bar on stderr, and the function to call when a run begins."""
    columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(bar_width=24), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True)
    task = bar.add_task(study.name, total=total)
    counted = iter(range(total))

    def on_run(what: str) -> None:
        bar.update(task, description=what, completed=next(counted))

    return bar, on_run


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """Run a study from the command line. Returns the exit status."""
    from study_report import table

    args = parse_arguments(study, arguments)
    torch.set_num_threads(args.threads)
    tuning_seeds = [TUNING_SEEDS[0] + i for i in range(args.tuning_seeds)]
    bar, on_run = progress(study, count_runs(study, args.seeds, tuning_seeds))
    with bar:
        record = perform(study, args.seeds, args.epochs, tuning_seeds, on_run)
    Console(width=None if sys.stdout.isatty() else 140).print(table(record))
    write(study, record, args.out)
    return 0


def write(study: Study, record: Record, out: Path) -> None:
    """Write the record, and the plot that is drawn from it."""
    text = json.dumps(record, indent=1)
    (out / f"{study.name}.json").write_text(compact(text) + "\n")
    study.draw(json.loads(text), out / f"{study.name}.png")
    print(f"wrote {study.name}.json and {study.name}.png to {out}")


def compact(text: str) -> str:
    """Indented JSON with each list of numbers and each flat object on one line."""
    return re.sub(r"[\[{]\s+[^\[\]{}]*?\s+[\]}]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)
