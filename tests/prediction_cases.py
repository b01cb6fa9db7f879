"""Modules of multi-step prediction with random heads, and inputs for them."""

import torch
from ragged import BATCHES
from torch import nn

from stamp_kernels.modules.prediction import MultiStepPrediction
from stamp_kernels.ops.cross_entropy.shift_targets import shift_targets

WIDTH, VOCAB, NUM_STEPS = 32, 40, 3
HEADS = ["linear", "residual", "transformer"]
BATCH = BATCHES["ragged"]


def module(head="residual", num_steps=NUM_STEPS, **options):
    """In float64 with random parameters, because new heads are the identity."""
    heads = {"num_attention_heads": 2} if head == "transformer" else {}
    built = MultiStepPrediction(WIDTH, num_steps, head=head, **heads, **options).double()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.2)
    return built


def packed_inputs(batch=BATCH, dtype=torch.float64):
    """hidden (tail rows 0), targets, and the other arguments of forward."""
    hidden = torch.randn(batch.total, WIDTH, dtype=dtype)
    hidden[batch.valid :] = 0
    targets = shift_targets(torch.randint(VOCAB, (batch.total,)), batch.cu_seqlens, steps=1 + NUM_STEPS)[:, 1:]
    others = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
    return hidden.requires_grad_(), targets, others | {"unembedding": torch.randn(VOCAB, WIDTH, dtype=dtype) * 0.3}
