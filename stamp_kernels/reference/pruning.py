"""Pruning in plain PyTorch: the importance of every token, which tokens stay, and their rows.

arXiv 2604.05329, section SAP:

    I_i = ||h_i|| * centrality_i            (I = S_sem * S_attn)
    K = Top-k(I), K_sorted = Sort(K), H_compressed = Gather(H, K_sorted)
"""

import torch
from torch import Tensor

from stamp_kernels.common.arguments import BudgetArguments
from stamp_kernels.common.budget import kept_items
from stamp_kernels.common.contents import (
    check_cu_seqlens_contents,
    check_keep_counts,
    check_whole_items,
    contents_are_checked,
)
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.common.rows import sequence_of_row


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
        # Queries i, i + 1, ..., n - 1 see key i: as many as there are rows left in its sequence.
        ends = torch.cat([cu_seqlens[1:], cu_seqlens.new_full((1,), total)])
        importance = importance / (ends[sequence_of_row(cu_seqlens, total)] - rows)
    return torch.where(rows < cu_seqlens[-1], importance, 0.0)


def select_tokens(
    importance: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    budget: BudgetArguments,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `stamp::select_tokens`: (indices [total_kept], cu_seqlens [B + 1], inverse [T]) of the kept tokens.

    total_kept None (CPU only): as many as the sequences keep.

    An item is codes_per_item tokens, counted from the start of its sequence. Its importance is the sum of its tokens'
    importance, added up from the first to the last in the compute type. It is protected if one of its tokens is.
    """
    *_, protect, codes_per_item, total_kept = budget
    total = importance.shape[0]
    device = importance.device
    check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total, max_seqlen)
    check_whole_items(cu_seqlens, codes_per_item)
    if budget.keep_counts is not None:
        check_keep_counts(budget.keep_counts)

    batch = cu_seqlens.shape[0] - 1
    sequence = sequence_of_row(cu_seqlens, total)
    first_row = cu_seqlens.to(torch.int64)[sequence]  # of the row's sequence; for tail rows, of the tail
    item_rows = first_row + (torch.arange(total, device=device) - first_row) // codes_per_item * codes_per_item
    item_rows = (item_rows[:, None] + torch.arange(codes_per_item, device=device)).clamp(max=total - 1)  # [T, length]

    of_item = importance.new_zeros(total, dtype=compute_dtype(importance.dtype))
    protected = torch.zeros(total, dtype=torch.bool, device=device)
    for row in item_rows.unbind(1):  # one by one, since the order of a sum decides its bits
        of_item = of_item + importance[row]
        if protect is not None:
            protected = protected | protect[row]
    num_items = cu_seqlens.diff().to(torch.int64) // codes_per_item
    # Tokens after the last whole item (none where contents are checked) and tail rows never stay.
    is_in_item = item_rows[:, 0] - first_row < torch.cat([codes_per_item * num_items, num_items.new_zeros(1)])[sequence]
    protected = protected & is_in_item
    begins_item = item_rows[:, 0] == torch.arange(total, device=device)
    protected_items = torch.zeros(batch + 1, dtype=torch.int64, device=device)
    protected_items = protected_items.index_add(0, sequence, (protected & begins_item).to(torch.int64))[:batch]
    kept = codes_per_item * kept_items(budget, num_items, protected_items)
    if total_kept is None:
        total_kept = int(kept.sum())
    elif contents_are_checked(device) and int(kept.sum()) > total_kept:
        raise RuntimeError(f"total_kept is {total_kept}, but the sequences keep {int(kept.sum())} tokens")

    # Order within a sequence: protected tokens, then the others by falling importance, then NaN; ties by rising index,
    # so that the tokens of an item, which are equally important, stay together.
    is_nan = of_item.isnan()
    by_importance = torch.sort(of_item.masked_fill(is_nan, -torch.inf) + 0.0, descending=True, stable=True).indices
    group = sequence * 4 + torch.where(protected, 0, torch.where(~is_in_item, 3, torch.where(is_nan, 2, 1)))
    order = by_importance[torch.sort(group[by_importance], stable=True).indices]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(total, device=device)
    stays = rank - first_row < torch.cat([kept, kept.new_zeros(1)])[sequence]

    kept_row = stays.cumsum(0) - 1
    # If contents are not checked, a total_kept that is too small drops the last tokens instead of writing past the end.
    stays = stays & (kept_row < total_kept)
    inverse = torch.where(stays, kept_row, -1).to(torch.int32)
    indices = torch.full((total_kept + 1,), -1, dtype=torch.int64, device=device)
    # Dropped rows all write the extra last entry, which is cut off: no nonzero(), which would sync.
    indices[torch.where(stays, kept_row, total_kept)] = torch.arange(total, device=device)
    cu_seqlens_kept = torch.cat([kept.new_zeros(1), kept.cumsum(0)]).clamp(max=total_kept).to(torch.int32)
    return indices[:total_kept].clone(), cu_seqlens_kept, inverse


def gather_rows(x: Tensor, row_map: Tensor) -> Tensor:
    """`y[j] = x[row_map[j]]`, zeros where the map says -1. Differentiable.

    Args:
        x: `[N, ...]`, any dtype.
        row_map: int64 or int32 `[M]`, rows of x or -1.
    """
    if contents_are_checked(row_map.device) and row_map.numel() > 0:
        low, high = int(row_map.min()), int(row_map.max())
        if low < -1 or high >= x.shape[0]:
            raise RuntimeError(f"row indices must be -1 (none) to {x.shape[0] - 1}, got {low} to {high}")
    none = row_map < 0
    if x.shape[0] == 0:
        # There is nothing to select; cat keeps the result in the autograd graph of x.
        return torch.cat([x, x.new_zeros((row_map.shape[0], *x.shape[1:]))])
    rows = x.index_select(0, row_map.clamp(min=0))
    return rows.masked_fill(none.view(-1, *[1] * (x.dim() - 1)), 0)


def prune(
    x: list[Tensor],
    centrality: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    norm_order: int,
    per_visible_query: bool,
    budget: BudgetArguments,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """The op `stamp::prune`: (rows of x, their positions, indices, cu_seqlens, inverse). Differentiable in x.

    Args:
        x: tensors `[T, ...]`; the first one, the hidden states `[T, D]`, gives the importance.
        positions: int32 `[T]`; None: the index in the sequence.
        centrality, norm_order, per_visible_query: as in `token_importance`; what follows as in `select_tokens`.
    """
    importance = token_importance(x[0].detach(), centrality, cu_seqlens, norm_order, per_visible_query)
    indices, cu_seqlens_kept, inverse = select_tokens(importance, cu_seqlens, max_seqlen, budget)
    if positions is None:
        row = torch.arange(x[0].shape[0], device=cu_seqlens.device)
        positions = (row - cu_seqlens[sequence_of_row(cu_seqlens, len(row))]).to(torch.int32)
    *rows, kept_positions = (gather_rows(tensor, indices) for tensor in (*x, positions))
    return rows, kept_positions, indices, cu_seqlens_kept, inverse
