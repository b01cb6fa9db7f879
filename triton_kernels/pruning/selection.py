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
from stamp_kernels.triton_kernels.pruning.configs import SelectionConfig, selection_config
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

# Two rounds for 2,000 sequences. The kernel that shares its launch with the importance has 48 registers then, and ten
# programs on a multiprocessor, which have 80 KB of loads in flight: more than memory's rate takes.
_OFFSETS_BLOCK = 1024


class SelectionPlan(NamedTuple):
    """A selection of which only the importance is missing.

    Attributes:
        offsets: `offsets.kept` is to be written before `choose`, by `write_kept_offsets`.
        arguments: of all kernels of selection.
        offsets_block: the BLOCK of `write_kept_offsets`.
    """

    offsets: Offsets
    protect: Tensor | None
    config: SelectionConfig
    is_long: bool
    arguments: dict[str, Any]
    offsets_block: int


class Selected(NamedTuple):
    """What `choose` returns; kept_positions, int32 `[total_kept]`, is None unless asked for."""

    indices: Tensor
    inverse: Tensor
    kept_positions: Tensor | None


def plan_selection(total: int, cu_seqlens: Tensor, max_seqlen: int, budget: BudgetArguments) -> SelectionPlan:
    """What selection allocates and computes before the importance is known. One launch with `protect`, else none.

    No host sync; allocations depend only on shapes and `total_kept`.
    """
    cu_seqlens, keep_counts, protect = contiguous(cu_seqlens, budget.keep_counts, budget.protect)
    codes_per_item, total_kept = budget.codes_per_item, budget.total_kept
    num_sequences = cu_seqlens.shape[0] - 1
    contents_checked = contents_are_checked(cu_seqlens.device)
    if contents_checked:
        check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total, max_seqlen)
        check_whole_items(cu_seqlens, codes_per_item)
        if keep_counts is not None:
            check_keep_counts(keep_counts)
    config, is_long = selection_config(max_seqlen // codes_per_item)
    num_protected = None
    if protect is not None:
        num_protected = cu_seqlens.new_empty(num_sequences)
        launch(
            stamp_protected_items_kernel,
            _selection_grid(num_sequences, config),
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
    arguments = dict(
        offsets=offsets,
        counts=SequenceCounts(num_protected, keep_counts),
        budget=budget.ratio_q32 if budget.ratio_q32 is not None else budget.keep_count or 0,
        min_keep=budget.min_keep,
        num_sequences=num_sequences,
        total_kept=total_kept,
        BUDGET_IS_RATIO=budget.ratio_q32 is not None,
        CODES_PER_ITEM=codes_per_item,
    )
    return SelectionPlan(offsets, protect, config, is_long, arguments, _OFFSETS_BLOCK)


def choose(
    plan: SelectionPlan, importance: Tensor, *, positions: Tensor | None = None, with_positions: bool = False
) -> Selected:
    """The tokens that stay, and with `with_positions` their positions. One launch; no host sync.

    Args:
        importance: `[T]`, contiguous.
        positions: int32 `[T]`, contiguous; None: a token's index in its sequence.
    """
    total, total_kept = importance.shape[0], plan.arguments["total_kept"]
    cu_seqlens, config = plan.offsets.source, plan.config
    out = Chosen(
        indices=importance.new_empty(total_kept, dtype=torch.int64),
        inverse=cu_seqlens.new_empty(total),
        positions=cu_seqlens.new_empty(total_kept) if with_positions else None,
    )
    grid = _selection_grid(plan.arguments["num_sequences"], config)
    arguments = plan.arguments | dict(out=out, tokens=Tokens(importance, plan.protect, positions), total=total)
    if plan.is_long:
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
    return Selected(out.indices, out.inverse, out.positions)


def _selection_grid(num_sequences: int, config: SelectionConfig) -> tuple[int, int, int]:
    return launch_grid(max(1, ceil_div(num_sequences, config.sequences)))


def select_tokens(
    importance: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    budget: BudgetArguments,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `stamp::select_tokens`: (indices [total_kept], cu_seqlens [B + 1], inverse [T]) of the kept tokens.

    Two launches, three with `protect`.
    """
    importance = importance.contiguous()
    plan = plan_selection(importance.shape[0], cu_seqlens, max_seqlen, budget)
    launch(stamp_kept_offsets_kernel, launch_grid(1), **plan.arguments, BLOCK=plan.offsets_block, num_warps=4)
    selected = choose(plan, importance)
    return selected.indices, plan.offsets.kept, selected.inverse
