"""Dropout of attention weights: the same mask from every backend, forward and backward.

Philox4x32-10 with key = the two halves of the seed and counter = (key index >> 2, query index, head, sequence) gives
four words for four neighbouring keys. Key j has word j & 3, and its weight is dropped iff the word is below
`dropout_threshold(p)`; the others are multiplied by `keep_scale` = 1 / (1 - p).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Dropout(NamedTuple):
    """Made inside a kernel, since the threshold is one of its PER_BATCH arguments.

    Attributes:
        seed: int64 `[1]`, None without dropout.
        threshold: `dropout_threshold(p)`, below 2^32.
        keep_scale: 1 / (1 - p).
    """

    seed: Tensor | None
    threshold: int
    keep_scale: float


def dropout_threshold(dropout_p: float) -> int:
    """A weight is dropped iff its random word is below this."""
    return int(dropout_p * 2**32)


@triton.jit
def keep_tile(dropout, sequence_index, head, query, start_k, BLOCK_N: tl.constexpr):
    """bool `[BLOCK_M, BLOCK_N]`: which weights of the keys `start_k ... start_k + BLOCK_N - 1` dropout keeps.

    Args:
        start_k: index in the sequence of the tile's first key, a multiple of 4.
        dropout, sequence_index, head, query: as in `keep_fours`.
    """
    return keep_fours(dropout, sequence_index, head, query, start_k // 4 + tl.arange(0, BLOCK_N // 4))


@triton.jit
def keep_fours(dropout, sequence_index, head, query, four_keys):
    """bool `[BLOCK_M, 4 * FOURS]`: which weights dropout keeps, for keys in fours.

    Args:
        sequence_index: in the batch; a scalar, or [BLOCK_M, 1] where the tile's rows belong to several sequences.
        head: a scalar.
        query: [BLOCK_M], index in the sequence.
        four_keys: [FOURS], `key index >> 2` of each four neighbouring columns.
    """
    # The rounds mix the parts of the counter: the first two run on a row and a column, not on the whole tile.
    w0, w1, w2, w3 = tl.philox(  # each [BLOCK_M, FOURS]
        tl.load(dropout.seed),
        four_keys[None, :].to(tl.uint32),
        query[:, None].to(tl.uint32),
        head.to(tl.uint32),
        sequence_index.to(tl.uint32),
    )
    threshold = tl.cast(dropout.threshold, tl.uint32)
    # Joined as [BLOCK_M, FOURS, 2, 2], whose last two indices are the high and the low bit of key & 3.
    even = tl.join(w0 >= threshold, w2 >= threshold)
    odd = tl.join(w1 >= threshold, w3 >= threshold)
    return tl.reshape(tl.join(even, odd), (query.shape[0], 4 * four_keys.shape[0]))


@triton.jit
def keep_tile_by_keys(dropout, sequence_index, head, query, key):
    """bool `[BLOCK_N, BLOCK_M]`: `keep_tile`, transposed.

    Every pair draws all four words of its counter and takes its own. Drawing them once for four keys and interleaving,
    as `keep_tile` does, makes the compiler draw in a layout that repeats the work of 16 lanes, and once more for the
    second use of the mask.
    """
    w0, w1, w2, w3 = tl.philox(  # each [BLOCK_N, BLOCK_M]
        tl.load(dropout.seed),
        (key // 4)[:, None].to(tl.uint32),
        query[None, :].to(tl.uint32),
        head.to(tl.uint32),
        sequence_index.to(tl.uint32),
    )
    is_odd, is_high = (key % 2 == 1)[:, None], (key % 4 >= 2)[:, None]
    word = tl.where(is_high, tl.where(is_odd, w3, w2), tl.where(is_odd, w1, w0))
    return word >= tl.cast(dropout.threshold, tl.uint32)
