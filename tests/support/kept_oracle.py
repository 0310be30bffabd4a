"""The rules of ``precision`` and ``ema`` for 16-bit weights, written down a second time for steps of SGD."""

from __future__ import annotations

import torch
from cases import device_of
from torch import Tensor

import gradfused


def half_unit(weights: Tensor) -> Tensor:
    """Half a unit in the last place of each weight, in float64; 0 for weights below float32's normal numbers."""
    wide = weights.double()
    exponent = torch.frexp(wide)[1].double() - 1
    unit = torch.exp2(exponent) * torch.finfo(weights.dtype).eps
    return torch.where(wide.abs() < torch.finfo(torch.float32).tiny, 0.0, unit / 2)


class Oracle:
    """A parameter and the state that is kept with it. A step computes ``weights - lr * gradient`` in float32.

    Args:
        weights: The weights, in a dtype of 16 bits.
        precision: None, ``"kahan"`` or ``"master"``.
        ema: The decay of the average of the weights, or None where no average is kept.
    """

    def __init__(self, weights: Tensor, precision: str | None, ema: float | None = None) -> None:
        self.param = weights.clone()
        self.kept: dict[str, Tensor] = {}
        self.choose(precision, ema)

    def choose(self, precision: str | None, ema: float | None) -> None:
        """Set the options of the next steps."""
        self.precision, self.ema = precision, ema

    def write(self, weights: Tensor) -> None:
        """Overwrite the weights from outside."""
        self.param = weights.clone()

    def weights(self) -> Tensor:
        """The weights that the next step begins with, in float32."""
        own = self.param.float()
        if self.precision == "master" and "master" in self.kept:
            copy = self.kept["master"]
            return torch.where(copy.to(self.param.dtype) == self.param, copy, own)
        if self.precision == "kahan" and "kahan_comp" in self.kept:
            rest = self.kept["kahan_comp"].float()
            fits = rest.isfinite() & (rest.abs().double() <= half_unit(self.param))
            return own + torch.where(fits, rest, 0.0)
        return own

    def step(self, gradient: Tensor, lr: float) -> None:
        before = self.param.float()
        p = self.weights() - lr * gradient.float()
        self.param = p.to(self.param.dtype)
        average = self.kept.get("ema", before)
        self.kept = {}  # state that no option asks for is dropped
        if self.precision == "master":
            self.kept["master"] = p
        if self.precision == "kahan":
            self.kept["kahan_comp"] = (p - self.param.float()).to(self.param.dtype)
        if self.ema is not None:
            self.kept["ema"] = average + (p - average) * (1 - self.ema)


def float32_average_of_float64_weights(backend: str) -> None:
    model = torch.nn.Linear(16, 64, device=device_of(backend))
    optimizer = gradfused.SGD(model.parameters(), lr=0.5, ema=0.5, backend=backend)

    def step() -> None:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    model.double()
    before = [(p.detach().clone(), optimizer.state[p]["ema"].clone()) for p in model.parameters()]
    step()
    for p, (weights, average) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), weights - 0.5)
        assert average.dtype == torch.float32
        torch.testing.assert_close(
            optimizer.state[p]["ema"], ((average + p.detach()) / 2).float(), rtol=1e-6, atol=1e-7
        )
