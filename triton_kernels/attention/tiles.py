"""A tile of attention: some queries of one sequence and head against some of its keys.

What the forward, the backward and the centrality kernels share: which tile a program has, how its rows are loaded, and
what the tile's bias, dropout mask and visible pairs are. Conventions of all of them:

- rows: `x[first + index]`, `first` being the packed row of the sequence's first token, `index` the token's index in
  its sequence. `index` may run past the sequence: such rows are masked on load, never read;
- every row of every head starts on a 16-byte boundary and strides, in elements, are multiples of 8
  (`rows_with_vector_strides` sees to both); the last dimension is contiguous;
- a head of HEAD_DIM features stands in BLOCK_D columns, a power of two of at least 16; the columns past HEAD_DIM are 0;
- rows and heads are 64-bit where they meet a stride, so that a tensor may have more than 2^31 elements;
- scores are in units of log 2: kernels take `scale * log2(e)` and a table times log2(e), and use exp2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.relative_position import relative_position_bucket
from stamp_kernels.triton_kernels.constants import device_constant

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

_SEARCH_WIDTH = tl.constexpr(128)


# On the host


def rows_with_vector_strides(x: Tensor) -> Tensor:
    """x `[T, H, D]`, copied unless D is contiguous and every row starts on a 16-byte boundary.

    That is: the first row does, and rows and heads are multiples of 8 elements apart. `load_rows` and `store_rows`
    promise it to the compiler, which then moves 16 bytes at once. A new tensor of this shape always qualifies: torch
    aligns allocations to at least 64 bytes, and D is a multiple of 8.
    """
    is_aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0
    # Not `contiguous()`, which copies nothing where only the first row's address is wrong.
    return x if x.stride(2) == 1 and is_aligned else x.clone(memory_format=torch.contiguous_format)


def padded_head_dim(head_dim: int) -> int:
    """BLOCK_D: tl.dot takes powers of two from 16 on."""
    return max(16, triton.next_power_of_2(head_dim))


def num_tiles(total_rows: int, num_sequences: int, block: int) -> int:
    """How many tiles `locate_tile` deals out, tail rows included: known from shapes, without reading a length."""
    return total_rows // block + num_sequences + 1


def dropout_threshold(dropout_p: float) -> int:
    """A weight is dropped iff its random word is below this."""
    return int(dropout_p * 2**32)


def distance_buckets(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """int32 `[2 * max_distance + 1]`: entry `d + max_distance` is the bucket of distance d.

    Distances beyond +-max_distance have the bucket of +-max_distance, so that kernels clamp. The table is made on the
    host by the formula itself: a kernel's own logarithm could put a distance into another bucket than Hugging Face's.
    The first call copies it to the device, so it must not happen while a CUDA graph is captured.
    """

    def make() -> Tensor:
        distances = torch.arange(-max_distance, max_distance + 1)
        buckets = relative_position_bucket(
            distances, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
        )
        return buckets.to(torch.int32)

    return device_constant(("distance_buckets", num_buckets, max_distance, bidirectional), device, make)


# Which tile


@triton.jit
def locate_tile(tile, cu_seqlens_ptr, num_sequences, BLOCK: tl.constexpr):
    """The sequence of a tile of BLOCK rows and the tile's place in it: (sequence, block_in_sequence).

    Sequence i starts at tile `cu_seqlens[i] // BLOCK + i` and so owns `cu[i+1] // BLOCK - cu[i] // BLOCK + 1` tiles, at
    least ceil(n_i / BLOCK). The tile past its rows (there is at most one) has nothing to do. Tail rows count as
    sequence `num_sequences`. Altogether there are at most `num_tiles(T, B, BLOCK)` tiles: no length is needed on
    the host, at the price of less than one idle program a sequence.

    The starts rise strictly, so the sequence is the last one whose start is not past the tile: a search that reads
    128 candidates a round, one round for up to 127 sequences and two for up to 16,383.
    """
    first = 0  # the sequence is in first, first + 1, ..., first + count - 1
    count = num_sequences + 1
    lane = tl.arange(0, _SEARCH_WIDTH)  # [128]
    while count > 1:
        step = tl.cdiv(count, _SEARCH_WIDTH)
        in_range = lane * step < count
        candidate = first + lane * step
        start = tl.load(cu_seqlens_ptr + candidate, mask=in_range, other=0) // BLOCK + candidate
        not_past = tl.sum((in_range & (start <= tile)).to(tl.int32), axis=0)
        # start(first) <= tile always holds, so not_past >= 1.
        first += (not_past - 1) * step
        count = tl.minimum(step, num_sequences + 1 - first)
    start = tl.load(cu_seqlens_ptr + first) // BLOCK + first
    return first, tile - start


@triton.jit
def sequence_rows(sequence, cu_seqlens_ptr, num_sequences, total_rows):
    """(first, length) of a sequence; of the tail rows where `sequence` is `num_sequences`."""
    first = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=sequence < num_sequences, other=total_rows)
    return first, end - first


# Rows of a tile


@triton.jit
def row_offsets(first, index, stride):
    """int64 offsets of the rows `first + index`, in the shape of `index`; the stride is a multiple of 8."""
    return (first + index).to(tl.int64) * tl.multiple_of(tl.cast(stride, tl.int64), 8)


@triton.jit
def row_pointers(head_ptr, first, index, stride, BLOCK_D: tl.constexpr):
    """`[BLOCK, BLOCK_D]`: addresses of the rows `first + index` of one head, declared to be aligned.

    Triton counts the divisibility of pointers in bytes: along a dimension, that of the first element of each run of
    neighbours. Along the columns a run begins with column 0, and every row starts on a 16-byte boundary; along the
    rows nothing is promised. The compiler derives less: of an integer argument such as a head's stride it only knows
    whether 16 divides it, so heads of 72 features would be read 2 bytes at a time.
    """
    column = tl.arange(0, BLOCK_D)
    pointers = head_ptr + row_offsets(first, index, stride)[:, None] + column[None, :]
    return tl.multiple_of(pointers, (1, 16))


@triton.jit
def load_rows(
    head_ptr, first, index, stride, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr
):
    """`[BLOCK, BLOCK_D]`: rows `first + index` of one head, 0 past `length` and past HEAD_DIM.

    Args:
        head_ptr: the head's features of packed row 0, on a 16-byte boundary.
        first: packed row of index 0; a scalar, or [BLOCK] where the tile's rows belong to several sequences.
        index: [BLOCK].
        length: rows of the sequence, a scalar or [BLOCK].
        BOUNDED: False where the caller knows every index to be below `length`.
    """
    column = tl.arange(0, BLOCK_D)
    pointers = row_pointers(head_ptr, first, index, stride, BLOCK_D)
    # Tail rows may hold NaN, and 0 * NaN is NaN: what is masked in the scores must be 0 here too.
    if BOUNDED and HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=(index < length)[:, None] & (column < HEAD_DIM)[None, :], other=0.0)
    elif BOUNDED:
        return tl.load(pointers, mask=(index < length)[:, None], other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=(column < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def store_rows(head_ptr, x, first, index, stride, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write x `[BLOCK, BLOCK_D]`, cast to the tensor's dtype, to the rows that `load_rows` would read."""
    column = tl.arange(0, BLOCK_D)
    pointers = row_pointers(head_ptr, first, index, stride, BLOCK_D)
    written = (index < length)[:, None]
    if HEAD_DIM < BLOCK_D:
        written = written & (column < HEAD_DIM)[None, :]
    tl.store(pointers, x.to(head_ptr.dtype.element_ty), mask=written)


# Which pairs see each other


@triton.jit
def visible_tile(query, key, num_queries, num_keys, CAUSAL: tl.constexpr):
    """bool `[BLOCK_M, BLOCK_N]`: both exist and, if causal, `key <= query + num_keys - num_queries`.

    Aligned bottom-right: the last query sees every key. By index in the packed sequence, whatever the positions.

    Args:
        query: [BLOCK_M] index in the sequence; key: [BLOCK_N].
        num_queries, num_keys: lengths of the sequence.
    """
    visible = (query < num_queries)[:, None] & (key < num_keys)[None, :]
    if CAUSAL:
        visible = visible & (key[None, :] <= query[:, None] + (num_keys - num_queries))
    return visible


@triton.jit
def last_key_seen(query, num_queries, num_keys, CAUSAL: tl.constexpr):
    """How many keys query number `query` sees, as a count that may be negative; `num_keys` where not causal."""
    if CAUSAL:
        return tl.minimum(query + 1 + num_keys - num_queries, num_keys)
    else:
        return num_keys


# Bias


@triton.jit
def tile_positions(positions_ptr, first, start, length, BLOCK: tl.constexpr, HAS_POSITIONS: tl.constexpr):
    """Original positions of the tokens `start ... start + BLOCK - 1`: (positions int32 [BLOCK], lowest, highest).

    Without positions a token's index is its position. Past the sequence's end the last token's position is repeated,
    so that lowest and highest are those of tokens that exist. `length` must exceed `start`.
    """
    index = tl.minimum(start + tl.arange(0, BLOCK), length - 1)
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + first + index)
        return position, tl.min(position, axis=0), tl.max(position, axis=0)
    else:
        return index, start, tl.minimum(start + BLOCK, length) - 1


@triton.jit
def bucket_tile(position_q, position_k, buckets_ptr, max_distance):
    """int32 `[BLOCK_M, BLOCK_N]`: the bucket of `position_k[j] - position_q[i]`.

    Args:
        position_q: int32 [BLOCK_M]; position_k: int32 [BLOCK_N].
        buckets_ptr: `distance_buckets`, int32 [2 * max_distance + 1].
    """
    distance = position_k[None, :] - position_q[:, None]
    return tl.load(buckets_ptr + max_distance + tl.minimum(tl.maximum(distance, -max_distance), max_distance))


@triton.jit
def is_one_bucket(lowest_q, highest_q, lowest_k, highest_k, max_distance):
    """Whether all distances of a tile lie at or beyond max_distance on one side, from the ranges of its positions."""
    return (lowest_k - highest_q >= max_distance) | (highest_k - lowest_q <= -max_distance)


@triton.jit
def the_one_bucket(highest_q, lowest_k, buckets_ptr, max_distance):
    """The bucket of a tile of which `is_one_bucket` holds, a scalar."""
    far_after = lowest_k - highest_q >= max_distance
    return tl.load(buckets_ptr + tl.where(far_after, 2 * max_distance, 0))


@triton.jit
def bias_tile(
    position_q, lowest_q, highest_q, position_k, lowest_k, highest_k, buckets_ptr, max_distance, head_table_ptr,
    stride_table,
):  # fmt: skip
    """fp32 `[BLOCK_M, BLOCK_N]`, in units of log 2: `log2(e) * table[bucket(position_k[j] - position_q[i]), head]`.

    A tile far from the diagonal has one bucket: one scalar instead of a look-up for each pair.

    Args:
        position_q, lowest_q, highest_q, position_k, lowest_k, highest_k: from `tile_positions`.
        head_table_ptr: the head's entry of bucket 0 of a table [num_buckets, Hq] of any floating dtype.
        stride_table: elements from a bucket to the next.
    """
    if is_one_bucket(lowest_q, highest_q, lowest_k, highest_k, max_distance):
        bucket = the_one_bucket(highest_q, lowest_k, buckets_ptr, max_distance)
        weight = tl.load(head_table_ptr + bucket * stride_table).to(tl.float32)
        bias = tl.full([position_q.shape[0], position_k.shape[0]], 0.0, tl.float32) + weight
    else:
        bias = near_bias_tile(position_q, position_k, buckets_ptr, max_distance, head_table_ptr, stride_table)
    return bias * LOG2_E


@triton.jit
def near_bias_tile(position_q, position_k, buckets_ptr, max_distance, head_table_ptr, stride_table):
    """fp32 `[BLOCK_M, BLOCK_N]`: `table[bucket(position_k[j] - position_q[i]), head]`, looked up pair by pair."""
    bucket = bucket_tile(position_q, position_k, buckets_ptr, max_distance)
    return tl.load(head_table_ptr + bucket * stride_table).to(tl.float32)


# Dropout


@triton.jit
def keep_tile(seed_ptr, threshold, sequence, head, query, key_start, BLOCK_N: tl.constexpr):
    """bool `[BLOCK_M, BLOCK_N]`: which weights of the keys `key_start ... key_start + BLOCK_N - 1` survive dropout.

    Args:
        key_start: index in the sequence of the tile's first key, a multiple of 4.
        seed_ptr, threshold, sequence, head, query: as in `keep_fours`.
    """
    return keep_fours(seed_ptr, threshold, sequence, head, query, key_start // 4 + tl.arange(0, BLOCK_N // 4))


@triton.jit
def keep_fours(seed_ptr, threshold, sequence, head, query, four_keys):
    """bool `[BLOCK_M, 4 * FOURS]`: which weights survive dropout, the same from every backend.

    Philox4x32-10 with key = the two halves of the seed and counter = (key index >> 2, query index, head, sequence)
    gives the words of four neighbouring keys: key j has word j & 3, and is dropped iff that is below `threshold`.

    Args:
        seed_ptr: int64 [1].
        threshold: `dropout_threshold(p)`, below 2^32.
        sequence: index in the batch, a scalar, or [BLOCK_M, 1] where the tile's rows belong to several sequences.
        head: a scalar.
        query: [BLOCK_M] index in the sequence.
        four_keys: [FOURS], `key index >> 2` of each four neighbouring columns.
    """
    # The counter's parts meet in the rounds: the first two run on a row and a column, not on the whole tile.
    w0, w1, w2, w3 = tl.philox(  # each [BLOCK_M, FOURS]
        tl.load(seed_ptr),
        four_keys[None, :].to(tl.uint32),
        query[:, None].to(tl.uint32),
        head.to(tl.uint32),
        sequence.to(tl.uint32),
    )
    threshold = tl.cast(threshold, tl.uint32)
    # Joined as [BLOCK_M, FOURS, 2, 2], whose last two indices are the high and the low bit of key & 3.
    even = tl.join(w0 >= threshold, w2 >= threshold)
    odd = tl.join(w1 >= threshold, w3 >= threshold)
    return tl.reshape(tl.join(even, odd), (query.shape[0], 4 * four_keys.shape[0]))
