"""Sharpness-aware minimization around any gradfused optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..backends import Scaling
from ..step.amp import LeavesScalingToStep, forget_scale
from ..step.rows import named_parameters
from .base import Optimizer, evaluated
from .halves import AscentOptions, Halves

_ALONE = (
    "SAM.step() without a closure and without first_step(): a step needs two gradients, and there is only one. Call first_step() "
    "after a first backward pass and second_step() or step() after another; or step(closure), whose closure zeroes the "
    'gradients, runs the model and calls backward; or with a GradScaler scaler.step(sam, half="first") and '
    'scaler.step(sam, half="second"). '
    "A trainer that only calls step() once a batch cannot train with SAM"
)
_SCALED = (
    "step(closure) in GradScaler.step(): the scaler looks for an overflow before the closure makes the gradients. Call "
    'scaler.step(sam, half="first") and scaler.step(sam, half="second"), each after a backward pass of its own and before '
    "scaler.update()"
)
_IDLE = (
    "SAM.step(closure): the closure returned None and left the gradients as they were, so both halves would see the same "
    "ones. It has to zero the gradients, run the model and call backward. Where a wrapper makes up such a closure, as "
    "Lightning's manual optimization does, call first_step() and second_step(), or step(half='first') and step(half='second')"
)
_BETWEEN = (
    "SAM.state_dict() between the halves of a step: the model holds the weights of the ascent. Saved with this state dict it "
    "goes on from here; for anything else it is the wrong model. Call second_step(), or restore(), before saving"
)


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """A block in which the model's batch and instance norms do not update their running statistics, but use the batch's.

    It is meant for SAM's second forward pass, whose weights are not those of the trained model.
    """
    batch_norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    # Instance norms write their statistics even where they do not track them, unless their momentum is 0.
    instance_norms = [m for m in model.modules() if isinstance(m, nn.modules.instancenorm._InstanceNorm)]
    momenta = [m.momentum for m in instance_norms]
    for batch_norm in batch_norms:
        batch_norm.track_running_stats = False
    for instance_norm in instance_norms:
        instance_norm.momentum = 0.0
    try:
        yield
    finally:
        for batch_norm in batch_norms:
            batch_norm.track_running_stats = True
        for instance_norm, momentum in zip(instance_norms, momenta, strict=True):
            instance_norm.momentum = momentum


def _option(name: str, what: str) -> property:
    """A property for one of SAM's options, which are checked together whenever one is assigned to."""

    def read(sam: SAM) -> Any:
        return getattr(sam._halves.options, name)

    def assign(sam: SAM, value: Any) -> None:
        sam._halves.options = replace(sam._halves.options, **{name: value})

    return property(read, assign, doc=what)


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021): steps along the gradient at the worst weights nearby.

    A step has two halves, each after a backward pass of its own. The ascent moves the weights up the raw gradient by
    ``rho``. The descent takes the optimizer's step, recipe included, from where the weights were: it reads them from a
    backup, so that going back costs no pass of its own::

        sam = gradfused.SAM(gradfused.AdamW(model.parameters(), lr=1e-3), rho=0.05)
        loss(model).backward()
        sam.first_step()
        sam.zero_grad()
        with gradfused.frozen_statistics(model):
            loss(model).backward()
        sam.second_step()
        sam.zero_grad()

    ``step(closure)`` takes both halves. Code that can only call ``step`` uses ``step(half="first")`` for
    ``first_step()`` and ``step(half="second")`` for ``second_step()``. With a GradScaler, call ``scaler.step(sam,
    half="first")`` and ``scaler.update()`` after the first backward pass, and the same with ``"second"`` after the
    second. An overflow in the ascent leaves the weights where they are, and the descent becomes an ordinary step; an
    overflow in the descent takes the weights back without a step.

    ``step()`` without arguments takes the descent if ``first_step()`` was called, and raises otherwise: a trainer that
    calls it once a batch would take the halves on different batches, and might end on ascended weights. Only where all
    gradients are zero does it take the optimizer's step, because the ascent would not move the weights; this is how
    ``torch.distributed.checkpoint`` creates the optimizer's state.

    The parameter groups and the state are the optimizer's. ``grad_norm``, ``grad_norms()``, ``skipped_steps`` and
    ``swap_ema()`` are the optimizer's as well and concern the descent. Schedulers may be given either optimizer. Hooks
    on the step of ``base_optimizer`` are called around the descent, hooks on SAM's around ``step``.

    Args:
        optimizer: A gradfused optimizer, available as ``base_optimizer``.
        rho: Length of the ascent. ``rho``, ``adaptive`` and ``eta`` may be assigned to between steps.
        adaptive: ASAM (Kwon et al. 2021): each weight moves in proportion to its square, so that scale does not matter.
        eta: Added to each weight's magnitude if ``adaptive``.

    Raises:
        TypeError: The optimizer is not gradfused's, or an option is not a number.
        ValueError: An option is out of range, or ``eta`` is given without ``adaptive``.
    """

    _step_supports_amp_scaling = LeavesScalingToStep()

    def __init__(self, optimizer: Optimizer, rho: float = 0.05, adaptive: bool = False, eta: float = 0.0) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"SAM: expected one of gradfused's optimizers, got {type(optimizer).__name__}: "
                "its step has to read the weights from a backup; use gradfused.AdamW, say"
            )
        self._halves = Halves(optimizer, AscentOptions(rho, adaptive, eta))
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._halves.belongs_to(self)

    # ---- its options

    rho = _option("rho", "Length of the ascent.")
    adaptive = _option("adaptive", "Whether each weight moves in proportion to its square.")
    eta = _option("eta", "Added to each weight's magnitude if adaptive.")

    # ---- the optimizer's own

    @property
    def base_optimizer(self) -> Optimizer:
        """The optimizer whose step is the descent."""
        return self._halves.base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self._halves.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._halves.complete:  # torch's constructor assigns an empty list
            self._halves.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The optimizer's state."""
        return self._halves.base.state

    @state.setter
    def state(self, state: Any) -> None:
        if self._halves.complete:
            self._halves.base.state = state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer."""
        if self._halves.complete:
            self._halves.base.add_param_group(param_group)

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the last descent's gradients: the optimizer's ``grad_norm``."""
        return self._halves.base.grad_norm

    def grad_norms(self) -> dict[str, Tensor]:
        """Norm of each of the last descent's gradients, by parameter: the optimizer's ``grad_norms()``."""
        return self._halves.base.grad_norms()

    @property
    def skipped_steps(self) -> int:
        """Descents that ``nonfinite="skip"`` skipped: the optimizer's ``skipped_steps``. Waits for the device."""
        return self._halves.base.skipped_steps

    def swap_ema(self) -> AbstractContextManager[None]:
        """A block in which the parameters hold their average: the optimizer's ``swap_ema()``. Both halves are refused in it."""
        return self._halves.base.swap_ema()

    # ---- for torch

    @property
    def _opt_called(self) -> bool:
        """Whether a step was taken: learning-rate schedulers read it, and warn if none was."""
        return self._halves.stepped

    @_opt_called.setter
    def _opt_called(self, called: bool) -> None:
        self._halves.stepped = called

    def _itself(self) -> torch.optim.Optimizer | None:
        """This SAM, also where a wrapper inherits the method."""
        return self._halves.owner()

    # ---- the halves

    @property
    def ascended(self) -> bool:
        """Whether the ascent was taken and the descent is due."""
        return self._halves.ascended

    def first_step(self) -> None:
        """Take the ascent: the weights that have a gradient move up by ``rho`` along it, all of them together.

        Raises:
            RuntimeError: The descent is due, or the weights are swapped for their average.
            TypeError, ValueError: A gradient, parameter or option cannot be used; nothing has changed.
        """
        with self._halves.lock:
            if self._halves.ascended:
                raise RuntimeError(
                    "first_step() twice: the weights went up already; take second_step(), or restore() to go back"
                )
            self._halves.ascend(Scaling.of(self))

    def second_step(self) -> None:
        """Take the descent: the optimizer's step on the present gradients, from where the weights were.

        Raises:
            RuntimeError: There was no ascent, or the weights are swapped for their average.
            TypeError, ValueError: A gradient, state or option cannot be used; nothing has changed, and the descent is
                still due.
        """
        with self._halves.lock:
            if not self._halves.ascended:
                raise RuntimeError(
                    "second_step() without first_step(): there was no ascent; call first_step() before it"
                )
            self._halves.descend(Scaling.of(self))

    def restore(self) -> None:
        """Give up a step between its halves: the weights go back to where they were. Does nothing without an ascent.

        Raises:
            RuntimeError: The weights are swapped for their average.
            ValueError: A parameter was replaced since the ascent; nothing has changed.
        """
        with self._halves.lock:
            self._halves.restore()

    @overload
    def step(self, closure: None = None, half: str | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], half: str | None = None) -> float: ...

    def step(self, closure: Callable[[], float] | None = None, half: str | None = None) -> float | None:
        """Take a whole step with a closure, the named half of one, or the descent if it is due.

        Args:
            closure: Zeroes the gradients, evaluates the model, calls backward and returns the loss. It is called twice,
                before each half. If it, or the descent, raises, the weights are restored. With ``half`` it is called
                once, before it.
            half: ``"first"`` for the ascent, ``"second"`` for the descent: as ``first_step()`` and ``second_step()``.

        Returns:
            The loss at the weights the step began with, if there was a closure.

        Raises:
            RuntimeError: There is neither a closure nor a half nor an ascent, and the gradients are not zero; the other
                half is due; or the closure did nothing.
            ValueError: ``half`` is none of the two.
        """
        with self._halves.lock:  # two threads take whole steps one after the other
            try:
                return self._step(closure, half)
            except BaseException:
                forget_scale(self)
                raise

    def _step(self, closure: Callable[[], float] | None, half: str | None) -> float | None:
        scaling = Scaling.of(self)
        if closure is not None and scaling.found_inf is not None:
            raise RuntimeError(_SCALED)
        if half is not None:
            return self._step_half(closure, half)
        if closure is not None:
            return self._step_whole(closure)
        if self._halves.ascended:
            self.second_step()
        elif self._halves.no_way_up():
            self._halves.step_base(scaling, {})
        else:
            raise RuntimeError(_ALONE)
        return None

    def _step_half(self, closure: Callable[[], float] | None, half: str) -> float | None:
        halves = {"first": self.first_step, "second": self.second_step}
        if half not in halves:
            raise ValueError(f"half: expected 'first' or 'second', got {half!r}")
        loss = None if closure is None else evaluated(closure)
        halves[half]()
        return loss

    def _step_whole(self, closure: Callable[[], float]) -> float:
        if self._halves.ascended:
            raise RuntimeError(
                "step(closure) between the halves of a step: take second_step(), step(half='second') or restore() first"
            )
        loss = evaluated(closure)
        changed = self._halves.gradients_seen() if loss is None else None
        try:
            self.first_step()
            evaluated(closure)
            if changed is not None and not changed():
                raise RuntimeError(_IDLE)
            self.second_step()
        except BaseException:
            self.restore()
            raise
        return loss

    # ---- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state dict with SAM's own part, under ``"sam"``.

        Between the halves it holds the backups, and a warning is given once that the model has the weights of the
        ascent.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with self._halves.lock:
            saved = self._halves.base.state_dict() | {"sam": self._own_state()}
        for after in self._optimizer_state_dict_post_hooks.values():
            saved = after(self, saved) or saved
        return saved

    def _own_state(self) -> dict[str, Any]:
        halves = self._halves
        if halves.backups and not halves.warned:
            halves.warned = True
            warnings.warn(_BETWEEN, UserWarning, stacklevel=3)
        numbers = {p: i for i, (_, p) in enumerate(named_parameters(self.param_groups))}
        backups = {numbers[p]: backup for p, backup in halves.backups.items()}
        mine = {"rho": self.rho, "adaptive": self.adaptive, "eta": self.eta}
        return mine | {"ascended": halves.ascended, "backups": backups}

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of SAM's, or one of the optimizer without SAM.

        A state dict saved between the halves belongs to a model saved at the same time, which has the ascended weights.

        Raises:
            TypeError, ValueError: The state is another optimizer's, its shapes are not these parameters', or an option
                of SAM's cannot be used; nothing has changed.
        """
        with self._halves.lock:
            self._load(state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        mine = state_dict.get("sam", {})
        options = AscentOptions(*(mine.get(name, getattr(self, name)) for name in ("rho", "adaptive", "eta")))
        backups = self._checked_backups(mine.get("backups", {}))
        self._halves.base.load_state_dict({key: value for key, value in state_dict.items() if key != "sam"})
        copies = {p: torch.empty_like(p, requires_grad=False).copy_(backup) for p, backup in backups.items()}
        self._halves.options = options
        self._halves.begin(copies, bool(mine.get("ascended", False)))
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _checked_backups(self, saved: dict[int, Tensor]) -> dict[Tensor, Tensor]:
        """The backups in a state dict, by parameter. Raises ValueError if one does not fit its parameter."""
        names = list(named_parameters(self.param_groups))
        for number, backup in saved.items():
            if number >= len(names) or names[number][1].shape != backup.shape:
                nothing = torch.empty(0, dtype=torch.float32, device="cpu")
                what = names[number] if number < len(names) else (f"{number}, which there is not", nothing)
                raise ValueError(
                    f"backup of parameter {what[0]} has shape {tuple(backup.shape)}, expected {tuple(what[1].shape)}: "
                    "the state dict is of another model"
                )
        return {names[number][1]: backup for number, backup in saved.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "_halves": self._halves}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._halves.belongs_to(self)
