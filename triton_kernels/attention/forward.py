"""Packed attention, forward: three kernels for three lengths, and their launcher.

For query i and key j of one sequence and one head, with scores S_ij = scale * q_i . k_j + bias and D_ij the dropout
mask over 1 - p:

    lse_i = log sum_j exp(S_ij)     P_ij = exp(S_ij - lse_i)     out_i = sum_j P_ij D_ij v_j
    centrality_j = sum over heads and voting queries i of P_ij

- `slots_kernel`, sequences of up to 32 tokens: several share a tile, each in a slot of its own, so that the matrix
  units see full tiles and a batch of thousands takes fewer programs;
- `short_kernel`, up to `_SHORT_LIMIT` tokens: a program sees whole rows of scores, so the softmax is exact in one pass
  and the column sums ride along;
- `general_kernel`, any length: online softmax over blocks of keys; the column sums are a pass of their own.

Which one runs depends on max_seqlen, dtype and head dim alone, and a sequence's rows are cut into the same tiles
wherever it stands in the batch: the same bits alone or in a batch. Nothing is added with atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.arguments import BiasArguments, DropoutArguments, Sequences, with_keys
from stamp_kernels.triton_kernels.attention.centrality import attention_centrality
from stamp_kernels.triton_kernels.attention.tiles import (
    bias_tile,
    distance_buckets,
    dropout_threshold,
    keep_fours,
    keep_tile,
    last_key_seen,
    load_rows,
    locate_tile,
    near_bias_tile,
    num_tiles,
    padded_head_dim,
    rows_with_vector_strides,
    sequence_rows,
    store_rows,
    tile_positions,
    visible_tile,
)
from stamp_kernels.triton_kernels.device import DeviceProperties, device_properties, launch_grid
from stamp_kernels.triton_kernels.rows import LN_2, LOG2_E, contiguous

# Arguments that differ from batch to batch: no kernel is compiled anew for their values.
_VARYING = ["num_sequences", "total_q", "total_k", "dropout_threshold"]


# Any length


@triton.jit
def _attend_keys(
    acc, row_sum, row_max, q, start_q, first_key, end_key, sequence, head, gqa_group_size,
    k_ptr, v_ptr, table_ptr, buckets_ptr, positions_q_ptr, positions_k_ptr, dropout_seed_ptr,
    stride_k_row, stride_k_head, stride_v_row, stride_v_head, stride_table_bucket, stride_table_head,
    first_q, num_queries, first_k, num_keys, scale_log2, max_distance, dropout_threshold,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax of a query tile over the keys `first_key ... end_key - 1`, BLOCK_N at a time.

    The state after some keys, in units of log 2: row_max [BLOCK_M] = max_j S_ij, row_sum [BLOCK_M] =
    sum_j 2^(S_ij - row_max_i), acc [BLOCK_M, BLOCK_D] = sum_j 2^(S_ij - row_max_i) keep_ij v_j.

    MASKED False promises that every query sees every key, so there is no comparison.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    query = start_q + tl.arange(0, BLOCK_M)
    head_kv = head // gqa_group_size
    if table_ptr is not None:
        position_q, lowest_q, highest_q = tile_positions(
            positions_q_ptr, first_q, start_q, num_queries, BLOCK_M, positions_q_ptr is not None
        )
    for start_k in range(first_key, end_key, BLOCK_N):
        key = start_k + tl.arange(0, BLOCK_N)
        # [BLOCK_N, BLOCK_D]
        k = load_rows(k_ptr + head_kv * stride_k_head, first_k, key, stride_k_row, num_keys, HEAD_DIM, BLOCK_D, MASKED)
        scores = scale_log2 * tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if table_ptr is not None:
            position_k, lowest_k, highest_k = tile_positions(
                positions_k_ptr, first_k, start_k, num_keys, BLOCK_N, positions_k_ptr is not None
            )
            scores += bias_tile(
                position_q, lowest_q, highest_q, position_k, lowest_k, highest_k, buckets_ptr, max_distance,
                table_ptr + head * stride_table_head, stride_table_bucket,
            )  # fmt: skip
        if MASKED:
            scores = tl.where(visible_tile(query, key, num_queries, num_keys, CAUSAL), scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        # A row that has seen no key yet, or a bias of -inf alone, has the maximum -inf, and -inf - -inf is NaN.
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - pivot[:, None])
        rescale = tl.exp2(row_max - pivot)
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        if dropout_seed_ptr is not None:
            keep = keep_tile(dropout_seed_ptr, dropout_threshold, sequence, head, query, start_k, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        # [BLOCK_N, BLOCK_D]
        v = load_rows(v_ptr + head_kv * stride_v_head, first_k, key, stride_v_row, num_keys, HEAD_DIM, BLOCK_D, MASKED)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=_VARYING)
def general_kernel(
    out_ptr,  # [Tq, Hq, D]
    lse_ptr,  # fp32 [Hq, Tq]
    q_ptr,  # [Tq, Hq, D]
    k_ptr,  # [Tk, Hkv, D]
    v_ptr,  # [Tk, Hkv, D]
    cu_seqlens_q_ptr,  # int32 [B + 1]
    cu_seqlens_k_ptr,  # int32 [B + 1]
    table_ptr,  # [num_buckets, Hq] or None
    buckets_ptr,  # int32 [2 * max_distance + 1] or None
    positions_q_ptr,  # int32 [Tq] or None
    positions_k_ptr,  # int32 [Tk] or None
    dropout_seed_ptr,  # int64 [1] or None
    stride_out_row, stride_out_head, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head, stride_table_bucket, stride_table_head,
    num_sequences, total_q, num_heads, gqa_group_size,
    scale_log2,  # scale * log2(e)
    max_distance, dropout_threshold,
    keep_scale,  # 1 / (1 - p)
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M queries of one sequence and head, by online softmax over its keys.

    Grid: [num_tiles(Tq, B, BLOCK_M) * Hq], heads fastest, so that programs that run together read whole rows. A block
    of keys that every query of the tile sees is not masked; the blocks on the diagonal and at the end are, in a
    second loop. Keys that no query sees are never touched.
    """
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    tile = tl.program_id(0) // num_heads
    if CAUSAL:  # the last tiles of a sequence see the most keys: they start first
        tile = tl.num_programs(0) // num_heads - 1 - tile
    sequence, block = locate_tile(tile, cu_seqlens_q_ptr, num_sequences, BLOCK_M)
    first_q, num_queries = sequence_rows(sequence, cu_seqlens_q_ptr, num_sequences, total_q)
    start_q = block * BLOCK_M
    if start_q >= num_queries:
        return

    query = start_q + tl.arange(0, BLOCK_M)
    is_tail = sequence == num_sequences
    first_k = tl.load(cu_seqlens_k_ptr + sequence)
    # The tail rows see no key: out 0 and lse -inf come of themselves, and the latter is replaced below.
    num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1, mask=sequence < num_sequences, other=first_k) - first_k
    # [BLOCK_M, BLOCK_D]; nothing is read of the tail
    q = load_rows(
        q_ptr + head * stride_q_head, first_q, query, stride_q_row, tl.where(is_tail, 0, num_queries),
        HEAD_DIM, BLOCK_D, True,
    )  # fmt: skip

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    seen_by_all = tl.maximum(last_key_seen(start_q, num_queries, num_keys, CAUSAL), 0) // BLOCK_N * BLOCK_N
    seen_by_any = last_key_seen(start_q + BLOCK_M - 1, num_queries, num_keys, CAUSAL)
    for masked in tl.static_range(2):
        acc, row_sum, row_max = _attend_keys(
            acc, row_sum, row_max, q, start_q, seen_by_all if masked else 0, seen_by_any if masked else seen_by_all,
            sequence, head, gqa_group_size,
            k_ptr, v_ptr, table_ptr, buckets_ptr, positions_q_ptr, positions_k_ptr, dropout_seed_ptr,
            stride_k_row, stride_k_head, stride_v_row, stride_v_head, stride_table_bucket, stride_table_head,
            first_q, num_queries, first_k, num_keys, scale_log2, max_distance, dropout_threshold,
            masked, CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_N,
        )  # fmt: skip

    lse = tl.where(is_tail, 0.0, (row_max + tl.log2(row_sum)) * LN_2)
    tl.store(lse_ptr + head * total_q + first_q + query, lse, mask=query < num_queries)
    out = acc * tl.where(row_sum == 0.0, 0.0, keep_scale / row_sum)[:, None]
    store_rows(out_ptr + head * stride_out_head, out, first_q, query, stride_out_row, num_queries, HEAD_DIM, BLOCK_D)


# Whole rows of scores


@triton.jit
def _softmax(scores):
    """Of scores in units of log 2, -inf where hidden: (weights, inverse, lse).

    weights [BLOCK_M, BLOCK_N] = 2^(S_ij - max_j S_ij), inverse [BLOCK_M] = 1 / sum_j weights_ij, lse [BLOCK_M] =
    natural log of sum_j e^S_ij. A row that sees no key has weights and inverse 0 and lse -inf.
    """
    row_max = tl.max(scores, axis=1)
    pivot = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = tl.exp2(scores - pivot[:, None])
    row_sum = tl.sum(weights, axis=1)
    return weights, tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum), (pivot + tl.log2(row_sum)) * LN_2


@triton.jit
def _column_votes(weights, inverse, query_mask_ptr, row, exists):
    """[BLOCK_N]: the sum of P over the voting queries of a tile, whose packed rows are `row` where they exist."""
    if query_mask_ptr is not None:
        inverse = tl.where(tl.load(query_mask_ptr + row, mask=exists, other=0) != 0, inverse, 0.0)
    # In a tile of several sequences a NaN's row has 0 for its neighbours' keys, and 0 * NaN is NaN.
    return tl.sum(tl.where(weights == 0.0, 0.0, weights * inverse[:, None]), axis=0)


@triton.jit
def _zero_tail(
    out_ptr, lse_ptr, stride_out_row, stride_out_head, cu_seqlens_q_ptr, num_sequences, total_q, head,
    share, num_shares, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out and lse 0 on this program's share of the tail rows: every num_shares-th block of them."""
    row = tl.arange(0, BLOCK_M)
    zeros = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = tl.load(cu_seqlens_q_ptr + num_sequences)
    for start in range(first + share * BLOCK_M, total_q, num_shares * BLOCK_M):
        store_rows(
            out_ptr + head * stride_out_head, zeros, start, row, stride_out_row, total_q - start, HEAD_DIM, BLOCK_D
        )
        tl.store(lse_ptr + head * total_q + start + row, 0.0, mask=row < total_q - start)


@triton.jit
def _attend_whole_rows(
    out_ptr, lse_ptr, votes_ptr, q_ptr, k_ptr, v_ptr, table_ptr, buckets_ptr, positions_q_ptr, positions_k_ptr,
    query_mask_ptr, dropout_seed_ptr,
    stride_out_row, stride_out_head, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head, stride_table_bucket, stride_table_head,
    sequence, head, gqa_group_size, total_q, total_k, first_q, num_queries, first_k, num_keys,
    scale_log2, max_distance, dropout_threshold, keep_scale,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`short_kernel` for one sequence of at most BLOCK_N keys."""
    head_kv = head // gqa_group_size
    key = tl.arange(0, BLOCK_N)
    # [BLOCK_N, BLOCK_D]
    k = load_rows(k_ptr + head_kv * stride_k_head, first_k, key, stride_k_row, num_keys, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr + head_kv * stride_v_head, first_k, key, stride_v_row, num_keys, HEAD_DIM, BLOCK_D, True)
    if table_ptr is not None:
        position_k = key
        if positions_k_ptr is not None:
            position_k = tl.load(positions_k_ptr + first_k + key, mask=key < num_keys, other=0)
    votes = tl.zeros([BLOCK_N], tl.float32)
    for start_q in range(0, num_queries, BLOCK_M):
        query = start_q + tl.arange(0, BLOCK_M)
        exists = query < num_queries
        # [BLOCK_M, BLOCK_D]
        q = load_rows(q_ptr + head * stride_q_head, first_q, query, stride_q_row, num_queries, HEAD_DIM, BLOCK_D, True)
        scores = scale_log2 * tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if table_ptr is not None:
            position_q = query
            if positions_q_ptr is not None:
                position_q = tl.load(positions_q_ptr + first_q + query, mask=exists, other=0)
            head_table_ptr = table_ptr + head * stride_table_head
            scores += LOG2_E * near_bias_tile(
                position_q, position_k, buckets_ptr, max_distance, head_table_ptr, stride_table_bucket
            )
        scores = tl.where(visible_tile(query, key, num_queries, num_keys, CAUSAL), scores, float("-inf"))
        weights, inverse, lse = _softmax(scores)
        tl.store(lse_ptr + head * total_q + first_q + query, lse, mask=exists)
        if votes_ptr is not None:
            votes += _column_votes(weights, inverse, query_mask_ptr, first_q + query, exists)
        if dropout_seed_ptr is not None:
            keep = keep_tile(dropout_seed_ptr, dropout_threshold, sequence, head, query, 0, BLOCK_N)
            weights = tl.where(keep, weights, 0.0)
        out = tl.dot(weights.to(v.dtype), v, input_precision="ieee") * (inverse * keep_scale)[:, None]
        store_rows(
            out_ptr + head * stride_out_head, out, first_q, query, stride_out_row, num_queries, HEAD_DIM, BLOCK_D
        )
    if votes_ptr is not None:
        tl.store(votes_ptr + head * total_k + first_k + key, votes, mask=key < num_keys)


@triton.jit(do_not_specialize=_VARYING)
def short_kernel(
    out_ptr,  # [Tq, Hq, D]
    lse_ptr,  # fp32 [Hq, Tq]
    votes_ptr,  # fp32 [Hq, Tk] or None
    q_ptr,  # [Tq, Hq, D]
    k_ptr,  # [Tk, Hkv, D]
    v_ptr,  # [Tk, Hkv, D]
    cu_seqlens_q_ptr,  # int32 [B + 1]
    cu_seqlens_k_ptr,  # int32 [B + 1]
    table_ptr,  # [num_buckets, Hq] or None
    buckets_ptr,  # int32 [2 * max_distance + 1] or None
    positions_q_ptr,  # int32 [Tq] or None
    positions_k_ptr,  # int32 [Tk] or None
    query_mask_ptr,  # bool [Tq] or None
    dropout_seed_ptr,  # int64 [1] or None
    stride_out_row, stride_out_head, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head, stride_table_bucket, stride_table_head,
    num_sequences, total_q, total_k, num_heads, gqa_group_size,
    scale_log2,  # scale * log2(e)
    max_distance, dropout_threshold,
    keep_scale,  # 1 / (1 - p)
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and lse of a whole sequence and head, and with `votes_ptr` its column sums, the softmax exact in one pass.

    Grid: [max(B, 1) * Hq], heads fastest. Keys and values are read once; the loop goes over the query blocks and adds
    up the column sums in registers. Lengths vary below max_seqlen, so the program takes the narrowest tile, of
    BLOCK_N, BLOCK_N / 2 or BLOCK_N / 4 keys, that holds its sequence: by its own length, so with the same bits in any
    batch.
    """
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    sequence = tl.program_id(0) // num_heads
    _zero_tail(
        out_ptr, lse_ptr, stride_out_row, stride_out_head, cu_seqlens_q_ptr, num_sequences, total_q, head, sequence,
        tl.num_programs(0) // num_heads, HEAD_DIM, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    if sequence >= num_sequences:
        return
    first_q, num_queries = sequence_rows(sequence, cu_seqlens_q_ptr, num_sequences, total_q)
    first_k, num_keys = sequence_rows(sequence, cu_seqlens_k_ptr, num_sequences, total_k)
    for halvings in tl.static_range(3):
        narrower = BLOCK_N >> (halvings + 1) if halvings < 2 else -1
        if (num_keys <= BLOCK_N >> halvings) & (num_keys > narrower):
            _attend_whole_rows(
                out_ptr, lse_ptr, votes_ptr, q_ptr, k_ptr, v_ptr, table_ptr, buckets_ptr, positions_q_ptr,
                positions_k_ptr, query_mask_ptr, dropout_seed_ptr,
                stride_out_row, stride_out_head, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
                stride_v_row, stride_v_head, stride_table_bucket, stride_table_head,
                sequence, head, gqa_group_size, total_q, total_k, first_q, num_queries, first_k, num_keys,
                scale_log2, max_distance, dropout_threshold, keep_scale, CAUSAL, HEAD_DIM, BLOCK_D, BLOCK_M,
                BLOCK_N >> halvings,
            )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def slots_kernel(
    out_ptr,  # [Tq, Hq, D]
    lse_ptr,  # fp32 [Hq, Tq]
    votes_ptr,  # fp32 [Hq, Tk] or None
    q_ptr,  # [Tq, Hq, D]
    k_ptr,  # [Tk, Hkv, D]
    v_ptr,  # [Tk, Hkv, D]
    cu_seqlens_q_ptr,  # int32 [B + 1]
    cu_seqlens_k_ptr,  # int32 [B + 1]
    table_ptr,  # [num_buckets, Hq] or None
    buckets_ptr,  # int32 [2 * max_distance + 1] or None
    positions_q_ptr,  # int32 [Tq] or None
    positions_k_ptr,  # int32 [Tk] or None
    query_mask_ptr,  # bool [Tq] or None
    dropout_seed_ptr,  # int64 [1] or None
    stride_out_row, stride_out_head, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head, stride_table_bucket, stride_table_head,
    num_sequences, total_q, total_k, num_heads, gqa_group_size,
    scale_log2,  # scale * log2(e)
    max_distance, dropout_threshold,
    keep_scale,  # 1 / (1 - p)
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SLOT: tl.constexpr,
):  # fmt: skip
    """`short_kernel` for BLOCK / SLOT sequences of at most SLOT queries and SLOT keys at once.

    Grid: [max(ceil(B / (BLOCK / SLOT)), 1) * Hq], heads fastest. Sequence s stands in rows and columns
    `SLOT * (s % (BLOCK / SLOT)) + index` of a BLOCK x BLOCK tile of scores, of which only the pairs within a slot are
    visible. A slot starts at a multiple of 16, so sums over a row meet the same terms in the same order, and zeros,
    whichever slot it is: the same bits.
    """
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    head_kv = head // gqa_group_size
    group = tl.program_id(0) // num_heads
    _zero_tail(
        out_ptr, lse_ptr, stride_out_row, stride_out_head, cu_seqlens_q_ptr, num_sequences, total_q, head, group,
        tl.num_programs(0) // num_heads, HEAD_DIM, BLOCK_D, BLOCK,
    )  # fmt: skip

    row = tl.arange(0, BLOCK)
    slot = row // SLOT
    index = row % SLOT  # of the row's token in its sequence, as a query and as a key
    sequence = group * (BLOCK // SLOT) + slot
    in_batch = sequence < num_sequences
    first_q = tl.load(cu_seqlens_q_ptr + sequence, mask=in_batch, other=0)
    num_queries = tl.load(cu_seqlens_q_ptr + sequence + 1, mask=in_batch, other=0) - first_q
    first_k = tl.load(cu_seqlens_k_ptr + sequence, mask=in_batch, other=0)
    num_keys = tl.load(cu_seqlens_k_ptr + sequence + 1, mask=in_batch, other=0) - first_k
    query_exists = index < num_queries
    key_exists = index < num_keys

    # Each [BLOCK, BLOCK_D]
    q = load_rows(q_ptr + head * stride_q_head, first_q, index, stride_q_row, num_queries, HEAD_DIM, BLOCK_D, True)
    k = load_rows(k_ptr + head_kv * stride_k_head, first_k, index, stride_k_row, num_keys, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr + head_kv * stride_v_head, first_k, index, stride_v_row, num_keys, HEAD_DIM, BLOCK_D, True)
    scores = scale_log2 * tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK, BLOCK]
    if table_ptr is not None:
        position_q = index
        if positions_q_ptr is not None:
            position_q = tl.load(positions_q_ptr + first_q + index, mask=query_exists, other=0)
        position_k = index
        if positions_k_ptr is not None:
            position_k = tl.load(positions_k_ptr + first_k + index, mask=key_exists, other=0)
        scores += LOG2_E * near_bias_tile(
            position_q, position_k, buckets_ptr, max_distance, table_ptr + head * stride_table_head, stride_table_bucket
        )
    # The lengths are those of the row's own sequence: within a slot they are the pair's.
    visible = visible_tile(index, index, num_queries, num_keys, CAUSAL) & (slot[:, None] == slot[None, :])
    weights, inverse, lse = _softmax(tl.where(visible, scores, float("-inf")))
    weights = tl.where(visible, weights, 0.0)  # a NaN of one sequence makes whole rows NaN, its neighbours' part too
    tl.store(lse_ptr + head * total_q + first_q + index, lse, mask=query_exists)
    if votes_ptr is not None:
        votes = _column_votes(weights, inverse, query_mask_ptr, first_q + index, query_exists)
        tl.store(votes_ptr + head * total_k + first_k + index, votes, mask=key_exists)
    if dropout_seed_ptr is not None:
        four_keys = tl.arange(0, BLOCK // 4) % (SLOT // 4)
        keep = keep_fours(dropout_seed_ptr, dropout_threshold, sequence[:, None], head, index, four_keys)
        weights = tl.where(keep, weights, 0.0)
    out = tl.dot(weights.to(v.dtype), v, input_precision="ieee") * (inverse * keep_scale)[:, None]
    store_rows(out_ptr + head * stride_out_head, out, first_q, index, stride_out_row, num_queries, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=_VARYING)
def sum_votes_kernel(
    centrality_ptr,  # fp32 [Tk]
    votes_ptr,  # fp32 [Hq, Tk]
    cu_seqlens_k_ptr,  # int32 [B + 1]
    num_sequences, total_k, num_heads,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """centrality = the sum of votes over the heads, in their order, and 0 on tail rows. Grid: [ceil(Tk / BLOCK)]."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = row < tl.load(cu_seqlens_k_ptr + num_sequences)
    total = tl.zeros([BLOCK], tl.float32)
    for head in range(num_heads):
        total += tl.load(votes_ptr + tl.cast(head, tl.int64) * total_k + row, mask=is_token, other=0.0)
    tl.store(centrality_ptr + row, total, mask=row < total_k)


# Launching


class ForwardConfig(NamedTuple):
    """Which kernel runs, and its tiles: queries x keys; the slots kernel has BLOCK_M = BLOCK_N and a slot > 0.

    max_registers: of a thread. Unless told, ptxas goes below what a kernel needs to reach the next number of programs
    on a multiprocessor (255 to 168 to 128 registers), and spills 8 or 16 bytes for it: 255 tells it not to.
    """

    kernel: str  # "slots", "short" or "general"
    block_m: int
    block_n: int
    slot: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


_SLOTS_LIMIT = 32


def _short_limit(block_d: int, element_size: int) -> int:
    """The longest sequence whose whole rows of scores, 64 at a time, fit the registers beside keys and values."""
    if element_size == 4:
        return 128 if block_d <= 64 else 0
    return {16: 128, 32: 128, 64: 128, 128: 64, 256: 0}[block_d]


def forward_config(
    device: DeviceProperties,
    head_dim: int,
    max_seqlen: int,
    *,
    element_size: int,
    has_bias: bool,
    has_dropout: bool,
    has_positions: bool,
) -> ForwardConfig:
    """Kernel and tiles by counting registers, as Triton 3.6 compiles them; nothing here is measured on a GPU.

    A thread of 128 holds BLOCK_M * BLOCK_N / 128 scores and BLOCK_M * BLOCK_D / 128 outputs in fp32 beside the
    operands, and two or more programs should share the 65,536 registers of a multiprocessor, to hide loads that the
    lengths of these batches make the bottleneck: below about 500 tokens bytes bound attention, not FLOPs. A bias keeps
    an address and a weight for each score as well, dropout four random words for every four: they halve the tile or
    spread it over twice the threads. wgmma takes 64 rows per four warps, so no half-precision tile has fewer. fp32
    goes without matrix units, its tiles are small because products are unrolled in registers.

    By architecture:

    - sm_80, sm_86, sm_89 and sm_120 multiply from registers. Heads of 72 to 128 have 128 rows on 8 warps there at any
      length: 64 x 64 on 4 warps spills 40 bytes, 64 x 32 has twice the instructions for a pair (533 a loop, not 547
      for four times the pairs). With bias and dropout a second stage spills 16 bytes.
    - sm_100: a second stage makes Triton unroll the loop around tcgen05, and registers spill: programs hide each
      other's loads. tcgen05 has a thread for each of 128 rows; with bias and dropout 64 rows spill 168 to 192 bytes,
      4,900 instructions a loop against 1,433 for 128 x 32. (Heads of more than 128 spill even so: 936 for 3,648.)

    All fit the 101,376 bytes of shared memory of sm_86 and sm_120; the most is 73,728 for heads of more than 128.

    Args:
        max_seqlen: the longer one of max_seqlen_q and max_seqlen_k.
        element_size: bytes of an element of q.
    """
    block_d = padded_head_dim(head_dim)
    half = element_size == 2
    major = device.capability[0]
    from_registers = major in (8, 12)
    has_either, has_both = has_bias or has_dropout, has_bias and has_dropout
    max_registers = 255 if half and major != 9 and (has_either or head_dim > 64) else None
    if max_seqlen <= _SLOTS_LIMIT:
        slot = 16 if max_seqlen <= 16 else 32
        if half:
            return ForwardConfig("slots", 64, 64, slot, 4 if block_d <= 128 else 8, 1, max_registers)
        return ForwardConfig("slots", 32, 32, slot, num_warps=4 if block_d <= 64 else 8, num_stages=1)
    if max_seqlen <= _short_limit(block_d, element_size):
        block_n = max(64, triton.next_power_of_2(max_seqlen))
        if half:
            # 64 x 128 scores with random words do not fit 128 threads, but on sm_100 and without a bias. Nor do those
            # with a bias by positions on sm_86 and sm_120, where they spill 64 bytes; on sm_80 255 registers suffice.
            has_words = has_both or (has_dropout and major != 10)
            does_not_fit = has_bias and has_positions and from_registers and device.capability != (8, 0)
            num_warps = 8 if has_words or does_not_fit else 4
            return ForwardConfig("short", 64, block_n, 0, num_warps, 1, max_registers)
        return ForwardConfig("short", 16, block_n, 0, num_warps=4, num_stages=1)
    if not half:
        return ForwardConfig("general", 32 if block_d <= 64 else 16, 32, 0, num_warps=8, num_stages=1)
    num_stages = 1 if major == 10 or (from_registers and block_d == 128 and has_both) else 2
    if major == 10 and has_both:
        return ForwardConfig("general", 128, 32, 0, 4, num_stages, max_registers)
    if block_d == 256:
        return ForwardConfig("general", 64, 32, 0, 8, num_stages, max_registers)
    # Of heads between 64 and 128 the columns are masked: 128 x 64 spills 48 bytes on sm_80.
    block_n = 32 if has_either or (from_registers and 64 < head_dim < 128) else 64
    # Twice the rows halve the reads of keys and values, which pays where a sequence fills the tiles.
    has_many_rows = max_seqlen > 1024 or (from_registers and block_d == 128)
    block_m, num_warps = (128, 8) if has_many_rows else (64, 4)
    return ForwardConfig("general", block_m, block_n, 0, num_warps, num_stages, max_registers)


def packed_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
    bias: BiasArguments,
    centrality_query_mask: Tensor | None,
    dropout: DropoutArguments,
    return_centrality: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `stamp::packed_attention_forward`: (out [Tq, Hq, D], lse [Hq, Tq], centrality [Tk], or [0] if not asked).

    No host sync: lengths stay on the device, grids come from shapes and max_seqlen.
    """
    q, k, v = rows_with_vector_strides(q), rows_with_vector_strides(k), rows_with_vector_strides(v)
    sequences, bias = with_keys(sequences, bias)
    cu_seqlens_q, cu_seqlens_k, positions_q, positions_k, query_mask = contiguous(
        sequences.cu_seqlens_q, sequences.cu_seqlens_k, bias.positions_q, bias.positions_k, centrality_query_mask
    )
    bias_table, bias_bidirectional, bias_max_distance = bias[:3]
    dropout_p, dropout_seed = dropout
    total_q, num_heads, head_dim = q.shape
    total_k, num_heads_kv = k.shape[0], k.shape[1]
    num_sequences = cu_seqlens_q.shape[0] - 1
    config = forward_config(
        device_properties(q.device), head_dim, max(sequences.max_seqlen_q, sequences.max_seqlen_k),
        element_size=q.element_size(), has_bias=bias_table is not None, has_dropout=dropout_p > 0,
        has_positions=positions_q is not None or positions_k is not None,
    )  # fmt: skip
    out = q.new_empty(q.shape)
    lse = q.new_empty(num_heads, total_q, dtype=torch.float32)
    table_strides = (0, 0) if bias_table is None else bias_table.stride()
    arguments = dict(
        out_ptr=out, lse_ptr=lse, q_ptr=q, k_ptr=k, v_ptr=v,
        cu_seqlens_q_ptr=cu_seqlens_q, cu_seqlens_k_ptr=cu_seqlens_k,
        table_ptr=bias_table,
        buckets_ptr=None if bias_table is None else distance_buckets(
            bias_table.shape[0], bias_max_distance, bias_bidirectional, q.device
        ),
        positions_q_ptr=positions_q, positions_k_ptr=positions_k, dropout_seed_ptr=dropout_seed,
        stride_out_row=out.stride(0), stride_out_head=out.stride(1),
        stride_q_row=q.stride(0), stride_q_head=q.stride(1), stride_k_row=k.stride(0), stride_k_head=k.stride(1),
        stride_v_row=v.stride(0), stride_v_head=v.stride(1),
        stride_table_bucket=table_strides[0], stride_table_head=table_strides[1],
        num_sequences=num_sequences, total_q=total_q, num_heads=num_heads,
        gqa_group_size=num_heads // num_heads_kv,
        scale_log2=scale * LOG2_E.value, max_distance=bias_max_distance,
        dropout_threshold=dropout_threshold(dropout_p), keep_scale=1.0 / (1.0 - dropout_p),
        CAUSAL=causal, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim),
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
    )  # fmt: skip
    if config.kernel == "general":
        grid = launch_grid(num_tiles(total_q, num_sequences, config.block_m) * num_heads)
        general_kernel[grid](**arguments, BLOCK_M=config.block_m, BLOCK_N=config.block_n)
        if not return_centrality:
            return out, lse, lse.new_empty(0)
        centrality = attention_centrality(q, k, lse, sequences, causal, scale, bias, query_mask)
        return out, lse, centrality

    votes = lse.new_empty(num_heads, total_k) if return_centrality else None
    arguments |= dict(votes_ptr=votes, query_mask_ptr=query_mask, total_k=total_k)
    if config.kernel == "slots":
        groups = triton.cdiv(num_sequences, config.block_m // config.slot)
        grid = launch_grid(max(groups, 1) * num_heads)
        slots_kernel[grid](**arguments, BLOCK=config.block_m, SLOT=config.slot)
    else:
        grid = launch_grid(max(num_sequences, 1) * num_heads)
        short_kernel[grid](**arguments, BLOCK_M=config.block_m, BLOCK_N=config.block_n)
    if not return_centrality:
        return out, lse, lse.new_empty(0)
    centrality = lse.new_empty(total_k)
    sum_votes_kernel[launch_grid(triton.cdiv(total_k, 256))](
        centrality, votes, cu_seqlens_k, num_sequences, total_k, num_heads, BLOCK=256
    )
    return out, lse, centrality
