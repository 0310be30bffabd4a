"""Gradient centralisation on and off: does the loss of a small CNN oscillate less, fall faster, end in a better network?"""

from __future__ import annotations

import sys
from pathlib import Path

import study_report as report
from digits import CURVE_STEP, LossTrace, accuracy, batches, cnn, data_for
from study import Arm, Metric, Outcome, Record, Run, Study, main
from torch.nn import functional as F

import gradfused

OPTIMIZERS = {
    "SGD": lambda params, **options: gradfused.SGD(params, momentum=0.9, weight_decay=5e-4, **options),
    "AdamW": lambda params, **options: gradfused.AdamW(params, weight_decay=0.05, **options),
}
RATES = {
    "SGD": (0.03, 0.1),
    "AdamW": (3e-3, 1e-2),
}  # a usual rate, and about the largest that still trains most of the time


def train(run: Run) -> Outcome:
    data, network = data_for(run.seed, run.tuning), cnn()
    make_optimizer = OPTIMIZERS[run.arm.split(",")[0]]
    optimizer = make_optimizer(network.parameters(), **run.options)
    trace = LossTrace(network, data)
    for batch in batches(len(data.images), run.epochs):
        optimizer.zero_grad()
        F.cross_entropy(network(data.images[batch]), data.labels[batch]).backward()
        optimizer.step()
        trace.record()
    metrics = {
        "accuracy": accuracy(network, data.test_images, data.test_labels),
        "oscillation": trace.oscillation(),
        "steps": trace.steps_to(0.1),
    }
    return Outcome(metrics, {"losses": trace.curve()})


def draw(record: Record, path: Path) -> None:
    figure, axes = report.figure(3, record["title"])
    for axis, name in zip(axes, OPTIMIZERS, strict=False):
        report.curves(axis, record, "losses", {arm: arm for arm in pair(name, RATES[name][-1])}, CURVE_STEP)
        axis.set(yscale="log", xlabel="step", ylabel="loss of 256 training images")
    report.dots(axes[2], record, "oscillation")
    report.save(figure, path)


def pair(name: str, rate: float) -> tuple[str, str]:
    """The names of the arms without and with centralisation."""
    return f"{name}, lr {rate:g}", f"{name}, lr {rate:g}, centralize"


def arms() -> dict[str, Arm]:
    """For each optimizer and rate, an arm without centralisation and one with it that is compared with the first."""
    out = {}
    for name, rate in ((name, rate) for name, rates in RATES.items() for rate in rates):
        off, on = pair(name, rate)
        out |= {off: Arm(None, ({"lr": rate},)), on: Arm(off, ({"lr": rate, "centralize": True},))}
    return out


STUDY = Study(
    name="digits_centralization",
    title="Handwritten digits, CNN: gradient centralisation on and off",
    metrics={
        "accuracy": Metric("test accuracy, %", digits=2),
        "oscillation": Metric("oscillation of the loss", higher=False, digits=3),
        "steps": Metric("steps to a tenth of the loss", higher=False),
    },
    arms=arms(),
    train=train,
    draw=draw,
    epochs=10,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
