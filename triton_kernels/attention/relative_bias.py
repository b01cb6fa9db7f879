"""T5's relative-position bias on the device: positions, buckets and tiles of bias.

    bias_ij = bias_table[bucket(position_k[j] - position_q[i]), head]

Kernels read the bucket of a distance from a small table, `distance_buckets`. Distances beyond +-max_distance have the
bucket of +-max_distance, so a tile far from the diagonal has only one bucket: a scalar instead of a look-up for each
pair.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.arguments import BiasArguments
from stamp_kernels.relative_position import relative_position_bucket
from stamp_kernels.triton_kernels.constants import device_constant
from stamp_kernels.triton_kernels.rows import LOG2_E, contiguous


class Bias(NamedTuple):
    """Without a bias every pointer is None; the tuple itself is always there.

    Attributes:
        table: `[num_buckets, Hq]`, of any floating dtype.
        buckets: int32 `[2 * max_distance + 1]`, from `distance_buckets`.
        positions_q, positions_k: int32 `[Tq]` and `[Tk]`, original positions; None: a token's index is its position.
    """

    table: Tensor | None
    buckets: Tensor | None
    positions_q: Tensor | None
    positions_k: Tensor | None
    stride_bucket: int
    stride_head: int
    max_distance: int

    @classmethod
    def of(cls, bias: BiasArguments, device: torch.device) -> "Bias":
        table = bias.bias_table
        if table is None:
            return cls(None, None, None, None, 0, 0, 0)
        buckets = distance_buckets(table.shape[0], bias.bias_max_distance, bias.bias_bidirectional, device)
        positions = contiguous(bias.positions_q, bias.positions_k)
        return cls(table, buckets, *positions, *table.stride(), bias.bias_max_distance)


class TilePositions(NamedTuple):
    """Positions of a tile's queries or keys, int32 `[BLOCK]`, and the lowest and the highest of those that exist."""

    position: Tensor
    lowest: int
    highest: int


def distance_buckets(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """int32 `[2 * max_distance + 1]`: entry `d + max_distance` is the bucket of distance d.

    Distances beyond +-max_distance have the bucket of +-max_distance, so kernels clamp. The CPU makes the table by the
    formula itself: a kernel's own logarithm could put a distance into another bucket than Hugging Face's. The first
    call copies it to the device, so it must not happen while a CUDA graph is captured.
    """

    def make() -> Tensor:
        distances = torch.arange(-max_distance, max_distance + 1)
        buckets = relative_position_bucket(
            distances, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
        )
        return buckets.to(torch.int32)

    return device_constant(("distance_buckets", num_buckets, max_distance, bidirectional), device, make)


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
    clamped = tl.minimum(tl.maximum(distance, -bias.max_distance), bias.max_distance)
    return tl.load(bias.buckets + bias.max_distance + clamped)


@triton.jit
def is_one_bucket(bias, queries, keys):
    """Whether all distances of a tile are at or beyond max_distance on one side, from its TilePositions."""
    return (keys.lowest - queries.highest >= bias.max_distance) | (keys.highest - queries.lowest <= -bias.max_distance)


@triton.jit
def the_one_bucket(bias, queries, keys):
    """The bucket of a tile for which `is_one_bucket` holds, a scalar."""
    is_far_after = keys.lowest - queries.highest >= bias.max_distance
    return tl.load(bias.buckets + tl.where(is_far_after, 2 * bias.max_distance, 0))


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
