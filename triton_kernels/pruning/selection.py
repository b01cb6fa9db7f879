"""Selection: which tokens of each sequence stay.

A sequence of n unprotected and p protected items keeps k = p + min(n, max(min_keep, budget)) of them: the k greatest
keys, ties by rising index. A key is an unsigned integer in the order of the scores, so that the k-th greatest is found
digit by digit, by counting; every count is one of integers, exact in any order. What is written where follows from
prefix sums: no sort, no atomics on memory, and nothing that the host would have to wait for.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
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
from stamp_kernels.triton_kernels.rows import contiguous

# Keys


@triton.jit
def ordered_keys(score):
    """Unsigned integers of the scores' width in the order of the scores, none of them -0.0; NaN is 0, the lowest."""
    BITS: tl.constexpr = score.dtype.primitive_bitwidth
    SIGN: tl.constexpr = 1 << (BITS - 1)
    ALL: tl.constexpr = (1 << BITS) - 1
    bits = score.to(tl.core.get_int_dtype(bitwidth=BITS, signed=False), bitcast=True)
    # Negative numbers rise as their bits fall; the others follow them.
    return tl.where(score == score, bits ^ tl.where(bits >= SIGN, ALL, SIGN), 0)


@triton.jit
def items_are_protected(protect_ptr, first_row, in_sequence, CODES_PER_ITEM: tl.constexpr):
    """Whether a token of the item that begins at `first_row` is protected; False where not `in_sequence`."""
    protected = tl.zeros(first_row.shape, tl.int1)
    for i in range(CODES_PER_ITEM):
        protected = protected | (tl.load(protect_ptr + first_row + i, mask=in_sequence, other=0) != 0)
    return protected


@triton.jit
def item_keys(importance_ptr, protect_ptr, first_row, in_sequence, CODES_PER_ITEM: tl.constexpr):
    """Keys of the items that begin at `first_row`; 0 where not `in_sequence`.

    An item scores the sum of its tokens, added up from the first to the last in fp32 (fp64 for fp64). A protected item
    has the greatest key, which no score has.
    """
    importance_type: tl.constexpr = importance_ptr.dtype.element_ty
    score_type: tl.constexpr = tl.float64 if importance_type == tl.float64 else tl.float32
    score = tl.zeros(first_row.shape, score_type)  # a sum that begins with 0.0 is never -0.0
    for i in range(CODES_PER_ITEM):
        score += tl.load(importance_ptr + first_row + i, mask=in_sequence, other=0.0).to(score_type)
    key = ordered_keys(score)
    if protect_ptr is not None:
        protected = items_are_protected(protect_ptr, first_row, in_sequence, CODES_PER_ITEM)
        key = tl.where(protected, (1 << score_type.primitive_bitwidth) - 1, key)
    return tl.where(in_sequence, key, 0)


# How many


@triton.jit
def kept_items(
    num_items, num_protected_ptr, keep_counts_ptr, sequence, exists, budget, min_keep, BUDGET_IS_RATIO: tl.constexpr
):
    """int32, in the shape of `sequence`: p + min(n, max(min_keep, budget)), n of the items being unprotected.

    Args:
        num_items: int32, items of each sequence, the protected ones included.
        num_protected_ptr: int32 [B], p; None: no item is protected.
        keep_counts_ptr: [B], the budget of each sequence, or None.
        exists: whether there is such a sequence.
        budget, min_keep: int64. The budget of every sequence; if BUDGET_IS_RATIO, r of the ceiling of r * n / 2^32.
    """
    num_protected = tl.zeros_like(num_items)
    if num_protected_ptr is not None:
        num_protected = tl.load(num_protected_ptr + sequence, mask=exists, other=0)
    unprotected = (num_items - num_protected).to(tl.int64)
    if keep_counts_ptr is not None:
        most = tl.load(keep_counts_ptr + sequence, mask=exists, other=0).to(tl.int64)
    elif BUDGET_IS_RATIO:
        most = (budget * unprotected - unprotected + 0xFFFFFFFF) >> 32  # the contract's ceiling
    else:
        most = budget
    return num_protected + tl.minimum(unprotected, tl.maximum(most, min_keep)).to(tl.int32)


@triton.jit(do_not_specialize=["num_sequences"])
def protected_items_kernel(
    num_protected_ptr,  # int32 [B]
    protect_ptr,  # bool [T]
    cu_seqlens_ptr,  # int32 [B + 1]
    num_sequences,
    CODES_PER_ITEM: tl.constexpr, SEQUENCES: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """The protected items of SEQUENCES sequences, counted ITEMS of each at a time. Grid: [ceil(B / SEQUENCES)]."""
    sequence = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    exists = sequence < num_sequences
    first_row = tl.load(cu_seqlens_ptr + sequence, mask=exists, other=0)
    num_items = (tl.load(cu_seqlens_ptr + sequence + 1, mask=exists, other=0) - first_row) // CODES_PER_ITEM
    num_protected = tl.zeros([SEQUENCES], tl.int32)
    for start in range(0, tl.max(num_items, axis=0), ITEMS):
        item = start + tl.arange(0, ITEMS)
        in_sequence = item[None, :] < num_items[:, None]  # [SEQUENCES, ITEMS]
        item_row = first_row[:, None] + item[None, :] * CODES_PER_ITEM
        protected = items_are_protected(protect_ptr, item_row, in_sequence, CODES_PER_ITEM)
        num_protected += tl.sum(protected.to(tl.int32), axis=1)
    tl.store(num_protected_ptr + sequence, num_protected, mask=exists)


@triton.jit(do_not_specialize=["budget", "min_keep", "num_sequences", "total_kept"])
def kept_offsets_kernel(
    cu_seqlens_kept_ptr,  # int32 [B + 1]
    cu_seqlens_ptr,  # int32 [B + 1]
    num_protected_ptr,  # int32 [B] or None
    keep_counts_ptr,  # [B] or None
    budget: tl.int64,
    min_keep: tl.int64,
    num_sequences,
    total_kept,
    BUDGET_IS_RATIO: tl.constexpr, CODES_PER_ITEM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the kept tokens of each sequence begin: `min(total_kept, kept tokens of the sequences before)`.

    Grid: [1]. The one program passes over the sequences, BLOCK at a time, and carries the sum along.
    """
    tl.store(cu_seqlens_kept_ptr, 0)
    kept_before = 0
    for start in range(0, num_sequences, BLOCK):
        sequence = start + tl.arange(0, BLOCK)
        exists = sequence < num_sequences
        first_row = tl.load(cu_seqlens_ptr + sequence, mask=exists, other=0)
        num_items = (tl.load(cu_seqlens_ptr + sequence + 1, mask=exists, other=0) - first_row) // CODES_PER_ITEM
        kept = CODES_PER_ITEM * kept_items(
            num_items, num_protected_ptr, keep_counts_ptr, sequence, exists, budget, min_keep, BUDGET_IS_RATIO
        )
        kept = tl.where(exists, kept, 0)
        kept_until = tl.minimum(kept_before + tl.cumsum(kept, axis=0), total_kept)
        tl.store(cu_seqlens_kept_ptr + sequence + 1, kept_until, mask=exists)
        kept_before += tl.sum(kept, axis=0)


# Which


@triton.jit
def rank_keys(key, threshold, in_sequence, AXIS: tl.constexpr):
    """(greater, tie, greater_before, ties_before) of each item: how it compares with the threshold, and how many of
    either kind stand before it along AXIS, which has fewer than 2^15 items. Both counts ride in one prefix sum.
    """
    greater = in_sequence & (key > threshold)
    tie = in_sequence & (key == threshold)
    both = greater.to(tl.int32) + (tie.to(tl.int32) << 16)
    before = tl.cumsum(both, axis=AXIS) - both
    return greater, tie, before & 0xFFFF, before >> 16


@triton.jit
def store_choice(
    indices_ptr, inverse_ptr, kept_positions_ptr, positions_ptr, item, item_row, in_sequence, stays, kept_row,
    total_kept, CODES_PER_ITEM: tl.constexpr,
):  # fmt: skip
    """Write the tokens of the items: of those that stay, their source row and position; of all, their kept row.

    Args:
        item: index in the sequence; item_row: row of the item's first token; kept_row: the row that it goes to.
        stays: whether the item is kept. What would go past `total_kept` is dropped.
    """
    for i in range(CODES_PER_ITEM):
        is_kept = stays & (kept_row + i < total_kept)
        tl.store(inverse_ptr + item_row + i, tl.where(is_kept, kept_row + i, -1), mask=in_sequence)
        tl.store(indices_ptr + kept_row + i, (item_row + i).to(tl.int64), mask=is_kept)
        if kept_positions_ptr is not None:
            if positions_ptr is not None:
                position = tl.load(positions_ptr + item_row + i, mask=is_kept, other=0)
            else:
                position = item * CODES_PER_ITEM + i
            tl.store(kept_positions_ptr + kept_row + i, position, mask=is_kept)


@triton.jit
def drop_incomplete_item(inverse_ptr, first_row, num_items, end_row, CODES_PER_ITEM: tl.constexpr):
    """Tokens after the last whole item never stay. The arguments after `inverse_ptr` have one entry per sequence."""
    for i in range(CODES_PER_ITEM - 1):
        row = first_row + num_items * CODES_PER_ITEM + i
        tl.store(inverse_ptr + row, tl.full(row.shape, -1, tl.int32), mask=row < end_row)


@triton.jit
def fill_tails(
    indices_ptr, inverse_ptr, kept_positions_ptr, first_kept_tail, total_kept, first_tail, total, BLOCK: tl.constexpr
):
    """-1 (position 0) for the rows that are no token, dealt out in blocks to all programs of the launch."""
    start = tl.program_id(0) * BLOCK
    step = tl.num_programs(0) * BLOCK
    lane = tl.arange(0, BLOCK)
    for row in range(first_kept_tail + start, total_kept, step):
        in_tail = row + lane < total_kept
        tl.store(indices_ptr + row + lane, tl.full([BLOCK], -1, tl.int64), mask=in_tail)
        if kept_positions_ptr is not None:
            tl.store(kept_positions_ptr + row + lane, tl.zeros([BLOCK], tl.int32), mask=in_tail)
    for row in range(first_tail + start, total, step):
        tl.store(inverse_ptr + row + lane, tl.full([BLOCK], -1, tl.int32), mask=row + lane < total)


@triton.jit(do_not_specialize=["budget", "min_keep", "num_sequences", "total", "total_kept"])
def select_kernel(
    indices_ptr,  # int64 [total_kept]
    inverse_ptr,  # int32 [T]
    kept_positions_ptr,  # int32 [total_kept] or None
    importance_ptr,  # [T]
    cu_seqlens_ptr,  # int32 [B + 1]
    cu_seqlens_kept_ptr,  # int32 [B + 1]
    num_protected_ptr,  # int32 [B], None where protect is
    protect_ptr,  # bool [T] or None
    positions_ptr,  # int32 [T]; None: the index in the sequence
    keep_counts_ptr,  # [B] or None
    budget: tl.int64,
    min_keep: tl.int64,
    num_sequences,
    total,
    total_kept,
    BUDGET_IS_RATIO: tl.constexpr, CODES_PER_ITEM: tl.constexpr, SEQUENCES: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """The choice in SEQUENCES sequences of up to ITEMS items each, whose keys stay in registers.

    Grid: [max(1, ceil(B / SEQUENCES))]. A binary search from the highest bit finds a threshold that at least k keys
    reach, and stops early where exactly k do: then it need not be the k-th key itself. Keys above the threshold stay,
    and of those equal to it the first k - (number above).
    """
    sequence = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    exists = sequence < num_sequences
    first_row = tl.load(cu_seqlens_ptr + sequence, mask=exists, other=0)
    end_row = tl.load(cu_seqlens_ptr + sequence + 1, mask=exists, other=0)
    num_items = (end_row - first_row) // CODES_PER_ITEM
    num_kept = kept_items(
        num_items, num_protected_ptr, keep_counts_ptr, sequence, exists, budget, min_keep, BUDGET_IS_RATIO
    )
    num_kept = tl.where(exists, num_kept, 0)
    item = tl.arange(0, ITEMS)[None, :]
    in_sequence = item < num_items[:, None]  # [SEQUENCES, ITEMS]
    item_row = first_row[:, None] + item * CODES_PER_ITEM
    key = item_keys(importance_ptr, protect_ptr, item_row, in_sequence, CODES_PER_ITEM)

    threshold = tl.zeros([SEQUENCES], key.dtype)
    num_reaching = num_items
    bit = tl.full([SEQUENCES], 1 << (key.dtype.primitive_bitwidth - 1), key.dtype)
    bits_left = key.dtype.primitive_bitwidth
    # Keys outside a sequence are 0 and reach no candidate, which is at least 1.
    while (bits_left > 0) & (tl.max((num_reaching != num_kept).to(tl.int32), axis=0) > 0):
        candidate = threshold | bit
        reaching_candidate = tl.sum((key >= candidate[:, None]).to(tl.int32), axis=1)
        are_enough = reaching_candidate >= num_kept
        threshold = tl.where(are_enough, candidate, threshold)
        num_reaching = tl.where(are_enough, reaching_candidate, num_reaching)
        bit = bit >> 1
        bits_left -= 1

    greater, tie, greater_before, ties_before = rank_keys(key, threshold[:, None], in_sequence, 1)
    ties_kept = (num_kept - tl.sum(greater.to(tl.int32), axis=1))[:, None]
    stays = greater | (tie & (ties_before < ties_kept))
    kept_first = tl.load(cu_seqlens_kept_ptr + sequence, mask=exists, other=0)
    kept_row = kept_first[:, None] + (greater_before + tl.minimum(ties_before, ties_kept)) * CODES_PER_ITEM
    store_choice(
        indices_ptr, inverse_ptr, kept_positions_ptr, positions_ptr, item, item_row, in_sequence, stays, kept_row,
        total_kept, CODES_PER_ITEM,
    )  # fmt: skip
    drop_incomplete_item(inverse_ptr, first_row, num_items, end_row, CODES_PER_ITEM)
    fill_tails(
        indices_ptr, inverse_ptr, kept_positions_ptr, tl.load(cu_seqlens_kept_ptr + num_sequences), total_kept,
        tl.load(cu_seqlens_ptr + num_sequences), total, SEQUENCES * ITEMS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["budget", "min_keep", "num_sequences", "total", "total_kept"])
def select_long_kernel(
    indices_ptr,  # int64 [total_kept]
    inverse_ptr,  # int32 [T]
    kept_positions_ptr,  # int32 [total_kept] or None
    importance_ptr,  # [T]
    cu_seqlens_ptr,  # int32 [B + 1]
    cu_seqlens_kept_ptr,  # int32 [B + 1]
    num_protected_ptr,  # int32 [B], None where protect is
    protect_ptr,  # bool [T] or None
    positions_ptr,  # int32 [T]; None: the index in the sequence
    keep_counts_ptr,  # [B] or None
    budget: tl.int64,
    min_keep: tl.int64,
    num_sequences,
    total,
    total_kept,
    BUDGET_IS_RATIO: tl.constexpr, CODES_PER_ITEM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The choice in one sequence of any length, whose keys are computed anew in every pass, BLOCK at a time.

    Grid: [max(1, B)]. A pass per byte of the key, the highest first, counts the values of that byte among the keys
    that begin as the k-th does, and so finds the k-th key; one more pass writes.
    """
    DIGIT: tl.constexpr = 8
    sequence = tl.program_id(0)
    exists = sequence < num_sequences
    first_row = tl.load(cu_seqlens_ptr + sequence, mask=exists, other=0)
    end_row = tl.load(cu_seqlens_ptr + sequence + 1, mask=exists, other=0)
    num_items = (end_row - first_row) // CODES_PER_ITEM
    num_kept = kept_items(
        num_items, num_protected_ptr, keep_counts_ptr, sequence, exists, budget, min_keep, BUDGET_IS_RATIO
    )

    score_bits: tl.constexpr = 64 if importance_ptr.dtype.element_ty == tl.float64 else 32
    key_type: tl.constexpr = tl.core.get_int_dtype(bitwidth=score_bits, signed=False)
    value = tl.arange(0, 1 << DIGIT)
    threshold = tl.full([1], 0, key_type)  # the k-th key's highest bytes, as far as they are known
    ties_kept = num_kept  # keys to keep among those that begin so
    for digit in tl.static_range(score_bits // DIGIT):
        shift = score_bits - DIGIT - DIGIT * digit
        num_with_value = tl.zeros([1 << DIGIT], tl.int32)
        for start in range(0, num_items, BLOCK):
            item = start + tl.arange(0, BLOCK)
            in_sequence = item < num_items
            item_row = first_row + item * CODES_PER_ITEM
            key = item_keys(importance_ptr, protect_ptr, item_row, in_sequence, CODES_PER_ITEM) >> shift
            begins_so = in_sequence & (key >> DIGIT == threshold)
            digits = (key & ((1 << DIGIT) - 1)).to(tl.int32)
            num_with_value += tl.histogram(digits, 1 << DIGIT, mask=begins_so)
        reaching = tl.cumsum(num_with_value, axis=0, reverse=True)
        # The highest value that enough keys reach; the number that reach it falls as it rises.
        highest = tl.max(tl.where(reaching >= ties_kept, value, 0), axis=0)
        ties_kept -= tl.sum(tl.where(value > highest, num_with_value, 0), axis=0)
        threshold = (threshold << DIGIT) | highest.to(key_type)

    kept_first = tl.load(cu_seqlens_kept_ptr + sequence, mask=exists, other=0)
    num_greater = 0  # in the blocks before
    num_ties = 0
    for start in range(0, num_items, BLOCK):
        item = start + tl.arange(0, BLOCK)
        in_sequence = item < num_items
        item_row = first_row + item * CODES_PER_ITEM
        key = item_keys(importance_ptr, protect_ptr, item_row, in_sequence, CODES_PER_ITEM)
        greater, tie, greater_before, ties_before = rank_keys(key, threshold, in_sequence, 0)
        ties_before += num_ties
        stays = greater | (tie & (ties_before < ties_kept))
        rank = num_greater + greater_before + tl.minimum(ties_before, ties_kept)
        store_choice(
            indices_ptr, inverse_ptr, kept_positions_ptr, positions_ptr, item, item_row, in_sequence, stays,
            kept_first + rank * CODES_PER_ITEM, total_kept, CODES_PER_ITEM,
        )  # fmt: skip
        num_greater += tl.sum(greater.to(tl.int32), axis=0)
        num_ties += tl.sum(tie.to(tl.int32), axis=0)
    one = tl.zeros([1], tl.int32)
    drop_incomplete_item(inverse_ptr, first_row + one, num_items, end_row, CODES_PER_ITEM)
    fill_tails(
        indices_ptr, inverse_ptr, kept_positions_ptr, tl.load(cu_seqlens_kept_ptr + num_sequences), total_kept,
        tl.load(cu_seqlens_ptr + num_sequences), total, BLOCK,
    )  # fmt: skip


class SelectionConfig(NamedTuple):
    """Sequences of one program, and the items of each that it holds at a time."""

    sequences: int
    items: int
    num_warps: int


# By the items of the longest sequence; at most 8 keys a thread, so that they stay in registers. Up to 256 items a warp
# is all of a program, and its counts need no shared memory.
SELECTION_CONFIGS = (
    SelectionConfig(sequences=8, items=16, num_warps=1),
    SelectionConfig(sequences=4, items=64, num_warps=1),
    SelectionConfig(sequences=1, items=256, num_warps=1),
    SelectionConfig(sequences=1, items=1024, num_warps=4),
    SelectionConfig(sequences=1, items=4096, num_warps=16),
)
# Where the longest sequence has more items than any of these.
LONG_SELECTION_CONFIG = SelectionConfig(sequences=1, items=2048, num_warps=8)

_OFFSETS_BLOCK = 1024


def selection_config(max_items: int) -> tuple[SelectionConfig, bool]:
    """(config, whether it is that of `select_long_kernel`) for sequences of up to `max_items` items."""
    for config in SELECTION_CONFIGS:
        if max_items <= config.items:
            return config, False
    return LONG_SELECTION_CONFIG, True


class Selected(NamedTuple):
    """What selection writes; kept_positions, int32 `[total_kept]`, is None where nobody asked for them."""

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
    """`select_tokens`, and if `with_positions` the positions of the kept tokens.

    Two launches, three with `protect`. No host sync; what is allocated depends on shapes and `total_kept` alone.

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
    grid = launch_grid(max(1, triton.cdiv(num_sequences, config.sequences)))
    num_protected = None
    if protect is not None:
        num_protected = cu_seqlens.new_empty(num_sequences)
        protected_items_kernel[grid](
            num_protected,
            protect,
            cu_seqlens,
            num_sequences,
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
    wanted = budget.ratio_q32 if budget.ratio_q32 is not None else budget.keep_count or 0
    cu_seqlens_kept = torch.empty_like(cu_seqlens)
    kept_offsets_kernel[launch_grid(1)](
        cu_seqlens_kept,
        cu_seqlens,
        num_protected,
        keep_counts,
        wanted,
        budget.min_keep,
        num_sequences,
        total_kept,
        BUDGET_IS_RATIO=budget.ratio_q32 is not None,
        CODES_PER_ITEM=codes_per_item,
        BLOCK=_OFFSETS_BLOCK,
        num_warps=4,
    )
    indices = importance.new_empty(total_kept, dtype=torch.int64)
    inverse = cu_seqlens.new_empty(total)
    kept_positions = cu_seqlens.new_empty(total_kept) if with_positions else None
    arguments = (
        indices, inverse, kept_positions, importance, cu_seqlens, cu_seqlens_kept, num_protected, protect, positions,
        keep_counts, wanted, budget.min_keep, num_sequences, total, total_kept, budget.ratio_q32 is not None,
        codes_per_item,
    )  # fmt: skip
    if is_long:
        # Unless told, ptxas stops at 80 registers on sm_80, for a third program on a processor, and spills 8 bytes.
        select_long_kernel[grid](*arguments, BLOCK=config.items, num_warps=config.num_warps, maxnreg=255)
    else:
        select_kernel[grid](*arguments, SEQUENCES=config.sequences, ITEMS=config.items, num_warps=config.num_warps)
    return Selected(indices, cu_seqlens_kept, inverse, kept_positions)


def select_tokens(
    importance: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    budget: BudgetArguments,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `stamp::select_tokens`: (indices [total_kept], cu_seqlens [B + 1], inverse [T]) of the kept tokens."""
    selected = select(importance, cu_seqlens, max_seqlen, budget)
    return selected.indices, selected.cu_seqlens, selected.inverse
