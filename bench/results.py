"""What a run found, and its JSON and CSV forms."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .quiet import LIMIT
from .workload import Case

ROOF = "roof"
OURS = "gradfused"
FUSED_PLAIN = "torch-fused-plain"
# Neither competitors nor ours: they are there for scale.
YARDSTICKS = frozenset({ROOF, FUSED_PLAIN, "gradfused-reference"})


@dataclass(frozen=True)
class Record:
    """One variant of one case.

    Attributes:
        model: Name of the model.
        recipe: Name of the recipe.
        optimizer: Name of the update rule.
        dtype: Of every tensor.
        device: Where they live.
        variant: Who took the steps.
        ms_median: Milliseconds a step.
        ms_p20: The same, of the fast steps.
        ms_p80: The same, of the slow steps.
        gbps: DESIGN 3's byte budget by the median; 1 GB is 10^9 bytes.
        roof_gbps: What the roof reached in the same rounds.
        elements: Of all parameters.
        tensors: Number of parameters.
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


@dataclass(frozen=True)
class Skipped:
    """A variant that was not timed.

    Attributes:
        model: Name of the model.
        recipe: Name of the recipe.
        optimizer: Name of the update rule.
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


def case_fields(case: Case) -> dict[str, str]:
    """The fields that records of a case have in common."""
    return {
        "model": case.model.name,
        "recipe": case.recipe.name,
        "optimizer": case.rule.name,
        "dtype": case.dtype_name,
        "device": case.device.type,
    }


@dataclass
class CaseResult:
    """The records of one case.

    Attributes:
        case: What was measured.
        records: One a variant, in the order of the peers; the roof is last.
        skipped: Variants that were not timed.
        others_share: Of the processors' time, what other programs took during timing.
    """

    case: Case
    records: list[Record] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    others_share: float | None = None

    @property
    def disturbed(self) -> bool:
        """Whether other programs took so much that the figures mean nothing."""
        return self.others_share is not None and self.others_share > LIMIT

    def ms(self, variant: str) -> float | None:
        """A variant's median, or None where it was not timed."""
        return next((r.ms_median for r in self.records if r.variant == variant), None)

    def competitors(self) -> Iterator[Record]:
        """Records of peers that compute the same as gradfused."""
        for record in self.records:
            if record.variant != OURS and record.variant not in YARDSTICKS:
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
    """

    environment: dict[str, Any]
    cases: list[CaseResult] = field(default_factory=list)
    same_on_any_threads: bool | None = None
    targets: list[dict[str, Any]] = field(default_factory=list)
    train: list[dict[str, Any]] = field(default_factory=list)

    @property
    def records(self) -> list[Record]:
        """The records of all cases."""
        return [record for case in self.cases for record in case.records]

    def as_json(self) -> dict[str, Any]:
        """The run as plain values."""
        return {
            "environment": self.environment,
            "records": [asdict(record) for record in self.records],
            "disturbance": [
                {**case_fields(case.case), "others_share": case.others_share, "disturbed": case.disturbed}
                for case in self.cases
            ],
            "skipped": [asdict(skip) for case in self.cases for skip in case.skipped],
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
