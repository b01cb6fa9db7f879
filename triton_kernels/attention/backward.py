"""Backward of packed attention: dQ and the bias gradient by queries, dK and dV by keys.

For query i and key j of one sequence and one head, with the notation of stamp_kernels.reference.attention:

    P_ij = exp(S_ij - lse_i)      dP_ij = D_ij dO_i . v_j      delta_i = dO_i . O_i      dS_ij = P_ij (dP_ij - delta_i)
    dQ_i = scale sum_j dS_ij k_j      dK_j = scale sum_i dS_ij q_i      dV_j = sum_i P_ij D_ij dO_i

Every sum has one owner, a program that runs through its terms in a fixed order: the bits of two runs agree, and those
of a sequence do not depend on the batch around it. That costs seven matrix products where five would do, P and dP
being made by queries and again by keys, but no atomics, no fp32 dQ in memory, no second pass over it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.arguments import AttentionNeeds, BiasArguments, DropoutArguments, Sequences, with_keys
from stamp_kernels.triton_kernels.attention.tiles import (
    bias_tile,
    bucket_tile,
    distance_buckets,
    dropout_threshold,
    is_one_bucket,
    keep_tile,
    last_key_seen,
    load_rows,
    locate_tile,
    num_tiles,
    padded_head_dim,
    rows_with_vector_strides,
    sequence_rows,
    store_rows,
    the_one_bucket,
    tile_positions,
    visible_tile,
)
from stamp_kernels.triton_kernels.constants import device_constant
from stamp_kernels.triton_kernels.device import DeviceProperties, device_properties, launch_grid
from stamp_kernels.triton_kernels.rows import LOG2_E, contiguous

# Arguments that differ from batch to batch: no kernel is compiled anew for their values.
_VARYING = ["num_sequences", "total_q", "total_k", "dropout_threshold"]

# Adding up the bias gradient: tiles x buckets in one step.
_SUM_TILES = 128
_SUM_BUCKETS = 8  # 32 bytes, one sector of memory

# The bias gradient of a tile is added up by strips of 16 rows, which a warp has in its registers after a product.
_STRIP = tl.constexpr(16)

# Farther than any two tokens.
_FAR = tl.constexpr(2**30)


def distance_ranges(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """int32 `[2, num_buckets]`: the first and the last distance of each bucket, +-2^30 where it has no end.

    Buckets are ranges: each distance between has the same bucket. A bucket without distances, as bidirectional biases
    have one, ends before it begins. Like `distance_buckets`, not to be called first while a CUDA graph is captured.
    """

    def make() -> Tensor:
        buckets = distance_buckets(num_buckets, max_distance, bidirectional, torch.device("cpu")).long()
        distances = torch.arange(-max_distance, max_distance + 1)
        first = torch.ones(num_buckets, dtype=torch.int64)
        first.scatter_reduce_(0, buckets, distances, "amin", include_self=False)
        last = torch.zeros(num_buckets, dtype=torch.int64)
        last.scatter_reduce_(0, buckets, distances, "amax", include_self=False)
        first[first == -max_distance] = -_FAR.value
        last[last == max_distance] = _FAR.value
        return torch.stack([first, last]).to(torch.int32)

    return device_constant(("distance_ranges", num_buckets, max_distance, bidirectional), device, make)


# Parts of a tile


@triton.jit
def load_lse(lse_ptr, row, exists):
    """fp32 `[BLOCK]`, log-sum-exp in units of log 2; +inf where no key is seen and past the sequence.

    +inf makes exp2(score - lse) 0 whatever the score, so that such a query has no part in any sum.
    """
    lse = tl.load(lse_ptr + row, mask=exists, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def add_to_bucket(bucket_sums, bucket, x):
    """`bucket_sums` [STRIPS, BLOCK_BUCKETS] with the sum of x [BLOCK_M, BLOCK_N] added in column `bucket`, by strips.

    A warp has the 16 rows of a strip in its registers, so that no thread waits for another warp's part.
    """
    strips = tl.reshape(x, (bucket_sums.shape[0], x.shape[0] // bucket_sums.shape[0] * x.shape[1]))
    every_bucket = tl.arange(0, bucket_sums.shape[1])
    return bucket_sums + tl.where(every_bucket[None, :] == bucket, tl.sum(strips, axis=1)[:, None], 0.0)


@triton.jit
def sums_by_distance(x):
    """Sums of x `[BLOCK_M, BLOCK_N]` over the diagonals of each strip s of 16 rows, two times fp32 [STRIPS, BLOCK_N]:

        sums[s, c] = sum over r, j with j - r = c of x[16 s + r, j]
        wrapped[s, c] = sum over r, j with j - r = c - BLOCK_N of x[16 s + r, j]

    Row r turned left by r columns has in column c what stood in column (c + r) mod BLOCK_N, so that diagonals stand
    upright; below them those that the turn has carried around the edge.
    """
    BLOCK_M: tl.constexpr = x.shape[0]
    BLOCK_N: tl.constexpr = x.shape[1]
    column = tl.arange(0, BLOCK_N)
    came_from = tl.arange(0, BLOCK_M)[:, None] % _STRIP + column[None, :]  # [BLOCK_M, BLOCK_N]
    turned = tl.reshape(tl.gather(x, came_from % BLOCK_N, axis=1), (BLOCK_M // _STRIP, _STRIP, BLOCK_N))
    in_place = (tl.arange(0, _STRIP)[:, None] + column[None, :] < BLOCK_N)[None, :, :]
    sums = tl.sum(tl.where(in_place, turned, 0.0), axis=1)
    wrapped = tl.sum(tl.where(in_place, 0.0, turned), axis=1)
    return sums, wrapped


@triton.jit
def sums_over_ranges(sums, lowest, first, last):
    """fp32 `[STRIPS, BLOCK_BUCKETS]`: the sum of sums[s, c] over the c with first[b] <= lowest[s] + c <= last[b].

    A bucket is a range of distances, so its sum is the difference of two prefix sums.

    Args:
        sums: fp32 [STRIPS, BLOCK_N], by distance.
        lowest: int32 [STRIPS], the distance of c = 0.
        first, last: int32 [BLOCK_BUCKETS], `distance_ranges`.
    """
    prefix = tl.cumsum(sums, axis=1)
    up_to_last = prefix_at(prefix, last[None, :] - lowest[:, None])
    return up_to_last - prefix_at(prefix, first[None, :] - 1 - lowest[:, None])


@triton.jit
def prefix_at(prefix, c):
    """`[STRIPS, BLOCK_BUCKETS]`: prefix[s, c[s, b]], 0 before the first column and the whole sum after the last."""
    inside = tl.minimum(tl.maximum(c, 0), prefix.shape[1] - 1)
    return tl.where(c < 0, 0.0, tl.gather(prefix, inside, axis=1))


@triton.jit
def keep_tile_by_keys(seed_ptr, threshold, sequence, head, query, key):
    """bool `[BLOCK_N, BLOCK_M]`: `keep_tile`, transposed.

    Every pair draws all four words of its counter and takes its own. Drawing them once for four keys and interleaving,
    as `keep_tile` does, makes the compiler draw in a layout that repeats the work of 16 lanes, twice, once for each use
    of the mask.
    """
    w0, w1, w2, w3 = tl.philox(  # each [BLOCK_N, BLOCK_M]
        tl.load(seed_ptr),
        (key // 4)[:, None].to(tl.uint32),
        query[None, :].to(tl.uint32),
        head.to(tl.uint32),
        sequence.to(tl.uint32),
    )
    is_odd, is_high = (key % 2 == 1)[:, None], (key % 4 >= 2)[:, None]
    word = tl.where(is_high, tl.where(is_odd, w3, w2), tl.where(is_odd, w1, w0))
    return word >= tl.cast(threshold, tl.uint32)


# Kernels


@triton.jit(do_not_specialize=_VARYING)
def attention_backward_query_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, delta_ptr, bucket_sums_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, positions_q_ptr, positions_k_ptr, buckets_ptr, ranges_ptr, table_ptr,
    seed_ptr, num_sequences, total_q, num_heads,
    stride_grad_out_row, stride_grad_out_head, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head, stride_out_row, stride_out_head, stride_dq_row, stride_dq_head,
    stride_table_bucket, stride_table_head,
    scale, max_distance, dropout_threshold, keep_scale,
    CAUSAL: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, NUM_BUCKETS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one sequence, one head: delta, dQ, and the tile's part of the bias gradient.

        delta_i = dO_i . O_i
        dS_ij = P_ij (D_ij dO_i . v_j - delta_i)
        dQ_i = scale sum_j dS_ij k_j
        bucket_sums[b] = sum of dS_ij over i of this program, j with bucket(i, j) = b

    Grid: [num_tiles(Tq, B, BLOCK_M) * Hq], heads fastest, so that programs that run together read whole rows.

    A pointer that is None switches its part off: dq_ptr, delta_ptr and bucket_sums_ptr what nobody needs, table_ptr
    (and with it buckets_ptr) the bias, seed_ptr dropout. Without dQ and bias gradient there is no loop over the keys.

    Args:
        grad_out_ptr, q_ptr, out_ptr, dq_ptr: [Tq, Hq, HEAD_DIM].
        k_ptr, v_ptr: [Tk, Hq / GROUP_SIZE, HEAD_DIM].
        lse_ptr, delta_ptr: fp32 [Hq, Tq].
        bucket_sums_ptr: fp32 [num_tiles, Hq, NUM_BUCKETS], one row a program, written by idle programs too.
        buckets_ptr: `distance_buckets`; ranges_ptr: `distance_ranges`; table_ptr: [NUM_BUCKETS, Hq].
    """
    program = tl.program_id(0)
    head = (program % num_heads).to(tl.int64)
    tile = program // num_heads
    if CAUSAL:  # the last tiles of a sequence see the most keys: they start first
        tile = tl.num_programs(0) // num_heads - 1 - tile
    sequence, block = locate_tile(tile, cu_seqlens_q_ptr, num_sequences, BLOCK_M)
    first_q, num_queries = sequence_rows(sequence, cu_seqlens_q_ptr, num_sequences, total_q)
    start_q = block * BLOCK_M
    query = start_q + tl.arange(0, BLOCK_M)

    every_bucket = tl.arange(0, BLOCK_BUCKETS)
    if bucket_sums_ptr is not None:
        bucket_sums_ptrs = bucket_sums_ptr + program.to(tl.int64) * NUM_BUCKETS + every_bucket
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    if (start_q >= num_queries) | (sequence == num_sequences):  # nothing to do, or tail rows
        if dq_ptr is not None:
            store_rows(
                dq_ptr + head * stride_dq_head, dq, first_q, query, stride_dq_row, num_queries, HEAD_DIM, BLOCK_D
            )
        if bucket_sums_ptr is not None:
            tl.store(bucket_sums_ptrs, tl.zeros([BLOCK_BUCKETS], tl.float32), mask=every_bucket < NUM_BUCKETS)
        return

    grad_out = load_rows(  # [BLOCK_M, BLOCK_D]
        grad_out_ptr + head * stride_grad_out_head, first_q, query, stride_grad_out_row, num_queries,
        HEAD_DIM, BLOCK_D, BOUNDED=True,
    )  # fmt: skip
    out = load_rows(
        out_ptr + head * stride_out_head, first_q, query, stride_out_row, num_queries, HEAD_DIM, BLOCK_D, BOUNDED=True
    )
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), axis=1)  # [BLOCK_M]
    row_of_head = head * total_q + first_q + query
    if delta_ptr is not None:
        tl.store(delta_ptr + row_of_head, delta, mask=query < num_queries)

    if dq_ptr is not None or bucket_sums_ptr is not None:
        first_k, num_keys = sequence_rows(sequence, cu_seqlens_k_ptr, num_sequences, 0)
        q = load_rows(
            q_ptr + head * stride_q_head, first_q, query, stride_q_row, num_queries, HEAD_DIM, BLOCK_D, BOUNDED=True
        )
        lse = load_lse(lse_ptr, row_of_head, query < num_queries)
        if table_ptr is not None:
            head_table_ptr = table_ptr + head * stride_table_head
            position_q, lowest_q, highest_q = tile_positions(
                positions_q_ptr, first_q, start_q, num_queries, BLOCK_M, positions_q_ptr is not None
            )
        bucket_sums = tl.zeros([BLOCK_M // _STRIP, BLOCK_BUCKETS], tl.float32)
        if bucket_sums_ptr is not None:
            exists = every_bucket < NUM_BUCKETS
            first_distance = tl.load(ranges_ptr + every_bucket, mask=exists, other=_FAR)
            last_distance = tl.load(ranges_ptr + NUM_BUCKETS + every_bucket, mask=exists, other=-_FAR)
        k_head_ptr = k_ptr + head // GROUP_SIZE * stride_k_head
        v_head_ptr = v_ptr + head // GROUP_SIZE * stride_v_head
        last_query = tl.minimum(start_q + BLOCK_M, num_queries) - 1
        for start_k in range(0, last_key_seen(last_query, num_queries, num_keys, CAUSAL), BLOCK_N):
            key = start_k + tl.arange(0, BLOCK_N)
            k = load_rows(k_head_ptr, first_k, key, stride_k_row, num_keys, HEAD_DIM, BLOCK_D, BOUNDED=True)
            v = load_rows(v_head_ptr, first_k, key, stride_v_row, num_keys, HEAD_DIM, BLOCK_D, BOUNDED=True)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2_E)  # [BLOCK_M, BLOCK_N]
            if table_ptr is not None:
                position_k, lowest_k, highest_k = tile_positions(
                    positions_k_ptr, first_k, start_k, num_keys, BLOCK_N, positions_k_ptr is not None
                )
                scores += bias_tile(
                    position_q, lowest_q, highest_q, position_k, lowest_k, highest_k, buckets_ptr, max_distance,
                    head_table_ptr, stride_table_bucket,
                )  # fmt: skip
            visible = visible_tile(query, key, num_queries, num_keys, CAUSAL)
            weights = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
            d_weights = tl.dot(grad_out, tl.trans(v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if seed_ptr is not None:
                keep = keep_tile(seed_ptr, dropout_threshold, sequence, head, query, start_k, BLOCK_N)
                d_weights = tl.where(keep, d_weights * keep_scale, 0.0)
            d_scores = weights * (d_weights - delta[:, None])
            if dq_ptr is not None:
                dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision="ieee")
            if bucket_sums_ptr is not None:
                if is_one_bucket(lowest_q, highest_q, lowest_k, highest_k, max_distance):
                    bucket = the_one_bucket(highest_q, lowest_k, buckets_ptr, max_distance)
                    bucket_sums = add_to_bucket(bucket_sums, bucket, d_scores)
                elif positions_q_ptr is None and positions_k_ptr is None:
                    sums, wrapped = sums_by_distance(d_scores)
                    lowest = start_k - start_q - tl.arange(0, BLOCK_M // _STRIP) * _STRIP
                    bucket_sums += sums_over_ranges(sums, lowest, first_distance, last_distance)
                    bucket_sums += sums_over_ranges(wrapped, lowest - BLOCK_N, first_distance, last_distance)
                else:
                    buckets = bucket_tile(position_q, position_k, buckets_ptr, max_distance)
                    possible = (first_distance <= highest_k - lowest_q) & (last_distance >= lowest_k - highest_q)
                    lowest_bucket = tl.min(tl.where(possible, every_bucket, BLOCK_BUCKETS), axis=0)
                    highest_bucket = tl.max(tl.where(possible, every_bucket, -1), axis=0)
                    for bucket in range(lowest_bucket, highest_bucket + 1):
                        bucket_sums = add_to_bucket(bucket_sums, bucket, tl.where(buckets == bucket, d_scores, 0.0))

        if dq_ptr is not None:
            dq *= scale
            store_rows(
                dq_ptr + head * stride_dq_head, dq, first_q, query, stride_dq_row, num_queries, HEAD_DIM, BLOCK_D
            )
        if bucket_sums_ptr is not None:
            tl.store(bucket_sums_ptrs, tl.sum(bucket_sums, axis=0), mask=every_bucket < NUM_BUCKETS)


@triton.jit(do_not_specialize=_VARYING)
def attention_backward_key_kernel(
    grad_out_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, positions_q_ptr, positions_k_ptr, buckets_ptr, table_ptr, seed_ptr,
    num_sequences, total_q, total_k, num_heads_kv,
    stride_grad_out_row, stride_grad_out_head, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head, stride_dk_row, stride_dk_head, stride_dv_row, stride_dv_head,
    stride_table_bucket, stride_table_head,
    scale, max_distance, dropout_threshold, keep_scale,
    CAUSAL: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one sequence, one key head: dK and dV, summed over the queries and heads that read them.

        dV_j = sum over heads h of the group, queries i of P_hij D_hij dO_hi
        dK_j = scale sum over the same of dS_hij q_hi,      dS_hij = P_hij (D_hij dO_hi . v_j - delta_hi)

    Tiles are [BLOCK_N, BLOCK_M], keys by queries, so that P and dS enter the products that sum over queries as they
    stand in registers. Keys past the sequence's end need no mask: a key's row reaches no other row's sums.

    Grid: [num_tiles(Tk, B, BLOCK_N) * Hkv], heads fastest. A pointer that is None switches its part off: dk_ptr (and
    with it delta_ptr) or dv_ptr, table_ptr (and with it buckets_ptr) the bias, seed_ptr dropout.

    Args:
        grad_out_ptr, q_ptr: [Tq, Hkv * GROUP_SIZE, HEAD_DIM].
        k_ptr, v_ptr, dk_ptr, dv_ptr: [Tk, Hkv, HEAD_DIM].
        lse_ptr, delta_ptr: fp32 [Hkv * GROUP_SIZE, Tq].
        buckets_ptr: `distance_buckets`; table_ptr: [num_buckets, Hkv * GROUP_SIZE].
    """
    key_head = (tl.program_id(0) % num_heads_kv).to(tl.int64)
    tile = tl.program_id(0) // num_heads_kv
    sequence, block = locate_tile(tile, cu_seqlens_k_ptr, num_sequences, BLOCK_N)
    first_k, num_keys = sequence_rows(sequence, cu_seqlens_k_ptr, num_sequences, total_k)
    start_k = block * BLOCK_N
    if start_k >= num_keys:
        return
    key = start_k + tl.arange(0, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    if sequence < num_sequences:  # otherwise tail rows, which are never read
        first_q, num_queries = sequence_rows(sequence, cu_seqlens_q_ptr, num_sequences, 0)
        k = load_rows(  # [BLOCK_N, BLOCK_D]
            k_ptr + key_head * stride_k_head, first_k, key, stride_k_row, num_keys, HEAD_DIM, BLOCK_D, BOUNDED=True
        )
        if dk_ptr is not None:
            v = load_rows(
                v_ptr + key_head * stride_v_head, first_k, key, stride_v_row, num_keys, HEAD_DIM, BLOCK_D, BOUNDED=True
            )
        if table_ptr is not None:
            position_k, lowest_k, highest_k = tile_positions(
                positions_k_ptr, first_k, start_k, num_keys, BLOCK_N, positions_k_ptr is not None
            )
        query_end = num_queries
        first_query = 0
        if CAUSAL:  # the first query that sees start_k, at the start of its block
            first_query = tl.maximum(start_k + num_queries - num_keys, 0) // BLOCK_M * BLOCK_M

        for head_in_group in range(GROUP_SIZE):
            head = key_head * GROUP_SIZE + head_in_group
            q_head_ptr = q_ptr + head * stride_q_head
            grad_out_head_ptr = grad_out_ptr + head * stride_grad_out_head
            first_row_of_head = head * total_q + first_q
            for start_q in range(first_query, query_end, BLOCK_M):
                query = start_q + tl.arange(0, BLOCK_M)
                q = load_rows(q_head_ptr, first_q, query, stride_q_row, num_queries, HEAD_DIM, BLOCK_D, BOUNDED=True)
                grad_out = load_rows(
                    grad_out_head_ptr, first_q, query, stride_grad_out_row, num_queries, HEAD_DIM, BLOCK_D, BOUNDED=True
                )
                lse = load_lse(lse_ptr, first_row_of_head + query, query < num_queries)  # [BLOCK_M]
                scores = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2_E)  # [BLOCK_N, BLOCK_M]
                if table_ptr is not None:
                    position_q, lowest_q, highest_q = tile_positions(
                        positions_q_ptr, first_q, start_q, num_queries, BLOCK_M, positions_q_ptr is not None
                    )
                    # Transposed: p_k - p_q = (-p_q) - (-p_k), so keys stand for queries at negated positions.
                    scores += bias_tile(
                        -position_k, -highest_k, -lowest_k, -position_q, -highest_q, -lowest_q, buckets_ptr,
                        max_distance, table_ptr + head * stride_table_head, stride_table_bucket,
                    )  # fmt: skip
                weights = tl.exp2(scores - lse[None, :])
                if CAUSAL:
                    hidden = key[:, None] > query[None, :] + (num_keys - num_queries)
                    weights = tl.where(hidden, 0.0, weights)
                dropped = weights
                if seed_ptr is not None:
                    keep = keep_tile_by_keys(seed_ptr, dropout_threshold, sequence, head, query, key)
                    factors = tl.where(keep, keep_scale, 0.0)  # D of the equations
                    dropped = weights * factors
                if dv_ptr is not None:
                    dv = tl.dot(dropped.to(grad_out.dtype), grad_out, dv, input_precision="ieee")
                if dk_ptr is not None:
                    d_weights = tl.dot(v, tl.trans(grad_out), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
                    if seed_ptr is not None:
                        d_weights *= factors
                    delta = tl.load(delta_ptr + first_row_of_head + query, mask=query < num_queries, other=0.0)
                    d_scores = weights * (d_weights - delta[None, :])
                    dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision="ieee")

    if dk_ptr is not None:
        dk *= scale
        store_rows(dk_ptr + key_head * stride_dk_head, dk, first_k, key, stride_dk_row, num_keys, HEAD_DIM, BLOCK_D)
    if dv_ptr is not None:
        store_rows(dv_ptr + key_head * stride_dv_head, dv, first_k, key, stride_dv_row, num_keys, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_tiles"])
def sum_over_tiles_kernel(
    bucket_sums_ptr, dtable_ptr, num_tiles, num_heads,
    NUM_BUCKETS: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_BUCKETS: tl.constexpr,
):  # fmt: skip
    """BLOCK_BUCKETS buckets of one head: the bias gradient, added up over the tiles of the query kernel.

        dtable[b, h] = sum over tiles of bucket_sums[tile, h, b]

    Grid: [ceil(NUM_BUCKETS / BLOCK_BUCKETS) * Hq], heads fastest.

    Args:
        bucket_sums_ptr: fp32 [num_tiles, Hq, NUM_BUCKETS].
        dtable_ptr: [NUM_BUCKETS, Hq], contiguous, of the table's dtype.
    """
    head = tl.program_id(0) % num_heads
    bucket = tl.program_id(0) // num_heads * BLOCK_BUCKETS + tl.arange(0, BLOCK_BUCKETS)
    sums = tl.zeros([BLOCK_TILES, BLOCK_BUCKETS], tl.float32)
    for start in range(0, num_tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        exists = (tile < num_tiles)[:, None] & (bucket < NUM_BUCKETS)[None, :]
        row = tile.to(tl.int64) * num_heads + head
        sums += tl.load(bucket_sums_ptr + row[:, None] * NUM_BUCKETS + bucket[None, :], mask=exists, other=0.0)
    dtable = tl.sum(sums, axis=0).to(dtable_ptr.dtype.element_ty)
    tl.store(dtable_ptr + bucket * num_heads + head, dtable, mask=bucket < NUM_BUCKETS)


# Launcher


class TileConfig(NamedTuple):
    """BLOCK_M queries, BLOCK_N keys, and the launch options of one kernel; max_registers as in `ForwardConfig`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


# What the key kernel needs for 64 queries and 32 keys of 256 features, as counted in what Triton 3.6 compiles.
_WIDE_KEY_TILE_BYTES = 131072


def backward_config(
    device: DeviceProperties,
    head_dim: int,
    dtype: torch.dtype,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    has_bias: bool,
    has_dropout: bool,
    has_positions: bool,
) -> tuple[TileConfig, TileConfig]:
    """(query kernel, key kernel), by counting what Triton 3.6 compiles; no time was measured.

    Sequences of recommenders are short: below some 425 tokens the floor of the backward is memory traffic, and a tile
    only has to keep what it computes in registers. Of 255 in a thread, with 4 warps on 64 rows of bf16:

    - the query kernel accumulates dQ, head_dim / 2 of them, and holds P and dP, BLOCK_N / 2 each; a bias adds buckets
      and the two 64-bit addresses of its look-ups: 64 x 64 at head_dim 64 becomes 64 x 32. So does dropout, but on
      sm_90: elsewhere 64 x 64 spills 72 to 88 bytes;
    - the key kernel accumulates dK and dV, head_dim / 2 each, and holds P and dP, BLOCK_M / 2 each: 64 keys and 32
      queries at a time. sm_80 and sm_120 multiply from registers, where sm_90 reads shared memory and sm_100 has
      tensor memory for sums: 32 keys as soon as bias or dropout need registers of their own (64 spill 32 to 128
      bytes), and 32 x 32 for queries that also have positions (64 x 32 spills 16);
    - heads of 72 to 128 double the warps. With a bias or dropout sm_80 and sm_120 have 32 x 32 tiles there: for queries
      128 x 32 spills 32 to 440 bytes, for keys 64 x 32 with dropout has 1,214 instructions a loop on 8 warps, 32 x 32
      has 741 on 4. On sm_90 up to 64 queries with both have a smaller tile too: the half of 128 x 32 that
      is left for them spills 8 to 56 bytes;
    - above 128 shared memory is the limit. The query kernel takes 98,304 bytes, which every device has; the key
      kernel with 64 queries 131,072, so 32 queries where a block has less: sm_86, sm_89 and sm_120.

    A second stage loads the next block meanwhile. It is no use to a loop of one round, and on sm_100 it costs
    registers, as in the forward.

    fp32 is multiplied exactly, without matrix units, so its tiles are small. Where max_seqlen is smaller than a tile
    the tile shrinks.
    """
    major = device.capability[0]
    from_registers = major in (8, 12)
    has_either, has_both = has_bias or has_dropout, has_bias and has_dropout
    num_stages = 1 if major == 10 else 2
    if dtype == torch.float32:
        side = 32 if head_dim <= 128 else 16
        for_queries = for_keys = TileConfig(side, side, 4, 1)
    elif head_dim <= 64:
        if from_registers and has_both and has_positions:
            for_queries = TileConfig(32, 32, 4, 1)
        elif has_bias or (has_dropout and major != 9):
            for_queries = TileConfig(64, 32, 4, 2 if major == 9 else 1)
        else:
            for_queries = TileConfig(64, 64, 4, 2)
        for_keys = TileConfig(32, 32 if from_registers and has_either else 64, 4, 2)
    elif head_dim <= 128:
        if from_registers and has_either:
            for_queries = TileConfig(32, 32, 4, 2)
        elif major == 9 and has_both and max_seqlen_q <= 64:
            for_queries = TileConfig(32, 32, 4, 2) if has_positions else TileConfig(64, 32, 4, 1)
        else:
            for_queries = TileConfig(128, 32, 8, num_stages)
        for_keys = TileConfig(32, 32, 4, 2) if from_registers and has_dropout else TileConfig(32, 64, 8, num_stages)
    else:
        for_queries = TileConfig(32, 64, 8, 1)
        for_keys = TileConfig(64 if device.shared_memory >= _WIDE_KEY_TILE_BYTES else 32, 32, 8, 1)

    def shrunk(config: TileConfig, least_n: int, passes_over_queries: bool) -> TileConfig:
        block_m = min(config.block_m, max(16, triton.next_power_of_2(max_seqlen_q)))
        block_n = min(config.block_n, max(16, triton.next_power_of_2(max_seqlen_k)))
        if block_m > 16:
            block_n = max(block_n, least_n)
        share = config.block_m * config.block_n // (block_m * block_n)
        # A warp has at most 64 columns of an accumulator, and of a smaller tile with random words 16 x 32 pairs.
        num_warps = max(config.num_warps // share, padded_head_dim(head_dim) // 64, 1)
        if share > 1 and has_dropout:
            num_warps = max(num_warps, block_m * block_n // 512)
        is_one_round = max_seqlen_q <= block_m if passes_over_queries else max_seqlen_k <= block_n
        max_registers = 255 if num_warps < 4 or head_dim > 128 or (major != 9 and has_either) else None
        return TileConfig(block_m, block_n, num_warps, 1 if is_one_round else config.num_stages, max_registers)

    # Triton 3.6 fails to compile the gathers of `sums_by_distance` on 32 x 16 and 64 x 16 tiles.
    for_queries = shrunk(for_queries, least_n=32, passes_over_queries=False)
    return for_queries, shrunk(for_keys, least_n=16, passes_over_queries=True)


def packed_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
    bias: BiasArguments,
    dropout: DropoutArguments,
    needs: AttentionNeeds,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `stamp::packed_attention_backward`: (dq, dk, dv, dbias_table), each [0] where not needed."""
    total_q, num_heads, head_dim = q.shape
    total_k, num_heads_kv, _ = k.shape
    sequences, bias = with_keys(sequences, bias)
    num_sequences = sequences.num_sequences
    cu_seqlens_q, cu_seqlens_k, positions_q, positions_k = contiguous(
        sequences.cu_seqlens_q, sequences.cu_seqlens_k, bias.positions_q, bias.positions_k
    )
    bias_table, bias_bidirectional, bias_max_distance = bias[:3]
    dropout_p, dropout_seed = dropout
    need_dq, need_dk, need_dv, need_dbias = needs
    grad_out, q, k, v, out = (rows_with_vector_strides(x) for x in (grad_out, q, k, v, out))
    lse = lse.contiguous()

    dq = q.new_empty(q.shape if need_dq else 0)
    dk = k.new_empty(k.shape if need_dk else 0)
    dv = v.new_empty(v.shape if need_dv else 0)
    dtable = bias_table.new_empty(bias_table.shape) if need_dbias else q.new_empty(0)
    delta = lse.new_empty(lse.shape) if need_dk else None  # [Hq, Tq], from the query kernel to the key kernel

    for_queries, for_keys = backward_config(
        device_properties(q.device),
        head_dim,
        q.dtype,
        sequences.max_seqlen_q,
        sequences.max_seqlen_k,
        has_bias=bias_table is not None,
        has_dropout=dropout_p > 0,
        has_positions=positions_q is not None or positions_k is not None,
    )
    num_buckets, buckets, ranges = 1, None, None
    if bias_table is not None:
        num_buckets = bias_table.shape[0]
        buckets = distance_buckets(num_buckets, bias_max_distance, bias_bidirectional, q.device)
        ranges = distance_ranges(num_buckets, bias_max_distance, bias_bidirectional, q.device)
    query_tiles = num_tiles(total_q, num_sequences, for_queries.block_m)
    bucket_sums = lse.new_empty(query_tiles, num_heads, num_buckets) if need_dbias else None
    offsets_and_positions = (cu_seqlens_q, cu_seqlens_k, positions_q, positions_k)
    dropout_seed = dropout_seed if dropout_p > 0 else None
    table_strides = (0, 0) if bias_table is None else bias_table.stride()
    scalars = (scale, bias_max_distance, dropout_threshold(dropout_p), 1 / (1 - dropout_p))
    constants = dict(
        CAUSAL=causal, GROUP_SIZE=num_heads // num_heads_kv, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim)
    )

    def row_strides(*tensors: Tensor) -> list[int]:
        return [stride for x in tensors for stride in (x.stride(0), x.stride(1))]

    if need_dq or need_dk or need_dbias:
        attention_backward_query_kernel[launch_grid(query_tiles * num_heads)](
            grad_out, q, k, v, out, lse, dq if need_dq else None, delta, bucket_sums, *offsets_and_positions,
            buckets, ranges, bias_table, dropout_seed, num_sequences, total_q, num_heads,
            *row_strides(grad_out, q, k, v, out), *(row_strides(dq) if need_dq else (0, 0)), *table_strides, *scalars,
            **constants, NUM_BUCKETS=num_buckets, BLOCK_BUCKETS=triton.next_power_of_2(num_buckets),
            BLOCK_M=for_queries.block_m, BLOCK_N=for_queries.block_n,
            num_warps=for_queries.num_warps, num_stages=for_queries.num_stages, maxnreg=for_queries.max_registers,
        )  # fmt: skip
    if need_dbias:
        sum_over_tiles_kernel[launch_grid(triton.cdiv(num_buckets, _SUM_BUCKETS) * num_heads)](
            bucket_sums, dtable, query_tiles, num_heads,
            NUM_BUCKETS=num_buckets, BLOCK_TILES=_SUM_TILES, BLOCK_BUCKETS=_SUM_BUCKETS,
        )  # fmt: skip
    if need_dk or need_dv:
        key_tiles = num_tiles(total_k, num_sequences, for_keys.block_n)
        attention_backward_key_kernel[launch_grid(key_tiles * num_heads_kv)](
            grad_out, q, k, v, lse, delta, dk if need_dk else None, dv if need_dv else None,
            *offsets_and_positions, buckets, bias_table, dropout_seed, num_sequences, total_q, total_k, num_heads_kv,
            *row_strides(grad_out, q, k, v),
            *(row_strides(dk) if need_dk else (0, 0)), *(row_strides(dv) if need_dv else (0, 0)),
            *table_strides, *scalars, **constants, BLOCK_M=for_keys.block_m, BLOCK_N=for_keys.block_n,
            num_warps=for_keys.num_warps, num_stages=for_keys.num_stages, maxnreg=for_keys.max_registers,
        )  # fmt: skip
    return dq, dk, dv, dtable
