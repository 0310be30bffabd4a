"""Recipes and update rules: what a step is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NOISE_DECAY = 0.55
SEED = 0


@dataclass(frozen=True)
class Recipe:
    """The gradient transforms that are on; DESIGN 2 defines each and their order.

    Attributes:
        name: What `--recipes` calls it.
        about: One line for `--list`.
        centralize: Subtract the mean of each unit from every parameter of dim >= 2.
        clip: Largest global norm of the gradient, or None.
        noise: Variance of the noise at step 0; 0 switches it off.
        reverse: The lambda of gradient reversal, or None.
    """

    name: str
    about: str
    centralize: bool = False
    clip: float | None = None
    noise: float = 0.0
    reverse: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The same recipe as keyword arguments of gradfused."""
        options: dict[str, Any] = {"seed": SEED, "noise_decay": NOISE_DECAY}
        return options | {
            "centralize": self.centralize,
            "clip_norm": self.clip,
            "noise": self.noise,
            "reverse": self.reverse,
        }

    @property
    def plain(self) -> bool:
        """Whether no transform is on."""
        return not (self.centralize or self.clip or self.noise or self.reverse is not None)

    def sigma(self, step: int) -> float:
        """Standard deviation of the noise at a step, counted from 0."""
        return float((self.noise / (1 + step) ** NOISE_DECAY) ** 0.5)


# Reversal by 1 keeps gradients at their scale when eager peers transform them in place, step after
# step; any other lambda costs the same.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("plain", "no transform"),
        Recipe("centralize", "centralise dim >= 2", centralize=True),
        Recipe("clip", "centralise dim >= 2, clip the global norm to 1", centralize=True, clip=1.0),
        Recipe("noise", "annealed Gaussian noise", noise=0.01),
        Recipe("reverse", "gradient reversal", reverse=1.0),
        Recipe(
            "full",
            "centralise, clip, noise and reverse",
            centralize=True,
            clip=1.0,
            noise=0.01,
            reverse=1.0,
        ),
    )
}


@dataclass(frozen=True)
class Rule:
    """An update rule and its hyperparameters.

    Attributes:
        name: What `--optimizers` calls it.
        class_name: Of the class in `torch.optim` and in gradfused.
        options: Keyword arguments besides lr and weight_decay, in torch's names.
        state: Keys of the per-element state, in torch's names.
    """

    name: str
    class_name: str
    options: dict[str, Any]
    state: tuple[str, ...]

    @property
    def streams(self) -> int:
        """Tensors read plus tensors written by one pass: DESIGN 3's floor, in elements."""
        written = 1 + len(self.state)
        return 2 * written + 1

    def bytes_per_element(self, recipe: Recipe, itemsize: int) -> int:
        """DESIGN 3's byte budget: the floor, and one more gradient read for a global norm."""
        return (self.streams + (recipe.clip is not None)) * itemsize


MOMENTS = ("exp_avg", "exp_avg_sq")
BETAS = {"betas": (0.9, 0.999), "eps": 1e-8}

RULES = {
    rule.name: rule
    for rule in (
        Rule("adamw", "AdamW", BETAS, MOMENTS),
        Rule("adamw-amsgrad", "AdamW", BETAS | {"amsgrad": True}, (*MOMENTS, "max_exp_avg_sq")),
        Rule("adam", "Adam", BETAS, MOMENTS),
        Rule("sgd-momentum", "SGD", {"momentum": 0.9}, ("momentum_buffer",)),
        Rule("sgd", "SGD", {}, ()),
    )
}
