"""Compares every kernel on the device with the float64 reference on the same device, in bf16, fp16 and fp32.

    python benchmarks/gpu/correctness.py --results FILE [--rehearse]

For each workload of CHECKED, in bf16, then fp16, then fp32:

- outputs and gradients are within the bounds below, integers are equal, infinities are in the same places, and there is
  no NaN, even if the memory that the op allocates holds NaN;
- a second run gives the same bits;
- in bf16, a CUDA graph of the whole step, replayed on other contents, gives the same bits as the step.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from cases import Case, arguments_of_part, dtype_name, leave, run_part
from device import Device
from recordable import CHECKED_DTYPES
from records import Record
from rehearsal import rehearsed
from torch import Tensor
from workloads import CHECKED, Workload

from stamp_kernels import use_backend

Outputs = dict[str, Tensor]

# ||out - ref|| / ||ref||, as in tests/closeness.py. What kernels keep in fp32 has the fp32 bound in every dtype.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
IN_FP32 = ("lse", "centrality", "importance", "loss", "step_losses")


class WrongError(Exception):
    """An output is wrong."""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block, new floating-point memory is NaN and new integer memory is the largest value."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def reference(workload: Workload, x: Outputs) -> Outputs:
    """The reference's outputs in float64 for the same inputs."""
    with use_backend("reference"):
        return workload.run({name: t.double() if t.is_floating_point() else t for name, t in x.items()})


def error_of(out: Tensor, ref: Tensor) -> float:
    """The relative norm of the difference.

    It is infinite if shapes or integers differ, if there is a NaN, or if infinities are in other places.
    """
    if out.shape != ref.shape:
        return torch.inf
    if not ref.is_floating_point():
        return 0.0 if torch.equal(out, ref.to(out.dtype)) else torch.inf
    out, ref = out.double(), ref.double()
    is_finite = ref.isfinite()
    if not torch.equal(out[~is_finite], ref[~is_finite]):
        return torch.inf
    difference = torch.linalg.vector_norm(out[is_finite] - ref[is_finite]).item()
    norm = torch.linalg.vector_norm(ref[is_finite]).item()
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 and difference == difference else torch.inf


def bound_of(name: str, ref: Tensor, dtype: torch.dtype) -> float:
    if not ref.is_floating_point():
        return 0.0
    return BOUNDS[torch.float32 if name in IN_FP32 else dtype]


def different(left: Outputs, right: Outputs) -> list[str]:
    """Names of the outputs that are not bitwise equal."""
    return [name for name in left if not torch.equal(left[name], right[name])]


def different_in_graph(device: Device, workload: Workload, dtype: torch.dtype, x: Outputs) -> list[str]:
    """Names of the outputs that differ between a graph, replayed on other contents, and the step."""
    captured = device.capture(lambda: workload.run(x))
    for name, other in workload.inputs(device.device, dtype, seed=1).items():
        x[name].copy_(other)
    captured.replay()
    return different(captured.outputs, workload.run(x))


def check(
    device: Device, workload: Workload, dtype: torch.dtype, served: AbstractContextManager[object]
) -> Iterator[Record]:
    """Yields one measurement, then raises if anything is wrong."""
    x = workload.inputs(device.device, dtype)
    with served:
        with poisoned_memory():
            first = workload.run(x)
        second = workload.run(x)
    expected = reference(workload, x)
    errors = {name: error_of(first[name], ref) for name, ref in expected.items()}
    bounds = {name: bound_of(name, ref, dtype) for name, ref in expected.items()}
    wrong = [f"{name} is off by {errors[name]:.2g}" for name in expected if errors[name] > bounds[name]]
    wrong += [f"{name} differs in a second run" for name in different(first, second)]
    if dtype == torch.bfloat16:
        with served:
            wrong += [f"{name} differs in a graph" for name in different_in_graph(device, workload, dtype, x)]
    # JSON has no infinity: write a string.
    shown = {name: error if error < torch.inf else "inf" for name, error in errors.items()}
    about = {"workload": workload.name, "dtype": dtype_name(dtype)}
    yield {**about, "errors": shown, "bounds": bounds, "wrong": wrong}
    if wrong:
        raise WrongError("; ".join(wrong))


def cases_on(device: Device, rehearse: bool) -> Iterator[Case]:
    for dtype in CHECKED_DTYPES:
        for workload in rehearsed(CHECKED, dtype) if rehearse else CHECKED:
            name = f"{workload.name} {dtype_name(dtype)}"
            served = device.serve(workload, dtype)
            yield Case(name, partial(check, device, workload, dtype, served))


if __name__ == "__main__":
    arguments = arguments_of_part(__doc__)
    leave(run_part("correctness", arguments, partial(cases_on, rehearse=arguments.rehearse)))
