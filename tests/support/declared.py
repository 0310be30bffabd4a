"""Every optimizer and every option with its kind, read from their declarations, so that tests of them all cover new ones."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradfused
from gradfused.step import options

OPTIMIZERS: dict[str, type[Any]] = {
    name: cls
    for name, cls in vars(gradfused).items()
    if isinstance(cls, type) and issubclass(cls, gradfused.optim.base.Optimizer)
}
#: Taken from torch's signatures and not looked at.
IGNORED = ("foreach", "fused", "capturable")


@dataclass(frozen=True)
class Option:
    """An option of an optimizer.

    Attributes:
        kind: ``"number"``, ``"integer"``, ``"flag"``, ``"choice"`` or ``"numbers"``.
        count: Of numbers, how many.
        optional: May be None.
    """

    name: str
    kind: str
    count: int = 0
    optional: bool = False

    @classmethod
    def declared(cls, name: str, annotation: Any) -> Option:
        """What an annotation says."""
        if typing.get_origin(annotation) is tuple:
            return cls(name, "numbers", len(typing.get_args(annotation)))
        types = typing.get_args(annotation) or (annotation,)
        optional = type(None) in types
        for kind, type_ in (("choice", str), ("number", float), ("integer", int), ("flag", bool)):
            if type_ in types:
                return cls(name, kind, 0, optional)
        raise AssertionError(f"{name}: {annotation} is of no known kind")


RECIPE = [Option.declared(*item) for item in typing.get_type_hints(options.Recipe).items()]


def own_options(optimizer: str) -> Iterator[Option]:
    """The options of the optimizer's rule, and torch's."""
    for name, annotation in typing.get_type_hints(OPTIMIZERS[optimizer].__init__).items():
        if name not in ("params", "recipe", "return", *IGNORED):
            yield Option.declared(name, annotation)


def every_option() -> list[tuple[str, Option]]:
    """(optimizer, option): each optimizer with its own options, and one of them with the recipe, which all share."""
    own = [(optimizer, option) for optimizer in OPTIMIZERS for option in own_options(optimizer)]
    return own + [("AdamW", option) for option in RECIPE]
