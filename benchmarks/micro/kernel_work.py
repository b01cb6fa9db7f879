"""The minimum work of a kernel, which gives its floor."""

from typing import NamedTuple


class KernelWork(NamedTuple):
    """Arithmetic, and memory traffic with each input read once and each output written once."""

    flops: float
    num_bytes: float
