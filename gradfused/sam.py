"""Sharpness-aware minimization around any gradfused optimizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from .backends import Scaling, Settings
from .optim.base import Optimizer
from .options import INF, finite
from .rows import GroupPlan, named_parameters
from .table import StepTable

_TINY = 1e-12


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Within the block, the model's batch and instance norms leave their running statistics alone; they still use the batch's.

    For SAM's second forward pass, whose weights are not the model's.
    """
    batch_norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
    ]
    # Without tracking these would still write theirs.
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


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimization (Foret et al. 2021): steps along the gradient at the worst weights nearby.

    A step has two halves, each after a backward pass of its own: the ascent moves the weights up the raw gradient by ``rho``,
    the descent takes the optimizer's step, recipe included, from where the weights were. They are read from the backup in place
    of the weights, so going back costs no pass of its own::

        sam = gradfused.SAM(gradfused.AdamW(model.parameters(), lr=1e-3), rho=0.05)
        loss(model).backward()
        sam.first_step()
        sam.zero_grad()
        with gradfused.frozen_statistics(model):
            loss(model).backward()
        sam.second_step()
        sam.zero_grad()

    The parameter groups are the optimizer's: schedulers may be given either. With a GradScaler, ``scaler.step(sam)`` and
    ``scaler.update()`` after each backward pass take the half that is due. An overflow in the ascent leaves the weights
    where they are, and the descent becomes an ordinary step; one in the descent takes the weights back and no step.

    Args:
        optimizer: A gradfused optimizer.
        rho: Length of the ascent; may be assigned to between steps.
        adaptive: ASAM (Kwon et al. 2021): each weight moves in proportion to its square, so that scale does not matter.
        eta: With ``adaptive``, added to each weight's size.

    Raises:
        TypeError: The optimizer is not gradfused's, or an option is not a number.
        ValueError: An option is out of range, or ``eta`` is given without ``adaptive``.
    """

    _step_supports_amp_scaling = True

    def __init__(self, optimizer: Optimizer, rho: float = 0.05, adaptive: bool = False, eta: float = 0.0) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"SAM: expected one of gradfused's optimizers, got {type(optimizer).__name__}: "
                "its step has to read the weights from a backup; use gradfused.AdamW, say"
            )
        self.rho, self.adaptive, self.eta = finite("rho", rho), bool(adaptive), finite("eta", eta)
        if self.eta and not self.adaptive:
            raise ValueError(
                f"eta={eta!r} is added to each weight's size in adaptive SAM: expected adaptive=True with it"
            )
        self.optimizer = optimizer
        self._begin()
        self._complete = False
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._complete = True

    def _begin(self) -> None:
        """What is not part of the saved state."""
        self._state: dict[Tensor, dict[str, Any]] = defaultdict(dict)  # each parameter's backup, kept for the next step
        self._table: StepTable | None = None
        self._backups: dict[Tensor, Tensor] = {}  # of the parameters that went up; empty between steps
        self._ascended = False

    # ---- what is the optimizer's

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """Torch's constructor sets it; the optimizer has its own."""

    @property
    def state(self) -> Any:
        """The optimizer's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        """Torch's constructor sets it; the optimizer has its own."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer."""
        if self._complete:
            self.optimizer.add_param_group(param_group)

    # ---- the halves

    @property
    def ascended(self) -> bool:
        """Whether the ascent was taken and the descent is due."""
        return self._ascended

    def first_step(self) -> None:
        """Take the ascent: weights with a gradient go up by ``rho`` along it, all of them together.

        Raises:
            RuntimeError: The descent is due.
            TypeError, ValueError: A gradient, parameter or option cannot be used; nothing has changed.
        """
        if self._ascended:
            raise RuntimeError(
                "first_step() twice: the weights went up already; take second_step(), or restore() to go back"
            )
        self._ascend()
        self._ascended = True

    def second_step(self) -> None:
        """Take the descent: the optimizer's step on the present gradients, from where the weights were.

        Raises:
            RuntimeError: There was no ascent.
            TypeError, ValueError: A gradient, state or option cannot be used; nothing has changed, and the descent is still due.
        """
        if not self._ascended:
            raise RuntimeError("second_step() without first_step(): there was no ascent; call first_step() before it")
        self._descend()
        self._backups, self._ascended = {}, False

    def restore(self) -> None:
        """Give up a step between its halves: the weights go back to where they were. Without an ascent, nothing happens."""
        self._take_back(self._backups)
        self._backups, self._ascended = {}, False

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a whole step with a closure, or without one the half that is due.

        Args:
            closure: Zeroes the gradients, evaluates the model, calls backward and returns the loss. It is called twice, before
                each half. If it, or the descent, raises, the weights are restored.

        Returns:
            The loss at the weights the step began with, if there was a closure.

        Raises:
            RuntimeError: A closure was given although the descent is due.
        """
        if closure is None:
            self.second_step() if self._ascended else self.first_step()
            return None
        if self._ascended:
            raise RuntimeError("step(closure) between the halves of a step: take second_step() or restore() first")
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        try:
            with torch.enable_grad():
                closure()
            self.second_step()
        except BaseException:
            self.restore()
            raise
        return loss

    @property
    def _skips(self) -> bool:
        """Whether a half whose gradients are not finite is not to be taken."""
        return any(group["nonfinite"] == "skip" for group in self.param_groups)

    def _plans(self) -> list[GroupPlan]:
        """The ascent as a step of the rule ``ascend``, on gradients normalised to ``rho`` over all parameters."""
        settings = Settings(
            scope="global",
            perturb=(0.0, finite("rho", self.rho), _TINY, 0.0, INF),
            decoupled=True,
            by_weight=self.adaptive,
            eta=self.eta,
        )

        def plan(group: dict[str, Any]) -> GroupPlan:
            mine = replace(settings, zero_grad=group["zero_grad_in_step"])
            return GroupPlan("ascend", ("backup",), False, "off", group["backend"], mine)

        return [plan(group) for group in self.param_groups]

    def _masters(self) -> dict[Tensor, Tensor]:
        """Where parameters of 16 bits have their weights in float32."""
        if all(group["precision"] != "master" for group in self.param_groups):
            return {}
        return {p: state["master"] for p, state in self.state.items() if state.get("master") is not None}

    @_disable_dynamo
    @torch.no_grad()
    def _ascend(self) -> None:
        scaling = Scaling.of(self)
        if scaling.forbids:
            self.optimizer._zero_gradients()
            return
        self.optimizer._follow_weights()
        plans, masters = self._plans(), self._masters()
        table = self._table
        if table is None or not table.still_describes(self.param_groups, self._state, plans, masters):
            table = self._table = StepTable(self.param_groups, self._state, plans, masters)
        if not table.params:
            return
        table.table.stats(scaling)
        if self._skips and not bool(torch.isfinite(table.table.sums).all()):
            self.optimizer._zero_gradients()
            return
        table.table.apply(scaling)
        if table.zero_apart:
            self.optimizer._zero_gradients()
        table.keep_state()
        torch.autograd.graph.increment_version(table.params)
        self._backups = {p: self._state[p]["backup"] for p in table.params}

    @_disable_dynamo
    @torch.no_grad()
    def _descend(self) -> None:
        base, scaling = self.optimizer, Scaling.of(self)
        # Whether a step is skipped for its norm is known to the device alone: it must find the weights where they were.
        late = (
            any(p.device.type != "cpu" for p in self._backups) if self._table is None else self._table.table.on_device
        )
        early = scaling.forbids or (self._skips and late)
        if early:
            self._take_back(self._backups)
        base.grad_scale, base.found_inf = scaling.grad_scale, scaling.found_inf  # type: ignore[attr-defined]
        base._sources = {} if early else self._backups
        try:
            base.step()
        finally:
            base._sources = {}
            del base.grad_scale, base.found_inf  # type: ignore[attr-defined]
        if not early:
            self._take_back({p: self._backups[p] for p in self._backups.keys() - base._stepped})

    @torch.no_grad()
    def _take_back(self, backups: dict[Tensor, Tensor]) -> None:
        if backups:
            torch._foreach_copy_(list(backups), list(backups.values()))
            self.optimizer._note_weights()

    # ---- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state dict with SAM's own part, under ``"sam"``; between the halves that holds the backups."""
        numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        backups = {numbers[p]: backup for p, backup in self._backups.items()}
        mine = {"rho": self.rho, "adaptive": self.adaptive, "eta": self.eta}
        return self.optimizer.state_dict() | {"sam": mine | {"ascended": self._ascended, "backups": backups}}

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of SAM's, or one of the optimizer without SAM.

        Saved between the halves, it belongs to a model saved at the same time: the weights up there are the model's.

        Raises:
            ValueError: The state is another optimizer's, or its shapes are not these parameters'; nothing has changed.
        """
        mine = state_dict.get("sam", {})
        names = list(named_parameters(self.param_groups))
        backups = mine.get("backups", {})
        for number, backup in backups.items():
            if number >= len(names) or names[number][1].shape != backup.shape:
                nothing = torch.empty(0, dtype=torch.float32, device="cpu")
                what = names[number] if number < len(names) else (f"{number}, which there is not", nothing)
                raise ValueError(
                    f"backup of parameter {what[0]} has shape {tuple(backup.shape)}, expected {tuple(what[1].shape)}: "
                    "the state dict is of another model"
                )
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "sam"})
        self._begin()
        for name in ("rho", "adaptive", "eta"):
            setattr(self, name, mine.get(name, getattr(self, name)))
        for number, backup in backups.items():
            p = names[number][1]
            self._state[p]["backup"] = torch.empty_like(p, requires_grad=False).copy_(backup)
            self._backups[p] = self._state[p]["backup"]
        self._ascended = bool(mine.get("ascended", False))

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "rho", "adaptive", "eta", "defaults", "_backups", "_ascended")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizer = state["optimizer"]
        self._begin()
        self._complete = True
        super().__setstate__(state)
        for p, backup in self._backups.items():
            self._state[p]["backup"] = backup
