"""What a run found: records of variants, and the JSON and CSV files of a whole run."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..cases import FUSED_PLAIN, NO_REVERSAL, ROOF, YARDSTICKS, Case, is_ours
from ..timing import BUSY_LIMIT, Samples

GRAPH, EVENTS = "graph", "events"  # how the time of a GPU was taken


@dataclass(frozen=True)
class VariantOfCase:
    """One variant in one case.

    Attributes:
        model: Name of the model or size.
        recipe: Name of the recipe or function.
        optimizer: Name of the update rule; "none" for a function.
        dtype: The type of every tensor.
        device: The type of device.
        variant: Name of the variant.
    """

    model: str
    recipe: str
    optimizer: str
    dtype: str
    device: str
    variant: str


@dataclass(frozen=True)
class Record(VariantOfCase):
    """The figures of one variant in one case.

    Attributes:
        ms_median: Median time of a step in milliseconds.
        ms_p20: The 20th percentile, a fast step.
        ms_p80: The 80th percentile, a slow step.
        gbps: The bytes that the case has to move, divided by the median, on CUDA by the device's; 1 GB is 10^9 bytes.
        roof_gbps: The rate of the roof in the same rounds.
        elements: Elements of all parameters, or of a function's main tensor.
        tensors: The number of parameters, or of tensors that get a gradient.
        ms_device: Median time in milliseconds that a step keeps the GPU busy; None on a CPU.
        ms_device_p20: The 20th percentile of that time.
        ms_device_p80: The 80th percentile of that time.
        device_clock: "graph" if that time is from replays of a CUDA graph, "events" if from events around ordinary steps.
    """

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
        """How long a step keeps the device busy; on a CPU that is the whole step."""
        return self.ms_median if self.ms_device is None else self.ms_device

    def as_json(self) -> dict[str, Any]:
        """The fields that have a value."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Skipped(VariantOfCase):
    """A variant that was not timed.

    Attributes:
        reason: Why it was not timed.
        everywhere: The reason is this machine, where the variant is missing, and not the case.
        expected: The peer itself says that it is missing or cannot do the case; nothing went wrong. Not part of the JSON.
    """

    reason: str
    everywhere: bool = False
    expected: bool = False

    def as_json(self) -> dict[str, Any]:
        """The fields of the JSON file."""
        return {key: value for key, value in asdict(self).items() if key != "expected"}


def case_fields(case: Case) -> dict[str, Any]:
    """The fields that all records of a case share."""
    return {
        "model": case.model.name,
        "recipe": case.recipe.name,
        "optimizer": case.rule_name,
        "dtype": case.dtype_name,
        "device": case.device.type,
    }


def record(
    case: Case,
    variant: str,
    roof_gbps: float,
    wall: Samples,
    device: Samples | None = None,
    means: str = EVENTS,
) -> Record:
    """The record of a variant.

    Args:
        case: The case.
        variant: Name of the variant.
        roof_gbps: The rate of the roof.
        wall: How long its caller waited for each step.
        device: How long each step kept the device busy, where that is a different time.
        means: How that time was taken, `GRAPH` or `EVENTS`.
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
    """The three quantiles of a record from low to high, rounded to 10 ns."""
    places = {f"{name}_p20": 0.2, name: 0.5, f"{name}_p80": 0.8}  # callers unpack them in this order
    return {key: round(factor * samples.quantile(place), 5) for key, place in places.items()}


def bytes_moved(case: Case, variant: str) -> int:
    """The bytes that a variant of a case has to move; passing a gradient on without reversal moves none."""
    if variant == NO_REVERSAL and len(case.model.shapes) == 1:
        return 0
    return (case.plain if variant == FUSED_PLAIN else case).bytes_moved


def roof_record(case: Case, samples: Samples, roof_gbps: float) -> Record:
    """The roof as a record: the time that the bytes of the plain rule take at its rate."""
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
        case: The case.
        records: One for each variant that was timed, in the order of the peers; the roof is last.
        skipped: The variants that were not timed.
        uncaptured: For a variant that is in no CUDA graph, by its name, the reason.
        others_share: The share of the processors that other programs took while the case was timed.
    """

    case: Case
    records: list[Record] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    uncaptured: dict[str, str] = field(default_factory=dict)
    others_share: float | None = None

    @property
    def disturbed(self) -> bool:
        """Whether other programs took so much that the figures cannot be trusted."""
        return self.others_share is not None and self.others_share > BUSY_LIMIT

    def ms(self, variant: str) -> float | None:
        """The median of a variant, or None if it was not timed."""
        found = self.of(variant)
        return None if found is None else found.ms_median

    def of(self, variant: str) -> Record | None:
        """The record of a variant, or None if it was not timed."""
        return next((r for r in self.records if r.variant == variant), None)

    def competitors(self) -> Iterator[Record]:
        """The records of the peers that compute the same as gradfused."""
        for record in self.records:
            if not is_ours(record.variant) and record.variant not in YARDSTICKS:
                yield record


@dataclass
class Results:
    """The results of a whole run.

    Attributes:
        environment: The machine and the versions, without names or paths.
        cases: The cases in the order in which they were measured.
        same_on_any_threads: Whether gradfused computes the same bits on 1 thread and on all; None if not tried.
        targets: The project's targets with what was measured.
        train: The rows of `--train`.
        left_out: The models that do not fit into memory, with the reason.
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
            "skipped": [skip.as_json() for case in self.cases for skip in case.skipped],
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
        """Write everything."""
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def write_csv(self, path: Path) -> None:
        """Write the records, a line each."""
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Record)])
            writer.writeheader()
            writer.writerows(asdict(record) for record in self.records)
