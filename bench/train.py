"""Trains a small network with torch and with gradfused, to compare accuracy and time in a real training loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradfused

from .cases import RECIPES, StepRecipe
from .peers import NoiseSource, Transforms
from .timing import no_collector

EPOCHS, BATCH, LR, WEIGHT_DECAY = 12, 64, 3e-3, 0.05
TEST_SHARE = 0.25

# Makes an optimizer and the step to call, from the parameters and a recipe.
MakeStep = Callable[[list[nn.Parameter], StepRecipe], tuple[Optimizer, Callable[[], object]]]


@dataclass(frozen=True)
class DigitsSplit:
    """scikit-learn's handwritten digits, split in the same way for all runs.

    Attributes:
        images: Training images of shape (n, 1, 8, 8), with values in [0, 1].
        labels: Their labels of shape (n,), from 0 to 9.
        test_images: The images held out for the test.
        test_labels: Their labels.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(device: torch.device) -> DigitsSplit:
    """Load and split the data, which comes with scikit-learn."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    images, labels = sklearn_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        images / 16.0, labels, test_size=TEST_SHARE, stratify=labels, random_state=0
    )

    def image_tensor(array: Any) -> Tensor:
        return torch.tensor(array, dtype=torch.float32, device=device).view(-1, 1, 8, 8)

    def label_tensor(array: Any) -> Tensor:
        return torch.tensor(array, dtype=torch.long, device=device)

    return DigitsSplit(image_tensor(train_x), label_tensor(train_y), image_tensor(test_x), label_tensor(test_y))


def make_network() -> nn.Sequential:
    """A small CNN with batch norm: 10 parameters with 85 162 elements together."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def torch_step(fused: bool) -> MakeStep:
    """A `MakeStep` for torch's AdamW after eager transforms."""

    def make(params: list[nn.Parameter], recipe: StepRecipe) -> tuple[Optimizer, Callable[[], object]]:
        fast = True if fused else None
        optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=fast)
        transforms = Transforms(recipe, params, NoiseSource(), foreach=True)

        def step() -> None:
            transforms.advance()
            transforms.apply()
            optimizer.step()

        return optimizer, optimizer.step if recipe.plain else step

    return make


def gradfused_step(params: list[nn.Parameter], recipe: StepRecipe) -> tuple[Optimizer, Callable[[], object]]:
    """A `MakeStep` for gradfused's AdamW with the recipe in its step."""
    optimizer = gradfused.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, **recipe.options)
    return optimizer, optimizer.step


VARIANTS: dict[str, MakeStep] = {
    "torch.optim.AdamW": torch_step(fused=False),
    "torch.optim.AdamW, fused": torch_step(fused=True),
    "gradfused": gradfused_step,
}


@dataclass(frozen=True)
class TrainingRun:
    """What one training run came to.

    Attributes:
        accuracy: The share of held-out images classified right, from 0 to 1.
        seconds: Time of the whole training loop.
        optimizer_seconds: Time of the transforms and the steps alone.
        steps: The number of steps.
    """

    accuracy: float
    seconds: float
    optimizer_seconds: float
    steps: int


def train_once(data: DigitsSplit, make: MakeStep, recipe: StepRecipe, seed: int) -> TrainingRun:
    """Train one network; the seed decides its weights and the order of the data."""
    torch.manual_seed(seed)
    device = data.images.device
    network = make_network().to(device)
    optimizer, step = make(list(network.parameters()), recipe)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    in_step, steps, start = 0.0, 0, time.perf_counter()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.images), device=device).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(data.images[batch]), data.labels[batch])
            loss.backward()
            synchronize()
            before = time.perf_counter()
            step()
            synchronize()
            in_step += time.perf_counter() - before
            steps += 1
    seconds = time.perf_counter() - start
    return TrainingRun(accuracy(network, data), seconds, in_step, steps)


@torch.no_grad()
def accuracy(network: nn.Module, data: DigitsSplit) -> float:
    """The share of held-out images that are classified right."""
    network.eval()
    guesses = network(data.test_images).argmax(dim=1)
    return float((guesses == data.test_labels).double().mean())


def compare(
    recipes: Sequence[str],
    seeds: int,
    device: torch.device,
    on_run: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> list[dict[str, Any]]:
    """Train every variant with every recipe and seed; the variants take turns.

    Args:
        recipes: Names of recipes; "plain" is the recipe switched off.
        seeds: How many runs each variant gets with each recipe.
        device: Where to train.
        on_run: Called before each run with its name, how many runs are done, and how many there are.

    Returns:
        A row for each variant and recipe.
    """
    data = load_digits(device)
    cells = [(name, recipe) for recipe in recipes for name in VARIANTS]
    outcomes: dict[tuple[str, str], list[TrainingRun]] = {cell: [] for cell in cells}
    train_once(
        data, VARIANTS["torch.optim.AdamW"], RECIPES["plain"], seed=0
    )  # an untimed run first, in which torch warms up
    runs = [(seed, *cell) for seed in range(seeds) for cell in cells]
    with no_collector():
        for done, (seed, name, recipe) in enumerate(runs):
            on_run(f"{name}, {recipe}, seed {seed}", done, len(runs))
            outcome = train_once(data, VARIANTS[name], RECIPES[recipe], seed)
            outcomes[name, recipe].append(outcome)
    return [summary(name, recipe, outcomes[name, recipe]) for name, recipe in cells]


def summary(variant: str, recipe: str, runs: Sequence[TrainingRun]) -> dict[str, Any]:
    """The runs of one variant and recipe as a row of the table."""
    scores = [run.accuracy for run in runs]
    in_step = statistics.median(run.optimizer_seconds for run in runs)
    return {
        "variant": variant,
        "recipe": recipe,
        "seeds": len(runs),
        "accuracy_mean": statistics.fmean(scores),
        "accuracy_std": statistics.stdev(scores) if len(scores) > 1 else 0.0,
        "seconds": statistics.median(run.seconds for run in runs),
        "optimizer_seconds": in_step,
        "ms_step": 1e3 * in_step / runs[0].steps,
    }
