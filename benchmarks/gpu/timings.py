"""Measures every workload of TIMED in bf16 and records its time with its floor, its prediction and its peers.

    python benchmarks/gpu/timings.py --results FILE [--rehearse]

A copy and a matrix product come first; the floors follow from their rates. Then each workload is timed by replays of a
CUDA graph: the forward, then forward and backward together. The time of the backward is the difference. The peers of a
workload follow it in the same process.
"""

from collections.abc import Iterator
from functools import cache, partial

import torch
from cases import Case, SkipError, arguments_of_part, leave, run_part
from device import Device
from peers import Peer, ours, peers_of
from predictions import predicted_us, read_table
from recordable import TIMED_DTYPE
from records import Record
from rehearsal import shrunk
from stopwatch import Microseconds, microseconds, num_input_sets
from workloads import TIMED, Workload

from stamp_kernels.profiling.measure import Rates
from stamp_kernels.profiling.peers.availability import PeerUnavailableError

PREDICTIONS = predicted_us(read_table())

# The most informative workloads come first, since the part may run out of time. The others follow in TIMED's order.
FIRST = (
    "L120.bias.dropout", "CE.D128.V4096", "L240.bias.dropout", "prune.256x240", "L120", "L1024.H8", "ragged.L94.bias",
    "CE.D1024.V152960", "L120.bias", "L240.bias", "L240", "L120.bias.dropout.centrality", "gather.128", "ragged.L94",
    "L2048.GQA.d128.causal", "CE.D512.V32000",
)  # fmt: skip

PRODUCT_SIZE, COPY_BYTES = 8192, 2**30
SMALL_PRODUCT_SIZE, SMALL_COPY_BYTES = 32, 2**10


@cache
def card_rates(device: Device, rehearse: bool) -> Rates:
    """Rates of a bf16 matrix product and of a memory copy. The matrices are random: zeros would take less power."""
    size, num_bytes = (SMALL_PRODUCT_SIZE, SMALL_COPY_BYTES) if rehearse else (PRODUCT_SIZE, COPY_BYTES)
    left, right = (torch.randn(size, size, device=device.device).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(left)
    source, target = (torch.ones(num_bytes, dtype=torch.uint8, device=device.device) for _ in range(2))
    product_time = microseconds(device, lambda _: torch.mm(left, right, out=product), [None])
    copy_time = microseconds(device, lambda _: target.copy_(source), [None])
    return Rates(2 * size**3 / (1e-6 * product_time.median), 2 * num_bytes / (1e-6 * copy_time.median))


def record_rates(device: Device, rehearse: bool) -> Iterator[Record]:
    yield card_rates(device, rehearse)._asdict()


def time_steps(device: Device, workload: Workload, implementation: str, peer: Peer) -> Iterator[Record]:
    """Times the forward and both directions; the backward is the difference."""
    one = workload.inputs(device.device, TIMED_DTYPE)
    inputs = [one, *(workload.inputs(device.device, TIMED_DTYPE, i) for i in range(1, num_input_sets(device, one)))]
    try:
        steps = [peer(x) for x in inputs]
    except PeerUnavailableError as error:
        raise SkipError(str(error)) from error

    def record(direction: str, time: Microseconds) -> Record:
        about = {"workload": workload.name, "implementation": implementation, "direction": direction}
        return {**about, **time.record(), "input_sets": len(inputs)}

    forward = microseconds(device, lambda step: step.forward(), steps)
    yield record("forward", forward)
    if steps[0].both is not None:
        both = microseconds(device, lambda step: step.both(), steps)
        yield record("both", both)
        yield record("backward", both.minus(forward))


def time_ours(device: Device, workload: Workload, rehearse: bool) -> Iterator[Record]:
    """Adds the floor and the prediction of each direction."""
    rates = card_rates(device, rehearse)
    floors = [1e6 * rates.floor_seconds(*work) for work in workload.work(TIMED_DTYPE.itemsize)]
    floor_us = dict(zip(("forward", "backward"), floors, strict=True)) | {"both": sum(floors)}
    for record in time_steps(device, workload, "ours", ours(workload)):
        floor = floor_us[record["direction"]]
        yield {
            **record,
            "floor_us": round(floor, 2),
            "share_of_floor": round(floor / record["us"], 3) if record["us"] > 0 else None,  # a difference within noise
            "predicted_us": PREDICTIONS.get(workload.name, {}).get(record["direction"]),
        }


def in_order() -> list[Workload]:
    names = [workload.name for workload in TIMED]
    return sorted(TIMED, key=lambda workload: (*FIRST, *names).index(workload.name))


def cases_on(device: Device, rehearse: bool) -> Iterator[Case]:
    yield Case("card", partial(record_rates, device, rehearse))
    for timed in in_order():
        workload = shrunk(timed) if rehearse else timed
        yield Case(f"{workload.name}: ours", partial(time_ours, device, workload, rehearse))
        for name, peer in peers_of(workload, device).items():
            yield Case(f"{workload.name}: {name}", partial(time_steps, device, workload, name, peer))


if __name__ == "__main__":
    arguments = arguments_of_part(__doc__)
    leave(run_part("timings", arguments, partial(cases_on, rehearse=arguments.rehearse)))
