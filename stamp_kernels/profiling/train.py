"""The main job: train the recommender in several configurations on the same batches, and report what each costs."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stamp_kernels.profiling.data import Batch, EvaluationRows, TrainingRows, Vocabulary, batches
from stamp_kernels.profiling.evaluate import evaluate
from stamp_kernels.profiling.interactions import Interactions
from stamp_kernels.profiling.measure import (
    describe_device,
    describe_versions,
    interleaved_step_times,
    keep_freed_memory,
    peak_bytes,
    resident_bytes,
    summarize,
)
from stamp_kernels.profiling.recommender import CONFIGURATIONS, RecommenderSettings, build_recommender
from stamp_kernels.profiling.report import ConfigurationResult, build_report
from stamp_kernels.profiling.semantic_ids import assign_semantic_ids

__all__ = ["TrainSettings", "TrainingData", "prepare_data", "profile_training"]

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-4
DTYPES = ("float32", "bfloat16")

# What is going on, how much of it is done, and how much there is.
OnProgress = Callable[[str, int, int], object]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to run, besides the data.

    Attributes:
        configurations: names from `recommender.CONFIGURATIONS`, each once.
        steps, warmup: timed training steps of each configuration, and those before them that are not timed.
        batch_size: sequences per step.
        dtype: "float32", or "bfloat16" for bfloat16 autocast over float32 weights.
        device: what to run on.
        seed: of the weights, the order of the rows and dropout.
        epochs: passes over the training rows from fresh weights, after the timed steps; 0 for the timed steps alone.
        evaluate: whether to compute the metrics of the test split, without autocast.
        max_items: histories are cut to so many items.

    Raises:
        ValueError: a value is out of range, or no configuration has that name.
    """

    configurations: tuple[str, ...]
    steps: int
    warmup: int
    batch_size: int
    dtype: str
    device: torch.device
    seed: int
    epochs: int
    evaluate: bool
    max_items: int

    def __post_init__(self) -> None:
        if not self.configurations:
            raise ValueError(f"configurations is empty, expected some of {', '.join(CONFIGURATIONS)}")
        for name in self.configurations:
            if name not in CONFIGURATIONS:
                raise ValueError(f"unknown configuration {name!r}, expected some of {', '.join(CONFIGURATIONS)}")
            if self.configurations.count(name) > 1:
                raise ValueError(f"configuration {name!r} is given more than once")
        minima = {"steps": 1, "warmup": 0, "batch_size": 1, "seed": 0, "epochs": 0, "max_items": 1}
        for field, minimum in minima.items():
            value = getattr(self, field)
            if value < minimum:
                raise ValueError(f"{field} is {value}, expected at least {minimum}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected {' or '.join(DTYPES)}")


@dataclass(frozen=True, eq=False)
class TrainingData:
    """A data set as the training loop reads it; semantic_ids is int64 `[num_items, levels]`."""

    interactions: Interactions
    semantic_ids: np.ndarray
    vocabulary: Vocabulary
    training_rows: TrainingRows
    test_rows: EvaluationRows

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.interactions.name,
            "source": self.interactions.source,
            "users": self.interactions.num_users,
            "items": self.interactions.num_items,
            "interactions": len(self.interactions.items),
            "training_rows": len(self.training_rows),
            "semantic_ids": "residual k-means" if self.interactions.semantic_ids is None else "given",
            "levels": self.vocabulary.levels,
            "codebook_size": self.vocabulary.codebook_size,
        }


def prepare_data(interactions: Interactions, settings: TrainSettings) -> TrainingData:
    """Semantic IDs, where there are none, and rows.

    The IDs do not depend on `settings.seed`, so that runs with different seeds train on the same tokens.

    Raises:
        ValueError: there are fewer training rows than a batch takes, or more items than semantic IDs.
        ImportError: semantic IDs have to be made and scikit-learn is missing.
    """
    defaults = RecommenderSettings()
    rows = TrainingRows(interactions, settings.max_items)
    if len(rows) < settings.batch_size:
        raise ValueError(
            f"batch_size is {settings.batch_size}, expected at most {len(rows)}, "
            f"the number of training rows of {interactions.name}"
        )
    semantic_ids = interactions.semantic_ids
    if semantic_ids is None:
        semantic_ids = assign_semantic_ids(interactions, levels=defaults.levels, codebook_size=defaults.codebook_size)
    codebook_size = max(defaults.codebook_size, int(semantic_ids.max()) + 1)
    vocabulary = Vocabulary(semantic_ids.shape[1], codebook_size)
    test_rows = EvaluationRows(interactions, "test", settings.max_items)
    return TrainingData(interactions, semantic_ids, vocabulary, rows, test_rows)


def profile_training(
    data: TrainingData, settings: TrainSettings, *, command: str = "", on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Train every configuration on the same batches from weights of the same seed, and report what each costs.

    First the steps are timed, interleaved, each on a batch of its own; then a step on the largest of these batches
    gives the peak memory. With `settings.epochs`, each configuration is then trained from fresh weights. The loss (of
    the next item, without auxiliary terms) and the metrics are those of the longer training. A step is forward,
    backward, AdamW and the release of the gradients; batches are on the device beforehand, so that reading data is not
    part of it. On the CPU freed memory stays with the process, see `keep_freed_memory`.

    Args:
        data: see `prepare_data`.
        settings: what to run.
        command: the shell command, for the report.
        on_progress: called with what is going on, how much of it is done, and how much there is.

    Returns:
        The report, see `stamp_kernels.profiling.report.build_report`.

    Raises:
        RuntimeError: a loss is not finite.
    """
    report_progress = on_progress or (lambda *_: None)
    if settings.device.type == "cpu":
        keep_freed_memory()
    sizes = RecommenderSettings(levels=data.vocabulary.levels, codebook_size=data.vocabulary.codebook_size)
    training_batches = [
        batch.to(settings.device)
        for batch in islice(_endless_batches(data, settings, sizes), settings.warmup + settings.steps)
    ]
    trainees = {name: _Trainee(name, settings, sizes) for name in settings.configurations}

    total = len(trainees) * len(training_batches)
    done = count(1)
    times = interleaved_step_times(
        {name: partial(_run_step, trainee, training_batches) for name, trainee in trainees.items()},
        num_steps=settings.steps,
        warmup=settings.warmup,
        device=settings.device,
        on_step=lambda: report_progress("timing steps", next(done), total),
    )
    timed = slice(settings.warmup, None)
    losses = {name: trainee.mean_loss(timed) for name, trainee in trainees.items()}
    tokens = {name: trainee.mean_tokens_per_block(timed) for name, trainee in trainees.items()}

    largest = max(training_batches, key=lambda batch: (batch.max_seqlen, len(batch.packed_ids)))
    peaks = {}
    for i, (name, trainee) in enumerate(trainees.items(), start=1):
        peaks[name] = peak_bytes(
            partial(trainee.step, largest),
            settings.device,
            resident_bytes=resident_bytes(trainee.recommender, trainee.optimizer),
        )
        report_progress("measuring memory", i, len(trainees))

    metrics: dict[str, dict[str, float] | None] = dict.fromkeys(trainees)
    for name in settings.configurations:
        if settings.epochs > 0:
            trainees[name] = _Trainee(name, settings, sizes)
            on_step = partial(report_progress, f"training {name}")
            losses[name] = _train_epochs(trainees[name], data, settings, sizes, on_step)
        if settings.evaluate:
            report_progress(f"evaluating {name}", 0, 1)
            metrics[name] = evaluate(
                trainees[name].recommender,
                data.test_rows,
                data.vocabulary,
                data.semantic_ids,
                batch_size=settings.batch_size,
                device=settings.device,
            )
            report_progress(f"evaluating {name}", 1, 1)

    results = []
    for name in settings.configurations:
        step_ms = summarize(times[name])
        results.append(
            ConfigurationResult(
                name=name,
                step_ms=step_ms,
                sequences_per_s=1e3 * settings.batch_size / step_ms["median"],
                tokens_per_block=tokens[name],
                peak_bytes=peaks[name],
                loss=losses[name],
                metrics=metrics[name],
            )
        )
    optimizer = {"name": "AdamW", "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "fused": True}
    return build_report(
        results,
        command=command,
        device=describe_device(settings.device),
        versions=describe_versions(),
        data=data.describe(),
        settings={
            **{field: value for field, value in asdict(settings).items() if field != "configurations"},
            "device": str(settings.device),
            "model": asdict(sizes),
            "optimizer": optimizer,
        },
    )


class _Trainee:
    """One configuration in training."""

    def __init__(self, name: str, settings: TrainSettings, sizes: RecommenderSettings) -> None:
        self.name = name
        self.settings = settings
        self.recommender = build_recommender(name, sizes, seed=settings.seed).to(settings.device).train()
        # Fused as Hugging Face's Trainer has it: nobody's step should be slowed down by a loop over parameters.
        self.optimizer = torch.optim.AdamW(
            self.recommender.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.losses: list[Tensor] = []  # next-item losses, on the device: reading one would be a sync within the step
        self.tokens_per_block: list[list[int]] = []

    def step(self, batch: Batch) -> None:
        # Dropout then depends on the step alone, not on which other configurations run between two steps.
        torch.manual_seed(self.settings.seed + len(self.losses))
        with torch.autocast(self.settings.device.type, dtype=torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            output = self.recommender(batch)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(output.next_item_loss.detach())
        self.tokens_per_block.append(output.tokens_per_block)

    def mean_loss(self, steps: slice) -> float:
        loss = torch.stack(self.losses[steps]).double().mean().item()
        if not math.isfinite(loss):
            raise RuntimeError(f"{self.name}: the mean training loss is {loss}")
        return loss

    def mean_tokens_per_block(self, steps: slice) -> list[int]:
        return np.mean(self.tokens_per_block[steps], axis=0).round().astype(int).tolist()


def _run_step(trainee: _Trainee, training_batches: list[Batch], i: int) -> None:
    trainee.step(training_batches[i])


def _batches_of_epoch(
    data: TrainingData, settings: TrainSettings, sizes: RecommenderSettings, epoch: int
) -> Iterator[Batch]:
    return batches(
        data.training_rows,
        settings.batch_size,
        settings.seed,
        data.vocabulary,
        data.semantic_ids,
        sizes.auxiliary_steps,
        epoch=epoch,
    )


def _endless_batches(data: TrainingData, settings: TrainSettings, sizes: RecommenderSettings) -> Iterator[Batch]:
    for epoch in count():
        yield from _batches_of_epoch(data, settings, sizes, epoch)


def _train_epochs(
    trainee: _Trainee,
    data: TrainingData,
    settings: TrainSettings,
    sizes: RecommenderSettings,
    on_step: Callable[[int, int], object],
) -> float:
    """Train for `settings.epochs`; the mean loss of the last one."""
    steps_per_epoch = len(data.training_rows) // settings.batch_size
    for epoch in range(settings.epochs):
        for batch in _batches_of_epoch(data, settings, sizes, epoch):
            trainee.step(batch.to(settings.device))
            on_step(len(trainee.losses), settings.epochs * steps_per_epoch)
    return trainee.mean_loss(slice(-steps_per_epoch, None))
