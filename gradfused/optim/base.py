"""The base class of all gradfused optimizers: groups and their options, the step, saving and loading."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .. import gpu
from ..backends import Scaling, Settings
from ..step import options
from ..step.amp import LeavesScalingToStep, forget_scale
from ..step.groups import GroupOptions, OptionsCache
from ..step.memory import check_disjoint, has_values
from ..step.rows import check_parameter, may_train, named_parameters, parameter_name
from ..step.schema import DEFAULTS
from ..step.spelling import refuse_misspelt, refuse_unknown
from ..step.state import States
from ..step.table import Outcome, StepTable, zero_gradients
from .checkpoint import Kind, restore_dtypes
from .rule import Rule, rule_numbers, signature_options, telling_options

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]
_NOT_OPTIONS = frozenset(("params", "param_names"))
_TABLES_KEPT = 4


def evaluated(closure: Callable[[], float]) -> float:
    """What a closure returns, with gradients recorded."""
    with torch.enable_grad():
        return closure()


@torch.no_grad()
def _overwrite(values: dict[Tensor, Tensor]) -> None:
    """Copy each value into the tensor that is its key."""
    for p, value in values.items():
        p.copy_(value)


class Optimizer(torch.optim.Optimizer):
    """A torch optimizer whose step applies a gradient recipe and the update rule in one pass over memory.

    A subclass declares its rule. Its constructor's signature says which options it takes, and the options of the same
    names as fields of Settings are the rule's numbers.

    Raises:
        TypeError, ValueError: An option is unknown, out of range or contradicts another.
    """

    _step_supports_amp_scaling = LeavesScalingToStep()

    def __init__(self, params: Params, **given: Any) -> None:
        refuse_unknown([name for name in given if name not in self._own_options], DEFAULTS, type(self).__name__)
        self._begin()
        self._complete = False
        super().__init__(params, DEFAULTS | given)
        self._check_memory()
        self._complete = True

    def _begin(self) -> None:
        """Set up the attributes that are not saved."""
        # Not self in a wrapper that inherits from this class or has copied these attributes.
        self._itself = weakref.ref(self)
        self._lock = getattr(self, "_lock", None) or threading.RLock()  # held by everything that steps, loads or swaps
        self._tables: list[StepTable] = []  # the one used last comes first
        self._captured: list[StepTable] = []  # by CUDA graphs, which may be replayed as long as the optimizer lives
        self._seen: StepTable | None = None  # the table of the last step, which knows its norms
        self._group_options = OptionsCache()
        self._skipped: int | Tensor = 0
        self._averaged = False  # swap_ema() is under way

    # ---- the rule

    _rule: ClassVar[Rule]
    _own_options: ClassVar[dict[str, Any]]  # those in the constructor's signature, with their defaults

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_rule" in vars(cls):  # not in a class that a user derives from an optimizer
            cls._own_options = signature_options(cls.__init__)

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's validated options as fields of Settings."""
        numbers = rule_numbers(group, self._own_options)
        return numbers | {"decoupled": True} if self._rule.decoupled else numbers

    def _interpret(self, group: dict[str, Any]) -> GroupOptions:
        """Interpret and validate one group's options."""
        if "differentiable" in self.defaults and options.flag("differentiable", group["differentiable"]):
            raise ValueError("differentiable=True: a fused step cannot be differentiated; use torch.optim for that")
        group = options.with_choices(group)
        recipe = options.interpret(group)
        settings = Settings(**self._numbers(group), **recipe)
        lr = group["lr"]
        if isinstance(lr, Tensor) and gpu.holds(lr):
            settings = replace(settings, lr_tensor=lr, lr_address=lr.data_ptr())
        rule, states = self._rule.variant(group, self._own_options)
        precision = group["precision"] or "none"
        return GroupOptions(
            rule,
            states,
            counts=self._rule.counts_steps or settings.noise > 0 or precision == "stochastic",
            centre=options.centre_kind(group),
            backend=group["backend"],
            settings=settings,
            initial=self._rule.initial_values(group, states),
            mu_product=self._rule.keeps_product,
            precision=precision,
            state_dtype=options.STATE_DTYPES.get(group["state_dtype"]),
            ema=group["ema"] is not None,
        )

    def _current_options(self) -> list[GroupOptions]:
        """What every group's options ask for, interpreted again only where one of them changed."""
        return self._group_options.of(self.param_groups, self.defaults, self._interpret)

    # ---- groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.optim; every keyword of the optimizer may be given for it.

        Raises:
            TypeError: A parameter that requires a gradient is complex, sparse or not floating, or an option is misspelt
                or of the wrong type.
            ValueError: An option is out of range or contradicts another, or parameters overlap in memory.
        """
        with self._lock:
            self._add_param_group(param_group)

    def _add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            group, index = self.param_groups[-1], len(self.param_groups) - 1
            refuse_misspelt([name for name in group if name not in _NOT_OPTIONS], self.defaults)
            self._interpret(group)
            for i, p in enumerate(group["params"]):
                if may_train(p):
                    check_parameter(parameter_name(self.param_groups, index, i), p)
            if self._complete:
                self._check_memory()
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_memory(self) -> None:
        """Raise ValueError if two parameters share memory. Frozen parameters and those without values are left to the step."""
        trained = ((name, p) for name, p in named_parameters(self.param_groups) if may_train(p) and has_values(p))
        check_disjoint(list({id(p): (f"parameter {name}", p) for name, p in trained}.values()))

    # ---- the step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step on every parameter that has a gradient. Gradients are read, never written.

        Args:
            closure: Reevaluates the model and returns the loss.

        Raises:
            TypeError, ValueError: A gradient, parameter, state or option cannot be used; nothing has changed.
            RuntimeError: The backend that was asked for cannot run; nothing has changed.
        """
        try:
            loss = None if closure is None else evaluated(closure)
            self._take_step(Scaling.of(self))
        except BaseException:
            forget_scale(self)
            raise
        return loss

    def _hooked_step(self, scaling: Scaling, sources: dict[Tensor, Tensor], moved: list[Tensor] | None = None) -> None:
        """``_take_step`` with what torch does around ``step``: hooks, the profiler's record, the mark for schedulers."""

        def step(self: Optimizer, closure: Callable[[], float] | None = None) -> None:
            if closure is not None:  # a hook may bring one
                evaluated(closure)
            self._take_step(scaling, sources, moved)

        self._opt_called = True
        torch.optim.Optimizer.profile_hook_step(step)(self)

    @_disable_dynamo
    def _take_step(
        self, scaling: Scaling, sources: dict[Tensor, Tensor] | None = None, moved: list[Tensor] | None = None
    ) -> None:
        """Take the step unless the host knows a reason to skip it: all of it or, whatever is raised meanwhile, nothing.

        Args:
            scaling: What GradScaler says.
            sources: Tensors that the weights of some parameters are read from: SAM's backups.
            moved: Is given the parameters that were stepped, also if an interrupt is raised right after the step.
        """
        with self._lock:
            self._refuse_averaged("step()")
            if scaling.found_inf is not None and not gpu.holds(scaling.found_inf) and scaling.forbids:
                zero_gradients(self.param_groups)
                return
            sources = {} if sources is None else sources
            moved = [] if moved is None else moved
            table: StepTable | None = None
            new_state: States | None = None
            try:
                options = self._current_options()
                table = self._kept_table(options, sources)
                if table is None:
                    new_state = States(self.state)
                    table = self._new_table(options, sources, new_state)
                self._note(table, table.step(scaling), new_state, moved)
            except BaseException:
                if table is not None and table.outcome is Outcome.TAKEN:
                    self._note(table, table.outcome, new_state, moved)
                else:
                    self._take_back(new_state)
                raise
            finally:
                for known in self._tables:
                    known.release()

    def _note(self, table: StepTable, outcome: Outcome, new_state: States | None, moved: list[Tensor]) -> None:
        """Keep what became of a step. May be done twice for one that was taken."""
        if outcome is not Outcome.OVERFLOWED:
            self._seen = table
        if outcome is Outcome.TAKEN:
            moved[:] = table.params
        elif new_state is not None and outcome is not Outcome.IDLE:
            self._take_back(new_state)
        if outcome is Outcome.SKIPPED:
            self._skipped += 1

    def _take_back(self, new_state: States | None) -> None:
        """A step was not taken: remove the state that was created for it, and the tables, which may know that state."""
        if new_state is not None:
            new_state.take_back()
        self._drop_tables()

    def _drop_tables(self) -> None:
        """Have the next step make a new table. Norms may still be asked of the old one, which holds no tensor any more."""
        for table in self._tables:
            self._keep_count(table)
            table.release()
        self._tables = []

    def _kept_table(self, options: list[GroupOptions], sources: dict[Tensor, Tensor]) -> StepTable | None:
        """The table that describes this step: the last one's, or one of a few kept for models whose gradients come and go."""
        for table in self._tables:
            if table.still_describes(self.param_groups, self.state, options, sources):
                others = [known for known in self._tables if known is not table]
                if table.on_device and gpu.capturing():  # the graph's from now on: it replays the addresses in it
                    table.pin()
                    self._captured.append(table)
                    self._tables = others
                else:
                    self._tables = [table, *others]
                return table
        if gpu.capturing():
            raise RuntimeError(
                "capturing step() in a CUDA graph: no table describes it, and building one cannot be captured. Take a "
                "step with these parameters, gradients and options before the capture, and one between two captures"
            )
        return None

    def _new_table(self, options: list[GroupOptions], sources: dict[Tensor, Tensor], new_state: States) -> StepTable:
        """A table made for this step, which takes the place of the one that was used least recently."""
        table = StepTable(self.param_groups, new_state, options, sources)
        for old in self._tables[_TABLES_KEPT - 1 :]:
            self._keep_count(old)
        self._tables = [table, *self._tables[: _TABLES_KEPT - 1]]
        return table

    def _keep_count(self, table: StepTable) -> None:
        """Before a table goes: add up the steps that its device skipped, without waiting for them."""
        if table.skipped is not None:
            self._skipped = self._skipped + table.skipped.clone()

    @property
    def skipped_steps(self) -> int:
        """Steps that ``nonfinite="skip"`` did not take. Waits for the device."""
        counts = (table.skipped for table in (*self._tables, *self._captured))
        return int(self._skipped) + sum(int(c) for c in counts if c is not None)

    # ---- the average of the weights

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Within the block, parameters whose group has ``ema`` hold their average; afterwards what they held before.

        Parameters that have not been stepped yet keep their weights, which are their average. To save the average, save
        the model within the block and the optimizer outside. Within the block the optimizer can neither step nor be
        saved, loaded or copied, because the weights that its state belongs to are put aside.

        Raises:
            RuntimeError: No group has ``ema``, the block is nested, or the optimizer is used within it as above.
        """
        self = self._itself() or self  # not the wrapper whose class inherits this method
        if all(group["ema"] is None for group in self.param_groups):
            raise RuntimeError("swap_ema(): no parameter group keeps an average; give the optimizer ema=0.999, say")
        with self._lock:  # not held within the block, where other threads are refused at once rather than made to wait
            self._refuse_averaged("swap_ema()")
            averaging = (p for group in self.param_groups if group["ema"] is not None for p in group["params"])
            averages = {p: self.state[p]["ema"] for p in averaging if "ema" in self.state.get(p, {})}
            kept = {p: p.detach().clone() for p in averages}
            self._averaged = True
        try:
            _overwrite(averages)
            yield
        finally:
            with self._lock:
                self._averaged = False
                _overwrite(kept)

    def _refuse_averaged(self, what: str) -> None:
        """Raise RuntimeError while the weights are swapped for their average."""
        if self._averaged:
            raise RuntimeError(
                f"{what} inside swap_ema(): the weights that the optimizer's state belongs to are put aside for their "
                "average; leave the block first. To keep the average, save the model inside the block and the optimizer outside"
            )

    # ---- what a step saw

    @property
    def grad_norm(self) -> Tensor | None:
        """Total norm of the last step's gradients, unscaled and after centralisation: 0-dim, float64.

        It covers the parameters of every group whose recipe takes a norm; None before the first step or if no group's
        does.
        """
        return None if self._seen is None else self._seen.norm()

    def grad_norms(self) -> dict[str, Tensor]:
        """The norm of each gradient in ``grad_norm``, by the parameter's name, or by its place where it has no name."""
        return {} if self._seen is None else self._seen.norms()

    # ---- saving and loading

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The state and options, as in torch.optim.

        It waits for a step that another thread is taking. The tensors are the optimizer's own, so the steps after it
        write to them: copy them, while no thread steps, to keep what they hold.

        Raises:
            RuntimeError: Within ``swap_ema()``.
        """
        with self._lock:
            self._refuse_averaged("state_dict()")
            return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_averaged("copying or pickling the optimizer")
        return super().__getstate__() | {"skipped_steps": self.skipped_steps}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle. ``load_state_dict`` calls this too: whatever was cached describes the old state."""
        kept = {key: value for key, value in state.items() if key != "skipped_steps"}
        skipped = state["skipped_steps"] if "skipped_steps" in state else int(self.skipped_steps)
        captured = getattr(self, "_captured", [])
        self._begin()
        super().__setstate__(kept)
        self._skipped, self._captured = skipped, captured
        self._complete = True
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this optimizer or of its ``torch.optim`` twin.

        Options that the saved groups lack keep their present values, so a recipe survives a checkpoint of torch's. It
        waits for a step that another thread is taking.

        Raises:
            ValueError: The state is another optimizer's, a part of it is missing, or its shapes are not these
                parameters'; nothing has changed.
            RuntimeError: Within ``swap_ema()``.
        """
        with self._lock:
            self._refuse_averaged("load_state_dict()")
            self._load(state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        # Registered last, this hook sees the state dict as the user's hooks have left it.
        seen: list[dict[str, Any]] = []

        def checked(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            seen.append(self._checked(saved))
            return seen[-1]

        check = self.register_load_state_dict_pre_hook(checked)
        try:
            super().load_state_dict(state_dict)
        finally:
            check.remove()
        restore_dtypes(seen[-1], self.param_groups, self.state)

    def _checked(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The state dict with missing options filled in. Raises ValueError if it is not of this kind of optimizer."""
        rule, telling = self._rule, telling_options(self._own_options)
        kind = Kind(type(self).__name__, telling, rule.required_keys, rule.optional_keys)
        saved = [dict(group) for group in state_dict["param_groups"]]
        for group, mine in zip(saved, self.param_groups, strict=False):
            kind.check_group(group)
            for name, value in mine.items():
                if name not in _NOT_OPTIONS:
                    group.setdefault(name, value)
            self._interpret(group)
        kind.check_state(saved, state_dict["state"], self.param_groups)
        return state_dict | {"param_groups": saved}
