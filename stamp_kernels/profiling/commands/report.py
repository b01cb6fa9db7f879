"""What the subcommands of `stamp-profile` found: as a dictionary and a JSON file, as a table, and as a picture."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

__all__ = [
    "QUALITY_SCHEMA",
    "SCHEMA",
    "ConfigurationResult",
    "SeedResult",
    "build_quality_report",
    "build_report",
    "draw_picture",
    "render_quality_table",
    "render_table",
    "write_json",
]

SCHEMA = "stamp-profile-train/1"
QUALITY_SCHEMA = "stamp-profile-quality/1"

PADDED_COLOR, PACKED_COLOR = "#9aa5b1", "#1f6feb"
INK, FAINT_INK = "#1f2933", "#616e7c"


@dataclass(frozen=True)
class ConfigurationResult:
    """What one configuration costs and learns.

    Attributes:
        name: of the configuration.
        step_ms: "median", "p20" and "p80" of a training step in milliseconds.
        sequences_per_s: training rows per second, at the median.
        tokens_per_block: tokens that enter each block of the encoder, padding included, mean over the timed steps.
        peak_bytes: memory at the peak of a training step, with parameters and optimizer state.
        loss: mean training loss of the next item, without auxiliary terms, over the last epoch, or over the timed steps
            where no epochs were trained.
        metrics: "recall@5" and so on of the test split, None where they were not asked for.
    """

    name: str
    step_ms: dict[str, float]
    sequences_per_s: float
    tokens_per_block: list[int]
    peak_bytes: int
    loss: float
    metrics: dict[str, float] | None = None


@dataclass(frozen=True)
class SeedResult:
    """What one configuration learns from one seed.

    Attributes:
        seed: of the weights, the order of the rows and dropout.
        metrics: "recall@5" and so on of the test split.
        epoch_losses: mean training loss of the next item in each epoch, without auxiliary terms; not empty.
        training_s, evaluation_s: seconds that the epochs and the metrics took, reading the data included.
    """

    seed: int
    metrics: dict[str, float]
    epoch_losses: list[float]
    training_s: float
    evaluation_s: float


def build_report(
    results: Sequence[ConfigurationResult],
    *,
    command: str,
    device: str,
    versions: dict[str, str],
    data: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The report as it is saved: plain values only, dated now (UTC), the configurations in the order given.

    Args:
        command: the shell command that made it.
        device, versions: see `stamp_kernels.profiling.measure`.
        data: the data set: "name", "source" in words, and whatever else describes it.
        settings: every other choice that the numbers depend on, "batch_size" and "dtype" among them.
    """
    head = _head(SCHEMA, command=command, device=device, versions=versions, data=data, settings=settings)
    return {**head, "configurations": [asdict(result) for result in results]}


def build_quality_report(
    results: Mapping[str, Sequence[SeedResult]],
    *,
    references: Mapping[str, dict[str, float]],
    command: str,
    device: str,
    versions: dict[str, str],
    data: dict[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The report of `stamp-profile quality` as it is saved: plain values only, dated now (UTC).

    Args:
        results: by configuration, in the order of the report, what each seed learned.
        references: by name, the metrics of what needs no training.
        command, device, versions, data: as in `build_report`.
        settings: every other choice that the numbers depend on.

    Returns:
        The report. Each configuration has its "seeds" and a "summary", empty where there are none: of each metric,
        "loss" (of the last epoch), "training_s" and "evaluation_s" the "mean", the sample standard deviation "std"
        (None for a single seed), "min" and "max" over the seeds.
    """
    head = _head(QUALITY_SCHEMA, command=command, device=device, versions=versions, data=data, settings=settings)
    return {
        **head,
        "references": [{"name": name, "metrics": metrics} for name, metrics in references.items()],
        "configurations": [
            {"name": name, "seeds": [asdict(result) for result in seeds], "summary": _summarize_seeds(seeds)}
            for name, seeds in results.items()
        ],
    }


def _head(schema: str, **described: Any) -> dict[str, Any]:
    return {"schema": schema, "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **described}


def _summarize_seeds(results: Sequence[SeedResult]) -> dict[str, dict[str, float | None]]:
    rows = [
        {
            **result.metrics,
            "loss": result.epoch_losses[-1],
            "training_s": result.training_s,
            "evaluation_s": result.evaluation_s,
        }
        for result in results
    ]
    summary = {}
    for key in rows[0] if rows else ():
        values = np.array([row[key] for row in rows])
        summary[key] = {
            "mean": float(values.mean()),
            "std": float(values.std(ddof=1)) if len(values) > 1 else None,
            "min": float(values.min()),
            "max": float(values.max()),
        }
    return summary


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write a report, whole or not at all: a file that is there is replaced only by a complete one.

    Raises:
        ValueError: if a number is not finite, which JSON cannot say.
        OSError: if the file cannot be written.
    """
    content = json.dumps(report, indent=2, allow_nan=False) + "\n"
    _write_whole(path, lambda file: file.write(content.encode()))


def render_table(report: dict[str, Any]) -> Table:
    """The report as a table; speed-up and memory share are relative to its first padded configuration."""
    configurations = report["configurations"]
    baseline = _baseline(configurations)
    metrics = next((list(c["metrics"]) for c in configurations if c["metrics"] is not None), [])
    settings = report["settings"]

    table = Table(
        title=f"Training step, {settings['batch_size']} sequences, {settings['dtype']}, {report['device']}",
        caption=f"{report['data']['source']}\ntime: median (p20-p80) of {settings['steps']} interleaved steps",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("configuration", no_wrap=True)
    headers = ["ms per\nstep", "speed-\nup", "seq.\nper s", "tokens in\nfirst/last", "peak\nMB", "peak\nshare", "loss"]
    for header in headers + [_metric_header(metric) for metric in metrics]:
        table.add_column(header, justify="right", no_wrap=True)

    for configuration in configurations:
        ms, tokens = configuration["step_ms"], configuration["tokens_per_block"]
        table.add_row(
            configuration["name"],
            f"{_three_digits(ms['median'])} ({_three_digits(ms['p20'])}-{_three_digits(ms['p80'])})",
            "-" if baseline is None else f"{_speedup(configuration, baseline):.2f}x",
            _three_digits(configuration["sequences_per_s"]),
            f"{tokens[0]}/{tokens[-1]}",
            _three_digits(configuration["peak_bytes"] / 1e6),
            "-" if baseline is None else f"{_memory_share(configuration, baseline):.0%}",
            f"{configuration['loss']:.3f}",
            *(f"{configuration['metrics'][metric]:.4f}" for metric in metrics),
        )
    return table


def render_quality_table(report: dict[str, Any]) -> Table:
    """The report of `stamp-profile quality` as a table: references, then each configuration's seeds, mean and range."""
    settings, data = report["settings"], report["data"]
    model = settings["model"]
    metrics = list(report["references"][0]["metrics"])
    epochs = f"{settings['epochs']} epoch{'s' if settings['epochs'] > 1 else ''}"
    table = Table(
        title=f"Quality on the test split, {epochs} of {data['training_rows']:,} rows, {report['device']}",
        caption=(
            f"{data['source']}\n{model['num_layers']} + {model['num_layers']} blocks of width {model['d_model']}; "
            f"mean \u00b1 sample standard deviation, and range, over the seeds"
        ),
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("configuration", no_wrap=True)
    table.add_column("seed", no_wrap=True)
    for header in [*(_metric_header(metric) for metric in metrics), "loss", "training\ns", "evaluation\ns"]:
        table.add_column(header, justify="right", no_wrap=True)

    for reference in report["references"]:
        table.add_row(reference["name"], "", *(f"{reference['metrics'][metric]:.4f}" for metric in metrics))
    # How each column after the seed is written.
    formats = dict.fromkeys(metrics, "{:.4f}".format) | {
        "loss": "{:.3f}".format,
        "training_s": "{:.1f}".format,
        "evaluation_s": "{:.1f}".format,
    }
    for configuration in report["configurations"]:
        table.add_section()
        for i, seed in enumerate(configuration["seeds"]):
            values = {**seed["metrics"], **seed, "loss": seed["epoch_losses"][-1]}
            cells = (write(values[key]) for key, write in formats.items())
            table.add_row(configuration["name"] if i == 0 else "", str(seed["seed"]), *cells)
        if len(configuration["seeds"]) > 1:
            spreads = [(configuration["summary"][key], write) for key, write in formats.items()]
            table.add_row("", "mean", *(f"{write(of['mean'])} \u00b1 {write(of['std'])}" for of, write in spreads))
            table.add_row("", "range", *(f"{write(of['min'])}-{write(of['max'])}" for of, write in spreads))
    return table


def draw_picture(report: dict[str, Any], path: Path) -> None:
    """Draw time and memory of a step side by side, one bar per configuration, as a PNG, whole or not at all.

    Raises:
        OSError: if the file cannot be written.
    """
    configurations = report["configurations"]
    baseline = _baseline(configurations)
    settings = report["settings"]
    names = [configuration["name"] for configuration in configurations]
    median = [configuration["step_ms"]["median"] for configuration in configurations]
    below = [c["step_ms"]["median"] - c["step_ms"]["p20"] for c in configurations]
    above = [c["step_ms"]["p80"] - c["step_ms"]["median"] for c in configurations]
    megabytes = [configuration["peak_bytes"] / 1e6 for configuration in configurations]

    time_labels = [_three_digits(value) for value in median]
    memory_labels = [_three_digits(value) for value in megabytes]
    if baseline is not None:
        for i, configuration in enumerate(configurations):
            time_labels[i] += f"  ({_speedup(configuration, baseline):.2f}x)"
            memory_labels[i] += f"  ({_memory_share(configuration, baseline):.0%})"

    # A Figure with its own canvas, not pyplot: no window system, and nothing global that outlives the call.
    figure = Figure(figsize=(11, 1.9 + 0.42 * len(configurations)), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    time_axes, memory_axes = figure.subplots(1, 2, sharey=True)
    _draw_bars(time_axes, names, median, time_labels, spread=(below, above))
    _draw_bars(memory_axes, names, megabytes, memory_labels)
    time_axes.invert_yaxis()  # of both, they share it: the first configuration on top
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
        parse_math=False,  # a "$" in a data set's name is a "$"
    )
    if baseline is not None:
        figure.supxlabel(f"In brackets: relative to {baseline['name']}", x=0.01, ha="left", fontsize=9, color=FAINT_INK)
    _write_whole(path, lambda file: figure.savefig(file, format="png"))


def _draw_bars(
    axes: Axes,
    names: list[str],
    values: list[float],
    labels: list[str],
    spread: tuple[list[float], list[float]] | None = None,
) -> None:
    """Horizontal bars, each labelled right of its end (and of its spread: below and above)."""
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


def _baseline(configurations: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((c for c in configurations if c["name"].startswith("padded")), None)


def _speedup(configuration: dict[str, Any], baseline: dict[str, Any]) -> float:
    return baseline["step_ms"]["median"] / configuration["step_ms"]["median"]


def _memory_share(configuration: dict[str, Any], baseline: dict[str, Any]) -> float:
    return configuration["peak_bytes"] / baseline["peak_bytes"]


def _metric_header(metric: str) -> str:
    """A metric's name over its cut-off: recall@10 as Recall and @10, ndcg@10 as NDCG and @10."""
    name, at, cutoff = metric.partition("@")
    return f"{'NDCG' if name == 'ndcg' else name.capitalize()}\n{at}{cutoff}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside `path` and move it there once it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
