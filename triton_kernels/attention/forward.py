"""Packed attention, forward: two kernels for two ranges of length, and their launcher.

For query i and key j of one sequence and one head, with scores S_ij = scale * q_i . k_j + bias_ij and D_ij the dropout
mask over 1 - p:

    lse_i = log sum_j exp(S_ij)     P_ij = exp(S_ij - lse_i)     out_i = sum_j P_ij D_ij v_j
    centrality_j = sum over heads and over the queries i that count of P_ij

- slots kernel, sequences of up to 32 tokens: several share a tile, each in a slot of its own, so that the matrix units
  get full tiles and a batch of thousands takes fewer programs. It has whole rows of scores, so the softmax is exact in
  one pass and the column sums come with it;
- general kernel, any length: online softmax over blocks of keys. The column sums take a pass of their own, with as many
  instructions as to add up tiles of weights over their rows where a whole row fits the registers.

The choice depends on max_seqlen, dtype, heads and options, not on lengths (`configs.forward_config`), and a sequence's
rows are cut into the same tiles wherever the sequence is in the batch: it gets the same bits alone or in a batch. There
are no atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.arguments import BiasArguments, DropoutArguments, Sequences, with_keys
from stamp_kernels.common.contents import check_sequences_contents
from stamp_kernels.triton_kernels.attention.centrality import sum_over_heads, sum_over_queries
from stamp_kernels.triton_kernels.attention.configs import (
    forward_config,
    heads_of_tile,
    launch_options,
    rows_of_queries,
)
from stamp_kernels.triton_kernels.attention.dropout import Dropout, dropout_threshold, groups_of, keep_tile
from stamp_kernels.triton_kernels.attention.relative_bias import Bias, bias_tile, tile_positions
from stamp_kernels.triton_kernels.attention.tiles import (
    PER_BATCH,
    Grid,
    Offsets,
    Rows,
    Sequence,
    Tile,
    TileOrder,
    load_rows,
    locate_tile,
    num_keys_seen,
    num_tail_programs,
    rows_of_head,
    rows_of_tile,
    rows_with_vector_strides,
    sequence_rows,
    store_rows,
    tail_share,
    visible_tile,
    zero_tail,
    zero_tail_values,
)
from stamp_kernels.triton_kernels.device import device_properties, launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.rows import LN_2, LOG2_E, ceil_div, contiguous


class Centrality(NamedTuple):
    """The column sums of a kernel that has whole rows of scores; both None if nobody asks for them.

    Attributes:
        by_head: fp32 `[Hq, Tk]`.
        query_mask: bool `[Tq]`, the queries that count; None: all.
    """

    by_head: Tensor | None
    query_mask: Tensor | None


@triton.jit
def _zero_tail(
    out_rows, lse_ptr, head, cu_seqlens_q_ptr, num_sequences, total_q, share, num_shares, tile: tl.constexpr
):
    """out and lse of one head 0 on a share of the tail rows."""
    zero_tail(rows_of_head(out_rows, head), cu_seqlens_q_ptr, num_sequences, total_q, share, num_shares, tile)
    zero_tail_values(lse_ptr + head * total_q, cu_seqlens_q_ptr, num_sequences, total_q, share, num_shares)


# Any length


@triton.jit
def _attend_keys(
    acc, row_sum, row_max, q, query, start_q, begin_k, end_k, k_rows, v_rows, bias, dropout, sequence, head,
    scale_log2, tile: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax of a query tile over the keys `begin_k ... end_k - 1`, BLOCK_N at a time.

    The state after some keys, in units of log 2: row_max [BLOCK_M] = max_j S_ij, row_sum [BLOCK_M] =
    sum_j 2^(S_ij - row_max_i), acc [BLOCK_M, BLOCK_D] = sum_j 2^(S_ij - row_max_i) keep_ij v_j.

    MASKED False promises that every query sees every key, so nothing is compared.
    """
    BLOCK_M: tl.constexpr = tile.block_m
    BLOCK_N: tl.constexpr = tile.block_n
    if bias.weights is not None:
        offset_q = tl.arange(0, BLOCK_M)
        queries = tile_positions(bias.positions_q, sequence.first_q, start_q, offset_q, sequence.num_queries)
    for start_k in range(begin_k, end_k, BLOCK_N):
        key = start_k + tl.arange(0, BLOCK_N)
        k = load_rows(k_rows, sequence.first_k, key, sequence.num_keys, tile, MASKED)  # [BLOCK_N, BLOCK_D]
        # S = scale Q K^T + bias
        scores = scale_log2 * tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if bias.weights is not None:
            offset_k = tl.arange(0, BLOCK_N)
            keys = tile_positions(bias.positions_k, sequence.first_k, start_k, offset_k, sequence.num_keys)
            scores += bias_tile(bias, head, queries, keys)
        if MASKED:
            visible = visible_tile(query, key, sequence.num_queries, sequence.num_keys, tile.causal)
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        # A row without a visible key so far, or with a bias of only -inf, has the maximum -inf: -inf - -inf is NaN.
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - pivot[:, None])  # [BLOCK_M, BLOCK_N]
        rescale = tl.exp2(row_max - pivot)
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        if dropout.seed is not None:
            keep = keep_tile(dropout, sequence.index, head, groups_of(start_q, BLOCK_M), groups_of(start_k, BLOCK_N))
            weights = tl.where(keep, weights, 0.0)
        v = load_rows(v_rows, sequence.first_k, key, sequence.num_keys, tile, MASKED)  # [BLOCK_N, BLOCK_D]
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")  # [BLOCK_M, BLOCK_D]
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit(do_not_specialize=PER_BATCH)
def stamp_attention_fwd_general_kernel(
    out_rows: Rows,  # [Tq, Hq, D]
    lse_ptr,  # fp32 [Hq, Tq]
    q_rows: Rows,  # [Tq, Hq, D]
    k_rows: Rows,  # [Tk, Hkv, D]
    v_rows: Rows,  # [Tk, Hkv, D]
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
    scale_log2,
    tile: tl.constexpr,  # Tile
):
    """out and lse of a tile of queries of one sequence, by online softmax over its keys.

    Grid: programs of a `Grid` * Hq / tile.heads, heads fastest, so that programs that run together read whole rows.
    Blocks of keys that every query of the tile sees are not masked; the blocks on the diagonal and at the end are, in a
    second loop. Keys that no query sees are never read.
    """
    BLOCK_M: tl.constexpr = tile.block_m
    BLOCK_D: tl.constexpr = tile.block_d
    QUERIES: tl.constexpr = tile.queries
    programs_of_tile = num_heads // tile.heads
    first_head = (tl.program_id(0) % programs_of_tile * tile.heads).to(tl.int64)
    tile_index = tl.program_id(0) // programs_of_tile
    if tile_index >= num_tiles:
        share, num_shares = tail_share(tile_index, num_tiles, programs_of_tile)
        for i in range(tile.heads):
            _zero_tail(out_rows, lse_ptr, first_head + i, cu_seqlens.q, num_sequences, total_q, share, num_shares, tile)
        return
    index, block = locate_tile(tile_index, order, cu_seqlens.q, num_sequences, QUERIES)
    first_q, num_queries = sequence_rows(index, cu_seqlens.q)
    num_blocks = tl.cdiv(num_queries, QUERIES)
    if block >= num_blocks:
        return
    if tile.causal:  # the last queries see the most keys: they start first
        block = num_blocks - 1 - block
    start_q = block * QUERIES

    first_k, num_keys = sequence_rows(index, cu_seqlens.k)
    sequence = Sequence(index=index, first_q=first_q, num_queries=num_queries, first_k=first_k, num_keys=num_keys)
    dropout = Dropout(seed=dropout_seed, threshold=dropout_threshold, keep_scale=keep_scale)
    query, head = rows_of_tile(start_q, first_head, tile)
    # A limit of its own: with that of the stores, their mask would stay in registers through the loops.
    limit = tl.minimum(num_queries, total_q - first_q)
    q = load_rows(rows_of_head(q_rows, head), first_q, query, limit, tile)  # [BLOCK_M, BLOCK_D]

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    head_kv = first_head // tile.gqa_group_size
    seen_by_all = tl.maximum(num_keys_seen(start_q, num_queries, num_keys, tile.causal), 0)
    seen_by_all = seen_by_all // tile.block_n * tile.block_n
    seen_by_any = num_keys_seen(start_q + QUERIES - 1, num_queries, num_keys, tile.causal)
    for masked in tl.static_range(2):
        acc, row_sum, row_max = _attend_keys(
            acc, row_sum, row_max, q, query, start_q, seen_by_all if masked else 0,
            seen_by_any if masked else seen_by_all, rows_of_head(k_rows, head_kv), rows_of_head(v_rows, head_kv), bias,
            dropout, sequence, head, scale_log2, tile, masked,
        )  # fmt: skip

    lse = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + head * total_q + first_q + query, lse, mask=query < num_queries)
    out = acc * tl.where(row_sum == 0.0, 0.0, keep_scale / row_sum)[:, None]  # [BLOCK_M, BLOCK_D]
    store_rows(rows_of_head(out_rows, head), out, first_q, query, num_queries, tile)


# Whole rows of scores, several sequences at once


@triton.jit
def _softmax(scores):
    """(weights, inverse, lse) of scores in units of log 2, -inf where hidden.

    weights [BLOCK_M, BLOCK_N] = 2^(S_ij - max_j S_ij), inverse [BLOCK_M] = 1 / sum_j weights_ij, lse [BLOCK_M] =
    natural log of sum_j e^S_ij. A row that sees no key has weights and inverse 0 and lse -inf.
    """
    row_max = tl.max(scores, axis=1)
    pivot = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = tl.exp2(scores - pivot[:, None])
    row_sum = tl.sum(weights, axis=1)
    return weights, tl.where(row_sum == 0.0, 0.0, 1.0 / row_sum), (pivot + tl.log2(row_sum)) * LN_2


@triton.jit
def _column_sums(weights, inverse, query_mask_ptr, row, exists):
    """[BLOCK]: the sum of P over the queries of a tile that count; their packed rows are `row` where they exist."""
    counts = exists
    if query_mask_ptr is not None:
        counts = tl.load(query_mask_ptr + row, mask=exists, other=0) != 0
    # A query that does not count may have a NaN, and 0 * NaN is NaN. One that counts and has a NaN has weight 0 for the
    # keys of other sequences.
    terms = tl.where(counts[:, None] & (weights != 0.0), weights * inverse[:, None], 0.0)
    return tl.sum(terms, axis=0)


@triton.jit(do_not_specialize=PER_BATCH)
def stamp_attention_fwd_slots_kernel(
    out_rows: Rows,  # [Tq, Hq, D]
    lse_ptr,  # fp32 [Hq, Tq]
    centrality: Centrality,
    q_rows: Rows,  # [Tq, Hq, D]
    k_rows: Rows,  # [Tk, Hkv, D]
    v_rows: Rows,  # [Tk, Hkv, D]
    cu_seqlens: Offsets,  # int32 [B + 1]
    bias: Bias,
    dropout_seed,  # int64 [1] or None
    dropout_threshold,
    keep_scale,
    num_tiles,
    num_sequences,
    total_q,
    total_k,
    num_heads,
    scale_log2,
    tile: tl.constexpr,  # Tile, block_m = block_n = BLOCK
):
    """out, lse and if asked for the column sums of BLOCK / SLOT sequences, of at most SLOT queries and SLOT keys each.

    Grid: num_tiles = ceil(B / (BLOCK / SLOT)) and those for the tail rows, * Hq, heads fastest. Sequence s takes the
    rows and columns `SLOT * (s % (BLOCK / SLOT)) + index` of a BLOCK x BLOCK tile of scores, where only the pairs
    within a slot are visible. A slot starts at a multiple of 16, so the sum over a row adds the same terms, and zeros,
    in the same order in every slot: the same bits.
    """
    BLOCK: tl.constexpr = tile.block_m
    SLOT: tl.constexpr = tile.slot
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    tile_index = tl.program_id(0) // num_heads
    if tile_index >= num_tiles:
        share, num_shares = tail_share(tile_index, num_tiles, num_heads)
        _zero_tail(out_rows, lse_ptr, head, cu_seqlens.q, num_sequences, total_q, share, num_shares, tile)
        return

    # Each [BLOCK]: for every row of the tile its slot, its token's index as a query and as a key, and its sequence
    row = tl.arange(0, BLOCK)
    slot = row // SLOT
    index = row % SLOT
    sequence_index = tile_index * (BLOCK // SLOT) + slot
    in_batch = sequence_index < num_sequences
    first_q = tl.load(cu_seqlens.q + sequence_index, mask=in_batch, other=0)
    num_queries = tl.load(cu_seqlens.q + sequence_index + 1, mask=in_batch, other=0) - first_q
    first_k = tl.load(cu_seqlens.k + sequence_index, mask=in_batch, other=0)
    num_keys = tl.load(cu_seqlens.k + sequence_index + 1, mask=in_batch, other=0) - first_k
    query_exists = index < num_queries
    key_exists = index < num_keys

    head_kv = head // tile.gqa_group_size
    q = load_rows(rows_of_head(q_rows, head), first_q, index, num_queries, tile)  # [BLOCK, BLOCK_D]
    k = load_rows(rows_of_head(k_rows, head_kv), first_k, index, num_keys, tile)  # [BLOCK, BLOCK_D]
    v = load_rows(rows_of_head(v_rows, head_kv), first_k, index, num_keys, tile)  # [BLOCK, BLOCK_D]
    # S = scale Q K^T + bias
    scores = scale_log2 * tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK, BLOCK]
    if bias.weights is not None:
        queries = tile_positions(bias.positions_q, first_q, 0, index, num_queries)
        keys = tile_positions(bias.positions_k, first_k, 0, index, num_keys)
        scores += bias_tile(bias, head, queries, keys)
    # The lengths are those of the row's own sequence: within a slot they are the pair's.
    visible = visible_tile(index, index, num_queries, num_keys, tile.causal) & (slot[:, None] == slot[None, :])
    weights, inverse, lse = _softmax(tl.where(visible, scores, float("-inf")))
    # A NaN makes the whole row of its query NaN, the columns of the other sequences too.
    weights = tl.where(visible, weights, 0.0)
    tl.store(lse_ptr + head * total_q + first_q + index, lse, mask=query_exists)
    if centrality.by_head is not None:
        column_sums = _column_sums(weights, inverse, centrality.query_mask, first_q + index, query_exists)
        tl.store(centrality.by_head + head * total_k + first_k + index, column_sums, mask=key_exists)
    if dropout_seed is not None:
        dropout = Dropout(seed=dropout_seed, threshold=dropout_threshold, keep_scale=keep_scale)
        groups = groups_of(0, BLOCK)
        sequence_of_group = tile_index * (BLOCK // SLOT) + groups // (SLOT // 2)
        groups %= SLOT // 2
        keep = keep_tile(dropout, sequence_of_group[:, None], head, groups, groups)
        weights = tl.where(keep, weights, 0.0)
    # out = (P D) V, [BLOCK, BLOCK_D]
    out = tl.dot(weights.to(v.dtype), v, input_precision="ieee") * (inverse * keep_scale)[:, None]
    store_rows(rows_of_head(out_rows, head), out, first_q, index, num_queries, tile)


# Launching


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
    check_sequences_contents(sequences, q.shape[0], k.shape[0])
    q, k, v = rows_with_vector_strides(q), rows_with_vector_strides(k), rows_with_vector_strides(v)
    sequences, bias = with_keys(sequences, bias)
    cu_seqlens_q, cu_seqlens_k, tiles_q, tiles_k, query_mask = contiguous(
        sequences.cu_seqlens_q, sequences.cu_seqlens_k, sequences.tiles_q, sequences.tiles_k, centrality_query_mask
    )
    dropout_p, dropout_seed = dropout
    total_q, num_heads, head_dim = q.shape
    total_k = k.shape[0]
    num_sequences = sequences.num_sequences
    has_bias, has_dropout = bias.bias_table is not None, dropout_p > 0
    max_seqlen_q, max_seqlen_k = sequences.max_seqlen_q, sequences.max_seqlen_k
    heads = heads_of_tile(
        num_heads // k.shape[1], max_seqlen_q, max_seqlen_k, has_bias=has_bias, has_dropout=has_dropout
    )
    config = forward_config(
        device_properties(q.device),
        head_dim,
        rows_of_queries(max_seqlen_q, heads),
        max_seqlen_k,
        element_size=q.element_size(),
        has_bias=has_bias,
        has_dropout=has_dropout,
        has_positions=bias.positions_q is not None or bias.positions_k is not None,
    )
    tile = Tile.of(q, k, causal, config.block_m, config.block_n, heads=heads, slot=config.slot)
    out = q.new_empty(q.shape)
    lse = q.new_empty(num_heads, total_q, dtype=torch.float32)
    arguments = dict(
        out_rows=Rows.of(out),
        lse_ptr=lse,
        q_rows=Rows.of(q),
        k_rows=Rows.of(k),
        v_rows=Rows.of(v),
        cu_seqlens=Offsets(cu_seqlens_q, cu_seqlens_k),
        bias=Bias.of(bias, q.device),
        dropout_seed=dropout_seed if dropout_p > 0 else None,
        dropout_threshold=dropout_threshold(dropout_p),
        keep_scale=1.0 / (1.0 - dropout_p),
        num_sequences=num_sequences,
        total_q=total_q,
        num_heads=num_heads,
        scale_log2=scale * LOG2_E.value,
        tile=tile,
        **launch_options(config),
    )
    if config.slot == 0:
        grid = Grid.of(total_q, num_sequences, max_seqlen_q, tile.queries, tiles_q)
        arguments |= dict(order=grid.order, num_tiles=grid.num_tiles)
        launch(stamp_attention_fwd_general_kernel, launch_grid(grid.num_programs * num_heads // heads), **arguments)
        if not return_centrality:
            return out, lse, lse.new_empty(0)
        centrality = sum_over_queries(
            q, k, lse, arguments["cu_seqlens"], max_seqlen_k, tiles_k, causal, arguments["scale_log2"],
            arguments["bias"], query_mask,
        )  # fmt: skip
        return out, lse, centrality

    by_head = lse.new_empty(num_heads, total_k) if return_centrality else None
    num_tiles = ceil_div(num_sequences, config.block_m // config.slot)
    arguments |= dict(
        centrality=Centrality(by_head, query_mask if return_centrality else None), num_tiles=num_tiles, total_k=total_k
    )
    num_programs = num_tiles + num_tail_programs(total_q)
    launch(stamp_attention_fwd_slots_kernel, launch_grid(num_programs * num_heads), **arguments)
    if not return_centrality:
        return out, lse, lse.new_empty(0)
    return out, lse, sum_over_heads(by_head, cu_seqlens_k)
