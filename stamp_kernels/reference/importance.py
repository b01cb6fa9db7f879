"""Token importance in plain PyTorch: the attention that each key receives, times the norm of its hidden state.

With the scores S_ij and lse_i of `reference.attention`:

    centrality_j = sum over heads and voting queries i of exp(S_ij - lse_i)     (arXiv 2604.05329: S_attn)
    importance_j = ||h_j|| * centrality_j                                       (I = S_sem * S_attn)
"""

import torch
from torch import Tensor

from stamp_kernels.reference._contents import check_cu_seqlens_contents
from stamp_kernels.reference._precision import compute_dtype
from stamp_kernels.reference.attention import (
    attention_scores,
    column_sums,
    equal_length_groups,
    keys_of_queries,
    scatter_rows,
)
from stamp_kernels.reference.selection import sequence_of_row


def attention_centrality(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    bias_table: Tensor | None,
    bias_bidirectional: bool,
    bias_max_distance: int,
    positions_q: Tensor | None,
    positions_k: Tensor | None,
    query_mask: Tensor | None,
) -> Tensor:
    """The op `stamp::attention_centrality`: `[Tk]` in the dtype of lse, 0 on tail rows."""
    check_cu_seqlens_contents("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    if cu_seqlens_k is not None:
        check_cu_seqlens_contents("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    cu_seqlens_k, positions_k = keys_of_queries(cu_seqlens_q, cu_seqlens_k, positions_q, positions_k)
    rows_k, centralities = [], []
    for group in equal_length_groups(cu_seqlens_q, cu_seqlens_k, q.shape[1]):
        scores = attention_scores(
            group, q, k, causal, scale, bias_table, bias_bidirectional, bias_max_distance, positions_q, positions_k
        )
        lse_g = lse.t()[group.rows_q].transpose(1, 2)[..., None]
        # A query that sees no key has lse = -inf and votes nothing.
        weights = torch.exp(scores - lse_g).masked_fill(lse_g == -torch.inf, 0.0)
        rows_k.append(group.rows_k)
        centralities.append(column_sums(weights, group, query_mask))
    return scatter_rows(k.shape[0], rows_k, centralities, like=lse.new_empty(0))


def token_importance(
    hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor | None, norm_order: int, per_visible_query: bool
) -> Tensor:
    """The op `stamp::token_importance`: `[T]` in fp32 (fp64 where hidden is), 0 on tail rows.

    Args:
        hidden: `[T, D]`, any floating dtype.
        centrality: `[T]`, fp32 or fp64.
        cu_seqlens: int32 `[B + 1]`; None: there are no tail rows.
        norm_order: 1 or 2.
        per_visible_query: divide by the number of queries that see the token in a causal sequence; needs cu_seqlens.
    """
    dtype = compute_dtype(hidden.dtype)
    importance = torch.linalg.vector_norm(hidden, norm_order, dim=-1, dtype=dtype) * centrality.to(dtype)
    if cu_seqlens is None:
        return importance
    total = hidden.shape[0]
    check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total)
    rows = torch.arange(total, device=hidden.device)
    if per_visible_query:
        # Queries i, i + 1, ..., n - 1 see key i: as many as rows are left in its sequence.
        ends = torch.cat([cu_seqlens[1:], cu_seqlens.new_full((1,), total)])
        importance = importance / (ends[sequence_of_row(cu_seqlens, total)] - rows)
    return torch.where(rows < cu_seqlens[-1], importance, 0.0)
