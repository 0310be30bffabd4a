"""What an optimizer class declares of its update rule, and how a group's options become the rule's numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..backends import Settings
from ..step.options import INF, finite, flag, items, number

#: Options that torch added over the years: state dicts of older versions lack them.
_ADDED_LATER = frozenset(("foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay"))
_FIELDS = frozenset(f.name for f in fields(Settings))


@dataclass(frozen=True)
class Rule:
    """An update rule as its optimizer class declares it.

    Attributes:
        name: The rule's name in csrc/rules.def. Options that ask for state are appended to it where they are on.
        states: Keys of the state tensors, in the rule's order, each with the option that asks for it; None: always
            there.
        initial: The option that says what a new state tensor is filled with, by key; zeros where there is none.
        counts_steps: The rule reads the step's number.
        keeps_product: The rule reads the product of its momenta so far.
        decoupled: Weight decay is never added to the gradient, whatever the options say.
    """

    name: str
    states: Mapping[str, str | None]
    initial: Mapping[str, str] = field(default_factory=dict)
    counts_steps: bool = True
    keeps_product: bool = False
    decoupled: bool = False

    @property
    def required_keys(self) -> tuple[str, ...]:
        """State that a parameter has whatever the options are, once it has any."""
        always = sorted(key for key, option in self.states.items() if option is None)
        return (*always, *["step"] * self.counts_steps, *["mu_product"] * self.keeps_product)

    @property
    def optional_keys(self) -> frozenset[str]:
        """State that some options ask for."""
        return frozenset(key for key, option in self.states.items() if option is not None)

    def variant(self, group: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        """The name of the rule with a group's options, of which ``own`` has the defaults, and the keys of its state tensors."""
        asking = {option for option in self.states.values() if option is not None}
        on = {option for option in asking if _field(option, group[option], isinstance(own[option], bool))}
        name = "_".join((self.name, *sorted(on)))
        return name, tuple(key for key, option in self.states.items() if option is None or option in on)

    def initial_values(self, group: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[float, ...]:
        """What new state tensors are filled with."""
        return tuple(
            finite(self.initial[key], group[self.initial[key]]) if key in self.initial else 0.0 for key in keys
        )


def signature_options(constructor: Callable[..., None]) -> dict[str, Any]:
    """The options in the signature of an optimizer's constructor, with their defaults."""
    parameters = inspect.signature(constructor).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def telling_options(own: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of an optimizer's options that the groups of each of its state dicts have."""
    return tuple(name for name in own if name not in _ADDED_LATER)


def given(scope: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of an optimizer's constructor, of which ``scope`` is the ``locals()``."""
    arguments = {name: value for name, value in scope.items() if name not in ("self", "__class__", "recipe")}
    return {**arguments, **scope["recipe"]}


def rule_numbers(group: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as fields of Settings: those named after a field, ``betas`` and ``decoupled_weight_decay``.

    Args:
        group: The parameter group.
        own: The options in the optimizer's signature, with their defaults.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range, or contradicts another.
    """
    named = [name for name in own if name in _FIELDS]
    numbers = {name: _field(name, group[name], is_flag=isinstance(own[name], bool)) for name in named}
    if "betas" in own:
        numbers |= _betas(group["betas"], len(own["betas"]))
    if "decoupled_weight_decay" in own:
        numbers["decoupled"] = flag("decoupled_weight_decay", group["decoupled_weight_decay"])
    if numbers.get("nesterov") and (numbers["momentum"] == 0 or numbers["dampening"] != 0):
        raise ValueError(
            "nesterov=True: expected momentum above 0 and no dampening, "
            f"got momentum={numbers['momentum']:g}, dampening={numbers['dampening']:g}"
        )
    return numbers


def _field(name: str, value: Any, is_flag: bool) -> float | bool:
    if is_flag:
        return flag(name, value)
    return number(name, value, low=-INF) if name == "dampening" else finite(name, value)


def _betas(betas: Any, count: int) -> dict[str, float]:
    """``betas`` as the fields beta1, beta2, ... of Settings, each in [0, 1)."""
    values = items(betas)
    if values is None or len(values) != count:
        raise TypeError(f"betas: expected {'two' if count == 2 else 'three'} numbers, got {betas!r}")
    return {f"beta{i}": number(f"betas[{i - 1}]", beta, high=1.0, high_open=True) for i, beta in enumerate(values, 1)}
