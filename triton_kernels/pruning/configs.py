"""Which tile the pruning kernels have when: pure functions of sizes. Counted, not measured."""

import functools
from typing import NamedTuple

from stamp_kernels.triton_kernels.rows import ceil_div, next_power_of_2, power_of_two_divisor


class ImportanceConfig(NamedTuple):
    """A tile of rows x columns."""

    rows: int
    columns: int
    num_warps: int


class SelectionConfig(NamedTuple):
    """The sequences of one program, and the items of each that it holds at a time."""

    sequences: int
    items: int
    num_warps: int


class RowMemory(NamedTuple):
    """Where the rows of one tensor are, in bytes.

    Attributes:
        row: the length of a row.
        stride: from one source row to the next.
        alignment: an address that is aligned like the first rows of source and result.
    """

    row: int
    stride: int
    alignment: int


class GatherConfig(NamedTuple):
    """How a program moves `rows` rows of several tensors; one of `column_blocks` programs over the same rows.

    The rest is for each tensor: its rows are moved as integers of `element_sizes` bytes, `widths` of them in a row,
    `columns` of them at a time. From one source row to the next there are `strides` integers, a multiple of
    `stride_divisors`.
    """

    rows: int
    column_blocks: int
    element_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    columns: tuple[int, ...]
    strides: tuple[int, ...]
    stride_divisors: tuple[int, ...]


# By the number of items of the longest sequence. A thread has at most 8 keys, so that they stay in registers. Up to 256
# items a program is one warp, and its counts need no shared memory.
SELECTION_CONFIGS = (
    SelectionConfig(sequences=8, items=16, num_warps=1),
    SelectionConfig(sequences=4, items=64, num_warps=1),
    SelectionConfig(sequences=1, items=256, num_warps=1),
    SelectionConfig(sequences=1, items=1024, num_warps=4),
    SelectionConfig(sequences=1, items=4096, num_warps=16),
)
# Where the longest sequence has more items than any of these.
LONG_SELECTION_CONFIG = SelectionConfig(sequences=1, items=2048, num_warps=8)

# A program has four warps, and each thread four accesses of 16 bytes, or 16 accesses of what is not so wide. More than
# 256 rows would only help narrow rows.
_GATHER_BYTES = 4 * 32 * 4 * 16
_GATHER_ELEMENTS = 4 * 32 * 16
_MAX_GATHER_ROWS = 256
# Every tensor of a launch takes registers of its own.
MAX_TENSORS = 4


@functools.lru_cache(maxsize=1024)
def importance_config(width: int, *, element_size: int) -> ImportanceConfig:
    """A thread of 128 adds up about 32 columns (16 in fp64): four loads of 16 bytes in half precision."""
    elements = 2048 if element_size == 8 else 4096
    columns = min(1024, max(16, next_power_of_2(width)))
    return ImportanceConfig(min(64, elements // columns), columns, num_warps=4)


def selection_config(max_items: int) -> tuple[SelectionConfig, bool]:
    """(config, whether it is that of the long kernel) for sequences of up to `max_items` items."""
    for config in SELECTION_CONFIGS:
        if max_items <= config.items:
            return config, False
    return LONG_SELECTION_CONFIG, True


@functools.lru_cache(maxsize=1024)
def gather_config(tensors: tuple[RowMemory, ...]) -> GatherConfig:
    """The widest accesses that the rows of each tensor are aligned to."""
    rows, column_blocks = _MAX_GATHER_ROWS, 1
    of_tensors = []
    for row, stride, address in tensors:
        alignment = power_of_two_divisor(row | stride | address, 16)
        element_size = min(8, alignment)
        width = row // element_size
        elements = min(_GATHER_BYTES // element_size, _GATHER_ELEMENTS)
        columns = min(next_power_of_2(width), elements)
        rows, column_blocks = min(rows, elements // columns), max(column_blocks, ceil_div(width, columns))
        of_tensors.append((element_size, width, columns, stride // element_size, alignment // element_size))
    return GatherConfig(rows, column_blocks, *zip(*of_tensors, strict=True))
