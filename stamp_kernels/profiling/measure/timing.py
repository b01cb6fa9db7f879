"""Step times, interleaved: each round runs every configuration once.

A machine that becomes slower or faster during the run does so for all configurations.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from stamp_kernels.ops._checks import check_count


def interleaved_step_times(
    steps: Mapping[str, Callable[[int], object]],
    *,
    num_steps: int,
    warmup: int,
    device: torch.device,
    on_step: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Time the steps of several configurations in turn.

    Round i runs step i of every configuration once. The order is rotated by i, so that no configuration always finds
    the caches as the same other one left them. Garbage is collected between rounds and never during a step.

    Args:
        steps: by name, a function that runs step i. Rounds 0 to `warmup - 1` are the warm-up, the timed ones follow.
        num_steps: timed rounds, at least 1.
        warmup: rounds that run before them and are not timed, at least 0.
        device: where the steps run; a GPU is synchronized before and after each step.
        on_step: called after each step, outside the timed part.

    Returns:
        By name, in the order of `steps`: `num_steps` wall-clock times in milliseconds.

    Raises:
        ValueError: num_steps or warmup is too small.
    """
    check_count("num_steps", num_steps, 1)
    check_count("warmup", warmup)
    names = list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    with _garbage_collection_off():
        for i in range(warmup + num_steps):
            gc.collect()
            for j in range(len(names)):
                name = names[(i + j) % len(names)]
                _synchronize(device)
                start = time.perf_counter()
                steps[name](i)
                _synchronize(device)
                elapsed = time.perf_counter() - start
                if i >= warmup:
                    times[name].append(1e3 * elapsed)
                if on_step is not None:
                    on_step()
    return times


def summarize(times: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile (linear between neighbours), in the unit of `times`, which is not empty."""
    p20, median, p80 = np.percentile(np.asarray(times, dtype=np.float64), [20, 50, 80]).tolist()
    return {"median": median, "p20": p20, "p80": p80}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """No automatic collections. What exists already is frozen, so gc.collect() only visits newer objects."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
