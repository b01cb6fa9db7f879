"""Which sequence a row of a packed batch belongs to, if any."""

import torch
from torch import Tensor


def sequence_of_row(cu_seqlens: Tensor, total: int) -> Tensor:
    """int64 `[total]`: the sequence that each row belongs to; B for tail rows."""
    rows = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)


def is_tail_row(cu_seqlens: Tensor, total: int) -> Tensor:
    """bool `[total]`: the rows from cu_seqlens[-1] on, which belong to no sequence."""
    return torch.arange(total, device=cu_seqlens.device) >= cu_seqlens[-1]
