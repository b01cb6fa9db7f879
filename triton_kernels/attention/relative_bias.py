"""T5's relative-position bias on the device: positions, buckets and tiles of bias.

    bias_ij = bias_table[bucket(position_k[j] - position_q[i]), head]

A small kernel writes down the weight of every distance once per call, in fp32 and in units of log 2, a row for each
head. The attention kernels then take one look-up for each pair. Distances beyond +-max_distance have the bucket of
+-max_distance, so the rows end a little after it. A row grows with max_distance: above MAX_TABLE_DISTANCE (positions
may be times in seconds) it has the weights of the ranges of distances that share a bucket, and kernels search the range
in log2(num_ranges) steps.
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
from stamp_kernels.triton_kernels.device import launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.rows import INTERPRETED, LOG2_E, ceil_div, contiguous

# The largest max_distance with a row by distance, which then takes 512 KB for each head.
MAX_TABLE_DISTANCE = 2**16

# Rows by distance go so far beyond max_distance: tiles have at most 128 queries and 128 keys, and a tile whose first
# pair is farther than max_distance + 128 reads the weights of that distance.
_MARGIN = 256
MARGIN = tl.constexpr(_MARGIN)

# Farther than any two tokens.
FAR = 2**30

_WEIGHTS_BLOCK = 1024


class Bias(NamedTuple):
    """Without a bias every pointer is None; the tuple itself is always there.

    Attributes:
        weights: fp32 `[Hq, num_entries]`, in units of log 2. By distance: entry `d + max_distance + MARGIN` is the
            weight of distance d. By range: entry r is the weight of range r.
        buckets: int32 `[num_entries]`, from `distance_buckets`.
        begins: int32 `[num_entries]`, the first distance of each range, or None where entries are by distance.
        positions_q, positions_k: int32 `[Tq]` and `[Tk]`, original positions; None: a token's index is its position.
        max_distance: at most FAR.
    """

    weights: Tensor | None
    buckets: Tensor | None
    begins: Tensor | None
    positions_q: Tensor | None
    positions_k: Tensor | None
    num_entries: int
    max_distance: int

    @classmethod
    def of(cls, bias: BiasArguments, device: torch.device) -> "Bias":
        table = bias.bias_table
        if table is None:
            return cls(None, None, None, None, None, 0, 0)
        entries = distance_buckets(table.shape[0], bias.bias_max_distance, bias.bias_bidirectional, device)
        begins, buckets = (None, entries) if entries.dim() == 1 else (entries[0], entries[1])
        num_entries, num_heads = buckets.shape[0], table.shape[1]
        weights = torch.empty(num_heads, num_entries, dtype=torch.float32, device=device)
        launch(
            stamp_attention_bias_kernel,
            launch_grid(ceil_div(num_entries, _WEIGHTS_BLOCK), num_heads),
            weights_ptr=weights,
            bias_table_ptr=table,
            buckets_ptr=buckets,
            stride_bucket=table.stride(0),
            stride_head=table.stride(1),
            num_entries=num_entries,
            BLOCK=_WEIGHTS_BLOCK,
        )
        positions = contiguous(bias.positions_q, bias.positions_k)
        return cls(weights, buckets, begins, *positions, num_entries, min(bias.bias_max_distance, FAR))


class TilePositions(NamedTuple):
    """The tokens of a tile's queries or keys, `start + offset` in their sequence.

    Attributes:
        start: index of the first token.
        offset: int32 `[BLOCK]`.
        position: int32 `[BLOCK]`; the index where there are no positions.
    """

    start: int
    offset: Tensor
    position: Tensor


def distance_buckets(num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device) -> Tensor:
    """The buckets of all distances, on the device.

    The CPU makes them by the formula itself: a kernel's own logarithm could put a distance into another bucket than
    Hugging Face's. The first call copies them to the device, so it must not happen while a CUDA graph is captured.

    Returns:
        Up to MAX_TABLE_DISTANCE int32 `[2 * radius + 1]`, radius = max_distance + MARGIN: entry `d + radius` is the
        bucket of distance d. Above, int32 `[2, num_ranges]`: the first distance of each range that has one bucket, in
        rising order, and that bucket. num_ranges is a power of two; the ranges that fill it up begin after every
        distance.
    """

    def make_table() -> Tensor:
        distances = torch.arange(-max_distance - _MARGIN, max_distance + _MARGIN + 1)
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


# The weights


@triton.jit
def stamp_attention_bias_kernel(
    weights_ptr,  # fp32 [Hq, num_entries]
    bias_table_ptr,  # [num_buckets, Hq], of any floating dtype
    buckets_ptr,  # int32 [num_entries]
    stride_bucket,
    stride_head,
    num_entries,
    BLOCK: tl.constexpr,
):
    """BLOCK entries of one head: `weights[h, e] = log2(e) bias_table[buckets[e], h]`.

    Grid: [ceil(num_entries / BLOCK), Hq].
    """
    head = tl.program_id(1)
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = entry < num_entries
    bucket = tl.load(buckets_ptr + entry, mask=exists, other=0)
    weight = tl.load(bias_table_ptr + head * stride_head + bucket * stride_bucket, mask=exists, other=0.0)
    tl.store(weights_ptr + head * num_entries + entry, weight.to(tl.float32) * LOG2_E, mask=exists)


# Positions


@triton.jit
def tile_positions(positions_ptr, first, start, offset, length):
    """The TilePositions of the tokens `start + offset`, [BLOCK], of a sequence; past its end they have no meaning.

    Args:
        first: packed row of the sequence's first token. It and `length` are scalars, or [BLOCK] in the slots kernel.
    """
    position = start + offset
    if positions_ptr is not None:
        position = tl.load(positions_ptr + first + position, mask=position < length, other=0)
    return TilePositions(start=start, offset=offset, position=position)


# Tiles of bias


@triton.jit
def bias_tile(bias, head, queries, keys, BY_KEYS: tl.constexpr = False):
    """fp32 `[BLOCK_M, BLOCK_N]`: the bias of a tile in units of log 2; `[BLOCK_N, BLOCK_M]` if BY_KEYS.

    Where indices are positions, the distance of a pair is that of the tile's first pair plus the difference of two
    offsets. So addresses differ by constants, and the distance is limited once for the whole tile.

    Args:
        queries, keys: TilePositions.
    """
    of_head_ptr = bias.weights + head * bias.num_entries
    if bias.begins is None and bias.positions_q is None and bias.positions_k is None:
        BLOCK_M: tl.constexpr = queries.offset.shape[0]
        BLOCK_N: tl.constexpr = keys.offset.shape[0]
        distance = tl.maximum(keys.start - queries.start, -bias.max_distance - BLOCK_N)
        distance = tl.minimum(distance, bias.max_distance + BLOCK_M)
        first_pair_ptr = of_head_ptr + (bias.max_distance + MARGIN) + distance
        offset_q, offset_k = queries.offset.to(tl.int64), keys.offset.to(tl.int64)
        if BY_KEYS:
            return _load_each((first_pair_ptr + offset_k)[:, None] - offset_q[None, :])
        else:
            return _load_each((first_pair_ptr - offset_q)[:, None] + offset_k[None, :])
    elif BY_KEYS:
        distance = keys.position[:, None] - queries.position[None, :]
        return _load_each(of_head_ptr + entry_of(bias, distance))
    else:
        distance = keys.position[None, :] - queries.position[:, None]
        return _load_each(of_head_ptr + entry_of(bias, distance))


@triton.jit
def entry_of(bias, distance):
    """int32, in the shape of `distance`: its entry in `weights` and `buckets`."""
    if bias.begins is None:
        nearest = tl.minimum(tl.maximum(distance, -bias.max_distance), bias.max_distance)
        return nearest + (bias.max_distance + MARGIN)
    else:  # the last range that does not begin after it
        entry = tl.zeros_like(distance)
        step = bias.num_entries // 2
        while step > 0:
            begins = tl.load(bias.begins + entry + step)
            entry = tl.where(begins <= distance, entry + step, entry)
            step = step // 2
        return entry


@triton.jit
def bucket_tile(bias, queries, keys):
    """int32 `[BLOCK_M, BLOCK_N]`: the buckets of a tile, from its TilePositions."""
    distance = keys.position[None, :] - queries.position[:, None]
    return tl.load(bias.buckets + entry_of(bias, distance))


@triton.jit
def _load_each(pointers):
    """fp32: what `pointers` point at, each loaded by the thread that adds it to a score.

    An ordinary load would be moved to a layout in which neighbouring threads have neighbouring columns. There the whole
    tile of scores would have to follow, through shared memory, and the softmax would be computed in both layouts.
    Nothing writes to the tensor while the kernel runs.
    """
    if INTERPRETED:
        return tl.load(pointers)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [pointers.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
        )
