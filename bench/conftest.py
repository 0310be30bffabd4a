"""Fixtures of `pytest bench/`: the benchmark's cases through pytest-benchmark."""

from __future__ import annotations

from functools import cache

import pytest
from gradfused.bench.cases import MODELS, RECIPES, RULES, StepCase, Workload, workload_of
from gradfused.bench.measure.check import Checker

MODEL_NAMES = ("small-400", "resnet50")
RECIPE_NAMES = ("plain", "centralize", "clip")


def case_of(model: str, recipe: str) -> StepCase:
    """A case of AdamW in float32 on the CPU."""
    return StepCase(MODELS[model], RECIPES[recipe], RULES["adamw"])


@cache
def checker_of(model: str, recipe: str) -> Checker:
    """The oracle of a case, computed once."""
    return Checker(case_of(model, recipe))


@pytest.fixture(scope="module", params=MODEL_NAMES)
def model(request: pytest.FixtureRequest) -> str:
    """The name of a model."""
    return str(request.param)


@pytest.fixture(scope="module")
def workload(model: str) -> Workload:
    """A model's tensors, shared by all its cases."""
    case = case_of(model, "plain")
    return workload_of(case)


@pytest.fixture(params=RECIPE_NAMES)
def case(model: str, request: pytest.FixtureRequest) -> StepCase:
    """A model with each recipe."""
    return case_of(model, request.param)


@pytest.fixture
def checker(case: StepCase) -> Checker:
    """What says whether a variant of the case is right."""
    return checker_of(case.model.name, case.recipe.name)
