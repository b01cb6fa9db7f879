"""Which tile the cross-entropy kernels have when, and how their work is split: pure functions of sizes and devices.

The tiles are counted for registers and shared memory and have not been measured, except where a comment says what the
compiler or a GPU showed. fp32 products are exact and use no matrix units: they are unrolled in registers, so the tiles
of fp32 are small.
"""

import functools
from typing import NamedTuple

from stamp_kernels.triton_kernels.cross_entropy.tiles import Tile
from stamp_kernels.triton_kernels.device import DeviceProperties
from stamp_kernels.triton_kernels.rows import ceil_div, next_power_of_2

# Classes of one split of the forward, which a program passes over one tile after the other. Few rows are then still
# many programs, and the three numbers a row that a split leaves behind are nothing beside a pass over 4,096 classes. It
# depends on nothing else, so a row has the same bits alone or in a batch.
CLASSES_PER_SPLIT = 4096

# Fewer tiles of a gradient's sum than this are not worth the traffic of adding up splits.
MIN_TILES_PER_SPLIT = 4

# Below this number of logits launches are all that counts, and the chunked way has more of them.
MIN_LOGITS_IN_CHUNKS = 2**20

# Row chunks. Each one reads and writes the fp32 gradient of the weight once, 8 V D bytes beside its 6 R V D FLOPs:
# counted for an H100, a third of the time of the products for R = 1,000 rows and a sixth for 2,048. So a chunk has at
# least 2,048 rows, if they fit 1 GiB: in 16 bits those of 262,144 classes do, the largest vocabularies of language
# models. It has more, up to an eighth of all rows, as long as their logits fit 320 MiB.
MIN_CHUNKS, MIN_CHUNK_ROWS = 8, 2048
CHUNK_BYTES, MAX_CHUNK_BYTES = 320 * 2**20, 2**30

# What a kernel has in shared memory beside its tiles: sums over rows, and layouts that are exchanged.
_OTHER_SHARED_MEMORY = 3072


class ForwardConfig(NamedTuple):
    """A tile of rows x classes, and the features that are in place at a time."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int

    @property
    def tile(self) -> Tile:
        # Target logits need 64 features at a time at most.
        return Tile(self.block_n, self.block_v, self.block_d, block_k=min(self.block_d, 64))


class GradientConfig(NamedTuple):
    """A tile of rows x classes, the features of a gradient that a program has, and those of a product at a time."""

    block_n: int
    block_v: int
    block_d: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def tile(self) -> Tile:
        return Tile(self.block_n, self.block_v, self.block_d, self.block_k)


class ChunkConfig(NamedTuple):
    """The classes of a row that the chunk kernel has in registers at a time."""

    block: int
    num_warps: int


def has_asynchronous_products(properties: DeviceProperties) -> bool:
    """Whether products are wgmma or tcgen05, which read their factors from shared memory, rather than mma.sync."""
    return properties.capability[0] in (9, 10)


def stages_that_fit(properties: DeviceProperties, max_stages: int, resident: int, per_stage: int) -> int:
    """As many stages as a block has shared memory for, `max_stages` at most.

    Counted as the compiler was seen to allocate: the resident bytes, and a buffer for each stage. mma.sync needs one
    buffer less, since its factors are in registers when the next ones arrive.

    Args:
        resident: bytes that stay in shared memory.
        per_stage: bytes that an iteration of the loop loads.
    """
    free = properties.shared_memory - _OTHER_SHARED_MEMORY - resident
    buffers = free // per_stage
    return max(1, min(max_stages, buffers if has_asynchronous_products(properties) else buffers + 1))


@functools.lru_cache(maxsize=1024)
def forward_config(properties: DeviceProperties, width: int, *, element_size: int) -> ForwardConfig:
    """A thread of 256 holds 64 logits of a 128 x 128 tile.

    Shared memory holds the rows and the tiles of classes: 128 KB at width 128 on an H100, and 98 KB with mma.sync, of
    the 99 KB that an A10 or an RTX 4090 has.
    """
    block_d = max(16, next_power_of_2(width))
    if element_size == 4:
        return ForwardConfig(32, 32, min(block_d, 64), num_warps=4, num_stages=2)
    block_n = 128
    if block_d > 256:
        # With mma.sync, whose factors and addresses take registers, blocks of 64 features spilled on sm_80 and sm_86.
        block_d, max_stages = (64, 3) if has_asynchronous_products(properties) else (32, 4)
        block_v = 128
        resident, per_stage = 0, (block_n + block_v) * block_d
    else:
        # On sm_120, four targets a row and 64 classes of 256 features spilled.
        block_v = 128 if block_d <= 128 else 32 if properties.capability[0] == 12 else 64
        max_stages = 3 if block_d <= 128 else 2
        resident, per_stage = block_n * block_d, block_v * block_d
    num_stages = stages_that_fit(properties, max_stages, resident * element_size, per_stage * element_size)
    return ForwardConfig(block_n, block_v, block_d, num_warps=8, num_stages=num_stages)


@functools.lru_cache(maxsize=1024)
def hidden_gradient_config(
    properties: DeviceProperties, width: int, *, element_size: int, has_one_softmax: bool
) -> GradientConfig:
    """A thread of 256 holds 64 sums of a 128 x 128 gradient and 32 logits; half of both with mma.sync.

    Above width 128 it holds 128 sums with wgmma: 128 rows x 256 features take 315 instructions a 64 classes, where 64
    rows, which both warp groups computed, took 358.

    The factors and addresses of mma.sync take registers. Choices that name an architecture avoid spills that the
    compiler showed there, or repeated work: see `warps_for_rows`.

    Args:
        has_one_softmax: whether only one softmax passes over the hidden states of a row.
    """
    block_d = max(16, next_power_of_2(width))
    architecture = properties.capability[0]
    if element_size == 4:
        config = GradientConfig(32, 32, min(block_d, 64), min(block_d, 64), num_warps=4, num_stages=1)
    elif block_d > 256:
        block_n = 128 if architecture == 9 else 64
        config = GradientConfig(block_n, 64, 256, 128 if architecture == 10 else 64, num_warps=8, num_stages=2)
    elif block_d > 128:
        block_n = 128 if architecture == 9 else 64
        block_v = 32 if architecture == 10 and not has_one_softmax else 64
        config = GradientConfig(block_n, block_v, 256, 64, num_warps=8, num_stages=2)
    else:
        block_n = 128 if has_asynchronous_products(properties) else 64
        num_stages = 2 if architecture == 12 else 3
        num_warps = warps_for_rows(properties, block_n, block_d)
        config = GradientConfig(block_n, 64, block_d, min(block_d, 64), num_warps, num_stages)
    return _with_stages_that_fit(properties, config, width, element_size, in_place=config.block_n)


@functools.lru_cache(maxsize=1024)
def weight_gradient_config(
    properties: DeviceProperties, width: int, *, element_size: int, has_bias: bool, has_ranges: bool
) -> GradientConfig:
    """Four warps are one warp group of an H100, and three such blocks share a processor.

    Choices that name an architecture avoid spills that the compiler showed there, or repeated work: see
    `warps_for_rows`. The sums of the bias are a tile of logits. Beside 256 features of a gradient there are registers
    for half of such a tile with wgmma, and for a whole one with mma.sync if no tile is on its way. The range of the
    classes takes registers too.

    Args:
        has_bias: whether the bias gets a gradient too.
        has_ranges: whether the classes of a softmax are not all classes of its weight.
    """
    block_d = max(16, next_power_of_2(width))
    architecture = properties.capability[0]
    if element_size == 4:
        config = GradientConfig(32, 32, min(block_d, 64), min(block_d, 64), num_warps=4, num_stages=1)
    elif block_d > 128:
        block_v = 128 if architecture == 9 else 64
        block_n = 32 if architecture == 9 and (has_bias or has_ranges) else 64
        has_one_stage = architecture == 10 or (has_bias and (architecture != 9 or block_d > 256))
        config = GradientConfig(block_n, block_v, 256, 64, num_warps=8, num_stages=1 if has_one_stage else 2)
    else:
        num_stages = 2 if architecture == 10 else 3
        num_warps = warps_for_rows(properties, 64, block_d)
        config = GradientConfig(64, 64, block_d, min(block_d, 64), num_warps, num_stages)
    return _with_stages_that_fit(properties, config, width, element_size, in_place=config.block_v)


def warps_for_rows(properties: DeviceProperties, rows: int, block_d: int) -> int:
    """The warps of a gradient of `rows` x `block_d`: as many as 8, but no two that compute the same rows.

    A warp computes 16 rows of a product. Where another product follows, as after the logits, the compiler gives a warp
    all columns of these rows: always with wgmma, and with mma.sync if the gradient is not wider than high. It divides
    the columns of a wider one among the warps. With tcgen05 one thread issues the products for all.
    """
    architecture = properties.capability[0]
    divides_rows = architecture == 9 or (architecture != 10 and block_d <= rows)
    return min(8, rows // 16) if divides_rows else 8


def _with_stages_that_fit(
    properties: DeviceProperties, config: GradientConfig, width: int, element_size: int, in_place: int
) -> GradientConfig:
    """The config with as many of its stages as a block has shared memory for.

    Args:
        in_place: the rows or classes that stay while the others pass by.
    """
    block_n, block_v, block_d, block_k, _, max_stages = config
    passing = block_n + block_v - in_place
    # dz, and what stays
    resident, per_stage = block_n * block_v, passing * block_d
    if width <= block_d:
        resident += in_place * block_d
    else:
        per_stage += (block_n + block_v) * block_k
    num_stages = stages_that_fit(properties, max_stages, resident * element_size, per_stage * element_size)
    return config._replace(num_stages=num_stages)


def num_splits(num_programs: int, num_tiles: int, properties: DeviceProperties) -> int:
    """Splits of a gradient's sum over `num_tiles` tiles: as many as give each processor two programs."""
    wanted = 2 * properties.num_processors // max(num_programs, 1)
    return max(1, min(wanted, num_tiles // MIN_TILES_PER_SPLIT))


def row_chunk_size(num_rows: int, row_bytes: int) -> int:
    """Rows of a row chunk, a multiple of 64. More than CHUNK_BYTES of logits are of at most half of the rows.

    Args:
        row_bytes: memory for the logits of a row.
    """
    share = max(ceil_div(num_rows, MIN_CHUNKS), MIN_CHUNK_ROWS)
    fewest = min(MIN_CHUNK_ROWS, MAX_CHUNK_BYTES // row_bytes, ceil_div(num_rows, 2))
    by_memory = max(CHUNK_BYTES // row_bytes, fewest) // 64 * 64
    return max(64, min(by_memory, ceil_div(min(share, num_rows), 64) * 64))


def chunk_config(num_classes: int) -> ChunkConfig:
    """At most 4,096 classes at a time: 16 numbers for each of 256 threads."""
    block = min(4096, next_power_of_2(num_classes))
    return ChunkConfig(block, num_warps=8 if block > 1024 else 4)
