"""The dropout mask of attention, drawn with Philox4x32-7 (Salmon et al. 2011) so that every backend draws the same."""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four 32-bit words for each counter, as int64 tensors of the counters' broadcast shape."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap, so their 64 bits are those of the unsigned product: high word >> 32, low word & _MASK.
        # c1 and c3 carry whole products, as only their low words reach the masked sums.
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1 = ((product1 >> 32) ^ c1 ^ k0) & _MASK, product1
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & _MASK, product0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def attention_keep_mask(
    dropout_p: float, dropout_seed: Tensor, sequences: Tensor, num_heads: int, num_queries: int, num_keys: int
) -> Tensor:
    """Which attention weights survive dropout: bool `[G, num_heads, num_queries, num_keys]`.

    Key = the seed's two halves; counter = (group of the query, group of the key, head, sequence), where the group of
    index n in the sequence is n // 16 * 8 + n % 8; word 2 * bit 3 of the query + bit 3 of the key; dropped iff word <
    uint32(dropout_p * 2**32). Two queries and two keys, 8 apart, share a counter: a thread of a GPU holds these pairs.

    Args:
        dropout_seed: int64 `[1]`.
        sequences: int64 `[G]`, index in the batch of each sequence.
    """
    device = sequences.device
    query, key = torch.arange(num_queries, device=device).view(-1, 1), torch.arange(num_keys, device=device)
    head, sequence = torch.arange(num_heads, device=device).view(-1, 1, 1), sequences.view(-1, 1, 1, 1)
    seed = dropout_seed.to(device)
    groups = (torch.arange((n + 15) // 16 * 8, device=device) for n in (num_queries, num_keys))
    counter = (next(groups).view(-1, 1), next(groups), head, sequence)
    words = torch.stack(philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK)))  # [4, G, heads, groups, groups]
    word = 2 * (query >> 3 & 1) + (key >> 3 & 1)  # [num_queries, num_keys]
    return words[word, :, :, _group(query), _group(key)].permute(2, 3, 0, 1) >= int(dropout_p * 2**32)


def _group(index: Tensor) -> Tensor:
    return (index >> 4 << 3) | (index & 7)
