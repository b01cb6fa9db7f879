"""T5's relative-position bias on the device: positions, buckets and tiles of bias.

    bias_ij = bias_table[bucket(position_k[j] - position_q[i]), head]

Kernels read the bucket of a distance from a small table, `distance_buckets`. Distances beyond +-max_distance have the
bucket of +-max_distance, so a tile far from the diagonal has only one bucket: a scalar instead of a look-up for each
pair. A table by distance grows with max_distance: above MAX_TABLE_DISTANCE (positions may be times in seconds) kernels
search the ranges of the buckets instead, in log2(num_buckets) steps.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.arguments import BiasArguments
from stamp_kernels.relative_position import relative_position_bucket
from stamp_kernels.triton_kernels.constants import device_constant
from stamp_kernels.triton_kernels.rows import LOG2_E, contiguous

# The largest max_distance with a table by distance, which then takes 512 KB.
MAX_TABLE_DISTANCE = 2**16

# Farther than any two tokens.
FAR = 2**30


class Bias(NamedTuple):
    """Without a bias every pointer is None; the tuple itself is always there.

    Attributes:
        table: `[num_buckets, Hq]`, of any floating dtype.
        buckets: from `distance_buckets`, int32 `[2 * max_distance + 1]` or `[2, num_ranges]`.
        num_ranges: None where `buckets` is a table by distance.
        max_distance: at most FAR.
        positions_q, positions_k: int32 `[Tq]` and `[Tk]`, original positions; None: a token's index is its position.
    """

    table: Tensor | None
    buckets: Tensor | None
    positions_q: Tensor | None
    positions_k: Tensor | None
    stride_bucket: int
    stride_head: int
    max_distance: int
    num_ranges: int | None

    @classmethod
    def of(cls, bias: BiasArguments, device: torch.device) -> "Bias":
        table = bias.bias_table
        if table is None:
            return cls(None, None, None, None, 0, 0, 0, None)
        buckets = distance_buckets(table.shape[0], bias.bias_max_distance, bias.bias_bidirectional, device)
        num_ranges = None if buckets.dim() == 1 else buckets.shape[1]
        positions = contiguous(bias.positions_q, bias.positions_k)
        return cls(table, buckets, *positions, *table.stride(), min(bias.bias_max_distance, FAR), num_ranges)


class TilePositions(NamedTuple):
    """Positions of a tile's queries or keys, int32 `[BLOCK]`, and the lowest and the highest of those that exist."""

    position: Tensor
    lowest: int
    highest: int


def distance_buckets(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """The buckets of all distances, on the device.

    The CPU makes them by the formula itself: a kernel's own logarithm could put a distance into another bucket than
    Hugging Face's. The first call copies them to the device, so it must not happen while a CUDA graph is captured.

    Returns:
        Up to MAX_TABLE_DISTANCE int32 `[2 * max_distance + 1]`: entry `d + max_distance` is the bucket of distance d.
        Distances beyond +-max_distance have the bucket of +-max_distance, so kernels clamp. Above, int32
        `[2, num_ranges]`: the first distance of each range that has one bucket, in rising order, and that bucket.
        num_ranges is a power of two; the ranges that fill it up begin after every distance.
    """

    def make_table() -> Tensor:
        distances = torch.arange(-max_distance, max_distance + 1)
        buckets = relative_position_bucket(
            distances, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
        )
        return buckets.to(torch.int32)

    def make_ranges() -> Tensor:
        first, last = ranges_of_buckets(num_buckets, max_distance, bidirectional)
        buckets = torch.argsort(first)[: int((first <= last).sum())]
        num_filled = triton.next_power_of_2(len(buckets)) - len(buckets)
        begins = F.pad(first[buckets], (0, num_filled), value=2 * FAR - 1)
        return torch.stack([begins, F.pad(buckets, (0, num_filled), value=int(buckets[-1]))]).to(torch.int32)

    make = make_table if max_distance <= MAX_TABLE_DISTANCE else make_ranges
    return device_constant(("distance_buckets", num_buckets, max_distance, bidirectional), device, make)


def ranges_of_buckets(num_buckets: int, max_distance: int, bidirectional: bool) -> tuple[Tensor, Tensor]:
    """(first, last), int64 `[num_buckets]` on the CPU: the distances of each bucket, up to +-FAR.

    Buckets are ranges: all distances between the two have the same bucket. The range of a bucket without distances
    (bidirectional biases have one) begins after FAR and ends before it.
    """
    of_one_direction = num_buckets // 2 if bidirectional else num_buckets
    bucket = torch.arange(of_one_direction)
    # The least distance to an earlier key in this bucket or a later one, by bisection; FAR + 1 where there is none
    reached, low = torch.full_like(bucket, FAR + 1), torch.zeros_like(bucket)
    while bool((low < reached).any()):
        middle = (low + reached) // 2
        bucket_of_middle = relative_position_bucket(
            -middle, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
        )
        is_reached = (bucket_of_middle >= bucket) | (middle > FAR)
        reached, low = torch.where(is_reached, middle, reached), torch.where(is_reached, low, middle + 1)
    until = torch.cat([reached[1:] - 1, torch.tensor([FAR])])
    if bidirectional:
        first, last = torch.cat([-until, reached.clamp(min=1)]), torch.cat([-reached, until])
    else:
        first, last = -until, torch.where(bucket == 0, FAR, -reached)
    is_empty = first > last
    return first.masked_fill(is_empty, FAR + 1), last.masked_fill(is_empty, FAR)


# Positions


@triton.jit
def load_positions(positions_ptr, first, index, length):
    """int32 `[BLOCK]`: positions of the tokens `index`; what it says past `length` has no meaning."""
    if positions_ptr is not None:
        return tl.load(positions_ptr + first + index, mask=index < length, other=0)
    else:
        return index


@triton.jit
def tile_positions(positions_ptr, first, start, length, BLOCK: tl.constexpr):
    """The TilePositions of the tokens `start ... start + BLOCK - 1`.

    Past the sequence's end the last token's position is repeated, so that lowest and highest are those of tokens that
    exist. `start` must be below `length`.
    """
    index = tl.minimum(start + tl.arange(0, BLOCK), length - 1)
    if positions_ptr is not None:
        position = tl.load(positions_ptr + first + index)  # [BLOCK]
        return TilePositions(position=position, lowest=tl.min(position, axis=0), highest=tl.max(position, axis=0))
    else:
        return TilePositions(position=index, lowest=start, highest=tl.minimum(start + BLOCK, length) - 1)


# Buckets


@triton.jit
def bucket_tile(bias, position_q, position_k):
    """int32 `[BLOCK_M, BLOCK_N]`: the bucket of `position_k[j] - position_q[i]`."""
    distance = position_k[None, :] - position_q[:, None]
    if bias.num_ranges is None:
        clamped = tl.minimum(tl.maximum(distance, -bias.max_distance), bias.max_distance)
        return tl.load(bias.buckets + bias.max_distance + clamped)
    else:
        return _searched_buckets(bias, distance)


@triton.jit
def _searched_buckets(bias, distance):
    """int32, in the shape of `distance`: the bucket of the last range that does not begin after it."""
    index = tl.zeros_like(distance)
    step = bias.num_ranges // 2
    while step > 0:
        begins = tl.load(bias.buckets + index + step)
        index = tl.where(begins <= distance, index + step, index)
        step = step // 2
    return tl.load(bias.buckets + bias.num_ranges + index)


@triton.jit
def is_one_bucket(bias, queries, keys):
    """Whether all distances of a tile are at or beyond max_distance on one side, from its TilePositions."""
    return (keys.lowest - queries.highest >= bias.max_distance) | (keys.highest - queries.lowest <= -bias.max_distance)


@triton.jit
def the_one_bucket(bias, queries, keys):
    """The bucket of a tile for which `is_one_bucket` holds, a scalar."""
    is_far_after = keys.lowest - queries.highest >= bias.max_distance
    if bias.num_ranges is None:
        return tl.load(bias.buckets + tl.where(is_far_after, 2 * bias.max_distance, 0))
    else:
        return tl.load(bias.buckets + bias.num_ranges + tl.where(is_far_after, bias.num_ranges - 1, 0))


# Tiles of bias


@triton.jit
def bias_tile(bias, head, queries, keys):
    """fp32 `[BLOCK_M, BLOCK_N]`: the bias of a tile in units of log 2, from the TilePositions of its tokens."""
    if is_one_bucket(bias, queries, keys):
        bucket = the_one_bucket(bias, queries, keys)
        weight = tl.load(bias.table + head * bias.stride_head + bucket * bias.stride_bucket).to(tl.float32)
        tile = tl.full([queries.position.shape[0], keys.position.shape[0]], 0.0, tl.float32) + weight
    else:
        tile = _looked_up_tile(bias, head, queries.position, keys.position)
    return tile * LOG2_E


@triton.jit
def near_bias_tile(bias, head, position_q, position_k):
    """`bias_tile` for tiles near the diagonal: always by a look-up for each pair."""
    return LOG2_E * _looked_up_tile(bias, head, position_q, position_k)


@triton.jit
def _looked_up_tile(bias, head, position_q, position_k):
    """fp32 `[BLOCK_M, BLOCK_N]`: `bias_table[bucket(position_k[j] - position_q[i]), head]`."""
    bucket = bucket_tile(bias, position_q, position_k)
    return tl.load(bias.table + head * bias.stride_head + bucket * bias.stride_bucket).to(tl.float32)
