"""The dropout mask of attention, drawn with Philox4x32-10 (Salmon et al. 2011) so that every backend draws the same."""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def _mul_hi_lo(multiplier: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two unsigned 32-bit numbers; x is int64, whose sign bit stays clear."""
    low_product = multiplier * (x & 0xFFFF)  # 48 bits
    upper = multiplier * (x >> 16) + (low_product >> 16)  # 49 bits, worth 2**16
    return upper >> 16, ((upper & 0xFFFF) << 16) | (low_product & 0xFFFF)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words for each counter, as int64 tensors of the counters' broadcast shape."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _mul_hi_lo(_MULTIPLIERS[0], c0)
        high1, low1 = _mul_hi_lo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def attention_keep_mask(
    dropout_p: float, dropout_seed: Tensor, sequences: Tensor, num_heads: int, num_queries: int, num_keys: int
) -> Tensor:
    """Which attention weights survive dropout: bool `[G, num_heads, num_queries, num_keys]`.

    Key = the seed's two halves; counter = (key index >> 2, query index, head, sequence), indices local to the
    sequence; word key index & 3; dropped iff word < uint32(dropout_p * 2**32).

    Args:
        dropout_seed: int64 `[1]`.
        sequences: int64 `[G]`, index in the batch of each sequence.
    """
    device = sequences.device
    four_keys = torch.arange((num_keys + 3) // 4, device=device).view(1, 1, 1, -1)
    query = torch.arange(num_queries, device=device).view(1, 1, -1, 1)
    head = torch.arange(num_heads, device=device).view(1, -1, 1, 1)
    seed = dropout_seed.to(device)
    words = philox4x32((four_keys, query, head, sequences.view(-1, 1, 1, 1)), (seed & _MASK, (seed >> 32) & _MASK))
    word_of_key = torch.stack(words, dim=-1).flatten(-2)[..., :num_keys]
    return word_of_key >= int(dropout_p * 2**32)
