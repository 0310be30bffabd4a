"""Unknown option names: whether they are misspelt, and which option was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Short names have too many neighbours: 'Lr' may be a user's own key, as may 'no_decay', two letters away from 'lr_decay'.
_SHORTEST = 4
_LONG = 9


def distance(a: str, b: str) -> int:
    """Edit distance: how many letters must be inserted, removed, replaced or swapped with the next to turn ``a`` into ``b``."""
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


def _meant(name: str, known: Iterable[str]) -> str | None:
    """The nearest of the ``known`` names within one edit of ``name``, or two if the known name is long."""
    near: list[tuple[int, str]] = []
    for option in known:
        allowed = 0 if len(option) < _SHORTEST else 1 if len(option) < _LONG else 2
        if abs(len(name) - len(option)) <= allowed and (away := distance(name, option)) <= allowed:
            near.append((away, option))
    return min(near)[1] if near else None


def refuse_unknown(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Raise TypeError for the first of ``names`` that is not known, and suggest the known name that it resembles."""
    known = list(known)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; known are {', '.join(known)}"
            raise TypeError(f"{what} got an unknown option '{name}'{hint}")


def refuse_misspelt(names: Iterable[object], known: Iterable[str]) -> None:
    """Raise TypeError for a group's key that is a letter or two away from an option. Other unknown keys are the user's own."""
    known = list(known)
    for name in names:
        meant = _meant(name, known) if isinstance(name, str) and name not in known else None
        if meant is not None:
            raise TypeError(f"parameter group has an unknown option '{name}'; did you mean '{meant}'?")
