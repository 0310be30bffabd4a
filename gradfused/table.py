"""From an optimizer's groups to the rows of a step: grouping, checking, creating state, and knowing when to do it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backends import BackendTable, Row, Settings, choose
from .memory import check_disjoint, share_memory

Group = dict[str, Any]
State = dict[Tensor, dict[str, Any]]
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: State of one element; state that any rule may have.
SCALARS = frozenset(("step", "mu_product"))
RIDERS = frozenset(("master", "kahan_comp", "ema"))
SHORT = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """A group's options, interpreted.

    Attributes:
        rule: The update rule's name.
        states: Keys of the state tensors in the rule's order.
        counts: Whether the parameters count their steps.
        centre: ``"off"``, ``"unit"``, ``"conv"`` or ``"tensor"``.
        backend: The backend asked for.
        settings: The numbers.
        initial: What new state tensors are filled with; zeros if empty.
        product: Whether the parameters keep the product of their momenta.
        rounding: How weights of 16 bits are kept.
        state_dtype: Of new state tensors; None: the parameter's.
        ema: Whether an average of the weights is kept.
    """

    rule: str
    states: tuple[str, ...]
    counts: bool
    centre: str
    backend: str
    settings: Settings
    initial: tuple[float, ...] = ()
    product: bool = False
    rounding: str = "nearest"
    state_dtype: torch.dtype | None = None
    ema: bool = False

    @property
    def measures(self) -> bool:
        """Whether its gradients' norms are known after a step."""
        return self.settings.scope != "none" or self.settings.skip_nonfinite

    @property
    def structure(self) -> tuple[object, ...]:
        """What rows are made from: a table is kept while this stays."""
        s = self.settings
        return (
            *(
                self.rule,
                self.states,
                self.counts,
                self.centre,
                self.backend,
                self.product,
                self.rounding,
                self.state_dtype,
                self.ema,
                s.centralize_at,
                s.scope,
                s.agc,
                s.adapt,
                s.skip_nonfinite,
                s.zero_grad,
            ),
            s.noise > 0,
        )


def parameter_name(groups: Sequence[Group], group: int, index: int) -> str:
    """How messages call a parameter: its name if it was given one, else its place."""
    names = groups[group].get("param_names")
    return f"'{names[index]}'" if names else f"{index} of group {group}"


def check_parameter(name: str, p: Tensor) -> None:
    """Raise TypeError unless ``p`` is of a kind that any backend can step."""
    if p.is_complex():
        raise TypeError(
            f"parameter {name} is complex ({p.dtype}), expected a real dtype: optimize torch.view_as_real of it"
        )
    if p.dtype not in FLOATING:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
        raise TypeError(f"parameter {name} has dtype {p.dtype}, expected one of {wanted}")
    if p.layout != torch.strided:
        raise TypeError(f"parameter {name} has layout {p.layout}, expected a dense tensor: call .to_dense()")


def _check_gradient(name: str, p: Tensor, g: Tensor) -> None:
    if g.layout != torch.strided:
        raise TypeError(
            f"gradient of parameter {name} is sparse ({g.layout}), expected a dense one: "
            "use sparse=False or .to_dense()"
        )
    if g.is_complex():
        raise TypeError(f"gradient of parameter {name} is complex ({g.dtype}), expected {p.dtype} or torch.float32")
    if g.device != p.device:
        raise ValueError(f"gradient of parameter {name} is on {g.device}, expected it on the parameter's {p.device}")
    if g.shape != p.shape:
        raise ValueError(
            f"gradient of parameter {name} has shape {tuple(g.shape)}, expected the parameter's {tuple(p.shape)}"
        )
    if g.dtype not in (p.dtype, torch.float32):
        raise TypeError(f"gradient of parameter {name} has dtype {g.dtype}, expected {p.dtype} or torch.float32")
    if p.is_meta:
        raise ValueError(
            f"parameter {name} is on the meta device and has no values: materialise it first (module.to_empty)"
        )
    if p.is_neg() or g.is_neg():
        raise ValueError(f"parameter {name} or its gradient is a lazy negation: assign .resolve_neg() of it")


# ---- rows


def _scalar_dtype() -> torch.dtype:
    """torch counts steps in float32, or in float64 where that is the default."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def state_dtype(key: str, p: Tensor, asked: torch.dtype | None) -> torch.dtype | None:
    """Dtype of a state tensor; None for state of one element, which has its own. ``asked`` is what the user wants."""
    if key in SCALARS:
        return None
    if key in ("master", "ema"):
        return torch.float32 if p.dtype in SHORT else p.dtype
    return p.dtype if key == "kahan_comp" or asked is None else asked


class _States:
    """Reads and creates optimizer state; what it created can be taken back."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._undo: list[tuple[Tensor, str, Any]] = []

    def set(self, p: Tensor, key: str, value: Tensor) -> Tensor:
        self._undo.append((p, key, self._state[p].get(key) if p in self._state else None))
        self._state[p][key] = value
        return value

    def tensor(
        self, name: str, p: Tensor, key: str, initial: float | Tensor = 0.0, asked: torch.dtype | None = None
    ) -> Tensor:
        """State shaped like ``p``; a new one holds ``initial``, a number or a tensor of that shape."""
        dtype = state_dtype(key, p, asked)
        value = self._state[p].get(key) if p in self._state else None
        if value is None:
            made = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
            with torch.no_grad():
                made.copy_(initial) if isinstance(initial, Tensor) else made.fill_(initial)
            return self.set(p, key, made)
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
        return value

    def scalar(self, name: str, p: Tensor, key: str, device: torch.device, initial: float = 0.0) -> Tensor:
        """A one-element state, such as the count of steps."""
        value = self._state[p].get(key) if p in self._state else None
        if isinstance(value, Tensor) and value.numel() == 1 and value.device == device and value.dtype in FLOATING[:2]:
            return value
        if value is not None and not (
            isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
        ):
            raise ValueError(
                f"state '{key}' of parameter {name}: expected a number or a one-element tensor, got {value!r}"
            )
        number = initial if value is None else float(value)
        return self.set(p, key, torch.tensor(number, dtype=_scalar_dtype(), device=device))

    def take_back(self) -> None:
        """Leave the state as it was found."""
        for p, key, value in reversed(self._undo):
            if value is None:
                del self._state[p][key]
                if not self._state[p]:
                    del self._state[p]
            else:
                self._state[p][key] = value
        self.keep()

    def keep(self) -> None:
        """What was created stays."""
        self._undo.clear()


def _unit_shape(p: Tensor, plan: GroupPlan) -> tuple[int, bool, bool]:
    """(unit length, centre, whole) of a row."""
    by_rows = p.numel() // p.shape[0] if p.dim() >= 2 and p.shape[0] else p.numel()
    centre = {"off": False, "unit": p.dim() >= 2, "conv": p.dim() >= 4, "tensor": True}[plan.centre]
    by_unit = plan.settings.scope == "unit"
    unit = by_rows if by_unit or (centre and plan.centre != "tensor") else p.numel()
    return unit, centre, centre and plan.centre == "tensor" and unit != p.numel()


def _row(
    name: str,
    p: Tensor,
    plan: GroupPlan,
    group: int,
    number: int,
    states: _States,
    make: type[BackendTable],
    source: Tensor | None,
) -> Row:
    unit, centre, whole = _unit_shape(p, plan)
    had_state = p in states._state and all(states._state[p].get(k) is not None for k in plan.states)
    rounding = plan.rounding if p.dtype in SHORT else "nearest"
    weights = p if source is None else source
    kept: dict[str, Tensor] = {
        key: states.tensor(name, p, key, initial, plan.state_dtype)
        for key, initial in zip(plan.states, plan.initial or (0.0,) * len(plan.states), strict=True)
    }
    state = dict(kept)
    if rounding == "master":
        source = kept["master"] = states.tensor(name, p, "master", weights)
    if rounding == "kahan":
        kept["kahan_comp"] = states.tensor(name, p, "kahan_comp")
    if plan.ema:
        kept["ema"] = states.tensor(name, p, "ema", weights)
    if plan.counts:
        kept["step"] = states.scalar(name, p, "step", make.step_device(p))
    if plan.product:
        kept["mu_product"] = states.scalar(name, p, "mu_product", make.step_device(p), 1.0)
    assert p.grad is not None
    return Row(
        name=name,
        rule=plan.rule,
        param=p,
        grad=p.grad,
        state=state,
        source=source,
        rest=kept.get("kahan_comp"),
        ema=kept.get("ema"),
        rounding=rounding,
        step=kept.get("step"),
        product=kept.get("mu_product"),
        group=group,
        number=number,
        unit=unit,
        centre=centre,
        whole=whole,
        first=not had_state,
        kept=list(kept),
    )


def _written(row: Row) -> Iterator[tuple[str, Tensor]]:
    """(what, tensor) of each tensor of a row that a step writes."""
    yield f"parameter {row.name}", row.param
    others = {**row.state, "master": row.source if row.rounding == "master" else None, "kahan_comp": row.rest}
    for key, tensor in {**others, "ema": row.ema}.items():
        if tensor is not None:
            yield f"{key} of parameter {row.name}", tensor


def _with_gradient(groups: Sequence[Group]) -> Iterator[tuple[int, int, str, Tensor]]:
    """(group, number in the optimizer, name, parameter) of each parameter to step; a repeated one counts once."""
    seen: set[int] = set()
    number = 0
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            if p.grad is not None and id(p) not in seen:
                seen.add(id(p))
                yield g, number, parameter_name(groups, g, i), p
            number += 1


class StepTable:
    """The tensors of one optimizer's steps, checked, with their state created, on a backend.

    Raises on construction, with nothing changed, whatever a step could be refused for.

    Args:
        groups: The optimizer's parameter groups.
        state: Its state; what is missing is created.
        plans: The groups' options.
        sources: Where the weights of some parameters are to be read in their place.

    Attributes:
        finer: Parameters whose state holds more of their values than they do.
        zero_apart: Gradients that are to be left at zero share memory, which takes a pass of its own.
    """

    def __init__(
        self,
        groups: list[Group],
        state: State,
        plans: Sequence[GroupPlan],
        sources: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        found = list(_with_gradient(groups))
        for _, _, name, p in found:
            check_parameter(name, p)
            _check_gradient(name, p, p.grad)  # type: ignore[arg-type]
        make = _backend(plans, [t for _, _, _, p in found for t in (p, p.grad) if t is not None])
        self._states = _States(state)
        try:
            rows = [
                _row(name, p, plans[g], g, number, self._states, make, (sources or {}).get(p))
                for g, number, name, p in found
            ]
            check_disjoint([tensor for row in rows for tensor in _written(row)])
            zeroed = [r.grad for r in rows if plans[r.group].settings.zero_grad]
            self.zero_apart = bool(zeroed) and share_memory(zeroed)
            self.table = make(rows, self._settings(plans))
        except BaseException:
            self._states.take_back()
            raise
        self.table.watch(rows, groups, state)
        self._plans = list(plans)
        self._sources = sources
        self.params = [row.param for row in rows]
        self.stepped = frozenset(self.params)
        self.finer = [row.param for row in rows if row.rounding in ("master", "kahan")]
        self.may_skip = any(plan.settings.skip_nonfinite for plan in plans)
        self._names = [row.name.strip("'") for row in rows]
        self.measures = self.table.needs_stats
        self._measured = [i for i, row in enumerate(rows) if plans[row.group].measures]
        # On the sums' device already, so that looking at a norm does not wait for it.
        self._measured_at = torch.tensor(self._measured, dtype=torch.int64, device=self.table.sums.device)

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
        if sources is not self._sources:
            return False
        if plans != self._plans:
            if [plan.structure for plan in plans] != [plan.structure for plan in self._plans]:
                return False
            self.table.configure(self._settings(plans))
            self._plans = list(plans)
        return self.table.refresh(groups, state)

    def keep_state(self) -> None:
        """The step was taken: created state stays."""
        self._states.keep()

    def take_back_state(self) -> bool:
        """The step was not taken: created state goes. True if there was any, so that this table is of no more use."""
        created = bool(self._states._undo)
        self._states.take_back()
        return created

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
