"""Measures training steps of the six configurations of `stamp-profile train` under bfloat16 autocast.

    python benchmarks/gpu/training.py --results FILE [--data FILE] [--rehearse]

Each configuration runs in small and in large batches. Its measurements are the time between two synchronisations, the
part of it until the CPU has launched everything, the time of the kernels and the number of launches (torch's profiler,
over a few more steps), and the peak memory. Histories are truncated as in `stamp-profile train`. Without a data file
they are random, and are truncated to the same length.
"""

import gc
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from cases import Case, SkipError, arguments_of_part, leave, run_part
from device import Device
from records import Record

from stamp_kernels.profiling.commands.settings import TrainSettings
from stamp_kernels.profiling.commands.trainee import Trainee
from stamp_kernels.profiling.commands.training_data import TrainingData, prepare_data
from stamp_kernels.profiling.data.batches import Batch, batches
from stamp_kernels.profiling.data.interactions import Interactions, load_interactions
from stamp_kernels.profiling.measure import keep_freed_memory, peak_bytes, resident_bytes
from stamp_kernels.profiling.recommender.recommender import CONFIGURATIONS, RecommenderSettings

SHOWN_KERNELS, SHOWN_CHARACTERS = 8, 60


class Sizes(NamedTuple):
    """What the part runs, in full or in a rehearsal."""

    batch_sizes: tuple[int, ...]
    max_items: int
    steps: int
    warmup: int
    profiled: int
    users: int
    model: RecommenderSettings


FULL = Sizes((256, 2048), max_items=30, steps=20, warmup=5, profiled=3, users=2000, model=RecommenderSettings())
SMALL_MODEL = RecommenderSettings(num_layers=2, d_model=16, num_heads=2, d_kv=8, d_ff=16, prune_after_block=1)
SMALL = Sizes((4,), max_items=2, steps=2, warmup=1, profiled=1, users=20, model=SMALL_MODEL)


def made_interactions(users: int) -> Interactions:
    """Random items, with semantic IDs."""
    rng = np.random.default_rng(0)
    num_items, lengths = 2000, rng.integers(3, 60, users)
    return Interactions(
        name="made",
        items=rng.integers(0, num_items, lengths.sum()),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        num_items=num_items,
        semantic_ids=rng.integers(0, RecommenderSettings().codebook_size, (num_items, 4)),
        source=f"{users} users, made",
    )


def settings_of(sizes: Sizes, batch_size: int, device: torch.device) -> TrainSettings:
    return TrainSettings(
        configurations=CONFIGURATIONS, steps=sizes.steps, warmup=sizes.warmup, batch_size=batch_size,
        dtype="bfloat16", device=device, seed=0, epochs=0, evaluate=False, max_items=sizes.max_items, model=sizes.model,
    )  # fmt: skip


@cache
def training_data(file: Path | None, sizes: Sizes) -> TrainingData:
    """The same rows serve every batch size."""
    interactions = made_interactions(sizes.users) if file is None else load_interactions(file)
    return prepare_data(interactions, settings_of(sizes, 1, torch.device("cpu")))


def batches_on(device: Device, data: TrainingData, settings: TrainSettings) -> list[Batch]:
    """One batch per warm-up step and timed step. They repeat if the data has fewer."""
    epoch = batches(data.training_set, settings.batch_size, settings.seed, settings.model.auxiliary_steps)
    return [batch.to(device.device) for batch in islice(cycle(epoch), settings.warmup + settings.steps)]


def measure(device: Device, configuration: str, batch_size: int, sizes: Sizes, file: Path | None) -> Iterator[Record]:
    data = training_data(file, sizes)
    settings = settings_of(sizes, batch_size, device.device)
    training_batches = batches_on(device, data, settings)
    try:
        trainee = Trainee(configuration, settings, data, settings.seed)
        yield {
            "configuration": configuration,
            "batch_size": batch_size,
            "data": data.interactions.name,
            **step_times(device, trainee, training_batches, settings.warmup),
            **kernel_times(device, trainee, training_batches[-sizes.profiled :]),
            "peak_bytes": peak_of(device, trainee, training_batches),
        }
    except torch.OutOfMemoryError as error:
        raise SkipError("out of memory") from error


def step_times(device: Device, trainee: Trainee, training_batches: list[Batch], warmup: int) -> Record:
    """Milliseconds of a step until the device has finished, and until the CPU has."""
    until_done, until_launched = [], []
    gc.collect()
    gc.disable()
    try:
        for i, batch in enumerate(training_batches):
            device.synchronize()
            start = time.perf_counter()
            trainee.step(batch)
            launched = time.perf_counter()
            device.synchronize()
            if i >= warmup:
                until_done.append(1e3 * (time.perf_counter() - start))
                until_launched.append(1e3 * (launched - start))
    finally:
        gc.enable()
    p25, median, p75 = statistics.quantiles(until_done, n=4, method="inclusive")
    return {
        "step_ms": round(median, 3),
        "p25_ms": round(p25, 3),
        "p75_ms": round(p75, 3),
        "host_ms": round(statistics.median(until_launched), 3),
        "timed_steps": len(until_done),
    }


def kernel_times(device: Device, trainee: Trainee, profiled: list[Batch]) -> Record:
    """The milliseconds and launches of a step on the device, and the kernels that take the most time."""

    def steps() -> None:
        for batch in profiled:
            trainee.step(batch)

    kernels = device.profile(steps)
    by_name = Counter[str]()
    for name, microseconds in kernels:
        by_name[name[:SHOWN_CHARACTERS]] += microseconds
    return {
        "kernel_ms": round(1e-3 * by_name.total() / len(profiled), 3),
        "launches": len(kernels) // len(profiled),
        "longest": {name: round(time / len(profiled), 1) for name, time in by_name.most_common(SHOWN_KERNELS)},
    }


def peak_of(device: Device, trainee: Trainee, training_batches: list[Batch]) -> int:
    """Peak bytes of a step on the largest batch, including the model and its optimizer."""
    largest = max(training_batches, key=lambda batch: batch.size)
    held = resident_bytes(trainee.recommender, trainee.optimizer)
    return peak_bytes(partial(trainee.step, largest), device.device, resident_bytes=held)


def cases_on(device: Device, file: Path | None, rehearse: bool) -> Iterator[Case]:
    sizes = SMALL if rehearse else FULL
    if rehearse:
        keep_freed_memory()
    for batch_size in sizes.batch_sizes:
        for configuration in CONFIGURATIONS:
            run = partial(measure, device, configuration, batch_size, sizes, file)
            yield Case(f"{configuration} {batch_size}", run)


if __name__ == "__main__":
    arguments = arguments_of_part(__doc__, "--data")
    cases = partial(cases_on, file=arguments.data, rehearse=arguments.rehearse)
    leave(run_part("training", arguments, cases))
