"""Breast cancer from 30 measurements of cell nuclei: precision and recall of malignant tumours, by recipe."""

from __future__ import annotations

import sys
from pathlib import Path

import study_report as report
import torch
from digits import batches
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import precision_score, recall_score, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from study import Metric, Outcome, Record, Run, Study, arms_against, main
from torch import Tensor, nn
from torch.nn import functional as F

import gradfused

TEST_SHARE = 0.3
RECIPES = {
    "plain": {},
    "centralize": {"centralize": True},
    "clip": {"clip_norm": 0.5},
    "noise": {"noise": 1e-3},
    "all three": {"centralize": True, "clip_norm": 0.5, "noise": 1e-3},
}


def patients(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Standardised measurements and diagnoses (1: malignant), to train and to test, split anew for every seed.

    With one split for all seeds, the figures would depend on which 171 of the 569 patients are tested.
    """
    measured, benign = load_breast_cancer(return_X_y=True)
    train, test, train_benign, test_benign = train_test_split(
        measured, benign, test_size=TEST_SHARE, stratify=benign, random_state=seed
    )
    scaler = StandardScaler().fit(train)

    def tensors(values: object, benign: object) -> tuple[Tensor, Tensor]:
        return torch.tensor(scaler.transform(values), dtype=torch.float32), 1 - torch.tensor(benign)

    return *tensors(train, train_benign), *tensors(test, test_benign)


def train(run: Run) -> Outcome:
    measured, malignant, test_measured, test_malignant = patients(run.seed)
    network = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = gradfused.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05, seed=run.seed, **run.options)
    for batch in batches(len(measured), run.epochs):
        optimizer.zero_grad()
        F.cross_entropy(network(measured[batch]), malignant[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        logits = network(test_measured)
    guesses, suspicion = logits.argmax(dim=1), logits.softmax(dim=1)[:, 1]
    metrics = {
        "recall": 100 * recall_score(test_malignant, guesses),
        "precision": 100 * precision_score(test_malignant, guesses, zero_division=0.0),
        "auc": 100 * roc_auc_score(test_malignant, suspicion),
        "loss": float(F.cross_entropy(logits, test_malignant)),
    }
    return Outcome({key: float(value) for key, value in metrics.items()})


def draw(record: Record, path: Path) -> None:
    figure, axes = report.figure(3, record["title"], height=3.2)
    for axis, key in zip(axes, ("recall", "precision", "loss"), strict=True):
        report.dots(axis, record, key)
    report.save(figure, path)


STUDY = Study(
    name="medical",
    title="Breast cancer: precision and recall",
    metrics={
        "recall": Metric("recall of malignant, %", digits=2),
        "precision": Metric("precision, %", digits=2),
        "auc": Metric("area under ROC, %", digits=2),
        "loss": Metric("test loss", higher=False, digits=4),
    },
    arms=arms_against("plain", {name: (options,) for name, options in RECIPES.items()}),
    train=train,
    draw=draw,
    epochs=30,
    seeds=30,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
