"""How well each configuration recommends after the same training, over several seeds."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stamp_kernels.profiling._checks import check_at_least
from stamp_kernels.profiling.commands.report import QUALITY_SCHEMA, SeedResult, build_quality_report
from stamp_kernels.profiling.commands.train import CommonSettings, OnProgress, Trainee, TrainingData, train_epochs
from stamp_kernels.profiling.data.interactions import in_training_part
from stamp_kernels.profiling.measure import describe_device, describe_versions, keep_freed_memory
from stamp_kernels.profiling.recommender.evaluate import CUTOFFS

__all__ = [
    "DEFAULT_CONFIGURATIONS",
    "QualitySettings",
    "finished_results",
    "measure_quality",
    "reference_metrics",
]

DEFAULT_CONFIGURATIONS = ("padded-eager", "packed", "packed+sap", "packed+sap+map")

# By configuration, what each seed that has been trained learned.
Results = dict[str, dict[int, SeedResult]]


@dataclass(frozen=True, kw_only=True)
class QualitySettings(CommonSettings):
    """What `measure_quality` runs.

    Attributes:
        seeds: every configuration is trained from the seeds 0 to `seeds - 1`.

    Raises:
        ValueError: as `CommonSettings`.
    """

    seeds: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "epochs"):
            check_at_least(name, getattr(self, name), 1)


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

    A seed gives the configurations the same weights and the same batches. All of them are trained from one seed before
    the next, so that a run that is cut short still compares like with like. Nothing of a result but its seconds depends
    on what ran before it. On the CPU freed memory stays with the process, see `keep_freed_memory`.

    Args:
        data: see `prepare_data`.
        settings: what to run.
        finished: what need not run again, see `finished_results`.
        command: the shell command, for the report.
        on_report: called with the report so far after each configuration and seed.
        on_progress: called with what is going on, how much of it is done, and how much there is.

    Returns:
        The report, see `stamp_kernels.profiling.commands.report.build_quality_report`.

    Raises:
        RuntimeError: a loss is not finite.
    """
    report_progress = on_progress or (lambda *_: None)
    if settings.device.type == "cpu":
        keep_freed_memory()
    results: Results = {name: dict((finished or {}).get(name, {})) for name in settings.configurations}
    sizes = data.sizes(settings.model)
    described = {**_describe(data, settings), "references": reference_metrics(data), "command": command}

    def build() -> dict[str, Any]:
        in_order = {name: [by_seed[seed] for seed in sorted(by_seed)] for name, by_seed in results.items()}
        return build_quality_report(in_order, **described)

    steps = settings.epochs * (len(data.training_rows) // settings.batch_size)
    for seed in range(settings.seeds):
        for name, by_seed in results.items():
            if seed not in by_seed:
                on_step = partial(_report_step, report_progress, f"training {name}", seed, settings.seeds)
                trainee = Trainee(name, settings, sizes, seed)
                start = time.perf_counter()
                epoch_losses = train_epochs(trainee, data, on_step)
                trained = time.perf_counter()
                report_progress(f"evaluating {name}", seed, settings.seeds)
                metrics = trainee.evaluate(data)
                evaluated = time.perf_counter()
                by_seed[seed] = SeedResult(seed, metrics, epoch_losses, trained - start, evaluated - trained)
                if on_report is not None:
                    on_report(build())
            report_progress(f"training {name}", (seed + 1) * steps, settings.seeds * steps)
            report_progress(f"evaluating {name}", seed + 1, settings.seeds)
    return build()


def finished_results(path: Path, data: TrainingData, settings: QualitySettings) -> Results:
    """What an earlier run left in `path`, so that it can be gone on with; nothing where there is no such file.

    More seeds and more configurations than in the file may be asked for. Everything else has to be the same, so that
    the finished report is the one that a single run would have given.

    Raises:
        ValueError: the file is no such report, is of other data, settings, versions or another device, or has a
            configuration or a seed that is not asked for.
        OSError: the file cannot be read.
    """
    if not path.exists():
        return {}
    remedy = "take another output folder, or remove the file"
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
        raise ValueError(f"{path}: not a report of `stamp-profile quality`; {remedy}") from None

    here = _describe(data, settings)
    here["settings"].pop("seeds")
    differences = _differences(there, json.loads(json.dumps(here)))
    if differences:
        raise ValueError(f"{path}: made with other settings ({'; '.join(differences)}); {remedy}")
    for name, by_seed in results.items():
        for seed in by_seed:
            if name not in settings.configurations or seed >= settings.seeds:
                raise ValueError(f"{path}: has {name} from seed {seed}, which is not asked for; {remedy}")
    return results


def reference_metrics(data: TrainingData) -> dict[str, dict[str, float]]:
    """Metrics of the test split without training: what the recommenders have to beat.

    Items that share a semantic ID count as one, as in `evaluate`.

    Returns:
        By name: "chance", the expectation of a random order; "popularity", semantic IDs by how often they occur in the
        training part, equal ones in their own order; "popularity, unseen", the same without what the user had before.
        Each has recall@k and ndcg@k for k of CUTOFFS.
    """
    interactions = data.interactions
    _, id_of_item = np.unique(data.semantic_ids, axis=0, return_inverse=True)
    ids = id_of_item.reshape(-1)[interactions.items]
    num_ids = int(id_of_item.max()) + 1
    popularity = np.bincount(ids[in_training_part(interactions)], minlength=num_ids)
    rank_of_id = np.empty(num_ids, dtype=np.int64)
    rank_of_id[np.argsort(-popularity, kind="stable")] = np.arange(num_ids)

    user = np.repeat(np.arange(interactions.num_users), np.diff(interactions.offsets))
    is_target = np.zeros(len(ids), dtype=bool)
    is_target[data.test_rows.target] = True
    ranks = rank_of_id[ids[is_target]]  # one a user, in their order
    had_user, had_rank = np.unique(np.stack([user[~is_target], rank_of_id[ids[~is_target]]]), axis=1)
    # What the user had moves up from before the target; the target itself, where it was had, is not recommended at all.
    moved_up = np.bincount(had_user[had_rank < ranks[had_user]], minlength=interactions.num_users)
    unseen_ranks = ranks - moved_up
    unseen_ranks[had_user[had_rank == ranks[had_user]]] = num_ids + max(CUTOFFS)  # below every cut-off
    return {
        "chance": _metrics_of_ranks(np.arange(num_ids)),
        "popularity": _metrics_of_ranks(ranks),
        "popularity, unseen": _metrics_of_ranks(unseen_ranks),
    }


def _metrics_of_ranks(ranks: np.ndarray) -> dict[str, float]:
    """recall@k and ndcg@k of targets at these ranks, which count from 0."""
    gains = 1 / np.log2(ranks + 2)
    recall = {f"recall@{k}": float((ranks < k).mean()) for k in CUTOFFS}
    return recall | {f"ndcg@{k}": float(np.where(ranks < k, gains, 0).mean()) for k in CUTOFFS}


def _describe(data: TrainingData, settings: QualitySettings) -> dict[str, Any]:
    """What the results depend on, as the report says it."""
    return {
        "device": describe_device(settings.device),
        "versions": describe_versions(),
        "data": data.describe(),
        "settings": settings.describe(data.sizes(settings.model)),
    }


def _differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Where two reports' descriptions differ, in words."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = {**there, **here}
        return [line for key in keys for line in _differences(there.get(key), here.get(key), key)]
    return [] if there == here else [f"{name} was {there}, is {here}"]


def _report_step(report_progress: OnProgress, stage: str, seed: int, seeds: int, done: int, steps: int) -> None:
    """Progress over all seeds of a configuration."""
    report_progress(stage, seed * steps + done, seeds * steps)
