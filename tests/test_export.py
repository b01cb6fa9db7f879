"""Programs that torch.export makes of modules with parameters: they run, train, decompose and compile ahead of time."""

import dataclasses

import pytest
import torch
from torch import nn

import stamp_kernels as sk

NUM_HEADS, HEAD_DIM, VOCAB = 2, 8, 11
WIDTH = NUM_HEADS * HEAD_DIM


class Recommender(nn.Module):
    """Attention with a bias, pruning, and both ways of the loss; every op has parameters or their results as inputs."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(32, NUM_HEADS))
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)
        self.embedding = nn.Parameter(torch.randn(VOCAB, WIDTH))

    def forward(self, x, cu_seqlens, labels):
        q, k, v = self.projection(x).view(-1, 3, NUM_HEADS, HEAD_DIM).unbind(1)
        bias = sk.RelativePositionBias(self.table)
        out, _, centrality = sk.packed_attention(
            q, k, v, cu_seqlens, max_seqlen_q=8, relative_bias=bias, return_centrality=True
        )
        targets = sk.shift_targets(labels, cu_seqlens, steps=2)
        kept = sk.prune([out.flatten(1), targets], centrality, cu_seqlens, 8, keep_ratio=0.5, fill_value=[0, -100])
        hidden, targets = kept.x
        importance = sk.token_importance(hidden, kept.positions.float(), kept.selection.cu_seqlens)
        again = sk.select_tokens(importance, kept.selection.cu_seqlens, 8, keep_count=2)
        hidden, targets = sk.gather_tokens([hidden, targets], again, fill_value=[0, -100])
        loss = sk.multi_token_cross_entropy(hidden, self.embedding, targets, memory="minimal")
        return loss + sk.multi_token_cross_entropy(hidden, self.embedding, targets)


@pytest.fixture
def recommender():
    return Recommender()


@pytest.fixture
def inputs():
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    return torch.randn(9, WIDTH), cu_seqlens, torch.randint(VOCAB, (9,))


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # torch, on its own classes
@pytest.mark.parametrize("decompose", [False, True], ids=["exported", "decomposed"])
def test_exported_program_equals_the_module(recommender, inputs, decompose):
    program = torch.export.export(recommender, inputs)
    if decompose:
        program = program.run_decompositions()
    assert torch.equal(program.module()(*inputs), recommender(*inputs))


def test_exported_program_trains(recommender, inputs):
    exported = torch.export.export(recommender, inputs).module()
    exported(*inputs).backward()
    recommender(*inputs).backward()
    for name, parameter in recommender.named_parameters():
        assert torch.equal(exported.get_parameter(name).grad, parameter.grad), name


@pytest.mark.filterwarnings("ignore")  # of inductor
def test_exported_program_compiles_ahead_of_time(recommender, inputs, tmp_path):
    path = torch._inductor.aoti_compile_and_package(
        torch.export.export(recommender, inputs), package_path=str(tmp_path / "recommender.pt2")
    )
    compiled = torch._inductor.aoti_load_package(path)
    torch.testing.assert_close(compiled(*inputs), recommender(*inputs))


class PackedRecommender(nn.Module):
    """What a model does with a PackedBatch: attention, padding, pruning of whole items, prediction."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)
        self.prune = sk.SemanticAdaptivePruning(0.5, codes_per_item=2)
        self.predict = sk.MultiStepPrediction(WIDTH, 2, head="transformer", num_attention_heads=2, vocab_size=VOCAB)

    def forward(self, packed, targets):
        packed = packed.with_tiles()
        q, k, v = self.projection(packed.values).unflatten(1, (3, NUM_HEADS, HEAD_DIM)).unbind(1)
        out, _, centrality = sk.packed_attention(
            q, k, v, packed.cu_seqlens, max_seqlen_q=packed.max_seqlen, tiles_q=packed.tiles, return_centrality=True
        )
        packed = dataclasses.replace(packed, values=out.flatten(1))
        pruned, _, targets = self.prune(packed, centrality, targets=targets)
        loss = self.predict(pruned.values, targets, cu_seqlens=pruned.cu_seqlens, max_seqlen=pruned.max_seqlen)
        return loss, packed.to_padded(), packed.materialized_positions()


def packed_inputs(lengths, tail, with_fields):
    total = sum(lengths) + tail
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.arange(total, dtype=torch.int32)
    fields = dict(positions=positions, lengths_cpu=torch.tensor(lengths), tiles=sk.tile_list(cu_seqlens, total))
    packed = sk.PackedBatch(torch.randn(total, WIDTH), cu_seqlens, max(lengths), **(fields if with_fields else {}))
    return packed, torch.randint(VOCAB, (total, 2))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("with_fields", [True, False])
def test_programs_of_packed_batches_run_at_other_sizes(with_fields, strict):
    """With an odd number of rows too, of which items have two."""
    recommender, dynamic = PackedRecommender(), torch.export.Dim.DYNAMIC
    shapes = [{0: dynamic}, {0: dynamic}, dynamic, *[{0: dynamic}] * (3 if with_fields else 0)]
    program = torch.export.export(
        recommender, packed_inputs((4, 6), 2, with_fields), dynamic_shapes=(shapes, {0: dynamic}), strict=strict
    ).module()
    for lengths, tail in (((4, 6), 2), ((8, 2, 10), 3), ((2, 70, 4, 4), 0)):
        inputs = packed_inputs(lengths, tail, with_fields)
        for x, y in zip(program(*inputs), recommender(*inputs), strict=True):
            torch.testing.assert_close(x, y)
