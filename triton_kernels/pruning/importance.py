"""Importance: the attention each key receives, from the lse of an attention that has been computed, and its score.

With scores S_ij = scale * q_i . k_j + bias, as in `attention_forward`, and hidden states h:

    centrality_j = sum over heads and voting queries i of exp(S_ij - lse_i)
    importance_j = ||h_j|| * centrality_j
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.contents import check_cu_seqlens_contents
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.triton_kernels.device import launch_grid
from stamp_kernels.triton_kernels.rows import contiguous, power_of_two_divisor, sequence_ends


@triton.jit(do_not_specialize=["hidden_stride", "num_sequences", "total"])
def importance_kernel(
    importance_ptr,  # fp32 or fp64 [T]
    hidden_ptr,  # [T, WIDTH]
    centrality_ptr,  # fp32 or fp64 [T]
    cu_seqlens_ptr,  # int32 [B + 1]; None: every row is a token
    hidden_stride,
    num_sequences,
    total,
    WIDTH: tl.constexpr, STRIDE_DIVISOR: tl.constexpr, NORM_ORDER: tl.constexpr, PER_VISIBLE_QUERY: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The importance of ROWS rows, `||hidden[t]|| * centrality[t]`, 0 on tail rows, of which nothing is read.

    Grid: [ceil(T / ROWS)]. A row passes in blocks of COLUMNS, which add up column by column before their sum is taken:
    in an order that the width alone decides. PER_VISIBLE_QUERY: divided by the number of queries that see the token.
    """
    dtype: tl.constexpr = importance_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    num_tokens = total
    if cu_seqlens_ptr is not None:
        num_tokens = tl.load(cu_seqlens_ptr + num_sequences)
    is_token = row < num_tokens
    stride = tl.multiple_of(tl.cast(hidden_stride, tl.int64), STRIDE_DIVISOR)
    row_ptr = hidden_ptr + row.to(tl.int64) * stride
    parts = tl.zeros([ROWS, COLUMNS], dtype)
    for start in range(0, WIDTH, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        present = is_token[:, None] & (column < WIDTH)[None, :]
        hidden = tl.load(row_ptr[:, None] + column[None, :], mask=present, other=0.0).to(dtype)
        parts += tl.abs(hidden) if NORM_ORDER == 1 else hidden * hidden
    norm = tl.sum(parts, axis=1)
    if NORM_ORDER == 2:
        norm = tl.sqrt(norm)
    importance = norm * tl.load(centrality_ptr + row, mask=is_token, other=0.0).to(dtype)
    if PER_VISIBLE_QUERY:
        # Queries i, i + 1, ..., n - 1 see key i: as many as rows are left in its sequence.
        end = sequence_ends(row, is_token, cu_seqlens_ptr, num_sequences)
        importance /= tl.where(is_token, end - row, 1).to(dtype)
    tl.store(importance_ptr + row, tl.where(is_token, importance, 0.0), mask=row < total)


class ImportanceConfig(NamedTuple):
    """Tile of rows x columns."""

    rows: int
    columns: int
    num_warps: int


def importance_config(width: int, *, element_size: int) -> ImportanceConfig:
    """A thread of 128 adds up 32 columns or the like (16 in fp64): four loads of 16 bytes of a half precision."""
    elements = 2048 if element_size == 8 else 4096
    columns = min(1024, max(16, triton.next_power_of_2(width)))
    return ImportanceConfig(min(64, elements // columns), columns, num_warps=4)


def token_importance(
    hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor | None, norm_order: int, per_visible_query: bool
) -> Tensor:
    """The op `stamp::token_importance`: `[T]` in fp32 (fp64 where hidden is), 0 on tail rows. No host sync."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    centrality, cu_seqlens = contiguous(centrality, cu_seqlens)
    total, width = hidden.shape
    num_sequences = 0
    if cu_seqlens is not None:
        check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total)
        num_sequences = cu_seqlens.shape[0] - 1
    importance = hidden.new_empty(total, dtype=compute_dtype(hidden.dtype))
    if total == 0:
        return importance
    config = importance_config(width, element_size=hidden.element_size())
    stride = hidden.stride(0)
    importance_kernel[launch_grid(triton.cdiv(total, config.rows))](
        importance,
        hidden,
        centrality,
        cu_seqlens,
        stride,
        num_sequences,
        total,
        WIDTH=width,
        STRIDE_DIVISOR=power_of_two_divisor(stride, 16),
        NORM_ORDER=norm_order,
        PER_VISIBLE_QUERY=per_visible_query,
        ROWS=config.rows,
        COLUMNS=config.columns,
        num_warps=config.num_warps,
    )
    return importance
