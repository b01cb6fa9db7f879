"""Small tensors that kernels read and that do not depend on the batch: made once for each device, and kept."""

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Never evicted, since a captured CUDA graph may read them at every replay. Nothing that changes from step to step may
# be added.
_CONSTANTS: dict[tuple[Hashable, torch.device], Tensor] = {}


def device_constant(name: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """The tensor of this name on the device. The first call makes it on the CPU, copies it and waits for the copy.

    Args:
        name: what the tensor is and what it depends on, such as ("distance_buckets", 32, 128, True).
        device: a device with its index, as tensors have it.
        make: returns the tensor on the CPU.

    Raises:
        RuntimeError: a CUDA graph is being captured, and no earlier call has made the constant.
    """
    key = (name, device)
    constant = _CONSTANTS.get(key)
    if constant is not None:
        return constant
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a CUDA graph is being captured that reads a constant, {name!r}, which is not on {device} yet: call "
            "stamp_kernels.prepare(device, relative_bias=..., vocab_ranges=...) before the capture"
        )
    # Another thread has none of this thread's modes: its default device, its inference mode, or the private memory pool
    # of torch.compile(mode="reduce-overhead"), which must not hold a tensor that outlives the call.
    with ThreadPoolExecutor(1) as executor:
        constant = executor.submit(_make_on, device, make).result()
    # Two threads that come at once both get the tensor of the first.
    return _CONSTANTS.setdefault(key, constant)


def _make_on(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    if device.type != "cuda":
        return make().to(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        constant = make().to(device)
    stream.synchronize()  # after that every stream may read it
    return constant
