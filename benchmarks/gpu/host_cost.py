"""Host microseconds of every op that Triton serves, from the call in Python down to the driver: no GPU is needed.

    python benchmarks/gpu/host_cost.py [--workloads NAME ...] [--calls 1000] [--arch 90]

The public functions run on `meta` tensors of the workloads' shapes, forward and backward, through the dispatcher and
autograd as on a GPU. The first calls compile the kernels, for `arch`. A stand-in for Triton's driver takes the launches
and does nothing, so these are in no figure: what Triton's C launcher does (it reads the arguments and asks the driver
about each pointer), the driver's launch, the device guard, and waiting for a GPU that is busy.

The table has one row for each call of an op:

- public: the whole workload, in the row of its first op; the backward is torch.autograd.grad;
- op: `torch.ops.stamp.*`, as the public function calls it;
- checks: the checks at the op's boundary, and arguments put into groups;
- launcher: the launchers' own Python: tiles, views, grids, arguments;
- launches: from `launch` to the C launcher, for all of them, and in parentheses how many;
- torch: calls of other operators, mostly allocations. A GPU's have other times: it has an allocator, and torch serves
  some operators on `meta` tensors in Python, where they take 20 to 100 us (reductions, products, random numbers).

Op is the sum of these four and of the dispatcher's time. A figure is the tenth percentile of many calls, because other
processes only add time: on a machine that is not quiet, compare the lowest figures of several runs.
"""

import argparse
import gc
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction
from workloads import COMPILED, TIMED, Workload

from stamp_kernels.ops import _library
from stamp_kernels.triton_kernels.aot import TARGETS, launch_nothing
from stamp_kernels.triton_kernels.launching import launch

META = torch.device("meta")
DTYPE = torch.bfloat16
NAMES = (
    "L120", "L120.bias.dropout.centrality", "L240.bias.dropout", "L240.bias.separate", "L24.bias", "decoder.L4",
    "prune.256x240", "score", "gather.128", "CE.D128.V4096", "CE.K4.shared", "CE.4x256", "CE.D512.minimal",
    "CE.D512.V32000", "shift",
)  # fmt: skip
WORKLOADS = {workload.name: workload for workload in (*TIMED, *COMPILED)}


class Call(NamedTuple):
    """One call of an op or of an operator of torch: `op(*args, **kwargs)`."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> object:
        return self.op(*self.args, **self.kwargs)


class Launch(NamedTuple):
    """One launch, as a launcher makes it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def run(self) -> None:
        launch(self.kernel, self.grid, **self.arguments)


class Cost(NamedTuple):
    """Microseconds of one call of an op, see above."""

    op: float
    checks: float
    launcher: float
    launches: float
    num_launches: int
    torch: float


class _Recorded(TorchDispatchMode):
    """Notes the calls of all operators below autograd. While one is noted, those that it calls are not."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls.append(Call(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def serve_meta_tensors() -> None:
    """`meta` tensors get the kernels of CUDA tensors, in place of the fakes."""
    for op in _library.TRITON_LAUNCHERS:
        name = op._schema.name.removeprefix("stamp::")
        _library._LIBRARY.impl(name, _library.kernel_for_cuda(op), "Meta", allow_override=True)


def allocate_in_cpp() -> None:
    """Tensor.new_empty and torch.empty_like of `meta` tensors as fast as on other devices: torch has them in Python."""

    def new_empty(x: torch.Tensor, *size: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype or x.dtype, device=META)

    torch.Tensor.new_empty = new_empty
    torch.empty_like = lambda x: torch.empty(x.shape, dtype=x.dtype, device=META)


def microseconds(run: Callable[[], object], calls: int) -> float:
    """The lowest tenth of many calls, without the time of the clock."""

    def lowest_tenth(step: Callable[[], object]) -> float:
        times = []
        for _ in range(calls):
            start = time.perf_counter_ns()
            step()
            times.append(time.perf_counter_ns() - start)
        return statistics.quantiles(times, n=10)[0] / 1000

    for _ in range(20):
        run()
    return lowest_tenth(run) - lowest_tenth(lambda: None)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """The launches in the block."""
    launches: list[Launch] = []
    run = JITFunction.run

    def note(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        launches.append(Launch(self, grid, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    JITFunction.run = note
    try:
        yield launches
    finally:
        JITFunction.run = run


def arguments_of(function: Callable[..., object], run: Callable[[], object]) -> tuple[Any, ...]:
    """The positional arguments with which `run` calls `function`."""
    found: list[tuple[Any, ...]] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is function.__code__:
            values = inspect.getargvalues(frame)
            named = [values.locals[name] for name in values.args]
            found.append((*named, *values.locals.get(values.varargs, ())))

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found[0]


def cost_of(call: Call, calls: int) -> Cost:
    """The parts of one call of an op."""
    served = _library.TRITON_LAUNCHERS[call.op]
    launcher = inspect.unwrap(served)
    args = arguments_of(launcher, lambda: served(*call.args))
    with _Recorded() as recorded, recorded_launches() as launches:
        launcher(*args)
    whole = microseconds(call.run, calls)
    with_checks = microseconds(lambda: served(*call.args), calls)
    without_checks = microseconds(lambda: launcher(*args), calls)
    in_launches = sum(microseconds(one.run, calls) for one in launches)
    in_torch = sum(microseconds(one.run, calls) for one in recorded.calls)
    return Cost(
        op=whole,
        checks=with_checks - without_checks,
        launcher=without_checks - in_launches - in_torch,
        launches=in_launches,
        num_launches=len(launches),
        torch=in_torch,
    )


def measured(workload: Workload, calls: int) -> Iterator[str]:
    """Lines of the table."""
    x = workload.inputs(META, DTYPE)
    leaves = {name: x[name].detach().requires_grad_() for name in workload.leaves}
    x = x | leaves
    with _Recorded() as recorded:
        outputs = workload.forward(x)
    yield from lines(workload, "forward", recorded.calls, lambda: workload.forward(x), calls)
    if not leaves:
        return
    out = next(iter(outputs.values()))
    grad = x["grad"] if "grad" in x else torch.ones_like(out)

    def backward() -> None:
        torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)

    with _Recorded() as recorded:
        backward()
    yield from lines(workload, "backward", recorded.calls, backward, calls)


def lines(
    workload: Workload, direction: str, recorded: list[Call], public: Callable[[], object], calls: int
) -> Iterator[str]:
    """One line for each op that was called; the first one has the figure of the public function."""
    text = f"{microseconds(public, calls):.1f}"
    with torch.no_grad():
        for call in recorded:
            if call.op not in _library.TRITON_LAUNCHERS:
                continue
            cost = cost_of(call, calls)
            figures = (
                text, f"{cost.op:.1f}", f"{cost.checks:.1f}", f"{cost.launcher:.1f}",
                f"{cost.launches:.1f} ({cost.num_launches})", f"{cost.torch:.1f}",
            )  # fmt: skip
            yield row(f"{workload.name} {direction}", call.op.name().removeprefix("stamp::"), *figures)
            text = ""


def row(*cells: str) -> str:
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


_WIDTHS = (38, 41, 7, 7, 7, 9, 11, 7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=TARGETS, default=90)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=NAMES, metavar="NAME")
    parser.add_argument("--calls", type=int, default=1000)
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels have other costs")
    serve_meta_tensors()
    allocate_in_cpp()
    gc.collect()
    gc.freeze()
    gc.disable()
    print(row("workload", "op", "public", "op", "checks", "launcher", "launches", "torch"))
    # Backward runs in this thread: autograd has no thread for the tensors of a device that is not present.
    with launch_nothing(options.arch), torch.autograd.set_multithreading_enabled(False):
        for name in options.workloads:
            for line in measured(WORKLOADS[name], options.calls):
                print(line, flush=True)


if __name__ == "__main__":
    main()
