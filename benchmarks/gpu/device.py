"""The device that the check runs on: a GPU, or the CPU in a rehearsal.

All use of CUDA is in this file, so that a rehearsal runs every other line of the check.
"""

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, Generic, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from workloads import ImportanceAndSelection, Prune, Workload

from stamp_kernels.ops._served_by_triton import ServedByTriton
from stamp_kernels.profiling.measure import describe_device

T = TypeVar("T")

MIN_REPLAYS, MAX_REPLAYS = 5, 40


class CaptureError(RuntimeError):
    """A CUDA graph could not be captured."""


class Captured(Generic[T]):
    """A captured step.

    Attributes:
        replay: computes the step again from the current contents of its inputs.
        outputs: what the step returned; each replay overwrites it.
    """

    def __init__(self, replay: Callable[[], object], outputs: T | None) -> None:
        self.replay = replay
        self.outputs = outputs


class Device(ABC):
    """What the parts need from a device.

    Attributes:
        device: torch's device, for tensors.
        cache_bytes: size of the last-level cache.
    """

    device: torch.device
    cache_bytes: int

    @abstractmethod
    def facts(self) -> dict[str, object]:
        """What the results report about it."""

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def is_healthy(self) -> bool:
        """Whether it still computes."""

    @abstractmethod
    def free_memory(self) -> int:
        """Release unused memory. Returns the number of bytes that can be allocated."""

    def has_launcher(self, workload: Workload) -> bool:
        """Whether Triton can serve the workload's ops for tensors of this device."""
        return True

    def serve(self, workload: Workload, dtype: torch.dtype) -> AbstractContextManager[Any]:
        """Within the block, the kernels under test serve the workload's ops."""
        return nullcontext()

    @abstractmethod
    def capture(self, step: Callable[[], T]) -> Captured[T]:
        """Run the step once, then capture it.

        Raises:
            CaptureError: the step does something that a capture does not allow.
        """

    @abstractmethod
    def replay_times(self, captured: Captured[Any], seconds: float) -> list[float]:
        """Microseconds of each of several consecutive replays: as many as fit in `seconds`, at least MIN_REPLAYS."""

    @abstractmethod
    def profile(self, steps: Callable[[], object]) -> list[tuple[str, float]]:
        """Name and microseconds of each kernel and copy on the device during the steps."""


class Gpu(Device):
    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.cache_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        # One stream for all captures: cuBLAS keeps a workspace per stream.
        self._side_stream = torch.cuda.Stream(self.device)

    def facts(self) -> dict[str, object]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "processors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "shared_memory_per_block": properties.shared_memory_per_block_optin,
            "memory_bytes": properties.total_memory,
            "torch_cuda": torch.version.cuda,
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def is_healthy(self) -> bool:
        try:
            torch.cuda.synchronize()
            return torch.ones(2, device=self.device).sum().item() == 2
        except RuntimeError:  # every call raises after an illegal access
            return False

    def free_memory(self) -> int:
        gc.collect()
        try:
            torch.cuda.empty_cache()
            return torch.cuda.mem_get_info()[0]
        except RuntimeError:
            return 0

    def capture(self, step: Callable[[], T]) -> Captured[T]:
        current = torch.cuda.current_stream()
        self._side_stream.wait_stream(current)  # the current stream writes the inputs
        with torch.cuda.stream(self._side_stream):
            step()
        current.wait_stream(self._side_stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._side_stream):
                outputs = step()
        except Exception as error:
            cause = error.__context__ or error  # ending a failed capture raises a second, less specific error
            raise CaptureError(f"{type(cause).__name__}: {cause}") from error
        finally:
            torch.cuda.set_stream(current)  # a failed capture does not restore it
        return Captured(graph.replay, outputs)

    def replay_times(self, captured: Captured[Any], seconds: float) -> list[float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        captured.replay()
        start.record()
        captured.replay()
        end.record()
        torch.cuda.synchronize()
        once = 1e-3 * start.elapsed_time(end)
        count = min(MAX_REPLAYS, max(MIN_REPLAYS, int(seconds / once)))
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        captured.replay()  # keeps the GPU busy, so that no interval includes the launch of a graph
        for mark in marks[:-1]:
            mark.record()
            captured.replay()
        marks[-1].record()
        torch.cuda.synchronize()
        return [1e3 * before.elapsed_time(after) for before, after in pairwise(marks)]

    def profile(self, steps: Callable[[], object]) -> list[tuple[str, float]]:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            steps()
            torch.cuda.synchronize()
        return [
            (event.name, event.time_range.elapsed_us())
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation  # an annotation spans kernels
        ]


class StandIn(Device):
    """The CPU.

    Triton's interpreter serves fp16. It is slow, and wrong in bf16, so the C++ kernels serve the other dtypes.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.cache_bytes = 512

    def facts(self) -> dict[str, object]:
        return {"name": describe_device(self.device)}

    def synchronize(self) -> None:
        pass

    def is_healthy(self) -> bool:
        return True

    def free_memory(self) -> int:
        return 2**36

    def has_launcher(self, workload: Workload) -> bool:
        # For tensors on the CPU the op itself counts the kept tokens; the launchers need the count as an argument.
        return not isinstance(workload, (Prune, ImportanceAndSelection))

    def serve(self, workload: Workload, dtype: torch.dtype) -> AbstractContextManager[Any]:
        is_interpreted = dtype == torch.float16 and self.has_launcher(workload)
        return ServedByTriton() if is_interpreted else nullcontext()

    def capture(self, step: Callable[[], T]) -> Captured[T]:
        def replay() -> None:
            captured.outputs = step()

        captured = Captured(replay, None)
        return captured

    def replay_times(self, captured: Captured[Any], seconds: float) -> list[float]:
        start = time.perf_counter()
        captured.replay()
        return [1e6 * (time.perf_counter() - start)] * 2

    def profile(self, steps: Callable[[], object]) -> list[tuple[str, float]]:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            steps()
        return [(event.name, event.self_cpu_time_total) for event in profiler.events()]


def open_device(rehearse: bool) -> Device:
    if rehearse:
        return StandIn()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device found; --rehearse runs the check on the CPU")
    return Gpu()
