"""Train the recommender in several configurations on the same batches, and report what a step of each costs."""

from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from typing import Any

from stamp_kernels.profiling.commands.report import ConfigurationResult, build_report
from stamp_kernels.profiling.commands.settings import OnProgress, TrainSettings
from stamp_kernels.profiling.commands.trainee import Trainee, batches_of_epoch
from stamp_kernels.profiling.commands.training_data import TrainingData
from stamp_kernels.profiling.data.batches import Batch
from stamp_kernels.profiling.measure import (
    describe_device,
    describe_versions,
    interleaved_step_times,
    keep_freed_memory,
    peak_bytes,
    resident_bytes,
    summarize,
)


def profile_training(
    data: TrainingData, settings: TrainSettings, *, command: str = "", on_progress: OnProgress | None = None
) -> dict[str, Any]:
    """Train every configuration on the same batches from weights of the same seed, and report what each costs.

    The steps are timed first, interleaved, each on a batch of its own. A step on the largest of these batches then
    gives the peak memory. With `settings.epochs`, each configuration is trained again from fresh weights, and its loss
    (of the next item, without auxiliary terms) and metrics are those of this longer training. A step is forward,
    backward, AdamW and the release of the gradients. Batches are on the device before it, so it does not read data. On
    the CPU freed memory stays with the process, see `keep_freed_memory`.

    Args:
        data: see `prepare_data`.
        settings: what to run.
        command: the shell command, for the report.
        on_progress: see `OnProgress`.

    Returns:
        The report, see `stamp_kernels.profiling.commands.report.build_report`.

    Raises:
        RuntimeError: a loss is not finite.
    """
    report_progress = on_progress or (lambda *_: None)
    if settings.device.type == "cpu":
        keep_freed_memory()
    training_batches = [
        batch.to(settings.device)
        for batch in islice(_endless_batches(data, settings), settings.warmup + settings.steps)
    ]
    trainees = {name: Trainee(name, settings, data, settings.seed) for name in settings.configurations}

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

    largest = max(training_batches, key=lambda batch: batch.size)
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
            trainees[name] = Trainee(name, settings, data, settings.seed)
            losses[name] = trainees[name].train_epochs(partial(report_progress, f"training {name}"))[-1]
        if settings.evaluate:
            report_progress(f"evaluating {name}", 0, 1)
            metrics[name] = trainees[name].evaluate()
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
        settings=settings.describe(data.sizes(settings.model)),
    )


def _run_step(trainee: Trainee, training_batches: list[Batch], i: int) -> None:
    trainee.step(training_batches[i])


def _endless_batches(data: TrainingData, settings: TrainSettings) -> Iterator[Batch]:
    for epoch in count():
        yield from batches_of_epoch(data, settings, settings.seed, epoch)
