"""Memory of a training step, as the allocators themselves report it, on the CPU too. Nothing is derived from shapes."""

import ctypes
import gc
from collections.abc import Callable, Sequence

import torch
from torch._C._profiler import _EventType, _ExtraFields_Allocation, _ProfilerEvent


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the process, as a GPU's caching allocator does.

    glibc returns large blocks to the kernel, which clears their pages again in every step. On a CPU that takes up to
    half of the time of padded models, whose attention maps are large, and hardly any of the time of packed models: a
    comparison without this would flatter the packed ones. Only glibc has these options; they stay set until the
    process ends.

    Returns:
        Whether the options could be set.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    return bool(mallopt(mmap_max, 0) == 1 and mallopt(trim_threshold, -1) == 1)


def peak_bytes(step: Callable[[], object], device: torch.device, *, resident_bytes: int = 0) -> int:
    """Memory at the peak of a step: the most that the step itself holds at one time, plus `resident_bytes`.

    The first part does not include memory that was allocated before the step, so several configurations can be measured
    in one process; `resident_bytes` says how much of that memory belongs to this configuration (see the function of
    that name). The step should therefore not free such memory: on the CPU that is not subtracted.

    On a GPU this is the peak of the caching allocator. On the CPU it is the running sum of every allocation and free
    that c10's CPU allocator reports, so it includes workspaces inside C++ operators and what autograd saves. It does
    not include memory from elsewhere (NumPy, a BLAS library's packing buffers) or memory that threads started by the
    step allocate. The backward pass runs on the caller's thread, and `at::parallel_for` does not let its workers make
    tensors.

    Args:
        step: run once. Run it before this call too, so that what only the first step makes is not counted.
        device: where it runs.
        resident_bytes: what exists throughout the step.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return resident_bytes + torch.cuda.max_memory_allocated(device) - before

    # This reads the profiler's event tree, not its "[memory]" rows: both have every report of the allocator, but only
    # the tree has the addresses. They are needed because the allocator's table of block sizes outlives a profile: a
    # block that is allocated in one profile and freed after it leaves its entry behind, and the next profile then
    # reports a free of that size for the block that has the address now. So a free only counts if this step made the
    # block. torch.profiler's own memory timeline reads the same fields, but insists on recording stacks and shapes.
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
    """Bytes of a module's parameters, buffers, gradients and optimizer state; shared storage counts once."""
    parameters = list(module.parameters())
    tensors = [*parameters, *module.buffers(), *(p.grad for p in parameters if p.grad is not None)]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _cpu_memory_reports(roots: Sequence[_ProfilerEvent]) -> list[tuple[int, int]]:
    """(address, bytes) of every allocation (bytes > 0) and free (bytes < 0) on the CPU, in time order."""
    reports = []
    pending = list(reversed(roots))
    while pending:  # depth first, so that reports of the same nanosecond stay in their order
        event = pending.pop()
        pending.extend(reversed(event.children))
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            assert isinstance(fields, _ExtraFields_Allocation)
            if fields.device.type == "cpu":
                reports.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    return [(address, size) for _, address, size in sorted(reports, key=lambda report: report[0])]
