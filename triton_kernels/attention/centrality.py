"""Centrality: the attention that each key receives, from the lse of an attention that has been computed.

With scores S_ij = scale * q_i . k_j + bias, as in `attention.forward`:

    centrality_j = sum over heads and voting queries i of exp(S_ij - lse_i)
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.arguments import BiasArguments, Sequences, with_keys
from stamp_kernels.triton_kernels.attention.tiles import (
    bias_tile,
    distance_buckets,
    load_rows,
    locate_tile,
    num_tiles,
    padded_head_dim,
    rows_with_vector_strides,
    sequence_rows,
    tile_positions,
)
from stamp_kernels.triton_kernels.device import DeviceProperties, device_properties, launch_grid
from stamp_kernels.triton_kernels.rows import LOG2_E, contiguous


@triton.jit
def _collect_votes(
    votes, k, start_k, first_query, end_query, head,
    q_ptr, lse_ptr, table_ptr, buckets_ptr, positions_q_ptr, positions_k_ptr, query_mask_ptr,
    stride_q_row, stride_q_head, stride_table_bucket, stride_table_head,
    first_q, num_queries, first_k, num_keys, total_q, scale_log2, max_distance,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """votes [BLOCK_M, BLOCK_N] plus exp(S - lse) of one head and the queries `first_query ... end_query - 1`.

    The tile adds up pair by pair, so that no step waits for a sum over its rows. MASKED: causal order hides some pairs.
    """
    BLOCK_N: tl.constexpr = k.shape[0]
    key = start_k + tl.arange(0, BLOCK_N)
    if table_ptr is not None:
        position_k, lowest_k, highest_k = tile_positions(
            positions_k_ptr, first_k, start_k, num_keys, BLOCK_N, positions_k_ptr is not None
        )
    for start_q in range(first_query, end_query, BLOCK_M):
        query = start_q + tl.arange(0, BLOCK_M)
        exists = query < num_queries
        # [BLOCK_M, BLOCK_D]
        q = load_rows(q_ptr + head * stride_q_head, first_q, query, stride_q_row, num_queries, HEAD_DIM, BLOCK_D, True)
        lse = tl.load(lse_ptr + head * total_q + first_q + query, mask=exists, other=float("inf"))
        # A query with lse +inf votes nothing: one past the end, one that sees no key, one that the mask excludes.
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        if query_mask_ptr is not None:
            lse = tl.where(tl.load(query_mask_ptr + first_q + query, mask=exists, other=0) != 0, lse, float("inf"))
        scores = scale_log2 * tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if table_ptr is not None:
            position_q, lowest_q, highest_q = tile_positions(
                positions_q_ptr, first_q, start_q, num_queries, BLOCK_M, positions_q_ptr is not None
            )
            scores += bias_tile(
                position_q, lowest_q, highest_q, position_k, lowest_k, highest_k, buckets_ptr, max_distance,
                table_ptr + head * stride_table_head, stride_table_bucket,
            )  # fmt: skip
        if MASKED:
            scores = tl.where(key[None, :] <= query[:, None] + (num_keys - num_queries), scores, float("-inf"))
        votes += tl.exp2(scores - lse[:, None])
    return votes


@triton.jit(do_not_specialize=["num_sequences", "total_q", "total_k"])
def centrality_kernel(
    centrality_ptr,  # fp32 [Tk]
    q_ptr,  # [Tq, Hq, D]
    k_ptr,  # [Tk, Hkv, D]
    lse_ptr,  # fp32 [Hq, Tq]
    cu_seqlens_q_ptr,  # int32 [B + 1]
    cu_seqlens_k_ptr,  # int32 [B + 1]
    table_ptr,  # [num_buckets, Hq] or None
    buckets_ptr,  # int32 [2 * max_distance + 1] or None
    positions_q_ptr,  # int32 [Tq] or None
    positions_k_ptr,  # int32 [Tk] or None
    query_mask_ptr,  # bool [Tq] or None
    stride_q_row, stride_q_head, stride_k_row, stride_k_head, stride_table_bucket, stride_table_head,
    num_sequences, total_q, total_k, num_heads, gqa_group_size,
    scale_log2,  # scale * log2(e)
    max_distance,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The centrality of BLOCK_N keys of one sequence: all heads and all queries, added up in a fixed order.

    Grid: [num_tiles(Tk, B, BLOCK_N)]. A head's keys stay in place while its queries pass. Neither keys past the end
    (their sums are not stored) nor queries past the end (their lse is +inf) need a mask; causal order does, in the
    blocks on the diagonal, and queries that see none of the keys are never touched.
    """
    sequence, block = locate_tile(tl.program_id(0), cu_seqlens_k_ptr, num_sequences, BLOCK_N)
    first_k, num_keys = sequence_rows(sequence, cu_seqlens_k_ptr, num_sequences, total_k)
    start_k = block * BLOCK_N
    if start_k >= num_keys:
        return

    # The tail rows have no queries: their sums are 0.
    first_q = tl.load(cu_seqlens_q_ptr + sequence)
    num_queries = tl.load(cu_seqlens_q_ptr + sequence + 1, mask=sequence < num_sequences, other=first_q) - first_q
    key = start_k + tl.arange(0, BLOCK_N)
    first_seeing_any = 0
    first_seeing_all = 0
    if CAUSAL:  # query i sees the keys up to i + num_keys - num_queries
        shift = num_queries - num_keys
        first_seeing_any = tl.maximum(start_k + shift, 0) // BLOCK_M * BLOCK_M
        first_seeing_all = tl.cdiv(tl.maximum(start_k + BLOCK_N - 1 + shift, 0), BLOCK_M) * BLOCK_M
    votes = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for head in range(num_heads):
        head = tl.cast(head, tl.int64)
        head_k_ptr = k_ptr + head // gqa_group_size * stride_k_head
        # [BLOCK_N, BLOCK_D]; nothing is read of the tail
        k = load_rows(
            head_k_ptr, first_k, key, stride_k_row, tl.where(num_queries > 0, num_keys, 0), HEAD_DIM, BLOCK_D, True
        )
        for seeing_all in tl.static_range(0 if CAUSAL else 1, 2):
            votes = _collect_votes(
                votes, k, start_k, first_seeing_all if seeing_all else first_seeing_any,
                num_queries if seeing_all else tl.minimum(first_seeing_all, num_queries), head,
                q_ptr, lse_ptr, table_ptr, buckets_ptr, positions_q_ptr, positions_k_ptr, query_mask_ptr,
                stride_q_row, stride_q_head, stride_table_bucket, stride_table_head,
                first_q, num_queries, first_k, num_keys, total_q, scale_log2, max_distance,
                not seeing_all, HEAD_DIM, BLOCK_D, BLOCK_M,
            )  # fmt: skip
    tl.store(centrality_ptr + first_k + key, tl.sum(votes, axis=0), mask=key < num_keys)


class CentralityConfig(NamedTuple):
    """Tile of queries x keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def centrality_config(
    device: DeviceProperties, head_dim: int, *, element_size: int, has_bias: bool
) -> CentralityConfig:
    """Tiles by counting: a thread of 128 holds 32 scores and 32 sums of a 64 x 64 tile, and a bias an address and a
    weight for each score. The tile of keys and two of queries take 3 * 64 * BLOCK_D elements of shared memory, at most
    98,304 bytes, which every device has. With a second stage a causal loop spills 40 bytes on sm_100 at BLOCK_D 128, 8
    on sm_120 where columns are masked there, and 24 to 112 on sm_86 and sm_120 at BLOCK_D 256: they have one stage.
    fp32 goes without matrix units; its products are unrolled in registers, so its tiles are small.
    """
    if element_size == 4:
        return CentralityConfig(32, 32, num_warps=4 if padded_head_dim(head_dim) <= 64 else 8, num_stages=1)
    major = device.capability[0]
    has_one_stage = major == 10 or (major == 12 and 64 < head_dim < 128) or (major != 9 and head_dim > 128)
    return CentralityConfig(64, 32 if has_bias else 64, num_warps=4, num_stages=1 if has_one_stage else 2)


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
    q, k, lse = rows_with_vector_strides(q), rows_with_vector_strides(k), lse.contiguous()
    sequences, bias = with_keys(sequences, bias)
    cu_seqlens_q, cu_seqlens_k, positions_q, positions_k, query_mask = contiguous(
        sequences.cu_seqlens_q, sequences.cu_seqlens_k, bias.positions_q, bias.positions_k, query_mask
    )
    bias_table, bias_bidirectional, bias_max_distance = bias[:3]
    total_q, num_heads, head_dim = q.shape
    total_k, num_heads_kv, _ = k.shape
    num_sequences = sequences.num_sequences
    has_bias = bias_table is not None
    config = centrality_config(device_properties(q.device), head_dim, element_size=q.element_size(), has_bias=has_bias)
    centrality = lse.new_empty(total_k)
    centrality_kernel[launch_grid(num_tiles(total_k, num_sequences, config.block_n))](
        centrality,
        q,
        k,
        lse,
        cu_seqlens_q,
        cu_seqlens_k,
        bias_table,
        distance_buckets(bias_table.shape[0], bias_max_distance, bias_bidirectional, q.device) if has_bias else None,
        positions_q,
        positions_k,
        query_mask,
        *q.stride()[:2],
        *k.stride()[:2],
        *(bias_table.stride() if has_bias else (0, 0)),
        num_sequences,
        total_q,
        total_k,
        num_heads,
        num_heads // num_heads_kv,
        scale * LOG2_E.value,
        bias_max_distance,
        CAUSAL=causal,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return centrality
