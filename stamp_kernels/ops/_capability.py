"""The instruction set of the compiled CPU kernels, for tests and harnesses that compare several in one process.

Users limit it by the environment variable STAMP_KERNELS_CPU_CAPABILITY, which is read when the package is imported.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import stamp_kernels.ops._library  # noqa: F401  (loads the library and defines the op)


@contextmanager
def use_capability(name: str) -> Iterator[None]:
    """Run the CPU kernels of the instruction set `name` in the whole process: "portable", "avx2" or "avx512".

    Raises:
        RuntimeError: there is no such set, or this machine does not have it.
    """
    previous = torch.ops.stamp._use_cpu_capability(name)
    try:
        yield
    finally:
        torch.ops.stamp._use_cpu_capability(previous)
