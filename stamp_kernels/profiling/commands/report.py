"""The reports of the subcommands, as dictionaries and as JSON files."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# Version 2: "codes_per_item" was called "levels" in version 1.
SCHEMA = "stamp-profile-train/2"
QUALITY_SCHEMA = "stamp-profile-quality/2"


@dataclass(frozen=True)
class ConfigurationResult:
    """What a training step of one configuration costs, and what the configuration learns.

    Attributes:
        name: of the configuration.
        step_ms: "median", "p20" and "p80" of a training step in milliseconds.
        sequences_per_s: training rows per second, at the median.
        tokens_per_block: tokens that enter each block of the encoder, including padding, mean over the timed steps.
        peak_bytes: memory at the peak of a training step, including parameters and optimizer state.
        loss: mean training loss of the next item, without auxiliary terms, over the last epoch, or over the timed steps
            if no epochs were trained.
        metrics: "recall@5" and so on of the test split, None if they were not computed.
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
        training_s, evaluation_s: seconds that the epochs and the metrics took, including reading the data.
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
    """The report of `stamp-profile train` as it is saved: only plain values, dated now (UTC).

    Args:
        results: of the configurations, in the order of the report.
        command: the shell command that made it.
        device, versions: see `stamp_kernels.profiling.measure`.
        data: the data set: "name", "source" in words, and more that describes it.
        settings: every other choice that the numbers depend on, among them "batch_size" and "dtype".
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
    """The report of `stamp-profile quality` as it is saved: only plain values, dated now (UTC).

    Args:
        results: by configuration, in the order of the report, the results of its seeds.
        references: by name, the metrics that need no training.
        command, device, versions, data: as in `build_report`.
        settings: every other choice that the numbers depend on.

    Returns:
        The report. Each configuration has its "seeds" and a "summary", which is empty without seeds: "mean", sample
        standard deviation "std" (None for a single seed), "min" and "max" over the seeds, for each metric, "loss" (of
        the last epoch), "training_s" and "evaluation_s".
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
    summary: dict[str, dict[str, float | None]] = {}
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
    """Write a report. An existing file is only replaced by a complete one.

    Raises:
        ValueError: a number is not finite, so JSON cannot hold it.
        OSError: the file cannot be written.
    """
    content = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(content.encode()))


def baseline_of(configurations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first padded configuration, which the others are compared with; None if there is none."""
    return next((c for c in configurations if c["name"].startswith("padded")), None)


def speedup(configuration: dict[str, Any], baseline: dict[str, Any]) -> float:
    """How many times faster than the baseline, at the medians."""
    ratio: float = baseline["step_ms"]["median"] / configuration["step_ms"]["median"]
    return ratio


def memory_share(configuration: dict[str, Any], baseline: dict[str, Any]) -> float:
    """Peak memory as a share of the baseline's."""
    share: float = configuration["peak_bytes"] / baseline["peak_bytes"]
    return share


def three_digits(value: float) -> str:
    """A value of at least 100 as a whole number, a smaller one with three significant digits."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file next to `path` and move it there once it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
