"""Time and memory of training steps, measured the same way for every configuration, and what they ran on.

Times are interleaved: each round runs every configuration once, so that a machine that gets slower or faster meanwhile
does so for all. Memory is what the allocators themselves report, on the CPU too; nothing is derived from shapes.
"""

import ctypes
import gc
import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch._C._profiler import _EventType, _ProfilerEvent
from torch.utils.mkldnn import to_mkldnn

import stamp_kernels

__all__ = [
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


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the process, as a GPU's caching allocator does; whether it could.

    glibc gives large blocks back to the kernel, which clears their pages anew for every step. On a CPU that takes up
    to half of the time of padded models, whose maps are large, and hardly any of packed ones': a comparison without
    this would flatter us. Only glibc has the switches; they stay set until the process ends.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return mallopt(mmap_max, 0) == 1 and mallopt(trim_threshold, -1) == 1


def interleaved_step_times(
    steps: Mapping[str, Callable[[int], object]],
    *,
    num_steps: int,
    warmup: int,
    device: torch.device,
    on_step: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Time the steps of several configurations in turn.

    Round i runs step i of every configuration once. The order is rotated by i, so that none always follows the same
    one into its caches. Garbage is collected between rounds and never during a step.

    Args:
        steps: by name, what runs step i. Rounds 0 to `warmup - 1` are the warm-up, the timed ones go on from there.
        num_steps: timed rounds, at least 1.
        warmup: rounds that are run and not timed, at least 0.
        device: what the steps run on; a GPU is synchronized before and after each step.
        on_step: called after each step, outside the timed part.

    Returns:
        By name, in the order of `steps`: `num_steps` wall-clock times in milliseconds.

    Raises:
        ValueError: if num_steps or warmup is too small.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    if warmup < 0:
        raise ValueError(f"warmup is {warmup}, expected at least 0")
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


class Rates(NamedTuple):
    """What a device reaches where nothing else holds it up; bytes are those read and those written."""

    flops_per_second: float
    bytes_per_second: float

    def floor_seconds(self, flops: float, num_bytes: float) -> float:
        """The least time for so much work, arithmetic and memory traffic overlapping entirely."""
        return max(flops / self.flops_per_second, num_bytes / self.bytes_per_second)


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rate of a large matrix product in `dtype` and that of a copy much larger than the caches, the best of five.

    On a CPU with the threads that torch uses, and in fp32 by whichever of torch's two libraries is faster: on an AMD
    EPYC with AVX-512 the BLAS behind `torch.mm` (MKL) reaches half of what oneDNN does, and kernels have "beaten" it.
    An H100 (SXM) has its figures here, so that runs on it have one floor.
    """
    if device.type == "cuda" and torch.cuda.get_device_name(device) == "NVIDIA H100 80GB HBM3" and dtype.itemsize == 2:
        return Rates(flops_per_second=798e12, bytes_per_second=3.0e12)
    size, num_bytes = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    source, target = (torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    products = {"product": lambda i: torch.mm(left, right, out=product)}
    if device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available():
        linear, rows = to_mkldnn(torch.nn.Linear(size, size, bias=False).eval()), left.to_mkldnn()
        products["oneDNN product"] = torch.no_grad()(lambda i: linear(rows))
    steps = {**products, "copy": lambda i: target.copy_(source)}
    times = interleaved_step_times(steps, num_steps=5, warmup=1, device=device)
    seconds = {name: 1e-3 * min(milliseconds) for name, milliseconds in times.items()}
    return Rates(2 * size**3 / min(seconds[name] for name in products), 2 * num_bytes / seconds["copy"])


def peak_bytes(step: Callable[[], object], device: torch.device, *, resident_bytes: int = 0) -> int:
    """Memory at the peak of a step: what it allocates at most at a time, and `resident_bytes`.

    What lies in memory before the step is not in the first part, whoever owns it, so that configurations can be
    measured side by side; `resident_bytes` says how much of it belongs to this one (see the function of that name).
    The step should therefore not free it: that would not be subtracted on the CPU.

    On a GPU this is the caching allocator's own peak. On the CPU it is the running sum of every allocation and free
    that c10's CPU allocator reports, so workspaces inside C++ operators and what autograd holds are in it. Not in it
    are memory from elsewhere (NumPy's, a BLAS library's packing buffers) and what is allocated by threads that the step
    starts; the backward pass runs on the caller's, and `at::parallel_for` allows no tensors to be made on its workers.

    Args:
        step: run once; run it before, so that what is made in the first step alone is not counted as part of it.
        device: what it runs on.
        resident_bytes: what is there throughout the step.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return resident_bytes + torch.cuda.max_memory_allocated(device) - before

    # The profiler's event tree rather than its "[memory]" rows: both hold every report of the allocator, but only the
    # tree has the addresses. They are needed because the allocator's table of block sizes outlives a profile: a block
    # allocated in one profile and freed after it leaves its entry behind, and the next profile then reports a free of
    # that size for whatever lies at the address now. So a free counts only if this step made the block. The fields
    # read here are those that torch.profiler's own memory timeline reads; that timeline is not used because it insists
    # on recording stacks and shapes.
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        step()
    live: dict[int, int] = {}
    allocated = peak = 0
    for address, size in _cpu_memory_reports(profiler.kineto_results.experimental_event_tree()):
        if size > 0:
            live[address] = size
            allocated += size
            peak = max(peak, allocated)
        else:
            allocated -= live.pop(address, 0)
    return resident_bytes + peak


def resident_bytes(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a module's parameters, buffers and gradients and of its optimizer's state, shared storage once."""
    parameters = list(module.parameters())
    tensors = [*parameters, *module.buffers(), *(p.grad for p in parameters if p.grad is not None)]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def describe_device(device: torch.device) -> str:
    """The GPU's name, or the CPU's and the number of threads that torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    # ARM has no such line, other systems no such file.
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def describe_versions() -> dict[str, str]:
    """Versions of what a measurement depends on; a package that is not installed is left out."""
    versions = {"stamp_kernels": stamp_kernels.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "triton", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """No automatic collections; gc.collect() looks at what was made meanwhile alone, so it is quick."""
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


def _cpu_memory_reports(roots: Sequence[_ProfilerEvent]) -> list[tuple[int, int]]:
    """(address, bytes) of every allocation (bytes > 0) and free (bytes < 0) on the CPU, in time order."""
    reports = []
    pending = list(reversed(roots))
    while pending:  # depth first, so that reports of the same nanosecond stay in their order
        event = pending.pop()
        pending.extend(reversed(event.children))
        if event.tag == _EventType.Allocation and event.extra_fields.device.type == "cpu":
            reports.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(reports, key=lambda report: report[0])]
