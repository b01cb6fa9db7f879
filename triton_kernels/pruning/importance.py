"""Importance of tokens, from the hidden states h of a block and the centrality of its attention:

    importance_j = ||h_j|| * centrality_j

With PER_VISIBLE_QUERY, importance_j is divided by the number of queries that see j.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.contents import check_cu_seqlens_contents
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.triton_kernels.device import launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.pruning.configs import importance_config
from stamp_kernels.triton_kernels.rows import ceil_div, power_of_two_divisor, sequence_ends


@triton.jit
def importance_of_rows(
    block, importance_ptr, hidden_ptr, centrality_ptr, cu_seqlens_ptr, stride_row, num_sequences, total,
    WIDTH: tl.constexpr, STRIDE_DIVISOR: tl.constexpr, NORM_ORDER: tl.constexpr, PER_VISIBLE_QUERY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The importance of ROWS rows, those of `block`: 0 on tail rows, which are not read.

    COLUMNS columns of a row at a time are added to sums per column, whose sum comes at the end: the order depends only
    on the width.
    """
    dtype: tl.constexpr = importance_ptr.dtype.element_ty
    row = block * ROWS + tl.arange(0, ROWS)
    num_tokens = total
    if cu_seqlens_ptr is not None:
        num_tokens = tl.load(cu_seqlens_ptr + num_sequences)
    is_token = row < num_tokens
    row_ptr = hidden_ptr + row.to(tl.int64) * tl.multiple_of(tl.cast(stride_row, tl.int64), STRIDE_DIVISOR)
    column_sums = tl.zeros([ROWS, COLUMNS], dtype)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        exists = is_token[:, None] & (column < WIDTH)[None, :]
        hidden = tl.load(row_ptr[:, None] + column[None, :], mask=exists, other=0.0).to(dtype)  # [ROWS, COLUMNS]
        column_sums += tl.abs(hidden) if NORM_ORDER == 1 else hidden * hidden
    norm = tl.sum(column_sums, axis=1)
    if NORM_ORDER == 2:
        norm = tl.sqrt(norm)
    importance = norm * tl.load(centrality_ptr + row, mask=is_token, other=0.0).to(dtype)
    if PER_VISIBLE_QUERY:
        # Queries i, i + 1, ..., n - 1 see key i: as many as rows are left in its sequence.
        end = sequence_ends(row, is_token, cu_seqlens_ptr, num_sequences)
        importance /= tl.where(is_token, end - row, 1).to(dtype)
    tl.store(importance_ptr + row, tl.where(is_token, importance, 0.0), mask=row < total)


@triton.jit(do_not_specialize=["stride_row", "num_sequences", "total"])
def stamp_token_importance_kernel(
    importance_ptr,  # fp32 or fp64 [T]
    hidden_ptr,  # [T, WIDTH]
    centrality_ptr,  # fp32 or fp64 [T]
    cu_seqlens_ptr,  # int32 [B + 1]; None: every row is a token
    stride_row,  # of hidden
    num_sequences,
    total,
    WIDTH: tl.constexpr, STRIDE_DIVISOR: tl.constexpr, NORM_ORDER: tl.constexpr, PER_VISIBLE_QUERY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The importance of ROWS rows.

    Grid: [ceil(T / ROWS)].
    """
    importance_of_rows(
        tl.program_id(0), importance_ptr, hidden_ptr, centrality_ptr, cu_seqlens_ptr, stride_row, num_sequences, total,
        WIDTH, STRIDE_DIVISOR, NORM_ORDER, PER_VISIBLE_QUERY, ROWS, COLUMNS,
    )  # fmt: skip


class ImportanceLaunch(NamedTuple):
    """What a launch that computes the importance has besides the sequences.

    Attributes:
        importance: `[T]` in fp32 (fp64 where hidden is), to be written.
        num_blocks: `importance_of_rows` is for each of these blocks.
        arguments: of the kernel, and options of the launch.
    """

    importance: Tensor
    num_blocks: int
    arguments: dict[str, Any]


def importance_launch(hidden: Tensor, centrality: Tensor, norm_order: int, per_visible_query: bool) -> ImportanceLaunch:
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    total, width = hidden.shape
    importance = hidden.new_empty(total, dtype=compute_dtype(hidden.dtype))
    config = importance_config(width, element_size=hidden.element_size())
    arguments = dict(
        importance_ptr=importance,
        hidden_ptr=hidden,
        centrality_ptr=centrality.contiguous(),
        stride_row=hidden.stride(0),
        total=total,
        WIDTH=width,
        STRIDE_DIVISOR=power_of_two_divisor(hidden.stride(0), 16),
        NORM_ORDER=norm_order,
        PER_VISIBLE_QUERY=per_visible_query,
        ROWS=config.rows,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
    )
    return ImportanceLaunch(importance, ceil_div(total, config.rows), arguments)


def token_importance(
    hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor | None, norm_order: int, per_visible_query: bool
) -> Tensor:
    """The op `stamp::token_importance`: `[T]` in fp32 (fp64 where hidden is), 0 on tail rows. No host sync."""
    num_sequences = 0
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
        check_cu_seqlens_contents("cu_seqlens", cu_seqlens, hidden.shape[0])
        num_sequences = cu_seqlens.shape[0] - 1
    importance, num_blocks, arguments = importance_launch(hidden, centrality, norm_order, per_visible_query)
    if num_blocks > 0:
        launch(
            stamp_token_importance_kernel,
            launch_grid(num_blocks),
            cu_seqlens_ptr=cu_seqlens,
            num_sequences=num_sequences,
            **arguments,
        )
    return importance
