"""Tokens at both ends of every sequence that pruning always keeps, and whole items between them.

Protected tokens are never pruned, so they are still at the ends at the next pruning.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stamp_kernels.common.contents import check_cu_seqlens_contents, contents_are_checked
from stamp_kernels.common.rows import sequence_of_row
from stamp_kernels.packed import PackedBatch

__all__ = ["ProtectedEnds"]


class ProtectedEnds(NamedTuple):
    """How many tokens at the beginning and at the end of every sequence are always kept."""

    first: int
    last: int

    def mask(self, packed: PackedBatch) -> Tensor:
        """bool `[T]`: the tokens at the ends. False on tail rows."""
        sequence, offset, length = _places(packed)
        return self._are_at(offset, length) & (sequence < packed.cu_seqlens.shape[0] - 1)

    def middles(self, packed: PackedBatch, codes_per_item: int) -> Tensor:
        """int32 `[B + 1]`: the offsets of the tokens between the ends, packed without the ends.

        Raises:
            RuntimeError: the offsets of the batch are wrong, or the tokens between the ends are not whole items
                (checked on the CPU, or under STAMP_KERNELS_CHECK=1).
        """
        check_cu_seqlens_contents("cu_seqlens", packed.cu_seqlens, packed.values.shape[0], packed.max_seqlen)
        lengths = (packed.cu_seqlens.diff() - sum(self)).clamp(min=0)
        if contents_are_checked(lengths.device) and bool((lengths % codes_per_item != 0).any()):
            b = int((lengths % codes_per_item).nonzero()[0])
            raise RuntimeError(
                f"the tokens between protect_first {self.first} and protect_last {self.last} must be whole items of "
                f"codes_per_item {codes_per_item} tokens, got {int(lengths[b])} of the "
                f"{int(packed.cu_seqlens.diff()[b])} tokens of sequence {b}"
            )
        return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    def take_middles(self, x: Tensor, packed: PackedBatch, cu_seqlens_middle: Tensor) -> Tensor:
        """`[T]`: the rows of x `[T]` between the ends, at the places that cu_seqlens_middle gives them.

        There are still T rows, so that no size depends on contents. The others are tail rows.
        """
        total = x.shape[0]
        sequence = sequence_of_row(cu_seqlens_middle, total)
        row = torch.arange(total, device=x.device)
        source = packed.cu_seqlens[sequence] + self.first + row - cu_seqlens_middle[sequence]
        return x[_inside(source, total)]

    def with_middles(self, keep: Tensor, packed: PackedBatch, cu_seqlens_middle: Tensor) -> Tensor:
        """bool `[T]`: the tokens at the ends, and those between them that `keep`, bool `[T]`, marks at these places."""
        sequence, offset, length = _places(packed)
        middle = cu_seqlens_middle[sequence] + offset - self.first
        is_kept = self._are_at(offset, length) | keep[_inside(middle, keep.shape[0])]
        return is_kept & (sequence < packed.cu_seqlens.shape[0] - 1)

    def _are_at(self, offset: Tensor, length: Tensor) -> Tensor:
        return (offset < self.first) | (offset >= length - self.last)


def _places(packed: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, int64 `[T]`: its sequence (B for tail rows), its index in it, and the length of the sequence."""
    total, num_sequences = packed.values.shape[0], packed.cu_seqlens.shape[0] - 1
    sequence = sequence_of_row(packed.cu_seqlens, total)
    starts, ends = packed.cu_seqlens[sequence], packed.cu_seqlens[(sequence + 1).clamp(max=num_sequences)]
    return sequence, torch.arange(total, device=starts.device) - starts, ends - starts


def _inside(rows: Tensor, total: int) -> Tensor:
    """Tail rows, and offsets that are wrong on a GPU, give rows outside of the tensor, which must not be read."""
    return rows.clamp(min=0).clamp(max=torch.sym_max(total - 1, 0))
