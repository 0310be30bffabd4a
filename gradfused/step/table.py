"""The table of a step: rows on a backend, and knowing when to make them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends import BackendTable, Held, Settings, choose
from .memory import check_storage
from .rows import Group, GroupPlan, check_gradient, check_memory, check_parameter, make_row, with_gradient
from .state import WIDE_COUNT, State, States


class StepTable:
    """The tensors of one optimizer's steps, checked, with their state created, on a backend.

    Raises on construction whatever a step could be refused for; the caller takes back the state that was created until then.

    It keeps tensors of the optimizer alive only during a step: from its construction, or from ``still_describes``, until
    ``release``.

    Args:
        groups: The optimizer's parameter groups.
        state: Its state; what is missing is created, and copies of weights that no option asks for are dropped.
        plans: The groups' options.
        sources: Where the weights of some parameters are to be read in their place, or copies of them: ``GroupPlan.copied``.

    Attributes:
        held: The tensors of the present step; None between steps.
        zero_apart: A gradient that is to be left at zero shares memory with another, which takes a pass of its own.
    """

    def __init__(
        self,
        groups: list[Group],
        state: States,
        plans: Sequence[GroupPlan],
        sources: dict[Tensor, Tensor] | None = None,
    ) -> None:
        sources = {} if sources is None else sources
        found = list(with_gradient(groups))
        for _, _, name, p, grad in found:
            check_parameter(name, p)
            check_gradient(name, p, grad)
            check_storage(f"parameter {name}", p)
            check_storage(f"gradient of parameter {name}", grad)
        make = _backend(plans, [t for *_, p, grad in found for t in (p, grad)])
        self._steps_left = WIDE_COUNT  # float32 counts that were below it do not stop before this is 0
        state.widen_counts([p for *_, p, _ in found])
        rows = [
            make_row(name, p, grad, plans[g], g, number, state, make, sources.get(p))
            for g, number, name, p, grad in found
        ]
        zeroed = [plans[row.group].settings.zero_grad_in_step for row in rows]
        self.zero_apart = check_memory(rows, zeroed)
        self.held: Held | None = Held.of(rows, zeroed)
        self.table = make(rows, self._settings(plans))
        self.table.watch(rows, groups, state.all, sources)
        self._taken_before = self.table.taken
        self._names = [row.name.strip("'") for row in rows]
        self._measured = [i for i, row in enumerate(rows) if plans[row.group].measures]
        # On the sums' device already, so that looking at a norm does not wait for it.
        self._measured_at = torch.tensor(self._measured, dtype=torch.int64, device=self.table.sums.device)
        self._plans = list(plans)
        self._pinned = False
        self.may_skip = any(plan.settings.skip_nonfinite for plan in plans)
        self.measures = self.table.needs_stats

    def _settings(self, plans: Sequence[GroupPlan]) -> list[Settings]:
        """What the backend is told: not to zero what it has yet to read elsewhere."""
        return [replace(plan.settings, zero_grad_in_step=False) if self.zero_apart else plan.settings for plan in plans]

    def still_describes(
        self, groups: list[Group], state: State, plans: Sequence[GroupPlan], sources: dict[Tensor, Tensor]
    ) -> bool:
        """Whether the next step can use this table, which then holds that step's tensors.

        New numbers and moved gradients are taken over.
        """
        if self._steps_left <= 0:
            return False
        if plans != self._plans:
            if [plan.structure for plan in plans] != [plan.structure for plan in self._plans]:
                return False
            self.table.configure(self._settings(plans))
            self._plans = list(plans)
        self._taken_before = self.table.taken
        self.held = self.table.refresh(groups, state, sources)
        return self.held is not None

    @property
    def params(self) -> list[Tensor]:
        """The parameters that the present step works on."""
        return [] if self.held is None else self.held.params

    @property
    def taken(self) -> bool:
        """Whether the present step was taken: something was written, or is going to be on the device."""
        return self.table.taken != self._taken_before

    def finish(self) -> None:
        """After a step that was taken: tell autograd what was written. May be done twice."""
        self._steps_left -= 1
        written = [] if self.held is None else self.held.written
        try:
            increment_version(written)
        except RuntimeError:  # made under inference_mode, some of them have no version
            increment_version([t for t in written if not t.is_inference()])

    def pin(self) -> None:
        """Hold the present step's tensors for as long as this lives: a CUDA graph that is being captured replays it."""
        self._pinned = True

    def release(self) -> None:
        """The present step is over, taken or not: hold none of its tensors any more."""
        if not self._pinned:
            self.held = None
            self.table.release()

    def norm(self) -> Tensor | None:
        """Total norm over the parameters whose gradients were measured, 0-dim float64; None if none was."""
        return self.table.sums[self._measured_at].sum().sqrt() if self._measured else None

    def norms(self) -> dict[str, Tensor]:
        """Norm of each measured gradient by parameter name."""
        roots = self.table.sums.sqrt()
        return {self._names[i]: roots[i] for i in self._measured}


def _backend(plans: Sequence[GroupPlan], tensors: Sequence[Tensor]) -> type[BackendTable]:
    requests = {plan.backend for plan in plans}
    if len(requests) > 1:
        raise ValueError(f"backend: expected the same in every parameter group, got {', '.join(sorted(requests))}")
    return choose(next(iter(requests), "auto"), tensors)
