"""What a peer is: one of the ways of doing the work of a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class Peer:
    """One way of doing the work of a case; gradfused itself is listed as one too.

    Attributes:
        name: Its name for `--peers` and in tables.
        about: One line for `--list`.
        build: Makes the callable that does the work.
        spoken: Its name in a sentence, where `{rule}` stands for the class of an update rule; empty means `name`.
        absent: Returns why it is missing on this machine, or None.
        unable: Returns why it cannot do a case, or None.
        opt_in: It runs only if `--peers` names it.
        copies: Memory of its temporaries, in multiples of the size of the parameters or the main tensor.
    """

    name: str
    about: str
    build: Callable[..., Any]
    spoken: str = ""
    absent: Callable[[], str | None] = lambda: None
    unable: Callable[[Any], str | None] = lambda case: None
    opt_in: bool = False
    copies: float = 0.0

    def reason_against(self, case: Any) -> str | None:
        """Why it cannot be measured on a case, or None if it can."""
        return self.absent() or self.unable(case)


def needs(module: str, package: str) -> Callable[[], str | None]:
    """The `absent` of a peer from another package; it looks for the package without importing it."""

    def absent() -> str | None:
        return None if find_spec(module) else f"not installed (pip install --no-deps {package})"

    return absent
