"""The main job: train the recommender in several configurations on the same batches, and report what each costs."""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stamp_kernels.profiling._checks import check_at_least
from stamp_kernels.profiling.commands.report import ConfigurationResult, build_report
from stamp_kernels.profiling.data.batches import Batch, EvaluationRows, TrainingRows, Vocabulary, batches
from stamp_kernels.profiling.data.interactions import Interactions
from stamp_kernels.profiling.data.semantic_ids import assign_semantic_ids
from stamp_kernels.profiling.measure import (
    describe_device,
    describe_versions,
    interleaved_step_times,
    keep_freed_memory,
    peak_bytes,
    resident_bytes,
    summarize,
)
from stamp_kernels.profiling.recommender.evaluate import evaluate
from stamp_kernels.profiling.recommender.recommender import CONFIGURATIONS, RecommenderSettings, build_recommender

__all__ = [
    "CommonSettings",
    "OnProgress",
    "TrainSettings",
    "Trainee",
    "TrainingData",
    "prepare_data",
    "profile_training",
    "train_epochs",
]

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-4
DTYPES = ("float32", "bfloat16")

# What is going on, how much of it is done, and how much there is.
OnProgress = Callable[[str, int, int], object]


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """How configurations are trained, whatever is then measured.

    Attributes:
        configurations: names from `recommender.CONFIGURATIONS`, each once.
        batch_size: sequences per step.
        dtype: "float32", or "bfloat16" for bfloat16 autocast over float32 weights.
        device: what to run on.
        epochs: passes over the training rows.
        max_items, min_items: histories are cut to so many items; training rows with fewer are left out.
        rows: a random sample of so many training rows, the same whatever the seed; None takes all.
        learning_rate: of AdamW, constant.
        model: sizes of the model. Its codes_per_item and its codebook's size give way to those of the data.

    Raises:
        ValueError: a value is out of range, or no configuration has that name.
    """

    configurations: tuple[str, ...]
    batch_size: int
    dtype: str
    device: torch.device
    epochs: int
    max_items: int
    min_items: int = 1
    rows: int | None = None
    learning_rate: float = LEARNING_RATE
    model: RecommenderSettings = field(default_factory=RecommenderSettings)

    def __post_init__(self) -> None:
        if not self.configurations:
            raise ValueError(f"configurations is empty, expected some of {', '.join(CONFIGURATIONS)}")
        for name in self.configurations:
            if name not in CONFIGURATIONS:
                raise ValueError(f"unknown configuration {name!r}, expected some of {', '.join(CONFIGURATIONS)}")
            if self.configurations.count(name) > 1:
                raise ValueError(f"configuration {name!r} is given more than once")
        for name, minimum in {"batch_size": 1, "epochs": 0, "max_items": 1}.items():
            check_at_least(name, getattr(self, name), minimum)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, expected {' or '.join(DTYPES)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected a number above 0")
        _check_model(self.model)

    def describe(self, model: RecommenderSettings) -> dict[str, Any]:
        """What a report says of them, with the sizes that the model has on the data."""
        left_out = ("configurations", "learning_rate", "model")
        return {
            **{name: value for name, value in asdict(self).items() if name not in left_out},
            "device": str(self.device),
            "model": asdict(model),
            "optimizer": {
                "name": "AdamW",
                "learning_rate": self.learning_rate,
                "weight_decay": WEIGHT_DECAY,
                "fused": True,
            },
        }


def _check_model(model: RecommenderSettings) -> None:
    for name in ("num_layers", "d_model", "num_heads", "d_kv", "d_ff"):
        check_at_least(name, getattr(model, name), 1)
    if model.d_kv % 8 or model.d_kv > 256:
        raise ValueError(f"d_kv is {model.d_kv}, expected a multiple of 8 up to 256")
    if not 1 <= model.prune_after_block <= model.num_layers:
        raise ValueError(
            f"prune_after_block is {model.prune_after_block}, expected 1 to {model.num_layers}, the number of layers"
        )
    if not 0 < model.keep_ratio <= 1:
        raise ValueError(f"keep_ratio is {model.keep_ratio}, expected it in (0, 1]")
    if not 0 <= model.dropout < 1:
        raise ValueError(f"dropout is {model.dropout}, expected it in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class TrainSettings(CommonSettings):
    """What `profile_training` runs. `epochs` are trained from fresh weights after the timed steps; 0 for those alone.

    Attributes:
        steps, warmup: timed training steps of each configuration, and those before them that are not timed.
        seed: of the weights, the order of the rows and dropout.
        evaluate: whether to compute the metrics of the test split, without autocast.

    Raises:
        ValueError: as `CommonSettings`.
    """

    steps: int
    warmup: int
    seed: int
    evaluate: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, minimum in {"steps": 1, "warmup": 0, "seed": 0}.items():
            check_at_least(name, getattr(self, name), minimum)


@dataclass(frozen=True, eq=False)
class TrainingData:
    """A data set as the training loop reads it; semantic_ids is int64 `[num_items, codes_per_item]`."""

    interactions: Interactions
    semantic_ids: np.ndarray
    vocabulary: Vocabulary
    training_rows: TrainingRows
    test_rows: EvaluationRows

    def sizes(self, model: RecommenderSettings) -> RecommenderSettings:
        """`model` with the codes_per_item and the codebook of the data."""
        return replace(
            model, codes_per_item=self.vocabulary.codes_per_item, codebook_size=self.vocabulary.codebook_size
        )

    def describe(self) -> dict[str, Any]:
        """What a report says of the data; "checksum" is of every interaction and every semantic ID."""
        checksum = hashlib.sha256()
        for array in (self.interactions.items, self.interactions.offsets, self.semantic_ids):
            checksum.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return {
            "name": self.interactions.name,
            "source": self.interactions.source,
            "users": self.interactions.num_users,
            "items": self.interactions.num_items,
            "interactions": len(self.interactions.items),
            "training_rows": len(self.training_rows),
            "semantic_ids": "residual k-means" if self.interactions.semantic_ids is None else "given",
            "codes_per_item": self.vocabulary.codes_per_item,
            "codebook_size": self.vocabulary.codebook_size,
            "checksum": checksum.hexdigest()[:16],
        }


def prepare_data(interactions: Interactions, settings: CommonSettings) -> TrainingData:
    """Semantic IDs, where there are none, and rows.

    Neither depends on a seed, so that runs with different seeds train on the same tokens.

    Raises:
        ValueError: there are fewer training rows than a batch or `settings.rows` takes, `settings.min_items` is above
            `settings.max_items`, or there are more items than semantic IDs.
        ImportError: semantic IDs have to be made and scikit-learn is missing.
    """
    defaults = RecommenderSettings()
    rows = TrainingRows(interactions, settings.max_items, settings.min_items, settings.rows)
    if len(rows) < settings.batch_size:
        long_enough = "" if settings.min_items == 1 else f" with a history of at least {settings.min_items} items"
        raise ValueError(
            f"batch_size is {settings.batch_size}, expected at most {len(rows)}, "
            f"the number of training rows of {interactions.name}{long_enough}"
        )
    semantic_ids = interactions.semantic_ids
    if semantic_ids is None:
        semantic_ids = assign_semantic_ids(
            interactions, codes_per_item=defaults.codes_per_item, codebook_size=defaults.codebook_size
        )
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
        The report, see `stamp_kernels.profiling.commands.report.build_report`.

    Raises:
        RuntimeError: a loss is not finite.
    """
    report_progress = on_progress or (lambda *_: None)
    if settings.device.type == "cpu":
        keep_freed_memory()
    sizes = data.sizes(settings.model)
    training_batches = [
        batch.to(settings.device)
        for batch in islice(_endless_batches(data, settings, sizes), settings.warmup + settings.steps)
    ]
    trainees = {name: Trainee(name, settings, sizes, settings.seed) for name in settings.configurations}

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
            trainees[name] = Trainee(name, settings, sizes, settings.seed)
            losses[name] = train_epochs(trainees[name], data, partial(report_progress, f"training {name}"))[-1]
        if settings.evaluate:
            report_progress(f"evaluating {name}", 0, 1)
            metrics[name] = trainees[name].evaluate(data)
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
    return build_report(
        results,
        command=command,
        device=describe_device(settings.device),
        versions=describe_versions(),
        data=data.describe(),
        settings=settings.describe(sizes),
    )


class Trainee:
    """One configuration in training, from the weights of a seed.

    Args:
        name: of the configuration.
        settings: how it is trained.
        sizes: of the model, see `TrainingData.sizes`.
        seed: of the weights, the order of the rows and dropout.

    Attributes:
        recommender: the model, in training mode.
        optimizer: its AdamW.
        losses: of each step so far the loss of the next item, without auxiliary terms: scalars on the device.
        tokens_per_block: of each step so far, see `RecommenderOutput`.
    """

    def __init__(self, name: str, settings: CommonSettings, sizes: RecommenderSettings, seed: int) -> None:
        self.name = name
        self.settings = settings
        self.sizes = sizes
        self.seed = seed
        self.recommender = build_recommender(name, sizes, seed=seed).to(settings.device).train()
        # Fused as Hugging Face's Trainer has it: nobody's step should be slowed down by a loop over parameters.
        self.optimizer = torch.optim.AdamW(
            self.recommender.parameters(), lr=settings.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.losses: list[Tensor] = []  # on the device: reading one would be a sync within the step
        self.tokens_per_block: list[list[int]] = []

    def step(self, batch: Batch) -> None:
        """Forward, backward, optimizer, release of the gradients; `batch` is on the device."""
        # Dropout then depends on seed and step alone, not on which other configurations run between two steps. The pair
        # is hashed to the 32 bits that torch's CPU generator takes of a seed: sums would be shared by seeds and steps.
        torch.manual_seed(int(np.random.SeedSequence((self.seed, len(self.losses))).generate_state(1)[0]))
        with torch.autocast(self.settings.device.type, dtype=torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            output = self.recommender(batch)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(output.next_item_loss.detach())
        self.tokens_per_block.append(output.tokens_per_block)

    def evaluate(self, data: TrainingData) -> dict[str, float]:
        """Metrics of the test split, without autocast."""
        return evaluate(
            self.recommender,
            data.test_rows,
            data.vocabulary,
            data.semantic_ids,
            batch_size=self.settings.batch_size,
            device=self.settings.device,
        )

    def mean_loss(self, steps: slice) -> float:
        """Mean of the losses of some steps.

        Raises:
            RuntimeError: it is not finite.
        """
        loss = torch.stack(self.losses[steps]).double().mean().item()
        if not math.isfinite(loss):
            raise RuntimeError(f"{self.name}: the mean training loss is {loss}")
        return loss

    def mean_tokens_per_block(self, steps: slice) -> list[int]:
        """Mean of the tokens that entered each block in some steps."""
        return np.mean(self.tokens_per_block[steps], axis=0).round().astype(int).tolist()


def train_epochs(trainee: Trainee, data: TrainingData, on_step: Callable[[int, int], object]) -> list[float]:
    """Train for the settings' epochs.

    Args:
        trainee: what is trained, not yet at all.
        data: see `prepare_data`.
        on_step: called after each step with the steps done and those there are.

    Returns:
        The mean loss of each epoch, of the next item without auxiliary terms.

    Raises:
        RuntimeError: a mean loss is not finite.
    """
    settings = trainee.settings
    steps_per_epoch = len(data.training_rows) // settings.batch_size
    losses = []
    for epoch in range(settings.epochs):
        for batch in _batches_of_epoch(data, settings, trainee.sizes, trainee.seed, epoch):
            trainee.step(batch.to(settings.device))
            on_step(len(trainee.losses), settings.epochs * steps_per_epoch)
        losses.append(trainee.mean_loss(slice(-steps_per_epoch, None)))
    return losses


def _run_step(trainee: Trainee, training_batches: list[Batch], i: int) -> None:
    trainee.step(training_batches[i])


def _batches_of_epoch(
    data: TrainingData, settings: CommonSettings, sizes: RecommenderSettings, seed: int, epoch: int
) -> Iterator[Batch]:
    return batches(
        data.training_rows,
        settings.batch_size,
        seed,
        data.vocabulary,
        data.semantic_ids,
        sizes.auxiliary_steps,
        epoch=epoch,
    )


def _endless_batches(data: TrainingData, settings: TrainSettings, sizes: RecommenderSettings) -> Iterator[Batch]:
    for epoch in count():
        yield from _batches_of_epoch(data, settings, sizes, settings.seed, epoch)
