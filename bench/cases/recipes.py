"""Recipes and update rules: what a step is asked to compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NOISE_DECAY = 0.55
SEED = 0


@dataclass(frozen=True)
class Recipe:
    """The gradient transforms that are on; docs/design.md#what-a-step-computes defines each and their order.

    Attributes:
        name: What `--recipes` calls it.
        about: One line for `--list`.
        centralize: Subtract the mean of each unit from every parameter of dim >= 2.
        clip: Largest global norm of the gradient, or None.
        noise: Variance of the noise at step 0; 0 switches it off.
        reverse: The lambda of gradient reversal, or None.
        sam: Length of an ascent before the step, or None; both halves are measured, on the same gradients.
        ema: Share that a moving average of the weights keeps of itself, or None.
        precision: How weights of 16 bits are kept, or None.
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
        """The same recipe as keyword arguments of gradfused."""
        options: dict[str, Any] = {"seed": SEED, "noise_decay": NOISE_DECAY}
        return options | {
            "centralize": self.centralize,
            "clip_norm": self.clip,
            "noise": self.noise,
            "reverse": self.reverse,
            "ema": self.ema,
            "precision": self.precision,
        }

    @property
    def transforms(self) -> bool:
        """Whether gradients are transformed."""
        return bool(self.centralize or self.clip or self.noise or self.reverse is not None)

    @property
    def plain(self) -> bool:
        """Whether it is the optimizer's step alone."""
        return not (self.transforms or self.sam or self.ema or self.precision)

    @property
    def state(self) -> tuple[str, ...]:
        """Keys of the per-element state that it adds to the rule's."""
        return (*("ema",) * (self.ema is not None), *("kahan_comp",) * (self.precision == "kahan"))

    @property
    def extra_streams(self) -> int:
        """What it moves on top of the rule's floor: the norm's gradient, its state, and SAM's ascent."""
        return (self.clip is not None) + 2 * len(self.state) + 5 * (self.sam is not None)

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
        Recipe("sam", "both halves of sharpness-aware minimization, rho 0.05", sam=0.05),
        Recipe("ema", "a moving average of the weights, 0.999", ema=0.999),
        Recipe("kahan", "16-bit weights with Kahan's compensation", precision="kahan"),
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
        scalars: What its one-element state starts from.
        weighs: It needs norms of each parameter and of its gradient or update before the step.
    """

    name: str
    class_name: str
    options: dict[str, Any]
    state: tuple[str, ...]
    scalars: dict[str, float] = field(default_factory=lambda: {"step": 0.0})
    weighs: bool = False

    @property
    def streams(self) -> int:
        """Tensors that one pass reads plus those that it writes: the least that a step moves, in elements."""
        written = 1 + len(self.state)
        return 2 * written + 1

    def bytes_per_element(self, recipe: Recipe, itemsize: int) -> int:
        """The byte budget: the rule's own pass, what the recipe adds, and what a trust ratio reads before the step."""
        weighing = 2 + len(self.state) * (self.class_name == "LAMB") if self.weighs else 0
        wider = 2 * max(0, 4 - itemsize) if recipe.ema is not None else 0  # averages of 16-bit weights are of float32
        return (self.streams + recipe.extra_streams + weighing) * itemsize + wider


MOMENTS = ("exp_avg", "exp_avg_sq")
ADAN_STATE = (*MOMENTS, "exp_avg_diff", "neg_pre_grad")
BETAS = {"betas": (0.9, 0.999), "eps": 1e-8}

RULES = {
    rule.name: rule
    for rule in (
        Rule("adamw", "AdamW", BETAS, MOMENTS),
        Rule("adamw-amsgrad", "AdamW", BETAS | {"amsgrad": True}, (*MOMENTS, "max_exp_avg_sq")),
        Rule("adam", "Adam", BETAS, MOMENTS),
        Rule("sgd-momentum", "SGD", {"momentum": 0.9}, ("momentum_buffer",), {}),
        Rule("sgd", "SGD", {}, (), {}),
        Rule("adagrad", "Adagrad", {"eps": 1e-10}, ("sum",)),
        Rule("rmsprop", "RMSprop", {"alpha": 0.99, "eps": 1e-8}, ("square_avg",)),
        Rule("nadam", "NAdam", BETAS | {"momentum_decay": 4e-3}, MOMENTS, {"step": 0.0, "mu_product": 1.0}),
        Rule("radam", "RAdam", BETAS, MOMENTS),
        Rule("lion", "Lion", {"betas": (0.9, 0.99)}, ("exp_avg",), {}),
        Rule("lamb", "LAMB", BETAS | {"eps": 1e-6}, MOMENTS, weighs=True),
        Rule("lars", "LARS", {"momentum": 0.9, "trust_coefficient": 1e-3}, ("momentum_buffer",), {}, weighs=True),
        Rule("adan", "Adan", {"betas": (0.98, 0.92, 0.99), "eps": 1e-8}, ADAN_STATE),
    )
}
