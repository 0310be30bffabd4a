"""Random shapes, strides and options: the kernels against the float64 oracle."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from cases import EMULATED_CUDA, assert_close, guards_intact
from hypothesis import given, settings
from torch import Tensor

import gradfused
from gradfused.backends import availability

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not availability()["cpu"].usable, reason=str(availability()["cpu"].reason)),
]

# ---- tensors: each is a slice with steps of a permuted array, so that dims have any order and any gaps

Layout = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # order of the dims in memory, steps, starts
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...]) -> Layout:
    dims = len(shape)
    order = tuple(draw(st.permutations(range(dims))))
    steps = tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    starts = tuple(draw(st.lists(st.integers(0, 2), min_size=dims, max_size=dims)))
    return order, steps, starts


def place(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> Tensor:
    """A tensor of NaN in this layout, with more NaN around it."""
    order, steps, starts = layout
    sizes = [starts[d] + steps[d] * shape[d] for d in order]
    base = torch.full(sizes, torch.nan, dtype=dtype)
    inverse = [order.index(d) for d in range(len(shape))]
    spread = base.permute(inverse) if shape else base
    return spread[tuple(slice(a, a + s * n, s) for a, s, n in zip(starts, steps, shape, strict=True))]


@st.composite
def parameters(draw: st.DrawFn) -> list[tuple[tuple[int, ...], Layout, Layout]]:
    """The shapes of some parameters, each with the layouts of the parameter and of its gradient."""
    found = draw(st.lists(shapes, min_size=1, max_size=4))
    return [(s, draw(layouts(s)), draw(layouts(s))) for s in found]


# ---- options: all combinations that are not refused

perturbations = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"clip_norm": st.floats(0.01, 10)}),
    st.fixed_dictionaries(
        {
            "perturb": st.sampled_from(["clip", "normalize", "amplify", "dampen"]),
            "radius": st.floats(0.01, 2),
            "norm_scope": st.sampled_from(["global", "group", "param", "unit"]),
        }
    ),
    st.fixed_dictionaries(
        {"perturb": st.just("agc"), "radius": st.floats(0.001, 0.5), "norm_scope": st.just("unit")},
    ),
)
transforms = st.fixed_dictionaries(
    {
        "centralize": st.sampled_from([False, True, "unit", "conv", "tensor"]),
        "centralize_at": st.sampled_from(["gradient", "decayed", "update"]),
        "clip_value": st.one_of(st.none(), st.floats(0.1, 1)),
        "noise": st.sampled_from([0.0, 0.1]),
        "seed": st.integers(0, 2**64 - 1),
        "reverse": st.one_of(st.none(), st.floats(0, 2)),
        "nonfinite": st.sampled_from(["propagate", "skip"]),
        "maximize": st.booleans(),
        "weight_decay": st.floats(0.01, 0.5),
    }
)
recipes = st.tuples(transforms, perturbations).map(lambda parts: parts[0] | parts[1])

sgd = st.fixed_dictionaries({"lr": st.floats(1e-3, 0.1), "momentum": st.sampled_from([0.0, 0.5, 0.9])})
adam = st.fixed_dictionaries(
    # With a small eps Adam turns a rounding error into a whole step where the gradient is 0 apart from it.
    {"lr": st.floats(1e-3, 0.01), "eps": st.just(1e-3), "amsgrad": st.booleans()}
)
optimizers = st.one_of(
    st.tuples(st.just("SGD"), sgd), st.tuples(st.just("Adam"), adam), st.tuples(st.just("AdamW"), adam)
)


def outcome(
    made: list[tuple[Tensor, Tensor]], start: list[Tensor], optimizer: str, options: dict[str, Any], steps: int
) -> dict[str, Tensor]:
    """Parameters and state after some steps, in which each gradient is half of the one before."""
    params = [torch.nn.Parameter(p) for p, _ in made]
    opt = getattr(gradfused, optimizer)(params, **options)
    for step in range(steps):
        for p, (_, g), value in zip(params, made, start, strict=True):
            g.copy_(value * 0.5**step)
            p.grad = g
        opt.step()
    tensors = {f"parameter {i}": p.detach() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        tensors |= {f"{key} of parameter {i}": t for key, t in opt.state.get(p, {}).items()}
    return {name: t.double().contiguous().clone() for name, t in tensors.items()}


def pair(shape: tuple[int, ...], of_param: Layout, of_grad: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return place(shape, of_param, dtype), place(shape, of_grad, dtype)


@settings(max_examples=150)
@given(parameters(), optimizers, recipes, st.integers(1, 4), st.sampled_from([torch.float32, torch.float64]))
@pytest.mark.parametrize("backend", ["cpu", EMULATED_CUDA])
def test_kernels_follow_the_oracle(
    backend: str,
    specs: list[tuple[tuple[int, ...], Layout, Layout]],
    optimizer: tuple[str, dict[str, Any]],
    recipe: dict[str, Any],
    steps: int,
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator).to(dtype) + 0.1 for s, _, _ in specs]
    weights = [torch.randn(s, generator=generator).to(dtype) for s, _, _ in specs]
    kind, options = optimizer

    def run(backend: str, dtype: torch.dtype, native_layout: bool) -> dict[str, Tensor]:
        made = [pair(*spec, dtype) for spec in specs]
        if not native_layout:
            made = [(p.contiguous(), g.contiguous()) for p, g in made]
        for (p, _), w in zip(made, weights, strict=True):
            p.copy_(w)
        result = outcome(made, start, kind, options | recipe | {"backend": backend}, steps)
        assert all(guards_intact(t) for both in made for t in both)
        return result

    atol = 2e-5 if recipe["noise"] or dtype == torch.float32 else 1e-10
    assert_close(
        run(backend, dtype, True),
        run("reference", torch.float64, False),
        1.3e-6,
        atol,
        lambda: run("reference", dtype, False),
    )


@settings(max_examples=60)
@given(parameters(), recipes, st.sampled_from([torch.float16, torch.bfloat16]))
def test_layout_changes_nothing_in_low_precision(
    specs: list[tuple[tuple[int, ...], Layout, Layout]], recipe: dict[str, Any], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(s, generator=generator).to(dtype) for s, _, _ in specs]

    def run(native_layout: bool) -> dict[str, Tensor]:
        made = [pair(*spec, dtype) for spec in specs]
        if not native_layout:
            made = [(p.contiguous(), g.contiguous()) for p, g in made]
        for (p, _), w in zip(made, start, strict=True):
            p.copy_(-w)
        result = outcome(made, start, "SGD", {"lr": 0.1, "momentum": 0.9} | recipe | {"backend": "cpu"}, 2)
        assert all(guards_intact(t) for both in made for t in both)
        return result

    ours, theirs = run(True), run(False)
    for name, expected in theirs.items():
        # Where elements lie in another order, sums are taken in another order: the mean may differ by a rounding.
        torch.testing.assert_close(ours[name], expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@settings(max_examples=60)
@given(recipes, optimizers, st.integers(1, 5))
def test_parameters_apart_are_parameters_together(
    recipe: dict[str, Any], optimizer: tuple[str, dict[str, Any]], count: int
) -> None:
    """Without a shared norm and without noise, other parameters in the step do not change a bit of the result."""
    recipe = recipe | {"noise": 0.0, "nonfinite": "propagate"}
    if recipe.pop("clip_norm", None) is not None or recipe.get("norm_scope") in ("global", "group"):
        recipe["norm_scope"] = "param"
    kind, options = optimizer
    generator = torch.Generator().manual_seed(2)
    start = [torch.randn(7, 1 + i, generator=generator) for i in range(count)]

    def run(some: list[Tensor]) -> list[Tensor]:
        made = [(-x.clone(), x.clone()) for x in some]
        outcome(made, some, kind, options | recipe | {"backend": "cpu"}, 2)
        return [p for p, _ in made]

    together = run(start)
    for i, x in enumerate(start):
        assert torch.equal(together[i], run([x])[0])
