"""Which kernel and which tile when: pure functions of the device, the shapes and the options.

The choices come from counting registers, shared memory and instructions in what Triton 3.6 compiles. Nothing here was
measured on a GPU. Sequences of recommenders are short: below about 500 tokens in the forward, and about 425 in the
backward, bytes bound attention, not FLOPs. A tile only has to keep in registers what it computes.

The classes of devices in all of them: sm_80, sm_86, sm_89 and sm_120 multiply from registers (`from_registers`), sm_90
reads factors from shared memory, and sm_100 has tensor memory for sums. fp32 is multiplied exactly, without matrix
units; its products are unrolled in registers, so its tiles are small.
"""

import functools
from typing import NamedTuple

import torch

from stamp_kernels.triton_kernels.attention.tiles import padded_head_dim
from stamp_kernels.triton_kernels.device import DeviceProperties
from stamp_kernels.triton_kernels.rows import next_power_of_2


class ForwardConfig(NamedTuple):
    """Tile of queries x keys of a forward kernel, and the launch options.

    Attributes:
        block_m, block_n: the tile; equal in the slots kernel.
        slot: rows of a sequence in the slots kernel, 0 for the general kernel.
        num_warps, num_stages: as Triton has them.
        max_registers: of a thread. If it is None, ptxas may go below what a kernel needs, to reach the next number of
            programs on a multiprocessor (255 to 168 to 128 registers), and spills 8 or 16 bytes for it; 255 prevents
            that.
    """

    block_m: int
    block_n: int
    slot: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


class TileConfig(NamedTuple):
    """A tile of BLOCK_M queries and BLOCK_N keys, and the launch options, as in `ForwardConfig`."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def launch_options(config: ForwardConfig | TileConfig) -> dict[str, int | None]:
    """The keyword arguments of a launch that are Triton's own."""
    return dict(num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers)


# Forward

_MAX_SEQLEN_SLOTS = 32
# Tiles of few queries have 16 or 32 rows: the decoder of a semantic-ID model has as many queries as an item has codes.
_FEW_ROWS = 32
# The most rows and heads of a tile with several heads. Every tile has at least as many rows as heads.
_MAX_ROWS_OF_GROUP = 64
_MAX_HEADS_OF_GROUP = 16


def heads_of_tile(
    gqa_group_size: int, max_seqlen_q: int, max_seqlen_k: int, *, has_bias: bool, has_dropout: bool
) -> int:
    """How many heads of q have their queries in the same tile: all that share a head of k and v, or 1.

    Few queries of one head leave the rows of a tile empty, and every head would read the same keys again. The slots
    kernel has several sequences in a tile instead. The look-ups of a bias, its gradient and the random words of dropout
    are by head, so they come one head at a time.
    """
    rows = next_power_of_2(gqa_group_size) * next_power_of_2(max_seqlen_q)
    if has_bias or has_dropout or max(max_seqlen_q, max_seqlen_k) <= _MAX_SEQLEN_SLOTS:
        return 1
    return gqa_group_size if 0 < gqa_group_size <= _MAX_HEADS_OF_GROUP and rows <= _MAX_ROWS_OF_GROUP else 1


def rows_of_queries(max_seqlen_q: int, heads: int) -> int:
    """The rows that the longest sequence takes in a tile with this many heads."""
    return next_power_of_2(heads) * max_seqlen_q


@functools.lru_cache(maxsize=1024)
def forward_config(
    device: DeviceProperties,
    head_dim: int,
    max_rows_q: int,
    max_seqlen_k: int,
    *,
    element_size: int,
    has_bias: bool,
    has_dropout: bool,
    has_positions: bool,
) -> ForwardConfig:
    """Kernel and tile of the forward.

    A thread of 128 holds BLOCK_M * BLOCK_N / 128 scores and BLOCK_M * BLOCK_D / 128 outputs in fp32 next to the
    operands. Two or more programs should share the 65,536 registers of a multiprocessor, to hide loads: with random
    words beside the look-ups of a bias, 64 x 64 leaves room for three on sm_90, 64 x 32 for four. wgmma takes 64 rows
    per four warps, so no half-precision tile has fewer, except for few rows, which get mma.sync.

    By architecture, for heads of more than 64:

    - from registers: 128 rows on 8 warps, since 64 x 64 spills up to 88 bytes, and 64 x 32 has twice the instructions
      for a pair. With positions and dropout the second stage spills 8 bytes on sm_86, and on sm_80 above 128 features;
      128 x 32 has as many instructions for a pair.
    - sm_90: above 128 features, 128 rows on 8 warps, a warp group for each 64.
    - sm_100: a second stage makes Triton unroll the loop around tcgen05; programs hide each other's loads instead.
      Above 128 features 128 x 32 spills 8 bytes with bias and dropout.

    All tiles fit the 101,376 bytes of shared memory of sm_86 and sm_120; heads of more than 128 need the most, 73,728
    there and 131,200 on sm_90.

    Args:
        max_rows_q: `rows_of_queries` of the longest sequence.
        element_size: bytes of an element of q.
    """
    block_d = padded_head_dim(head_dim)
    half = element_size == 2
    major = device.capability[0]
    from_registers = major in (8, 12)
    has_either, has_both = has_bias or has_dropout, has_bias and has_dropout
    max_registers = 255 if half and (block_d > 64 or (major != 9 and has_either)) else None
    if max(max_rows_q, max_seqlen_k) <= _MAX_SEQLEN_SLOTS:
        slot = 16 if max(max_rows_q, max_seqlen_k) <= 16 else 32
        if half:
            return ForwardConfig(64, 64, slot, 4 if block_d <= 128 else 8, 1, max_registers)
        return ForwardConfig(32, 32, slot, num_warps=4 if block_d <= 64 else 8, num_stages=1)
    if not half:
        block_m = 16 if block_d > 64 or max_rows_q <= 16 else 32
        return ForwardConfig(block_m, 32, 0, num_warps=8, num_stages=1)
    if max_rows_q <= _FEW_ROWS:
        return ForwardConfig(16 if max_rows_q <= 16 else 32, 64, 0, 2 if block_d <= 64 else 4, 2, 255)
    num_stages = 1 if major == 10 else 2
    # Twice the rows halve the reads of keys and values; that pays where a sequence fills the tiles.
    has_many_rows = max_rows_q > 1024 and not has_either
    if block_d <= 64:
        if has_many_rows:
            return ForwardConfig(128, 64, 0, 8, num_stages, max_registers)
        block_n = 32 if major == 9 and has_bias and (has_dropout or has_positions) else 64
        return ForwardConfig(64, block_n, 0, 4, num_stages, max_registers)
    if block_d == 128:
        if from_registers and has_both and has_positions:
            return ForwardConfig(128, 32, 0, 8, 1, max_registers)
        if from_registers or has_many_rows:
            return ForwardConfig(128, 64, 0, 8, num_stages, max_registers)
        return ForwardConfig(64, 64, 0, 4, num_stages, max_registers)
    if from_registers or (major == 10 and has_both):
        return ForwardConfig(64, 32, 0, 8, 1 if from_registers and has_both and has_positions else 2, max_registers)
    return ForwardConfig(128, 32, 0, 8, num_stages, max_registers)


# Backward

# What the key kernel needs for 64 queries and 32 keys of 256 features, as counted in what Triton 3.6 compiles.
_WIDE_KEY_TILE_BYTES = 131072


@functools.lru_cache(maxsize=1024)
def backward_config(
    device: DeviceProperties,
    head_dim: int,
    dtype: torch.dtype,
    max_rows_q: int,
    max_seqlen_k: int,
    *,
    has_bias: bool,
    has_dropout: bool,
    has_positions: bool,
) -> tuple[TileConfig, TileConfig]:
    """(query kernel, key kernel). Of the 255 registers of a thread, with 4 warps on 64 rows of bf16:

    - the query kernel accumulates dQ, head_dim / 2 registers, and holds P and dP, BLOCK_N / 2 each. 64 x 64 fits only
      on sm_90 and without bias or dropout; elsewhere it spills 8 to 150 bytes, so tiles are 64 x 32;
    - the key kernel accumulates dK and dV, head_dim / 2 each, and holds P and dP, BLOCK_M / 2 each: 64 keys and 32
      queries at a time;
    - heads of 72 to 128: sm_90 and sm_100 take 128 keys on 8 warps in the key kernel, a warp group for each 64. The
      query kernel of sm_90 needs 8 warps only where a search for buckets takes the registers of 4 (16 bytes spilled).
      From registers the key kernel has 32 x 32, and so has the query kernel with a bias or dropout: larger tiles spill
      16 to 240 bytes;
    - above 128 shared memory is the limit: 163,840 bytes for 128 queries on sm_90, 98,304 for the 32 queries that every
      device has; with a bias 32 spill 8 to 32 bytes. The key kernel takes 131,072 with 64 queries, so it has 32 queries
      where a block has less: sm_86, sm_89 and sm_120.

    A second stage loads the next block in the meantime. It is useless in a loop of one round, and on sm_100 it costs
    registers, as in the forward; so it does in the query kernel with a bias, whose programs hide each other's loads,
    and from registers in the key kernel with a bias or dropout, where it spills 8 to 40 bytes.

    Where max_rows_q or max_seqlen_k is smaller than a tile the tile shrinks.
    """
    major = device.capability[0]
    from_registers = major in (8, 12)
    has_either, has_search = has_bias or has_dropout, has_bias and has_positions
    num_stages = 1 if major == 10 else 2
    if dtype == torch.float32:
        side = 32 if head_dim <= 128 else 16
        for_queries = for_keys = TileConfig(side, side, 4, 1)
    elif head_dim <= 64:
        block_n = 64 if major == 9 and not has_either else 32
        for_queries = TileConfig(64, block_n, 4, 2 if major == 9 and not has_bias else 1)
        for_keys = TileConfig(32, 64, 4, 1 if from_registers and has_either else num_stages)
        if major == 9:  # three programs on a multiprocessor, not two
            if has_bias and not has_positions:
                for_queries = for_queries._replace(max_registers=168)
            for_keys = for_keys._replace(max_registers=168)
    elif head_dim <= 128:
        if from_registers:
            for_queries = TileConfig(32, 32, 4, 2) if has_either else TileConfig(128, 32, 8, 1)
            for_keys = TileConfig(32, 32, 4, 2)
        else:
            if major == 9 and has_search and max_rows_q <= 64:
                for_queries = TileConfig(32, 32, 4, 2)
            elif major == 10 or has_search:
                for_queries = TileConfig(128, 32, 8, num_stages)
            else:
                for_queries = TileConfig(64, 32, 4, 1)
            # 64 keys on 4 warps spill 8 to 64 bytes with a bias or dropout.
            has_few_keys = major == 9 and has_either and max_seqlen_k <= 64
            for_keys = TileConfig(32, 32, 4, 2) if has_few_keys else TileConfig(32, 128, 8, num_stages)
    else:
        is_plain_sm90 = major == 9 and not has_either
        for_queries = TileConfig(128, 32, 8, 1) if is_plain_sm90 else TileConfig(16 if has_bias else 32, 64, 8, 1)
        for_keys = TileConfig(64 if device.shared_memory >= _WIDE_KEY_TILE_BYTES else 32, 32, 8, 1)

    def shrunk(config: TileConfig, min_block_n: int, loops_over_queries: bool) -> TileConfig:
        block_m = min(config.block_m, max(16, next_power_of_2(max_rows_q)))
        block_n = min(config.block_n, max(16, next_power_of_2(max_seqlen_k)))
        if block_m > 16:
            block_n = max(block_n, min_block_n)
        shrinkage = config.block_m * config.block_n // (block_m * block_n)
        # A warp has at most 64 columns of an accumulator, and at most 4,096 elements of all of them. In a shrunk tile
        # it has at most 16 x 32 pairs; half of them where a search for buckets, dropout or factors take registers too.
        block_d = padded_head_dim(head_dim)
        accumulated = 2 * block_n * block_d if loops_over_queries else block_m * block_d
        num_warps = max(config.num_warps // shrinkage, block_d // 64, min(accumulated // 4096, config.num_warps), 1)
        if shrinkage > 1:
            has_half = has_search or has_dropout or from_registers
            num_warps = max(num_warps, block_m * block_n // (256 if has_half else 512))
        is_one_round = max_rows_q <= block_m if loops_over_queries else max_seqlen_k <= block_n
        max_registers = config.max_registers if shrinkage == 1 else None
        if num_warps < 4 or head_dim > 128 or (major != 9 and (has_either or head_dim > 64)):
            max_registers = 255
        return TileConfig(block_m, block_n, num_warps, 1 if is_one_round else config.num_stages, max_registers)

    # Triton 3.6 fails to compile the gathers of the bias gradient on 32 x 16 and 64 x 16 tiles.
    return (
        shrunk(for_queries, min_block_n=32, loops_over_queries=False),
        shrunk(for_keys, min_block_n=16, loops_over_queries=True),
    )


def has_whole_blocks(device: DeviceProperties, head_dim: int, total_k: int, num_sequences: int) -> bool:
    """Whether the query kernel has a second loop, without masks, for the blocks of keys that all its queries see.

    A round of it takes 8 to 33 % fewer instructions, and both loops 100 to 140 more around them. So it pays where the
    mean sequence has many keys. On sm_120, 128 features spill 16 bytes in it.
    """
    return total_k > 256 * num_sequences and not (device.capability[0] == 12 and head_dim > 64)


# Centrality


@functools.lru_cache(maxsize=1024)
def centrality_config(device: DeviceProperties, head_dim: int, *, element_size: int) -> TileConfig:
    """Tile of the centrality kernel.

    A thread of 128 holds 32 scores and 32 sums of a 64 x 64 tile. The tile of keys and two of queries take 3 * 64 *
    BLOCK_D elements of shared memory, 49,152 bytes at BLOCK_D 128. Heads of more have half of the queries: 64 x 64
    spills 24 to 424 bytes. With a second stage a causal loop spills 40 bytes on sm_100 at BLOCK_D 128, and 8 on sm_120
    where columns are masked at BLOCK_D 128: those have one stage.
    """
    if element_size == 4:
        return TileConfig(32, 32, num_warps=4 if padded_head_dim(head_dim) <= 64 else 8, num_stages=1)
    if head_dim > 128:
        return TileConfig(32, 64, num_warps=4, num_stages=1)
    major = device.capability[0]
    has_one_stage = major == 10 or (major == 12 and 64 < head_dim < 128)
    return TileConfig(64, 64, num_warps=4, num_stages=1 if has_one_stage else 2)
