"""The table of a step: an optimizer's rows on a backend, the step that they take, and when they have to be made anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import Enum, auto

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..backends import Backend, Held, Scaling, Settings, choose
from .groups import Group, GroupOptions
from .memory import check_storage
from .rows import check_gradient, check_memory, check_parameter, make_row, with_gradient
from .state import WIDE_COUNT, State, States


class Outcome(Enum):
    """What became of a step. Unless it was TAKEN, weights, state and counts are what they were before."""

    #: No parameter has a gradient.
    IDLE = auto()
    #: Everything was written, or will be on the device unless that finds a reason to skip the step.
    TAKEN = auto()
    #: GradScaler found an overflow, which the host knows.
    OVERFLOWED = auto()
    #: The host saw a gradient that is not finite.
    SKIPPED = auto()
    #: The device skipped the step that state was created for.
    SKIPPED_ON_DEVICE = auto()


@torch.no_grad()
def zero_gradients(groups: Iterable[Group]) -> None:
    """Set every gradient to zero in the groups that ask for ``zero_grad_in_step``."""
    params = (p for group in groups if group["zero_grad_in_step"] for p in group["params"])
    grads = [grad for p in params if (grad := p.grad) is not None]
    if grads:
        torch._foreach_zero_(grads)


class StepTable:
    """The parameters with a gradient of an optimizer's steps: checked, with their state created, on a backend.

    The constructor raises whatever a step could be refused for; the caller then takes back the state that it created.

    Between steps the table keeps no tensor of the optimizer alive. It holds them from its construction, or from
    ``still_describes``, until ``release``.

    Args:
        groups: The optimizer's parameter groups.
        state: The optimizer's state. What is missing is created; copies of weights that no option asks for are dropped.
        options: The groups' options.
        sources: Tensors that the weights of some parameters are read from: SAM's backups. With ``GroupOptions.copied``
            they are copies of the weights in float32 that belong to them.

    Attributes:
        outcome: What became of the present step; None until it was taken or refused.
        held: The tensors of the present step; None between steps.
        on_device: The device finds out by itself whether it has to skip a step.
    """

    def __init__(
        self,
        groups: list[Group],
        state: States,
        options: Sequence[GroupOptions],
        sources: dict[Tensor, Tensor] | None = None,
    ) -> None:
        sources = {} if sources is None else sources
        found = list(with_gradient(groups))
        for _, _, name, p, grad in found:
            check_parameter(name, p)
            check_gradient(name, p, grad)
            check_storage(f"parameter {name}", p)
            check_storage(f"gradient of parameter {name}", grad)
        backend = _backend(options, [t for *_, p, grad in found for t in (p, grad)])
        self._steps_left = WIDE_COUNT  # counts in float32 that were below it do not stop before this is 0
        state.widen_counts([p for *_, p, _ in found])
        rows = [
            make_row(name, p, grad, options[g], g, number, state, backend, sources.get(p))
            for g, number, name, p, grad in found
        ]
        zeroed = [options[row.group].settings.zero_grad_in_step for row in rows]
        #: A gradient that is to be set to zero shares memory with another: zeros are written after the step, not within it.
        self._zero_apart = check_memory(rows, zeroed)
        self.held: Held | None = Held.of(rows, zeroed)
        self.outcome: Outcome | None = None
        self._groups: list[Group] | None = groups
        self._new_state: States | None = state  # until a step was taken with it
        self.backend = backend(rows, self._settings(options))
        self.backend.watch(rows, groups, state.all, sources)
        self.on_device = self.backend.on_device
        self._taken_before = self.backend.taken
        self._names = [row.name.strip("'") for row in rows]
        self._measured = [i for i, row in enumerate(rows) if options[row.group].measures]
        # On the sums' device already, so that looking at a norm does not wait for it.
        self._measured_at = torch.tensor(self._measured, dtype=torch.int64, device=self.backend.sums.device)
        self._options = list(options)
        self._pinned = False
        self._may_skip = any(option.settings.skip_nonfinite for option in options)
        self._needs_stats = self.backend.needs_stats

    def _settings(self, options: Sequence[GroupOptions]) -> list[Settings]:
        """The settings that the backend is given: it must not zero a gradient that it has yet to read elsewhere."""
        own = [option.settings for option in options]
        return [replace(settings, zero_grad_in_step=False) for settings in own] if self._zero_apart else own

    def still_describes(
        self, groups: list[Group], state: State, options: Sequence[GroupOptions], sources: dict[Tensor, Tensor]
    ) -> bool:
        """Whether the next step can use this table, which then holds the tensors of that step.

        New numbers and moved gradients are taken over.
        """
        if self._steps_left <= 0:
            return False
        if options != self._options:
            if [option.structure for option in options] != [option.structure for option in self._options]:
                return False
            self.backend.configure(self._settings(options))
            self._options = list(options)
        self.outcome, self._taken_before = None, self.backend.taken
        self.held, self._groups = self.backend.refresh(groups, state, sources), groups
        return self.held is not None

    @property
    def params(self) -> list[Tensor]:
        """The parameters of the present step."""
        return [] if self.held is None else self.held.params

    # ---- the step

    def step(self, scaling: Scaling, *, ask_norms: bool = False) -> Outcome:
        """Take the step on the backend: all of it or, whatever is raised meanwhile, nothing.

        If this raises after everything was written, ``outcome`` is TAKEN.

        Args:
            scaling: What GradScaler says.
            ask_norms: The host waits for the norms, which have to be measured, and skips the step if one is not finite.
        """
        try:
            self.outcome = self._step(scaling, ask_norms)
        except BaseException:
            if self.backend.taken != self._taken_before:
                self.outcome = self._conclude(scaling)
            raise
        return self.outcome

    def _step(self, scaling: Scaling, ask_norms: bool) -> Outcome:
        if self.held is None or not self.held.params:
            return Outcome.IDLE
        if not self.on_device and scaling.forbids:
            return self._refused(Outcome.OVERFLOWED)
        if self._needs_stats:
            self.backend.stats(scaling)
        if ask_norms and not bool(torch.isfinite(self.backend.sums).all()):
            return self._refused(Outcome.SKIPPED)
        if not self.backend.apply(scaling):
            return self._refused(Outcome.SKIPPED)
        return self._conclude(scaling)

    def _conclude(self, scaling: Scaling) -> Outcome:
        """What remains after the kernels: new state stays and autograd learns what was written. May be done twice.

        Only where state was created for this step does the host ask the device whether it skipped the step, and wait
        for it: that state has to go, so that checkpoints, copies and the next step know that there was none yet.
        """
        uncertain = self.on_device and (scaling.found_inf is not None or self._may_skip)
        if self._new_state is not None:
            if uncertain and self._new_state.created and self._skipped_its_first(scaling):
                return self._refused(Outcome.SKIPPED_ON_DEVICE)
            self._new_state.keep()
            self._new_state = None
        self._steps_left -= 1
        self._tell_autograd()
        if (uncertain or self._zero_apart) and self._groups is not None:
            zero_gradients(self._groups)
        return Outcome.TAKEN

    def _refused(self, outcome: Outcome) -> Outcome:
        """The step was not taken: gradients are zeroed all the same, and state that was created for it goes."""
        if self._groups is not None:
            zero_gradients(self._groups)
        if self._new_state is not None:
            self._new_state.take_back()
        return outcome

    def _skipped_its_first(self, scaling: Scaling) -> bool:
        """After the first step of this table: whether its device skipped it. Waits for the device."""
        skipped = self.backend.skipped
        return scaling.forbids or (skipped is not None and bool(skipped))

    def _tell_autograd(self) -> None:
        """Raise the version of every tensor that was written."""
        written = [] if self.held is None else self.held.written
        try:
            increment_version(written)
        except RuntimeError:  # made under inference_mode, some of them have no version
            increment_version([t for t in written if not t.is_inference()])

    # ---- what it holds

    def pin(self) -> None:
        """Hold the present step's tensors for as long as this lives: a CUDA graph that is being captured replays it."""
        self._pinned = True

    def release(self) -> None:
        """The present step is over, taken or not: let go of its tensors."""
        self._groups = self._new_state = None
        if not self._pinned:
            self.held = None
            self.backend.release()

    # ---- what it saw

    @property
    def skipped(self) -> Tensor | None:
        """How many steps the device skipped because a gradient was not finite, 0-dim; None where the host knows."""
        return self.backend.skipped

    def norm(self) -> Tensor | None:
        """Total norm over the parameters whose gradients were measured, 0-dim float64; None if none was."""
        return self.backend.sums[self._measured_at].sum().sqrt() if self._measured else None

    def norms(self) -> dict[str, Tensor]:
        """Norm of each measured gradient by parameter name."""
        roots = self.backend.sums.sqrt()
        return {self._names[i]: roots[i] for i in self._measured}


def _backend(options: Sequence[GroupOptions], tensors: Sequence[Tensor]) -> type[Backend]:
    """The backend that every group asks for, or the one to be chosen for ``tensors``."""
    requests = {option.backend for option in options}
    if len(requests) > 1:
        raise ValueError(f"backend: expected the same in every parameter group, got {', '.join(sorted(requests))}")
    return choose(next(iter(requests), "auto"), tensors)
