"""Trains a recurrent network on handwritten digits, with plain SGD and with a recipe fused into the same step."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import gradfused

RECIPES = {"plain SGD": {}, "centralize=True, clip_norm=1": {"centralize": True, "clip_norm": 1.0}}


def train(images: torch.Tensor, labels: torch.Tensor, recipe: dict[str, object], epochs: int) -> nn.ModuleDict:
    """Returns a network that reads images row by row, trained from the same start and on the same batches each time."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"read": nn.RNN(8, 64, batch_first=True), "decide": nn.Linear(64, 10)})
    optimizer = gradfused.SGD(network.parameters(), lr=0.1, momentum=0.9, **recipe)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(logits(network, images[batch]), labels[batch]).backward()
            optimizer.step()
    return network


def logits(network: nn.ModuleDict, images: torch.Tensor) -> torch.Tensor:
    return network["decide"](network["read"](images)[0][:, -1])


def main(epochs: int = 15) -> None:
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 8, 8) / 16, torch.tensor(digits)
    for name, recipe in RECIPES.items():
        network = train(images[:1350], labels[:1350], recipe, epochs)
        loss = F.cross_entropy(logits(network, images[:1350]), labels[:1350])
        right = logits(network, images[1350:]).argmax(dim=1) == labels[1350:]
        print(f"{name}: training loss {loss:.3f}, {100 * right.double().mean():.1f} % of new images read correctly")


if __name__ == "__main__":
    main()
