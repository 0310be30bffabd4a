"""Recipes: what is done to the gradients, and around the step, besides the update rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NOISE_DECAY = 0.55
SEED = 0


@dataclass(frozen=True)
class StepRecipe:
    """The parts of gradfused's recipe that are switched on.

    Attributes:
        name: Its name for `--recipes`.
        about: One line for `--list`.
        centralize: Subtract the mean of each unit (slice along dim 0) from every gradient of dim >= 2.
        clip: The largest allowed global norm of the gradient, or None.
        noise: Variance of the Gaussian noise at step 0; 0 switches it off.
        reverse: The factor lambda of gradient reversal, or None.
        sam: Length of SAM's ascent before the step, or None; both halves are timed, on the same gradients.
        ema: Decay of a moving average of the weights, or None.
        precision: How 16-bit weights keep what rounding takes off (gradfused's keyword of the same name), or None.
    """

    name: str
    about: str
    centralize: bool = False
    clip: float | None = None
    noise: float = 0.0
    reverse: float | None = None
    sam: float | None = None
    ema: float | None = None
    precision: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The same recipe as keyword arguments of gradfused's optimizers."""
        return {
            "seed": SEED,
            "noise_decay": NOISE_DECAY,
            "centralize": self.centralize,
            "clip_norm": self.clip,
            "noise": self.noise,
            "reverse": self.reverse,
            "ema": self.ema,
            "precision": self.precision,
        }

    @property
    def active(self) -> tuple[str, ...]:
        """The parts that change the gradients, in the order in which they are applied."""
        switches = {
            "centralize": self.centralize,
            "clip": self.clip is not None,
            "noise": self.noise > 0,
            "reverse": self.reverse is not None,
        }
        return tuple(name for name, on in switches.items() if on)

    @property
    def plain(self) -> bool:
        """Whether nothing is switched on, so that a step is the update rule alone."""
        return not (self.active or self.sam or self.ema or self.precision)

    @property
    def state(self) -> tuple[str, ...]:
        """Keys of the per-element state that the recipe adds to the rule's."""
        return (*("ema",) * (self.ema is not None), *("kahan_comp",) * (self.precision == "kahan"))

    @property
    def extra_streams(self) -> int:
        """Passes over a parameter-sized tensor that the recipe adds to the rule's.

        The global norm reads the gradient once more, each state tensor is read and written, and SAM's ascent makes five passes.
        """
        return (self.clip is not None) + 2 * len(self.state) + 5 * (self.sam is not None)

    def sigma(self, step: int) -> float:
        """Standard deviation of the noise at a step, counted from 0."""
        return float((self.noise / (1 + step) ** NOISE_DECAY) ** 0.5)


# Reversal by 1 keeps the gradients at their scale when eager peers transform them in place, step after step; any other lambda
# costs the same.
_ALL = (
    StepRecipe("plain", "no transform"),
    StepRecipe("centralize", "centralise dim >= 2", centralize=True),
    StepRecipe("clip", "centralise dim >= 2, clip the global norm to 1", centralize=True, clip=1.0),
    StepRecipe("noise", "annealed Gaussian noise", noise=0.01),
    StepRecipe("reverse", "gradient reversal", reverse=1.0),
    StepRecipe("full", "centralise, clip, noise and reverse", centralize=True, clip=1.0, noise=0.01, reverse=1.0),
    StepRecipe("sam", "both halves of sharpness-aware minimization, rho 0.05", sam=0.05),
    StepRecipe("ema", "a moving average of the weights, decay 0.999", ema=0.999),
    StepRecipe("kahan", "16-bit weights with Kahan's compensation", precision="kahan"),
)
RECIPES = {recipe.name: recipe for recipe in _ALL}
