"""What a step should have done, computed by a fresh optimizer on the reference backend, which remembers nothing.

A parameter's value and state are kept as plain data. For each step they are given to an optimizer that has never been used, in
float64 unless the parameter has 16 bits, so that no cached table, version counter or older copy can affect the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SHORT = (torch.float16, torch.bfloat16)
RIDERS = {"master", "kahan_comp", "ema"}
WEIGHTS = "weights"
Options = dict[str, Any]


@dataclass
class Kept:
    """A parameter with the value and the state that it should have.

    Attributes:
        p: The parameter.
        value: The value that it should have.
        state: The state that it should have.
        unsure: Keys of state that the optimizer may bring up to date in the next step only; not compared until then.
        loose: Whether the next step may lose the part of the weights that rounding cut off.
        frozen: Whether it gets no gradients.
    """

    p: nn.Parameter
    value: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    unsure: set[str] = field(default_factory=set)
    loose: bool = False
    frozen: bool = False

    @classmethod
    def of(cls, p: nn.Parameter, **more: Any) -> Kept:
        return cls(p, p.detach().clone(), **more)

    def wrote(self) -> None:
        """Note that the user has written the weights, so that older copies of them no longer count."""
        self.value = self.p.detach().clone()
        self.doubt()

    def doubt(self, *keys: str) -> None:
        self.unsure |= {"master", "kahan_comp", *keys}
        self.loose = True

    def copied_to(self, p: nn.Parameter) -> Kept:
        return Kept(p, self.value.clone(), copied(self.state), set(self.unsure), self.loose, self.frozen)

    def follow(self, state: dict[str, Any], options: Options) -> None:
        """After a correct step, take over what the optimizer holds as the start of the next step."""
        self.value, self.state = self.p.detach().clone(), copied(state)
        self.unsure, self.loose = RIDERS - riders_on(options, self.p.dtype), False


def copied(state: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in state.items() if v is not None}


def half_unit(x: Tensor) -> Tensor:
    """Half of the distance between numbers of this dtype near ``x``."""
    exponent = torch.frexp(x.float()).exponent - 1
    return torch.finfo(x.dtype).eps / 2 * torch.ldexp(torch.ones_like(x, dtype=torch.float32), exponent)


def starting_state(kept: Kept, options: Options, narrow: bool) -> dict[str, Tensor]:
    """The state that a step starts from, without copies that no longer belong to the weights."""
    state, value, short = copied(kept.state), kept.value, kept.value.dtype in SHORT
    for key, precision in (("master", "master"), ("kahan_comp", "kahan")):
        if not short or options["precision"] != precision:
            state.pop(key, None)
    if options["ema"] is None:
        state.pop("ema", None)
    if "master" in state:
        master = state["master"]
        state["master"] = torch.where(master.to(value.dtype) == value, master, value.to(master.dtype))
    if "kahan_comp" in state:
        rest = state["kahan_comp"]
        state["kahan_comp"] = torch.where(rest.float().abs() <= half_unit(value), rest, torch.zeros_like(rest))
    if "step" in state:
        state["step"] = state["step"].double()
    return {key: exact(tensor, short or narrow) for key, tensor in state.items()}


def exact(x: Tensor, short: bool) -> Tensor:
    """The tensor in float64, unless it or its weights have 16 bits, where rounding is part of the result."""
    return x.contiguous() if short or x.dtype in SHORT else x.double().contiguous()


@dataclass
class Outcome:
    """What a step should result in: the weights and the state of each parameter, in order."""

    states: list[dict[str, Tensor]]
    norm: Tensor | None
    skipped: int


def step(
    cls: type[torch.optim.Optimizer],
    groups: Sequence[tuple[Options, list[Kept]]],
    grads: Mapping[Tensor, Tensor],
    narrow: bool = False,
) -> Outcome:
    """The step that the parameters in ``grads`` should take. If ``narrow``, it is in their dtype, to show how that rounds."""
    made: list[Options] = []
    state: dict[Tensor, dict[str, Tensor]] = {}
    for options, members in groups:
        params = []
        for kept in members:
            short = kept.value.dtype in SHORT or narrow
            p = nn.Parameter(exact(kept.value.clone(), short))
            if kept.p in grads:
                g = exact(grads[kept.p].clone(), short)
                if g.dtype != p.dtype:
                    p.grad_dtype = g.dtype
                p.grad = g
            params.append(p)
            state[p] = starting_state(kept, options, narrow)
        made.append(options | {"params": params, "backend": "reference"})
    optimizer: Any = cls(made)
    for p, values in state.items():
        if values:
            optimizer.state[p] = values
    optimizer.step()
    states = [copied(optimizer.state.get(p, {})) | {WEIGHTS: p.detach()} for p in state]
    return Outcome(states, optimizer.grad_norm, optimizer.skipped_steps)


# ---- comparing


def assert_follows(
    ours: Tensor,
    expected: Tensor,
    what: str,
    atol: float,
    computed: torch.dtype | None = None,
    yardstick: Callable[[], Tensor] | None = None,
) -> None:
    """The tensor is within a rounding of its dtype or of float32, or within twice the error of the narrow step.

    ``computed`` is the dtype of the weights, in which the step computes.
    """
    if ours.dtype in SHORT:
        tolerance = {"rtol": torch.finfo(ours.dtype).eps, "atol": max(atol, 1e-6)}
    elif torch.float32 in (ours.dtype, computed) or computed in SHORT:
        tolerance = {"rtol": 2e-6, "atol": max(atol, 1e-5)}
    else:
        tolerance = {"rtol": 1e-7, "atol": atol}
    ours, expected = ours.detach().double(), expected.double()
    try:
        torch.testing.assert_close(ours, expected, equal_nan=True, msg=lambda m: f"{what}: {m}", **tolerance)
    except AssertionError:
        if yardstick is None or not (ours - expected).abs().max() <= 2 * (yardstick().double() - expected).abs().max():
            raise


def riders_on(options: Options, dtype: torch.dtype) -> set[str]:
    """The keys of state that the present options ask for besides the rule's."""
    copies = {"master": "master", "kahan": "kahan_comp"}.get(str(options["precision"])) if dtype in SHORT else None
    return {copies} - {None} | ({"ema"} if options["ema"] is not None else set())


def assert_step(
    kept: Kept,
    state: dict[str, Any],
    options: Options,
    expected: dict[str, Tensor],
    yardstick: Callable[[], dict[str, Tensor]],
) -> None:
    """A parameter's value after a step is right, and so are its state's keys, counts and values."""
    on = riders_on(options, kept.p.dtype)
    p, ours = kept.p.detach(), copied(state)
    off = RIDERS - on
    assert ours.keys() - off == expected.keys() - off - {WEIGHTS}, "state's keys"
    if "step" in expected:
        assert int(ours["step"]) == int(expected["step"]), "count of steps"
    atol = 2e-5 if options["noise"] else 1e-9
    checked = expected.keys() - off - {"step", "kahan_comp"} - (kept.unsure & {"ema"})
    if "kahan_comp" in on:
        mine, wanted = (t.float() + x["kahan_comp"].float() for t, x in ((p, ours), (expected[WEIGHTS], expected)))
        assert_follows(mine.to(p.dtype) if kept.loose else mine, wanted, "weights with what rounding took", 3e-5)
        checked -= {WEIGHTS}
    if "master" in on:
        assert torch.equal(p, ours["master"].to(p.dtype)), "the weights are not their float32 copy rounded"
        checked -= {WEIGHTS}
    for key in checked:
        mine = p if key == WEIGHTS else ours[key].to(p.dtype) if key == "master" and kept.loose else ours[key]
        assert_follows(mine, expected[key], key, atol, p.dtype, lambda key=key: yardstick()[key])


def assert_kept(kept: Kept, state: dict[str, Any]) -> None:
    """Nothing has changed, to the bit, except state that the optimizer may bring up to date later."""
    assert kept.value.dtype == kept.p.dtype
    assert torch.equal(kept.p.detach(), kept.value) or bool(kept.value.isnan().any()), "weights changed"
    ours = copied(state)
    assert ours.keys() - RIDERS == kept.state.keys() - RIDERS, "state's keys changed"
    for key in (ours.keys() & kept.state.keys()) - kept.unsure:
        kept.state[key] = kept.state[key].to(ours[key].dtype)  # loading may cast it to the weights' dtype, as in torch
        assert torch.equal(ours[key], kept.state[key]), f"{key} changed"
