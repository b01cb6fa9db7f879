"""Time and memory of training steps, measured the same way for every configuration, and the machine that ran them."""

from stamp_kernels.profiling.measure.machine import (
    H100_RATES,
    Rates,
    describe_device,
    describe_versions,
    measured_rates,
)
from stamp_kernels.profiling.measure.memory import keep_freed_memory, peak_bytes, resident_bytes
from stamp_kernels.profiling.measure.timing import interleaved_step_times, summarize

__all__ = [
    "H100_RATES",
    "Rates",
    "describe_device",
    "describe_versions",
    "interleaved_step_times",
    "keep_freed_memory",
    "measured_rates",
    "peak_bytes",
    "resident_bytes",
    "summarize",
]
