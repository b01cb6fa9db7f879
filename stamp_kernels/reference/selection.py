"""Selection and gather in plain PyTorch: which tokens of each sequence stay, and their rows.

The paper (arXiv 2604.05329, section SAP): K = Top-k(I), K_sorted = Sort(K), H_compressed = Gather(H, K_sorted).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stamp_kernels.reference._contents import check_cu_seqlens_contents, contents_are_checked
from stamp_kernels.reference._precision import compute_dtype


class TokenSelection(NamedTuple):
    """The tokens that stay, as `select_tokens` returns them.

    Attributes:
        indices: int64 `[T']`, source row of each kept row, ascending; -1 on tail rows.
        cu_seqlens: int32 `[B + 1]`, offsets of the kept sequences.
        max_seqlen: upper bound of the kept lengths; exact where the lengths are known on the host.
        inverse: int32 `[T]`, kept row of each source row; -1 where it was dropped.
        total_source: T, the number of source rows.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    inverse: Tensor
    total_source: int


def keep_ratio_to_q32(keep_ratio: float) -> int:
    """The ratio as the 32-bit fixed-point number from which every backend computes the ceiling."""
    return round(keep_ratio * 2**32)


def ceil_of_ratio(ratio_q32: int, n: int | Tensor) -> int | Tensor:
    """ceil(keep_ratio * n) in int64, the same in every backend: n a Python int or an int64 tensor."""
    return (ratio_q32 * n - n + (2**32 - 1)) >> 32


def kept_items(
    num_items: Tensor,
    num_protected: Tensor | int,
    *,
    ratio_q32: int | None,
    keep_count: int | None,
    keep_counts: Tensor | None,
    min_keep: int,
) -> Tensor:
    """Items that each sequence keeps: p + min(n, max(min_keep, budget)), n of its items being unprotected.

    Args:
        num_items: int64 `[B]`, items of each sequence, the protected ones included (a token is an item of length 1).
        num_protected: int64 `[B]` (or 0), p.
        ratio_q32, keep_count, keep_counts: the budget, exactly one of them given: ceil(ratio * n), a number for all
            sequences, or a number for each `[B]`.
    """
    unprotected = num_items - num_protected
    if ratio_q32 is not None:
        budget = ceil_of_ratio(ratio_q32, unprotected)
    elif keep_counts is not None:
        budget = keep_counts.to(torch.int64)
    else:
        budget = torch.full_like(unprotected, keep_count)
    return num_protected + torch.minimum(unprotected, budget.clamp(min=min_keep))


def sequence_of_row(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 `[total]`: the sequence that each row belongs to; B for tail rows."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)


def check_whole_items(cu_seqlens: Tensor, item_length: int) -> None:
    """Every sequence is a multiple of `item_length` tokens (RuntimeError), where contents are checked."""
    if item_length == 1 or not contents_are_checked(cu_seqlens.device):
        return
    lengths = cu_seqlens.diff()
    broken = lengths[lengths % item_length != 0]
    if broken.numel() > 0:
        raise RuntimeError(
            f"every sequence must be whole items of item_length {item_length} tokens, got a sequence of "
            f"{int(broken[0])}"
        )


def select_tokens(
    importance: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    ratio_q32: int | None,
    keep_count: int | None,
    keep_counts: Tensor | None,
    min_keep: int,
    protect: Tensor | None,
    item_length: int,
    total_kept: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `stamp::select_tokens`: (indices [total_kept], cu_seqlens [B + 1], inverse [T]) of the kept tokens.

    total_kept None, for the CPU alone: as many as the sequences keep.

    An item, `item_length` tokens from the start of its sequence on, scores the sum of its tokens, added up from the
    first to the last in the compute type, and is protected where one of them is.
    """
    total = importance.shape[0]
    device = importance.device
    check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total, max_seqlen)
    check_whole_items(cu_seqlens, item_length)
    if keep_counts is not None and contents_are_checked(device) and bool((keep_counts < 0).any()):
        raise RuntimeError(f"keep_count must not be negative, got {int(keep_counts.min())}")

    batch = cu_seqlens.shape[0] - 1
    sequence = sequence_of_row(cu_seqlens, total)
    first_row = cu_seqlens.to(torch.int64)[sequence]  # of the row's sequence; for tail rows, of the tail
    item_rows = first_row + (torch.arange(total, device=device) - first_row) // item_length * item_length
    item_rows = (item_rows[:, None] + torch.arange(item_length, device=device)).clamp(max=total - 1)  # [T, length]

    score = importance.new_zeros(total, dtype=compute_dtype(importance.dtype))
    protected = torch.zeros(total, dtype=torch.bool, device=device)
    for row in item_rows.unbind(1):  # one by one: the order of a sum decides its bits
        score = score + importance[row]
        if protect is not None:
            protected = protected | protect[row]
    num_items = cu_seqlens.diff().to(torch.int64) // item_length
    # Tokens after the last whole item (there are none where contents are checked) and tail rows never stay.
    is_in_item = item_rows[:, 0] - first_row < torch.cat([item_length * num_items, num_items.new_zeros(1)])[sequence]
    protected = protected & is_in_item
    begins_item = item_rows[:, 0] == torch.arange(total, device=device)
    protected_items = torch.zeros(batch + 1, dtype=torch.int64, device=device)
    protected_items = protected_items.index_add(0, sequence, (protected & begins_item).to(torch.int64))[:batch]
    kept = item_length * kept_items(
        num_items,
        protected_items,
        ratio_q32=ratio_q32,
        keep_count=keep_count,
        keep_counts=keep_counts,
        min_keep=min_keep,
    )
    if total_kept is None:
        total_kept = int(kept.sum())
    elif contents_are_checked(device) and int(kept.sum()) > total_kept:
        raise RuntimeError(f"total_kept is {total_kept}, but the sequences keep {int(kept.sum())} tokens")

    # Within a sequence: protected tokens, then the others by falling importance, then NaN; ties by rising index, so
    # that the tokens of an item, which score alike, stay together.
    is_nan = score.isnan()
    by_score = torch.sort(score.masked_fill(is_nan, -torch.inf) + 0.0, descending=True, stable=True).indices
    group = sequence * 4 + torch.where(protected, 0, torch.where(~is_in_item, 3, torch.where(is_nan, 2, 1)))
    order = by_score[torch.sort(group[by_score], stable=True).indices]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(total, device=device)
    stays = rank - first_row < torch.cat([kept, kept.new_zeros(1)])[sequence]

    kept_row = stays.cumsum(0) - 1
    # Where contents are not checked a total_kept that is too small cuts the last tokens off, rather than memory.
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
        # Nothing to select; cat keeps the result in the autograd graph of x.
        return torch.cat([x, x.new_zeros((row_map.shape[0], *x.shape[1:]))])
    rows = x.index_select(0, row_map.clamp(min=0))
    return rows.masked_fill(none.view(-1, *[1] * (x.dim() - 1)), 0)


def gather_tokens(x: Tensor | list[Tensor], selection: TokenSelection) -> Tensor | list[Tensor]:
    """The rows that `selection` keeps. See `stamp_kernels.gather_tokens`."""
    if isinstance(x, Tensor):
        return gather_rows(x, selection.indices)
    return [gather_rows(tensor, selection.indices) for tensor in x]
