"""Every keyword of a recipe: its default, what it may be, and what it means to a kernel."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from .backends import NAMES as BACKENDS

INF = math.inf
STATE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Recipe(TypedDict, total=False):
    """What every gradfused optimizer takes after its ``torch.optim`` twin's arguments, by keyword; each may differ by group.

    Attributes:
        centralize: Subtract the gradient's mean (Gradient Centralization, Yong et al. 2020). True or ``"unit"``: over each
            slice along dim 0 of parameters with 2 or more dims; ``"conv"``: the same with 4 or more dims only; ``"tensor"``:
            over the whole of any parameter. Default False.
        centralize_at: ``"gradient"`` (default), ``"decayed"``: after coupled weight decay, or ``"update"``: the direction that
            the rule is about to apply.
        clip_norm: Clip the global norm to this; short for ``perturb="clip", radius=clip_norm, norm_scope="global"``.
        perturb: Scale by a function of the norm: ``"clip"``, ``"normalize"``, ``"amplify"``, ``"dampen"`` or ``"agc"`` (Brock
            et al. 2021; needs ``norm_scope="unit"``). Default None.
        radius: The size of the perturbation, in the unit of the norm (of ``"agc"``: a ratio to the weight's norm). Default 1.
        norm_scope: What shares a norm: ``"global"`` (default), ``"group"``, ``"param"`` or ``"unit"``.
        clip_value: Clamp each element to [-clip_value, clip_value] after perturbing. Default None.
        noise: Variance of normal noise added at step 0 (Neelakantan et al. 2015). Default 0.
        noise_decay: The variance at step t is ``noise / (1 + t) ** noise_decay``. Default 0.55.
        seed: Key of the noise; the same seed draws the same noise on every backend. Default 0.
        reverse: Multiply the gradient by ``-reverse``: adversarial training of a whole group. Default None.
        nonfinite: ``"propagate"`` (default) or ``"skip"``: a step whose gradients hold inf or nan changes nothing.
        precision: How float16 and bfloat16 weights are kept: None (default), rounded to nearest; ``"kahan"``, with a second
            tensor for what rounding took off; ``"stochastic"``, rounded at random, without bias; ``"master"``, with a
            float32 copy that the steps are taken on. Other dtypes are as precise as they are. Weights that are written between
            steps, by loading a model say, are what the next step begins with, element by element: a copy counts where it
            rounds to the weight that is there, and what rounding took off where it is within half a unit in the last place of
            it. Switched off, either is forgotten with the next step.
        state_dtype: ``"bfloat16"`` or ``"float32"``: dtype of the optimizer's new state. Default None: float32 with
            ``precision="master"``, else the parameter's.
        ema: Keep an exponential moving average of the weights, of which a step keeps this share (0.999, say), for
            ``swap_ema()``. Switched off, it is forgotten with the next step. Default None.
        zero_grad_in_step: Leave the gradients at zero after the step. Default False.
        backend: ``"auto"`` (default), ``"cuda"``, ``"cpu"``, ``"triton"`` or ``"reference"``.
    """

    centralize: bool | str
    centralize_at: str
    clip_norm: float | None
    perturb: str | None
    radius: float
    norm_scope: str
    clip_value: float | None
    noise: float
    noise_decay: float
    seed: int
    reverse: float | None
    nonfinite: str
    precision: str | None
    state_dtype: str | None
    ema: float | None
    zero_grad_in_step: bool
    backend: str


DEFAULTS: Recipe = {
    "centralize": False,
    "centralize_at": "gradient",
    "clip_norm": None,
    "perturb": None,
    "radius": 1.0,
    "norm_scope": "global",
    "clip_value": None,
    "noise": 0.0,
    "noise_decay": 0.55,
    "seed": 0,
    "reverse": None,
    "nonfinite": "propagate",
    "precision": None,
    "state_dtype": None,
    "ema": None,
    "zero_grad_in_step": False,
    "backend": "auto",
}

_CHOICES: dict[str, tuple[object, ...]] = {
    "centralize": (False, True, "unit", "conv", "tensor"),
    "centralize_at": ("gradient", "decayed", "update"),
    "perturb": (None, "clip", "normalize", "amplify", "dampen", "agc"),
    "norm_scope": ("global", "group", "param", "unit"),
    "nonfinite": ("propagate", "skip"),
    "precision": (None, "kahan", "stochastic", "master"),
    "state_dtype": (None, *STATE_DTYPES),
    "zero_grad_in_step": (False, True),
    "backend": BACKENDS,
}


def as_float(value: Any) -> Any:
    """A one-element tensor as a number; anything else as it is."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def number(name: str, value: Any, low: float = 0.0, high: float = INF, *, high_open: bool = False) -> float:
    """``value`` as a float in [low, high], or in [low, high) if ``high_open``.

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range or nan.
    """
    value = as_float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not low <= value <= high or (high_open and value == high):
        bound = f"below {high:g}" if high_open and high < INF else f"at most {high:g}"
        limits = f"{low:g} or more" if high == INF else f"from {low:g} and {bound}"
        raise ValueError(
            f"{name}: expected {limits}{' and finite' if high_open and high == INF else ''}, got {value!r}"
        )
    return float(value)


def finite(name: str, value: Any) -> float:
    """``value`` as a float in [0, inf)."""
    return number(name, value, high_open=True)


def finite_numbers(group: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A group's options that are fields of Settings by their own names, each in [0, inf)."""
    return {name: finite(name, group[name]) for name in names}


def beta_numbers(group: Mapping[str, Any], count: int = 2) -> dict[str, Any]:
    """A group's ``betas`` as fields of Settings, each in [0, 1)."""
    values = group["betas"]
    if not isinstance(values, (tuple, list)) or len(values) != count:
        raise TypeError(f"betas: expected {'two' if count == 2 else 'three'} numbers, got {values!r}")
    return {f"beta{i + 1}": number(f"betas[{i}]", value, high=1.0, high_open=True) for i, value in enumerate(values)}


def adam_numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """What Adam, NAdam and RAdam share, as fields of Settings."""
    numbers = finite_numbers(group, "lr", "eps", "weight_decay") | beta_numbers(group)
    return numbers | {"decoupled": bool(group["decoupled_weight_decay"])}


def momentum_numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """SGD's ``momentum``, ``dampening`` and ``nesterov`` as fields of Settings."""
    momentum = finite("momentum", group["momentum"])
    dampening = number("dampening", group["dampening"], low=-INF)
    if group["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError(
            "nesterov=True: expected momentum above 0 and no dampening, "
            f"got momentum={momentum:g}, dampening={dampening:g}"
        )
    return {"momentum": momentum, "dampening": dampening, "nesterov": bool(group["nesterov"])}


def refuse_unknown(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise TypeError for the first of ``names`` that is not known, with the known name it resembles."""
    known = list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"
            raise TypeError(f"{what} got an unknown option '{name}'{hint}")


def refuse_misspelt(group: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise TypeError for a key of a group that resembles an option. Other keys of the user's own are left alone."""
    known = list(known)
    for name in group:
        close = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        if close:
            raise TypeError(f"parameter group has an unknown option '{name}'; did you mean '{close[0]}'?")


def check_choices(group: Mapping[str, Any]) -> None:
    """Raise ValueError unless every keyword that names something names something known."""
    for name, allowed in _CHOICES.items():
        value = group[name]
        if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def _perturbation(group: Mapping[str, Any]) -> tuple[str | None, float, str]:
    """(kind, radius, scope) with ``clip_norm`` spelt out."""
    kind, scope = group["perturb"], group["norm_scope"]
    if group["clip_norm"] is not None:
        if kind is not None:
            raise ValueError(
                f"clip_norm={group['clip_norm']!r} and perturb={kind!r}: expected one of them; clip_norm is short for "
                "perturb='clip', radius=clip_norm, norm_scope='global'"
            )
        if scope != "global":
            raise ValueError(
                f"clip_norm clips the global norm, got norm_scope={scope!r}: use perturb='clip', radius=..., norm_scope={scope!r}"
            )
        return "clip", number("clip_norm", group["clip_norm"]), "global"
    if kind is None:
        number("radius", group["radius"])
        return None, 1.0, "none"
    if kind == "agc" and scope != "unit":
        raise ValueError(f"perturb='agc' compares the norms of units, got norm_scope={scope!r}: use norm_scope='unit'")
    radius = number("radius", group["radius"]) if kind == "clip" else finite("radius", group["radius"])
    return kind, radius, scope


# a, b / radius, e, lo, hi of s(n) = clamp(a + b / (n + e), lo, hi)
_FAMILY = {
    "clip": (0.0, 1.0, 1e-6, 0.0, 1.0),
    "normalize": (0.0, 1.0, 1e-12, 0.0, INF),
    "amplify": (1.0, 1.0, 1e-12, 0.0, INF),
    "dampen": (1.0, -1.0, 1e-12, 0.0, INF),
}


def interpret(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's recipe as fields of Settings.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range, unknown, or contradicts another.
    """
    check_choices(group)
    kind, radius, scope = _perturbation(group)
    fields: dict[str, Any] = {"scope": scope, "radius": radius, "agc": kind == "agc"}
    if kind in _FAMILY:
        a, b, e, lo, hi = _FAMILY[kind]
        fields["perturb"] = (a, b * radius, e, lo, hi)
    sign = 1.0 if group["reverse"] is None else -finite("reverse", group["reverse"])
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 <= seed < 2**64, got {seed}")
    return fields | {
        "centralize_at": group["centralize_at"],
        "clip_value": INF if group["clip_value"] is None else number("clip_value", group["clip_value"]),
        "noise": finite("noise", group["noise"]),
        "noise_decay": finite("noise_decay", group["noise_decay"]),
        "seed": seed,
        "sign": -sign if group["maximize"] else sign,
        "skip_nonfinite": group["nonfinite"] == "skip",
        "ema": 0.0 if group["ema"] is None else number("ema", group["ema"], high=1.0),
        "zero_grad": group["zero_grad_in_step"],
    }


def centre_kind(group: Mapping[str, Any]) -> str:
    """``"off"``, ``"unit"``, ``"conv"`` or ``"tensor"``."""
    value = group["centralize"]
    return "off" if value is False else "unit" if value is True else str(value)
