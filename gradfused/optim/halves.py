"""The two halves of a SAM step, the ascent and the descent, and the backups that the first leaves to the second."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.utils.weak import TensorWeakRef

from ..backends import Scaling, Settings
from ..step.groups import GroupOptions
from ..step.options import INF, choice, finite, plain
from ..step.rows import check_source, named_parameters
from ..step.state import SHORT, States
from ..step.table import Outcome, StepTable, zero_gradients
from .base import Optimizer

_TINY = 1e-12


@dataclass(frozen=True)
class AscentOptions:
    """The options of `SAM`, checked whenever one of them changes."""

    rho: float
    adaptive: bool
    eta: float

    def __post_init__(self) -> None:
        for name in ("rho", "eta"):
            object.__setattr__(self, name, finite(name, getattr(self, name)))
        object.__setattr__(self, "adaptive", plain(self.adaptive))
        if not isinstance(self.adaptive, bool):
            raise TypeError(f"adaptive: expected True or False, got {self.adaptive!r}")
        if self.eta and not self.adaptive:
            raise ValueError(
                f"eta={self.eta!r} is added to each weight's size in adaptive SAM: expected adaptive=True with it, "
                "or eta=0"
            )


class Halves:
    """The ascent, the descent, and all of SAM's state that changes.

    Trainers wrap an optimizer in objects that copy its attributes or inherit from its class, so that whatever a method
    assigns to ``self`` stays with the wrapper. SAM keeps its state in this one object, which is the same for all of
    them.

    Attributes:
        base: The optimizer whose step is the descent.
        options: The options of the ascent.
        owner: A function that returns the SAM of these halves.
        complete: That SAM is constructed.
        ascended: The ascent was taken and the descent is due.
        backups: The weights before the ascent, of the parameters that it moved; empty between steps.
        stepped: A step of the optimizer was taken, which learning-rate schedulers want to know.
        warned: The warning about a state dict taken between the halves was given.
    """

    def __init__(self, base: Optimizer, options: AscentOptions) -> None:
        self.base, self.options = base, options
        self.owner: Callable[[], torch.optim.Optimizer | None] = lambda: None
        self.complete = self.stepped = self.warned = False
        self.begin()

    def begin(self, backups: dict[Tensor, Tensor] | None = None, ascended: bool = False) -> None:
        """Start anew, at the beginning of a step or, with ``ascended``, between its halves."""
        self.ascended, self.backups = ascended, backups or {}
        self._state: dict[Tensor, dict[str, Any]] = defaultdict(dict)  # each parameter's backup, kept for the next step
        self._table: StepTable | None = None
        for p, backup in self.backups.items():
            self._state[p]["backup"] = backup

    def belongs_to(self, owner: torch.optim.Optimizer) -> None:
        """Remember the SAM of these halves, which was constructed or unpickled."""
        self.owner, self.complete = weakref.ref(owner), True

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("base", "options", "backups", "ascended")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Halves.__init__(self, state["base"], state["options"])
        self.begin(state["backups"], state["ascended"])

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """The base's lock, held by everything that steps, loads or swaps: both optimizers are used by one thread at a time."""
        return self.base._lock

    # ---- the ascent

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @property
    def _skips(self) -> bool:
        """Whether a half is skipped if its gradients are not finite."""
        return any(group["nonfinite"] == "skip" for group in self._groups)

    def _group_options(self) -> list[GroupOptions]:
        """The ascent as a step of the rule ``ascend``, on gradients normalised to ``rho`` over all parameters."""
        settings = Settings(
            norm_scope="global",
            perturb=(0.0, self.options.rho, _TINY, 0.0, INF),
            decoupled=True,
            adaptive=self.options.adaptive,
            eta=self.options.eta,
        )

        def of(group: dict[str, Any]) -> GroupOptions:
            own = replace(settings, zero_grad_in_step=group["zero_grad_in_step"])
            return GroupOptions("ascend", ("backup",), False, "off", group["backend"], own, copied=True)

        return [of(group) for group in self._groups]

    def _masters(self) -> dict[Tensor, Tensor]:
        """The copies in float32 of 16-bit parameters."""
        groups = (g for g in self._groups if choice("precision", g["precision"]) == "master")
        params = (p for group in groups for p in group["params"] if p.dtype in SHORT)
        return {p: self.base.state[p]["master"] for p in params if "master" in self.base.state.get(p, {})}

    def _drop_backups(self) -> None:
        """Free the backups of parameters that left the groups or changed their shape, dtype or device."""
        alive = {p for group in self._groups for p in group["params"]}
        for p in list(self._state):
            if p not in alive or not _fits(p, self._state[p]["backup"]):
                del self._state[p]

    def _current_table(self, states: States) -> StepTable:
        """The table of this ascent: the last one, if it still describes it, or a new one."""
        options, masters = self._group_options(), self._masters()
        table = self._table
        if table is None or not table.still_describes(self._groups, self._state, options, masters):
            self._table = table = None
            self._drop_backups()
            self._table = table = StepTable(self._groups, states, options, masters)
        return table

    @_disable_dynamo
    @torch.no_grad()
    def ascend(self, scaling: Scaling) -> None:
        """Move the weights up unless the gradients overflowed or are to be skipped. The descent is due in any case."""
        self.base._refuse_averaged("first_step()")
        if scaling.forbids:
            zero_gradients(self._groups)
            self.ascended = True
            return
        scaling = replace(scaling, found_inf=None)  # so that no device looks for it again
        states, table = States(self._state), None
        try:
            table = self._current_table(states)
            # The descent has to know whether the weights went up: it does not wait for the device to skip a step.
            if table.step(scaling, ask_norms=self._skips) is Outcome.TAKEN:
                self._went_up(table)
        except BaseException:
            if table is not None and table.outcome is Outcome.TAKEN:
                self._went_up(table)
            else:
                states.take_back()
                self._table = None
            raise
        finally:
            if self._table is not None:
                self._table.release()
        self.ascended = True

    def _went_up(self, table: StepTable) -> None:
        """The weights were moved: remember where they were. May be done twice."""
        self.backups = {p: self._state[p]["backup"] for p in table.params}
        self.ascended = True

    # ---- the descent

    @_disable_dynamo
    def descend(self, scaling: Scaling) -> None:
        """Take the optimizer's step from where the weights were."""
        with self.lock:
            self.base._refuse_averaged("second_step()")
            # Only the device knows whether it skips a step, which then has to find the weights where they were.
            on_device = any(p.device.type != "cpu" for p in self.backups)
            late = on_device if self._table is None else self._table.on_device
            early = scaling.forbids or (self._skips and late)
            if early:
                self._take_back(self.backups)
            moved: list[Tensor] = []
            try:
                self.step_base(scaling, {} if early else self.backups, moved)
                self._went_down(moved, early)
            except BaseException:
                if moved:
                    self._went_down(moved, early)
                raise

    def _went_down(self, moved: list[Tensor], early: bool) -> None:
        """After the optimizer's step: parameters that it did not move go back, and the next ascent is due. May be done twice."""
        if not early:
            self._take_back({p: self.backups[p] for p in self.backups.keys() - moved})
        self.backups, self.ascended = {}, False

    def step_base(self, scaling: Scaling, sources: dict[Tensor, Tensor], moved: list[Tensor] | None = None) -> None:
        """Take the optimizer's step with the weights read from ``sources`` where these have them.

        ``moved`` is given the parameters that were stepped.
        """
        self.stepped = True
        self.base._hooked_step(scaling, sources, moved)

    def restore(self) -> None:
        """Undo the ascent, if there was one: the weights go back to where they were."""
        self.base._refuse_averaged("restore()")
        for name, p in named_parameters(self._groups):
            if p in self.backups:
                check_source(name, p, self.backups[p])
        self._take_back(self.backups)
        self.backups, self.ascended = {}, False

    @torch.no_grad()
    def _take_back(self, backups: dict[Tensor, Tensor]) -> None:
        if backups:
            torch._foreach_copy_(list(backups), list(backups.values()))

    # ---- looking at the gradients

    def no_way_up(self) -> bool:
        """Whether every gradient is zero, or there is none: the ascent would leave the weights where they are."""
        grads = (grad for group in self._groups for p in group["params"] if (grad := p.grad) is not None)
        return not any(map(_points_somewhere, grads))

    def gradients_seen(self) -> Callable[[], bool]:
        """A function that tells whether any gradient was written, made or removed from now on. It keeps none alive."""
        params = [p for group in self._groups for p in group["params"]]
        seen = [_SeenGradient(p.grad) for p in params]
        return lambda: any(was.differs(p.grad) for was, p in zip(seen, params, strict=True))


class _SeenGradient:
    """A parameter's gradient at some time, or the fact that there was none."""

    def __init__(self, grad: Tensor | None) -> None:
        self._grad = None if grad is None else (TensorWeakRef(grad), grad._version)

    def differs(self, now: Tensor | None) -> bool:
        if self._grad is None or now is None:
            return self._grad is not None or now is not None
        before, version = self._grad
        return before() is not now or now._version != version


def _points_somewhere(grad: Tensor) -> bool:
    """Whether a gradient has an element other than zero, as one that is not dense is taken to have."""
    grad = getattr(grad, "_local_tensor", grad)
    return grad.layout != torch.strided or bool(grad.count_nonzero())


def _fits(p: Tensor, backup: Tensor) -> bool:
    return backup.shape == p.shape and backup.dtype == p.dtype and backup.device == p.device
