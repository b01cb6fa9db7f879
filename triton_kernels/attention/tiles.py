"""A tile of attention: some queries of one sequence and head against some of its keys.

What the forward, backward and centrality kernels share: their grouped arguments, which tile a program has, how rows
are loaded and stored, and which pairs see each other. The conventions of all of them:

- names: `first_*` is the packed row of a sequence's first token, `start_*` the index of a tile's first token in its
  sequence, `num_*` a count, `*_ptr` a base pointer, `stride_*` in elements;
- shapes: B sequences, Tq and Tk packed rows of queries and keys, Hq and Hkv heads, D features of a head;
- a token's row is `first + index`, `index` being its place in its sequence. An index may be past the sequence's end:
  such rows are masked, never read;
- every row of every head starts on a 16-byte boundary, strides are multiples of 8 elements, and the last dimension is
  contiguous (`rows_with_vector_strides` makes it so);
- a head of D features takes BLOCK_D columns, a power of two of at least 16; the columns past D are 0;
- heads and rows are 64-bit where they are multiplied by a stride, so that a tensor may have more than 2^31 elements;
- scores are in units of log 2: kernels multiply by `scale_log2 = scale * log2(e)`, and the bias by log2(e), and use
  exp2.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.tiles import TILE_ROWS, lengths_are_alike
from stamp_kernels.triton_kernels.rows import LOG2_E, ceil_div, next_power_of_2

# Arguments whose values differ from batch to batch: a new value does not compile a new kernel. Triton specialises the
# members of tuples whatever this says: tiles_per_sequence has three variants, for 1, multiples of 16 and the rest.
PER_BATCH = ["num_tiles", "num_sequences", "total_q", "total_k", "dropout_threshold"]

# Sequences that a step of `_search_tile` looks at.
_SEARCH_WIDTH = tl.constexpr(128)

_TILE_ROWS = tl.constexpr(TILE_ROWS)

# The block of an entry without a tile: no sequence is so long.
_NO_BLOCK = tl.constexpr(2**31 - 1)


# Arguments that belong together


class Rows(NamedTuple):
    """A tensor `[T, H, D]`; `ptr` is None where a kernel does without it.

    Inside a kernel `rows_of_head` gives the rows of one head, whose `ptr` is that of packed row 0.
    """

    ptr: Tensor | None
    stride_row: int
    stride_head: int

    @classmethod
    def of(cls, x: Tensor | None) -> "Rows":
        if x is None:
            return cls(None, 0, 0)
        stride_row, stride_head, _ = x.stride()
        return tuple.__new__(cls, (x, stride_row, stride_head))  # as `cls(...)`, in half the time


class Offsets(NamedTuple):
    """cu_seqlens of queries and keys, int32 `[B + 1]` each."""

    q: Tensor
    k: Tensor


class Sequence(NamedTuple):
    """One sequence of the batch, as kernels find it: its packed rows `first_* ... first_* + num_* - 1`."""

    index: int
    first_q: int
    num_queries: int
    first_k: int
    num_keys: int


class Tile(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        head_dim, block_d: D and the columns it takes.
        gqa_group_size: heads of q that share a head of k and v.
        causal: whether later keys are hidden.
        block_m, block_n: rows and keys of a tile.
        heads: heads of q whose queries are the rows of a tile, one head after the other: 1, or all that share a head of
            k and v. See `queries`.
        slot: rows of a sequence where a tile has several (the slots kernel), otherwise 0.
        num_buckets: of the bias gradient (the query kernel of the backward), 0 without one.
        has_whole_blocks: whether the blocks of keys that all queries see have a loop of their own, without masks (the
            query kernel of the backward).
        block_of_terms: queries of a block of `backward.QueryTerms`.
    """

    head_dim: int
    block_d: int
    gqa_group_size: int
    causal: bool
    block_m: int
    block_n: int
    heads: int = 1
    slot: int = 0
    num_buckets: int = 0
    has_whole_blocks: bool = False
    block_of_terms: int = 0

    @property
    def queries(self) -> int:
        """Queries of the tile, each with a row for every head."""
        return self.block_m // next_power_of_2(self.heads)

    @classmethod
    def of(cls, q: Tensor, k: Tensor, causal: bool, block_m: int, block_n: int, **extra: int) -> "Tile":
        _, num_heads, head_dim = q.shape
        return cls(head_dim, padded_head_dim(head_dim), num_heads // k.shape[1], causal, block_m, block_n, **extra)


def rows_with_vector_strides(x: Tensor) -> Tensor:
    """x `[T, H, D]`, copied unless D is contiguous and every row starts on a 16-byte boundary.

    That is: the first row does, and rows and heads are multiples of 8 elements apart. `load_rows` and `store_rows`
    promise it to the compiler, which then moves 16 bytes at once. A new tensor of this shape always qualifies: torch
    aligns allocations to at least 64 bytes, and D is a multiple of 8.
    """
    stride_row, stride_head, stride_feature = x.stride()
    is_aligned = x.data_ptr() % 16 == 0 and (stride_row | stride_head) % 8 == 0
    # Not `contiguous()`, which copies nothing if only the address of the first row is wrong.
    return x if stride_feature == 1 and is_aligned else x.clone(memory_format=torch.contiguous_format)


@functools.cache
def padded_head_dim(head_dim: int) -> int:
    """BLOCK_D: tl.dot takes powers of two from 16 on."""
    return max(16, next_power_of_2(head_dim))


# Which tile


class TileOrder(NamedTuple):
    """How a program finds its tile, see `locate_tile`; both None: it searches.

    Attributes:
        tiles_per_sequence: those of the longest sequence, which every sequence gets.
        tile_list: from the op `tile_list`.
    """

    tiles_per_sequence: int | None
    tile_list: Tensor | None


class Grid(NamedTuple):
    """The programs of one head: first those that have a tile of a sequence, then those that share the tail rows.

    All numbers are known from shapes and max_seqlen, so the CPU waits for no length.
    """

    order: TileOrder
    num_tiles: int
    num_programs: int

    @classmethod
    def of(
        cls, total_rows: int, num_sequences: int, max_seqlen: int, block: int, tile_list: Tensor | None = None
    ) -> "Grid":
        """By sequence where that takes no more programs than a search. Otherwise by the list, if there is one and its
        tiles are cut into two at most: smaller ones would mostly be idle.
        """
        if lengths_are_alike(total_rows, num_sequences, max_seqlen, block):
            tiles_per_sequence = max(ceil_div(max_seqlen, block), 1)
            order, num_tiles = TileOrder(tiles_per_sequence, None), tiles_per_sequence * num_sequences
        elif tile_list is not None and block >= TILE_ROWS // 2:
            order, num_tiles = TileOrder(None, tile_list), tile_list.shape[0] * max(TILE_ROWS // block, 1)
        else:
            order, num_tiles = TileOrder(None, None), total_rows // block + num_sequences
        return cls(order, num_tiles, num_tiles + num_tail_programs(total_rows))


@triton.jit
def locate_tile(tile_index, order, cu_seqlens_ptr, num_sequences, BLOCK: tl.constexpr):
    """(sequence index, block): a program's tile has the rows from `block * BLOCK` on of that sequence.

    They may all be past its end: the program then has nothing to do. See `Grid` for the number of programs.
    """
    if order.tiles_per_sequence is not None:
        return tile_index // order.tiles_per_sequence, tile_index % order.tiles_per_sequence
    elif order.tile_list is not None:
        return _listed_tile(tile_index, order.tile_list, num_sequences, BLOCK)
    else:
        return _search_tile(tile_index, cu_seqlens_ptr, num_sequences, BLOCK)


@triton.jit
def _listed_tile(tile_index, tile_list_ptr, num_sequences, BLOCK: tl.constexpr):
    """The tile of an entry, or a part of it if BLOCK is smaller. Where BLOCK is larger, every other entry is idle.

    Whatever the list holds, the sequence exists and the block is not negative.
    """
    TILES_OF_ENTRY: tl.constexpr = max(_TILE_ROWS // BLOCK, 1)
    entry_ptr = tile_list_ptr + tile_index // TILES_OF_ENTRY * 2
    index, start = tl.load(entry_ptr), tl.load(entry_ptr + 1)
    is_tile = (index >= 0) & (index < num_sequences) & (start >= 0)
    if BLOCK > _TILE_ROWS:
        is_tile = is_tile & (start % BLOCK == 0)
    block = start // BLOCK + tile_index % TILES_OF_ENTRY
    return tl.where(is_tile, index, 0), tl.where(is_tile, block, _NO_BLOCK)


@triton.jit
def _search_tile(tile_index, cu_seqlens_ptr, num_sequences, BLOCK: tl.constexpr):
    """Sequence i starts at tile `cu_seqlens[i] // BLOCK + i`, so it owns `cu[i+1] // BLOCK - cu[i] // BLOCK + 1` tiles.

    These are at least ceil(n_i / BLOCK), and at most one of them is past its rows. In total there are at most
    `T // BLOCK + B`.

    The starts increase strictly, so the sequence is the last one whose start is not past the tile. The search reads
    128 candidates a round: one round for up to 128 sequences and two for up to 16,384.
    """
    first = 0  # the sequence is in first, first + 1, ..., first + count - 1
    count = num_sequences
    lane = tl.arange(0, _SEARCH_WIDTH)  # [128]
    while count > 1:
        step = tl.cdiv(count, _SEARCH_WIDTH)
        in_range = lane * step < count
        candidate = first + lane * step
        start = tl.load(cu_seqlens_ptr + candidate, mask=in_range, other=0) // BLOCK + candidate  # [128]
        not_past = tl.sum((in_range & (start <= tile_index)).to(tl.int32), axis=0)
        # start(first) <= tile_index always holds, so not_past >= 1.
        first += (not_past - 1) * step
        count = tl.minimum(step, num_sequences - first)
    start = tl.load(cu_seqlens_ptr + first) // BLOCK + first
    return first, tile_index - start


@triton.jit
def sequence_rows(index, cu_seqlens_ptr):
    """(first, length) of the sequence `index`."""
    first = tl.load(cu_seqlens_ptr + index)
    return first, tl.load(cu_seqlens_ptr + index + 1) - first


# Tail rows

_TAIL_BLOCK = tl.constexpr(64)


def num_tail_programs(total_rows: int) -> int:
    """How many programs of a head share the tail rows. Often there are none, and a program for each block is idle."""
    return min(ceil_div(total_rows, _TAIL_BLOCK.value), 16)


@triton.jit
def tail_share(tile_index, num_tiles, programs_of_tile):
    """(share, num_shares) of a program past the tiles: which share of the tail rows it has, of how many."""
    return tile_index - num_tiles, tl.num_programs(0) // programs_of_tile - num_tiles


@triton.jit
def zero_tail(rows, cu_seqlens_ptr, num_sequences, total_rows, share, num_shares, tile: tl.constexpr):
    """One head's rows 0 on a share of the tail rows: every num_shares-th block of them."""
    BLOCK: tl.constexpr = _TAIL_BLOCK
    BLOCK_D: tl.constexpr = tile.block_d
    row = tl.arange(0, BLOCK)
    first = tl.load(cu_seqlens_ptr + num_sequences)
    zeros = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for start in range(first + share * BLOCK, total_rows, num_shares * BLOCK):
        store_rows(rows, zeros, start, row, total_rows - start, tile)


@triton.jit
def zero_tail_values(values_ptr, cu_seqlens_ptr, num_sequences, total_rows, share, num_shares):
    """As `zero_tail`, for a vector with one value for each row."""
    row = tl.arange(0, _TAIL_BLOCK)
    first = tl.load(cu_seqlens_ptr + num_sequences)
    for start in range(first + share * _TAIL_BLOCK, total_rows, num_shares * _TAIL_BLOCK):
        tl.store(values_ptr + start + row, 0.0, mask=row < total_rows - start)


# Rows of a tile


@triton.jit
def rows_of_tile(start_q, first_head, tile: tl.constexpr):
    """(query, head) of each row of a tile: the index in the sequence, [BLOCK_M], and the head.

    The head is a scalar, or [BLOCK_M] where the tile has several. Rows for which there is no head repeat the last one.
    """
    BLOCK_M: tl.constexpr = tile.block_m
    row = tl.arange(0, BLOCK_M)
    if tile.heads == 1:
        return start_q + row, first_head
    else:
        QUERIES: tl.constexpr = tile.queries
        place = row // QUERIES
        return start_q + row % QUERIES, first_head + tl.minimum(place, tile.heads - 1)


@triton.jit
def rows_of_head(rows, head):
    """The Rows of one head; where `head` is [BLOCK], `ptr` is the one of each row's head."""
    return Rows(ptr=rows.ptr + head * rows.stride_head, stride_row=rows.stride_row, stride_head=rows.stride_head)


@triton.jit
def row_pointers(rows, first, index, BLOCK_D: tl.constexpr):
    """`[BLOCK, BLOCK_D]`: addresses of the rows `first + index` of one head, declared to be aligned.

    Triton counts the divisibility of pointers in bytes: along a dimension it is that of the first element of each run
    of neighbours. Along the columns a run begins with column 0, and every row starts on a 16-byte boundary; along the
    rows nothing is promised. The compiler derives less: of an integer argument such as a head's stride it knows only
    whether 16 divides it, so it would read heads of 72 features 2 bytes at a time.
    """
    column = tl.arange(0, BLOCK_D)
    offsets = (first + index).to(tl.int64) * tl.multiple_of(tl.cast(rows.stride_row, tl.int64), 8)  # [BLOCK]
    return tl.multiple_of((rows.ptr + offsets)[:, None] + column[None, :], (1, 16))


@triton.jit
def load_rows(rows, first, index, length, tile: tl.constexpr, BOUNDED: tl.constexpr = True):
    """`[BLOCK, BLOCK_D]`: the rows `first + index` of one head, 0 past `length` and past D.

    Args:
        rows: from `rows_of_head`.
        first: packed row of index 0: a scalar, or [BLOCK] where the tile's rows belong to several sequences.
        index: [BLOCK].
        length: rows of the sequence, a scalar or [BLOCK].
        BOUNDED: False where the caller knows every index to be below `length`.
    """
    BLOCK_D: tl.constexpr = tile.block_d
    column = tl.arange(0, BLOCK_D)
    pointers = row_pointers(rows, first, index, BLOCK_D)
    # Tail rows may hold NaN, and 0 * NaN is NaN: what the scores mask must be 0 here too.
    if BOUNDED and tile.head_dim < BLOCK_D:
        return tl.load(pointers, mask=(index < length)[:, None] & (column < tile.head_dim)[None, :], other=0.0)
    elif BOUNDED:
        return tl.load(pointers, mask=(index < length)[:, None], other=0.0)
    elif tile.head_dim < BLOCK_D:
        return tl.load(pointers, mask=(column < tile.head_dim)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(rows, x, first, index, length, tile: tl.constexpr):
    """Write x `[BLOCK, BLOCK_D]`, cast to the tensor's dtype, to the rows that `load_rows` would read."""
    BLOCK_D: tl.constexpr = tile.block_d
    column = tl.arange(0, BLOCK_D)
    pointers = row_pointers(rows, first, index, BLOCK_D)
    written = (index < length)[:, None]
    if tile.head_dim < BLOCK_D:
        written = written & (column < tile.head_dim)[None, :]
    tl.store(pointers, x.to(rows.ptr.dtype.element_ty), mask=written)


@triton.jit
def load_lse(lse_ptr, row, exists):
    """fp32 `[BLOCK]`: log-sum-exp in units of log 2; +inf for a query past the sequence and one that sees no key.

    +inf makes exp2(score - lse) 0 whatever the score, so that such a query adds nothing to any sum.
    """
    lse = tl.load(lse_ptr + row, mask=exists, other=float("-inf"))  # [BLOCK]
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


# Which pairs see each other


@triton.jit
def visible_tile(query, key, num_queries, num_keys, CAUSAL: tl.constexpr):
    """bool `[BLOCK_M, BLOCK_N]`: the key exists and, if causal, `key <= query + num_keys - num_queries`.

    Aligned bottom-right: the last query sees every key. By index in the packed sequence, whatever the positions. What
    it says of queries past the end has no meaning: their rows are never stored, and add nothing to sums over queries.

    Args:
        query, key: [BLOCK_M] and [BLOCK_N], indices in the sequence.
        num_queries, num_keys: lengths of the sequence, scalars, or [BLOCK_M] and [BLOCK_N] in the slots kernel.
    """
    visible = tl.broadcast_to((key < num_keys)[None, :], query.shape[0], key.shape[0])
    if CAUSAL:
        visible = visible & (key[None, :] <= query[:, None] + (num_keys - num_queries))
    return visible


@triton.jit
def num_keys_seen(query, num_queries, num_keys, CAUSAL: tl.constexpr):
    """How many keys the query of this index sees; it may be negative. `num_keys` where not causal."""
    if CAUSAL:
        return tl.minimum(query + 1 + num_keys - num_queries, num_keys)
    else:
        return num_keys
