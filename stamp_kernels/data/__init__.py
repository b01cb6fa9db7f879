"""Packed batches from a dataset of token sequences: a collator and a batch sampler for torch's DataLoader."""

from stamp_kernels.data.batch_sampler import TokenBudgetBatchSampler
from stamp_kernels.data.collation import PackingCollator

__all__ = ["PackingCollator", "TokenBudgetBatchSampler"]
