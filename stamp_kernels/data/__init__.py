"""From a dataset of token sequences to packed batches: what a torch DataLoader needs."""

from stamp_kernels.data.batch_sampler import TokenBudgetBatchSampler
from stamp_kernels.data.collation import PackingCollator

__all__ = ["PackingCollator", "TokenBudgetBatchSampler"]
