"""Autocast for the public functions: what torch's own matrix products do to their inputs."""

import torch
from torch import Tensor


def cast_for_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of their device where autocast is on; fp64 stays fp64, as in torch."""
    device_type = tensors[0].device.type
    # A device without autocast, meta above all, has no such setting to ask for.
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
