"""Dropout of attention weights: the same mask from every backend, forward and backward.

Philox4x32-7 gives four words for the four pairs of queries (i, i + 8) and keys (j, j + 8), where bit 3 of i and j is 0.
The key is the two halves of the seed, the counter (group(j), group(i), head, sequence), with

    group(n) = n // 16 * 8 + n % 8,

the place of n among the indices whose bit 3 is 0. Pair (i, j) has word 2 * bit 3 of i + bit 3 of j. Its weight is
dropped iff the word is below `dropout_threshold(p)`; the others are multiplied by `keep_scale` = 1 / (1 - p).

A thread holds just these four pairs of every 16 x 16 of them after a product of the matrix units, be they queries by
keys or keys by queries. So no tile draws a word twice, or passes one to another thread.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

_ROUNDS = tl.constexpr(7)


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
def groups_of(start, BLOCK: tl.constexpr):
    """int32 `[BLOCK / 2]`: the groups of the indices `start ... start + BLOCK - 1`; 16 divides both."""
    return start // 2 + tl.arange(0, BLOCK // 2)


@triton.jit
def keep_tile(dropout, sequence_index, head, query_groups, key_groups, BY_KEYS: tl.constexpr = False):
    """bool `[BLOCK_M, BLOCK_N]`: which weights dropout keeps; `[BLOCK_N, BLOCK_M]` if BY_KEYS.

    Args:
        sequence_index: in the batch; a scalar, or [BLOCK_M / 2, 1] where the tile's rows belong to several sequences.
        head: a scalar.
        query_groups, key_groups: [BLOCK_M / 2] and [BLOCK_N / 2], from `groups_of`.
    """
    if BY_KEYS:
        rows, columns = key_groups, query_groups
        words = _words(dropout.seed, sequence_index, head, query_groups[None, :], key_groups[:, None])
    else:
        rows, columns = query_groups, key_groups
        words = _words(dropout.seed, sequence_index, head, query_groups[:, None], key_groups[None, :])
    R: tl.constexpr = rows.shape[0]
    C: tl.constexpr = columns.shape[0]
    # Bit 3 of the key and of the query come last: they become bit 3 of the row and of the column.
    words = tl.reshape(words, (R // 8, 8, C // 8, 8, 2, 2))
    words = tl.permute(words, (0, 4, 1, 2, 5, 3) if BY_KEYS else (0, 5, 1, 2, 4, 3))
    return tl.reshape(words, (2 * R, 2 * C)) >= tl.cast(dropout.threshold, tl.uint32)


@triton.jit
def _words(seed_ptr, sequence_index, head, query_group, key_group):
    """uint32 `[R, C, 2, 2]`: the words of each counter, [bit 3 of the key, bit 3 of the query] in the end."""
    w0, w1, w2, w3 = _philox4x32(
        tl.load(seed_ptr),
        query_group.to(tl.uint32),
        key_group.to(tl.uint32),
        head.to(tl.uint32),
        sequence_index.to(tl.uint32),
    )
    return tl.join(tl.join(w0, w1), tl.join(w2, w3))


@triton.jit
def _philox4x32(seed, c0, c1, c2, c3):
    """The four words of a counter, of the broadcast shape of its parts.

    The rounds mix the parts: the first two run on rows, columns and scalars, not on the whole tile. tl.philox takes the
    high and the low half of a product by two multiplications; a 64-bit product takes one.
    """
    k0, k1 = seed.to(tl.uint32), (seed.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3
