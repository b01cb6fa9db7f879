"""Centrality: the attention that each key receives, from the lse of an attention that has been computed.

With scores S_ij = scale * q_i . k_j + bias_ij, as in `attention.forward`:

    centrality_j = sum over heads and over the queries i that count of exp(S_ij - lse_i)
"""

import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.arguments import BiasArguments, Sequences, with_keys
from stamp_kernels.common.contents import check_sequences_contents
from stamp_kernels.triton_kernels.attention.configs import centrality_config, launch_options
from stamp_kernels.triton_kernels.attention.relative_bias import Bias, bias_tile, tile_positions
from stamp_kernels.triton_kernels.attention.tiles import (
    PER_BATCH,
    Grid,
    Offsets,
    Rows,
    Sequence,
    Tile,
    TileOrder,
    load_lse,
    load_rows,
    locate_tile,
    rows_of_head,
    rows_with_vector_strides,
    sequence_rows,
    tail_share,
    zero_tail_values,
)
from stamp_kernels.triton_kernels.device import device_properties, launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.rows import LOG2_E, ceil_div, contiguous


@triton.jit
def _add_queries(
    sums, k, start_k, begin_q, end_q, q_rows, lse_ptr, query_mask_ptr, bias, sequence, head, scale_log2,
    tile: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """sums [BLOCK_M, BLOCK_N] plus exp(S - lse) of one head and the queries `begin_q ... end_q - 1`.

    The tile adds up pair by pair, so that no step waits for a sum over its rows. `lse_ptr` is the head's. MASKED: the
    causal order hides some pairs.
    """
    BLOCK_M: tl.constexpr = tile.block_m
    BLOCK_N: tl.constexpr = tile.block_n
    key = start_k + tl.arange(0, BLOCK_N)
    if bias.weights is not None:
        offset_k = tl.arange(0, BLOCK_N)
        keys = tile_positions(bias.positions_k, sequence.first_k, start_k, offset_k, sequence.num_keys)
    for start_q in range(begin_q, end_q, BLOCK_M):
        query = start_q + tl.arange(0, BLOCK_M)
        exists = query < sequence.num_queries
        q = load_rows(q_rows, sequence.first_q, query, sequence.num_queries, tile)  # [BLOCK_M, BLOCK_D]
        # A query whose lse is +inf adds nothing: one past the end, one that sees no key.
        lse = load_lse(lse_ptr + sequence.first_q, query, exists)  # [BLOCK_M]
        # S = scale Q K^T + bias
        scores = scale_log2 * tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if bias.weights is not None:
            offset_q = tl.arange(0, BLOCK_M)
            queries = tile_positions(bias.positions_q, sequence.first_q, start_q, offset_q, sequence.num_queries)
            scores += bias_tile(bias, head, queries, keys)
        if MASKED:
            is_visible = key[None, :] <= query[:, None] + (sequence.num_keys - sequence.num_queries)
            scores = tl.where(is_visible, scores, float("-inf"))
        weights = tl.exp2(scores - lse[:, None])
        if query_mask_ptr is not None:  # a query that does not count may have a NaN
            counts = tl.load(query_mask_ptr + sequence.first_q + query, mask=exists, other=0) != 0  # [BLOCK_M]
            weights = tl.where(counts[:, None], weights, 0.0)
        sums += weights
    return sums


@triton.jit(do_not_specialize=PER_BATCH)
def stamp_attention_centrality_kernel(
    centrality_ptr,  # fp32 [Tk]
    q_rows: Rows,  # [Tq, Hq, D]
    k_rows: Rows,  # [Tk, Hkv, D]
    lse_ptr,  # fp32 [Hq, Tq]
    query_mask_ptr,  # bool [Tq], the queries that count, or None
    cu_seqlens: Offsets,  # int32 [B + 1]
    order: TileOrder,
    bias: Bias,
    num_tiles,
    num_sequences,
    total_q,
    total_k,
    num_heads,
    scale_log2,
    tile: tl.constexpr,  # Tile
):
    """The centrality of BLOCK_N keys of one sequence: all heads and all queries, added up in a fixed order.

    Grid: programs of a `Grid`. A head's keys stay in place while its queries pass. Keys past the end need no
    mask, since their sums are not stored, and neither do queries past the end, whose lse is +inf. The causal order
    needs one in the blocks on the diagonal; queries that see none of the keys are never read.
    """
    BLOCK_M: tl.constexpr = tile.block_m
    BLOCK_N: tl.constexpr = tile.block_n
    tile_index = tl.program_id(0)
    if tile_index >= num_tiles:
        share, num_shares = tail_share(tile_index, num_tiles, 1)
        zero_tail_values(centrality_ptr, cu_seqlens.k, num_sequences, total_k, share, num_shares)
        return
    index, block = locate_tile(tile_index, order, cu_seqlens.k, num_sequences, BLOCK_N)
    first_k, num_keys = sequence_rows(index, cu_seqlens.k)
    start_k = block * BLOCK_N
    if block >= tl.cdiv(num_keys, BLOCK_N):
        return

    first_q, num_queries = sequence_rows(index, cu_seqlens.q)
    sequence = Sequence(index=index, first_q=first_q, num_queries=num_queries, first_k=first_k, num_keys=num_keys)
    key = start_k + tl.arange(0, BLOCK_N)
    first_seeing_any = 0
    first_seeing_all = 0
    if tile.causal:  # query i sees the keys up to i + num_keys - num_queries
        shift = num_queries - num_keys
        first_seeing_any = tl.maximum(start_k + shift, 0) // BLOCK_M * BLOCK_M
        first_seeing_all = tl.cdiv(tl.maximum(start_k + BLOCK_N - 1 + shift, 0), BLOCK_M) * BLOCK_M
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for head in range(num_heads):
        head = tl.cast(head, tl.int64)
        k_of_head = rows_of_head(k_rows, head // tile.gqa_group_size)
        k = load_rows(k_of_head, first_k, key, num_keys, tile)  # [BLOCK_N, BLOCK_D]
        for seeing_all in tl.static_range(0 if tile.causal else 1, 2):
            sums = _add_queries(
                sums, k, start_k, first_seeing_all if seeing_all else first_seeing_any,
                num_queries if seeing_all else tl.minimum(first_seeing_all, num_queries),
                rows_of_head(q_rows, head), lse_ptr + head * total_q, query_mask_ptr, bias, sequence, head, scale_log2,
                tile, not seeing_all,
            )  # fmt: skip
    tl.store(centrality_ptr + first_k + key, tl.sum(sums, axis=0), mask=key < num_keys)


def attention_centrality(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
    bias: BiasArguments,
    query_mask: Tensor | None,
) -> Tensor:
    """The op `stamp::attention_centrality`: fp32 `[Tk]`, 0 on tail rows. No host sync."""
    check_sequences_contents(sequences, q.shape[0], k.shape[0])
    q, k, lse = rows_with_vector_strides(q), rows_with_vector_strides(k), lse.contiguous()
    sequences, bias = with_keys(sequences, bias)
    cu_seqlens_q, cu_seqlens_k, tiles_k, query_mask = contiguous(
        sequences.cu_seqlens_q, sequences.cu_seqlens_k, sequences.tiles_k, query_mask
    )
    return sum_over_queries(
        q, k, lse, Offsets(cu_seqlens_q, cu_seqlens_k), sequences.max_seqlen_k, tiles_k, causal, scale * LOG2_E.value,
        Bias.of(bias, q.device), query_mask,
    )  # fmt: skip


def sum_over_queries(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens: Offsets,
    max_seqlen_k: int,
    tiles_k: Tensor | None,
    causal: bool,
    scale_log2: float,
    bias: Bias,
    query_mask: Tensor | None,
) -> Tensor:
    """The centrality, of arguments as the kernels take them."""
    num_sequences = cu_seqlens.k.shape[0] - 1
    total_q, num_heads, head_dim = q.shape
    total_k = k.shape[0]
    config = centrality_config(device_properties(q.device), head_dim, element_size=q.element_size())
    centrality = lse.new_empty(total_k)
    grid = Grid.of(total_k, num_sequences, max_seqlen_k, config.block_n, tiles_k)
    launch(
        stamp_attention_centrality_kernel,
        launch_grid(grid.num_programs),
        centrality_ptr=centrality,
        q_rows=Rows.of(q),
        k_rows=Rows.of(k),
        lse_ptr=lse,
        query_mask_ptr=query_mask,
        cu_seqlens=cu_seqlens,
        order=grid.order,
        bias=bias,
        num_tiles=grid.num_tiles,
        num_sequences=num_sequences,
        total_q=total_q,
        total_k=total_k,
        num_heads=num_heads,
        scale_log2=scale_log2,
        tile=Tile.of(q, k, causal, config.block_m, config.block_n),
        **launch_options(config),
    )
    return centrality


# Sums of the forward's slots kernel over the heads

# Keys of a program.
_SUM_BLOCK = 256


@triton.jit(do_not_specialize=PER_BATCH)
def stamp_attention_fwd_centrality_kernel(
    centrality_ptr,  # fp32 [Tk]
    by_head_ptr,  # fp32 [Hq, Tk]
    cu_seqlens_k_ptr,  # int32 [B + 1]
    num_sequences,
    total_k,
    num_heads,
    BLOCK: tl.constexpr,
):
    """The centrality of BLOCK keys: the sum over the heads, in their order, and 0 on tail rows.

    Grid: [ceil(Tk / BLOCK)].
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = row < tl.load(cu_seqlens_k_ptr + num_sequences)
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(num_heads):
        total += tl.load(by_head_ptr + tl.cast(head, tl.int64) * total_k + row, mask=is_token, other=0.0)  # [BLOCK]
    tl.store(centrality_ptr + row, total, mask=row < total_k)


def sum_over_heads(by_head: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """fp32 `[Tk]`: by_head `[Hq, Tk]` summed over the heads, 0 on tail rows."""
    num_heads, total_k = by_head.shape
    centrality = by_head.new_empty(total_k)
    launch(
        stamp_attention_fwd_centrality_kernel,
        launch_grid(ceil_div(total_k, _SUM_BLOCK)),
        centrality_ptr=centrality,
        by_head_ptr=by_head,
        cu_seqlens_k_ptr=cu_seqlens_k,
        num_sequences=cu_seqlens_k.shape[0] - 1,
        total_k=total_k,
        num_heads=num_heads,
        BLOCK=_SUM_BLOCK,
    )
    return centrality
