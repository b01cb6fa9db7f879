"""The gradient of the bias table: dS summed over the pairs whose distance is in each bucket.

    dbias_table[b, h] = sum over queries i, keys j with bucket(i, j) = b of dS_hij

The query kernel of the backward adds up its own pairs in registers (`add_to_bucket_sums`) and writes one row of sums,
`bucket_sums [tiles, Hq, num_buckets]`; a second kernel adds up the rows. Every sum has a fixed order: two runs give the
same bits.

A bucket is a range of distances (`distance_ranges`). Without positions the distance of a pair is j - i, so the sums
over the diagonals of a tile are enough: their prefix sums at the two ends of a range give the bucket's sum.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.triton_kernels.attention.relative_bias import (
    FAR,
    bucket_tile,
    is_one_bucket,
    ranges_of_buckets,
    the_one_bucket,
)
from stamp_kernels.triton_kernels.constants import device_constant
from stamp_kernels.triton_kernels.device import launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.rows import ceil_div

# The second kernel: tiles x buckets in one step.
_SUM_TILES = 128
_SUM_BUCKETS = 8  # 32 bytes, one sector of memory

# A tile is added up in strips of 16 rows: after a product, a warp has those in its registers.
STRIP = tl.constexpr(16)

_FAR = tl.constexpr(FAR)


class BucketSums(NamedTuple):
    """What the query kernel adds up; both None where nobody needs the bias gradient.

    Attributes:
        ptr: fp32 `[num_tiles, Hq, num_buckets]`, a row for each program.
        ranges: int32 `[2, num_buckets]`, from `distance_ranges`.
    """

    ptr: Tensor | None
    ranges: Tensor | None


class BucketRanges(NamedTuple):
    """The first and the last distance of each bucket, int32 `[BLOCK_BUCKETS]`."""

    first: Tensor
    last: Tensor


def distance_ranges(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """int32 `[2, num_buckets]`: the first and the last distance of each bucket, from `ranges_of_buckets`.

    As with `distance_buckets`, the first call must not happen while a CUDA graph is captured.
    """

    def make() -> Tensor:
        return torch.stack(ranges_of_buckets(num_buckets, max_distance, bidirectional)).to(torch.int32)

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
    )


@triton.jit
def add_to_bucket_sums(sums, d_scores, queries, keys, start_q, start_k, ranges, bias):
    """`sums` [STRIPS, BLOCK_BUCKETS] plus the sums of d_scores [BLOCK_M, BLOCK_N] by bucket, strip by strip.

    Three ways: all pairs have one bucket; the distance is j - i; positions, with a pass for each bucket that the tile
    may have.

    Args:
        queries, keys: TilePositions.
        ranges: BucketRanges.
    """
    BLOCK_N: tl.constexpr = d_scores.shape[1]
    STRIPS: tl.constexpr = sums.shape[0]
    BLOCK_BUCKETS: tl.constexpr = sums.shape[1]
    if is_one_bucket(bias, queries, keys):
        sums = _add_to_bucket(sums, the_one_bucket(bias, queries, keys), d_scores)
    elif bias.positions_q is None and bias.positions_k is None:
        by_distance, wrapped = _sums_by_distance(d_scores)
        lowest = start_k - start_q - tl.arange(0, STRIPS) * STRIP
        sums += _sums_over_ranges(by_distance, lowest, ranges)
        sums += _sums_over_ranges(wrapped, lowest - BLOCK_N, ranges)
    else:
        buckets = bucket_tile(bias, queries.position, keys.position)  # [BLOCK_M, BLOCK_N]
        every_bucket = tl.arange(0, BLOCK_BUCKETS)
        possible = (ranges.first <= keys.highest - queries.lowest) & (ranges.last >= keys.lowest - queries.highest)
        lowest_bucket = tl.min(tl.where(possible, every_bucket, BLOCK_BUCKETS), axis=0)
        highest_bucket = tl.max(tl.where(possible, every_bucket, -1), axis=0)
        for bucket in range(lowest_bucket, highest_bucket + 1):
            sums = _add_to_bucket(sums, bucket, tl.where(buckets == bucket, d_scores, 0.0))
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
def _sums_by_distance(x):
    """Sums of x `[BLOCK_M, BLOCK_N]` over the diagonals of each strip s of 16 rows, two times fp32 [STRIPS, BLOCK_N]:

        sums[s, c] = sum over r, j with j - r = c of x[16 s + r, j]
        wrapped[s, c] = sum over r, j with j - r = c - BLOCK_N of x[16 s + r, j]

    Row r is rotated left by r columns: column c then has what was in column (c + r) mod BLOCK_N, so each diagonal is a
    column. `wrapped` has the elements that the rotation carried around the edge.
    """
    BLOCK_M: tl.constexpr = x.shape[0]
    BLOCK_N: tl.constexpr = x.shape[1]
    column = tl.arange(0, BLOCK_N)
    source = tl.arange(0, BLOCK_M)[:, None] % STRIP + column[None, :]  # [BLOCK_M, BLOCK_N]
    rotated = tl.reshape(tl.gather(x, source % BLOCK_N, axis=1), (BLOCK_M // STRIP, STRIP, BLOCK_N))
    is_inside = (tl.arange(0, STRIP)[:, None] + column[None, :] < BLOCK_N)[None, :, :]
    sums = tl.sum(tl.where(is_inside, rotated, 0.0), axis=1)
    wrapped = tl.sum(tl.where(is_inside, 0.0, rotated), axis=1)
    return sums, wrapped


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
    dbias_table_ptr,  # [NUM_BUCKETS, Hq], contiguous, of the table's dtype
    bucket_sums_ptr,  # fp32 [num_tiles, Hq, NUM_BUCKETS]
    num_tiles,
    num_heads,
    NUM_BUCKETS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_BUCKETS: tl.constexpr,
):
    """BLOCK_BUCKETS buckets of one head: `dbias_table[b, h] = sum over tiles of bucket_sums[tile, h, b]`.

    Grid: [ceil(NUM_BUCKETS / BLOCK_BUCKETS) * Hq], heads fastest.
    """
    head = tl.program_id(0) % num_heads
    bucket = tl.program_id(0) // num_heads * BLOCK_BUCKETS + tl.arange(0, BLOCK_BUCKETS)
    sums = tl.zeros([BLOCK_TILES, BLOCK_BUCKETS], tl.float32)
    for start in range(0, num_tiles, BLOCK_TILES):
        tile_index = start + tl.arange(0, BLOCK_TILES)
        exists = (tile_index < num_tiles)[:, None] & (bucket < NUM_BUCKETS)[None, :]
        row = tile_index.to(tl.int64) * num_heads + head
        # [BLOCK_TILES, BLOCK_BUCKETS]
        sums += tl.load(bucket_sums_ptr + row[:, None] * NUM_BUCKETS + bucket[None, :], mask=exists, other=0.0)
    total = tl.sum(sums, axis=0).to(dbias_table_ptr.dtype.element_ty)  # [BLOCK_BUCKETS]
    tl.store(dbias_table_ptr + bucket * num_heads + head, total, mask=bucket < NUM_BUCKETS)


def sum_over_tiles(dbias_table: Tensor, bucket_sums: Tensor) -> None:
    """Fill dbias_table `[num_buckets, Hq]`: bucket_sums `[num_tiles, Hq, num_buckets]` summed over the tiles."""
    num_tiles, num_heads, num_buckets = bucket_sums.shape
    launch(
        stamp_attention_bwd_bias_kernel,
        launch_grid(ceil_div(num_buckets, _SUM_BUCKETS) * num_heads),
        dbias_table_ptr=dbias_table,
        bucket_sums_ptr=bucket_sums,
        num_tiles=num_tiles,
        num_heads=num_heads,
        NUM_BUCKETS=num_buckets,
        BLOCK_TILES=_SUM_TILES,
        BLOCK_BUCKETS=_SUM_BUCKETS,
    )
