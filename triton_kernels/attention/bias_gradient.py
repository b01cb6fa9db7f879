"""The gradient of the bias table: dS summed over the pairs whose distance is in each bucket.

    dbias_table[b, h] = sum over queries i, keys j with bucket(i, j) = b of dS_hij

The query kernel of the backward adds up its own pairs in registers (`add_to_bucket_sums`) and writes one row of sums,
`bucket_sums [tiles, Hq, num_buckets]`; a second kernel adds up the rows. Every sum has a fixed order: two runs give the
same bits.

A bucket is a range of distances (`distance_ranges`), so a bucket's sum is a difference of two prefix sums:

- without positions the distance of a pair is j - i, and the sums over the diagonals of a tile are enough. Blocks of
  keys follow each other, and so do the distances of their diagonals: those that two blocks share wait for the second;
- with positions that rise, as they do after pruning, a bucket is a range of keys in every row. A search finds its ends.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.triton_kernels.attention.relative_bias import FAR, bucket_tile, entry_of, ranges_of_buckets
from stamp_kernels.triton_kernels.constants import device_constant
from stamp_kernels.triton_kernels.device import launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.rows import ceil_div

# A program of the second kernel: tiles x pairs of a head and a bucket, and how many tiles it adds up, in a few rounds.
# Most batches then take one launch.
_SUM_TILES = 512
_SUM_COLUMNS = 16
_MAX_TILES = 2048

# A tile is added up in strips of 16 rows: after a product, a warp has those in its registers.
STRIP = tl.constexpr(16)

_FAR = tl.constexpr(FAR)
_LOWEST = tl.constexpr(-(2**31))


class BucketSums(NamedTuple):
    """What the query kernel adds up; both None where nobody needs the bias gradient.

    Attributes:
        ptr: fp32 `[num_tiles, Hq, num_buckets]`, a row for each program that has a tile.
        ranges: int32 `[3, num_buckets]`, from `distance_ranges`.
    """

    ptr: Tensor | None
    ranges: Tensor | None


class BucketRanges(NamedTuple):
    """Of each bucket the first and the last distance, and the bucket of the distances before; int32 `[BLOCK_BUCKETS]`.

    Attributes:
        previous: -1 where there is none; the bucket itself if it has no distances.
    """

    first: Tensor
    last: Tensor
    previous: Tensor


class Extent(NamedTuple):
    """The positions of a tile's queries or keys, int32 `[BLOCK]`, and the lowest and the highest of those that exist.

    With positions, those past the sequence's end have the highest.
    """

    position: Tensor
    lowest: int
    highest: int


class PartialSums(NamedTuple):
    """What a query tile has added up after some blocks of keys.

    Attributes:
        buckets: fp32 [STRIPS, BLOCK_BUCKETS], by bucket.
        rotated: fp32 [BLOCK_M, BLOCK_N], the last block, see `_rotated`. The distances that it does not share with the
            block before are not in `buckets`, because the next block may have more of them.
        lowest: int32 [STRIPS], the distance of the first column of `rotated`.
    """

    buckets: Tensor
    rotated: Tensor
    lowest: Tensor


def distance_ranges(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """int32 `[3, num_buckets]`: the BucketRanges of all buckets, from `ranges_of_buckets`.

    As with `distance_buckets`, the first call must not happen while a CUDA graph is captured.
    """

    def make() -> Tensor:
        first, last = ranges_of_buckets(num_buckets, max_distance, bidirectional)
        rising = torch.argsort(first)[: int((first <= last).sum())]
        previous = torch.arange(num_buckets)
        previous[rising] = torch.cat([torch.tensor([-1]), rising[:-1]])
        return torch.stack([first, last, previous]).to(torch.int32)

    return device_constant(("distance_ranges", num_buckets, max_distance, bidirectional), device, make)


# In the query kernel


@triton.jit
def load_bucket_ranges(ranges_ptr, NUM_BUCKETS: tl.constexpr, BLOCK_BUCKETS: tl.constexpr):
    """The BucketRanges; the columns past NUM_BUCKETS are empty ranges."""
    bucket = tl.arange(0, BLOCK_BUCKETS)
    exists = bucket < NUM_BUCKETS
    return BucketRanges(
        first=tl.load(ranges_ptr + bucket, mask=exists, other=_FAR),
        last=tl.load(ranges_ptr + NUM_BUCKETS + bucket, mask=exists, other=-_FAR),
        previous=tl.load(ranges_ptr + 2 * NUM_BUCKETS + bucket, mask=exists, other=-1),
    )


@triton.jit
def no_sums(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_BUCKETS: tl.constexpr):
    """The PartialSums before the first block of keys."""
    STRIPS: tl.constexpr = BLOCK_M // STRIP
    return PartialSums(
        buckets=tl.zeros([STRIPS, BLOCK_BUCKETS], tl.float32),
        rotated=tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
        lowest=tl.zeros([STRIPS], tl.int32),
    )


@triton.jit
def add_to_bucket_sums(sums, d_scores, queries, keys, num_queries, num_keys, ranges, bias):
    """The PartialSums `sums` plus d_scores [BLOCK_M, BLOCK_N], which is 0 where a pair does not exist.

    Four ways: all pairs have one bucket; the distance is j - i; the positions of the keys rise; or they do not, and
    each bucket that the tile may have takes a pass.

    Args:
        queries, keys: TilePositions. Blocks of keys must come in rising order.
        ranges: BucketRanges.
    """
    BLOCK_M: tl.constexpr = d_scores.shape[0]
    BLOCK_N: tl.constexpr = d_scores.shape[1]
    STRIPS: tl.constexpr = sums.buckets.shape[0]
    buckets, rotated, lowest = sums.buckets, sums.rotated, sums.lowest
    of_pair = bucket_tile(bias, queries, keys)
    extent_q = _extent(bias.positions_q, queries, num_queries)
    extent_k = _extent(bias.positions_k, keys, num_keys)
    least, greatest = extent_k.lowest - extent_q.highest, extent_k.highest - extent_q.lowest
    if (least >= bias.max_distance) | (greatest <= -bias.max_distance):
        bucket = tl.load(bias.buckets + entry_of(bias, least))
        buckets = _add_to_bucket(buckets, bucket, d_scores)
    elif bias.positions_q is None and bias.positions_k is None:
        before = rotated
        rotated = _rotated(d_scores)
        # No later block reaches the distances that the block before and this one share.
        shared = tl.where(_is_inside(BLOCK_M, BLOCK_N), before, rotated)
        lowest = keys.start - queries.start - tl.arange(0, STRIPS) * STRIP
        buckets += _sums_over_ranges(_sums_of_strips(shared), lowest - BLOCK_N, ranges)
    else:
        previous = tl.gather(extent_k.position, tl.maximum(tl.arange(0, BLOCK_N) - 1, 0), axis=0)
        if tl.max((previous > extent_k.position).to(tl.int32), axis=0) == 0:
            buckets += _sums_of_rising(d_scores, extent_q, extent_k, ranges)
        else:
            buckets = _add_by_bucket(buckets, d_scores, of_pair, least, greatest, ranges)
    return PartialSums(buckets=buckets, rotated=rotated, lowest=lowest)


@triton.jit
def total_by_bucket(sums, ranges, bias):
    """fp32 [BLOCK_BUCKETS]: the PartialSums after the last block of keys."""
    if bias.positions_q is not None or bias.positions_k is not None:
        return tl.sum(sums.buckets, axis=0)
    BLOCK_M: tl.constexpr = sums.rotated.shape[0]
    BLOCK_N: tl.constexpr = sums.rotated.shape[1]
    last = _sums_of_strips(tl.where(_is_inside(BLOCK_M, BLOCK_N), sums.rotated, 0.0))
    return tl.sum(sums.buckets + _sums_over_ranges(last, sums.lowest, ranges), axis=0)


@triton.jit
def _extent(positions_ptr, tokens, length):
    """The Extent of TilePositions."""
    BLOCK: tl.constexpr = tokens.offset.shape[0]
    if positions_ptr is None:
        highest = tl.minimum(tokens.start + BLOCK, length) - 1
        return Extent(position=tokens.position, lowest=tokens.start + 0, highest=highest)
    else:
        exists = tokens.start + tokens.offset < length
        highest = tl.max(tl.where(exists, tokens.position, _LOWEST), axis=0)
        position = tl.where(exists, tokens.position, highest)
        return Extent(position=position, lowest=tl.min(position, axis=0), highest=highest)


@triton.constexpr_function
def _num_halvings(n: int) -> int:
    """How many steps a bisection of 0, 1, ..., n takes, for a power of two n."""
    return n.bit_length()


@triton.jit
def _sums_of_rising(x, queries, keys, ranges):
    """fp32 [STRIPS, BLOCK_BUCKETS]: the sums of x [BLOCK_M, BLOCK_N] by bucket, where no key's position is below the
    previous key's.

    In row i the keys of a bucket and of those before it are the ones up to position_q[i] + last. So the bucket's sum is
    the prefix sum at the last of them, less that of the previous bucket.

    Args:
        queries, keys: Extents. Positions are taken relative to the lowest, so that no sum of theirs overflows.
    """
    BLOCK_M: tl.constexpr = x.shape[0]
    BLOCK_N: tl.constexpr = x.shape[1]
    BLOCK_BUCKETS: tl.constexpr = ranges.last.shape[0]
    STRIPS: tl.constexpr = BLOCK_M // STRIP
    last = (queries.position - queries.lowest)[:, None] + ranges.last[None, :]  # [BLOCK_M, BLOCK_BUCKETS]
    position = tl.broadcast_to((keys.position - queries.lowest)[None, :], BLOCK_M, BLOCK_N)
    # [BLOCK_M, BLOCK_BUCKETS]: the number of keys up to `last`, by bisection
    num_keys = tl.zeros([BLOCK_M, BLOCK_BUCKETS], tl.int32)
    for halvings in tl.static_range(_num_halvings(BLOCK_N)):
        more = num_keys + max(BLOCK_N >> (halvings + 1), 1)
        is_up_to_last = tl.gather(position, more - 1, axis=1) <= last
        num_keys = tl.where(is_up_to_last, more, num_keys)
    up_to_last = tl.gather(tl.cumsum(x, axis=1), tl.maximum(num_keys - 1, 0), axis=1)
    up_to_last = tl.reshape(tl.where(num_keys == 0, 0.0, up_to_last), (STRIPS, STRIP, BLOCK_BUCKETS))
    sums = tl.sum(up_to_last, axis=1)  # [STRIPS, BLOCK_BUCKETS]
    previous = tl.broadcast_to(ranges.previous[None, :], STRIPS, BLOCK_BUCKETS)
    return sums - tl.where(previous < 0, 0.0, tl.gather(sums, tl.maximum(previous, 0), axis=1))


@triton.jit
def _add_by_bucket(sums, x, buckets, least, greatest, ranges):
    """`sums` [STRIPS, BLOCK_BUCKETS] plus x [BLOCK_M, BLOCK_N], whose pairs have `buckets`: a pass for each bucket."""
    every_bucket = tl.arange(0, sums.shape[1])
    is_possible = (ranges.first <= greatest) & (ranges.last >= least)
    lowest_bucket = tl.min(tl.where(is_possible, every_bucket, sums.shape[1]), axis=0)
    highest_bucket = tl.max(tl.where(is_possible, every_bucket, -1), axis=0)
    for bucket in range(lowest_bucket, highest_bucket + 1):
        sums = _add_to_bucket(sums, bucket, tl.where(buckets == bucket, x, 0.0))
    return sums


@triton.jit
def _add_to_bucket(sums, bucket, x):
    """`sums` [STRIPS, BLOCK_BUCKETS] plus the sum of each strip of x [BLOCK_M, BLOCK_N] in column `bucket`.

    A warp has the 16 rows of a strip in its registers, so no thread waits for a part of another warp.
    """
    strips = tl.reshape(x, (sums.shape[0], x.shape[0] // sums.shape[0] * x.shape[1]))
    every_bucket = tl.arange(0, sums.shape[1])
    return sums + tl.where(every_bucket[None, :] == bucket, tl.sum(strips, axis=1)[:, None], 0.0)


@triton.jit
def _rotated(x):
    """x `[BLOCK_M, BLOCK_N]` with row r of each strip of 16 rows rotated left by r columns: its diagonals are columns.

    Column c of row r has what was in column (c + r) mod BLOCK_N. Where the rotation has carried it around the edge, it
    belongs to the distance of column c - BLOCK_N, which the block before has, too.
    """
    BLOCK_M: tl.constexpr = x.shape[0]
    BLOCK_N: tl.constexpr = x.shape[1]
    source = tl.arange(0, BLOCK_M)[:, None] % STRIP + tl.arange(0, BLOCK_N)[None, :]
    return tl.gather(x, source % BLOCK_N, axis=1)


@triton.jit
def _is_inside(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """bool `[BLOCK_M, BLOCK_N]`: what `_rotated` has not carried around the edge."""
    return tl.arange(0, BLOCK_M)[:, None] % STRIP + tl.arange(0, BLOCK_N)[None, :] < BLOCK_N


@triton.jit
def _sums_of_strips(x):
    """fp32 `[STRIPS, BLOCK_N]`: the sums of x `[BLOCK_M, BLOCK_N]` over the 16 rows of each strip."""
    return tl.sum(tl.reshape(x, (x.shape[0] // STRIP, STRIP, x.shape[1])), axis=1)


@triton.jit
def _sums_over_ranges(sums, lowest, ranges):
    """fp32 `[STRIPS, BLOCK_BUCKETS]`: the sum of sums[s, c] over the c whose distance lowest[s] + c is in the range.

    Args:
        sums: fp32 [STRIPS, BLOCK_N], by distance.
        lowest: int32 [STRIPS], the distance of c = 0.
        ranges: BucketRanges.
    """
    prefix = tl.cumsum(sums, axis=1)
    up_to_last = _prefix_at(prefix, ranges.last[None, :] - lowest[:, None])
    return up_to_last - _prefix_at(prefix, ranges.first[None, :] - 1 - lowest[:, None])


@triton.jit
def _prefix_at(prefix, c):
    """`[STRIPS, BLOCK_BUCKETS]`: prefix[s, c[s, b]], 0 before the first column and the whole sum after the last."""
    inside = tl.minimum(tl.maximum(c, 0), prefix.shape[1] - 1)
    return tl.where(c < 0, 0.0, tl.gather(prefix, inside, axis=1))


# Over all tiles


@triton.jit(do_not_specialize=["num_tiles"])
def stamp_attention_bwd_bias_kernel(
    sums_ptr,  # [ceil(num_tiles / MAX_TILES), num_columns], or its only row as [NUM_BUCKETS, Hq] if IS_LAST
    bucket_sums_ptr,  # fp32 [num_tiles, num_columns], num_columns = Hq * NUM_BUCKETS
    num_tiles,
    num_columns,
    NUM_BUCKETS: tl.constexpr,
    MAX_TILES: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    IS_LAST: tl.constexpr,
):
    """Sums over MAX_TILES tiles of BLOCK_COLUMNS pairs of a head and a bucket, BLOCK_TILES tiles at a time.

    Grid: [ceil(num_tiles / MAX_TILES), ceil(num_columns / BLOCK_COLUMNS)].
    """
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first_tile = tl.program_id(0) * MAX_TILES
    sums = tl.zeros([BLOCK_TILES, BLOCK_COLUMNS], tl.float32)
    for start in range(first_tile, tl.minimum(first_tile + MAX_TILES, num_tiles), BLOCK_TILES):
        tile_index = start + tl.arange(0, BLOCK_TILES)
        exists = (tile_index < num_tiles)[:, None] & (column < num_columns)[None, :]
        row_ptrs = bucket_sums_ptr + tile_index.to(tl.int64)[:, None] * num_columns
        sums += tl.load(row_ptrs + column[None, :], mask=exists, other=0.0)
    if IS_LAST:
        num_heads = num_columns // NUM_BUCKETS
        place = column % NUM_BUCKETS * num_heads + column // NUM_BUCKETS
    else:
        place = tl.program_id(0).to(tl.int64) * num_columns + column
    total = tl.sum(sums, axis=0)  # [BLOCK_COLUMNS]
    tl.store(sums_ptr + place, total.to(sums_ptr.dtype.element_ty), mask=column < num_columns)


def sum_over_tiles(dbias_table: Tensor, bucket_sums: Tensor) -> None:
    """Fill dbias_table `[num_buckets, Hq]`: bucket_sums `[num_tiles, Hq, num_buckets]` summed over the tiles.

    Each launch leaves a row of sums for every _MAX_TILES tiles, until one is left.
    """
    num_tiles, num_heads, num_buckets = bucket_sums.shape
    num_columns = num_heads * num_buckets
    is_last = False
    while not is_last:
        num_rows = max(ceil_div(num_tiles, _MAX_TILES), 1)
        is_last = num_rows == 1
        sums = dbias_table if is_last else bucket_sums.new_empty(num_rows, num_columns)
        launch(
            stamp_attention_bwd_bias_kernel,
            launch_grid(num_rows, ceil_div(num_columns, _SUM_COLUMNS)),
            sums_ptr=sums,
            bucket_sums_ptr=bucket_sums,
            num_tiles=num_tiles,
            num_columns=num_columns,
            NUM_BUCKETS=num_buckets,
            MAX_TILES=_MAX_TILES,
            BLOCK_TILES=_SUM_TILES,
            BLOCK_COLUMNS=_SUM_COLUMNS,
            IS_LAST=is_last,
        )
        bucket_sums, num_tiles = sums, num_rows
