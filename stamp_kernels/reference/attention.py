"""Packed attention in plain PyTorch, forward and backward, to be read beside the equations.

For query i and key j of one sequence and one head, D_ij being the dropout mask over 1 - p (1 without dropout):

    S_ij = scale * q_i . k_j + bias[bucket(pos_k[j] - pos_q[i])]     (-inf where causal order hides j)
    lse_i = log sum_j exp(S_ij)          P_ij = exp(S_ij - lse_i)    O_i = sum_j P_ij D_ij v_j
    centrality_j = sum over heads and queries i of P_ij              (arXiv 2604.05329: the column sum S_attn)

and backward, dO being the gradient of O:

    dP_ij = D_ij dO_i . v_j              delta_i = dO_i . O_i        dS_ij = P_ij (dP_ij - delta_i)
    dV_j = sum_i P_ij D_ij dO_i          dQ_i = scale sum_j dS_ij k_j   dK_j = scale sum_i dS_ij q_i
    dbias[b] = sum of dS_ij over bucket(i, j) = b

Sequences of equal lengths are computed together, so the code shows the maths of one sequence and a batch of thousands
takes few steps. fp16 and bf16 inputs are computed in fp32. The last bits of a BLAS product may depend on how many
sequences share a step. So two equal runs give the same bits, as the contract promises, but a sequence may get other
bits alone than in a batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stamp_kernels.common.arguments import AttentionNeeds, BiasArguments, DropoutArguments, Sequences, with_keys
from stamp_kernels.common.contents import check_sequences_contents
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.reference.dropout import attention_keep_mask
from stamp_kernels.relative_position import relative_position_bucket

# Scores computed at once: few enough that thousands of equally long sequences stay in the cache.
_MAX_SCORES = 2**22


class EqualLengthGroup(NamedTuple):
    """Sequences with the same number of queries and the same number of keys."""

    sequences: Tensor  # [G] index in the batch
    rows_q: Tensor  # [G, n_q]
    rows_k: Tensor  # [G, n_k]


def equal_length_groups(sequences: Sequences, num_heads: int) -> Iterator[EqualLengthGroup]:
    """The sequences that have queries, grouped by their lengths. Copies the lengths to the CPU."""
    cu_seqlens_q, cu_seqlens_k = sequences.cu_seqlens_q, sequences.offsets_of_keys
    device = cu_seqlens_q.device
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    sequences_by_length: dict[tuple[int, int], list[int]] = {}
    for i in range(len(starts_q) - 1):
        lengths = (starts_q[i + 1] - starts_q[i], starts_k[i + 1] - starts_k[i])
        if lengths[0] > 0:
            sequences_by_length.setdefault(lengths, []).append(i)
    for (num_queries, num_keys), same_length in sequences_by_length.items():
        at_once = max(1, _MAX_SCORES // max(1, num_heads * num_queries * num_keys))
        for indices in torch.tensor(same_length, device=device).split(at_once):
            first_q, first_k = cu_seqlens_q.long()[indices], cu_seqlens_k.long()[indices]
            yield EqualLengthGroup(
                indices,
                first_q[:, None] + torch.arange(num_queries, device=device),
                first_k[:, None] + torch.arange(num_keys, device=device),
            )


def _per_head(x: Tensor, rows: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """Rows `[G, n]` of x `[T, H, D]` as `[G, num_heads, n, D]`; key heads are repeated for the heads of their group."""
    gathered = x[rows].to(dtype).transpose(1, 2)
    return gathered.repeat_interleave(num_heads // x.shape[1], dim=1) if x.shape[1] != num_heads else gathered


def _buckets(group: EqualLengthGroup, bias: BiasArguments, num_buckets: int) -> Tensor:
    """int64 `[G or 1, n_q, n_k]`, the bucket of each query-key pair; local indices where positions are None."""

    def positions_of(rows: Tensor, positions: Tensor | None) -> Tensor:  # int64 [G or 1, n]
        if positions is None:
            return torch.arange(rows.shape[1], device=rows.device)[None]
        return positions[rows].long()

    query, key = positions_of(group.rows_q, bias.positions_q), positions_of(group.rows_k, bias.positions_k)
    return relative_position_bucket(
        key[:, None, :] - query[:, :, None],
        num_buckets=num_buckets,
        max_distance=bias.bias_max_distance,
        bidirectional=bias.bias_bidirectional,
    )


def attention_scores(
    group: EqualLengthGroup, q: Tensor, k: Tensor, causal: bool, scale: float, bias: BiasArguments
) -> Tensor:
    """S `[G, Hq, n_q, n_k]` in the compute dtype."""
    dtype = compute_dtype(q.dtype)
    num_heads = q.shape[1]
    scores = scale * (
        _per_head(q, group.rows_q, num_heads, dtype) @ _per_head(k, group.rows_k, num_heads, dtype).transpose(-1, -2)
    )
    table = bias.bias_table
    if table is not None:
        scores = scores + table.to(dtype)[_buckets(group, bias, table.shape[0])].permute(0, 3, 1, 2)
    if causal:
        num_queries, num_keys = scores.shape[-2:]
        last_visible = torch.arange(num_queries, device=q.device) + (num_keys - num_queries)  # aligned bottom-right
        hidden = torch.arange(num_keys, device=q.device)[None, :] > last_visible[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """P and lse. A row that sees no key gives P = 0 (without a NaN in its gradient) and lse = -inf."""
    lse = torch.logsumexp(scores.detach(), dim=-1)
    sees_no_key = (lse == -torch.inf)[..., None]
    weights = torch.softmax(scores.masked_fill(sees_no_key, 0.0), dim=-1)
    return weights.masked_fill(sees_no_key, 0.0), lse


def column_sums(weights: Tensor, group: EqualLengthGroup, query_mask: Tensor | None) -> Tensor:
    """Centrality `[G, n_k]` of the group's keys. A query that does not count may have a NaN."""
    if query_mask is not None:
        weights = weights.masked_fill(~query_mask[group.rows_q][:, None, :, None], 0.0)
    return weights.sum(dim=(1, 2))


def _dropout_factors(weights: Tensor, group: EqualLengthGroup, dropout: DropoutArguments) -> Tensor | float:
    """D of the equations, in the shape of the weights; 1 without dropout."""
    if dropout.dropout_p == 0.0 or dropout.dropout_seed is None:
        return 1.0
    keep = attention_keep_mask(dropout.dropout_p, dropout.dropout_seed, group.sequences, *weights.shape[1:])
    return keep.to(weights.dtype) / (1.0 - dropout.dropout_p)


def _sum_by_bucket(d_scores: Tensor, buckets: Tensor, num_buckets: int) -> Tensor:
    """`[num_buckets, H]`: dS `[G, H, n_q, n_k]` added up by the buckets `[G or 1, n_q, n_k]` of its entries.

    A product with one-hot buckets, in blocks of pairs, because index_add uses float atomics on a GPU.
    """
    if buckets.shape[0] == 1:
        d_scores = d_scores.sum(0, keepdim=True)
    d_scores, buckets = d_scores.flatten(2), buckets.flatten(1)
    every_bucket = torch.arange(num_buckets, device=buckets.device)
    total = d_scores.new_zeros(d_scores.shape[1], num_buckets)
    pairs_at_once = max(1, _MAX_SCORES // (num_buckets * buckets.shape[0]))
    for d, b in zip(d_scores.split(pairs_at_once, dim=2), buckets.split(pairs_at_once, dim=1), strict=True):
        total += (d @ (b[..., None] == every_bucket).to(d.dtype)).sum(0)
    return total.t()


def scatter_rows(total: int, rows: list[Tensor], values: list[Tensor], like: Tensor) -> Tensor:
    """`[total, ...]`: the groups' values in their rows, and 0 in tail rows and sequences without queries."""
    index = torch.cat([like.new_empty(0, dtype=torch.int64), *(r.flatten() for r in rows)])
    # like[:0] keeps the result of an empty batch in the autograd graph of its input.
    source = torch.cat([like[:0], *(v.flatten(0, 1) for v in values)])
    return like.new_zeros(total, *like.shape[1:]).index_copy(0, index, source)


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

    Differentiable in q, k, v and bias_table.
    """
    check_sequences_contents(sequences, q.shape[0], k.shape[0])
    sequences, bias = with_keys(sequences, bias)
    dtype = compute_dtype(q.dtype)
    num_heads = q.shape[1]
    if bias.bias_table is not None:  # cast once, so that autograd rounds its gradient once
        bias = bias._replace(bias_table=bias.bias_table.to(dtype))
    groups, outs, lses, centralities = [], [], [], []
    for group in equal_length_groups(sequences, num_heads):
        scores = attention_scores(group, q, k, causal, scale, bias)
        weights, lse = _softmax(scores)
        if return_centrality:
            centralities.append(column_sums(weights.detach(), group, centrality_query_mask))
        dropped = weights * _dropout_factors(weights, group, dropout)
        out = dropped @ _per_head(v, group.rows_k, num_heads, dtype)
        groups.append(group)
        outs.append(out.transpose(1, 2).to(q.dtype))
        lses.append(lse.transpose(1, 2))
    rows_q = [group.rows_q for group in groups]
    out = scatter_rows(q.shape[0], rows_q, outs, like=q)
    if not groups:  # the result is in the autograd graph of all inputs, as that of the op
        for x in (k, v, bias.bias_table):
            out = out if x is None else out + x.flatten()[:0].sum().to(out.dtype)
    lse = scatter_rows(q.shape[0], rows_q, lses, like=q.new_empty(0, num_heads, dtype=dtype)).t().contiguous()
    if not return_centrality:
        return out, lse, lse.new_empty(0)
    rows_k = [group.rows_k for group in groups]
    return out, lse, scatter_rows(k.shape[0], rows_k, centralities, like=lse.new_empty(0))


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
    sequences, bias = with_keys(sequences, bias)
    need_dq, need_dk, need_dv, need_dbias = needs
    dtype = compute_dtype(q.dtype)
    num_heads, num_heads_kv = q.shape[1], k.shape[1]
    rows_q, rows_k, dqs, dks, dvs = [], [], [], [], []
    table = q.new_empty(0) if bias.bias_table is None else bias.bias_table
    dbias = table.new_zeros(table.shape, dtype=dtype) if need_dbias else q.new_empty(0)

    def sum_over_group_heads(x: Tensor) -> Tensor:  # [G, Hq, n, D] -> [G, n, Hkv, D]
        return x.unflatten(1, (num_heads_kv, num_heads // num_heads_kv)).sum(2).transpose(1, 2).to(k.dtype)

    for group in equal_length_groups(sequences, num_heads):
        scores = attention_scores(group, q, k, causal, scale, bias)
        lse_g = lse.t()[group.rows_q].transpose(1, 2)
        weights = torch.exp(scores - lse_g.masked_fill(lse_g == -torch.inf, 0.0)[..., None])
        factors = _dropout_factors(weights, group, dropout)
        grad_out_g = _per_head(grad_out, group.rows_q, num_heads, dtype)
        rows_q.append(group.rows_q)
        rows_k.append(group.rows_k)
        if need_dv:
            dvs.append(sum_over_group_heads((weights * factors).transpose(-1, -2) @ grad_out_g))
        if not (need_dq or need_dk or need_dbias):
            continue
        delta = (grad_out_g * _per_head(out, group.rows_q, num_heads, dtype)).sum(-1, keepdim=True)
        d_weights = grad_out_g @ _per_head(v, group.rows_k, num_heads, dtype).transpose(-1, -2)
        d_scores = weights * (factors * d_weights - delta)
        if need_dq:
            dq = scale * (d_scores @ _per_head(k, group.rows_k, num_heads, dtype))
            dqs.append(dq.transpose(1, 2).to(q.dtype))
        if need_dk:
            dk = scale * (d_scores.transpose(-1, -2) @ _per_head(q, group.rows_q, num_heads, dtype))
            dks.append(sum_over_group_heads(dk))
        if need_dbias:
            dbias += _sum_by_bucket(d_scores, _buckets(group, bias, table.shape[0]), table.shape[0])

    def rows_or_empty(needed: bool, x: Tensor, rows: list[Tensor], values: list[Tensor]) -> Tensor:
        return scatter_rows(x.shape[0], rows, values, like=x) if needed else x.new_empty(0)

    return (
        rows_or_empty(need_dq, q, rows_q, dqs),
        rows_or_empty(need_dk, k, rows_k, dks),
        rows_or_empty(need_dv, v, rows_k, dvs),
        dbias.to(table.dtype) if need_dbias else dbias,
    )


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
    """The op `stamp::attention_centrality`: `[Tk]` in the dtype of lse, 0 on tail rows."""
    check_sequences_contents(sequences, q.shape[0], k.shape[0])
    sequences, bias = with_keys(sequences, bias)
    rows_k, centralities = [], []
    for group in equal_length_groups(sequences, q.shape[1]):
        scores = attention_scores(group, q, k, causal, scale, bias)
        lse_g = lse.t()[group.rows_q].transpose(1, 2)[..., None]
        # A query that sees no key has lse = -inf and adds nothing.
        weights = torch.exp(scores - lse_g).masked_fill(lse_g == -torch.inf, 0.0)
        rows_k.append(group.rows_k)
        centralities.append(column_sums(weights, group, query_mask))
    return scatter_rows(k.shape[0], rows_k, centralities, like=lse.new_empty(0))
