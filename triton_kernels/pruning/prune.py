"""Pruning: importance, selection and gather in one op, from a block's hidden states and centrality to the kept rows.

With `protect` the protected items are counted first. Then there are three launches:

1. the importance, and in one program more the offsets of the kept tokens, which do not depend on it;
2. the selection, which also writes the positions;
3. the gather of all tensors.
"""

import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.arguments import BudgetArguments
from stamp_kernels.triton_kernels.device import launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.pruning.gather import gather_rows
from stamp_kernels.triton_kernels.pruning.importance import importance_launch, importance_of_rows
from stamp_kernels.triton_kernels.pruning.selection import choose, plan_selection
from stamp_kernels.triton_kernels.pruning.selection_kernels import (
    VARYING,
    Offsets,
    SequenceCounts,
    write_kept_offsets,
)


@triton.jit(do_not_specialize=["stride_row", *VARYING])
def stamp_prune_importance_and_offsets_kernel(
    importance_ptr,  # fp32 or fp64 [T]
    hidden_ptr,  # [T, WIDTH]
    centrality_ptr,  # fp32 or fp64 [T]
    offsets: Offsets,
    counts: SequenceCounts,
    stride_row,  # of hidden
    budget: tl.int64,
    min_keep: tl.int64,
    num_sequences,
    total,
    total_kept,
    WIDTH: tl.constexpr, STRIDE_DIVISOR: tl.constexpr, NORM_ORDER: tl.constexpr, PER_VISIBLE_QUERY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BUDGET_IS_RATIO: tl.constexpr, CODES_PER_ITEM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program 0 writes where the kept tokens of each sequence begin; each other program, the importance of ROWS rows.

    Grid: [1 + ceil(T / ROWS)].
    """
    if tl.program_id(0) == 0:
        write_kept_offsets(
            offsets, counts, budget, min_keep, num_sequences, total_kept, BUDGET_IS_RATIO, CODES_PER_ITEM, BLOCK
        )
    else:
        importance_of_rows(
            tl.program_id(0) - 1, importance_ptr, hidden_ptr, centrality_ptr, offsets.source, stride_row,
            num_sequences, total, WIDTH, STRIDE_DIVISOR, NORM_ORDER, PER_VISIBLE_QUERY, ROWS, COLUMNS,
        )  # fmt: skip


def prune(
    x: list[Tensor],
    centrality: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    norm_order: int,
    per_visible_query: bool,
    budget: BudgetArguments,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """The op `stamp::prune`: (rows of x, their positions, indices, cu_seqlens, inverse). No host sync."""
    plan = plan_selection(x[0].shape[0], cu_seqlens, max_seqlen, budget)
    importance, num_blocks, arguments = importance_launch(x[0], centrality, norm_order, per_visible_query)
    launch(
        stamp_prune_importance_and_offsets_kernel,
        launch_grid(1 + num_blocks),
        **arguments,
        **plan.arguments,
        BLOCK=plan.offsets_block,
    )
    positions = None if positions is None else positions.contiguous()
    selected = choose(plan, importance, positions=positions, with_positions=True)
    rows = gather_rows(x, selected.indices)
    return rows, selected.kept_positions, selected.indices, plan.offsets.kept, selected.inverse
