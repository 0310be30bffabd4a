"""What an optimizer should have done: steps taken by a fresh one on the reference backend, which remembers nothing.

A shadow keeps a parameter's value and state as plain data. A step gives them to an optimizer that has never been used, in float64
where the parameter is not of 16 bits, so that no cached table, version counter or older copy can have a part in the result.
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
    """A parameter and what it and its state should hold.

    Attributes:
        p: The parameter.
        value: Its values.
        state: Its state.
        unsure: State that the optimizer may leave for the next step to bring up to date: not compared until then.
        loose: What rounding took off the weights may be lost in the next step.
        frozen: It gets no gradients.
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
        """The weights are the user's by now: older copies of them are worth nothing."""
        self.value = self.p.detach().clone()
        self.doubt()

    def doubt(self, *keys: str) -> None:
        self.unsure |= {"master", "kahan_comp", *keys}
        self.loose = True

    def copied_to(self, p: nn.Parameter) -> Kept:
        return Kept(p, self.value.clone(), copied(self.state), set(self.unsure), self.loose, self.frozen)

    def follow(self, state: dict[str, Any], options: Options) -> None:
        """After a step that was as it should be: what the optimizer holds is where the next one starts."""
        self.value, self.state = self.p.detach().clone(), copied(state)
        self.unsure, self.loose = RIDERS - riders_on(options, self.p.dtype), False


def copied(state: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in state.items() if v is not None}


def half_unit(x: Tensor) -> Tensor:
    """Half of the distance between numbers of this dtype near ``x``."""
    exponent = torch.frexp(x.float()).exponent - 1
    return torch.finfo(x.dtype).eps / 2 * torch.ldexp(torch.ones_like(x, dtype=torch.float32), exponent)


def starting_state(kept: Kept, options: Options, narrow: bool) -> dict[str, Tensor]:
    """The state that a step starts from: copies that the weights have left are not theirs any more."""
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
    """In float64, but for numbers of 16 bits and all state of weights of 16 bits, whose rounding is part of the result."""
    return x.contiguous() if short or x.dtype in SHORT else x.double().contiguous()


@dataclass
class Outcome:
    """What a step should come to: weights and state of each parameter, in order."""

    states: list[dict[str, Tensor]]
    norm: Tensor | None
    skipped: int


def step(
    cls: type[torch.optim.Optimizer],
    groups: Sequence[tuple[Options, list[Kept]]],
    grads: Mapping[Tensor, Tensor],
    narrow: bool = False,
) -> Outcome:
    """The step that the parameters in ``grads`` should take; ``narrow`` in their own dtype, as a yardstick of its rounding."""
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
    """Within a rounding of its own dtype, or of float32's kernels, or within twice the yardstick's error.

    ``computed`` is the dtype of the weights.
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
    """The state that the present options ask for beside the rule's."""
    copies = {"master": "master", "kahan": "kahan_comp"}.get(str(options["precision"])) if dtype in SHORT else None
    return {copies} - {None} | ({"ema"} if options["ema"] is not None else set())


def assert_step(
    kept: Kept,
    state: dict[str, Any],
    options: Options,
    expected: dict[str, Tensor],
    yardstick: Callable[[], dict[str, Tensor]],
) -> None:
    """One parameter after a step: its value, and its state's keys, counts and values."""
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
    """Nothing happened: to the bit, but for what the optimizer may bring up to date in its own time."""
    assert kept.value.dtype == kept.p.dtype
    assert torch.equal(kept.p.detach(), kept.value) or bool(kept.value.isnan().any()), "weights changed"
    ours = copied(state)
    assert ours.keys() - RIDERS == kept.state.keys() - RIDERS, "state's keys changed"
    for key in (ours.keys() & kept.state.keys()) - kept.unsure:
        kept.state[key] = kept.state[key].to(ours[key].dtype)  # loading may give it the weights' dtype, as in torch
        assert torch.equal(ours[key], kept.state[key]), f"{key} changed"
