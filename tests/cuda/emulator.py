"""What the tests pass to the emulator of CUDA kernels: arguments by address, and outputs between guarded margins."""

import ctypes
import math

import torch
from torch import Tensor

FIELDS = [
    "dtype",
    "small_tiling",
    "hidden",
    "row_stride",
    "row_bytes",
    "element_bytes",
    "centrality",
    "centrality_is_double",
    "norm_order",
    "per_visible_query",
    "importance",
    "cu_seqlens",
    "num_sequences",
    "total",
    "max_seqlen",
    "budget_kind",
    "ratio_q32",
    "keep_count",
    "keep_counts",
    "min_keep",
    "protect",
    "num_protected",
    "codes_per_item",
    "total_kept",
    "positions",
    "cu_seqlens_kept",
    "indices",
    "inverse",
    "kept_positions",
]


class Arguments(ctypes.Structure):
    """`Arguments` of kernels_on_host.cpp. A tensor is passed as its address, None as 0."""

    _fields_ = [(name, ctypes.c_int64) for name in FIELDS]

    def __init__(self, **values: int | bool | Tensor | None) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, address(value) if isinstance(value, Tensor) or value is None else int(value))


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


class Guarded:
    """A poisoned tensor between two margins that nothing may write to."""

    MARGIN = 64

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        poison = math.nan if dtype.is_floating_point else -7
        self.memory = torch.full((size + 2 * self.MARGIN,), poison, dtype=dtype)
        self.tensor = self.memory[self.MARGIN : self.MARGIN + size]
        self.margins = torch.cat([self.memory[: self.MARGIN], self.memory[self.MARGIN + size :]])

    def check(self) -> Tensor:
        margins = torch.cat([self.memory[: self.MARGIN], self.memory[self.MARGIN + len(self.tensor) :]])
        assert torch.equal(margins.nan_to_num(), self.margins.nan_to_num()), "written outside of an output"
        return self.tensor
