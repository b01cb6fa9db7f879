"""A default device (torch.device as a context, torch.set_default_device) moves and breaks nothing."""

import pytest
import torch
from packed_cases import padded_mask
from ragged import BATCHES
from torch import Tensor
from torch.utils import _pytree as pytree

import stamp_kernels
from stamp_kernels import PackedBatch, RelativePositionBias

BATCH = BATCHES["ragged"]
CU_SEQLENS = BATCH.cu_seqlens
LENGTHS = torch.tensor(BATCH.lengths)
MASK = padded_mask(BATCH.lengths, BATCH.max_seqlen, "left")


def attention():
    q, k, v = (torch.randn(BATCH.total, heads, 8, requires_grad=True, device="cpu") for heads in (4, 2, 2))
    bias = RelativePositionBias(torch.randn(32, 4, requires_grad=True, device="cpu"))
    result = stamp_kernels.packed_attention(
        q, k, v, CU_SEQLENS, max_seqlen_q=BATCH.max_seqlen, relative_bias=bias, dropout_p=0.5, return_centrality=True
    )
    result.out.sum().backward()
    return result, q.grad, k.grad, v.grad, bias.table.grad


def centrality():
    q, k = (torch.randn(BATCH.total, heads, 8, device="cpu") for heads in (4, 2))
    lse = torch.randn(4, BATCH.total, device="cpu")
    return stamp_kernels.attention_centrality(q, k, lse, CU_SEQLENS, max_seqlen_q=BATCH.max_seqlen)


def pruning():
    hidden, received = torch.randn(BATCH.total, 8, requires_grad=True, device="cpu"), CU_SEQLENS.new_ones(BATCH.total)
    importance = stamp_kernels.token_importance(hidden, received.float(), CU_SEQLENS)
    selection = stamp_kernels.select_tokens(
        importance, CU_SEQLENS, BATCH.max_seqlen, keep_ratio=0.5, lengths_cpu=LENGTHS
    )
    rows = stamp_kernels.gather_tokens(hidden, selection)
    pruned = stamp_kernels.prune(hidden, received.float(), CU_SEQLENS, BATCH.max_seqlen, keep_count=2)
    (rows.sum() + pruned.x.sum()).backward()
    return importance, selection, rows, pruned, hidden.grad


def sap():
    packed = PackedBatch(torch.randn(BATCH.total, 8, device="cpu"), CU_SEQLENS, BATCH.max_seqlen, lengths_cpu=LENGTHS)
    return stamp_kernels.SemanticAdaptivePruning(0.5)(packed, packed.values.abs().sum(1))


def cross_entropy():
    hidden, weight = (torch.randn(rows, 8, requires_grad=True, device="cpu") for rows in (BATCH.total, 50))
    labels = torch.randint(50, (BATCH.total,), device="cpu")
    targets = stamp_kernels.shift_targets(labels, CU_SEQLENS, steps=2)
    losses = [
        stamp_kernels.multi_token_cross_entropy(
            hidden, weight, targets, step_weights=[1.0, 0.5], memory=memory, return_step_losses=True
        )
        for memory in ("auto", "minimal")
    ]
    sum(each.loss for each in losses).backward()
    return targets, losses, hidden.grad, weight.grad


def packed_batches():
    padded = torch.randn(*MASK.shape, 3, device="cpu")
    packed = PackedBatch.from_padded(padded, MASK)
    others = [
        PackedBatch.from_padded(padded, lengths=LENGTHS),
        PackedBatch.from_nested(packed.to_nested()),
        packed.to("cpu"),
    ]
    return packed, others, packed.to_padded(padding_side="left", padding_value=1), packed.materialized_positions()


@pytest.mark.parametrize("run", [attention, centrality, pruning, sap, cross_entropy, packed_batches])
def test_results_do_not_depend_on_the_default_device(run, backend):
    """On the reference too. The results have the inputs' device, and the same values."""
    torch.manual_seed(1)
    expected = run()
    torch.manual_seed(1)
    with torch.device("meta"):
        got = run()
    for x, y in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        if isinstance(y, Tensor):
            assert x.device.type == "cpu"
            assert torch.equal(x, y)
        else:
            assert x == y
