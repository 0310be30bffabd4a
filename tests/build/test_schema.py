"""What Python calls a group's settings and a row is what csrc/schema.def declares."""

from __future__ import annotations

from dataclasses import fields

import pytest

from gradfused.backends import availability, cpu
from gradfused.backends.base import Row, Settings

pytestmark = pytest.mark.skipif(not availability()["cpu"].usable, reason="the native module is not built")

PYTHON_ALONE = {"lr_tensor", "lr_address"}  # a table is told of them by another way


def plain(annotation: str) -> str:
    """A type as the schema spells it: neither optional nor with parameters."""
    return annotation.removesuffix(" | None").partition("[")[0]


def test_settings_are_those_of_the_schema() -> None:
    ours = {f.name: (plain(str(f.type)), f.default) for f in fields(Settings) if f.name not in PYTHON_ALONE}
    assert list(ours.items()) == list(cpu.native().schema()["Settings"].items())


def test_a_row_is_that_of_the_schema() -> None:
    ours = {f.name: plain(str(f.type)) for f in fields(Row) if f.name not in ("name", "kept")}
    assert {**ours, "numel": "int"} == cpu.native().schema()["Row"]


def test_an_unknown_field_of_a_row_is_refused() -> None:
    with pytest.raises(TypeError, match="a row has no such field"):
        cpu.native().Engine(1).add(rule="sgd", rounding="nearest")


def test_an_unknown_value_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of none, global, group, param, unit, got 'all'"):
        cpu.native().Engine(1).configure(0, Settings(norm_scope="all"))


def test_the_layout_has_every_field() -> None:
    layout, schema = cpu.native().LAYOUT, cpu.native().schema()
    assert {f"settings_{name}" for name in schema["Settings"]} | {f"row_{name}" for name in schema["Row"]} <= set(
        layout
    )
