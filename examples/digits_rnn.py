"""A recurrent network that reads digits row by row: what do centralisation and clipping do for its stability?"""

from __future__ import annotations

import sys
from pathlib import Path

import study_report as report
from digits import CURVE_STEP, LossTrace, accuracy, batches, data_for
from study import Arm, Metric, Outcome, Record, Run, Study, main
from torch import Tensor, nn
from torch.nn import functional as F

import gradfused

RATES = (0.03, 0.1)  # a rate that suits the network, and one that is too high
RECIPES = {
    "plain": {},
    "centralize": {"centralize": True},
    "clip": {"clip_norm": 1.0},
    "both": {"centralize": True, "clip_norm": 1.0},
}


class Reader(nn.Module):
    """An Elman network with tanh that reads eight rows of eight pixels and then decides."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.recurrent, self.decide = nn.RNN(8, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.recurrent(images.squeeze(1))
        return self.decide(states[:, -1])


def train(run: Run) -> Outcome:
    data, network = data_for(run.seed, run.tuning), Reader()
    optimizer = gradfused.SGD(network.parameters(), momentum=0.9, **run.options)
    trace, norms = LossTrace(network, data), []
    for batch in batches(len(data.images), run.epochs):
        optimizer.zero_grad()
        F.cross_entropy(network(data.images[batch]), data.labels[batch]).backward()
        norms.append(float(nn.utils.get_total_norm(p.grad for p in network.parameters())))
        optimizer.step()
        trace.record()
    metrics = {
        "accuracy": accuracy(network, data.test_images, data.test_labels),
        "oscillation": trace.oscillation(),
        "steps": trace.steps_to(0.2),
        "norm": max(norms),
    }
    return Outcome(metrics, {"losses": trace.curve()})


def draw(record: Record, path: Path) -> None:
    figure, axes = report.figure(3, record["title"])
    for axis, rate in zip(axes, RATES, strict=False):
        report.curves(axis, record, "losses", {name_of(rate, recipe): recipe for recipe in RECIPES}, CURVE_STEP)
        axis.set(yscale="log", xlabel="step", ylabel="loss of 256 training images")
        axis.set_title(f"lr {rate:g}", loc="left", fontsize=10)
    report.dots(axes[2], record, "accuracy")
    report.save(figure, path)


def name_of(rate: float, recipe: str) -> str:
    return f"lr {rate:g}, {recipe}"


def arms() -> dict[str, Arm]:
    """Every recipe at every rate, compared with no recipe at the same rate."""
    return {
        name_of(rate, recipe): Arm(None if recipe == "plain" else name_of(rate, "plain"), ({"lr": rate, **options},))
        for rate in RATES
        for recipe, options in RECIPES.items()
    }


STUDY = Study(
    name="digits_rnn",
    title="Handwritten digits, recurrent network: centralisation and clipping",
    metrics={
        "accuracy": Metric("test accuracy, %", digits=2),
        "oscillation": Metric("oscillation of the loss", higher=False, digits=2),
        "steps": Metric("steps to a fifth of the loss", higher=False),
        "norm": Metric("largest gradient norm", higher=False, digits=1),
    },
    arms=arms(),
    train=train,
    draw=draw,
    epochs=15,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
