"""Small tensors that kernels read and that depend on no batch: made once for each device, and kept."""

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Never evicted: a captured CUDA graph may read them at every replay. So nothing that changes from step to step belongs
# here.
_CONSTANTS: dict[tuple[Hashable, torch.device], Tensor] = {}


def device_constant(name: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """The tensor of this name on the device; the first call makes it on the host, copies it there and waits for that.

    Args:
        name: what it is and what it depends on, such as ("distance_buckets", 32, 128, True).
        device: with its index, as tensors have it.
        make: gives the tensor on the CPU.

    Raises:
        RuntimeError: a CUDA graph is being captured, and no call before it has made the constant.
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
    # Another thread has none of this one's modes: not its default device, its inference mode or the private memory pool
    # of torch.compile(mode="reduce-overhead"), which may hold no tensor that outlives a call.
    with ThreadPoolExecutor(1) as executor:
        constant = executor.submit(_make_on, device, make).result()
    # Of two threads that came at once both get the first one's.
    return _CONSTANTS.setdefault(key, constant)


def _make_on(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    if device.type != "cuda":
        return make().to(device)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        constant = make().to(device)
    stream.synchronize()  # from now on every stream may read it
    return constant
