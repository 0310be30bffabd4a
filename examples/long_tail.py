"""Digits some of which are rare: cross-entropy, class weights, logit perturbation (LPL) and logit-gradient perturbation (LPG)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import study_report as report
import torch
from digits import accuracy, batches, cnn, data_for, predictions
from lpl import lpl_cross_entropy
from study import Metric, Outcome, Record, Run, Study, arms_against, main
from torch import Tensor
from torch.nn import functional as F

import gradfused
from gradfused.nn import LPGCrossEntropyLoss

IMBALANCE = 20.0  # how many times as many images the most frequent class has as the rarest
FEW = 3  # classes in the tail, and in the head
WEIGHT_DECAY = 0.05
CANDIDATES = {
    "cross-entropy": tuple({"weight decay": decay} for decay in (0.01, WEIGHT_DECAY, 0.2, 1.0)),
    "class weights": tuple({"power": power} for power in (0.25, 0.5, 0.75, 1.0)),
    "LPL": tuple({"bound": bound} for bound in (1.0, 2.0, 4.0, 8.0)),
    "LPG": tuple({"radius": radius} for radius in (0.03, 0.1, 0.2, 0.4)),
}

Loss = Callable[[Tensor, Tensor], Tensor]


def long_tailed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """Images and labels with exponentially fewer images from class to class, and the classes from frequent to rare.

    The order of the classes is random.
    """
    order = torch.randperm(10).tolist()
    kept = []
    for rank, label in enumerate(order):
        members = (labels == label).nonzero().squeeze(1)
        kept.append(members[: max(2, round(len(members) * IMBALANCE ** (-rank / 9)))])
    return images[torch.cat(kept)], labels[torch.cat(kept)], order


def loss_of(run: Run, counts: Tensor) -> Loss:
    """The loss that an arm trains with."""
    if run.arm == "class weights":
        weight = (counts.mean() / counts) ** run.options["power"]
        return lambda logits, target: F.cross_entropy(logits, target, weight)
    if run.arm == "LPL":
        rank = counts.argsort(descending=True).argsort()  # 0: the most frequent class
        bound = run.options["bound"] * (rank / 4.5 - 1)
        return lambda logits, target: lpl_cross_entropy(logits, target, bound)
    if run.arm == "LPG":
        return LPGCrossEntropyLoss(10, run.options["radius"], mode="longtail", counts=counts)
    return F.cross_entropy


def train(run: Run) -> Outcome:
    data = data_for(run.seed, run.tuning)
    images, labels, order = long_tailed(data.images, data.labels)
    network, loss = cnn(), loss_of(run, labels.bincount(minlength=10).float())
    decay = run.options.get("weight decay", WEIGHT_DECAY)
    optimizer = gradfused.AdamW(network.parameters(), lr=3e-3, weight_decay=decay)
    steps = list(batches(len(images), run.epochs))
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(steps))
    for batch in steps:
        optimizer.zero_grad()
        loss(network(images[batch]), labels[batch]).backward()
        optimizer.step()
        annealing.step()

    right = predictions(network, data.test_images) == data.test_labels
    by_class = torch.stack([right[data.test_labels == label].double().mean() for label in order])
    metrics = {
        "accuracy": accuracy(network, data.test_images, data.test_labels),
        "tail": 100 * float(by_class[-FEW:].mean()),
        "head": 100 * float(by_class[:FEW].mean()),
    }
    return Outcome(metrics, {"by_rank": [round(100 * float(share), 2) for share in by_class]})


def draw(record: Record, path: Path) -> None:
    figure, axes = report.figure(3, record["title"])
    report.curves(axes[0], record, "by_rank", {arm: arm for arm in record["summary"]})
    axes[0].set(xlabel="class, from frequent to rare", ylabel="accuracy of the class, %")
    for axis, key in zip(axes[1:], ("accuracy", "tail"), strict=True):
        report.dots(axis, record, key)
    report.save(figure, path)


STUDY = Study(
    name="long_tail",
    title="Long-tailed digits: what the loss does for rare classes",
    metrics={
        "accuracy": Metric("test accuracy, %", digits=2),
        "tail": Metric(f"accuracy, {FEW} rarest classes, %", digits=2),
        "head": Metric(f"accuracy, {FEW} most frequent, %", digits=2),
    },
    arms=arms_against("cross-entropy", CANDIDATES),
    train=train,
    draw=draw,
    epochs=40,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
