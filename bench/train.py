"""The other half of the job: does a recipe train, and what does it cost in a real loop?"""

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

from .cases.recipes import RECIPES, Recipe
from .peers.eager import NoiseSource, Transforms
from .timing.rounds import no_collector

EPOCHS, BATCH, LR, WEIGHT_DECAY = 12, 64, 3e-3, 0.05
TEST_SHARE = 0.25

# A prepared step, given the parameters and a recipe.
MakeStep = Callable[[list[nn.Parameter], Recipe], tuple[Optimizer, Callable[[], object]]]


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits, split once for all runs.

    Attributes:
        images: (n, 1, 8, 8), in [0, 1].
        labels: (n,), 0 to 9.
        test_images: The same, held out.
        test_labels: The same, held out.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(device: torch.device) -> Digits:
    """Loads and splits the data; nothing is downloaded."""
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

    return Digits(image_tensor(train_x), label_tensor(train_y), image_tensor(test_x), label_tensor(test_y))


def make_network() -> nn.Sequential:
    """A small CNN with batch norm: 10 tensors, 85 162 elements."""
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
    """torch's AdamW after eager transforms."""

    def make(params: list[nn.Parameter], recipe: Recipe) -> tuple[Optimizer, Callable[[], object]]:
        fast = True if fused else None
        optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=fast)
        transforms = Transforms(recipe, params, NoiseSource(), foreach=True)

        def step() -> None:
            transforms.advance()
            transforms.apply()
            optimizer.step()

        return optimizer, optimizer.step if recipe.plain else step

    return make


def gradfused_step(params: list[nn.Parameter], recipe: Recipe) -> tuple[Optimizer, Callable[[], object]]:
    """gradfused's AdamW with the recipe inside."""
    optimizer = gradfused.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, **recipe.options)
    return optimizer, optimizer.step


VARIANTS: dict[str, MakeStep] = {
    "torch.optim.AdamW": torch_step(fused=False),
    "torch.optim.AdamW, fused": torch_step(fused=True),
    "gradfused": gradfused_step,
}


@dataclass(frozen=True)
class Outcome:
    """One training run.

    Attributes:
        accuracy: On the held-out images, 0 to 1.
        seconds: Of the whole training loop.
        optimizer_seconds: Of the transforms and steps alone.
        steps: Number of steps.
    """

    accuracy: float
    seconds: float
    optimizer_seconds: float
    steps: int


def train_once(data: Digits, make: MakeStep, recipe: Recipe, seed: int) -> Outcome:
    """Trains one network; the seed decides its weights and the order of the data."""
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
    return Outcome(accuracy(network, data), seconds, in_step, steps)


@torch.no_grad()
def accuracy(network: nn.Module, data: Digits) -> float:
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
    """Trains every variant with every recipe and seed, variants taking turns.

    Args:
        recipes: Names; "plain" is the recipe switched off.
        seeds: How many runs of each.
        device: Where to train.
        on_run: Told what runs next, and how many runs of how many are done.

    Returns:
        A row a variant and recipe.
    """
    data = load_digits(device)
    cells = [(name, recipe) for recipe in recipes for name in VARIANTS]
    outcomes: dict[tuple[str, str], list[Outcome]] = {cell: [] for cell in cells}
    train_once(data, VARIANTS["torch.optim.AdamW"], RECIPES["plain"], seed=0)  # warms torch up
    runs = [(seed, *cell) for seed in range(seeds) for cell in cells]
    with no_collector():
        for done, (seed, name, recipe) in enumerate(runs):
            on_run(f"{name}, {recipe}, seed {seed}", done, len(runs))
            outcome = train_once(data, VARIANTS[name], RECIPES[recipe], seed)
            outcomes[name, recipe].append(outcome)
    return [summary(name, recipe, outcomes[name, recipe]) for name, recipe in cells]


def summary(variant: str, recipe: str, runs: Sequence[Outcome]) -> dict[str, Any]:
    """The runs of one variant and recipe as a row."""
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
