"""Offsets in int64, as TorchRec and FBGEMM have them: every public function converts them to the int32 of the ops."""

import pytest
import torch
from ragged import RaggedBatch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import stamp_kernels as sk
import stamp_kernels.flops

BATCH = RaggedBatch((5, 0, 1, 13, 2, 7), tail=3)
BATCH_K = RaggedBatch((3, 2, 0, 9, 4, 4), tail=1)
T, TK, LONGEST = BATCH.total, BATCH_K.total, BATCH.max_seqlen
WIDTH, VOCAB = 16, 11


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def attention(cu_seqlens, cu_seqlens_k):
    q, k, v = leaf(T, 4, 8), leaf(T, 2, 8), leaf(T, 2, 8)
    bias = sk.RelativePositionBias(leaf(32, 4))
    out = sk.packed_attention(
        q, k, v, cu_seqlens, max_seqlen_q=LONGEST, relative_bias=bias, return_lse=True, return_centrality=True
    )
    return out, torch.autograd.grad(out.out.sum(), (q, k, v, bias.table))


def cross_attention(cu_seqlens, cu_seqlens_k):
    q, k, v = leaf(T, 4, 8), leaf(TK, 2, 8), leaf(TK, 2, 8)
    out = sk.packed_attention(q, k, v, cu_seqlens, cu_seqlens_k, LONGEST, LONGEST, causal=True)
    return out, torch.autograd.grad(out.sum(), (q, k, v))


def centrality(cu_seqlens, cu_seqlens_k):
    q, k = torch.randn(T, 4, 8), torch.randn(TK, 2, 8)
    return sk.attention_centrality(q, k, torch.randn(4, T), cu_seqlens, cu_seqlens_k, LONGEST, LONGEST)


def tiles(cu_seqlens, cu_seqlens_k):
    return sk.tile_list(cu_seqlens, T)


def importance(cu_seqlens, cu_seqlens_k):
    return sk.token_importance(torch.randn(T, WIDTH), torch.rand(T), cu_seqlens, normalize="visible_queries")


def selection(cu_seqlens, cu_seqlens_k):
    return sk.select_tokens(torch.randn(T), cu_seqlens, LONGEST, keep_ratio=0.5)


def pruning(cu_seqlens, cu_seqlens_k):
    x = leaf(T, WIDTH)
    kept = sk.prune(x, torch.rand(T), cu_seqlens, LONGEST, keep_ratio=0.5)
    return kept, torch.autograd.grad(kept.x.square().sum(), x)


def targets(cu_seqlens, cu_seqlens_k):
    return sk.shift_targets(torch.randint(VOCAB, (T,)), cu_seqlens, steps=2)


def packed_batch(cu_seqlens, cu_seqlens_k):
    packed = sk.PackedBatch(torch.randn(T, WIDTH), cu_seqlens, LONGEST)
    pruned = sk.SemanticAdaptivePruning(0.5)(packed, torch.rand(T))
    return packed, packed.to_padded(), packed.materialized_positions(), pruned


def prediction(cu_seqlens, cu_seqlens_k):
    predict = sk.MultiStepPrediction(WIDTH, 2, head="transformer", num_attention_heads=2, vocab_size=VOCAB)
    x, of_rows = leaf(T, WIDTH), torch.randint(VOCAB, (T, 2))
    of_rows[BATCH.valid :] = -100
    loss = predict(x, of_rows, cu_seqlens=cu_seqlens, max_seqlen=LONGEST)
    return loss, torch.autograd.grad(loss, (x, *predict.parameters()))


EVERY = [
    attention, cross_attention, centrality, tiles, importance, selection, pruning, targets, packed_batch, prediction,
]  # fmt: skip


@pytest.mark.core
@pytest.mark.parametrize("run", EVERY)
def test_results_are_those_of_int32(run, backend):
    results = []
    for dtype in (torch.int32, torch.int64):
        torch.manual_seed(1)
        results.append(pytree.tree_leaves(run(BATCH.cu_seqlens.to(dtype), BATCH_K.cu_seqlens.to(dtype))))
    for x, y in zip(*results, strict=True):
        if isinstance(x, Tensor):
            assert x.dtype == y.dtype
            assert torch.equal(x, y)
        else:
            assert x == y


@pytest.mark.core
@pytest.mark.parametrize("run", EVERY)
def test_offsets_never_wrap_around(run, backend):
    """Numbers whose lowest 32 bits are good offsets."""
    cu_seqlens = BATCH.cu_seqlens.to(torch.int64) + 2**32
    with pytest.raises(RuntimeError, match=r"cu_seqlens(_q)?\[0\] must be 0"):
        run(cu_seqlens, BATCH_K.cu_seqlens)


def test_offsets_of_keys_never_wrap_around(backend):
    cu_seqlens_k = BATCH_K.cu_seqlens.to(torch.int64)
    cu_seqlens_k[-1] += 2**32
    for run in (cross_attention, centrality):
        with pytest.raises(RuntimeError, match="cu_seqlens_k: sequence 5 has length"):
            run(BATCH.cu_seqlens, cu_seqlens_k)


@pytest.mark.parametrize("run", EVERY)
def test_other_dtypes_are_refused(run):
    for dtype in (torch.int16, torch.float32, torch.uint8):
        message = rf"cu_seqlens(_q)? must have dtype torch.int32, torch.int64, got {dtype}"
        with pytest.raises(ValueError, match=message):
            run(BATCH.cu_seqlens.to(dtype), BATCH_K.cu_seqlens)


@pytest.mark.parametrize("is_cross", [False, True])
def test_compiled_attention_is_one_graph(is_cross):
    """With the same offsets for queries and keys too."""

    def attend(q, k, v, cu_seqlens):
        keys = (cu_seqlens, LONGEST, LONGEST) if is_cross else (None, LONGEST)
        return sk.packed_attention(q, k, v, cu_seqlens, *keys, return_centrality=True)

    qkv = leaf(T, 2, 8), leaf(T, 2, 8), leaf(T, 2, 8)
    expected = attend(*qkv, BATCH.cu_seqlens)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    got = compiled(*qkv, BATCH.cu_seqlens.long())
    assert torch.equal(got.out, expected.out) and torch.equal(got.centrality, expected.centrality)
    for x, y in zip(*(torch.autograd.grad(each.out.square().sum(), qkv) for each in (got, expected)), strict=True):
        assert torch.equal(x, y)


def test_compiled_functions_make_packed_batches():
    def pad(values, cu_seqlens):
        packed = sk.PackedBatch(values, cu_seqlens, LONGEST)
        return packed, packed.to_padded()

    values = torch.randn(T, 3)
    packed, padded = torch.compile(pad, fullgraph=True, backend="aot_eager")(values, BATCH.cu_seqlens.long())
    assert packed.cu_seqlens.dtype == torch.int32
    assert torch.equal(padded, pad(values, BATCH.cu_seqlens)[1])


class Attended(nn.Module):
    def forward(self, x, cu_seqlens):
        packed = sk.PackedBatch(x, cu_seqlens, LONGEST)
        return sk.packed_attention(x, x, x, packed.cu_seqlens, max_seqlen_q=LONGEST), packed


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_take_int64_offsets(strict):
    inputs = torch.randn(T, 2, 8), BATCH.cu_seqlens.long()
    out, packed = torch.export.export(Attended(), inputs, strict=strict).module()(*inputs)
    assert torch.equal(out, Attended()(*inputs)[0])
    assert packed.cu_seqlens.dtype == torch.int32


def test_vmap_over_offsets():
    offsets = torch.stack([BATCH.cu_seqlens, BATCH.cu_seqlens.clamp(max=BATCH.valid - 1)]).long()
    labels = torch.randint(VOCAB, (T,))
    got = torch.func.vmap(lambda x: sk.shift_targets(labels, x, steps=2))(offsets)
    for x, of_offsets in zip(offsets, got, strict=True):
        assert torch.equal(of_offsets, sk.shift_targets(labels, x.int(), steps=2))


def test_flops_are_those_of_int32():
    assert stamp_kernels.flops
    x = torch.randn(T, 2, 8)
    counts = []
    for cu_seqlens in (BATCH.cu_seqlens, BATCH.cu_seqlens.long()):
        with FlopCounterMode(display=False) as counter:
            sk.packed_attention(x, x, x, cu_seqlens, max_seqlen_q=LONGEST)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_packed_batches_hold_int32():
    packed = sk.PackedBatch(torch.randn(T), BATCH.cu_seqlens.long(), LONGEST)
    assert packed.cu_seqlens.dtype == torch.int32
    again = sk.PackedBatch(torch.randn(T), packed.cu_seqlens, LONGEST)
    assert again.cu_seqlens is packed.cu_seqlens


def test_raw_ops_take_int32_only():
    with pytest.raises(RuntimeError, match="cu_seqlens must have dtype int32"):
        torch.ops.stamp.shift_targets(torch.zeros(T, dtype=torch.int64), BATCH.cu_seqlens.long(), 1, 1, -100)
