"""Every keyword of a recipe: its default, its allowed values and its meaning as numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from ..backends import NAMES as BACKENDS

INF = math.inf
STATE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


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
