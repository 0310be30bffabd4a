"""From an optimizer's groups to the rows of a step: parameters, gradients and memory are checked, state is found or made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..backends import Backend, Row
from .groups import Group, GroupOptions
from .memory import check_disjoint, check_storage, check_writable, same_place, share_memory
from .state import COPIES, FLOATING, SHORT, States


def parameter_name(groups: Sequence[Group], group: int, index: int) -> str:
    """A parameter's name in messages: the one it was given, else its place in the groups."""
    names = groups[group].get("param_names")
    return f"'{names[index]}'" if names else f"{index} of group {group}"


def named_parameters(groups: Sequence[Group]) -> Iterator[tuple[str, Tensor]]:
    """(name in messages, parameter) of every parameter, in the optimizer's order."""
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            yield parameter_name(groups, g, i), p


def may_train(p: Tensor) -> bool:
    """Whether a parameter can get gradients as things stand. Frozen and lazy parameters may be of any kind."""
    return p.requires_grad and not is_lazy(p)


def check_parameter(name: str, p: Tensor) -> None:
    """Raise TypeError if ``p`` is of a kind that no backend can step."""
    if p.is_complex():
        raise TypeError(
            f"parameter {name} is complex ({p.dtype}), expected a real dtype: optimize torch.view_as_real of it"
        )
    if p.dtype not in FLOATING:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in FLOATING)
        raise TypeError(f"parameter {name} has dtype {p.dtype}, expected one of {wanted}")
    if p.layout != torch.strided:
        raise TypeError(f"parameter {name} has layout {p.layout}, expected a dense tensor: call .to_dense()")


def check_gradient(name: str, p: Tensor, g: Tensor) -> None:
    """Raise TypeError or ValueError if ``g`` is a gradient with which no backend can step ``p``."""
    wanted = " or ".join(dict.fromkeys((str(p.dtype), "torch.float32")))
    if g.layout != torch.strided:
        raise TypeError(
            f"gradient of parameter {name} is sparse ({g.layout}), expected a dense one: "
            "use sparse=False or .to_dense()"
        )
    if g.is_complex():
        raise TypeError(f"gradient of parameter {name} is complex ({g.dtype}), expected {wanted}")
    if g.device != p.device:
        raise ValueError(f"gradient of parameter {name} is on {g.device}, expected it on the parameter's {p.device}")
    if g.shape != p.shape:
        raise ValueError(
            f"gradient of parameter {name} has shape {tuple(g.shape)}, expected the parameter's {tuple(p.shape)}"
        )
    if g.dtype not in (p.dtype, torch.float32):
        raise TypeError(f"gradient of parameter {name} has dtype {g.dtype}, expected {wanted}")
    if p.is_meta:
        raise ValueError(
            f"parameter {name} is on the meta device and has no values: materialise it first (module.to_empty)"
        )
    if p.is_neg() or g.is_neg():
        raise ValueError(f"parameter {name} or its gradient is a lazy negation: assign .resolve_neg() of it")


def check_source(name: str, p: Tensor, source: Tensor) -> None:
    """Raise ValueError unless the weights of ``p`` can be read from ``source``: SAM's backup or a copy in float32."""
    if source.shape != p.shape or source.device != p.device or source.dtype not in (p.dtype, torch.float32):
        raise ValueError(
            f"weights of parameter {name} are kept in a tensor of {source.dtype} and shape {tuple(source.shape)} on "
            f"{source.device}, expected {p.dtype} and {tuple(p.shape)} on {p.device}: the parameter was replaced since. "
            "If that was between SAM's halves, replace it after second_step() or restore()"
        )
    check_storage(f"kept weights of parameter {name}", source, like=p)


def with_gradient(groups: Sequence[Group]) -> Iterator[tuple[int, int, str, Tensor, Tensor]]:
    """(group, number in the optimizer, name, parameter, gradient) of each parameter with a gradient, repeated ones once.

    Each gradient is read once, because another thread may replace or clear it at any time.
    """
    seen: set[int] = set()
    number = 0
    for g, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            grad = p.grad
            if grad is not None and id(p) not in seen:
                seen.add(id(p))
                yield g, number, parameter_name(groups, g, i), p, grad
            number += 1


def _unit_shape(p: Tensor, options: GroupOptions) -> tuple[int, bool, bool]:
    """The ``unit_length``, ``centre`` and ``whole`` of a row."""
    by_rows = p.numel() // p.shape[0] if p.dim() >= 2 and p.shape[0] else p.numel()
    centre = {"off": False, "unit": p.dim() >= 2, "conv": p.dim() >= 4, "tensor": True}[options.centre]
    by_unit = options.settings.norm_scope == "unit"
    unit = by_rows if by_unit or (centre and options.centre != "tensor") else p.numel()
    return unit, centre, centre and options.centre == "tensor" and unit != p.numel()


def make_row(
    name: str,
    p: Tensor,
    grad: Tensor,
    options: GroupOptions,
    group: int,
    number: int,
    states: States,
    backend: type[Backend],
    source: Tensor | None,
) -> Row:
    """The row of a parameter with a gradient; its state is created where it is missing.

    ``number`` is its number in the optimizer. ``source`` is the tensor that its weights are read from, or with
    ``options.copied`` a copy of them in float32.
    """
    unit, centre, whole = _unit_shape(p, options)
    first = not states.has(p, options.states)
    precision = options.precision if p.dtype in SHORT else "none"
    if source is not None:
        check_source(name, p, source)
    source, master = (None, source) if options.copied else (source, None)
    weights = p if source is None else source
    # Where the weights are copied in float32, new state is in float32 too: squares of small gradients are 0 in float16.
    asked = options.state_dtype or (torch.float32 if precision == "master" else None)
    kept: dict[str, Tensor] = {
        key: states.tensor(name, p, key, initial, asked)
        for key, initial in zip(options.states, options.initial or (0.0,) * len(options.states), strict=True)
    }
    state = dict(kept)
    if precision == "master":
        master = kept["master"] = states.tensor(name, p, "master", weights)
    if precision == "kahan":
        kept["kahan_comp"] = states.tensor(name, p, "kahan_comp")
    if options.ema:
        kept["ema"] = states.tensor(name, p, "ema", weights)
    if options.counts:
        kept["step"] = states.scalar(name, p, "step", backend.step_device(p))
    if options.mu_product:
        kept["mu_product"] = states.scalar(name, p, "mu_product", backend.step_device(p), 1.0)
    states.drop(p, COPIES.difference(kept))
    return Row(
        name=name,
        rule=options.rule,
        param=p,
        grad=grad,
        state=state,
        source=source,
        master=master,
        kahan_comp=kept.get("kahan_comp"),
        ema=kept.get("ema"),
        precision=precision,
        step=kept.get("step"),
        mu_product=kept.get("mu_product"),
        group=group,
        param_number=number,
        unit_length=unit,
        centre=centre,
        whole=whole,
        first=first,
        kept=kept,
    )


def _written(row: Row) -> Iterator[tuple[str, Tensor]]:
    """(name in messages, tensor) of each tensor of a row that a step writes, and of its source."""
    yield f"parameter {row.name}", row.param
    for key, tensor in row.kept.items():
        yield f"{key} of parameter {row.name}", tensor
    if row.source is not None and row.source is not row.master:
        yield f"kept weights of parameter {row.name}", row.source


def check_memory(rows: Sequence[Row], zeroed: Sequence[bool]) -> bool:
    """Raise ValueError if a tensor that a step writes cannot be written, or shares memory with another that it uses.

    A gradient may be the very memory of its parameter, because each element is read before it is written; but not if
    the step sets it to zero, as ``zeroed`` says for each row. Returns whether such a gradient shares memory with another.
    """
    written = [tensor for row in rows for tensor in _written(row)]
    grads = [(f"gradient of parameter {row.name}", row.grad) for row in rows]
    cleared = [grad for grad, zero in zip(grads, zeroed, strict=True) if zero]
    own = [not zero and same_place(row.param, row.grad) for row, zero in zip(rows, zeroed, strict=True)]
    check_disjoint(written, [grad for grad, is_own in zip(grads, own, strict=True) if not is_own])
    check_writable(written + cleared)
    others = [row.grad for row, zero in zip(rows, zeroed, strict=True) if not zero]
    return bool(cleared) and share_memory([t for _, t in cleared], others)
