"""What the documents say of the rules is so."""

from __future__ import annotations

import pytest
import torch
from repository import ROOT
from rule_lines import PLACES, RULES, count, table

import gradfused

OPTIMIZERS = [
    name for name, kind in vars(gradfused).items() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
]


def test_lines_that_a_rule_takes() -> None:
    assert table() in (ROOT / "docs/adding-a-rule.md").read_text()


@pytest.mark.parametrize("rule", RULES)
def test_every_place_has_the_rule(rule: str) -> None:
    assert all(lines > 0 for lines in count(rule)), dict(zip(PLACES, count(rule), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_readme_and_changelog_name_every_optimizer(name: str) -> None:
    for path in ("README.md", "CHANGELOG.md"):
        assert f"`{name}`" in (ROOT / path).read_text() or f"gradfused.{name}" in (ROOT / path).read_text(), path
