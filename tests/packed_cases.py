"""PackedBatches and padding masks for the tests."""

import torch
from ragged import RaggedBatch
from torch import Tensor

from stamp_kernels.packed import PackedBatch


def packed_of(batch: RaggedBatch, *shape: int, known: bool = True, device: str = "cpu") -> PackedBatch:
    values = torch.randn(batch.total, *shape, device=device)
    lengths_cpu = torch.tensor(batch.lengths, dtype=torch.int64) if known else None
    return PackedBatch(values, batch.cu_seqlens.to(device), batch.max_seqlen, lengths_cpu=lengths_cpu)


def share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def padded_mask(lengths: tuple[int, ...], padded_length: int, padding: str) -> Tensor:
    """Bool [B, S] with the given numbers of valid tokens in each row."""
    column = torch.arange(padded_length)
    rows = []
    for n in lengths:
        if padding == "right":
            rows.append(column < n)
        elif padding == "left":
            rows.append(column >= padded_length - n)
        else:
            rows.append(torch.randperm(padded_length) < n)
    return torch.stack(rows) if rows else torch.zeros(0, padded_length, dtype=torch.bool)
