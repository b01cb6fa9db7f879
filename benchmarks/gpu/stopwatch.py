"""Time of a step by replays of a CUDA graph, each call on inputs that no cache holds."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from device import Device
from torch import Tensor

SECONDS = 0.12  # of replays that are timed, for each graph
MAX_SETS = 40
# A graph has several calls, so that the gap between two graphs, some 2 us, is a small part of it.
MICROSECONDS_PER_GRAPH = 400


class Microseconds(NamedTuple):
    """Of one call: the median, and the quartiles of the replays."""

    median: float
    p25: float
    p75: float

    def minus(self, other: "Microseconds") -> "Microseconds":
        """Of what the one does and the other does not; the quartiles are those of the medians' difference at worst."""
        return Microseconds(self.median - other.median, self.p25 - other.p75, self.p75 - other.p25)

    def record(self) -> dict[str, float]:
        return {"us": round(self.median, 2), "p25_us": round(self.p25, 2), "p75_us": round(self.p75, 2)}


def num_input_sets(device: Device, one: dict[str, Tensor]) -> int:
    """As many as together exceed twice the cache, so that every set has left it when its turn comes again."""
    num_bytes = sum(x.numel() * x.element_size() for x in one.values())
    return max(1, min(MAX_SETS, math.ceil(2 * device.cache_bytes / num_bytes)))


def microseconds(device: Device, step: Callable[[Any], object], input_sets: Sequence[Any]) -> Microseconds:
    """Of one call of the step, the input sets in turn."""

    def in_turn(rounds: int) -> None:
        for _ in range(rounds):
            for inputs in input_sets:
                step(inputs)  # what it returns is freed, and its memory used again, within the graph, too

    captured = device.capture(lambda: in_turn(1))
    times = device.replay_times(captured, 0)
    rounds = math.ceil(MICROSECONDS_PER_GRAPH / statistics.median(times))
    if rounds > 1:
        captured = device.capture(lambda: in_turn(rounds))
    times = [time / (rounds * len(input_sets)) for time in device.replay_times(captured, SECONDS)]
    p25, median, p75 = statistics.quantiles(times, n=4, method="inclusive")
    return Microseconds(median, p25, p75)
