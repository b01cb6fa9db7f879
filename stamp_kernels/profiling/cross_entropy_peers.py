"""What a user would run instead of multi_token_cross_entropy, each written at its best.

All take hidden `[K, N, D]` (or `[N, D]` for all steps), weight `[V, D]` and targets int64 `[N, K]`, all of them valid,
and give the sum over the steps of the mean loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _of_step(hidden: Tensor, k: int) -> Tensor:
    return hidden if hidden.dim() == 2 else hidden[k]


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`F.cross_entropy(F.linear(...))`, step by step."""
    steps = range(targets.shape[1])
    return sum(F.cross_entropy(F.linear(_of_step(hidden, k), weight), targets[:, k]) for k in steps)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`F.linear_cross_entropy` of torch 2.13 and later, step by step."""
    steps = range(targets.shape[1])
    return sum(F.linear_cross_entropy(_of_step(hidden, k), weight, targets[:, k]) for k in steps)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_rows: int = 512) -> Tensor:
    """Some rows at a time, whose logits the backward computes again."""

    def loss_of(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), labels, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for k in range(targets.shape[1]):
        x, labels = _of_step(hidden, k), targets[:, k]
        for x_chunk, label_chunk in zip(x.split(chunk_rows), labels.split(chunk_rows), strict=True):
            total = total + checkpoint(loss_of, x_chunk, weight, label_chunk, use_reentrant=False)
    return total / targets.shape[0]
