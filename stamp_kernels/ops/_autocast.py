"""Autocast for the public functions: they cast their inputs as torch's own matrix products do."""

import torch
from torch import Tensor

from stamp_kernels.ops._checks import check_tensor

# Asked once, because torch.compile of torch 2.11 cannot trace the question.
_DEVICES = frozenset(name for name in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(name))


def cast_for_autocast(**tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype of their device, if autocast is on; fp64 stays fp64, as in torch.

    Raises:
        ValueError: an argument is not a tensor; the message calls it by its keyword.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            check_tensor(name, x)
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return tuple(tensors.values())  # the name of a device's type takes half a microsecond
    device_type = next(iter(tensors.values())).device.type
    if device_type == "meta":  # a GPU's tensors in ahead-of-time compilation
        device_type = "cuda"
    if device_type not in _DEVICES or not torch.is_autocast_enabled(device_type):
        return tuple(tensors.values())
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors.values())
