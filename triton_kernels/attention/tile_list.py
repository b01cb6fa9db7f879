"""The tile list of a packed batch, on the device and without a sync."""

import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.contents import check_cu_seqlens_contents
from stamp_kernels.common.tiles import TILE_ROWS, num_listed_tiles
from stamp_kernels.triton_kernels.device import launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.rows import ceil_div

# Sequences of a program, and those that it compares them with at a time.
_BLOCK = 16
_BLOCK_OTHERS = 256


@triton.jit
def _tiles_of(index, cu_seqlens_ptr, num_sequences, ROWS: tl.constexpr):
    """int32 [BLOCK]: the number of tiles of the sequences `index`, 0 where there is none."""
    exists = index < num_sequences
    first = tl.load(cu_seqlens_ptr + index, mask=exists, other=0)
    end = tl.load(cu_seqlens_ptr + index + 1, mask=exists, other=0)
    return tl.cdiv(end - first, ROWS)


@triton.jit(do_not_specialize=["num_sequences", "num_entries"])
def stamp_tile_list_kernel(
    entries_ptr,  # int32 [num_entries, 2]
    cu_seqlens_ptr,  # int32 [B + 1]
    num_sequences,
    num_entries,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OTHERS: tl.constexpr,
):
    """The entries of BLOCK sequences: (sequence, first row) of each of their tiles, of ROWS rows.

    Grid: [max(ceil(B / BLOCK), 1)]. A sequence's entries follow those of all sequences with more tiles, and of those
    with as many and a lower index. Every program counts these, so that none waits for another: B^2 comparisons in all.
    """
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num_tiles = _tiles_of(index, cu_seqlens_ptr, num_sequences, ROWS)
    before = tl.zeros([BLOCK, BLOCK_OTHERS], tl.int32)  # entries of others
    total = tl.zeros([BLOCK_OTHERS], tl.int32)
    for start in range(0, num_sequences, BLOCK_OTHERS):
        other = start + tl.arange(0, BLOCK_OTHERS)
        of_other = _tiles_of(other, cu_seqlens_ptr, num_sequences, ROWS)
        least = num_tiles[:, None] + (other[None, :] >= index[:, None]).to(tl.int32)
        before += tl.where(of_other[None, :] >= least, of_other[None, :], 0)
        total += of_other
    start_entry = tl.sum(before, axis=1)  # [BLOCK]
    for block in range(tl.max(num_tiles, axis=0)):
        entry_ptrs = entries_ptr + (start_entry + block) * 2
        tl.store(entry_ptrs, index, mask=block < num_tiles)
        tl.store(entry_ptrs + 1, tl.zeros_like(index) + block * ROWS, mask=block < num_tiles)
    # The entries that are left, shared by the programs
    start_unused = tl.sum(total, axis=0) + tl.program_id(0) * BLOCK_OTHERS
    for start in range(start_unused, num_entries, tl.num_programs(0) * BLOCK_OTHERS):
        entry = start + tl.arange(0, BLOCK_OTHERS)
        tl.store(entries_ptr + entry * 2, -1, mask=entry < num_entries)
        tl.store(entries_ptr + entry * 2 + 1, -1, mask=entry < num_entries)


def tile_list(cu_seqlens: Tensor, total: int) -> Tensor:
    """The op `stamp::tile_list`: int32 `[T // 64 + B, 2]`."""
    check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total)
    cu_seqlens = cu_seqlens.contiguous()
    num_sequences = cu_seqlens.shape[0] - 1
    num_entries = num_listed_tiles(total, num_sequences)
    entries = cu_seqlens.new_empty(num_entries, 2)
    launch(
        stamp_tile_list_kernel,
        launch_grid(max(ceil_div(num_sequences, _BLOCK), 1)),
        entries_ptr=entries,
        cu_seqlens_ptr=cu_seqlens,
        num_sequences=num_sequences,
        num_entries=num_entries,
        ROWS=TILE_ROWS,
        BLOCK=_BLOCK,
        BLOCK_OTHERS=_BLOCK_OTHERS,
    )
    return entries
