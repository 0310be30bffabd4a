"""Names of options that are not known: which of them are misspelt, and what was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Shorter names have too many neighbours: 'Lr' and 'wd' are the user's own.
_SHORTEST = 4
_LONG = 8


def distance(a: str, b: str) -> int:
    """How many letters must be put in, left out, replaced or swapped with the next to make ``b`` of ``a``."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a):
        row = [i + 1]
        for j, y in enumerate(b):
            best = min(last[j] + (x != y), last[j + 1] + 1, row[j] + 1)
            if i and j and x == b[j - 1] and a[i - 1] == y:
                best = min(best, before[j - 1] + 1)
            row.append(best)
        before, last = last, row
    return last[-1]


def _resembles(name: str, known: str) -> bool:
    """Whether ``name`` is one letter away from ``known``, or two from a long one."""
    allowed = 0 if len(known) < _SHORTEST else 1 if len(known) < _LONG else 2
    return abs(len(name) - len(known)) <= allowed and distance(name, known) <= allowed


def refuse_unknown(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise TypeError for the first of ``names`` that is not known, with the known name it resembles."""
    known = list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"
            raise TypeError(f"{what} got an unknown option '{name}'{hint}")


def refuse_misspelt(names: Iterable[object], known: Iterable[str]) -> None:
    """Raise TypeError for a key of a group that is a letter or two away from an option. Other keys are the user's own."""
    known = list(known)
    for name in names:
        if isinstance(name, str) and name not in known:
            meant = [option for option in known if _resembles(name, option)]
            if meant:
                raise TypeError(f"parameter group has an unknown option '{name}'; did you mean '{meant[0]}'?")
