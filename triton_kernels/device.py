"""What the launchers ask about a device, and the limits of every launch."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class DeviceProperties(NamedTuple):
    """What the choice of tiles depends on.

    Attributes:
        capability: CUDA's compute capability.
        shared_memory: bytes of shared memory that one block may opt in to.
        num_processors: streaming multiprocessors.
    """

    capability: tuple[int, int]
    shared_memory: int
    num_processors: int


H100 = DeviceProperties((9, 0), 227 * 1024, 132)

# The GPU assumed for tensors that are on none: kernels that are interpreted or compiled ahead of time.
_stand_in = H100


@functools.cache  # also because the name of a device's type takes half a microsecond
def _properties_of_gpu(device: torch.device) -> DeviceProperties | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return DeviceProperties(
        (properties.major, properties.minor),
        properties.shared_memory_per_block_optin,
        properties.multi_processor_count,
    )


def device_properties(device: torch.device) -> DeviceProperties:
    """The properties of the GPU. Other devices have those of an H100, or what `stand_in` says."""
    return _properties_of_gpu(device) or _stand_in


@contextmanager
def stand_in(properties: DeviceProperties) -> Iterator[None]:
    """Give devices that are no GPU these properties within the block."""
    global _stand_in
    before, _stand_in = _stand_in, properties
    try:
        yield
    finally:
        _stand_in = before


def launch_grid(x: int, y: int = 1, z: int = 1) -> tuple[int, int, int]:
    """The grid, if CUDA and Triton's launcher support it.

    Triton multiplies the dimensions in 32 bits and silently skips the launch if the product is not positive.

    Raises:
        ValueError: a dimension or the product is too large.
    """
    if not (x * y * z < 2**31 and y < 2**16 and z < 2**16):
        raise ValueError(
            f"the inputs are too large for one launch: a grid of {(x, y, z)} programs, "
            "allowed are 65,535 in the second and third dimension and 2,147,483,647 together"
        )
    return x, y, z
