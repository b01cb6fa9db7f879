"""Inputs of realistic sizes, for the tests that run on each device and in CUDA graphs."""

import torch
from ragged import RaggedBatch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from stamp_kernels import shift_targets
from stamp_kernels.integrations.transformers import (
    PredictionConfig,
    PruningConfig,
    StampT5ForConditionalGeneration,
    apply_stamp,
)

BATCH = RaggedBatch((33, 0, 1, 257, 64, 5, 5, 120), tail=3)


def random_rows(batch: RaggedBatch, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[T, *shape]` float64 on the CPU that `dtype` holds exactly; tail rows are NaN, because nothing may read them."""
    x = torch.randn(batch.total, *shape, dtype=torch.float64)
    x[batch.valid :] = torch.nan
    return x.to(dtype).double()


def attention_inputs(batch: RaggedBatch, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v, bias table and the gradient of out, in float64, exact in `dtype`."""
    rows = [random_rows(batch, heads, 64, dtype=dtype) for heads in (6, 2, 2)]
    table = torch.randn(32, 6, dtype=torch.float64).to(dtype).double()
    return [*rows, table], torch.randn(batch.total, 6, 64).to(dtype).double()


def cross_entropy_inputs(width: int, dtype: torch.dtype, hidden_steps: int = 1) -> list[Tensor]:
    """hidden, weight and targets, exact in `dtype`; with these 2,200 classes wide states are computed in chunks."""
    labels = torch.randint(0, 2200, (BATCH.total,))
    hidden = torch.stack([random_rows(BATCH, width, dtype=dtype) for _ in range(hidden_steps)])
    weight = torch.randn(2200, width, dtype=torch.float64) / width**0.5
    targets = shift_targets(labels, BATCH.cu_seqlens, steps=3)
    return [hidden[0] if hidden_steps == 1 else hidden, weight.to(dtype).double(), targets]


def stamped_t5() -> StampT5ForConditionalGeneration:
    config = T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, eos_token_id=None,
    )  # fmt: skip
    prediction = PredictionConfig(2, 4, vocab_ranges=[(1, 16), (16, 31), (31, 46), (46, 61)])
    return apply_stamp(T5ForConditionalGeneration(config), pruning=PruningConfig([(2, 0.5)]), prediction=prediction)


def t5_batch() -> dict[str, Tensor]:
    codes = torch.stack(
        [torch.randint(start, start + 15, (BATCH.num_sequences, 3)) for start in (1, 16, 31, 46)], dim=2
    )
    codes[:3, 2] = -100
    mask = (torch.arange(BATCH.max_seqlen) < torch.tensor(BATCH.lengths)[:, None]).long()
    ids = torch.randint(1, 61, mask.shape) * mask
    return dict(input_ids=ids, attention_mask=mask, labels=codes[:, 0], future_ids=codes[:, 1:].flatten(1))
