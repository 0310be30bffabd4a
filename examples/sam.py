"""Sharpness-aware minimisation on few digits: SAM and ASAM against SGD, also with twice the epochs, which cost the same."""

from __future__ import annotations

import sys
from pathlib import Path

import study_report as report
import torch
from digits import BATCH, accuracy, batches, cnn, data_for
from study import Metric, Outcome, Record, Run, Study, arms_against, main
from torch import Tensor, nn
from torch.nn import functional as F

import gradfused

IMAGES = 300  # for training; with all of them there is little left to gain
STEP = 0.1  # how far along the gradient sharpness is measured
RATES = (0.02, 0.05, 0.1)
CANDIDATES = {
    "SGD": tuple({"lr": lr} for lr in RATES),
    "SGD, twice the epochs": tuple({"lr": lr} for lr in RATES),
    "SAM": tuple({"rho": rho} for rho in (0.02, 0.05, 0.1)),
    "ASAM": tuple({"rho": rho} for rho in (0.2, 0.5, 1.0)),
}


def step_with_sam(sam: gradfused.SAM, network: nn.Module, images: Tensor, labels: Tensor) -> None:
    """One step of SAM: climb to the worst weights nearby, take the gradient there, and descend from the old weights."""
    F.cross_entropy(network(images), labels).backward()
    sam.first_step()
    sam.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    sam.second_step()


def train(run: Run) -> Outcome:
    data, network = data_for(run.seed, run.tuning), cnn(width=8)
    few = torch.randperm(len(data.images))[:IMAGES]
    images, labels = data.images[few], data.labels[few]
    epochs = run.epochs * (2 if "twice" in run.arm else 1)
    optimizer = gradfused.SGD(network.parameters(), lr=run.options.get("lr", 0.05), momentum=0.9, weight_decay=5e-4)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // BATCH))
    sam = gradfused.SAM(optimizer, run.options["rho"], adaptive=run.arm == "ASAM") if "SAM" in run.arm else None
    for batch in batches(len(images), epochs):
        optimizer.zero_grad()
        if sam is None:
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
        else:
            step_with_sam(sam, network, images[batch], labels[batch])
        annealing.step()
    with torch.no_grad():
        loss = float(F.cross_entropy(network(data.test_images), data.test_labels))
    metrics = {
        "accuracy": accuracy(network, data.test_images, data.test_labels),
        "loss": loss,
        "sharpness": sharpness(network, images, labels),
    }
    return Outcome(metrics)


def sharpness(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """How much the training loss rises when the weights move by a norm of 0.1 along its gradient."""
    weights = list(network.parameters())
    before = F.cross_entropy(network(images), labels)
    gradients = torch.autograd.grad(before, weights)
    norm = nn.utils.get_total_norm(gradients) + 1e-12
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight += STEP * gradient / norm
        after = F.cross_entropy(network(images), labels)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= STEP * gradient / norm
    return float(after) - float(before.detach())


def draw(record: Record, path: Path) -> None:
    figure, axes = report.figure(3, record["title"], height=3.2)
    for axis, key in zip(axes, record["metrics"], strict=True):
        report.dots(axis, record, key)
    report.save(figure, path)


STUDY = Study(
    name="sam",
    title=f"{IMAGES} handwritten digits: sharpness-aware minimisation",
    metrics={
        "accuracy": Metric("test accuracy, %", digits=2),
        "loss": Metric("test loss", higher=False, digits=3),
        "sharpness": Metric("sharpness of the training loss", higher=False, digits=4),
    },
    arms=arms_against("SGD", CANDIDATES),
    train=train,
    draw=draw,
    epochs=40,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
