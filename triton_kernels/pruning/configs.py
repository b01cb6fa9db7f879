"""Which tile the pruning kernels have when: pure functions of sizes. Counted, not measured."""

import functools
from typing import NamedTuple

from stamp_kernels.triton_kernels.rows import next_power_of_2, power_of_two_divisor


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


class GatherConfig(NamedTuple):
    """How rows are moved: as integers of `element_size` bytes, `width` of them in a row."""

    element_size: int
    width: int
    stride: int
    stride_divisor: int
    rows: int
    columns: int


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

# A program has four warps, and each thread four accesses of 16 bytes. More than 256 rows would only help narrow rows.
_GATHER_BYTES = 4 * 32 * 4 * 16
_MAX_GATHER_ROWS = 256


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


def gather_config(row_bytes: int, stride_bytes: int, address: int) -> GatherConfig:
    """The widest access that the length of a row, the row stride and the address of the first row are aligned to."""
    alignment = power_of_two_divisor(row_bytes | stride_bytes | address, 16)
    element_size = min(8, alignment)
    width = row_bytes // element_size
    columns = min(next_power_of_2(width), _GATHER_BYTES // element_size)
    rows = min(_MAX_GATHER_ROWS, _GATHER_BYTES // (columns * element_size))
    return GatherConfig(element_size, width, stride_bytes // element_size, alignment // element_size, rows, columns)
