"""Shows a record: as a table on the screen, as a table in Markdown, and in plots.

`python examples/study_report.py docs/techniques.md` rewrites the tables of a page from the records in the folder next to it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#868e96", "#d9480f", "#2f5f94", "#7f9a72", "#9c36b5", "#e8a33d", "#173a5e", "#5f7a52")
MARKER = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rows(record: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, bool]]]]:
    """For each arm a row of means, and a row of differences to its baseline.

    A row is a label and its cells, each with whether its interval excludes zero.
    """
    for name, arm in record["summary"].items():
        yield (
            name + chosen(record["arms"][name]),
            [(plain(record, key, pair), False) for key, pair in arm["mean"].items()],
        )
        if "minus" in arm:
            cells = [(signed(record, key, pair), abs(pair[0]) > pair[1]) for key, pair in arm["difference"].items()]
            yield f"minus {arm['minus']}", cells


def chosen(arm: dict[str, Any]) -> str:
    """The settings that tuning chose, in parentheses, or nothing if there was no choice."""
    if len(arm["candidates"]) < 2:
        return ""
    return " (" + ", ".join(f"{key} {value}" for key, value in arm["chosen"].items()) + ")"


def plain(record: dict[str, Any], key: str, pair: Sequence[float]) -> str:
    """The mean and the half-width of its interval."""
    digits = record["metrics"][key]["digits"]
    return f"{pair[0]:.{digits}f} ± {pair[1]:.{digits}f}"


def signed(record: dict[str, Any], key: str, pair: Sequence[float]) -> str:
    """The same for a difference, with a sign and one more decimal."""
    digits = record["metrics"][key]["digits"] + 1
    return f"{pair[0]:+.{digits}f} ± {pair[1]:.{digits}f}"


def headings(record: dict[str, Any]) -> list[str]:
    """The headings of the columns, each with an arrow towards what is better."""
    return [f"{m['label']} {'↑' if m['higher'] else '↓'}" for m in record["metrics"].values()]


def table(record: dict[str, Any]) -> Table:
    """A record as a table for the terminal."""
    settings = record["settings"]
    title = f"{record['title']}: {settings['seeds']} seeds, {settings['epochs']} epochs, mean ± 95 % interval"
    out = Table(title=title, title_justify="left")
    out.add_column("")
    for heading in headings(record):
        out.add_column(heading, justify="right")
    for label, cells in rows(record):
        difference = label.startswith("minus ")
        texts = [Text(text, style="bold" if sure else "") for text, sure in cells]
        out.add_row(Text("  " + label if difference else label, style="dim" if difference else ""), *texts)
    return out


def markdown(record: dict[str, Any]) -> str:
    """A record as a table for a page, with differences in italics, bold where their interval excludes zero."""
    lines = ["| | " + " | ".join(headings(record)) + " |", "|---|" + "---:|" * len(record["metrics"])]
    for label, cells in rows(record):
        difference = label.startswith("minus ")
        texts = [f"**{text}**" if sure else text for text, sure in cells]
        lines.append(f"| {'*' + label + '*' if difference else label} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def with_tables(page: str, records: Path) -> str:
    """The page with its marked tables made anew from the records in a folder."""

    def fill(found: re.Match[str]) -> str:
        record = json.loads((records / f"{found[2]}.json").read_text())
        return found[1] + markdown(record) + found[3]

    return MARKER.sub(fill, page)


def runs_of(record: dict[str, Any], arm: str) -> Iterator[dict[str, Any]]:
    """The runs of an arm, in the order of their seeds."""
    return (run for run in record["runs"] if run["arm"] == arm)


# ---- plots


def figure(columns: int, title: str, *, width: float = 4.4, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """A figure with a row of empty panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    drawn.set_layout_engine("constrained")
    drawn.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#e9ecef")
        axis.set_axisbelow(True)
    return drawn, list(axes[0])


def save(drawn: Figure, path: Path) -> None:
    """Write a figure as a PNG with a palette, which takes a third of the bytes, and close it."""
    from matplotlib import pyplot as plt
    from PIL import Image

    drawn.savefig(path, dpi=110)
    plt.close(drawn)
    Image.open(path).convert("RGB").quantize(200).save(path, optimize=True)


def band(axis: Axes, curves: Sequence[Sequence[float]], label: str, colour: str, stride: float = 1) -> None:
    """Draw the median of several runs' curves and a band for the middle half of them. Points are ``stride`` apart."""
    import numpy as np

    values = np.asarray(curves, dtype=float)
    at = stride * np.arange(values.shape[1])
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
    axis.plot(at, middle, color=colour, lw=1.5, label=label)
    axis.fill_between(at, low, high, color=colour, alpha=0.18, lw=0)


def curves(axis: Axes, record: dict[str, Any], key: str, labels: Mapping[str, str], stride: float = 1) -> None:
    """Draw the band of each arm under its label, from the curve that its runs keep under ``key``."""
    for (arm, label), colour in zip(labels.items(), COLOURS, strict=False):
        band(axis, [run["extra"][key] for run in runs_of(record, arm)], label, colour, stride)
    axis.legend(frameon=False)


def dots(axis: Axes, record: dict[str, Any], key: str, arms: Sequence[str] | None = None) -> None:
    """Draw a metric: each run as a dot and each arm's interval, arms from top to bottom."""
    names = list(record["summary"]) if arms is None else list(arms)
    for place, name in enumerate(names):
        values = [run["metrics"][key] for run in runs_of(record, name)]
        mean, half = record["summary"][name]["mean"][key]
        colour = COLOURS[list(record["summary"]).index(name) % len(COLOURS)]
        spots = [place + 0.22 * (i / max(1, len(values) - 1) - 0.5) for i in range(len(values))]
        axis.plot(values, spots, "o", ms=3.5, color=colour, alpha=0.35, mec="none")
        axis.errorbar(mean, place, xerr=half, fmt="D", ms=5, color=colour, capsize=3)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    metric = record["metrics"][key]
    axis.set_xlabel(f"{metric['label']}\n({'higher' if metric['higher'] else 'lower'} is better)")


def main(arguments: Sequence[str]) -> int:
    """Rewrite the tables of the named pages. Returns the exit status."""
    if not arguments:
        print("expected the pages whose tables to write, e.g. docs/techniques.md", file=sys.stderr)
        return 2
    for page in map(Path, arguments):
        page.write_text(with_tables(page.read_text(), page.with_suffix("")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
