"""The report of `stamp-profile train` as a picture."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stamp_kernels.profiling.commands.report import baseline_of, memory_share, speedup, three_digits, write_whole

PADDED_COLOR, PACKED_COLOR = "#9aa5b1", "#1f6feb"
INK, FAINT_INK = "#1f2933", "#616e7c"


def draw_picture(report: dict[str, Any], path: Path) -> None:
    """Draw time and memory of a step side by side, one bar per configuration, as a PNG.

    An existing file is only replaced by a complete one.

    Raises:
        OSError: the file cannot be written.
    """
    configurations = report["configurations"]
    baseline = baseline_of(configurations)
    settings = report["settings"]
    names = [configuration["name"] for configuration in configurations]
    median = [configuration["step_ms"]["median"] for configuration in configurations]
    below = [c["step_ms"]["median"] - c["step_ms"]["p20"] for c in configurations]
    above = [c["step_ms"]["p80"] - c["step_ms"]["median"] for c in configurations]
    megabytes = [configuration["peak_bytes"] / 1e6 for configuration in configurations]

    time_labels = [three_digits(value) for value in median]
    memory_labels = [three_digits(value) for value in megabytes]
    if baseline is not None:
        for i, configuration in enumerate(configurations):
            time_labels[i] += f"  ({speedup(configuration, baseline):.2f}x)"
            memory_labels[i] += f"  ({memory_share(configuration, baseline):.0%})"

    # A Figure with its own canvas instead of pyplot: no window system, and no global state that outlives the call.
    figure = Figure(figsize=(11, 1.9 + 0.42 * len(configurations)), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
    _draw_bars(time_axes, names, median, time_labels, spread=(below, above))
    _draw_bars(memory_axes, names, megabytes, memory_labels)
    time_axes.invert_yaxis()  # both axes share it; the first configuration is on top
    time_axes.set_title("Time of a training step", loc="left", fontsize=11, color=INK)
    time_axes.set_xlabel("milliseconds, median and p20-p80 (lower is better)")
    memory_axes.set_title("Memory at the peak of a step", loc="left", fontsize=11, color=INK)
    memory_axes.set_xlabel("megabytes (lower is better)")
    figure.suptitle(
        f"{report['data']['name']}: {settings['batch_size']} sequences a step, {settings['dtype']}, {report['device']}",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
        color=INK,
        parse_math=False,  # a data set's name may contain "$"
    )
    if baseline is not None:
        figure.supxlabel(f"In brackets: relative to {baseline['name']}", x=0.01, ha="left", fontsize=9, color=FAINT_INK)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def _draw_bars(
    axes: Axes,
    names: list[str],
    values: list[float],
    labels: list[str],
    spread: tuple[list[float], list[float]] | None = None,
) -> None:
    """Horizontal bars, each with its label on the right, after the error bar if there is a spread (below, above)."""
    rows = range(len(names))
    colors = [PADDED_COLOR if name.startswith("padded") else PACKED_COLOR for name in names]
    axes.barh(rows, values, height=0.62, color=colors)
    ends = list(values)
    if spread is not None:
        axes.errorbar(values, rows, xerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=3)
        ends = [value + above for value, above in zip(values, spread[1], strict=True)]
    for row, end, label in zip(rows, ends, labels, strict=True):
        axes.annotate(label, (end, row), (6, 0), textcoords="offset points", va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 1.3 * max(ends))  # room for the longest bar's label
    axes.set_yticks(rows, names)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.xaxis.label.set(fontsize=9, color=FAINT_INK)
    axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#9aa5b1")
