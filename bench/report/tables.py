"""The output on the screen: a table for each case, and what holds for the whole run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..cases import CROSS_ENTROPY, FUSED_PLAIN, NO_REVERSAL, OURS, ROOF, is_ours
from ..measure import EVENTS, CaseResult, Record, Results, Skipped
from .sentence import closing_sentence, milliseconds

VERDICTS = {
    True: Text("met", style="green"),
    False: Text("not met", style="bold red"),
    None: Text("disturbed", style="yellow"),
}
LABELS = {
    ROOF: "roof (no math)",
    FUSED_PLAIN: "torch-fused, no recipe",
    CROSS_ENTROPY: "F.cross_entropy, no LPG",
    NO_REVERSAL: "no reversal",
}
HEADINGS = ("ms", "p20 - p80", f"x {OURS}", "GB/s", "% of roof", "time / roof")
CUDA_HEADINGS = ("wall ms", "p20 - p80", f"x {OURS}", "device ms", "p20 - p80", f"x {OURS}", "GB/s", "% of roof")
BUSY = 10.0  # percent of the time; above it, other programs are using the GPU


def print_case(console: Console, result: CaseResult, asked: Sequence[str] | None = None) -> None:
    """Print the table of one case, and why variants have no row in it.

    Args:
        console: Where to print.
        result: The result of the case.
        asked: The peers that were asked for by name; the others are mentioned only if something went wrong.
    """
    console.print()
    console.print(Text(result.case.title, style="bold"))
    console.print(case_table(result))
    if result.disturbed:
        console.print(Text(f"  {disturbance(result)}", style="bold red"))
    for skip in result.skipped:
        if not skip.everywhere and (not skip.expected or skip.variant in (OURS, *(asked or ()))):
            console.print(Text(f"  {skip.variant}: {skip.reason}", style="bold red" if went_wrong(skip) else "dim"))
    for name, reason in result.uncaptured.items():
        console.print(Text(f"  {name}: * between events, not as a CUDA graph: {reason}", style="dim"))


def disturbance(result: CaseResult) -> str:
    """Why the figures of a case cannot be trusted."""
    share = 100 * (result.others_share or 0.0)
    return f"disturbed: other programs took {share:.0f} % of the processors; measure again on a quiet machine"


def went_wrong(skip: Skipped) -> bool:
    """Whether a variant failed or computed something else, as opposed to being unable to do the case."""
    return skip.reason.startswith(("wrong", "failed"))


def case_table(result: CaseResult) -> Table:
    """The table of one case, slowest variant first."""
    on_cuda = result.case.device.type == "cuda"
    table = Table()
    table.add_column("variant")
    for heading in CUDA_HEADINGS if on_cuda else HEADINGS:
        table.add_column(heading, justify="right")
    make_cells = cuda_cells if on_cuda else cells
    for record in sorted(result.records, key=lambda record: -record.ms_median):
        table.add_row(*make_cells(record, result.of(OURS), result.ms(ROOF)), style=row_style(record))
    return table


def cells(record: Record, ours: Record | None, roof_ms: float | None) -> list[str]:
    """A record as the cells of a row."""
    return [*wall_cells(record, ours), *rates(record), ratio(record.ms_median, roof_ms)]


def cuda_cells(record: Record, ours: Record | None, roof_ms: float | None) -> list[str]:
    """A record as the cells of a row with both of its times; the roof has only the device's."""
    device = [
        f"{milliseconds(record.ms_on_device)}{' *' if record.device_clock == EVENTS else ''}",
        spread(record.ms_device_p20, record.ms_device_p80),
        ratio(record.ms_on_device, ours.ms_on_device if ours else None),
    ]
    if record.variant == ROOF:
        device[1] = spread(record.ms_p20, record.ms_p80)
        return ["roof (copy)", "-", "-", "-", *device, *rates(record)]
    return [*wall_cells(record, ours), *device, *rates(record)]


def wall_cells(record: Record, ours: Record | None) -> list[str]:
    """The cells with the name of a variant and how long its caller waited."""
    return [
        LABELS.get(record.variant, record.variant),
        milliseconds(record.ms_median),
        spread(record.ms_p20, record.ms_p80),
        ratio(record.ms_median, ours.ms_median if ours else None),
    ]


def spread(low: float | None, high: float | None) -> str:
    """The range of the middle 60 % of the samples."""
    return "-" if low is None or high is None else f"{milliseconds(low)} - {milliseconds(high)}"


def rates(record: Record) -> list[str]:
    """The cells that compare a record with the roof."""
    return [f"{record.gbps:.1f}", f"{100 * record.gbps / record.roof_gbps:.0f} %"]


def ratio(value: float, of: float | None) -> str:
    """How many times as long a time is as another."""
    return f"{value / of:.2f}" if of else "-"


def row_style(record: Record) -> str:
    """gradfused's rows stand out, and those of yardsticks have a colour of their own."""
    plain = "green" if is_ours(record.variant) else ""
    return "bold green" if record.variant == OURS else "cyan" if record.variant in LABELS else plain


def print_closing(
    console: Console, results: Results, asked: Sequence[str] | None = None, with_targets: bool = False
) -> None:
    """Print what holds for the whole run: missing peers, warnings, the machine, and a sentence that sums it up.

    Args:
        console: Where to print.
        results: The results of the run.
        asked: The peers that were asked for by name; only those are reported as missing.
        with_targets: Print the table of the project's targets too.
    """
    console.print()
    if results.targets and with_targets:
        console.print(target_table(results.targets))
    missing = {skip.variant: skip.reason for case in results.cases for skip in case.skipped if skip.everywhere}
    for name, reason in missing.items():
        if name in (asked or ()):
            console.print(Text(f"not here: {name}: {reason}", style="dim"))
    if results.environment.get("backend") == "reference":
        warning = "gradfused ran its slow reference backend; python -m gradfused says why no other one works here"
        console.print(Text(warning, style="bold red"))
    for left in results.left_out:
        console.print(Text(f"left out: {left['reason']}", style="bold red"))
    busy = results.environment.get("gpu_busy_before_percent", 0.0)
    if busy > BUSY:
        console.print(Text(f"other programs used the GPU before this run, {busy:.0f} % of the time", style="bold red"))
    console.print(Text(environment_line(results.environment), style="dim"))
    sentence = closing_sentence(results)
    if sentence:
        console.print()
        console.print(Text(sentence, style="bold"), soft_wrap=True)


def target_table(rows: Iterable[dict[str, Any]]) -> Table:
    """The project's targets with what was measured."""
    table = Table(title="Targets", title_justify="left", title_style="bold")
    table.add_column("case")
    table.add_column("target")
    table.add_column("limit", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("")
    for row in rows:
        measured = row["measured"]
        text = f"{measured:.2f}" if isinstance(measured, float) else measured
        table.add_row(row["case"], row["target"], row["limit"], text, VERDICTS[row["met"]])
    return table


def environment_line(environment: dict[str, Any]) -> str:
    """The machine in one line."""
    parts = [environment["cpu"], f"{environment['threads']} threads"]
    kernels = environment["isa"] or "no native kernels"
    if "gpu" in environment:
        parts += [
            environment["gpu"],
            f"CUDA {environment['cuda']}",
            f"driver {environment.get('gpu_driver', 'unknown')}",
        ]
        kernels = f"backend {environment['backend']}"
    parts += [f"gradfused {environment['gradfused']} ({kernels})"]
    parts += [f"torch {environment['torch']}", f"Python {environment['python']}"]
    return ", ".join(parts)


def train_table(rows: Iterable[dict[str, Any]]) -> RenderableType:
    """Training runs side by side."""
    table = Table(title="A small CNN on scikit-learn's digits", title_justify="left", title_style="bold")
    table.add_column("optimizer")
    table.add_column("recipe")
    for heading in ("seeds", "test accuracy", "training, s", "in the optimizer, s", "ms a step"):
        table.add_column(heading, justify="right")
    for row in rows:
        style = "bold green" if row["variant"] == OURS else ""
        table.add_row(
            row["variant"],
            row["recipe"],
            str(row["seeds"]),
            f"{100 * row['accuracy_mean']:.2f} +- {100 * row['accuracy_std']:.2f} %",
            f"{row['seconds']:.2f}",
            f"{row['optimizer_seconds']:.2f}",
            f"{row['ms_step']:.3f}",
            style=style,
        )
    return Group(
        table,
        Text("accuracy: mean and standard deviation; times: medians over the seeds", style="dim"),
    )
