"""What the options of each parameter group ask for, interpreted again only when one of them has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from .. import gpu
from ..backends import Settings
from . import options

Group = dict[str, Any]
_shape = attrgetter(
    "rule", "states", "counts", "centre", "backend", "mu_product", "precision", "state_dtype", "ema", "copied"
)
_shape_in_settings = attrgetter("centralize_at", "norm_scope", "agc", "adapt", "skip_nonfinite", "zero_grad_in_step")


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """What a parameter group's options ask for: validated, with nothing left to interpret.

    Attributes:
        states: Keys of the state tensors in the rule's order.
        counts: Whether steps are counted in the state.
        centre: ``"off"``, ``"unit"``, ``"conv"`` or ``"tensor"``.
        initial: What new state tensors are filled with; zeros if empty.
        mu_product: Whether the product of the momenta is kept in the state.
        precision: How weights of 16 bits are kept.
        state_dtype: Dtype of new state tensors; None for the parameter's.
        copied: Whether the sources are copies of 16-bit weights in float32 rather than the weights themselves.
    """

    rule: str
    states: tuple[str, ...]
    counts: bool
    centre: str
    backend: str
    settings: Settings
    initial: tuple[float, ...] = ()
    mu_product: bool = False
    precision: str = "none"
    state_dtype: torch.dtype | None = None
    ema: bool = False
    copied: bool = False

    @property
    def measures(self) -> bool:
        """Whether a step measures the norms of the group's gradients."""
        return self.settings.norm_scope != "none" or self.settings.skip_nonfinite

    @property
    def structure(self) -> tuple[object, ...]:
        """The options that decide the shape of a table, which can be kept while these stay the same."""
        return *_shape(self), *_shape_in_settings(self.settings), self.settings.noise > 0


def _may_change(value: Any) -> bool:
    """Whether a value can be changed in place, as tensors and lists can."""
    return type(value) not in options.FIXED and not (type(value) is tuple and not any(map(_may_change, value)))


def _content(value: Any) -> Any:
    """What a value holds now, to be compared; with its type, because 0 equals False."""
    held = None if type(value) in options.FIXED else options.items(value)
    return type(value), options.plain(value) if held is None else [*map(_content, held)]


def _comparable(name: str, value: Any) -> Any:
    """What to compare of an option: of a learning rate on a GPU its address, because the step reads it there."""
    if name == "lr" and isinstance(value, Tensor) and gpu.holds(value):
        return Tensor, value.data_ptr()
    return _content(value)


class _Interpreted:
    """The values that a group's options had when they were interpreted, and their meaning."""

    def __init__(self, names: tuple[str, ...], values: tuple[Any, ...], meaning: GroupOptions) -> None:
        self._names, self._values, self.meaning = names, values, meaning
        loose = (i for i, v in enumerate(values) if type(v) not in options.FIXED and _may_change(v))
        self._loose = {i: _comparable(names[i], values[i]) for i in loose}

    def holds(self, values: tuple[Any, ...]) -> bool:
        """Whether a group's options are still the same. Options that are the very same objects cost no Python code."""
        replaced = set() if all(map(is_, values, self._values)) else self._replaced(values)
        if all(_comparable(self._names[i], values[i]) == self._was(i) for i in replaced | self._loose.keys()):
            self._values = values
            return True
        return False

    def _replaced(self, values: tuple[Any, ...]) -> set[int]:
        return {i for i, (new, old) in enumerate(zip(values, self._values, strict=True)) if new is not old}

    def _was(self, index: int) -> Any:
        return self._loose[index] if index in self._loose else _content(self._values[index])


class OptionsCache:
    """The interpreted options of an optimizer's groups."""

    def __init__(self) -> None:
        self._known: list[_Interpreted] = []

    def of(
        self, groups: Sequence[Group], names: Iterable[str], interpret: Callable[[Group], GroupOptions]
    ) -> list[GroupOptions]:
        """What every group's options ask for.

        Args:
            groups: The parameter groups.
            names: The options. Other keys are the user's own and are ignored.
            interpret: Interprets a group's options, or raises what is wrong with them.
        """
        del self._known[len(groups) :]
        names = tuple(names)
        read = itemgetter(*names)
        for i, group in enumerate(groups):
            values = read(group)
            if i == len(self._known):
                self._known.append(_Interpreted(names, values, interpret(group)))
            elif not self._known[i].holds(values):
                self._known[i] = _Interpreted(names, values, interpret(group))
        return [known.meaning for known in self._known]
