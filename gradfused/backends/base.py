"""What every backend is given, Settings and Row, and what it must do, Backend; what the compiled ones share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..step.schema import Settings as Settings

WIDE_SCOPES = ("global", "group", "param")
#: Describes a tensor to native code without Python calls. Older versions of torch have none.
EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)
#: Ask for the size of storages through libtorch's C interface where this torch has it.
SHIM = True


@dataclass(frozen=True, slots=True)
class Row:
    """A parameter with a gradient and its optimizer state, as a step uses them.

    Attributes:
        state: The rule's state tensors in its order, shaped like the parameter.
        source: The tensor that the weights are read from, if not ``param``: SAM's backup.
        master: A copy of 16-bit weights in float32, used where it rounds to them; written with ``precision="master"``.
        kahan_comp: The rounding error, with ``precision="kahan"``; used up to half a unit in the weights' last place.
        ema: Moving average of the weights.
        precision: How weights of 16 bits are kept: ``"none"``, ``"kahan"``, ``"stochastic"`` or ``"master"``.
        step: Steps taken so far: a 0-dim float tensor on the backend's ``step_device``, or None where nothing needs it.
        mu_product: Product of NAdam's momenta so far, kept like ``step``; None for other rules.
        group: Index of the parameter's group in the settings.
        param_number: The parameter's number in the optimizer; part of the noise counter.
        unit_length: Number of elements of a unit; of the whole tensor where it has no units.
        centre: The gradient is centralised.
        whole: It is centralised over the whole tensor although ``unit_length`` is shorter.
        first: The state holds nothing yet.
        kept: Everything of the parameter's state that the step uses, by its key in the optimizer's state.
    """

    name: str
    rule: str
    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    source: Tensor | None
    master: Tensor | None
    kahan_comp: Tensor | None
    ema: Tensor | None
    precision: str
    step: Tensor | None
    mu_product: Tensor | None
    group: int
    param_number: int
    unit_length: int
    centre: bool
    whole: bool
    first: bool
    kept: dict[str, Tensor]

    @property
    def weights(self) -> Tensor:
        """The weights before the step, as the parameter's dtype has them."""
        return self.param if self.source is None else self.source


def _one_number(name: str, value: object) -> Tensor | None:
    """An attribute of the optimizer that GradScaler or a user set, as a tensor; None where it was not set.

    GradScaler sets ``found_inf`` to the plain number 0 where no parameter had a gradient.
    """
    if value is None or (isinstance(value, Tensor) and value.numel() == 1):
        return value
    if isinstance(value, Real):
        return torch.tensor(float(value), dtype=torch.float32, device="cpu")
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise ValueError(f"optimizer.{name}: expected None, a number or a tensor of one element, got {got}")


@dataclass(frozen=True, slots=True)
class Scaling:
    """What GradScaler tells a step, as one-element tensors.

    Attributes:
        grad_scale: The factor that the gradients have to be divided by.
        found_inf: Not zero if the step has to be skipped.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @classmethod
    def of(cls, optimizer: object) -> Scaling:
        """The scaling that GradScaler has set on an optimizer for the time of a step.

        Raises:
            ValueError: One of them is neither a number nor a tensor of one element.
        """
        return cls(*(_one_number(name, getattr(optimizer, name, None)) for name in ("grad_scale", "found_inf")))

    @property
    def unscale(self) -> float:
        """The factor to multiply gradients by. Waits for the device."""
        return 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)

    @property
    def forbids(self) -> bool:
        """Whether the step has to be skipped. Waits for the device."""
        return self.found_inf is not None and bool(self.found_inf.item())

    def on(self, device: torch.device) -> Scaling:
        """The same scaling in float32 on ``device``."""
        moved = (
            None if t is None else t.to(device=device, dtype=torch.float32, non_blocking=True)
            for t in (self.grad_scale, self.found_inf)
        )
        return Scaling(*moved)


@dataclass(frozen=True, slots=True)
class Held:
    """The tensors of one step, kept alive until its kernels have run or, on a device, are enqueued.

    The memory that the kernels use stays valid even if other threads clear or replace gradients meanwhile.

    Attributes:
        params: The parameters that are stepped.
        written: Every tensor that the step writes: parameters, their state, and gradients that are set to zero.
        read: Every tensor that the step only reads: gradients, sources and copies of the weights.
    """

    params: list[Tensor]
    written: list[Tensor]
    read: list[Tensor]

    @classmethod
    def of(cls, rows: Sequence[Row], zeroed: Sequence[bool]) -> Held:
        """The tensors of rows; ``zeroed`` says whether the step sets each row's gradient to zero."""
        written = [t for row in rows for t in (row.param, *row.kept.values())]
        written += [row.grad for row, zero in zip(rows, zeroed, strict=True) if zero]
        read = [t for row in rows for t in (row.grad, row.source, row.master) if t is not None]
        return cls([row.param for row in rows], written, read)


class Backend(ABC):
    """The rows of a step made ready on one backend. A step is ``stats``, if ``needs_stats``, and then ``apply``.

    Between steps it keeps no tensor of the optimizer alive: ``zero_grad`` has to free gradients, and parameters may be
    replaced. During a step the StepTable holds them.
    """

    #: The device itself skips a step that overflowed or is not finite: ``apply`` reads ``found_inf`` there and returns True.
    on_device = False

    def __init__(self, rows: Sequence[Row], settings: Sequence[Settings]) -> None:
        self.settings = list(settings)

    @classmethod
    def step_device(cls, p: Tensor) -> torch.device:
        """The device that the step count of a parameter is on."""
        return torch.device("cpu")

    @property
    @abstractmethod
    def sums(self) -> Tensor:
        """Sum of squares of each row's gradient after centralisation in the last step, (rows,), float64."""

    @property
    def skipped(self) -> Tensor | None:
        """How many steps the device skipped because a gradient was not finite, 0-dim; None where the host decides."""
        return None

    def configure(self, settings: Sequence[Settings]) -> None:
        """Take over new numbers. ``GroupOptions.structure`` has to be what it was."""
        self.settings = list(settings)

    @property
    @abstractmethod
    def taken(self) -> int:
        """How many steps have been written, all of them counted even if the caller of ``apply`` was interrupted."""

    def watch(  # noqa: B027
        self, rows: Sequence[Row], groups: list[dict[str, Any]], state: dict[Any, Any], sources: dict[Tensor, Tensor]
    ) -> None:
        """Remember the optimizer's present tensors for ``refresh``. Optional."""

    def refresh(
        self, groups: list[dict[str, Any]], state: dict[Any, Any], sources: dict[Tensor, Tensor]
    ) -> Held | None:
        """The tensors of the next step if the rows still describe the optimizer; replaced gradients are taken over.

        None asks for new rows, and so does this default before every step.
        """
        return None

    def release(self) -> None:  # noqa: B027
        """The step is over: let go of its tensors."""

    @property
    def needs_stats(self) -> bool:
        """Whether ``stats`` has to run before ``apply``."""
        return any(s.norm_scope in WIDE_SCOPES or s.skip_nonfinite for s in self.settings)

    @abstractmethod
    def stats(self, scaling: Scaling) -> None:
        """Fill ``sums`` from the unscaled gradients, and change nothing else."""

    @abstractmethod
    def apply(self, scaling: Scaling) -> bool:
        """Take the step. Returns False, with nothing changed, if a gradient is not finite and ``skip_nonfinite`` is set."""


class CompiledBackend(Backend):
    """A backend whose rows lie in native tables, and whose native module notices what changed in the optimizer.

    Attributes:
        natives: The native tables, one for each device.
    """

    natives: list[Any]
    _watch: Any = None

    @staticmethod
    @abstractmethod
    def module() -> ModuleType:
        """The compiled module of the native tables."""

    @property
    def taken(self) -> int:
        return sum([native.taken() for native in self.natives])

    @property
    def needs_stats(self) -> bool:
        return any(native.needs_stats() for native in self.natives)

    def watch(
        self, rows: Sequence[Row], groups: list[dict[str, Any]], state: dict[Any, Any], sources: dict[Tensor, Tensor]
    ) -> None:
        zeroed = [self.settings[row.group].zero_grad_in_step for row in rows]
        watched = [(r.param_number, r.param, r.grad, r.kept, zero) for r, zero in zip(rows, zeroed, strict=True)]
        kinds = torch._C.TensorBase, torch.UntypedStorage
        self._watch = self.module().Watch(*kinds, EXCHANGE, SHIM, groups, state, sources, watched)

    def refresh(
        self, groups: list[dict[str, Any]], state: dict[Any, Any], sources: dict[Tensor, Tensor]
    ) -> Held | None:
        found = self._watch.refresh(groups, state, sources, self.natives)
        return None if found is None else Held(*found)


@dataclass(frozen=True)
class Availability:
    """Whether a backend can run here, and why not.

    Attributes:
        mistake: The reason is a wrong setting of the user's, which a fallback would hide.
    """

    name: str
    reason: str | None = None
    mistake: bool = False
    details: dict[str, str] = field(default_factory=dict)

    @property
    def usable(self) -> bool:
        """True if the backend runs on this installation."""
        return self.reason is None
