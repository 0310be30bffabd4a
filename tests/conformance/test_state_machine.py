"""Random lives of an optimizer: whatever is done to it, and in whatever order, each step equals that of a fresh oracle.

By default a few fixed lives are tried. ``GRADFUSED_STATE_MACHINE`` asks for a number of new random ones on each backend:
``GRADFUSED_STATE_MACHINE="cpu=20000 cuda=500" pytest tests/conformance/test_state_machine.py``.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import hypothesis.strategies as st
import pytest
import shadow
import torch
from cases import CASES, EMULATED_CUDA, can_mix_dtypes
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from shadow import Kept, assert_follows, assert_kept, assert_step, copied
from torch import Tensor, nn
from twins import unchanged

import gradfused
from gradfused.backends import availability

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not availability()["cpu"].usable, reason=str(availability()["cpu"].reason)),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((3, 4), (5,), (), (2, 3, 2, 2), (0, 2), (7, 1), (2, 70))
#: Changes of options that contradict no others.
CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.003},
    "lr tensor": {"lr": torch.tensor(0.02)},
    "lr zero": {"lr": 0.0},
    "weight decay": {"weight_decay": 0.2},
    "no weight decay": {"weight_decay": 0.0},
    "no norm": {"clip_norm": None, "perturb": None, "norm_scope": "global"},
    "clip": {"clip_norm": 0.5, "perturb": None, "norm_scope": "global"},
    "normalize": {"clip_norm": None, "perturb": "normalize", "radius": 0.7, "norm_scope": "group"},
    "dampen": {"clip_norm": None, "perturb": "dampen", "radius": 0.3, "norm_scope": "param"},
    "agc": {"clip_norm": None, "perturb": "agc", "radius": 0.05, "norm_scope": "unit"},
    "clip value": {"clip_value": 0.4},
    "no clip value": {"clip_value": None},
    "noise": {"noise": 0.2, "seed": 11},
    "no noise": {"noise": 0.0},
    "kahan": {"precision": "kahan"},
    "master": {"precision": "master"},
    "stochastic": {"precision": "stochastic", "seed": 5},
    "no precision": {"precision": None},
    "average": {"ema": 0.75},
    "no average": {"ema": None},
    "centralize": {"centralize": True, "centralize_at": "gradient"},
    "centralize late": {"centralize": "tensor", "centralize_at": "decayed"},
    "no centralize": {"centralize": False},
    "reverse": {"reverse": 0.6},
    "no reverse": {"reverse": None},
    "skip": {"nonfinite": "skip"},
    "propagate": {"nonfinite": "propagate"},
    "zero gradients": {"zero_grad_in_step": True},
    "keep gradients": {"zero_grad_in_step": False},
    "short state": {"state_dtype": "bfloat16"},
    "float state": {"state_dtype": "float32"},
    "state as weights": {"state_dtype": None},
}
BAD: dict[str, Any] = {"lr": -1.0, "centralize": "units", "perturb": "clamp", "noise": -0.5, "precision": "double"}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda g: g.contiguous(),
    "strided": lambda g: torch.stack([g, g + 1.0], dim=-1)[..., 0],
    "transposed": lambda g: g.t().contiguous().t() if g.dim() == 2 else g,
}
seeds = st.integers(0, 2**16)
places = st.integers(0, 2**8)


@dataclass
class Save:
    """A checkpoint: what was saved, and what loading it should bring back."""

    state_dict: dict[str, Any]
    kept: list[Kept]
    options: list[dict[str, Any]]
    form: list[Any]


class Life(RuleBasedStateMachine):
    """An optimizer, together with what each of its parameters should hold."""

    backend = "cpu"

    # ---- the beginning

    @initialize(
        case=st.sampled_from(sorted(CASES)),
        dtype=st.sampled_from(DTYPES),
        shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3),
        changes=st.lists(st.sampled_from(sorted(CHANGES)), max_size=3),
        seed=seeds,
    )
    def begin(
        self, case: str, dtype: torch.dtype, shapes: list[tuple[int, ...]], changes: list[str], seed: int
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.case, self.dtype = CASES[case], dtype
        self.skipped = 0
        self.saves: list[Save] = []
        self.gone: list[weakref.ref[Tensor]] = []
        # With a small eps a rule turns a rounding error into a whole step where the gradient is nearly 0.
        eps = {"RMSprop": 0.05, "LARS": None, "Lion": None, "SGD": None}.get(self.case.optimizer, 1e-3)
        options = dict(self.case.options) | ({} if eps is None else {"eps": eps})
        params = [self.parameter(shape) for shape in shapes]
        self.cls = getattr(gradfused, self.case.optimizer)
        self.optimizer: Any = self.cls(params, **options, backend=self.backend)
        self.kept = {p: Kept.of(p) for p in params}
        for name in changes:
            self.change_option(name, 0)

    def values(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.random) * 0.7 + 0.1

    def parameter(self, shape: tuple[int, ...]) -> nn.Parameter:
        return nn.Parameter(self.values(shape).to(self.dtype))

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def members(self) -> list[Kept]:
        """The parameters in the optimizer's order."""
        return [self.kept[p] for group in self.groups for p in group["params"]]

    def options_of(self, group: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in group.items() if k != "params"}

    def check(self) -> None:
        """Nothing has changed that the shadow does not know of."""
        for kept in self.members:
            assert_kept(kept, self.optimizer.state.get(kept.p, {}))
        assert self.optimizer.skipped_steps == self.skipped

    # ---- steps

    def fill(self, absent: int, layout: str, wide: bool, scale: float = 1.0) -> None:
        """Give gradients to all parameters except those whose bit in ``absent`` is set."""
        for i, kept in enumerate(self.members):
            p, g = kept.p, None
            if not kept.frozen and not absent >> i & 1:
                g = LAYOUTS[layout]((self.values(tuple(p.shape)) * scale).to(p.dtype))
                if wide and can_mix_dtypes():
                    g = g.float() if p.dtype in shadow.SHORT else g
            p.grad = None
            if hasattr(p, "grad_dtype"):
                p.grad_dtype = None if g is None else g.dtype
            p.grad = g

    def expected(self, grads: dict[Tensor, Tensor], narrow: bool = False) -> shadow.Outcome:
        """The step that these gradients should lead to."""
        groups = [(self.options_of(g), [self.kept[p] for p in g["params"]]) for g in self.groups]
        return shadow.step(self.cls, groups, grads, narrow)

    def assert_stepped(self, grads: dict[Tensor, Tensor]) -> None:
        """Parameters with a gradient have taken the oracle's step, and the others are unchanged."""
        outcome, yardstick = self.expected(grads), cache(lambda: self.expected(grads, narrow=True))
        options = {p: self.options_of(g) for g in self.groups for p in g["params"]}
        for i, kept in enumerate(self.members):
            held = self.optimizer.state.get(kept.p, {})
            if kept.p in grads:
                assert_step(kept, held, options[kept.p], outcome.states[i], lambda i=i: yardstick().states[i])
            else:
                assert_kept(kept, held)
        for kept in self.members:
            if kept.p in grads:
                kept.follow(self.optimizer.state.get(kept.p, {}), options[kept.p])
        assert self.optimizer.skipped_steps == self.skipped
        if outcome.norm is not None and grads:
            assert_follows(self.optimizer.grad_norm, outcome.norm, "norm", 1e-5, self.dtype)

    def assert_gradients(self, grads: dict[Tensor, Tensor]) -> None:
        """Gradients are unchanged, or zero where that is asked for."""
        for group in self.groups:
            for p in group["params"]:
                if p in grads:
                    zeroed = torch.zeros_like(grads[p]) if group["zero_grad_in_step"] else grads[p]
                    assert torch.equal(p.grad, zeroed) or not grads[p].isfinite().all(), "gradients"

    def grads(self) -> dict[Tensor, Tensor]:
        return {kept.p: kept.p.grad.clone() for kept in self.members if kept.p.grad is not None}

    @rule(absent=places, layout=st.sampled_from(sorted(LAYOUTS)), wide=st.booleans())
    def take_step(self, absent: int, layout: str, wide: bool) -> None:
        self.fill(absent, layout, wide)
        grads = self.grads()
        self.optimizer.step()
        self.assert_stepped(grads)
        self.assert_gradients(grads)

    @rule(count=st.integers(1, 3))
    def take_steps(self, count: int) -> None:
        """Take steps in which every parameter has a gradient, so that a table is used again."""
        for _ in range(count):
            self.take_step(0, "contiguous", False)

    @rule()
    def step_without_gradients(self) -> None:
        self.take_step(2**9 - 1, "contiguous", False)

    @rule(overflow=st.booleans(), absent=places)
    def step_of_a_scaler(self, overflow: bool, absent: int) -> None:
        """Take a step as GradScaler does: with scaled gradients, and knowing whether any was not finite."""
        self.fill(absent, "contiguous", False)
        grads = self.grads()
        for kept in self.members:
            if kept.p.grad is not None:
                kept.p.grad.mul_(4.0)
        scaled = self.grads()
        self.optimizer.grad_scale, self.optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(overflow))
        self.optimizer.step()
        del self.optimizer.grad_scale, self.optimizer.found_inf
        self.assert_gradients(scaled)
        if overflow:
            self.check()
        else:
            self.assert_stepped(grads)

    @precondition(lambda self: any(g["nonfinite"] == "skip" for g in self.groups))
    @rule(absent=places, bad=st.sampled_from([float("inf"), float("-inf"), float("nan")]), place=places)
    def step_on_bad_gradients(self, absent: int, bad: float, place: int) -> None:
        self.fill(absent, "contiguous", False)
        guarded = [p for g in self.groups if g["nonfinite"] == "skip" for p in g["params"]]
        found = [p for p in guarded if p.grad is not None and p.numel()]
        if not found:
            return
        chosen = found[place % len(found)].grad
        chosen.view(-1)[place % chosen.numel()] = bad
        grads = self.grads()
        self.optimizer.step()
        self.skipped += 1
        self.assert_gradients(grads)
        self.check()

    @rule(rho=st.sampled_from([0.0, 0.05, 1.0]), first=places, second=places)
    def step_of_sam(self, rho: float, first: int, second: int) -> None:
        """Take a step of SAM, whose descent is the optimizer's step from the weights before the ascent."""
        sam = gradfused.SAM(self.optimizer, rho)
        self.fill(first, "contiguous", False)
        sam.first_step()
        self.fill(second, "contiguous", False)
        grads = self.grads()
        sam.second_step()
        self.assert_stepped(grads)
        self.assert_gradients(grads)

    # ---- options

    @rule(name=st.sampled_from(sorted(CHANGES)), place=places)
    def change_option(self, name: str, place: int) -> None:
        change = copy.deepcopy(CHANGES[name])
        group = self.groups[place % len(self.groups)]
        for p in group["params"]:
            if change.get("precision", group["precision"]) != group["precision"]:
                self.kept[p].doubt()
            if change.get("ema", group["ema"]) != group["ema"]:
                self.kept[p].doubt("ema")
        group.update(change)
        self.check()

    @rule(name=st.sampled_from(sorted(BAD)), place=places)
    def step_with_a_bad_option(self, name: str, place: int) -> None:
        self.fill(0, "contiguous", False)
        group = self.groups[place % len(self.groups)]
        good, group[name] = group[name], BAD[name]
        with unchanged(self.optimizer), pytest.raises((ValueError, TypeError)):
            self.optimizer.step()
        group[name] = good
        self.check()

    # ---- calls that are refused

    @rule(place=places)
    def step_on_a_sparse_gradient(self, place: int) -> None:
        self.fill(0, "contiguous", False)
        found = [kept.p for kept in self.members if kept.p.grad is not None and kept.p.dim() and kept.p.numel()]
        if not found:
            return
        p = found[place % len(found)]
        p.grad = p.grad.to_sparse()
        with pytest.raises(TypeError, match="sparse"):
            self.optimizer.step()
        self.check()

    @rule(place=places)
    def add_a_parameter_twice(self, place: int) -> None:
        p = self.members[place % len(self.members)].p
        with unchanged(self.optimizer), pytest.raises(ValueError, match="more than one"):
            self.optimizer.add_param_group({"params": [p]})
        self.check()

    @rule()
    def load_the_state_of_another_model(self) -> None:
        saved = copy.deepcopy(self.optimizer.state_dict())
        saved["param_groups"][-1]["params"].append(99)
        with unchanged(self.optimizer), pytest.raises(ValueError, match="parameter group"):
            self.optimizer.load_state_dict(saved)
        self.check()

    # ---- weights and parameters

    @rule(how=st.sampled_from(["copy_", "data.copy_", "data"]), size=st.sampled_from([1.0, 0.004]), place=places)
    def write_weights(self, how: str, size: float, place: int) -> None:
        kept = self.members[place % len(self.members)]
        new = (self.values(tuple(kept.p.shape)) * size).to(kept.p.dtype)
        if how == "copy_":
            with torch.no_grad():
                kept.p.copy_(new)
        elif how == "data.copy_":
            kept.p.data.copy_(new)
        else:
            kept.p.data = new
        kept.wrote()
        self.check()

    @rule(dtype=st.sampled_from(DTYPES))
    def change_dtype(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        for kept in self.members:
            kept.p.grad = None
            if hasattr(kept.p, "grad_dtype"):
                kept.p.grad_dtype = None
            kept.p.data = kept.p.data.to(dtype)
            kept.wrote()
        self.check()

    @rule(place=places)
    def freeze_or_thaw(self, place: int) -> None:
        kept = self.members[place % len(self.members)]
        kept.frozen = not kept.frozen
        kept.p.requires_grad_(not kept.frozen)
        kept.p.grad = None
        self.check()

    def replace(self, old: nn.Parameter, new: Kept) -> None:
        for group in self.groups:
            group["params"] = [new.p if p is old else p for p in group["params"]]
        self.optimizer.state.pop(old, None)
        del self.kept[old]
        self.kept[new.p] = new
        self.gone.append(weakref.ref(old))

    @rule(place=places, shape=st.sampled_from(SHAPES))
    def replace_parameter(self, place: int, shape: tuple[int, ...]) -> None:
        self.replace(self.members[place % len(self.members)].p, Kept.of(self.parameter(shape)))
        self.check()

    @rule(place=places)
    def prune_parameter(self, place: int) -> None:
        """Remove every second row of a parameter and of its state, as in Gaussian splatting."""
        old = self.members[place % len(self.members)]
        if not old.p.dim():
            return
        state = self.optimizer.state.get(old.p, {})
        rows = {k: v[::2].clone() if v.shape == old.p.shape else v for k, v in copied(state).items()}
        new = Kept.of(nn.Parameter(old.p.detach()[::2].clone()), unsure=set(old.unsure), loose=old.loose)
        new.state = copied(rows)
        self.replace(old.p, new)
        if rows:
            self.optimizer.state[new.p] = rows
        self.check()

    @precondition(lambda self: len(self.groups) < 3)
    @rule(shape=st.sampled_from(SHAPES), inherit=st.booleans())
    def add_group(self, shape: tuple[int, ...], inherit: bool) -> None:
        p = self.parameter(shape)
        options = self.options_of(self.groups[-1]) if inherit else {"lr": 0.01}
        self.optimizer.add_param_group({"params": [p]} | copy.deepcopy(options))
        self.kept[p] = Kept.of(p)
        self.check()

    @precondition(lambda self: len(self.groups) > 1)
    @rule(place=places, thorough=st.booleans())
    def remove_group(self, place: int, thorough: bool) -> None:
        group = self.groups.pop(place % len(self.groups))
        for p in group["params"]:
            self.optimizer.state.pop(p, None)
            del self.kept[p]
            self.gone.append(weakref.ref(p))
        self.check()

    # ---- checkpoints and copies

    def form(self) -> list[Any]:
        """The properties that a checkpoint must share with the optimizer that loads it."""
        return [[(p.shape, p.dtype) for p in group["params"]] for group in self.groups]

    @rule(through_file=st.booleans())
    def save(self, through_file: bool) -> None:
        saved = self.optimizer.state_dict()
        if through_file:
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        else:
            saved = copy.deepcopy(saved)
        options = [copy.deepcopy(self.options_of(group)) for group in self.groups]
        self.saves = [*self.saves[-2:], Save(saved, [k.copied_to(k.p) for k in self.members], options, self.form())]
        self.check()

    @precondition(lambda self: any(save.form == self.form() for save in self.saves))
    @rule(place=places, what=st.sampled_from(["optimizer", "model", "optimizer and model", "model and optimizer"]))
    def load(self, place: int, what: str) -> None:
        fitting = [save for save in self.saves if save.form == self.form()]
        save = fitting[place % len(fitting)]
        for part in what.split(" and "):
            if part == "model":
                self._load_weights(save)
            else:
                self._load_state(save)
        if " and " in what:  # as if nothing had happened in between
            for kept, saved in zip(self.members, save.kept, strict=True):
                kept.unsure, kept.loose = saved.unsure | {"master", "kahan_comp"}, saved.loose
        self.check()

    def _load_weights(self, save: Save) -> None:
        for kept, saved in zip(self.members, save.kept, strict=True):
            with torch.no_grad():
                kept.p.copy_(saved.value)
            kept.wrote()

    def _load_state(self, save: Save) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(save.state_dict))
        for kept, saved in zip(self.members, save.kept, strict=True):
            kept.state = {k: v.clone() for k, v in saved.state.items()}
            kept.doubt(*saved.unsure)
        for group, options in zip(self.groups, save.options, strict=True):
            assert {k: group[k] for k in options} == options, "options were not loaded"

    @rule(pickled=st.booleans())
    def go_on_with_a_copy(self, pickled: bool) -> None:
        """Replace the optimizer by a copy, and drop everything that belonged to the original."""
        old = self.members
        made: Any = pickle.loads(pickle.dumps(self.optimizer)) if pickled else copy.deepcopy(self.optimizer)
        new = [p for group in made.param_groups for p in group["params"]]
        self.optimizer = made
        self.kept = {p: kept.copied_to(p) for p, kept in zip(new, old, strict=True)}
        self.gone += [weakref.ref(kept.p) for kept in old]
        for save in self.saves:
            save.kept = [kept.copied_to(new[0]) for kept in save.kept]
        self.check()

    @rule(place=places)
    def count_beyond_float32(self, place: int) -> None:
        """Two steps later float32 cannot represent the count."""
        saved = copy.deepcopy(self.optimizer.state_dict())
        for index, kept in enumerate(self.members):
            if "step" in kept.state:
                saved["state"][index]["step"] = torch.tensor(2.0**24 - 2)
                kept.state["step"] = torch.tensor(2.0**24 - 2)
            kept.doubt()
        self.optimizer.load_state_dict(saved)
        self.check()

    # ---- the average

    @precondition(lambda self: any(g["ema"] is not None for g in self.groups))
    @rule()
    def read_the_average(self) -> None:
        with self.optimizer.swap_ema():
            for kept in self.members:
                if "ema" in kept.state and "ema" not in kept.unsure:
                    assert torch.equal(kept.p.detach(), kept.state["ema"].to(kept.p.dtype)), "average"
            with pytest.raises(RuntimeError, match="swap_ema"):
                self.optimizer.state_dict()
            with pytest.raises(RuntimeError, match="swap_ema"):
                self.optimizer.step()
        self.check()

    # ---- the end

    def teardown(self) -> None:
        """After one more step nothing keeps alive what was removed."""
        if not hasattr(self, "gone") or not self.gone:
            return
        self.saves.clear()
        self.take_steps(1)
        if any(p() is not None for p in self.gone):
            gc.collect()
        assert all(p() is None for p in self.gone), "a parameter that was taken away is still alive"


#: How many lives are tried on each backend. The sanitizers' run takes a third of them, on the compiled backends only.
LIVES = {"cpu": 150, "reference": 15, "cuda": 15}
SANITIZED = bool(os.environ.get("GRADFUSED_SANITIZE_INSIDE"))


def asked(backend: str) -> int | None:
    """The number of lives that the environment asks for, or None."""
    found = dict(word.split("=") for word in os.environ.get("GRADFUSED_STATE_MACHINE", "").split())
    return int(found[backend]) if backend in found else None


@pytest.mark.parametrize("backend", ["cpu", "reference", EMULATED_CUDA])
@pytest.mark.sanitized_cuda
def test_every_life_follows_the_oracle(backend: str) -> None:
    if SANITIZED and backend == "reference":
        pytest.skip("there is nothing compiled in it")
    wanted = asked(backend)
    run_state_machine_as_test(
        type("Life", (Life,), {"backend": backend}),
        settings=settings(
            max_examples=wanted or LIVES[backend] // (3 if SANITIZED else 1),
            stateful_step_count=16,
            derandomize=wanted is None,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
