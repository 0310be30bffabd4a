"""The table of a step: rows on a backend, and knowing when to make them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import is_

import torch
from torch import Tensor

from .backends import BackendTable, Settings, choose
from .rows import Group, GroupPlan, check_gradient, check_memory, check_parameter, make_row, with_gradient
from .state import WIDE_COUNT, State, States


class StepTable:
    """The tensors of one optimizer's steps, checked, with their state created, on a backend.

    Raises on construction, with nothing changed, whatever a step could be refused for.

    Args:
        groups: The optimizer's parameter groups.
        state: Its state; what is missing is created, and copies of weights that no option asks for are dropped.
        plans: The groups' options.
        sources: Where the weights of some parameters are to be read in their place, or copies of them: ``GroupPlan.copied``.

    Attributes:
        params: Parameters with a gradient, which it steps.
        zero_apart: A gradient that is to be left at zero shares memory with another, which takes a pass of its own.
    """

    def __init__(
        self,
        groups: list[Group],
        state: State,
        plans: Sequence[GroupPlan],
        sources: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        found = list(with_gradient(groups))
        for _, _, name, p in found:
            check_parameter(name, p)
            check_gradient(name, p, p.grad)  # type: ignore[arg-type]
        make = _backend(plans, [t for _, _, _, p in found for t in (p, p.grad) if t is not None])
        self._states = States(state)
        self._sources = dict(sources or {})
        self._steps_left = WIDE_COUNT  # float32 counts that were below it do not stop before this is 0
        try:
            self._states.widen_counts([p for _, _, _, p in found])
            rows = [
                make_row(name, p, plans[g], g, number, self._states, make, self._sources.get(p))
                for g, number, name, p in found
            ]
            zeroed = [plans[row.group].settings.zero_grad for row in rows]
            self.zero_apart = check_memory(rows, zeroed, state)
            self.table = make(rows, self._settings(plans))
            self.table.watch(rows, groups, state)
            self._names = [row.name.strip("'") for row in rows]
            self._measured = [i for i, row in enumerate(rows) if plans[row.group].measures]
            # On the sums' device already, so that looking at a norm does not wait for it.
            self._measured_at = torch.tensor(self._measured, dtype=torch.int64, device=self.table.sums.device)
        except BaseException:
            self._states.take_back()
            raise
        self._plans = list(plans)
        self.params = [row.param for row in rows]
        self.may_skip = any(plan.settings.skip_nonfinite for plan in plans)
        self.measures = self.table.needs_stats

    def _settings(self, plans: Sequence[GroupPlan]) -> list[Settings]:
        """What the backend is told: not to zero what it has yet to read elsewhere."""
        return [replace(plan.settings, zero_grad=False) if self.zero_apart else plan.settings for plan in plans]

    def still_describes(
        self,
        groups: list[Group],
        state: State,
        plans: Sequence[GroupPlan],
        sources: Mapping[Tensor, Tensor] | None = None,
    ) -> bool:
        """Whether the next step can use this table; new numbers and moved gradients are taken over."""
        if self._steps_left == 0 or not _same_tensors(sources or {}, self._sources):
            return False
        if plans != self._plans:
            if [plan.structure for plan in plans] != [plan.structure for plan in self._plans]:
                return False
            self.table.configure(self._settings(plans))
            self._plans = list(plans)
        return self.table.refresh(groups, state)

    @property
    def created_state(self) -> bool:
        """Whether it created state that may still be taken back."""
        return self._states.created

    def keep_state(self) -> None:
        """The step was taken: created state stays."""
        self._steps_left -= 1
        self._states.keep()

    def take_back_state(self) -> bool:
        """The step was not taken: created state goes. True if there was any, so that this table is of no more use."""
        return self._states.take_back()

    def norm(self) -> Tensor | None:
        """Total norm over the parameters whose gradients were measured, 0-dim float64; None if none was."""
        return self.table.sums[self._measured_at].sum().sqrt() if self._measured else None

    def norms(self) -> dict[str, Tensor]:
        """Norm of each measured gradient by parameter name."""
        roots = self.table.sums.sqrt()
        return {self._names[i]: roots[i] for i in self._measured}


def _same_tensors(a: Mapping[Tensor, Tensor], b: Mapping[Tensor, Tensor]) -> bool:
    """Whether both hold the same tensors in the same order. No Python code runs for each: steps are small."""
    return len(a) == len(b) and all(map(is_, a, b)) and all(map(is_, a.values(), b.values()))


def _backend(plans: Sequence[GroupPlan], tensors: Sequence[Tensor]) -> type[BackendTable]:
    requests = {plan.backend for plan in plans}
    if len(requests) > 1:
        raise ValueError(f"backend: expected the same in every parameter group, got {', '.join(sorted(requests))}")
    return choose(next(iter(requests), "auto"), tensors)
