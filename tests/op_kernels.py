"""The kernels of one op from one backend, called with the arguments of the op's schema on tensors of any device."""

from collections.abc import Callable
from typing import Any

import torch

import stamp_kernels  # noqa: F401  (defines the ops)
from stamp_kernels.ops._library import REFERENCES, TRITON_LAUNCHERS


def reference(name: str) -> Callable[..., Any]:
    """The plain PyTorch kernel of `stamp::name`."""
    return REFERENCES[getattr(torch.ops.stamp, name).default]


def launcher(name: str) -> Callable[..., Any]:
    """The function that launches the Triton kernels of `stamp::name`."""
    return TRITON_LAUNCHERS[getattr(torch.ops.stamp, name).default]
