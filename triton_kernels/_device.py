"""What the launchers ask about a device; an H100's answers where kernels are interpreted."""

import functools

import torch


def compute_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
