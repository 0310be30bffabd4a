"""Every optimizer and every option with its kind, read from their declarations, so that new ones are tested at once."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradfused
from gradfused.step import schema

OPTIMIZERS: dict[str, type[Any]] = {
    name: cls
    for name, cls in vars(gradfused).items()
    if isinstance(cls, type) and issubclass(cls, gradfused.optim.base.Optimizer)
}
#: Options that are accepted for torch's sake and have no effect.
IGNORED = ("foreach", "fused", "capturable")


@dataclass(frozen=True)
class Option:
    """An option of an optimizer.

    Attributes:
        kind: ``"number"``, ``"integer"``, ``"flag"``, ``"choice"`` or ``"numbers"``.
        count: How many numbers there are, if the kind is ``"numbers"``.
        optional: Whether the option may be None.
    """

    name: str
    kind: str
    count: int = 0
    optional: bool = False

    @classmethod
    def declared(cls, name: str, annotation: Any) -> Option:
        """An option of the kind that its annotation tells."""
        if typing.get_origin(annotation) is tuple:
            return cls(name, "numbers", len(typing.get_args(annotation)))
        types = typing.get_args(annotation) or (annotation,)
        optional = type(None) in types
        for kind, type_ in (("choice", str), ("number", float), ("integer", int), ("flag", bool)):
            if type_ in types:
                return cls(name, kind, 0, optional)
        raise AssertionError(f"{name}: {annotation} is of no known kind")


RECIPE = [Option.declared(*item) for item in typing.get_type_hints(schema.Recipe).items()]


def own_options(optimizer: str) -> Iterator[Option]:
    """The options in an optimizer's signature, without the recipe."""
    for name, annotation in typing.get_type_hints(OPTIMIZERS[optimizer].__init__).items():
        if name not in ("params", "recipe", "return", *IGNORED):
            yield Option.declared(name, annotation)


def every_option() -> list[tuple[str, Option]]:
    """(optimizer, option) for each optimizer's own options, and for one optimizer with the recipe, which all share."""
    own = [(optimizer, option) for optimizer in OPTIMIZERS for option in own_options(optimizer)]
    return own + [("AdamW", option) for option in RECIPE]
