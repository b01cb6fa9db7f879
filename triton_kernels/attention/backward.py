"""Packed attention, backward: dQ and the bias gradient by queries, dK and dV by keys, and their launcher.

For query i and key j of one sequence and one head, with the notation of `attention.forward`, G = Hq / Hkv heads h of q
that share a head of k and v, and dO the gradient of out:

    P_ij = exp(S_ij - lse_i)      dP_ij = D_ij dO_i . v_j      delta_i = dO_i . O_i      dS_ij = P_ij (dP_ij - delta_i)
    dQ_i = scale sum_j dS_ij k_j
    dK_j = scale sum_{h, i} dS_hij q_hi
    dV_j = sum_{h, i} P_hij D_hij dO_hi
    dbias_table[b, h] = sum_{i, j with bucket(i, j) = b} dS_hij

One program owns each sum and adds its terms in a fixed order: two runs give the same bits, and a sequence's bits do not
depend on the batch around it. That costs seven matrix products where five would do, since both kernels compute P and
dP, but it needs no atomics, no fp32 dQ in memory and no second pass over it.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.arguments import AttentionNeeds, BiasArguments, DropoutArguments, Sequences, with_keys
from stamp_kernels.common.contents import check_sequences_contents
from stamp_kernels.triton_kernels.attention.bias_gradient import (
    BucketSums,
    add_to_bucket_sums,
    distance_ranges,
    load_bucket_ranges,
    no_sums,
    sum_over_tiles,
    total_by_bucket,
)
from stamp_kernels.triton_kernels.attention.configs import (
    backward_config,
    has_whole_blocks,
    heads_of_tile,
    launch_options,
    rows_of_queries,
)
from stamp_kernels.triton_kernels.attention.dropout import (
    Dropout,
    dropout_threshold,
    groups_of,
    keep_tile,
)
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
    num_keys_seen,
    rows_of_head,
    rows_of_tile,
    rows_with_vector_strides,
    sequence_rows,
    store_rows,
    tail_share,
    visible_tile,
    zero_tail,
)
from stamp_kernels.triton_kernels.device import device_properties, launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.rows import INTERPRETED, LOG2_E, ceil_div, contiguous


class QueryTerms(NamedTuple):
    """What the key kernel needs of each query, from the query kernel: lse in units of log 2, and delta.

    The queries of a sequence take whole blocks, so that the key kernel loads them without a mask. Past the end, and
    where a query sees no key, lse is +inf: exp2(score - lse) is 0.

    Attributes:
        ptr: fp32 `[Hq, num_rows, 2]`; None if nobody needs dK or dV.
        num_rows: of all blocks.
    """

    ptr: Tensor | None
    num_rows: int

    @classmethod
    def empty(cls, lse: Tensor, num_sequences: int, block: int) -> "QueryTerms":
        num_heads, total_q = lse.shape
        num_rows = ceil_div((total_q // block + num_sequences) * block, 16) * 16  # 16: one specialisation
        return cls(lse.new_empty(num_heads, num_rows, 2), num_rows)


@triton.jit
def _terms_of(terms, head, index, first_q, tile: tl.constexpr):
    """Pointer to the terms of the first query of a head and sequence, or `[BLOCK]` of them where `head` is.

    The blocks of sequence i begin with block `cu_seqlens[i] // block + i`.
    """
    row = (first_q // tile.block_of_terms + index) * tile.block_of_terms
    return terms.ptr + (head * terms.num_rows + row) * 2


@triton.jit
def _store_terms(terms_ptr, query, lse, delta):
    tl.store(terms_ptr + query * 2, lse)
    tl.store(terms_ptr + query * 2 + 1, delta)


@triton.jit
def _load_terms(terms_ptr, query):
    """(lse, delta) fp32 [BLOCK], each loaded by the threads that use it.

    An ordinary load would be made ahead of the loop's round through shared memory, one copy of 4 bytes at a time.
    """
    pointers = terms_ptr + query * 2
    if INTERPRETED:
        return tl.load(pointers), tl.load(pointers + 1)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.v2.f32 {$0, $1}, [$2];", "=f,=f,l", [pointers.to(tl.int64)],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip


# By queries


@triton.jit
def _add_keys(
    dq, sums, q, grad_out, lse, delta, query, start_q, begin_k, end_k, k_rows, v_rows, bias, ranges, dropout, sequence,
    head, scale_log2, tile: tl.constexpr, NEEDS_DQ: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dQ / scale [BLOCK_M, BLOCK_D] and the PartialSums, plus those of the keys `begin_k ... end_k - 1`.

    MASKED False promises that every query sees every key. `ranges` None: nobody needs the sums.
    """
    BLOCK_M: tl.constexpr = tile.block_m
    BLOCK_N: tl.constexpr = tile.block_n
    num_queries, num_keys = sequence.num_queries, sequence.num_keys
    if bias.weights is not None:
        queries = tile_positions(bias.positions_q, sequence.first_q, start_q, tl.arange(0, BLOCK_M), num_queries)
    for start_k in range(begin_k, end_k, BLOCK_N):
        key = start_k + tl.arange(0, BLOCK_N)
        k = load_rows(k_rows, sequence.first_k, key, num_keys, tile, MASKED)  # [BLOCK_N, BLOCK_D]
        v = load_rows(v_rows, sequence.first_k, key, num_keys, tile, MASKED)  # [BLOCK_N, BLOCK_D]
        # S = scale Q K^T + bias
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
        if bias.weights is not None:
            keys = tile_positions(bias.positions_k, sequence.first_k, start_k, tl.arange(0, BLOCK_N), num_keys)
            scores += bias_tile(bias, head, queries, keys)
        # P = exp(S - lse)
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            weights = tl.where(visible_tile(query, key, num_queries, num_keys, tile.causal), weights, 0.0)
        # dP = D * (dO V^T)
        d_weights = tl.dot(grad_out, tl.trans(v), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if dropout.seed is not None:
            keep = keep_tile(dropout, sequence.index, head, groups_of(start_q, BLOCK_M), groups_of(start_k, BLOCK_N))
            d_weights = tl.where(keep, d_weights * dropout.keep_scale, 0.0)
        # dS = P * (dP - delta)
        d_scores = weights * (d_weights - delta[:, None])
        if NEEDS_DQ:
            # dQ += dS K
            dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
        if ranges is not None:
            sums = add_to_bucket_sums(sums, d_scores, queries, keys, num_queries, num_keys, ranges, bias)
    return dq, sums


@triton.jit(do_not_specialize=PER_BATCH)
def stamp_attention_bwd_query_kernel(
    grad_out_rows: Rows,  # [Tq, Hq, D]
    q_rows: Rows,  # [Tq, Hq, D]
    k_rows: Rows,  # [Tk, Hkv, D]
    v_rows: Rows,  # [Tk, Hkv, D]
    out_rows: Rows,  # [Tq, Hq, D]
    lse_ptr,  # fp32 [Hq, Tq]
    terms: QueryTerms,  # written
    dq_rows: Rows,  # [Tq, Hq, D] or None
    bucket_sums: BucketSums,
    cu_seqlens: Offsets,  # int32 [B + 1]
    order: TileOrder,
    bias: Bias,
    dropout_seed,  # int64 [1] or None
    dropout_threshold,
    keep_scale,
    num_tiles,
    num_sequences,
    total_q,
    num_heads,
    scale,
    tile: tl.constexpr,  # Tile
):
    """A tile of queries of one sequence: their terms, dQ, and the tile's part of the bias gradient.

        bucket_sums[b] = sum of dS_ij over i of this program, j with bucket(i, j) = b

    Grid: programs of a `Grid` * Hq / tile.heads, heads fastest, so that programs that run together read whole rows.

    A pointer that is None switches its part off. Without dQ and the bias gradient there is no loop over the keys. Idle
    programs write their row of bucket_sums too.
    """
    BLOCK_M: tl.constexpr = tile.block_m
    BLOCK_N: tl.constexpr = tile.block_n
    BLOCK_D: tl.constexpr = tile.block_d
    scale_log2 = scale * LOG2_E
    QUERIES: tl.constexpr = tile.queries
    program = tl.program_id(0)
    programs_of_tile = num_heads // tile.heads
    first_head = (program % programs_of_tile * tile.heads).to(tl.int64)
    tile_index = program // programs_of_tile
    if tile_index >= num_tiles:
        share, num_shares = tail_share(tile_index, num_tiles, programs_of_tile)
        if dq_rows.ptr is not None:
            for i in range(tile.heads):
                dq_of_head = rows_of_head(dq_rows, first_head + i)
                zero_tail(dq_of_head, cu_seqlens.q, num_sequences, total_q, share, num_shares, tile)
        return
    BLOCK_BUCKETS: tl.constexpr = triton.next_power_of_2(max(tile.num_buckets, 1))
    if bucket_sums.ptr is not None:
        bucket = tl.arange(0, BLOCK_BUCKETS)
        bucket_sums_ptrs = bucket_sums.ptr + program.to(tl.int64) * tile.num_buckets + bucket

    index, block = locate_tile(tile_index, order, cu_seqlens.q, num_sequences, QUERIES)
    first_q, num_queries = sequence_rows(index, cu_seqlens.q)
    num_blocks = tl.cdiv(num_queries, QUERIES)
    if block >= num_blocks:
        if bucket_sums.ptr is not None:
            tl.store(bucket_sums_ptrs, tl.zeros([BLOCK_BUCKETS], tl.float32), mask=bucket < tile.num_buckets)
        return
    if tile.causal:  # the last queries see the most keys: they start first
        block = num_blocks - 1 - block
    start_q = block * QUERIES
    query, head = rows_of_tile(start_q, first_head, tile)

    # delta = rowsum(dO * O)
    grad_out = load_rows(rows_of_head(grad_out_rows, head), first_q, query, num_queries, tile)  # [BLOCK_M, BLOCK_D]
    out = load_rows(rows_of_head(out_rows, head), first_q, query, num_queries, tile)  # [BLOCK_M, BLOCK_D]
    delta = tl.sum(grad_out.to(tl.float32) * out.to(tl.float32), axis=1)  # [BLOCK_M]
    lse = load_lse(lse_ptr + head * total_q, first_q + query, query < num_queries)  # [BLOCK_M]
    if terms.ptr is not None:
        terms_ptr = _terms_of(terms, head, index, first_q, tile)
        _store_terms(terms_ptr, query, lse, delta)
        if tile.block_of_terms > QUERIES:  # noqa: SIM102  (a constant, and a condition of the program)
            if block == num_blocks - 1:  # the rest of the block
                end = tl.cdiv(num_queries, tile.block_of_terms) * tile.block_of_terms
                for start in range(start_q + QUERIES, end, QUERIES):
                    _store_terms(terms_ptr, start - start_q + query, float("inf"), 0.0)

    if dq_rows.ptr is not None or bucket_sums.ptr is not None:
        first_k, num_keys = sequence_rows(index, cu_seqlens.k)
        sequence = Sequence(index=index, first_q=first_q, num_queries=num_queries, first_k=first_k, num_keys=num_keys)
        q = load_rows(rows_of_head(q_rows, head), first_q, query, num_queries, tile)  # [BLOCK_M, BLOCK_D]
        ranges = None
        if bucket_sums.ptr is not None:
            ranges = load_bucket_ranges(bucket_sums.ranges, tile.num_buckets, BLOCK_BUCKETS)
        sums = no_sums(BLOCK_M, BLOCK_N, BLOCK_BUCKETS)
        dropout = Dropout(seed=dropout_seed, threshold=dropout_threshold, keep_scale=keep_scale)
        head_kv = first_head // tile.gqa_group_size
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        last_query = tl.minimum(start_q + QUERIES, num_queries) - 1
        seen_by_any = num_keys_seen(last_query, num_queries, num_keys, tile.causal)
        seen_by_all = 0
        if tile.has_whole_blocks:
            seen_by_all = tl.maximum(num_keys_seen(start_q, num_queries, num_keys, tile.causal), 0)
            seen_by_all = seen_by_all // BLOCK_N * BLOCK_N
        for masked in tl.static_range(0 if tile.has_whole_blocks else 1, 2):
            dq, sums = _add_keys(
                dq, sums, q, grad_out, lse, delta, query, start_q, seen_by_all if masked else 0,
                seen_by_any if masked else seen_by_all, rows_of_head(k_rows, head_kv), rows_of_head(v_rows, head_kv),
                bias, ranges, dropout, sequence, head, scale_log2, tile, dq_rows.ptr is not None, masked,
            )  # fmt: skip

        if dq_rows.ptr is not None:
            dq *= scale
            store_rows(rows_of_head(dq_rows, head), dq, first_q, query, num_queries, tile)
        if bucket_sums.ptr is not None:
            tl.store(bucket_sums_ptrs, total_by_bucket(sums, ranges, bias), mask=bucket < tile.num_buckets)


# By keys


@triton.jit(do_not_specialize=PER_BATCH)
def stamp_attention_bwd_key_kernel(
    grad_out_rows: Rows,  # [Tq, Hq, D]
    q_rows: Rows,  # [Tq, Hq, D]
    k_rows: Rows,  # [Tk, Hkv, D]
    v_rows: Rows,  # [Tk, Hkv, D]
    terms: QueryTerms,
    dk_rows: Rows,  # [Tk, Hkv, D] or None
    dv_rows: Rows,  # [Tk, Hkv, D] or None
    cu_seqlens: Offsets,  # int32 [B + 1]
    order: TileOrder,
    bias: Bias,
    dropout_seed,  # int64 [1] or None
    dropout_threshold,
    keep_scale,
    num_tiles,
    num_sequences,
    total_k,
    num_heads_kv,
    scale,
    tile: tl.constexpr,  # Tile
):
    """dK and dV of BLOCK_N keys of one sequence and head of k and v, summed over the queries and heads that read them.

    Grid: programs of a `Grid` * Hkv, heads fastest. A pointer that is None switches its part off.

    Tiles are [BLOCK_N, BLOCK_M], keys by queries, so that P and dS enter the products that sum over queries straight
    from registers. Keys past the sequence's end need no mask: a key's row reaches no other row's sums.
    """
    BLOCK_M: tl.constexpr = tile.block_m
    BLOCK_N: tl.constexpr = tile.block_n
    BLOCK_D: tl.constexpr = tile.block_d
    QUERIES: tl.constexpr = tile.queries
    scale_log2 = scale * LOG2_E
    head_kv = (tl.program_id(0) % num_heads_kv).to(tl.int64)
    tile_index = tl.program_id(0) // num_heads_kv
    if tile_index >= num_tiles:
        share, num_shares = tail_share(tile_index, num_tiles, num_heads_kv)
        if dk_rows.ptr is not None:
            zero_tail(rows_of_head(dk_rows, head_kv), cu_seqlens.k, num_sequences, total_k, share, num_shares, tile)
        if dv_rows.ptr is not None:
            zero_tail(rows_of_head(dv_rows, head_kv), cu_seqlens.k, num_sequences, total_k, share, num_shares, tile)
        return
    index, block = locate_tile(tile_index, order, cu_seqlens.k, num_sequences, BLOCK_N)
    first_k, num_keys = sequence_rows(index, cu_seqlens.k)
    if block >= tl.cdiv(num_keys, BLOCK_N):
        return
    first_q, num_queries = sequence_rows(index, cu_seqlens.q)
    start_k = block * BLOCK_N
    key = start_k + tl.arange(0, BLOCK_N)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    if num_queries > 0:
        k = load_rows(rows_of_head(k_rows, head_kv), first_k, key, num_keys, tile)  # [BLOCK_N, BLOCK_D]
        if dk_rows.ptr is not None:
            v = load_rows(rows_of_head(v_rows, head_kv), first_k, key, num_keys, tile)  # [BLOCK_N, BLOCK_D]
        if bias.weights is not None:
            keys = tile_positions(bias.positions_k, first_k, start_k, tl.arange(0, BLOCK_N), num_keys)
        dropout = Dropout(seed=dropout_seed, threshold=dropout_threshold, keep_scale=keep_scale)
        first_query = 0
        if tile.causal:  # the first query that sees start_k, at the start of its block
            first_query = tl.maximum(start_k + num_queries - num_keys, 0) // QUERIES * QUERIES

        for head_in_group in range(0, tile.gqa_group_size, tile.heads):
            first_head = head_kv * tile.gqa_group_size + head_in_group
            for start_q in range(first_query, num_queries, QUERIES):
                query, head = rows_of_tile(start_q, first_head, tile)
                q = load_rows(rows_of_head(q_rows, head), first_q, query, num_queries, tile)  # [BLOCK_M, BLOCK_D]
                # [BLOCK_M, BLOCK_D]
                grad_out = load_rows(rows_of_head(grad_out_rows, head), first_q, query, num_queries, tile)
                lse, delta = _load_terms(_terms_of(terms, head, index, first_q, tile), query)  # [BLOCK_M]
                # S^T = scale K Q^T + bias^T
                scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2  # [BLOCK_N, BLOCK_M]
                if bias.weights is not None:
                    queries = tile_positions(bias.positions_q, first_q, start_q, tl.arange(0, BLOCK_M), num_queries)
                    scores += bias_tile(bias, head, queries, keys, BY_KEYS=True)
                # P^T = exp(S^T - lse)
                weights = tl.exp2(scores - lse[None, :])
                if tile.queries * tile.heads < BLOCK_M:  # rows that repeat others
                    is_repeated = tl.arange(0, BLOCK_M) >= tile.queries * tile.heads
                    weights = tl.where(is_repeated[None, :], 0.0, weights)
                if tile.causal:
                    is_hidden = key[:, None] > query[None, :] + (num_keys - num_queries)
                    weights = tl.where(is_hidden, 0.0, weights)
                dropped = weights
                if dropout.seed is not None:
                    keep = keep_tile(
                        dropout, index, head, groups_of(start_q, BLOCK_M), groups_of(start_k, BLOCK_N), BY_KEYS=True
                    )
                    factors = tl.where(keep, dropout.keep_scale, 0.0)  # D^T
                    dropped = weights * factors
                if dv_rows.ptr is not None:
                    # dV += (P D)^T dO
                    dv = tl.dot(dropped.to(grad_out.dtype), grad_out, dv, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
                if dk_rows.ptr is not None:
                    # dP^T = D^T * (V dO^T)
                    d_weights = tl.dot(v, tl.trans(grad_out), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
                    if dropout.seed is not None:
                        d_weights *= factors
                    # dS^T = P^T * (dP^T - delta)
                    d_scores = weights * (d_weights - delta[None, :])
                    # dK += dS^T Q
                    dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision="ieee")  # [BLOCK_N, BLOCK_D]

    if dk_rows.ptr is not None:
        dk *= scale
        store_rows(rows_of_head(dk_rows, head_kv), dk, first_k, key, num_keys, tile)
    if dv_rows.ptr is not None:
        store_rows(rows_of_head(dv_rows, head_kv), dv, first_k, key, num_keys, tile)


# Launching


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
    check_sequences_contents(sequences, total_q, total_k)
    sequences, bias = with_keys(sequences, bias)
    num_sequences = sequences.num_sequences
    bias_table = bias.bias_table
    dropout_p, dropout_seed = dropout
    grad_out, q, k, v, out = map(rows_with_vector_strides, (grad_out, q, k, v, out))
    cu_seqlens_q, cu_seqlens_k, tiles_q, tiles_k = contiguous(
        sequences.cu_seqlens_q, sequences.cu_seqlens_k, sequences.tiles_q, sequences.tiles_k
    )
    lse = lse.contiguous()

    dq = q.new_empty(q.shape if needs.need_dq else 0)
    dk = k.new_empty(k.shape if needs.need_dk else 0)
    dv = v.new_empty(v.shape if needs.need_dv else 0)
    dbias_table = bias_table.new_empty(bias_table.shape) if needs.need_dbias else q.new_empty(0)

    has_bias, has_dropout = bias_table is not None, dropout_p > 0
    max_seqlen_q, max_seqlen_k = sequences.max_seqlen_q, sequences.max_seqlen_k
    heads = heads_of_tile(
        num_heads // num_heads_kv, max_seqlen_q, max_seqlen_k, has_bias=has_bias, has_dropout=has_dropout
    )
    properties = device_properties(q.device)
    for_queries, for_keys = backward_config(
        properties,
        head_dim,
        q.dtype,
        rows_of_queries(max_seqlen_q, heads),
        max_seqlen_k,
        has_bias=has_bias,
        has_dropout=has_dropout,
        has_positions=bias.positions_q is not None or bias.positions_k is not None,
    )
    tile_of_queries = Tile.of(q, k, causal, for_queries.block_m, for_queries.block_n, heads=heads)
    tile_of_keys = Tile.of(q, k, causal, for_keys.block_m, for_keys.block_n, heads=heads)
    terms = QueryTerms(None, 0)
    if needs.need_dk or needs.need_dv:
        block_of_terms = max(tile_of_queries.queries, tile_of_keys.queries)
        terms = QueryTerms.empty(lse, num_sequences, block_of_terms)
        tile_of_queries, tile_of_keys = (
            tile._replace(block_of_terms=block_of_terms) for tile in (tile_of_queries, tile_of_keys)
        )
    shared = dict(
        grad_out_rows=Rows.of(grad_out),
        q_rows=Rows.of(q),
        k_rows=Rows.of(k),
        v_rows=Rows.of(v),
        terms=terms,
        cu_seqlens=Offsets(cu_seqlens_q, cu_seqlens_k),
        bias=Bias.of(bias, q.device),
        dropout_seed=dropout_seed if dropout_p > 0 else None,
        dropout_threshold=dropout_threshold(dropout_p),
        keep_scale=1 / (1 - dropout_p),
        num_sequences=num_sequences,
        scale=scale,
    )

    if any(needs):
        num_buckets, bucket_sums, ranges = 0, None, None
        if needs.need_dbias:
            num_buckets = bias_table.shape[0]
        tile = tile_of_queries._replace(
            num_buckets=num_buckets, has_whole_blocks=has_whole_blocks(properties, head_dim, total_k, num_sequences)
        )
        grid = Grid.of(total_q, num_sequences, max_seqlen_q, tile.queries, tiles_q)
        if needs.need_dbias:
            bucket_sums = lse.new_empty(grid.num_tiles, num_heads, num_buckets)
            ranges = distance_ranges(num_buckets, bias.bias_max_distance, bias.bias_bidirectional, q.device)
        launch(
            stamp_attention_bwd_query_kernel,
            launch_grid(grid.num_programs * num_heads // heads),
            **shared,
            order=grid.order,
            num_tiles=grid.num_tiles,
            out_rows=Rows.of(out),
            lse_ptr=lse,
            total_q=total_q,
            dq_rows=Rows.of(dq if needs.need_dq else None),
            bucket_sums=BucketSums(bucket_sums, ranges),
            num_heads=num_heads,
            tile=tile,
            **launch_options(for_queries),
        )
        if bucket_sums is not None:
            sum_over_tiles(dbias_table, bucket_sums)
    if needs.need_dk or needs.need_dv:
        grid = Grid.of(total_k, num_sequences, max_seqlen_k, for_keys.block_n, tiles_k)
        launch(
            stamp_attention_bwd_key_kernel,
            launch_grid(grid.num_programs * num_heads_kv),
            **shared,
            order=grid.order,
            num_tiles=grid.num_tiles,
            dk_rows=Rows.of(dk if needs.need_dk else None),
            dv_rows=Rows.of(dv if needs.need_dv else None),
            total_k=total_k,
            num_heads_kv=num_heads_kv,
            tile=tile_of_keys,
            **launch_options(for_keys),
        )
    return dq, dk, dv, dbias_table
