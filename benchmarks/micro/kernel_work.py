"""The least that a kernel has to do, from which its floor follows."""

from typing import NamedTuple


class KernelWork(NamedTuple):
    """Arithmetic, and memory traffic with each input read once and each output written once."""

    flops: float
    num_bytes: float
