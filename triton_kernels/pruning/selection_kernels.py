"""Selection: the kernels that choose which items of each sequence stay.

A sequence with n unprotected and p protected items keeps

    k = p + min(n, max(min_keep, budget))

items: those with the k greatest keys, and of equal keys those with the lower index. A key is an unsigned integer in the
order of the importance, so the k-th greatest key is found digit by digit, by counting; integer counts are exact in any
order. Prefix sums say where each item goes. There is no sort, no atomic on memory, and nothing that the CPU must wait
for.

Names: `first_row` is the first row of a sequence, `item_row` the first row of an item, `kept_row` the row of the result
that it goes to; an item is a token if CODES_PER_ITEM is 1.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# No kernel is compiled again for other values of these.
VARYING = ["budget", "min_keep", "num_sequences", "total", "total_kept"]


class Chosen(NamedTuple):
    """What selection writes.

    Attributes:
        indices: int64 `[total_kept]`.
        inverse: int32 `[T]`.
        positions: int32 `[total_kept]`, or None.
    """

    indices: Tensor
    inverse: Tensor
    positions: Tensor | None


class Tokens(NamedTuple):
    """What selection reads of each token.

    Attributes:
        importance: `[T]`.
        protect: bool `[T]`, or None.
        positions: int32 `[T]`; None: the index in the sequence.
    """

    importance: Tensor
    protect: Tensor | None
    positions: Tensor | None


class Offsets(NamedTuple):
    """Where the sequences begin, int32 `[B + 1]`: in the source, and in the result."""

    source: Tensor
    kept: Tensor


class SequenceCounts(NamedTuple):
    """What differs from sequence to sequence in a budget.

    Attributes:
        num_protected: int32 `[B]`; None: no item is protected.
        keep_counts: `[B]`, the budget of each sequence, or None.
    """

    num_protected: Tensor | None
    keep_counts: Tensor | None


# Keys


@triton.jit
def ordered_keys(importance):
    """Unsigned integers of the same width and order as the importance, which is never -0.0; NaN is 0, the lowest."""
    BITS: tl.constexpr = importance.dtype.primitive_bitwidth
    SIGN: tl.constexpr = 1 << (BITS - 1)
    ALL: tl.constexpr = (1 << BITS) - 1
    bits = importance.to(tl.core.get_int_dtype(bitwidth=BITS, signed=False), bitcast=True)
    # The bits of negative numbers rise as the numbers fall, so they are inverted; the others are moved above them.
    return tl.where(importance == importance, bits ^ tl.where(bits >= SIGN, ALL, SIGN), 0)


@triton.jit
def items_are_protected(protect_ptr, item_row, in_sequence, CODES_PER_ITEM: tl.constexpr):
    """Whether any token of an item is protected; False where not `in_sequence`."""
    protected = tl.zeros(item_row.shape, tl.int1)
    for i in range(CODES_PER_ITEM):
        protected = protected | (tl.load(protect_ptr + item_row + i, mask=in_sequence, other=0) != 0)
    return protected


@triton.jit
def item_keys(tokens, item_row, in_sequence, CODES_PER_ITEM: tl.constexpr):
    """The keys of items; 0 where not `in_sequence`.

    The importance of an item is the sum over its tokens, from the first to the last, in fp32 (fp64 for fp64). A
    protected item has the greatest key, which no importance has.
    """
    input_type: tl.constexpr = tokens.importance.dtype.element_ty
    sum_type: tl.constexpr = tl.float64 if input_type == tl.float64 else tl.float32
    importance = tl.zeros(item_row.shape, sum_type)  # a sum that begins with 0.0 is never -0.0
    for i in range(CODES_PER_ITEM):
        importance += tl.load(tokens.importance + item_row + i, mask=in_sequence, other=0.0).to(sum_type)
    key = ordered_keys(importance)
    if tokens.protect is not None:
        protected = items_are_protected(tokens.protect, item_row, in_sequence, CODES_PER_ITEM)
        key = tl.where(protected, (1 << sum_type.primitive_bitwidth) - 1, key)
    return tl.where(in_sequence, key, 0)


# How many


@triton.jit
def kept_items(counts, num_items, sequence, exists, budget, min_keep, BUDGET_IS_RATIO: tl.constexpr):
    """k, int32, in the shape of `sequence`.

    Args:
        num_items: int32, the items of each sequence, with the protected ones.
        exists: whether there is such a sequence.
        budget: int64, the budget of every sequence; with BUDGET_IS_RATIO the keep ratio r, and the budget is
            ceil(r n / 2^32). Ignored if `counts` has a budget for each sequence.
        min_keep: int64.
    """
    num_protected = tl.zeros_like(num_items)
    if counts.num_protected is not None:
        num_protected = tl.load(counts.num_protected + sequence, mask=exists, other=0)
    unprotected = (num_items - num_protected).to(tl.int64)
    if counts.keep_counts is not None:
        wanted = tl.load(counts.keep_counts + sequence, mask=exists, other=0).to(tl.int64)
    elif BUDGET_IS_RATIO:
        wanted = (budget * unprotected - unprotected + 0xFFFFFFFF) >> 32  # the same ceiling in every backend
    else:
        wanted = budget
    return num_protected + tl.minimum(unprotected, tl.maximum(wanted, min_keep)).to(tl.int32)


@triton.jit(do_not_specialize=VARYING)
def stamp_protected_items_kernel(
    num_protected_ptr,  # int32 [B]
    protect_ptr,  # bool [T]
    cu_seqlens_ptr,  # int32 [B + 1]
    num_sequences,
    CODES_PER_ITEM: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """The number of protected items in SEQUENCES sequences, counted ITEMS of each at a time.

    Grid: [ceil(B / SEQUENCES)].
    """
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


@triton.jit
def write_kept_offsets(
    offsets, counts, budget, min_keep, num_sequences, total_kept,
    BUDGET_IS_RATIO: tl.constexpr, CODES_PER_ITEM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the kept tokens of each sequence begin: `min(total_kept, kept tokens of the sequences before)`.

    One program passes over the sequences, BLOCK at a time, and carries the sum along.
    """
    tl.store(offsets.kept, 0)
    kept_before = 0
    for start in range(0, num_sequences, BLOCK):
        sequence = start + tl.arange(0, BLOCK)
        exists = sequence < num_sequences
        first_row = tl.load(offsets.source + sequence, mask=exists, other=0)
        num_items = (tl.load(offsets.source + sequence + 1, mask=exists, other=0) - first_row) // CODES_PER_ITEM
        kept = CODES_PER_ITEM * kept_items(counts, num_items, sequence, exists, budget, min_keep, BUDGET_IS_RATIO)
        kept = tl.where(exists, kept, 0)
        kept_until = tl.minimum(kept_before + tl.cumsum(kept, axis=0), total_kept)
        tl.store(offsets.kept + sequence + 1, kept_until, mask=exists)
        kept_before += tl.sum(kept, axis=0)


@triton.jit(do_not_specialize=VARYING)
def stamp_kept_offsets_kernel(
    offsets: Offsets,
    counts: SequenceCounts,
    budget: tl.int64,
    min_keep: tl.int64,
    num_sequences,
    total_kept,
    BUDGET_IS_RATIO: tl.constexpr,
    CODES_PER_ITEM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the kept tokens of each sequence begin.

    Grid: [1].
    """
    write_kept_offsets(
        offsets, counts, budget, min_keep, num_sequences, total_kept, BUDGET_IS_RATIO, CODES_PER_ITEM, BLOCK
    )


# Which


@triton.jit
def rank_keys(key, threshold, in_sequence, AXIS: tl.constexpr):
    """(greater, tie, greater_before, ties_before): how each key compares with the threshold, and the number of either
    kind before it along AXIS. AXIS has fewer than 2^15 items, so one prefix sum carries both counts.
    """
    greater = in_sequence & (key > threshold)
    tie = in_sequence & (key == threshold)
    both = greater.to(tl.int32) + (tie.to(tl.int32) << 16)
    before = tl.cumsum(both, axis=AXIS) - both
    return greater, tie, before & 0xFFFF, before >> 16


@triton.jit
def store_choice(
    out, positions_ptr, item, item_row, in_sequence, stays, kept_row, total_kept, CODES_PER_ITEM: tl.constexpr
):
    """Write the source row and position of the items that stay, and the kept row of all items.

    Args:
        item: the index in the sequence.
        stays: whether the item is kept. What would go past `total_kept` is dropped.
    """
    for i in range(CODES_PER_ITEM):
        is_kept = stays & (kept_row + i < total_kept)
        tl.store(out.inverse + item_row + i, tl.where(is_kept, kept_row + i, -1), mask=in_sequence)
        tl.store(out.indices + kept_row + i, (item_row + i).to(tl.int64), mask=is_kept)
        if out.positions is not None:
            if positions_ptr is not None:
                position = tl.load(positions_ptr + item_row + i, mask=is_kept, other=0)
            else:
                position = item * CODES_PER_ITEM + i
            tl.store(out.positions + kept_row + i, position, mask=is_kept)


@triton.jit
def drop_incomplete_item(inverse_ptr, first_row, num_items, end_row, CODES_PER_ITEM: tl.constexpr):
    """Drop the tokens after the last whole item. The arguments after `inverse_ptr` have one entry for each sequence."""
    for i in range(CODES_PER_ITEM - 1):
        row = first_row + num_items * CODES_PER_ITEM + i
        tl.store(inverse_ptr + row, tl.full(row.shape, -1, tl.int32), mask=row < end_row)


@triton.jit
def fill_tails(out, offsets, num_sequences, total, total_kept, BLOCK: tl.constexpr):
    """-1 (position 0) in the tail rows of the result and of `inverse`; all programs of the launch share the blocks."""
    start = tl.program_id(0) * BLOCK
    step = tl.num_programs(0) * BLOCK
    lane = tl.arange(0, BLOCK)
    for row in range(tl.load(offsets.kept + num_sequences) + start, total_kept, step):
        in_tail = row + lane < total_kept
        tl.store(out.indices + row + lane, tl.full([BLOCK], -1, tl.int64), mask=in_tail)
        if out.positions is not None:
            tl.store(out.positions + row + lane, tl.zeros([BLOCK], tl.int32), mask=in_tail)
    for row in range(tl.load(offsets.source + num_sequences) + start, total, step):
        tl.store(out.inverse + row + lane, tl.full([BLOCK], -1, tl.int32), mask=row + lane < total)


@triton.jit(do_not_specialize=VARYING)
def stamp_select_tokens_short_kernel(
    out: Chosen,
    tokens: Tokens,
    offsets: Offsets,
    counts: SequenceCounts,
    budget: tl.int64,
    min_keep: tl.int64,
    num_sequences,
    total,
    total_kept,
    BUDGET_IS_RATIO: tl.constexpr,
    CODES_PER_ITEM: tl.constexpr,
    SEQUENCES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """The choice in SEQUENCES sequences of up to ITEMS items each, whose keys stay in registers.

    A binary search from the highest bit finds a threshold that at least k keys reach. It stops as soon as exactly k
    keys reach the threshold, which then need not be the k-th key itself. Keys above the threshold stay, and of the keys
    equal to it the first k - (number above).

    Grid: [max(1, ceil(B / SEQUENCES))].
    """
    sequence = tl.program_id(0) * SEQUENCES + tl.arange(0, SEQUENCES)
    exists = sequence < num_sequences
    first_row = tl.load(offsets.source + sequence, mask=exists, other=0)
    end_row = tl.load(offsets.source + sequence + 1, mask=exists, other=0)
    num_items = (end_row - first_row) // CODES_PER_ITEM
    num_kept = kept_items(counts, num_items, sequence, exists, budget, min_keep, BUDGET_IS_RATIO)
    num_kept = tl.where(exists, num_kept, 0)
    item = tl.arange(0, ITEMS)[None, :]
    in_sequence = item < num_items[:, None]  # [SEQUENCES, ITEMS]
    item_row = first_row[:, None] + item * CODES_PER_ITEM
    key = item_keys(tokens, item_row, in_sequence, CODES_PER_ITEM)  # [SEQUENCES, ITEMS]

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
    first_kept_row = tl.load(offsets.kept + sequence, mask=exists, other=0)
    kept_row = first_kept_row[:, None] + (greater_before + tl.minimum(ties_before, ties_kept)) * CODES_PER_ITEM
    store_choice(out, tokens.positions, item, item_row, in_sequence, stays, kept_row, total_kept, CODES_PER_ITEM)
    drop_incomplete_item(out.inverse, first_row, num_items, end_row, CODES_PER_ITEM)
    fill_tails(out, offsets, num_sequences, total, total_kept, SEQUENCES * ITEMS)


@triton.jit(do_not_specialize=VARYING)
def stamp_select_tokens_long_kernel(
    out: Chosen,
    tokens: Tokens,
    offsets: Offsets,
    counts: SequenceCounts,
    budget: tl.int64,
    min_keep: tl.int64,
    num_sequences,
    total,
    total_kept,
    BUDGET_IS_RATIO: tl.constexpr,
    CODES_PER_ITEM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The choice in one sequence of any length, whose keys are computed again in every pass, BLOCK at a time.

    A pass for each byte of the key, the highest first, counts the values of that byte among the keys that begin like
    the k-th key, and so finds the k-th key. One more pass writes.

    Grid: [max(1, B)].
    """
    DIGIT: tl.constexpr = 8
    sequence = tl.program_id(0)
    exists = sequence < num_sequences
    first_row = tl.load(offsets.source + sequence, mask=exists, other=0)
    end_row = tl.load(offsets.source + sequence + 1, mask=exists, other=0)
    num_items = (end_row - first_row) // CODES_PER_ITEM
    num_kept = kept_items(counts, num_items, sequence, exists, budget, min_keep, BUDGET_IS_RATIO)

    KEY_BITS: tl.constexpr = 64 if tokens.importance.dtype.element_ty == tl.float64 else 32
    key_type: tl.constexpr = tl.core.get_int_dtype(bitwidth=KEY_BITS, signed=False)
    value = tl.arange(0, 1 << DIGIT)
    threshold = tl.full([1], 0, key_type)  # the highest bytes of the k-th key, as far as they are known
    ties_kept = num_kept  # how many of the keys that begin with these bytes stay
    for digit in tl.static_range(KEY_BITS // DIGIT):
        shift = KEY_BITS - DIGIT - DIGIT * digit
        num_with_value = tl.zeros([1 << DIGIT], tl.int32)
        for start in range(0, num_items, BLOCK):
            item = start + tl.arange(0, BLOCK)
            in_sequence = item < num_items
            item_row = first_row + item * CODES_PER_ITEM
            key = item_keys(tokens, item_row, in_sequence, CODES_PER_ITEM) >> shift
            is_candidate = in_sequence & (key >> DIGIT == threshold)
            digits = (key & ((1 << DIGIT) - 1)).to(tl.int32)
            num_with_value += tl.histogram(digits, 1 << DIGIT, mask=is_candidate)
        num_reaching = tl.cumsum(num_with_value, axis=0, reverse=True)
        # The highest value that enough keys reach; fewer keys reach a higher value.
        highest = tl.max(tl.where(num_reaching >= ties_kept, value, 0), axis=0)
        ties_kept -= tl.sum(tl.where(value > highest, num_with_value, 0), axis=0)
        threshold = (threshold << DIGIT) | highest.to(key_type)

    first_kept_row = tl.load(offsets.kept + sequence, mask=exists, other=0)
    num_greater = 0  # in the blocks before
    num_ties = 0
    for start in range(0, num_items, BLOCK):
        item = start + tl.arange(0, BLOCK)
        in_sequence = item < num_items
        item_row = first_row + item * CODES_PER_ITEM
        key = item_keys(tokens, item_row, in_sequence, CODES_PER_ITEM)
        greater, tie, greater_before, ties_before = rank_keys(key, threshold, in_sequence, 0)
        ties_before += num_ties
        stays = greater | (tie & (ties_before < ties_kept))
        rank = num_greater + greater_before + tl.minimum(ties_before, ties_kept)
        kept_row = first_kept_row + rank * CODES_PER_ITEM
        store_choice(out, tokens.positions, item, item_row, in_sequence, stays, kept_row, total_kept, CODES_PER_ITEM)
        num_greater += tl.sum(greater.to(tl.int32), axis=0)
        num_ties += tl.sum(tie.to(tl.int32), axis=0)
    drop_incomplete_item(out.inverse, first_row + tl.zeros([1], tl.int32), num_items, end_row, CODES_PER_ITEM)
    fill_tails(out, offsets, num_sequences, total, total_kept, BLOCK)
