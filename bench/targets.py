"""What the project set out to reach, against what a run measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .results import FUSED_PLAIN, OURS, ROOF, CaseResult, Results

Measure = Callable[[CaseResult], "float | None"]


@dataclass(frozen=True)
class Target:
    """A bound on one figure of one case.

    Attributes:
        model: Name of the model.
        recipe: Name of the recipe.
        title: What is bounded, for a reader.
        measure: The figure, or None where it was not measured.
        limit: The bound.
        at_least: Whether the figure must reach the limit, or stay within it.
    """

    model: str
    recipe: str
    title: str
    measure: Measure
    limit: float
    at_least: bool = True

    def row(self, result: CaseResult) -> dict[str, Any] | None:
        """This target as a row of the report, or None where it was not measured."""
        value = self.measure(result)
        if value is None:
            return None
        met = value >= self.limit if self.at_least else value <= self.limit
        return row(
            f"{self.recipe}, {self.model}",
            self.title,
            value,
            self.limit,
            None if result.disturbed else met,
            sign=">=" if self.at_least else "<=",
        )


def row(
    case: str, title: str, value: float | str, limit: float | str, met: bool | None, sign: str = ""
) -> dict[str, Any]:
    """A row of the report on targets; `met` is None where the measurement was disturbed."""
    return {
        "case": case,
        "target": title,
        "limit": f"{sign} {limit}".strip(),
        "measured": round(value, 3) if isinstance(value, float) else value,
        "met": met,
    }


def speedup_over(variant: str) -> Measure:
    """How many times as long a variant takes as gradfused."""

    def measure(result: CaseResult) -> float | None:
        theirs, ours = result.ms(variant), result.ms(OURS)
        return theirs / ours if theirs is not None and ours else None

    return measure


def time_relative_to(variant: str) -> Measure:
    """How many times as long gradfused takes as a variant."""

    def measure(result: CaseResult) -> float | None:
        theirs, ours = result.ms(variant), result.ms(OURS)
        return ours / theirs if theirs and ours is not None else None

    return measure


def over(model: str, recipe: str, variant: str, limit: float) -> Target:
    """gradfused is at least so many times as fast as a variant."""
    return Target(model, recipe, f"times faster than {variant}", speedup_over(variant), limit)


def within(model: str, recipe: str, variant: str, limit: float) -> Target:
    """gradfused takes at most so many times as long as a variant."""
    title = f"time relative to {variant}"
    return Target(model, recipe, title, time_relative_to(variant), limit, at_least=False)


TARGETS = (
    over("gpt2", "clip", "torch-fused", 2.5),
    over("gpt2", "clip", "torch-foreach", 5.0),
    over("gpt2", "clip", "torch-loop", 8.0),
    within("gpt2", "clip", FUSED_PLAIN, 1.05),
    over("resnet50", "clip", "torch-fused", 2.5),
    over("small-400", "clip", "torch-fused", 30.0),
    Target("small-400", "clip", "ms a step", lambda result: result.ms(OURS), 1.0, at_least=False),
    within("gpt2", "centralize", ROOF, 1.15),
)


def evaluate(results: Results) -> list[dict[str, Any]]:
    """Every target that the run measured; they are set for AdamW on a CPU."""
    rows = [*case_rows(results.cases), *fastest_rows(results.cases)]
    if results.same_on_any_threads is not None:
        same = results.same_on_any_threads
        measured = "equal" if same else "different"
        rows.append(row("all models", "bits on 1 thread and on more", measured, "equal", same))
    return rows


def case_rows(cases: Sequence[CaseResult]) -> Iterator[dict[str, Any]]:
    """Rows of the targets that belong to a model and a recipe, in float32."""
    for target in TARGETS:
        for result in cases:
            case = result.case
            named = case.model.name == target.model and case.recipe.name == target.recipe
            if named and applies(result) and case.dtype_name == "float32":
                found = target.row(result)
                if found:
                    yield found


def fastest_rows(cases: Sequence[CaseResult]) -> Iterator[dict[str, Any]]:
    """In bfloat16, and with the noise and full recipes, gradfused is faster than every peer."""
    for result in cases:
        case = result.case
        asked = case.dtype_name == "bfloat16" or case.recipe.name in ("noise", "full")
        peers, ours = list(result.competitors()), result.ms(OURS)
        if asked and applies(result) and peers and ours:
            best = min(peers, key=lambda record: record.ms_median)
            ratio = best.ms_median / ours
            name = f"{case.recipe.name}, {case.model.name}, {case.dtype_name}"
            title = f"times faster than the best peer, {best.variant}"
            met = None if result.disturbed else ratio > 1
            yield row(name, title, ratio, 1.0, met, sign=">")


def applies(result: CaseResult) -> bool:
    """Whether targets are set for a case's optimizer and device at all."""
    return result.case.rule.name == "adamw" and result.case.device.type == "cpu"
