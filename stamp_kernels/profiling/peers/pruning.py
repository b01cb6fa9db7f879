"""What a user would run instead of select_tokens and prune, each written at its best.

All keep `ceil(keep_ratio * n)` of every sequence's n tokens, at least one.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class PackedSelection(NamedTuple):
    """Source rows `[T']` of the kept tokens, ascending, and the kept sequences' offsets int32 `[B + 1]`."""

    indices: Tensor
    cu_seqlens: Tensor


def num_kept(length: int, keep_ratio: float) -> int:
    """Tokens that a sequence of this length keeps."""
    return max(1, math.ceil(keep_ratio * length)) if length > 0 else 0


def topk_per_sequence(importance: Tensor, lengths: list[int], keep_ratio: float) -> PackedSelection:
    """A loop over the sequences, with the lengths on the CPU: `topk`, and a sort back into the original order."""
    indices, offsets, start = [], [0], 0
    for of_sequence in importance.split(lengths):
        kept = num_kept(len(of_sequence), keep_ratio)
        indices.append(of_sequence.topk(kept, sorted=False).indices.sort().values + start)
        offsets.append(offsets[-1] + kept)
        start += len(of_sequence)
    return PackedSelection(torch.cat(indices), torch.tensor(offsets, dtype=torch.int32, device=importance.device))


def padded_topk(importance: Tensor, max_kept: int) -> Tensor:
    """Columns `[B, max_kept]` of each row's most important tokens, ascending, as a padded trainer computes them.

    `topk` has one k for all rows. What a row with a smaller budget would have to drop from these columns is not
    computed.

    Args:
        importance: `[B, S]`, -inf on padding.
        max_kept: the k.
    """
    return importance.topk(max_kept, dim=1, sorted=False).indices.sort(dim=1).values


def sort_within_sequences(
    importance: Tensor, sequence: Tensor, cu_seqlens: Tensor, kept: Tensor, total_kept: int
) -> PackedSelection:
    """Packed and without a loop: one sort by sequence and falling importance ranks every token in its sequence.

    Args:
        importance: fp32 `[T]`.
        sequence: int64 `[T]`, the index of every token's sequence.
        cu_seqlens: int64 `[B + 1]`.
        kept: int64 `[B]`, the number of tokens that each sequence keeps.
        total_kept: the sum of `kept`.
    """
    bits = importance.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the importances
    order = ((sequence << 32) - ordered.long()).argsort()
    rank = (
        torch.arange(len(order), device=order.device) - cu_seqlens[sequence]
    )  # of order[i]: the sort leaves each sequence in its place
    stays = torch.empty_like(order, dtype=torch.bool)
    stays[order] = rank < kept[sequence]
    # Their number is known, so no size has to be read from the device.
    indices = torch.nonzero_static(stays, size=total_kept).flatten()
    return PackedSelection(indices, torch.nn.functional.pad(kept.cumsum(0), (1, 0)).to(torch.int32))
