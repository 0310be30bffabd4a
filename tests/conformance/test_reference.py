"""Checks the oracle: against torch.optim, torch.nn.utils, published vectors and formulas written out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from cases import CASES, Case, Options, Run, Shape, values
from torch import Tensor

import gradfused
from gradfused.backends import reference

LR, DECAY = 0.1, 0.2
STEPS = 3
# The other rules are in test_papers.py.
TORCHS = [name for name, case in CASES.items() if hasattr(torch.optim, case.optimizer)]
SHAPES: tuple[Shape, ...] = ((6, 5), (7,), (4, 3, 2, 2), (0, 3), ())


# ---- what torch can express: its optimizer, with the recipe applied by hand before the step


def centred(g: Tensor, kind: object) -> Tensor:
    """Gradient centralization as its authors write it, and the variants ``g -= g.mean()`` and ``gc_conv_only``."""
    if kind == "tensor":
        return g - g.mean() if g.numel() else g
    if g.dim() > {False: math.inf, True: 1, "unit": 1, "conv": 3}[kind]:
        return g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True) if g.numel() else g
    return g


def clip(params: list[list[Tensor]], radius: float, scope: str) -> None:
    """torch's clip_grad_norm_ over all gradients that share a norm."""
    everything = [p for group in params for p in group]
    sets: Iterable[list[Tensor]] = {
        "global": [everything],
        "group": params,
        "param": [[p] for p in everything],
        "unit": [],
    }[scope]
    for shared in sets:
        torch.nn.utils.clip_grad_norm_(shared, radius)
    if scope == "unit":
        for p in everything:
            clip_units(p, radius)


def clip_units(p: Tensor, radius: float) -> None:
    for row in p.grad if p.dim() >= 2 else p.grad[None]:
        stand_in = torch.zeros_like(row)
        stand_in.grad = row
        torch.nn.utils.clip_grad_norm_([stand_in], radius)


class ByHand:
    """A torch optimizer in float64, with the recipe written as a user would write it.

    Torch applies the weight decay, except where the decayed gradient is centred: there it is added by hand.
    """

    def __init__(self, case: Case, recipe: Options, groups: list[dict[str, Any]]) -> None:
        self.recipe, self.groups = recipe, groups
        options = dict(case.options)
        self.at = recipe.get("centralize_at", "gradient")
        self.coupled = case.optimizer != "AdamW" and not options.get("decoupled_weight_decay")
        self.flip = options.get("maximize", False)
        self.by_hand = self.at == "decayed" or (self.at == "update" and not self.coupled)
        self.decay = options["weight_decay"]
        if self.by_hand:
            options["weight_decay"] = 0.0
        if self.at == "decayed":
            options["maximize"] = False
        self.optimizer = getattr(torch.optim, case.optimizer)(groups, foreach=False, **options)

    def step(self) -> None:
        params = [group["params"] for group in self.groups]
        flat = [p for group in params for p in group]
        kind = self.recipe.get("centralize", False)
        if self.at == "gradient":
            self._each(flat, lambda p: centred(p.grad, kind))
        self._perturb(params)
        if self.recipe.get("reverse") is not None:
            self._each(flat, lambda p: -self.recipe["reverse"] * p.grad)
        if self.at == "decayed":
            self._decay_and_centre(flat, kind)
        before = [p.detach().clone() for p in flat]
        self.optimizer.step()
        if self.at == "update":
            self._centre_updates(before, kind)
        elif self.by_hand and not self.coupled:
            self._shrink(before)

    @staticmethod
    def _each(params: list[Tensor], new: Callable[[Tensor], Tensor]) -> None:
        for p in params:
            p.grad = new(p)

    def _perturb(self, params: list[list[Tensor]]) -> None:
        if self.recipe.get("clip_norm") is not None:
            clip(params, self.recipe["clip_norm"], "global")
        if self.recipe.get("perturb") == "clip":
            clip(params, self.recipe["radius"], self.recipe["norm_scope"])
        if self.recipe.get("clip_value") is not None:
            torch.nn.utils.clip_grad_value_([p for group in params for p in group], self.recipe["clip_value"])

    def _decay_and_centre(self, params: list[Tensor], kind: object) -> None:
        decay = self.decay if self.coupled else 0.0
        self._each(params, lambda p: centred((-p.grad if self.flip else p.grad) + decay * p.detach(), kind))

    def _learning_rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups for _ in group["params"]]

    def _shrunk(self, p: Tensor, lr: float) -> Tensor:
        return p * (1 - lr * self.decay) if not self.coupled else p

    @torch.no_grad()
    def _centre_updates(self, before: list[Tensor], kind: object) -> None:
        flat = [p for group in self.groups for p in group["params"]]
        for p, old, lr in zip(flat, before, self._learning_rates(), strict=True):
            p.copy_(self._shrunk(old, lr) - centred(old - p, kind))

    @torch.no_grad()
    def _shrink(self, before: list[Tensor]) -> None:
        flat = [p for group in self.groups for p in group["params"]]
        for p, old, lr in zip(flat, before, self._learning_rates(), strict=True):
            p.add_(self._shrunk(old, lr) - old)


def assert_as_by_hand(case: Case, recipe: Options, dtype: torch.dtype, rtol: float, atol: float) -> None:
    ours = Run(case, recipe, SHAPES, backend="reference", exact=dtype == torch.float64)
    groups = [
        {"params": [p.detach().clone() for p in group["params"]], "lr": group["lr"]}
        for group in ours.optimizer.param_groups
    ]
    theirs = ByHand(case, recipe, groups)
    flat = [p for group in groups for p in group["params"]]
    for step in range(STEPS):
        for i, p in enumerate(flat):
            p.grad = values(p.shape, i, step).to(dtype).clone()
        theirs.step()
        ours.step()
    for mine, p in zip(ours.params, flat, strict=True):
        torch.testing.assert_close(mine.detach(), p, rtol=rtol, atol=atol)
        assert_state_close(ours.optimizer.state.get(mine, {}), theirs.optimizer.state[p], rtol, atol)


def assert_state_close(ours: dict[str, Any], theirs: dict[str, Any], rtol: float, atol: float) -> None:
    expected = {key: value for key, value in theirs.items() if value is not None}
    assert ours.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, rtol=rtol, atol=atol, check_dtype=key != "step")


CENTRALIZE = [
    {},
    *(
        {"centralize": kind, "centralize_at": at}
        for kind, at in itertools.product((True, "unit", "conv", "tensor"), ("gradient", "decayed", "update"))
    ),
]
LIMITS = [
    {},
    {"clip_norm": 1.0},
    {"clip_norm": 1e6},
    *({"perturb": "clip", "radius": 0.5, "norm_scope": scope} for scope in ("global", "group", "param", "unit")),
    {"clip_value": 0.4},
    {"clip_norm": 3.0, "clip_value": 0.05},
]
SIGNS = [{}, {"reverse": 0.7}]


def name(options: Options) -> str:
    return "-".join(f"{value}" for value in options.values()) or "off"


@pytest.mark.parametrize("sign", SIGNS, ids=name)
@pytest.mark.parametrize("limit", LIMITS, ids=name)
@pytest.mark.parametrize("centralize", CENTRALIZE, ids=name)
@pytest.mark.parametrize("case", ["sgd-nesterov", "adam", "adamw-amsgrad"])
def test_every_combination_that_torch_can_express(
    case: str, centralize: Options, limit: Options, sign: Options
) -> None:
    assert_as_by_hand(CASES[case], {**centralize, **limit, **sign}, torch.float64, 1e-10, 1e-12)


@pytest.mark.parametrize("recipe", [{}, {"centralize": True, "centralize_at": "decayed"}, {"clip_norm": 1.0}], ids=name)
@pytest.mark.parametrize("case", TORCHS)
def test_every_optimizer_is_torchs(case: str, recipe: Options) -> None:
    assert_as_by_hand(CASES[case], recipe, torch.float64, 1e-12, 1e-13)


@pytest.mark.parametrize("case", TORCHS)
def test_float32_is_torchs(case: str) -> None:
    assert_as_by_hand(CASES[case], {}, torch.float32, 1.3e-6, 1e-6)


# ---- the perturbations, on one gradient


def one_step(g: Tensor, p: Tensor | None = None, backend: str = "reference", **recipe: Any) -> Tensor:
    """The gradient that a recipe results in: what SGD with lr 1 subtracts from the weights."""
    p = torch.zeros_like(g) if p is None else p.clone()
    q = torch.nn.Parameter(p.clone())
    q.grad = g.clone()
    gradfused.SGD([q], lr=1.0, backend=backend, **recipe).step()
    return p - q.detach()


GRADIENT = torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 4)


@pytest.mark.parametrize(
    ("perturb", "norm"),
    [("amplify", lambda n: n + 2), ("dampen", lambda n: n - 2), ("normalize", lambda n: 2.0), ("clip", lambda n: 2.0)],
)
@pytest.mark.parametrize("scope", ["global", "group", "param"])
def test_perturbations_move_the_norm(perturb: str, norm: Callable[[float], float], scope: str) -> None:
    before = float(GRADIENT.norm())
    after = one_step(GRADIENT, perturb=perturb, radius=2.0, norm_scope=scope)
    assert float(after.norm()) == pytest.approx(norm(before), rel=1e-6)
    torch.testing.assert_close(after / after.norm(), GRADIENT / before)


@pytest.mark.parametrize(
    ("perturb", "norm"),
    [("amplify", lambda n: n + 2), ("dampen", lambda n: n - 2), ("normalize", lambda n: 0 * n + 2)],
)
def test_perturbations_of_units_move_each_units_norm(perturb: str, norm: Callable[[Tensor], Tensor]) -> None:
    after = one_step(GRADIENT, perturb=perturb, radius=2.0, norm_scope="unit")
    torch.testing.assert_close(after.norm(dim=1), norm(GRADIENT.norm(dim=1)))


def test_dampening_stops_at_zero_and_clipping_leaves_short_gradients() -> None:
    assert torch.equal(one_step(GRADIENT, perturb="dampen", radius=1e3), torch.zeros_like(GRADIENT))
    assert torch.equal(one_step(GRADIENT, perturb="clip", radius=1e3), GRADIENT)


@pytest.mark.parametrize("perturb", ["amplify", "dampen", "normalize", "clip"])
def test_a_gradient_of_zero_stays_zero(perturb: str) -> None:
    zero = torch.zeros(3, 4, dtype=torch.float64)
    assert torch.equal(one_step(zero, perturb=perturb), zero)


def test_norms_are_of_the_centred_gradient() -> None:
    after = one_step(GRADIENT, centralize=True, perturb="normalize", radius=1.0)
    expected = GRADIENT - GRADIENT.mean(dim=1, keepdim=True)
    torch.testing.assert_close(after, expected / expected.norm())


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2, 2), (7,)])
def test_adaptive_clipping(shape: tuple[int, ...]) -> None:
    """Brock et al. 2021, equation 3: each unit by itself, with a lower bound for the norm of its weights."""
    g, p = values(shape, 0, 0).double(), values(shape, 0, -1).double()
    p[0] = 0.0
    after = one_step(g, p, perturb="agc", radius=0.05, norm_scope="unit")
    units = range(shape[0]) if len(shape) > 1 else [slice(None)]
    for i in units:
        largest = 0.05 * max(float(p[i].norm()), 1e-3)
        scale = min(1.0, largest / max(float(g[i].norm()), 1e-6))
        torch.testing.assert_close(after[i], g[i] * scale, rtol=1e-12, atol=1e-14)


def test_stages_come_in_order() -> None:
    """Values are clipped after the norm, noise comes after both and reversal last.

    Decay is neither reversed nor centred.
    """
    p = values((3, 4), 1, -1).double()
    recipe = {"centralize": True, "clip_norm": 1.0, "clip_value": 0.2, "noise": 0.3, "seed": 9, "reverse": 0.5}
    q = torch.nn.Parameter(p.clone())
    q.grad = GRADIENT.clone()
    gradfused.SGD([q], lr=LR, weight_decay=DECAY, maximize=True, backend="reference", **recipe).step()
    g = GRADIENT - GRADIENT.mean(dim=1, keepdim=True)
    g = (g / g.norm()).clamp(-0.2, 0.2)
    g = g + math.sqrt(0.3) * reference.normal_noise(g.shape, 9, 0, 0, g.device)
    expected = p - LR * (0.5 * g + DECAY * p)
    torch.testing.assert_close(q.detach(), expected, rtol=1e-5, atol=1e-6)


def test_units_of_other_layouts_are_slices_of_dim_0() -> None:
    g = values((4, 3, 2, 2), 0, 0).double()
    expected = one_step(g, centralize=True, perturb="clip", norm_scope="unit")
    again = one_step(
        g.contiguous(memory_format=torch.channels_last), centralize=True, perturb="clip", norm_scope="unit"
    )
    torch.testing.assert_close(again, expected, rtol=1e-14, atol=1e-14)


# ---- noise

ONES = 0xFFFFFFFF
# Random123's kat_vectors, philox4x32-10: counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], result: tuple[int, ...]
) -> None:
    low, high, parameter, step = counter
    quad = (high << 32) | low
    quads = torch.tensor([quad - (1 << 64) if quad >= 1 << 63 else quad])
    words = reference.philox((key[1] << 32) | key[0], quads, parameter, step)
    assert tuple(int(w) for w in words) == result


def draw(numel: int, seed: int = 0, parameter: int = 0, step: int = 0) -> Tensor:
    return reference.normal_noise(torch.Size((numel,)), seed, parameter, step, torch.device("cpu"))


def test_noise_is_standard_normal() -> None:
    n = 400_000
    x = draw(n)
    assert abs(float(x.mean())) < 4 / math.sqrt(n)
    assert abs(float(x.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((x**3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float((x**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    within = [float((x.abs() < k).double().mean()) for k in (1, 2, 3)]
    assert within == pytest.approx([math.erf(k / math.sqrt(2)) for k in (1, 2, 3)], abs=3e-3)


@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 2**32}, {"parameter": 1}, {"step": 1}], ids=name)
def test_noise_of_another_seed_parameter_or_step_is_independent(other: dict[str, int]) -> None:
    n = 100_000
    correlation = torch.corrcoef(torch.stack([draw(n), draw(n, **other)]))[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(n)


@pytest.mark.parametrize("lag", [1, 2, 3, 4])
def test_neighbouring_elements_are_independent(lag: int) -> None:
    x = draw(100_000)
    assert abs(float((x[lag:] * x[:-lag]).mean())) < 4 / math.sqrt(len(x))


def test_noise_of_a_longer_tensor_begins_alike() -> None:
    assert torch.equal(draw(1001)[:17], draw(17))


@pytest.mark.parametrize("decay", [0.0, 0.55, 2.0])
def test_noise_schedule(decay: float) -> None:
    """The variance is noise / (1 + t)^decay, and each step draws new numbers."""
    p = torch.nn.Parameter(torch.zeros(1000, dtype=torch.float64))
    optimizer = gradfused.SGD([p], lr=1.0, noise=0.3, noise_decay=decay, seed=4, backend="reference")
    for t in range(4):
        p.data.zero_()
        p.grad = torch.zeros_like(p)
        optimizer.step()
        expected = math.sqrt(0.3 / (1 + t) ** decay) * draw(1000, seed=4, step=t)
        torch.testing.assert_close(-p.detach(), expected, rtol=1e-12, atol=1e-14)
