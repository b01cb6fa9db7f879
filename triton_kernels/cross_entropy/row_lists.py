"""Which rows have a valid target: lists on the device, so that the kernels of the loss read no other rows.

A row's place in its list depends on how many rows before it have a valid target. Two launches, each of which reads the
targets once: the first one counts the rows of every block, the second one adds up the counts of the blocks before its
own and places its rows. One block needs no counts, so few rows are one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.triton_kernels.cross_entropy.softmaxes import Softmaxes
from stamp_kernels.triton_kernels.cross_entropy.tiles import PerStep, RowLists
from stamp_kernels.triton_kernels.device import launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.rows import ceil_div

_ROWS_PER_BLOCK = 1024


@triton.jit
def _have_targets(targets, row, first_step, num_rows, ignore_index, NUM_STEPS: tl.constexpr):
    """int32 in the shape of `row`: 1 for rows that exist and have a valid target in one of NUM_STEPS steps."""
    have = tl.zeros(row.shape, tl.int32)
    pointers = targets.ptr + row.to(tl.int64) * targets.stride_row
    for i in tl.static_range(NUM_STEPS):
        target = tl.load(pointers + (first_step + i) * targets.stride_step, mask=row < num_rows, other=ignore_index)
        have = have | (target != ignore_index).to(tl.int32)
    return have


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def stamp_cross_entropy_count_rows_kernel(
    counts_ptr,  # int32 [num_hidden, ceil(N / BLOCK)]
    targets: PerStep,  # int64 [N, K]
    num_rows,
    ignore_index,
    NUM_STEPS: tl.constexpr,  # of one hidden
    BLOCK: tl.constexpr,
):
    """The number of rows with a valid target in one block of rows.

    Grid: [ceil(N / BLOCK), num_hidden].
    """
    block = tl.program_id(0)
    hidden = tl.program_id(1)
    row = block * BLOCK + tl.arange(0, BLOCK)
    have = _have_targets(targets, row, hidden * NUM_STEPS, num_rows, ignore_index, NUM_STEPS)
    tl.store(counts_ptr + hidden * tl.num_programs(0) + block, tl.sum(have, axis=0))


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def stamp_cross_entropy_list_rows_kernel(
    lists: RowLists,
    counts_ptr,  # int32 [num_hidden, ceil(N / BLOCK)], or None with one block
    targets: PerStep,  # int64 [N, K]
    num_rows,
    ignore_index,
    NUM_STEPS: tl.constexpr,  # of one hidden
    BLOCK: tl.constexpr,
):
    """The places of the rows of one block in the list of their hidden.

    Rows with a valid target come from the start on, the others from the end on.

    Grid: [ceil(N / BLOCK), num_hidden].
    """
    block = tl.program_id(0)
    hidden = tl.program_id(1)
    row = block * BLOCK + tl.arange(0, BLOCK)
    have = _have_targets(targets, row, hidden * NUM_STEPS, num_rows, ignore_index, NUM_STEPS)
    listed_before_block = 0
    if counts_ptr is not None:
        counts = tl.zeros([BLOCK], tl.int32)
        for start in range(0, block, BLOCK):
            earlier = start + tl.arange(0, BLOCK)
            counts += tl.load(counts_ptr + hidden * tl.num_programs(0) + earlier, mask=earlier < block, other=0)
        listed_before_block = tl.sum(counts, axis=0)
    listed_before = listed_before_block + tl.cumsum(have, axis=0) - have
    place = tl.where(have != 0, listed_before, num_rows - 1 - (row - listed_before))
    tl.store(lists.rows + hidden.to(tl.int64) * num_rows + place, row, mask=row < num_rows)
    if block == tl.num_programs(0) - 1:
        tl.store(lists.lengths + hidden, listed_before_block + tl.sum(have, axis=0))


def list_rows(softmaxes: Softmaxes, ignore_index: int) -> RowLists:
    """The rows with a valid target, for each hidden. One or two launches, no host sync."""
    targets, num_rows, num_hidden = softmaxes.targets.ptr, softmaxes.num_rows, softmaxes.num_hidden
    lists = RowLists(
        rows=targets.new_empty((num_hidden, num_rows), dtype=torch.int32),
        lengths=targets.new_empty(num_hidden, dtype=torch.int32),
    )
    num_blocks = ceil_div(num_rows, _ROWS_PER_BLOCK)
    if num_blocks == 0:
        return lists
    arguments = dict(
        targets=softmaxes.targets,
        num_rows=num_rows,
        ignore_index=ignore_index,
        NUM_STEPS=softmaxes.num_steps // num_hidden,
        BLOCK=_ROWS_PER_BLOCK,
        num_warps=4,
    )
    counts: Tensor | None = None
    if num_blocks > 1:
        counts = targets.new_empty((num_hidden, num_blocks), dtype=torch.int32)
        launch(
            stamp_cross_entropy_count_rows_kernel, launch_grid(num_blocks, num_hidden), **arguments, counts_ptr=counts
        )
    launch(
        stamp_cross_entropy_list_rows_kernel,
        launch_grid(num_blocks, num_hidden),
        **arguments,
        lists=lists,
        counts_ptr=counts,
    )
    return lists
