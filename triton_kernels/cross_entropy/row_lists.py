"""Which rows have a valid target: lists on the device, so that the kernels of the loss read no other rows."""

import torch
import triton
import triton.language as tl

from stamp_kernels.triton_kernels.cross_entropy.softmaxes import Softmaxes
from stamp_kernels.triton_kernels.cross_entropy.tiles import PerStep, RowLists
from stamp_kernels.triton_kernels.device import launch_grid

_ROWS_PER_PROGRAM = 4096


@triton.jit
def _have_targets(targets, row, first_step, num_steps, num_rows, ignore_index):
    """int32 in the shape of `row`: 1 for rows that exist and have a valid target in one of `num_steps` steps."""
    have = tl.zeros(row.shape, tl.int32)
    for step in range(num_steps):
        pointers = targets.ptr + row.to(tl.int64) * targets.stride_row + (first_step + step) * targets.stride_step
        target = tl.load(pointers, mask=row < num_rows, other=ignore_index)
        have = have | (target != ignore_index).to(tl.int32)
    return have


@triton.jit(do_not_specialize=["num_rows", "num_steps", "ignore_index"])
def stamp_cross_entropy_list_rows_kernel(
    lists: RowLists,
    targets: PerStep,  # int64 [N, K]
    num_rows,
    num_steps,  # of one hidden
    ignore_index,
    BLOCK: tl.constexpr,
):
    """The places of BLOCK rows in the list of their hidden.

    Rows with a valid target come from the start on, the others from the end on. Every program counts the rows before
    its block by itself: all programs read the same targets, but in parallel, and a second launch would cost more.

    Grid: [ceil(N / BLOCK), num_hidden].
    """
    hidden = tl.program_id(1)
    first_step = hidden * num_steps
    start_row = tl.program_id(0) * BLOCK
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, start_row, BLOCK):
        counts += _have_targets(targets, start + tl.arange(0, BLOCK), first_step, num_steps, num_rows, ignore_index)
    row = start_row + tl.arange(0, BLOCK)
    have = _have_targets(targets, row, first_step, num_steps, num_rows, ignore_index)
    listed_before = tl.sum(counts, axis=0) + tl.cumsum(have, axis=0) - have
    place = tl.where(have != 0, listed_before, num_rows - 1 - (row - listed_before))
    tl.store(lists.rows + hidden.to(tl.int64) * num_rows + place, row, mask=row < num_rows)
    if start_row + BLOCK >= num_rows:
        tl.store(lists.lengths + hidden, tl.sum(counts, axis=0) + tl.sum(have, axis=0))


def list_rows(softmaxes: Softmaxes, ignore_index: int) -> RowLists:
    """The rows with a valid target, for each hidden. One launch, no host sync."""
    targets, num_hidden = softmaxes.targets, softmaxes.num_hidden
    lists = RowLists(
        rows=targets.new_empty((num_hidden, softmaxes.num_rows), dtype=torch.int32),
        lengths=targets.new_empty(num_hidden, dtype=torch.int32),
    )
    if softmaxes.num_rows > 0:
        grid = launch_grid(triton.cdiv(softmaxes.num_rows, _ROWS_PER_PROGRAM), num_hidden)
        stamp_cross_entropy_list_rows_kernel[grid](
            lists=lists,
            targets=softmaxes.target_argument(),
            num_rows=softmaxes.num_rows,
            num_steps=softmaxes.num_steps // num_hidden,
            ignore_index=ignore_index,
            BLOCK=_ROWS_PER_PROGRAM,
            num_warps=8,
        )
    return lists
