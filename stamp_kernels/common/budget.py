"""How many items of a sequence stay, in integer arithmetic that every backend repeats exactly."""

from typing import TypeVar

import torch
from torch import Tensor

from stamp_kernels.common.arguments import BudgetArguments


def keep_ratio_to_q32(keep_ratio: float) -> int:
    """The ratio in units of 2**-32, from which every backend computes the ceiling."""
    return round(keep_ratio * 2**32)


Count = TypeVar("Count", int, Tensor)


def ceil_of_ratio(ratio_q32: int, n: Count) -> Count:
    """ceil(keep_ratio * n) in int64; n is a Python int or an int64 tensor."""
    return ((ratio_q32 - 1) * n + (2**32 - 1)) >> 32


def kept_items(budget: BudgetArguments, num_items: Tensor, num_protected: Tensor | int) -> Tensor:
    """Items that each sequence keeps: p + min(n, max(min_keep, budget)), n of its items being unprotected.

    Args:
        num_items: int64 `[B]`, items of each sequence, the protected ones included (a token is an item of one code).
        num_protected: int64 `[B]` (or 0), p.
    """
    unprotected = num_items - num_protected
    wanted: Tensor
    if budget.ratio_q32 is not None:
        wanted = ceil_of_ratio(budget.ratio_q32, unprotected)
    elif budget.keep_counts is not None:
        wanted = budget.keep_counts.to(torch.int64)
    else:
        assert budget.keep_count is not None
        wanted = torch.full_like(unprotected, budget.keep_count)
    return num_protected + torch.minimum(unprotected, wanted.clamp(min=budget.min_keep))
