"""Selection: what is allocated and launched to choose which tokens of each sequence stay."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stamp_kernels.common import budget as budgets
from stamp_kernels.common.arguments import BudgetArguments
from stamp_kernels.common.contents import (
    check_cu_seqlens_contents,
    check_keep_counts,
    check_whole_items,
    contents_are_checked,
)
from stamp_kernels.triton_kernels.device import launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.pruning.configs import selection_config
from stamp_kernels.triton_kernels.pruning.selection_kernels import (
    Chosen,
    Offsets,
    SequenceCounts,
    Tokens,
    stamp_kept_offsets_kernel,
    stamp_protected_items_kernel,
    stamp_select_tokens_long_kernel,
    stamp_select_tokens_short_kernel,
)
from stamp_kernels.triton_kernels.rows import ceil_div, contiguous

_OFFSETS_BLOCK = 1024


class Selected(NamedTuple):
    """What `select` returns; kept_positions, int32 `[total_kept]`, is None unless asked for."""

    indices: Tensor
    cu_seqlens: Tensor
    inverse: Tensor
    kept_positions: Tensor | None


def select(
    importance: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    budget: BudgetArguments,
    *,
    positions: Tensor | None = None,
    with_positions: bool = False,
) -> Selected:
    """`select_tokens`, and with `with_positions` the positions of the kept tokens.

    Two launches, three with `protect`. No host sync; allocations depend only on shapes and `total_kept`.

    Args:
        positions: int32 `[T]`; None: a token's index in its sequence.
    """
    importance, cu_seqlens, keep_counts, protect, positions = contiguous(
        importance, cu_seqlens, budget.keep_counts, budget.protect, positions
    )
    codes_per_item, total_kept = budget.codes_per_item, budget.total_kept
    total, num_sequences = importance.shape[0], cu_seqlens.shape[0] - 1
    contents_checked = contents_are_checked(cu_seqlens.device)
    if contents_checked:
        check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total, max_seqlen)
        check_whole_items(cu_seqlens, codes_per_item)
        if keep_counts is not None:
            check_keep_counts(keep_counts)
    config, is_long = selection_config(max_seqlen // codes_per_item)
    grid = launch_grid(max(1, ceil_div(num_sequences, config.sequences)))
    num_protected = None
    if protect is not None:
        num_protected = cu_seqlens.new_empty(num_sequences)
        launch(
            stamp_protected_items_kernel,
            grid,
            num_protected_ptr=num_protected,
            protect_ptr=protect,
            cu_seqlens_ptr=cu_seqlens,
            num_sequences=num_sequences,
            CODES_PER_ITEM=codes_per_item,
            SEQUENCES=config.sequences,
            ITEMS=config.items,
            num_warps=config.num_warps,
        )
    if contents_checked:
        num_items = cu_seqlens.diff().to(torch.int64) // codes_per_item
        kept = codes_per_item * budgets.kept_items(
            budget, num_items, 0 if num_protected is None else num_protected.to(torch.int64)
        )
        if int(kept.sum()) > total_kept:
            raise RuntimeError(f"total_kept is {total_kept}, but the sequences keep {int(kept.sum())} tokens")
    offsets = Offsets(source=cu_seqlens, kept=torch.empty_like(cu_seqlens))
    arguments: dict[str, Any] = dict(
        offsets=offsets,
        counts=SequenceCounts(num_protected, keep_counts),
        budget=budget.ratio_q32 if budget.ratio_q32 is not None else budget.keep_count or 0,
        min_keep=budget.min_keep,
        num_sequences=num_sequences,
        total_kept=total_kept,
        BUDGET_IS_RATIO=budget.ratio_q32 is not None,
        CODES_PER_ITEM=codes_per_item,
    )
    launch(stamp_kept_offsets_kernel, launch_grid(1), **arguments, BLOCK=_OFFSETS_BLOCK, num_warps=4)
    out = Chosen(
        indices=importance.new_empty(total_kept, dtype=torch.int64),
        inverse=cu_seqlens.new_empty(total),
        positions=cu_seqlens.new_empty(total_kept) if with_positions else None,
    )
    arguments |= dict(out=out, tokens=Tokens(importance, protect, positions), total=total)
    if is_long:
        # Without maxnreg ptxas stops at 80 registers on sm_80, for a third program on a processor, and spills 8 bytes.
        launch(
            stamp_select_tokens_long_kernel,
            grid,
            **arguments,
            BLOCK=config.items,
            num_warps=config.num_warps,
            maxnreg=255,
        )
    else:
        launch(
            stamp_select_tokens_short_kernel,
            grid,
            **arguments,
            SEQUENCES=config.sequences,
            ITEMS=config.items,
            num_warps=config.num_warps,
        )
    return Selected(out.indices, offsets.kept, out.inverse, out.positions)


def select_tokens(
    importance: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    budget: BudgetArguments,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `stamp::select_tokens`: (indices [total_kept], cu_seqlens [B + 1], inverse [T]) of the kept tokens."""
    selected = select(importance, cu_seqlens, max_seqlen, budget)
    return selected.indices, selected.cu_seqlens, selected.inverse
