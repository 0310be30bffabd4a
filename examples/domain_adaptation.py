"""Digits from a shifted domain without labels: a network trained on the source alone, and one adapted by gradient reversal.

Half of the training images are the source, with labels. The other half, shifted, is the target. Only the arm "labelled target"
sees its labels. The test images are shifted too. Domain-adversarial training after Ganin et al. 2016.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import study_report as report
import torch
from digits import accuracy, batches, data_for, features_cnn
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from study import Arm, Metric, Outcome, Record, Run, Study, main
from torch import Tensor, nn
from torch.nn import functional as F

import gradfused
from gradfused.nn import DANNSchedule, ReversalLinear

WIDTH = 16
FEATURES = 4 * WIDTH
ANGLE, SIGMA = 25.0, 0.3
SHIFT_PICTURED, PICTURED = (
    "rotated",
    150,
)  # the shift whose features are plotted, and for how many images of each domain
CANDIDATES = {
    "source only": tuple({"lr": lr} for lr in (5e-4, 1e-3, 2e-3)),
    "DANN": tuple({"hi": hi} for hi in (0.03, 0.1, 0.3)),  # the final strength of the reversal
    "labelled target": ({},),
}


def inverted(images: Tensor) -> Tensor:
    """The images with black and white exchanged."""
    return 1 - images


def rotated(images: Tensor) -> Tensor:
    """The images turned by 25 degrees."""
    cos, sin = math.cos(math.radians(ANGLE)), math.sin(math.radians(ANGLE))
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    return F.grid_sample(images, F.affine_grid(turn, list(images.shape), align_corners=False), align_corners=False)


def noisy(images: Tensor) -> Tensor:
    """The images with normal noise of standard deviation 0.3 added."""
    return (images + SIGMA * torch.randn(images.shape)).clamp(0, 1)


SHIFTS: dict[str, Callable[[Tensor], Tensor]] = {"inverted": inverted, "rotated": rotated, "noisy": noisy}


class Domains(NamedTuple):
    """Images (n, 1, 8, 8) and labels of the source and of the shifted target, and test images shifted and unshifted."""

    source: Tensor
    source_labels: Tensor
    target: Tensor
    target_labels: Tensor
    test: Tensor
    test_labels: Tensor
    upright_test: Tensor


def domains(run: Run, shift: Callable[[Tensor], Tensor]) -> Domains:
    """A random half of the images for each domain, so that no image is in both."""
    data = data_for(run.seed, run.tuning)
    source, target = torch.randperm(len(data.images)).chunk(2)
    shifted, test = shift(data.images[target]), shift(data.test_images)
    source_part, target_labels = (data.images[source], data.labels[source]), data.labels[target]
    return Domains(*source_part, shifted, target_labels, test, data.test_labels, data.test_images)


class Network(nn.Module):
    """Features with a head that classifies the digit and an adversarial head that classifies the domain."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.digit = features_cnn(WIDTH), nn.Linear(FEATURES, 10)
        self.domain = nn.Sequential(ReversalLinear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, images: Tensor) -> Tensor:
        return self.digit(self.features(images))


def supervised_loss(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(network(images), labels)


def dann_loss(network: Network, images: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """The loss of the digits on the source plus that of the domains, whose gradient is reversed before the features."""
    features = network.features(torch.cat([images, target]))
    domain = torch.arange(2).repeat_interleave(torch.tensor([len(images), len(target)]))
    digits = F.cross_entropy(network.digit(features[: len(images)]), labels)
    return digits + F.cross_entropy(network.domain(features), domain)


def train(run: Run) -> Outcome:
    shift, method = run.arm.split(", ")
    data, network = domains(run, SHIFTS[shift]), Network()
    images, labels = (data.target, data.target_labels) if method == "labelled target" else data[:2]
    optimizer = gradfused.Adam(network.parameters(), lr=run.options.get("lr", 1e-3))
    steps = list(batches(len(images), run.epochs))
    schedule = DANNSchedule(network, total_steps=len(steps), hi=run.options.get("hi", 1.0))
    for batch in steps:
        optimizer.zero_grad()
        if method == "DANN":
            target = data.target[torch.randint(len(data.target), (len(batch),))]
            loss = dann_loss(network, images[batch], labels[batch], target)
        else:
            loss = supervised_loss(network, images[batch], labels[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
    score = accuracy(network, data.test, data.test_labels)
    if run.tuning:
        return Outcome({"target": score})
    metrics = {
        "target": score,
        "source": accuracy(network, data.upright_test, data.test_labels),
        "apart": told_apart(network, data),
    }
    pictured = run.seed == 0 and shift == SHIFT_PICTURED
    return Outcome(metrics, {"map": feature_map(network, data)} if pictured else {})


@torch.no_grad()
def told_apart(network: Network, data: Domains) -> float:
    """The percentage of training images whose domain a linear classifier, cross-validated, tells from their features."""
    features = torch.cat([network.features(data.source), network.features(data.target)])
    domain = torch.cat([torch.zeros(len(data.source)), torch.ones(len(data.target))])
    judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
    return 100 * float(cross_val_score(judge, features.numpy(), domain.numpy(), cv=2).mean())


@torch.no_grad()
def feature_map(network: Network, data: Domains) -> list[list[float]]:
    """Two-dimensional t-SNE of the features of some test images of the source, followed by as many of the target."""
    features = network.features(torch.cat([data.upright_test[:PICTURED], data.test[-PICTURED:]]))
    points = TSNE(random_state=0, init="pca").fit_transform(features.numpy())
    return [[round(float(value), 1) for value in point] for point in points]


def draw(record: Record, path: Path) -> None:
    figure, axes = report.figure(3, record["title"])
    for axis, method in zip(axes, ("source only", "DANN"), strict=False):
        arm = f"{SHIFT_PICTURED}, {method}"
        (points,) = (run["extra"]["map"] for run in report.runs_of(record, arm) if run["seed"] == 0)
        for domain, colour, part in (
            ("source", "#2f5f94", points[:PICTURED]),
            ("target", "#d9480f", points[PICTURED:]),
        ):
            axis.plot(*zip(*part, strict=True), "o", ms=3, alpha=0.6, mec="none", color=colour, label=domain)
        axis.set_title(f"features, {arm}", loc="left", fontsize=10)
        axis.set(xticks=[], yticks=[])
        axis.legend(frameon=False)
    report.dots(axes[2], record, "target")
    report.save(figure, path)


def arms() -> dict[str, Arm]:
    """Three methods for each shift. Training on labels of the target gives the upper limit."""
    return {
        f"{shift}, {method}": Arm(f"{shift}, source only" if method == "DANN" else None, candidates)
        for shift in SHIFTS
        for method, candidates in CANDIDATES.items()
    }


STUDY = Study(
    name="domain_adaptation",
    title="Digits in a shifted domain: source only, and gradient reversal (DANN)",
    metrics={
        "target": Metric("target accuracy, %"),
        "source": Metric("source accuracy, %"),
        "apart": Metric("domains told apart, %", higher=False),
    },
    arms=arms(),
    train=train,
    draw=draw,
    epochs=30,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
