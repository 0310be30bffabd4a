"""scikit-learn's handwritten digits (1,797 images of 8 x 8), the networks that read them, and measurements of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 64
TEST_SHARE = 0.25
PROBE = 256  # training images whose loss is recorded after each step
CURVE_STEP = 2  # steps from point to point in a record's curves
CAP = 10.0  # losses are recorded as at most this many times the first, infinite ones and NaN too


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) in [0, 1] with labels (n,), for training and for testing."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@cache
def digits() -> Digits:
    """All images. A quarter is held out for testing, the same in every study and for every seed."""
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    return divide(images, labels, seed=0)


def divide(images: Tensor, labels: Tensor, seed: int) -> Digits:
    """Split images into three quarters for training and a quarter for testing, stratified by label."""
    train, test = train_test_split(range(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=seed)
    return Digits(images[train], labels[train], images[test], labels[test])


def data_for(seed: int, tuning: bool) -> Digits:
    """The images of a run. One that tunes is judged by a quarter of the training images and never sees the test images."""
    data = digits()
    return divide(data.images, data.labels, seed) if tuning else data


def batches(count: int, epochs: int) -> Iterator[Tensor]:
    """The indices of each batch, for some epochs, in an order that torch's seed decides."""
    for _ in range(epochs):
        yield from torch.randperm(count).split(BATCH)


def features_cnn(width: int = 16) -> nn.Sequential:
    """Two convolutions and a linear layer that turn images into 4 * width features."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * width, 4 * width),
        nn.ReLU(),
    )


def cnn(width: int = 16) -> nn.Sequential:
    """Two convolutions and two linear layers: 38,282 weights at the default width."""
    return nn.Sequential(features_cnn(width), nn.Linear(4 * width, 10))


@torch.no_grad()
def predictions(network: nn.Module, images: Tensor) -> Tensor:
    """The class of every image, in evaluation mode."""
    network.eval()
    guesses = network(images).argmax(dim=1)
    network.train()
    return guesses


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The percentage of images that are classified correctly."""
    return 100 * float((predictions(network, images) == labels).double().mean())


class LossTrace:
    """The loss of the same 256 training images after each step: it changes with the network and not with the batch."""

    def __init__(self, network: nn.Module, data: Digits) -> None:
        self.network, self.images, self.labels = network, data.images[:PROBE], data.labels[:PROBE]
        self.losses: list[float] = []
        self.record()

    @torch.no_grad()
    def record(self) -> None:
        loss = float(F.cross_entropy(self.network(self.images), self.labels))
        limit = CAP * (self.losses[0] if self.losses else loss)
        self.losses.append(loss if loss <= limit else limit)  # NaN becomes the limit

    def oscillation(self) -> float:
        """The sum of all rises of the loss from one step to the next, relative to the first loss; 0 if it never rises."""
        rises = (max(0.0, after - before) for before, after in zip(self.losses, self.losses[1:], strict=False))
        return sum(rises) / self.losses[0]

    def curve(self) -> list[float]:
        """The losses of every second step to three digits, which keeps records small."""
        return [float(f"{loss:.3g}") for loss in self.losses[::CURVE_STEP]]

    def steps_to(self, share: float) -> int:
        """The first step after which the loss is below a share of the first loss, or the number of steps if none is."""
        goal = share * self.losses[0]
        return next((step for step, loss in enumerate(self.losses) if loss < goal), len(self.losses) - 1)
