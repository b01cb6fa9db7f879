"""Pruning: importance, selection and gather in one op, from a block's hidden states and centrality to the kept rows.

It has no kernels of its own: one launch of `importance.py`, two of `selection.py` (three with `protect`), the last of
which also writes the positions, and one gather for each tensor.
"""

from torch import Tensor

from stamp_kernels.common.arguments import BudgetArguments
from stamp_kernels.triton_kernels.pruning.gather import gather_rows
from stamp_kernels.triton_kernels.pruning.importance import token_importance
from stamp_kernels.triton_kernels.pruning.selection import select


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
    """The op `stamp::prune`: (rows of x, their positions, indices, cu_seqlens, inverse). No host sync."""
    importance = token_importance(x[0], centrality, cu_seqlens, norm_order, per_visible_query)
    selected = select(importance, cu_seqlens, max_seqlen, budget, positions=positions, with_positions=True)
    rows = [gather_rows(tensor, selected.indices) for tensor in x]
    return rows, selected.kept_positions, selected.indices, selected.cu_seqlens, selected.inverse
