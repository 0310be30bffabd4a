"""What a run found, and its JSON and CSV forms."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cases.steps import Case
from ..timing.quiet import LIMIT
from ..timing.rounds import Samples

if TYPE_CHECKING:
    from ..cases.functions import FunctionCase

ROOF = "roof"
OURS = "gradfused"
FUSED_PLAIN = "torch-fused-plain"
NO_REVERSAL, CROSS_ENTROPY = "no-reversal", "cross-entropy"
# Neither competitors nor ours: they are there for scale.
YARDSTICKS = frozenset({ROOF, FUSED_PLAIN, NO_REVERSAL, CROSS_ENTROPY, f"{OURS}-reference"})
GRAPH, EVENTS = "graph", "events"  # where a device's time is from


def is_ours(variant: str) -> bool:
    """Whether a variant is gradfused, on whatever backend."""
    return variant == OURS or variant.startswith(f"{OURS}-")


@dataclass(frozen=True)
class Record:
    """One variant of one case.

    Attributes:
        model: Name of the model.
        recipe: Name of the recipe.
        optimizer: Name of the update rule; "none" where a function is measured.
        dtype: Of every tensor.
        device: Where they live.
        variant: Who took the steps.
        ms_median: Milliseconds a step.
        ms_p20: The same, of the fast steps.
        ms_p80: The same, of the slow steps.
        gbps: The byte budget divided by the median time, on CUDA the device's; 1 GB is 10^9 bytes.
        roof_gbps: What the roof reached in the same rounds.
        elements: Of all parameters.
        tensors: Number of parameters.
        ms_device: Median of what a step keeps the device busy, apart from the host; None on a CPU.
        ms_device_p20: The same, of the fast steps.
        ms_device_p80: The same, of the slow steps.
        device_clock: How that was taken: "graph" by replays of a CUDA graph, "events" around ordinary steps.
    """

    model: str
    recipe: str
    optimizer: str
    dtype: str
    device: str
    variant: str
    ms_median: float
    ms_p20: float
    ms_p80: float
    gbps: float
    roof_gbps: float
    elements: int
    tensors: int
    ms_device: float | None = None
    ms_device_p20: float | None = None
    ms_device_p80: float | None = None
    device_clock: str | None = None

    @property
    def ms_on_device(self) -> float:
        """What a step keeps the device busy: all of it, on a CPU."""
        return self.ms_median if self.ms_device is None else self.ms_device

    def as_json(self) -> dict[str, Any]:
        """The fields that have a value."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Skipped:
    """A variant that was not timed.

    Attributes:
        model: Name of the model.
        recipe: Name of the recipe.
        optimizer: Name of the update rule; "none" where a function is measured.
        dtype: Of every tensor.
        device: Where they live.
        variant: Who was not timed.
        reason: Why.
        everywhere: Whether the reason is the machine, not the case.
    """

    model: str
    recipe: str
    optimizer: str
    dtype: str
    device: str
    variant: str
    reason: str
    everywhere: bool = False


def case_fields(case: Case | FunctionCase) -> dict[str, Any]:
    """The fields that records of a case have in common."""
    return {
        "model": case.model.name,
        "recipe": case.recipe.name,
        "optimizer": case.rule_name,
        "dtype": case.dtype_name,
        "device": case.device.type,
    }


def record(
    case: Case | FunctionCase,
    variant: str,
    roof_gbps: float,
    wall: Samples,
    device: Samples | None = None,
    means: str = EVENTS,
) -> Record:
    """The record of a variant.

    Args:
        case: What was measured.
        variant: Who took the steps.
        roof_gbps: What the roof reached.
        wall: What the steps took.
        device: What they kept the device busy, where that is another time.
        means: How that was taken.
    """
    of_device = {} if device is None else {**quantiles(device, "ms_device"), "device_clock": means}
    low, middle, high = quantiles(wall, "ms").values()
    return Record(
        **case_fields(case),
        variant=variant,
        ms_median=middle,
        ms_p20=low,
        ms_p80=high,
        gbps=round(bytes_moved(case, variant) / (device or wall).median / 1e6, 2),
        roof_gbps=round(roof_gbps, 2),
        elements=case.model.elements,
        tensors=len(case.model.shapes),
        **of_device,
    )


def quantiles(samples: Samples, name: str, factor: float = 1.0) -> dict[str, Any]:
    """The quantiles of a record, low to high, to 10 ns."""
    places = {f"{name}_p20": 0.2, name: 0.5, f"{name}_p80": 0.8}  # in the order they are unpacked
    return {key: round(factor * samples.quantile(place), 5) for key, place in places.items()}


def bytes_moved(case: Case | FunctionCase, variant: str) -> int:
    """The byte budget of what a variant computes; leaving a gradient alone moves nothing."""
    if variant == NO_REVERSAL and len(case.model.shapes) == 1:
        return 0
    return (case.plain if variant == FUSED_PLAIN else case).bytes_moved


def roof_record(case: Case | FunctionCase, samples: Samples, roof_gbps: float) -> Record:
    """The roof as a record: the time that the plain rule's streams need at its speed."""
    factor = case.plain.bytes_moved / roof_gbps / 1e6 / samples.median
    low, middle, high = quantiles(samples, "ms", factor).values()
    return Record(
        **case_fields(case),
        variant=ROOF,
        ms_median=middle,
        ms_p20=low,
        ms_p80=high,
        gbps=round(roof_gbps, 2),
        roof_gbps=round(roof_gbps, 2),
        elements=case.model.elements,
        tensors=len(case.model.shapes),
    )


@dataclass
class CaseResult:
    """The records of one case.

    Attributes:
        case: What was measured.
        records: One a variant, in the order of the peers; the roof is last.
        skipped: Variants that were not timed.
        uncaptured: Why a variant is in no CUDA graph, by its name.
        others_share: Of the processors' time, what other programs took during timing.
    """

    case: Case | FunctionCase
    records: list[Record] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    uncaptured: dict[str, str] = field(default_factory=dict)
    others_share: float | None = None

    @property
    def disturbed(self) -> bool:
        """Whether other programs took so much that the figures mean nothing."""
        return self.others_share is not None and self.others_share > LIMIT

    def ms(self, variant: str) -> float | None:
        """A variant's median, or None where it was not timed."""
        found = self.of(variant)
        return None if found is None else found.ms_median

    def of(self, variant: str) -> Record | None:
        """A variant's record, or None where it was not timed."""
        return next((r for r in self.records if r.variant == variant), None)

    def competitors(self) -> Iterator[Record]:
        """Records of peers that compute the same as gradfused."""
        for record in self.records:
            if not is_ours(record.variant) and record.variant not in YARDSTICKS:
                yield record


@dataclass
class Results:
    """A whole run.

    Attributes:
        environment: The machine and the versions, without names or paths.
        cases: In the order they were measured.
        same_on_any_threads: Whether 1 thread and all give the same bits; None if not tried.
        targets: What the issue asks for, and what was measured.
        train: Rows of `--train`.
        left_out: Models that do not fit into memory, with the reason.
    """

    environment: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)
    same_on_any_threads: bool | None = None
    targets: list[dict[str, Any]] = field(default_factory=list)
    train: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        """The records of all cases."""
        return [record for case in self.cases for record in case.records]

    def as_json(self) -> dict[str, Any]:
        """The run as plain values."""
        return {
            "environment": self.environment,
            "records": [record.as_json() for record in self.records],
            "disturbance": [
                {**case_fields(case.case), "others_share": case.others_share, "disturbed": case.disturbed}
                for case in self.cases
            ],
            "skipped": [asdict(skip) for case in self.cases for skip in case.skipped],
            "uncaptured": [
                {**case_fields(case.case), "variant": variant, "reason": reason}
                for case in self.cases
                for variant, reason in case.uncaptured.items()
            ],
            "left_out": self.left_out,
            "targets": self.targets,
            "train": self.train,
        }

    def write_json(self, path: Path) -> None:
        """Writes everything."""
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def write_csv(self, path: Path) -> None:
        """Writes the records, a line each."""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Record)])
            writer.writeheader()
            writer.writerows(asdict(record) for record in self.records)
