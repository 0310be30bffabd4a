"""Every keyword of a recipe: its default, its allowed values and its meaning as numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypedDict

import torch

from ..backends import NAMES as BACKENDS

INF = math.inf
STATE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Recipe(TypedDict, total=False):
    """What every gradfused optimizer takes after its ``torch.optim`` twin's arguments, by keyword; each may differ by group.

    A number, here and among the twin's arguments, is anything that ``numbers.Real`` or ``operator.index`` accepts, or
    an array or tensor of one element.

    Attributes:
        centralize: Subtract the gradient's mean (Gradient Centralization, Yong et al. 2020). True or ``"unit"``: over
            each slice along dim 0 of parameters with 2 or more dims; ``"conv"``: the same with 4 or more dims only;
            ``"tensor"``: over the whole of any parameter. Default False.
        centralize_at: ``"gradient"`` (default), ``"decayed"``: after coupled weight decay, or ``"update"``: the
            direction that the rule is about to apply.
        clip_norm: Clip the global norm to this; short for ``perturb="clip", radius=clip_norm, norm_scope="global"``.
        perturb: Scale by a function of the norm: ``"clip"``, ``"normalize"``, ``"amplify"``, ``"dampen"`` or ``"agc"``
            (Brock et al. 2021; needs ``norm_scope="unit"``). Default None.
        radius: The size of the perturbation, in the unit of the norm (of ``"agc"``: a ratio to the weight's norm).
            Default 1.
        norm_scope: What shares a norm: ``"global"`` (default), ``"group"``, ``"param"`` or ``"unit"``.
        clip_value: Clamp each element to [-clip_value, clip_value] after perturbing. Default None.
        noise: Variance of normal noise added at step 0 (Neelakantan et al. 2015). Default 0.
        noise_decay: The variance at step t is ``noise / (1 + t) ** noise_decay``. Default 0.55.
        seed: Key of the noise; the same seed draws the same noise on every backend. Default 0.
        reverse: Multiply the gradient by ``-reverse``: adversarial training of a whole group. Default None.
        nonfinite: ``"propagate"`` (default) or ``"skip"``: a step whose gradients hold inf or nan changes nothing.
        precision: How float16 and bfloat16 weights are kept: None (default), rounded to nearest; ``"kahan"``, with a
            second tensor for the rounding error; ``"stochastic"``, rounded at random without bias; ``"master"``, with a
            float32 copy on which the steps are taken. Other dtypes are unaffected. Weights that are written between
            steps, by loading a model say, are what the next step begins with, element by element: the copy is used
            where it rounds to the weight, and the rounding error where it is within half a unit in the last place of
            the weight. Once the option is switched off, the next step drops the extra tensor.
        state_dtype: Dtype of the optimizer's new state, ``"bfloat16"`` or ``"float32"``. Default None: float32 with
            ``precision="master"``, else the parameter's.
        ema: Decay of an exponential moving average of the weights (0.999, say), which ``swap_ema()`` swaps in. Once the
            option is switched off, the next step drops the average. Default None.
        zero_grad_in_step: Set the gradients to zero in the step. Default False.
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
    "backend": BACKENDS,
}

#: Types of values that can neither be changed in place nor need converting: those of most options.
FIXED = frozenset((bool, int, float, str, type(None)))


def plain(value: Any) -> Any:
    """A NumPy scalar, or an array or tensor of one element, as a number, bool or string of Python; others unchanged."""
    if type(value) in FIXED:
        return value
    shape = getattr(value, "shape", None)
    return value.item() if isinstance(shape, tuple) and math.prod(shape) == 1 else value


def items(value: Any) -> list[Any] | None:
    """The items of a sequence: a tuple, a list, an array or Hydra's ListConfig; None for anything else."""
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__getitem__"):
        return None
    try:
        return [value[i] for i in range(len(value))]
    except TypeError:  # an array of no dimensions
        return None


def _integer(value: Any) -> int | None:
    """``value`` as an integer if ``operator.index`` takes it; None for bools and anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def whole(name: str, value: Any, least: int | None = None) -> int:
    """``value`` as an int of ``least`` or more. Anything that ``operator.index`` takes is an integer; bools are not.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is less than ``least``.
    """
    wanted = "an int" if least is None else f"an int of {least} or more"
    found = _integer(plain(value))
    if found is None:
        raise TypeError(f"{name}: expected {wanted}, got {value!r} of type {type(value).__name__}")
    if least is not None and found < least:
        raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    return found


def _real(value: Any) -> Any:
    """``value`` if it is a number, or as an integer; None for bools and anything else."""
    return value if isinstance(value, Real) and not isinstance(value, bool) else _integer(value)


def _float(name: str, value: Any) -> float:
    """The float nearest to a number."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and math.prod(shape) != 1:
        kind = type(value).__name__
        raise ValueError(f"{name}: expected a number or a tensor of one element, got a {kind} of shape {tuple(shape)}")
    real = _real(value)
    if real is None:
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        return float(real)
    except OverflowError:  # an integer or a fraction that no float can hold
        return INF if real > 0 else -INF


def number(name: str, value: Any, low: float = 0.0, high: float = INF, *, high_open: bool = False) -> float:
    """``value`` as a float in [low, high], or in [low, high) if ``high_open``.

    Anything that ``numbers.Real`` or ``operator.index`` accepts is a number, and so is an array or tensor of one
    element; bools are not.

    Raises:
        TypeError: It is not a number.
        ValueError: It is out of range or nan, or an array or tensor that does not have one element.
    """
    value = plain(value)
    result = value if type(value) is float else _float(name, value)
    if not low <= result <= high or (high_open and result == high):
        bound = f"below {high:g}" if high_open and high < INF else f"at most {high:g}"
        limits = f"{low:g} or more" if high == INF else f"from {low:g} and {bound}"
        raise ValueError(
            f"{name}: expected {limits}{' and finite' if high_open and high == INF else ''}, got {value!r}"
        )
    return result


def flag(name: str, value: Any) -> bool:
    """``value`` as a bool. It may be NumPy's, a tensor's, or as in torch 0, 1 or None.

    Raises:
        TypeError: It is none of these.
    """
    value = plain(value)
    if value is None or isinstance(value, bool):
        return bool(value)
    real = _real(value)
    if real in (0, 1):
        return bool(real)
    raise TypeError(f"{name}: expected True or False, got {value!r}")


def choice(name: str, value: Any) -> Any:
    """The one of a keyword's allowed values that ``value`` is equal to.

    Raises:
        ValueError: It is none of them.
    """
    asked, known = plain(value), _CHOICES[name]
    if type(asked) in (str, bool, type(None)) and asked in known:
        return asked
    for allowed in known:
        if isinstance(asked, str) and asked == allowed:  # a member of an enumeration, say
            return allowed
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}, got {asked!r}")


def with_choices(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a group in which every keyword that takes one of a few values has been checked by ``choice``."""
    return {**group, **{name: choice(name, group[name]) for name in _CHOICES}}


def finite(name: str, value: Any) -> float:
    """``value`` as a float in [0, inf)."""
    return number(name, value, high_open=True)


def _perturbation(group: Mapping[str, Any]) -> tuple[str | None, float, str]:
    """The kind, radius and norm scope of a group's perturbation, with ``clip_norm`` written out."""
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


def _seed(value: Any) -> int:
    """``value`` as an unsigned integer of 64 bits."""
    seed = whole("seed", value)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected 0 <= seed < 2**64, got {seed}")
    return seed


def interpret(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's recipe, checked by ``with_choices``, as fields of Settings.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range, unknown, or contradicts another.
    """
    kind, radius, scope = _perturbation(group)
    fields: dict[str, Any] = {"norm_scope": scope, "radius": radius, "agc": kind == "agc"}
    if kind in _FAMILY:
        a, b, e, lo, hi = _FAMILY[kind]
        fields["perturb"] = (a, b * radius, e, lo, hi)
    sign = 1.0 if group["reverse"] is None else -finite("reverse", group["reverse"])
    return fields | {
        "centralize_at": group["centralize_at"],
        "clip_value": INF if group["clip_value"] is None else number("clip_value", group["clip_value"]),
        "noise": finite("noise", group["noise"]),
        "noise_decay": finite("noise_decay", group["noise_decay"]),
        "seed": _seed(group["seed"]),
        "sign": -sign if flag("maximize", group["maximize"]) else sign,
        "skip_nonfinite": group["nonfinite"] == "skip",
        "ema": 0.0 if group["ema"] is None else number("ema", group["ema"], high=1.0),
        "zero_grad_in_step": flag("zero_grad_in_step", group["zero_grad_in_step"]),
    }


def centre_kind(group: Mapping[str, Any]) -> str:
    """``"off"``, ``"unit"``, ``"conv"`` or ``"tensor"``."""
    value = group["centralize"]
    return "off" if value is False else "unit" if value is True else str(value)
