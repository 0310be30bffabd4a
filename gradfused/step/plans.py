"""What each group's options mean, interpreted again only when an option has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from .. import gpu
from . import options
from .rows import Group, GroupPlan


def _may_change(value: Any) -> bool:
    """Whether a value may become another without being replaced, as tensors and lists do."""
    return type(value) not in options.FIXED and not (type(value) is tuple and not any(map(_may_change, value)))


def _content(value: Any) -> Any:
    """A value as it is now, with its type, as 0 equals False."""
    held = None if type(value) in options.FIXED else options.items(value)
    return type(value), options.plain(value) if held is None else [*map(_content, held)]


def _comparable(name: str, value: Any) -> Any:
    """What to compare of an option; of a learning rate on a GPU the address, as what it holds is read there, in the step."""
    if name == "lr" and isinstance(value, Tensor) and gpu.holds(value):
        return Tensor, value.data_ptr()
    return _content(value)


class _Known:
    """A group's options as they were when they were interpreted, and what they mean."""

    def __init__(self, names: tuple[str, ...], values: tuple[Any, ...], plan: GroupPlan) -> None:
        self._names, self._values, self.plan = names, values, plan
        loose = (i for i, v in enumerate(values) if type(v) not in options.FIXED and _may_change(v))
        self._loose = {i: _comparable(names[i], values[i]) for i in loose}

    def holds(self, values: tuple[Any, ...]) -> bool:
        """Whether a group's options still are these. No Python code runs for those that are the very objects."""
        replaced = set() if all(map(is_, values, self._values)) else self._replaced(values)
        if all(_comparable(self._names[i], values[i]) == self._was(i) for i in replaced | self._loose.keys()):
            self._values = values
            return True
        return False

    def _replaced(self, values: tuple[Any, ...]) -> set[int]:
        return {i for i, (new, old) in enumerate(zip(values, self._values, strict=True)) if new is not old}

    def _was(self, index: int) -> Any:
        return self._loose[index] if index in self._loose else _content(self._values[index])


class Plans:
    """The plans of an optimizer's groups."""

    def __init__(self) -> None:
        self._known: list[_Known] = []

    def of(
        self, groups: Sequence[Group], names: Iterable[str], interpret: Callable[[Group], GroupPlan]
    ) -> list[GroupPlan]:
        """Every group's plan.

        Args:
            groups: The parameter groups.
            names: Their options. Other keys are the user's own and are not looked at.
            interpret: Makes a group's plan, or raises what is wrong with its options.
        """
        del self._known[len(groups) :]
        names = tuple(names)
        read = itemgetter(*names)
        for i, group in enumerate(groups):
            values = read(group)
            if i == len(self._known):
                self._known.append(_Known(names, values, interpret(group)))
            elif not self._known[i].holds(values):
                self._known[i] = _Known(names, values, interpret(group))
        return [known.plan for known in self._known]
