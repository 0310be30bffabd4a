"""Optimizer state: its dtypes, and how it is found, created, dropped, and put back if a step is not taken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .memory import address, check_storage, has_storage, has_values

State = dict[Tensor, dict[str, Any]]
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHORT = (torch.float16, torch.bfloat16)
#: State of one element, whatever the parameter's shape.
SCALARS = frozenset(("step", "mu_product"))
#: Copies and remainders of the weights, which are dropped when their option is switched off.
COPIES = frozenset(("master", "kahan_comp", "ema"))
#: State that may accompany any rule.
RIDERS = COPIES | {"step"}
#: A count of steps in float32 stops at 2**24, where adding 1 rounds back. From half of that on, counts are kept in float64.
#: They are checked whenever a table is made, so that a table may serve for as many steps as the other half.
WIDE_COUNT = 2**23


def _scalar_dtype(key: str, number: float) -> torch.dtype:
    """torch counts steps in float32, or in float64 where that is the default; large counts are float64 here."""
    wide = torch.get_default_dtype() == torch.float64 or (key == "step" and number >= WIDE_COUNT)
    return torch.float64 if wide else torch.float32


def state_dtype(key: str, p: Tensor, asked: torch.dtype | None) -> torch.dtype | None:
    """Dtype of a state tensor, given the ``asked`` one of ``state_dtype``; None for state of one element, which has its own."""
    if key in SCALARS:
        return None
    if key in ("master", "ema"):
        return torch.float32 if p.dtype in SHORT else p.dtype
    return p.dtype if key == "kahan_comp" or asked is None else asked


class States:
    """Reads and creates optimizer state, and remembers what it changed so that this can be taken back."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._undo: list[tuple[Tensor, str, Any]] = []
        self._scalars: set[int] = set()  # addresses of the one-element states met so far

    @property
    def all(self) -> State:
        """The optimizer's own state mapping."""
        return self._state

    def has(self, p: Tensor, keys: Iterable[str]) -> bool:
        """Whether the parameter has state under all of ``keys``."""
        return p in self._state and all(self._state[p].get(key) is not None for key in keys)

    def _get(self, p: Tensor, key: str) -> Any:
        return self._state[p].get(key) if p in self._state else None

    def _set(self, p: Tensor, key: str, value: Tensor) -> Tensor:
        self._undo.append((p, key, self._get(p, key)))
        self._state[p][key] = value
        return value

    def tensor(
        self, name: str, p: Tensor, key: str, initial: float | Tensor = 0.0, asked: torch.dtype | None = None
    ) -> Tensor:
        """The state tensor ``key`` of ``p``, of its shape; a new one is filled with ``initial``, a number or a tensor."""
        value = self._get(p, key)
        if value is None:
            dtype = state_dtype(key, p, asked)
            # An inference tensor could not be written to outside inference mode.
            with torch.inference_mode(False), torch.no_grad():
                made = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
                made.copy_(initial) if isinstance(initial, Tensor) else made.fill_(initial)
            return self._set(p, key, made)
        if (
            not isinstance(value, Tensor)
            or value.shape != p.shape
            or value.device != p.device
            or value.dtype not in FLOATING
            or value.layout != torch.strided
        ):
            got = (
                f"{value.dtype} of shape {tuple(value.shape)} and layout {value.layout} on {value.device}"
                if isinstance(value, Tensor)
                else repr(value)
            )
            raise ValueError(
                f"state '{key}' of parameter {name}: "
                f"expected a dense floating tensor of shape {tuple(p.shape)} on {p.device}, got {got}"
            )
        check_storage(f"state '{key}' of parameter {name}", value, like=p)
        return value

    def scalar(self, name: str, p: Tensor, key: str, device: torch.device, initial: float = 0.0) -> Tensor:
        """A one-element state, such as the count of steps. Parameters whose loaded state shared a tensor get one each."""
        value = self._get(p, key)
        if isinstance(value, Tensor):
            check_storage(f"state '{key}' of parameter {name}", value)
        if isinstance(value, Tensor) and value.numel() == 1 and value.device == device and value.dtype in FLOATING[:2]:
            place = address(value)
            if place in self._scalars:
                return self._set(p, key, value.clone())
            self._scalars |= {place} - {0}
            return value
        if value is not None and not (
            isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
        ):
            raise ValueError(
                f"state '{key}' of parameter {name}: expected a number or a one-element tensor, got {value!r}"
            )
        number = initial if value is None else float(value)
        with torch.inference_mode(False):
            return self._set(p, key, torch.tensor(number, dtype=_scalar_dtype(key, number), device=device))

    def drop(self, p: Tensor, keys: Iterable[str]) -> None:
        """Remove the parameter's state under ``keys``."""
        for key in keys:
            value = self._get(p, key)
            if value is not None:
                self._undo.append((p, key, value))
                del self._state[p][key]

    def widen_counts(self, params: Iterable[Tensor]) -> None:
        """Convert counts of steps that approach the limit of float32 to float64. Waits once for each device."""
        counts: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
        for p in params:
            count = self._get(p, "step")
            # A count whose storage was freed is refused when its row is made.
            readable = isinstance(count, Tensor) and count.numel() == 1 and has_values(count) and has_storage(count)
            if readable and count.dtype == torch.float32:
                counts.setdefault(count.device, []).append((p, count))
        for found in counts.values():
            numbers = torch.stack([count.detach().reshape(()) for _, count in found]).tolist()
            for (p, count), number in zip(found, numbers, strict=True):
                if number >= WIDE_COUNT:
                    self._set(p, "step", count.double())

    @property
    def created(self) -> bool:
        """Whether anything was created or dropped since the last ``keep``."""
        return bool(self._undo)

    def take_back(self) -> bool:
        """Put the state back as it was found. True if anything had been changed."""
        created = self.created
        for p, key, value in reversed(self._undo):
            if value is not None:
                self._state[p][key] = value
                continue
            mine = self._state.get(p, {})
            mine.pop(key, None)  # an interrupt may have come before the state was there
            if not mine:
                self._state.pop(p, None)
        self.keep()
        return created

    def keep(self) -> None:
        """Forget what was created, which stays."""
        self._undo.clear()
