"""How well each configuration recommends after the same training, over several seeds."""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from stamp_kernels.profiling.commands.references import reference_metrics
from stamp_kernels.profiling.commands.report import QUALITY_SCHEMA, SeedResult, build_quality_report
from stamp_kernels.profiling.commands.settings import OnProgress, QualitySettings
from stamp_kernels.profiling.commands.trainee import Trainee
from stamp_kernels.profiling.commands.training_data import TrainingData
from stamp_kernels.profiling.measure import describe_device, describe_versions, keep_freed_memory

DEFAULT_CONFIGURATIONS = ("padded-eager", "packed", "packed+sap", "packed+sap+map")

# By configuration and seed, what has been trained.
Results = dict[str, dict[int, SeedResult]]


def measure_quality(
    data: TrainingData,
    settings: QualitySettings,
    *,
    finished: Mapping[str, Mapping[int, SeedResult]] | None = None,
    command: str = "",
    on_report: Callable[[dict[str, Any]], object] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Train every configuration from every seed, and report the metrics of the test split.

    Configurations with the same seed have the same weights and the same batches. All of them are trained from one seed
    before the next, so an interrupted run still compares like with like. Only the seconds of a result depend on what
    ran before it. On the CPU freed memory stays with the process, see `keep_freed_memory`.

    Args:
        data: see `prepare_data`.
        settings: what to run.
        finished: results that need not run again, see `finished_results`.
        command: the shell command, for the report.
        on_report: called with the report so far after each configuration and seed.
        on_progress: see `OnProgress`.

    Returns:
        The report, see `stamp_kernels.profiling.commands.report.build_quality_report`.

    Raises:
        RuntimeError: a loss is not finite.
    """
    report_progress = on_progress or (lambda *_: None)
    if settings.device.type == "cpu":
        keep_freed_memory()
    results: Results = {name: dict((finished or {}).get(name, {})) for name in settings.configurations}
    described = {**_describe(data, settings), "references": reference_metrics(data), "command": command}

    def build() -> dict[str, Any]:
        in_order = {name: [by_seed[seed] for seed in sorted(by_seed)] for name, by_seed in results.items()}
        return build_quality_report(in_order, **described)

    steps = settings.epochs * (len(data.training_set) // settings.batch_size)
    for seed in range(settings.seeds):
        for name, by_seed in results.items():
            if seed not in by_seed:
                on_step = partial(_report_step, report_progress, f"training {name}", seed, settings.seeds)
                trainee = Trainee(name, settings, data, seed)
                start = time.perf_counter()
                epoch_losses = trainee.train_epochs(on_step)
                trained = time.perf_counter()
                report_progress(f"evaluating {name}", seed, settings.seeds)
                metrics = trainee.evaluate()
                evaluated = time.perf_counter()
                by_seed[seed] = SeedResult(seed, metrics, epoch_losses, trained - start, evaluated - trained)
                if on_report is not None:
                    on_report(build())
            report_progress(f"training {name}", (seed + 1) * steps, settings.seeds * steps)
            report_progress(f"evaluating {name}", seed + 1, settings.seeds)
    return build()


def finished_results(path: Path, data: TrainingData, settings: QualitySettings) -> Results:
    """The results of an earlier run in `path`, from which this run continues; empty if there is no such file.

    The settings may have more seeds and more configurations than the file. Everything else has to be equal, so that the
    finished report is the one that a single run would have given.

    Raises:
        ValueError: the file is not such a report, is about other data, settings, versions or another device, or has a
            configuration or a seed that is not in the settings.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return {}
    remedy = "choose another output folder, or remove the file"
    try:
        report = json.loads(path.read_bytes())
        if report["schema"] != QUALITY_SCHEMA:
            raise ValueError(f"schema {report['schema']!r}")
        there = {key: report[key] for key in ("data", "settings", "versions", "device")}
        results = {
            configuration["name"]: {seed["seed"]: SeedResult(**seed) for seed in configuration["seeds"]}
            for configuration in report["configurations"]
        }
        there["settings"].pop("seeds")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: not a report of this version of `stamp-profile quality`; {remedy}") from None

    here = _describe(data, settings)
    here["settings"].pop("seeds")
    differences = _differences(there, json.loads(json.dumps(here)))
    if differences:
        raise ValueError(f"{path}: made with other settings ({'; '.join(differences)}); {remedy}")
    for name, by_seed in results.items():
        for seed in by_seed:
            if name not in settings.configurations or seed >= settings.seeds:
                raise ValueError(f"{path}: has {name} from seed {seed}, which the settings do not have; {remedy}")
    return results


def _describe(data: TrainingData, settings: QualitySettings) -> dict[str, Any]:
    """What the results depend on, as the report shows it."""
    return {
        "device": describe_device(settings.device),
        "versions": describe_versions(),
        "data": data.describe(),
        "settings": settings.describe(data.sizes(settings.model)),
    }


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """The differences between the descriptions of two reports, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = {**there, **here}
        return [line for key in keys for line in _differences(there.get(key), here.get(key), key)]
    return [] if there == here else [f"{name} was {there}, is {here}"]


def _report_step(report_progress: OnProgress, stage: str, seed: int, seeds: int, done: int, steps: int) -> None:
    """Progress over all seeds of a configuration."""
    report_progress(stage, seed * steps + done, seeds * steps)
