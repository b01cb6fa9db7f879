"""Measures the time of a step by replays of a CUDA graph. Each call reads inputs that are not in the cache."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from device import Device
from torch import Tensor

SECONDS = 0.12  # of timed replays per graph
MAX_SETS = 40
# A graph has several calls, so that the gap of about 2 us between two graphs is a small part of its time.
MICROSECONDS_PER_GRAPH = 400


class Microseconds(NamedTuple):
    """The time of one call: the median and the quartiles over the replays."""

    median: float
    p25: float
    p75: float

    def minus(self, other: "Microseconds") -> "Microseconds":
        """The difference of the medians, with the widest quartiles that the two permit."""
        return Microseconds(self.median - other.median, self.p25 - other.p75, self.p75 - other.p25)

    def record(self) -> dict[str, float]:
        return {"us": round(self.median, 2), "p25_us": round(self.p25, 2), "p75_us": round(self.p75, 2)}


def num_input_sets(device: Device, one: dict[str, Tensor]) -> int:
    """Enough input sets to exceed twice the cache, so that no set is still cached at its next turn."""
    num_bytes = sum(x.numel() * x.element_size() for x in one.values())
    return max(1, min(MAX_SETS, math.ceil(2 * device.cache_bytes / num_bytes)))


def microseconds(device: Device, step: Callable[[Any], object], input_sets: Sequence[Any]) -> Microseconds:
    """The time of one call of the step. The calls take the input sets in turn."""

    def in_turn(rounds: int) -> None:
        for _ in range(rounds):
            for inputs in input_sets:
                step(inputs)  # the result is freed, and the graph reuses its memory

    captured = device.capture(lambda: in_turn(1))
    times = device.replay_times(captured, 0)
    rounds = math.ceil(MICROSECONDS_PER_GRAPH / statistics.median(times))
    if rounds > 1:
        captured = device.capture(lambda: in_turn(rounds))
    times = [time / (rounds * len(input_sets)) for time in device.replay_times(captured, SECONDS)]
    p25, median, p75 = statistics.quantiles(times, n=4, method="inclusive")
    return Microseconds(median, p25, p75)
