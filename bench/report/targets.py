"""The project's targets: how fast gradfused was meant to become, and whether a run reached it.

They are for AdamW in float32, unless a target says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..cases import CROSS_ENTROPY, FUSED_PLAIN, OURS, ROOF, Case, FunctionCase
from ..measure import CaseResult, Record, Results

Measure = Callable[[CaseResult], "float | None"]
Time = Callable[[Record], float]

FUSED_ADAMS = ("optimi", "apex", "bitsandbytes")  # other packages' fused steps
SAME = 0.99  # relative speed that counts as the same: two runs of one step may differ by as much
FASTER, OTHER_RULES = 1.0, 2.5  # how many times as fast as the best peer AdamW in bfloat16, and other rules, have to be
FIRST_RULES = ("SGD", "Adam", "AdamW")  # rules that the target for other rules is not about


@dataclass(frozen=True)
class Target:
    """A bound on one figure of one case.

    Attributes:
        model: Name of the model, or None for every model.
        recipe: Name of the recipe.
        title: What the figure is, for the table.
        measure: Computes the figure from a case's result, or None if the records for it are missing.
        limit: The bound.
        at_least: The figure must be at least `limit`; otherwise at most.
    """

    model: str | None
    recipe: str
    title: str
    measure: Measure
    limit: float
    at_least: bool = True

    def meant(self, result: CaseResult) -> bool:
        """Whether the target is about a case."""
        case = result.case
        return case.model.name == (self.model or case.model.name) and case.recipe.name == self.recipe

    def row(self, result: CaseResult) -> dict[str, Any] | None:
        """The target as a row of the table, or None if its figure was not measured."""
        value = self.measure(result)
        if value is None:
            return None
        met = value >= self.limit if self.at_least else value <= self.limit
        return row(
            f"{self.recipe}, {result.case.model.name}",
            self.title,
            value,
            self.limit,
            None if result.disturbed else met,
            sign=">=" if self.at_least else "<=",
        )


def row(
    case: str, title: str, value: float | str, limit: float | str, met: bool | None, sign: str = ""
) -> dict[str, Any]:
    """A row of the table; `met` is None if other programs disturbed the measurement."""
    return {
        "case": case,
        "target": title,
        "limit": f"{sign} {limit}".strip(),
        "measured": round(value, 3) if isinstance(value, float) else value,
        "met": met,
    }


def speedup_over(variant: str) -> Measure:
    """The figure: how many times as long as gradfused a variant takes."""

    def measure(result: CaseResult) -> float | None:
        theirs, ours = result.ms(variant), result.ms(OURS)
        return theirs / ours if theirs is not None and ours else None

    return measure


def time_relative_to(variant: str) -> Measure:
    """The figure: how many times as long as a variant gradfused takes."""

    def measure(result: CaseResult) -> float | None:
        theirs, ours = result.ms(variant), result.ms(OURS)
        return ours / theirs if theirs and ours is not None else None

    return measure


def over(model: str, recipe: str, variant: str, limit: float) -> Target:
    """The target that gradfused is at least so many times as fast as a variant."""
    return Target(model, recipe, f"times faster than {variant}", speedup_over(variant), limit)


def within(model: str, recipe: str, variant: str, limit: float) -> Target:
    """The target that gradfused takes at most so many times as long as a variant."""
    title = f"time relative to {variant}"
    return Target(model, recipe, title, time_relative_to(variant), limit, at_least=False)


def wall(record: Record) -> float:
    """How long the caller of a step waits."""
    return record.ms_median


def device(record: Record) -> float:
    """How long a step keeps the device busy."""
    return record.ms_on_device


def over_best(is_meant: Callable[[str], bool], time: Time) -> Measure:
    """The figure: how many times as long as gradfused the fastest of some peers takes."""

    def measure(result: CaseResult) -> float | None:
        ours = result.of(OURS)
        theirs = [time(record) for record in result.competitors() if is_meant(record.variant)]
        return min(theirs) / time(ours) if theirs and ours else None

    return measure


def best_torch(model: str | None, recipe: str, limit: float) -> Target:
    """The target that gradfused is so many times as fast as the fastest peer that needs only torch, by the wall clock."""
    measure = over_best(lambda name: name.startswith("torch-"), wall)
    return Target(model, recipe, "wall clock: times faster than the best torch way", measure, limit)


def never_slower(title: str, time: Time) -> Target:
    """The target that a plain step is no slower than other packages' fused ones."""
    names = f"{title}: times faster than the best of {', '.join(FUSED_ADAMS)}"
    return Target(None, "plain", names, over_best(FUSED_ADAMS.__contains__, time), SAME)


def share_of_roof(result: CaseResult) -> float | None:
    """The figure: gradfused's rate of memory traffic as a share of the roof's."""
    ours = result.of(OURS)
    return ours.gbps / ours.roof_gbps if ours else None


def of_copy(model: str, recipe: str, limit: float) -> Target:
    """The target that gradfused's rate of memory traffic is at least a share of a copy's."""
    return Target(model, recipe, "device: share of a copy's bandwidth", share_of_roof, limit)


LPG_TARGETS = tuple(
    target
    for size in ("8192x1000", "2048x32000")
    for target in (over(size, "lpg", "eager-lpg", 3.0), within(size, "lpg", CROSS_ENTROPY, 1.1))
)

TARGETS = {
    "cpu": (
        over("gpt2", "clip", "torch-fused", 2.5),
        over("gpt2", "clip", "torch-foreach", 5.0),
        over("gpt2", "clip", "torch-loop", 8.0),
        within("gpt2", "clip", FUSED_PLAIN, 1.05),
        over("resnet50", "clip", "torch-fused", 2.5),
        over("small-400", "clip", "torch-fused", 30.0),
        Target("small-400", "clip", "ms a step", lambda result: result.ms(OURS), 1.0, at_least=False),
        within("gpt2", "centralize", ROOF, 1.15),
        over("gpt2", "sam", "torch-fused", 2.5),
        over("gpt2", "ema", "torch-fused", 1.6),
        *LPG_TARGETS,
    ),
    "cuda": (
        of_copy("gpt2", "centralize", 0.92),
        of_copy("llama-1b", "centralize", 0.92),
        best_torch("llama-1b", "clip", 1.6),
        over("llama-1b", "clip", "torch-foreach", 3.0),
        best_torch("resnet50", "clip", 5.0),
        best_torch("small-400", "clip", 15.0),
        best_torch(None, "full", 2.0),
        never_slower("wall clock", wall),
        never_slower("device", device),
    ),
}


def evaluate(results: Results) -> list[dict[str, Any]]:
    """A row for every target that the run has figures for."""
    rows = [*case_rows(results.cases), *fastest_rows(results.cases)]
    if results.same_on_any_threads is not None:
        same = results.same_on_any_threads
        measured = "equal" if same else "different"
        rows.append(row("all models", "bits on 1 thread and on more", measured, "equal", same))
    return rows


def case_rows(cases: Sequence[CaseResult]) -> Iterator[dict[str, Any]]:
    """The rows of the targets for a model and a recipe in float32."""
    for result in cases:
        case = result.case
        for target in TARGETS[case.device.type] if case.dtype_name == "float32" and is_judged(case) else ():
            found = target.row(result) if target.meant(result) else None
            if found:
                yield found


def fastest_rows(cases: Sequence[CaseResult]) -> Iterator[dict[str, Any]]:
    """The rows that compare gradfused with the fastest peer on a CPU, for AdamW and for the other rules."""
    for result in cases:
        case = result.case
        if case.device.type == "cpu" and (asks_to_be_fastest(case) or is_other_rule(case)):
            limit = OTHER_RULES if is_other_rule(case) else FASTER
            yield from best_row(result, limit)


def best_row(result: CaseResult, limit: float) -> Iterator[dict[str, Any]]:
    """The row that compares gradfused with the fastest of its peers, if any were measured."""
    case, peers, ours = result.case, list(result.competitors()), result.ms(OURS)
    if not peers or not ours:
        return
    best = min(peers, key=lambda record: record.ms_median)
    ratio = best.ms_median / ours
    rule = "" if is_adamw(case) else f", {case.rule_name}"
    met = None if result.disturbed else (ratio > limit if limit == FASTER else ratio >= limit)
    yield row(
        f"{case.recipe.name}, {case.model.name}, {case.dtype_name}{rule}",
        f"times faster than the best peer, {best.variant}",
        ratio,
        limit,
        met,
        sign=">" if limit == FASTER else ">=",
    )


def asks_to_be_fastest(case: Case) -> bool:
    """Whether the target of a case is that AdamW is faster than every peer."""
    return is_adamw(case) and (case.dtype_name == "bfloat16" or case.recipe.name in ("noise", "full"))


def is_other_rule(case: Case) -> bool:
    """Whether the target for the other rules is about a case."""
    if isinstance(case, FunctionCase) or case.rule.class_name in FIRST_RULES:
        return False
    return (case.model.name, case.recipe.name, case.dtype_name) == ("gpt2", "clip", "float32")


def is_judged(case: Case) -> bool:
    """Whether a case is a function, or a step of the rule that the targets are for."""
    return isinstance(case, FunctionCase) or is_adamw(case)


def is_adamw(case: Case) -> bool:
    """Whether a case is a step of the rule that the targets are for."""
    return case.rule_name == "adamw"
