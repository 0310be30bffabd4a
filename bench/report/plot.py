"""A bar chart of a run, with the roof as a dashed line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cases import CROSS_ENTROPY, NO_REVERSAL, OURS, ROOF, YARDSTICKS, FunctionCase, StepCase
from ..measure import CaseResult, Record, Results
from .sentence import milliseconds
from .tables import environment_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OUR_COLOUR, ROOF_COLOUR = "#d9480f", "#212529"
# Muted colours for peers: blues for torch, greys and greens for other packages.
PEER_COLOURS = {
    "gradfused-triton": "#f2a679",
    "gradfused-cuda": "#f2a679",
    "torch-loop": "#d0dff0",
    "torch-foreach": "#98bade",
    "torch-fused": "#5d8fc0",
    "torch-fused-gradscale": "#2f5f94",
    "torch-compile": "#173a5e",
    "optimi": "#c7c9cc",
    "pytorch_optimizer": "#9a9ea3",
    "deepspeed-cpuadam": "#6c7177",
    "deepspeed-fusedadam": "#6c7177",
    "transformer-engine": "#5f7a52",
    "apex": "#a3b899",
    "bitsandbytes": "#7f9a72",
    "gradfused-layer": "#f2a679",
    "autograd-function": "#98bade",
    "eager-lpg": "#98bade",
    "eager-lpg-frugal": "#5d8fc0",
    "pytorch-revgrad": "#9a9ea3",
}
WITHOUT = "without perturbation or reversal"
BAR = 0.8  # width of a group of bars, where groups are 1 apart


def write_plot(results: Results, path: Path) -> None:
    """Draw milliseconds a step: a panel for each model, in it a group for each recipe, in that a bar for each variant.

    Args:
        results: The results of a run with at least one case.
        path: The path of the image; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = panels_of(results.cases)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width = max(9.0, 5.4 * columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width, 5.6 * rows + 1.9), squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, wspace=0.03)
    flat = list(axes.flat)
    for axis, cases in zip(flat, panels, strict=False):
        draw_panel(axis, cases)
    for axis in flat[len(panels) :]:
        axis.set_visible(False)
    finish(figure, flat, results)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def panels_of(cases: Sequence[CaseResult]) -> list[list[CaseResult]]:
    """The cases of each panel: those that differ only in their recipe share one."""
    panels: dict[tuple[Any, ...], list[CaseResult]] = {}
    for result in cases:
        case = result.case
        panels.setdefault((case.model.name, case.rule_name, case.dtype), []).append(result)
    return list(panels.values())


def draw_panel(axis: Axes, cases: Sequence[CaseResult]) -> None:
    """Draw the groups of one model."""
    for position, result in enumerate(cases):
        draw_group(axis, position, result)
    case = cases[0].case
    tensors = len(case.model.shapes)
    axis.set_title(case.model.name, loc="left", fontsize=13, fontweight="bold")
    axis.set_title(
        f"{case.model.elements / 1e6:.3g}M elements, {tensors} tensor{'s' if tensors > 1 else ''}",
        loc="right",
        fontsize=9,
        color="#495057",
    )
    axis.set_xticks(range(len(cases)), [group_label(result) for result in cases], fontsize=11)
    axis.tick_params(axis="x", length=0)
    axis.set_xlim(-0.55, len(cases) - 0.45)
    axis.set_ylabel(f"ms, {case.work}")
    axis.set_ylim(top=axis.get_ylim()[1] * 1.08)
    axis.yaxis.grid(True, color="#e9ecef")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def group_label(result: CaseResult) -> str:
    """The recipe's name, with a warning if other programs disturbed the measurement."""
    name = result.case.recipe.name
    return f"{name}\n(disturbed)" if result.disturbed else name


def draw_group(axis: Axes, position: int, result: CaseResult) -> None:
    """Draw the bars of one case, slowest first, and its roof."""
    ours, roof = result.ms(OURS), result.ms(ROOF)
    bars = [r for r in result.records if r.variant not in YARDSTICKS]
    bars.sort(key=lambda record: (record.variant == OURS, -record.ms_median))
    width = BAR / max(len(bars), 1)
    for index, record in enumerate(bars):
        x = position - BAR / 2 + (index + 0.5) * width
        mine = record.variant == OURS
        colour = OUR_COLOUR if mine else PEER_COLOURS.get(record.variant, "#adb5bd")
        axis.bar(x, record.ms_median, 0.92 * width, color=colour, label=record.variant)
        label = f"{milliseconds(record.ms_median)} ms" if mine else times(record, ours)
        axis.annotate(
            label,
            (x, record.ms_median),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            rotation=90,
            fontsize=11 if mine else 9,
            fontweight="bold" if mine else "normal",
            color=OUR_COLOUR if mine else "#495057",
        )
    draw_line(axis, position, roof, ls=(0, (3, 1.5)), label=ROOF)
    for name in (CROSS_ENTROPY, NO_REVERSAL):
        draw_line(axis, position, result.ms(name), ls=(0, (1, 1.5)), label=WITHOUT)


def draw_line(axis: Axes, position: int, ms: float | None, **style: Any) -> None:
    """Draw a horizontal line across a group of bars, if there is a figure for it."""
    if ms:
        ends = [position - BAR / 2 - 0.04, position + BAR / 2 + 0.04]
        axis.plot(ends, [ms, ms], color=ROOF_COLOUR, lw=1.6, **style)


def times(record: Record, ours: float | None) -> str:
    """How many times as long as gradfused a variant takes, short enough for the top of a bar."""
    if not ours:
        return ""
    ratio = record.ms_median / ours
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def heading(results: Results) -> str:
    """The first part of the title: what was timed."""
    rules = dict.fromkeys(r.case.rule.class_name for r in results.cases if isinstance(r.case, StepCase))
    steps = [f"One optimizer step, {', '.join(rules)}"] if rules else []
    functions = ["forward and backward"] if any(isinstance(r.case, FunctionCase) for r in results.cases) else []
    dtypes = dict.fromkeys(result.case.dtype_name for result in results.cases)
    text = ", or ".join([*steps, *functions])
    return f"{text[0].upper()}{text[1:]}, {', '.join(dtypes)}"


def finish(figure: Any, axes: Sequence[Axes], results: Results) -> None:
    """Add the title, the description of the machine, and one legend for all panels."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    order = [*PEER_COLOURS, OURS, WITHOUT, ROOF]
    names = sorted(handles, key=lambda name: order.index(name) if name in order else -1)
    case = results.cases[0].case
    roof = "a copy's bandwidth" if case.device.type == "cuda" else "same memory traffic, no math"
    labels = [f"roof: {roof}" if name == ROOF else name for name in names]
    figure.suptitle(
        f"{heading(results)}: lower is better\n\n",
        x=0.012,
        ha="left",
        fontsize=15,
        fontweight="bold",
    )
    width, height = figure.get_size_inches()
    legend_of_bars = "on the bars: gradfused in ms, everyone else as a multiple of it"
    for line, (text, size) in enumerate(((legend_of_bars, 11), (environment_line(results.environment), 9))):
        figure.text(0.012, 1 - (0.53 + 0.22 * line) / height, text, fontsize=size, color="#495057")
    figure.legend(
        [handles[name] for name in names],
        labels,
        loc="outside lower left",
        ncols=max(2, min(5, int(width / 2.9))),
        frameon=False,
        fontsize=11,
    )
