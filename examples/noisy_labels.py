"""Digits two fifths of which are labelled wrongly: cross-entropy, label smoothing, LPL and LPG."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import study_report as report
import torch
from digits import accuracy, batches, cnn, data_for, predictions
from lpl import confidence_bound, lpl_cross_entropy
from study import Metric, Outcome, Record, Run, Study, arms_against, main
from torch import Tensor
from torch.nn import functional as F

import gradfused
from gradfused.nn import LPGCrossEntropyLoss

IMAGES = 500  # for training, few enough that the network can memorise the wrong labels
WRONG = 0.4  # share of wrong labels
CURVE_STEP = 3  # epochs from point to point
WEIGHT_DECAY = 2.0  # large, but best for cross-entropy on validation data, and used in every arm
CANDIDATES = {
    "cross-entropy": tuple({"weight decay": decay} for decay in (1.0, WEIGHT_DECAY, 4.0)),
    "label smoothing": tuple({"smoothing": smoothing} for smoothing in (0.2, 0.4, 0.6)),
    "LPL": tuple({"bound": bound} for bound in (0.25, 0.5, 1.0)),
    "LPG, noisy": tuple({"radius": radius} for radius in (0.03, 0.1, 0.2)),
    "LPG, by sample": tuple({"radius": radius} for radius in (0.2, 0.4, 0.8)),
}

Loss = Callable[[Tensor, Tensor], Tensor]


def mislabelled(labels: Tensor) -> Tensor:
    """The labels with a random share of them changed to another class, all other classes being equally likely."""
    moved = (labels + torch.randint(1, 10, labels.shape)) % 10
    return torch.where(torch.rand(labels.shape) < WRONG, moved, labels)


def loss_of(run: Run) -> Loss:
    """The loss that an arm trains with."""
    options = run.options
    if run.arm == "label smoothing":
        return lambda logits, target: F.cross_entropy(logits, target, label_smoothing=options["smoothing"])
    if run.arm == "LPL":
        return lambda logits, target: lpl_cross_entropy(
            logits, target, confidence_bound(logits, target, options["bound"])
        )
    if run.arm == "LPG, noisy":
        return LPGCrossEntropyLoss(10, options["radius"], mode="noisy", momentum=0.9)
    if run.arm == "LPG, by sample":  # every class is dampened: gradients shorter than the radius vanish
        return LPGCrossEntropyLoss(10, options["radius"], sign=-torch.ones(10), scope="sample")
    return F.cross_entropy


def train(run: Run) -> Outcome:
    data, network, loss = data_for(run.seed, run.tuning), cnn(width=8), loss_of(run)
    few = torch.randperm(len(data.images))[:IMAGES]
    images, labels = data.images[few], mislabelled(data.labels[few])
    wrong = labels != data.labels[few]
    decay = run.options.get("weight decay", WEIGHT_DECAY)
    optimizer = gradfused.AdamW(network.parameters(), lr=3e-3, weight_decay=decay)
    steps = list(batches(len(labels), run.epochs))
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    curve, stride = (
        [accuracy(network, data.test_images, data.test_labels)],
        max(1, CURVE_STEP * len(steps) // run.epochs),
    )
    for step, batch in enumerate(steps, start=1):
        optimizer.zero_grad()
        loss(network(images[batch]), labels[batch]).backward()
        optimizer.step()
        annealing.step()
        if step % stride == 0:
            curve.append(round(accuracy(network, data.test_images, data.test_labels), 2))
    memorised = predictions(network, images[wrong]) == labels[wrong]
    metrics = {
        "accuracy": accuracy(network, data.test_images, data.test_labels),
        "memorised": 100 * float(memorised.double().mean()),
    }
    return Outcome(metrics, {"curve": curve})


def draw(record: Record, path: Path) -> None:
    figure, axes = report.figure(3, record["title"])
    report.curves(axes[0], record, "curve", {arm: arm for arm in record["summary"]}, CURVE_STEP)
    axes[0].set(xlabel="epoch", ylabel="test accuracy, %")
    for axis, key in zip(axes[1:], ("accuracy", "memorised"), strict=True):
        report.dots(axis, record, key)
    report.save(figure, path)


STUDY = Study(
    name="noisy_labels",
    title="Digits with two fifths of the labels wrong",
    metrics={
        "accuracy": Metric("accuracy on right labels, %", digits=2),
        "memorised": Metric("wrong labels memorised, %", higher=False),
    },
    arms=arms_against("cross-entropy", CANDIDATES),
    train=train,
    draw=draw,
    epochs=60,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
