"""What the micro-benchmarks share: the device, the measurement of a step, and the description of the machine.

pytest-benchmark runs one implementation after the other, so a change in the machine's speed changes the ratios. To
limit this, the implementations of one case run next to each other for a fraction of a second each, and the table shows
medians with quartiles. On a GPU a round is many calls and one synchronisation, so that the time is the device's
whenever the device is slower than Python. Every call reads the same inputs. Inputs that fit into a cache stay there,
and a small case may be faster than its floor.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_work import KernelWork

from stamp_kernels.profiling.measure import (
    Rates,
    describe_device,
    describe_versions,
    keep_freed_memory,
    measured_rates,
    peak_bytes,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
SECONDS_PER_BENCHMARK = 0.1 if DEVICE.type == "cuda" else 0.3
SECONDS_PER_ROUND = 2e-3  # at least, so that timer and synchronisation do not count
WARM_HEAP_BYTES = 2**31
RATES = pytest.StashKey[Rates]()


def device_time() -> float:
    """The time in seconds after the device has finished all work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(step: Callable[[], object]) -> float:
    start = device_time()
    step()
    return device_time() - start


def settled_seconds(step: Callable[[], object], last: float) -> float:
    """Seconds of a call, after calls until two in a row take about the same time, at most six.

    The first calls are slower while the heap grows.

    Args:
        step: the call.
        last: seconds that the previous call took.
    """
    for _ in range(6):
        seconds = seconds_of(step)
        if 0.8 * last < seconds < 1.25 * last:
            break
        last = seconds
    return seconds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "benchmark" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=device_time, disable_gc=True))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: object, output_json: dict[str, Any]) -> None:
    rates = config.stash.get(RATES, None)
    output_json["measured_on"] = {
        "device": describe_device(DEVICE),
        "versions": describe_versions(),
        "dtype": str(DTYPE).removeprefix("torch."),
        **(rates._asdict() if rates is not None else {}),
    }
    # Results are published, so nothing that identifies the machine is kept, and no single rounds.
    output_json["machine_info"] = {}
    output_json["commit_info"] = {"id": output_json["commit_info"].get("id")}
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)


@pytest.fixture(scope="session")
def device() -> torch.device:
    # Without this, padded implementations, whose maps are large, would pay for cleared pages in the first or all calls.
    if DEVICE.type == "cpu" and keep_freed_memory():
        torch.ones(WARM_HEAP_BYTES, dtype=torch.uint8)
    return DEVICE


@pytest.fixture(scope="session")
def dtype() -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU."""
    return DTYPE


@pytest.fixture(scope="session")
def rates(request: pytest.FixtureRequest, device: torch.device, dtype: torch.dtype) -> Rates:
    """The machine's rates, measured once."""
    return request.config.stash.setdefault(RATES, measured_rates(device, dtype))


@pytest.fixture
def measured(benchmark: Any, device: torch.device, rates: Rates) -> Callable[..., None]:
    """Measures time and peak memory of a step, and records them with the floor."""

    def measure(
        step: Callable[[], object],
        *,
        case: str,
        implementation: str,
        kernels: list[KernelWork],
        tokens: int,
        is_baseline: bool = False,
        min_rounds: int = 5,
    ) -> None:
        """Record one row of the table.

        Args:
            step: the timed function, without side effects.
            case: what is computed. The table compares the rows of one case.
            implementation: what computes it.
            kernels: the minimum work, kernel by kernel.
            tokens: number of rows that are not padding.
            is_baseline: whether the ratios of the case are relative to this row.
            min_rounds: lower bound of the rounds, even if they take long.
        """
        try:
            first = seconds_of(step)  # compiles, fills caches
            peak = peak_bytes(step, device)
        except torch.OutOfMemoryError:
            pytest.skip(f"{implementation} runs out of memory")
        once = settled_seconds(step, first)
        iterations = max(1, math.ceil(SECONDS_PER_ROUND / once))
        rounds = max(min_rounds, int(SECONDS_PER_BENCHMARK / (once * iterations)))
        benchmark.group = case
        benchmark.extra_info.update(
            implementation=implementation,
            is_baseline=is_baseline,
            tokens=tokens,
            flops=sum(kernel.flops for kernel in kernels),
            bytes=sum(kernel.num_bytes for kernel in kernels),
            floor_seconds=sum(rates.floor_seconds(kernel.flops, kernel.num_bytes) for kernel in kernels),
            peak_bytes=peak,
        )
        benchmark.pedantic(step, rounds=rounds, iterations=iterations)

    return measure
