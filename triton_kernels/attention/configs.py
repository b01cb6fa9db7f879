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
    """Which kernel runs, and its tile of queries x keys.

    Attributes:
        kernel: "slots", "short" or "general".
        block_m, block_n: the tile; equal in the slots kernel.
        slot: rows of a sequence in the slots kernel, otherwise 0.
        num_warps, num_stages: as Triton has them.
        max_registers: of a thread. If it is None, ptxas may go below what a kernel needs, to reach the next number of
            programs on a multiprocessor (255 to 168 to 128 registers), and spills 8 or 16 bytes for it; 255 prevents
            that.
    """

    kernel: str
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


def _max_seqlen_short(block_d: int, element_size: int) -> int:
    """The longest sequence whose whole rows of scores, 64 at a time, fit the registers next to keys and values."""
    if element_size == 4:
        return 128 if block_d <= 64 else 0
    return {16: 128, 32: 128, 64: 128, 128: 64, 256: 0}[block_d]


@functools.lru_cache(maxsize=1024)
def forward_config(
    device: DeviceProperties,
    head_dim: int,
    max_seqlen: int,
    *,
    element_size: int,
    has_bias: bool,
    has_dropout: bool,
    has_positions: bool,
) -> ForwardConfig:
    """Kernel and tile of the forward.

    A thread of 128 holds BLOCK_M * BLOCK_N / 128 scores and BLOCK_M * BLOCK_D / 128 outputs in fp32 next to the
    operands. Two or more programs should share the 65,536 registers of a multiprocessor, to hide loads. A bias also
    keeps an address and a weight for each score, and dropout four random words for every four: they halve the tile or
    spread it over twice the threads. wgmma takes 64 rows per four warps, so no half-precision tile has fewer.

    By architecture:

    - from registers: heads of 72 to 128 have 128 rows on 8 warps at any length. There 64 x 64 on 4 warps spills 40
      bytes, and 64 x 32 has twice the instructions for a pair (533 a loop, against 547 for four times the pairs). With
      bias and dropout a second stage spills 16 bytes.
    - sm_100: a second stage makes Triton unroll the loop around tcgen05, and registers spill; programs hide each
      other's loads instead. tcgen05 has a thread for each of 128 rows. With bias and dropout 64 rows spill 168 to 192
      bytes and have 4,900 instructions a loop, against 1,433 for 128 x 32. (Heads of more than 128 spill even then: 936
      bytes, down from 3,648.)

    All tiles fit the 101,376 bytes of shared memory of sm_86 and sm_120; heads of more than 128 need the most, 73,728.

    Args:
        max_seqlen: the longer one of max_seqlen_q and max_seqlen_k.
        element_size: bytes of an element of q.
    """
    block_d = padded_head_dim(head_dim)
    half = element_size == 2
    major = device.capability[0]
    from_registers = major in (8, 12)
    has_either, has_both = has_bias or has_dropout, has_bias and has_dropout
    max_registers = 255 if half and major != 9 and (has_either or head_dim > 64) else None
    if max_seqlen <= _MAX_SEQLEN_SLOTS:
        slot = 16 if max_seqlen <= 16 else 32
        if half:
            return ForwardConfig("slots", 64, 64, slot, 4 if block_d <= 128 else 8, 1, max_registers)
        return ForwardConfig("slots", 32, 32, slot, num_warps=4 if block_d <= 64 else 8, num_stages=1)
    if max_seqlen <= _max_seqlen_short(block_d, element_size):
        block_n = max(64, next_power_of_2(max_seqlen))
        if half:
            # 64 x 128 scores with random words do not fit 128 threads, except on sm_100 without a bias. Scores with a
            # bias by positions do not fit on sm_86 and sm_120, where they spill 64 bytes; on sm_80 255 registers
            # suffice.
            has_words = has_both or (has_dropout and major != 10)
            does_not_fit = has_bias and has_positions and from_registers and device.capability != (8, 0)
            num_warps = 8 if has_words or does_not_fit else 4
            return ForwardConfig("short", 64, block_n, 0, num_warps, 1, max_registers)
        return ForwardConfig("short", 16, block_n, 0, num_warps=4, num_stages=1)
    if not half:
        return ForwardConfig("general", 32 if block_d <= 64 else 16, 32, 0, num_warps=8, num_stages=1)
    num_stages = 1 if major == 10 or (from_registers and block_d == 128 and has_both) else 2
    if major == 10 and has_both:
        return ForwardConfig("general", 128, 32, 0, 4, num_stages, max_registers)
    if block_d == 256:
        return ForwardConfig("general", 64, 32, 0, 8, num_stages, max_registers)
    # Heads between 64 and 128 have masked columns: with them 128 x 64 spills 48 bytes on sm_80.
    block_n = 32 if has_either or (from_registers and 64 < head_dim < 128) else 64
    # Twice the rows halve the reads of keys and values; that pays where a sequence fills the tiles.
    has_many_rows = max_seqlen > 1024 or (from_registers and block_d == 128)
    block_m, num_warps = (128, 8) if has_many_rows else (64, 4)
    return ForwardConfig("general", block_m, block_n, 0, num_warps, num_stages, max_registers)


# Backward

# What the key kernel needs for 64 queries and 32 keys of 256 features, as counted in what Triton 3.6 compiles.
_WIDE_KEY_TILE_BYTES = 131072


@functools.lru_cache(maxsize=1024)
def backward_config(
    device: DeviceProperties,
    head_dim: int,
    dtype: torch.dtype,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    has_bias: bool,
    has_dropout: bool,
    has_positions: bool,
) -> tuple[TileConfig, TileConfig]:
    """(query kernel, key kernel). Of the 255 registers of a thread, with 4 warps on 64 rows of bf16:

    - the query kernel accumulates dQ, head_dim / 2 registers, and holds P and dP, BLOCK_N / 2 each. A bias adds buckets
      and the two 64-bit addresses of its look-ups: 64 x 64 at head_dim 64 becomes 64 x 32. So does dropout, except on
      sm_90: elsewhere 64 x 64 spills 72 to 88 bytes;
    - the key kernel accumulates dK and dV, head_dim / 2 each, and holds P and dP, BLOCK_M / 2 each: 64 keys and 32
      queries at a time. From registers it has 32 keys as soon as bias or dropout need registers of their own (64 spill
      32 to 128 bytes), and the query kernel 32 x 32 if there are positions as well (64 x 32 spills 16);
    - heads of 72 to 128 double the warps. From registers, a bias or dropout makes the tile 32 x 32: for queries 128 x
      32 spills 32 to 440 bytes; for keys 64 x 32 with dropout has 1,214 instructions a loop on 8 warps, 32 x 32 has 741
      on 4. On sm_90 up to 64 queries with both have a smaller tile too: their half of 128 x 32 spills 8 to 56 bytes;
    - above 128 shared memory is the limit. The query kernel takes 98,304 bytes, which every device has. The key kernel
      takes 131,072 with 64 queries, so it has 32 queries where a block has less: sm_86, sm_89 and sm_120.

    A second stage loads the next block in the meantime. It is useless in a loop of one round, and on sm_100 it costs
    registers, as in the forward. Where max_seqlen is smaller than a tile the tile shrinks.
    """
    major = device.capability[0]
    from_registers = major in (8, 12)
    has_either, has_both = has_bias or has_dropout, has_bias and has_dropout
    num_stages = 1 if major == 10 else 2
    if dtype == torch.float32:
        side = 32 if head_dim <= 128 else 16
        for_queries = for_keys = TileConfig(side, side, 4, 1)
    elif head_dim <= 64:
        if from_registers and has_both and has_positions:
            for_queries = TileConfig(32, 32, 4, 1)
        elif has_bias or (has_dropout and major != 9):
            for_queries = TileConfig(64, 32, 4, 2 if major == 9 else 1)
        else:
            for_queries = TileConfig(64, 64, 4, 2)
        for_keys = TileConfig(32, 32 if from_registers and has_either else 64, 4, 2)
    elif head_dim <= 128:
        if from_registers and has_either:
            for_queries = TileConfig(32, 32, 4, 2)
        elif major == 9 and has_both and max_seqlen_q <= 64:
            for_queries = TileConfig(32, 32, 4, 2) if has_positions else TileConfig(64, 32, 4, 1)
        else:
            for_queries = TileConfig(128, 32, 8, num_stages)
        for_keys = TileConfig(32, 32, 4, 2) if from_registers and has_dropout else TileConfig(32, 64, 8, num_stages)
    else:
        for_queries = TileConfig(32, 64, 8, 1)
        for_keys = TileConfig(64 if device.shared_memory >= _WIDE_KEY_TILE_BYTES else 32, 32, 8, 1)

    def shrunk(config: TileConfig, min_block_n: int, loops_over_queries: bool) -> TileConfig:
        block_m = min(config.block_m, max(16, next_power_of_2(max_seqlen_q)))
        block_n = min(config.block_n, max(16, next_power_of_2(max_seqlen_k)))
        if block_m > 16:
            block_n = max(block_n, min_block_n)
        shrinkage = config.block_m * config.block_n // (block_m * block_n)
        # A warp has at most 64 columns of an accumulator, and at most 16 x 32 pairs of a shrunk tile with random words.
        num_warps = max(config.num_warps // shrinkage, padded_head_dim(head_dim) // 64, 1)
        if shrinkage > 1 and has_dropout:
            num_warps = max(num_warps, block_m * block_n // 512)
        is_one_round = max_seqlen_q <= block_m if loops_over_queries else max_seqlen_k <= block_n
        max_registers = 255 if num_warps < 4 or head_dim > 128 or (major != 9 and has_either) else None
        return TileConfig(block_m, block_n, num_warps, 1 if is_one_round else config.num_stages, max_registers)

    # Triton 3.6 fails to compile the gathers of the bias gradient on 32 x 16 and 64 x 16 tiles.
    return (
        shrunk(for_queries, min_block_n=32, loops_over_queries=False),
        shrunk(for_keys, min_block_n=16, loops_over_queries=True),
    )


# Centrality


@functools.lru_cache(maxsize=1024)
def centrality_config(device: DeviceProperties, head_dim: int, *, element_size: int, has_bias: bool) -> TileConfig:
    """Tile of the centrality kernel.

    A thread of 128 holds 32 scores and 32 sums of a 64 x 64 tile, and with a bias an address and a weight for each
    score. The tile of keys and two of queries take 3 * 64 * BLOCK_D elements of shared memory, at most 98,304 bytes,
    which every device has. With a second stage a causal loop spills 40 bytes on sm_100 at BLOCK_D 128, 8 on sm_120
    where columns are masked at BLOCK_D 128, and 24 to 112 on sm_86 and sm_120 at BLOCK_D 256: those have one stage.
    """
    if element_size == 4:
        return TileConfig(32, 32, num_warps=4 if padded_head_dim(head_dim) <= 64 else 8, num_stages=1)
    major = device.capability[0]
    has_one_stage = major == 10 or (major == 12 and 64 < head_dim < 128) or (major != 9 and head_dim > 128)
    return TileConfig(64, 32 if has_bias else 64, num_warps=4, num_stages=1 if has_one_stage else 2)
