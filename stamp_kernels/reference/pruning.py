"""The whole of SAP in plain PyTorch: score, select, gather (arXiv 2604.05329, section SAP)."""

import torch
from torch import Tensor

from stamp_kernels.reference.importance import token_importance
from stamp_kernels.reference.selection import gather_rows, select_tokens, sequence_of_row


def prune(
    x: list[Tensor],
    centrality: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    norm_order: int,
    per_visible_query: bool,
    ratio_q32: int | None,
    keep_count: int | None,
    keep_counts: Tensor | None,
    min_keep: int,
    protect: Tensor | None,
    item_length: int,
    total_kept: int | None,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """The op `stamp::prune`: (rows of x, their positions, indices, cu_seqlens, inverse). Differentiable in x.

    Args:
        x: tensors `[T, ...]`, of which the first, the hidden states `[T, D]`, is scored.
        positions: int32 `[T]`; None: the index in the sequence.
        centrality, norm_order, per_visible_query: as in `token_importance`; what follows as in `select_tokens`.
    """
    importance = token_importance(x[0].detach(), centrality, cu_seqlens, norm_order, per_visible_query)
    indices, cu_seqlens_kept, inverse = select_tokens(
        importance, cu_seqlens, max_seqlen, ratio_q32, keep_count, keep_counts, min_keep, protect, item_length,
        total_kept,
    )  # fmt: skip
    if positions is None:
        row = torch.arange(x[0].shape[0], device=cu_seqlens.device)
        positions = (row - cu_seqlens[sequence_of_row(cu_seqlens, len(row))]).to(torch.int32)
    *rows, kept_positions = (gather_rows(tensor, indices) for tensor in (*x, positions))
    return rows, kept_positions, indices, cu_seqlens_kept, inverse
