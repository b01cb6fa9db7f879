"""The precision in which the ops compute."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for fp32, fp16 and bf16 inputs, fp64 for fp64; also the dtype of lse, importance and losses."""
    return torch.float64 if dtype == torch.float64 else torch.float32
