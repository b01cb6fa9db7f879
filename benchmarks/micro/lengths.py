"""Sequence lengths of the benchmarks. They are the same in every run."""

import math

import torch
from torch import Tensor


def lognormal_lengths(num_sequences: int, mean_length: int = 94) -> Tensor:
    """int64 `[num_sequences]` around the mean, from 8 to 400: tokens per history of a generative recommender."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(num_sequences).log_normal_(0, 0.5, generator=generator)
    return (lengths * mean_length / lengths.mean()).round().clamp(8, 400).long()


def long_tail_lengths(num_sequences: int, median_length: int = 60, longest: int = 1024) -> Tensor:
    """int64 `[num_sequences]`: most are short, a few are long, and the first one is the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(num_sequences).log_normal_(math.log(median_length), 1.2, generator=generator)
    lengths[0] = longest
    return lengths.round().clamp(1, longest).long()


def fixed_lengths(num_sequences: int, length: int) -> Tensor:
    """int64 `[num_sequences]`, all equal."""
    return torch.full((num_sequences,), length)


def offsets(lengths: Tensor, device: torch.device) -> Tensor:
    """cu_seqlens, int32 `[num_sequences + 1]`."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)
