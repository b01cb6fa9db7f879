"""The checks before pruning's Triton launchers and reference kernels, see `ops._boundary`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stamp_kernels.common.arguments import BudgetArguments
from stamp_kernels.ops._boundary import (
    BOOL,
    FLOATING,
    INT32,
    INT64,
    INTEGERS,
    check_at_least,
    check_cu_seqlens,
    check_num_rows,
    check_storage,
    check_tensor,
    refuse,
)

_CENTRALITY = (torch.float32, torch.float64)
_RATIO_OF_ONE = 2**32


def check_token_importance(
    hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor | None, norm_order: int, per_visible_query: bool
) -> None:
    """What `stamp::token_importance` takes."""
    _check_importance("hidden", hidden, centrality, norm_order)
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, hidden.device)
    elif per_visible_query:
        refuse("per_visible_query needs cu_seqlens")


def check_select_tokens(importance: Tensor, cu_seqlens: Tensor, max_seqlen: int, budget: BudgetArguments) -> None:
    """What `stamp::select_tokens` takes."""
    check_tensor("importance", importance, ("total",), FLOATING, importance.device)
    check_num_rows("importance", importance.shape[0])
    _check_selection(importance.shape[0], cu_seqlens, max_seqlen, budget, importance.device)


def check_gather_forward(x: list[Tensor], indices: Tensor) -> None:
    """What `stamp::gather_tokens_forward` takes."""
    check_tensor("indices", indices, ("kept",), INT64, indices.device)
    _check_row_sources("x", x, indices.device)


def check_gather_backward(grad: list[Tensor], inverse: Tensor) -> None:
    """What `stamp::gather_tokens_backward` takes."""
    check_tensor("inverse", inverse, ("total",), INT32, inverse.device)
    _check_row_sources("grad", grad, inverse.device)


def check_prune(
    x: list[Tensor],
    centrality: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    norm_order: int,
    per_visible_query: bool,
    budget: BudgetArguments,
) -> None:
    """What `stamp::prune` takes."""
    _check_row_sources("x", x, cu_seqlens.device)
    hidden = x[0]
    _check_importance("x[0]", hidden, centrality, norm_order)
    if positions is not None:
        check_tensor("positions", positions, (hidden.shape[0],), INT32, hidden.device)
    _check_selection(hidden.shape[0], cu_seqlens, max_seqlen, budget, hidden.device)


def _check_importance(name: str, hidden: Tensor, centrality: Tensor, norm_order: int) -> None:
    check_tensor(name, hidden, ("total", "width"), FLOATING, hidden.device)
    check_num_rows(name, hidden.shape[0])
    check_tensor("centrality", centrality, (hidden.shape[0],), _CENTRALITY, hidden.device)
    if norm_order not in (1, 2):
        refuse(f"norm_order must be 1 or 2, got {norm_order}")


def _check_selection(
    total: int, cu_seqlens: Tensor, max_seqlen: int, budget: BudgetArguments, device: torch.device
) -> None:
    check_cu_seqlens("cu_seqlens", cu_seqlens, device)
    check_at_least("max_seqlen", max_seqlen, 0)
    ratio_q32, keep_count, keep_counts, min_keep, protect, codes_per_item, total_kept = budget
    if (ratio_q32 is not None) + (keep_count is not None) + (keep_counts is not None) != 1:
        refuse("exactly one of ratio_q32, keep_count and keep_counts must be given")
    if ratio_q32 is not None and not 0 <= ratio_q32 <= _RATIO_OF_ONE:
        refuse(f"ratio_q32 must be in [0, {_RATIO_OF_ONE}], got {ratio_q32}")
    if keep_count is not None:
        check_at_least("keep_count", keep_count, 0)
    if keep_counts is not None:
        check_tensor("keep_counts", keep_counts, (cu_seqlens.shape[0] - 1,), INTEGERS, device)
    check_at_least("min_keep", min_keep, 0)
    if protect is not None:
        check_tensor("protect", protect, (total,), BOOL, device)
    check_at_least("codes_per_item", codes_per_item, 1)
    if total_kept is not None:
        check_at_least("total_kept", total_kept, 0)
    elif device.type != "cpu":
        refuse("total_kept must be given on a GPU")


def _check_row_sources(name: str, x: Sequence[Tensor], device: torch.device) -> None:
    """Tensors `[rows, ...]` of any dtypes with the same number of rows."""
    if not x:
        refuse(f"{name} must have at least one tensor, got an empty list")
    for tensor in x:
        if tensor.dim() == 0:
            refuse(f"{name} must have tensors with at least one dimension, got a scalar")
        if tensor.shape[0] != x[0].shape[0]:
            refuse(f"{name} must have tensors with the same number of rows, got {tensor.shape[0]} and {x[0].shape[0]}")
        if tensor.device != device:
            refuse(f"{name} must have tensors on {device}, got one on {tensor.device}")
        check_storage(name, tensor)
