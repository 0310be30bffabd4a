"""Every keyword: what is accepted, what is refused with which message, and the numbers that a kernel gets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from twins import small_model

import gradfused
from gradfused.backends import Settings
from gradfused.step import schema

OPTIMIZERS = ["SGD", "Adam", "AdamW"]
INF, NAN = math.inf, math.nan


def one():
    return [nn.Parameter(torch.ones(2, 3))]


def settings(**recipe) -> Settings:
    return gradfused.SGD(one(), **recipe)._interpret(gradfused.SGD(one(), **recipe).param_groups[0]).settings


# ---- names


def test_the_recipe_is_documented_typed_and_has_defaults():
    assert list(schema.DEFAULTS) == list(schema.Recipe.__annotations__)
    for name in schema.DEFAULTS:
        assert f"{name}: " in schema.Recipe.__doc__


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_defaults_reach_every_group(name):
    opt = getattr(gradfused, name)(one())
    assert {k: opt.param_groups[0][k] for k in schema.DEFAULTS} == schema.DEFAULTS


@pytest.mark.parametrize(
    ("given", "meant"),
    [("clip_nrom", "clip_norm"), ("centralise", "centralize"), ("norm_scop", "norm_scope"), ("nosie", "noise")],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unknown_option(name, given, meant):
    with pytest.raises(TypeError, match=f"{name} got an unknown option '{given}'; did you mean '{meant}'\\?"):
        getattr(gradfused, name)(one(), **{given: 1.0})


def test_unknown_option_that_resembles_nothing_lists_what_is_known():
    with pytest.raises(TypeError, match=r"unknown option 'qqq'; known are centralize, .*, backend"):
        gradfused.AdamW(one(), qqq=1)


def test_recipe_is_keyword_only():
    with pytest.raises(TypeError, match="positional argument"):
        gradfused.AdamW(one(), 1e-3, (0.9, 0.999), 1e-8, 0.0, False, True)


@pytest.mark.parametrize(
    ("given", "meant"), [("weight_deacy", "weight_decay"), ("clipnorm", "clip_norm"), ("Lr", None)]
)
def test_misspelt_group_key(given, meant):
    group = {"params": one(), given: 0.1}
    if meant is None:  # too short to guess; torch ignores such keys as well
        assert gradfused.AdamW([group]).param_groups[0][given] == 0.1
        return
    with pytest.raises(TypeError, match=f"parameter group has an unknown option '{given}'; did you mean '{meant}'\\?"):
        gradfused.AdamW([group])


# ---- values

BAD = [
    # keyword, values of the wrong type, values out of range
    ("lr", ["fast", None, True, [0.1]], [-0.1, NAN, INF, -INF]),
    ("weight_decay", ["none", None, False], [-1e-9, NAN, INF]),
    ("noise", ["loud", None, True], [-0.1, NAN, INF]),
    ("noise_decay", ["fast", None, True], [-0.1, NAN, INF]),
    ("clip_norm", ["big", True, [1.0]], [-1.0, NAN, -INF]),
    ("clip_value", ["big", False, (1.0,)], [-1.0, NAN, -INF]),
    ("radius", ["big", None, True], [-1.0, NAN, -INF]),
    ("reverse", ["yes", True, {}], [-1.0, NAN, INF]),
    ("seed", ["abc", None, True, 1.0, NAN], [-1, 2**64]),
    ("centralize", [], ["rows", 1, 0, None, "Unit"]),
    ("centralize_at", [], ["start", None, True, 1]),
    ("perturb", [], ["shrink", True, False, 0.5, ""]),
    ("norm_scope", [], ["world", None, True]),
    ("nonfinite", [], ["raise", None, True]),
    ("backend", [], ["gpu", None, "CPU", 0]),
]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize(
    ("keyword", "value", "error"),
    [(k, v, TypeError) for k, values, _ in BAD for v in values]
    + [(k, v, ValueError) for k, _, values in BAD for v in values],
    ids=repr,
)
def test_bad_value(name, keyword, value, error):
    with pytest.raises(error) as caught:
        getattr(gradfused, name)(one(), **{keyword: value})
    assert str(caught.value).startswith(f"{keyword}: expected")
    assert f"got {value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "keyword", "value", "error", "message"),
    [
        ("SGD", "momentum", -0.1, ValueError, "momentum: expected 0 or more and finite, got -0.1"),
        ("SGD", "momentum", NAN, ValueError, "momentum: expected .* got nan"),
        ("SGD", "momentum", "high", TypeError, "momentum: expected a number, got 'high'"),
        ("SGD", "dampening", NAN, ValueError, "dampening: expected .* got nan"),
        ("SGD", "dampening", None, TypeError, "dampening: expected a number, got None"),
        ("AdamW", "eps", -1e-8, ValueError, "eps: expected 0 or more and finite, got -1e-08"),
        ("AdamW", "eps", NAN, ValueError, "eps: expected .* got nan"),
        ("AdamW", "betas", (1.0, 0.9), ValueError, r"betas\[0\]: expected from 0 and below 1, got 1.0"),
        ("AdamW", "betas", (0.9, 1.5), ValueError, r"betas\[1\]: expected from 0 and below 1, got 1.5"),
        ("AdamW", "betas", (-0.1, 0.9), ValueError, r"betas\[0\]: .* got -0.1"),
        ("AdamW", "betas", (0.9, NAN), ValueError, r"betas\[1\]: .* got nan"),
        ("AdamW", "betas", (0.9, "0.99"), TypeError, r"betas\[1\]: expected a number, got '0.99'"),
        ("AdamW", "betas", 0.9, TypeError, "betas: expected two numbers, got 0.9"),
        ("AdamW", "betas", (0.9,), TypeError, r"betas: expected two numbers, got \(0.9,\)"),
        ("AdamW", "betas", (0.9, 0.99, 0.999), TypeError, "betas: expected two numbers"),
    ],
)
def test_bad_value_of_the_rule(name, keyword, value, error, message):
    with pytest.raises(error, match=message):
        getattr(gradfused, name)(one(), **{keyword: value})


@pytest.mark.parametrize("options_", [{}, {"momentum": 0.0}, {"momentum": 0.9, "dampening": 0.1}])
def test_nesterov_needs_momentum_and_no_dampening(options_):
    with pytest.raises(ValueError, match=r"nesterov=True: expected momentum above 0 and no dampening, got momentum=0"):
        gradfused.SGD(one(), lr=0.1, nesterov=True, **options_)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_differentiable(name):
    with pytest.raises(ValueError, match=r"differentiable=True: .*; use torch.optim"):
        getattr(gradfused, name)(one(), differentiable=True)


# ---- contradictions


@pytest.mark.parametrize("perturb", ["clip", "normalize", "amplify", "dampen"])
def test_clip_norm_with_perturb(perturb):
    with pytest.raises(ValueError, match=f"clip_norm=1.0 and perturb='{perturb}': expected one of them"):
        gradfused.SGD(one(), clip_norm=1.0, perturb=perturb)


@pytest.mark.parametrize("scope", ["group", "param", "unit"])
def test_clip_norm_with_another_scope(scope):
    with pytest.raises(
        ValueError, match=f"got norm_scope='{scope}': use perturb='clip', radius=.*, norm_scope='{scope}'"
    ):
        gradfused.SGD(one(), clip_norm=1.0, norm_scope=scope)


@pytest.mark.parametrize("scope", ["global", "group", "param"])
def test_agc_at_another_scope(scope):
    with pytest.raises(ValueError, match=f"perturb='agc' .* got norm_scope='{scope}': use norm_scope='unit'"):
        gradfused.SGD(one(), perturb="agc", norm_scope=scope)


@pytest.mark.parametrize("perturb", ["normalize", "amplify", "dampen"])
def test_infinite_radius_makes_sense_for_clipping_only(perturb):
    with pytest.raises(ValueError, match="radius: expected 0 or more and finite, got inf"):
        gradfused.SGD(one(), perturb=perturb, radius=INF)
    gradfused.SGD(one(), perturb="clip", radius=INF)
    gradfused.SGD(one(), clip_norm=INF, clip_value=INF)


# ---- what is taken


def test_a_recipe_becomes_numbers():
    s = settings(clip_norm=2.0, clip_value=3, noise=0.5, noise_decay=0.25, seed=9, reverse=0.5, nonfinite="skip")
    assert (s.norm_scope, s.perturb) == ("global", (0.0, 2.0, 1e-6, 0.0, 1.0))
    assert (s.clip_value, s.noise, s.noise_decay, s.seed, s.sign, s.skip_nonfinite) == (3.0, 0.5, 0.25, 9, -0.5, True)


@pytest.mark.parametrize(
    ("perturb", "norms", "factors"),
    [
        ("clip", (0.0, 1.0, 8.0), (1.0, 1.0, 0.25)),
        ("normalize", (1.0, 8.0), (2.0, 0.25)),
        ("amplify", (1.0, 8.0), (3.0, 1.25)),
        ("dampen", (1.0, 8.0), (0.0, 0.75)),
    ],
)
def test_perturbation_family(perturb, norms, factors):
    a, b, e, lo, hi = settings(perturb=perturb, radius=2.0).perturb
    for norm, factor in zip(norms, factors, strict=True):
        assert min(max(a + b / (norm + e), lo), hi) == pytest.approx(factor, rel=1e-5)


def test_clip_norm_is_short_for_perturb():
    assert settings(clip_norm=0.5) == settings(perturb="clip", radius=0.5, norm_scope="global")


@pytest.mark.parametrize(
    ("reverse", "maximize", "sign"),
    [(None, False, 1.0), (None, True, -1.0), (2.0, False, -2.0), (2.0, True, 2.0), (0.0, False, 0.0)],
)
def test_sign_of_reverse_and_maximize(reverse, maximize, sign):
    assert settings(reverse=reverse, maximize=maximize).sign == sign


@pytest.mark.parametrize(
    ("value", "kind"), [(False, "off"), (True, "unit"), ("unit", "unit"), ("conv", "conv"), ("tensor", "tensor")]
)
def test_kinds_of_centralisation(value, kind):
    opt = gradfused.SGD(one(), centralize=value)
    assert opt._interpret(opt.param_groups[0]).centre == kind


@pytest.mark.parametrize(
    "recipe",
    [
        {"seed": 2**64 - 1},
        {"seed": 0},
        {"radius": 0},
        {"radius": 0.0, "perturb": "normalize"},
        {"lr": 0},
        {"clip_norm": 0.0},
        {"clip_value": 0},
        {"noise": 1, "noise_decay": 0},
        {"reverse": 0},
        {"dampening": -1.0},
        {"lr": torch.tensor(0.1), "momentum": torch.tensor(0.5)},
        {"perturb": "agc", "norm_scope": "unit", "radius": 0.01},
    ],
    ids=repr,
)
def test_values_on_the_edge(recipe):
    opt = gradfused.SGD(one(), **recipe)
    assert {k: opt.param_groups[0][k] for k in recipe} == recipe


def test_groups_may_differ_in_everything_but_the_backend():
    model = small_model()
    opt = gradfused.AdamW(
        [
            {"params": model.conv.parameters(), "perturb": "agc", "norm_scope": "unit", "radius": 0.01},
            {"params": model.head.parameters(), "clip_norm": 1.0, "nonfinite": "skip", "reverse": 0.1, "amsgrad": True},
        ],
        centralize=True,
    )
    assert [g["norm_scope"] for g in opt.param_groups] == ["unit", "global"]
    assert [g["centralize"] for g in opt.param_groups] == [True, True]
