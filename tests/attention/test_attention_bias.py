"""T5's relative-position bias in packed_attention, against Hugging Face's buckets and attention layer."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from attention_cases import refusals
from closeness import assert_close
from ragged import BATCHES
from torch.utils import _pytree as pytree

from stamp_kernels.ops.attention.packed_attention import packed_attention
from stamp_kernels.relative_position import RelativePositionBias, relative_position_bucket


@pytest.mark.core
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"),
    # For 20 buckets, fp64 logarithms give distances such as 20 other buckets than Hugging Face's fp32 logarithms.
    [(4, 128), (8, 200), (32, 128), (64, 1000), (160, 128), (20, 160), (20, 320)],
)
def test_buckets_are_those_of_hugging_face(num_buckets, max_distance, bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distance = torch.arange(-1000, 1001)
    want = t5.T5Attention._relative_position_bucket(distance, bidirectional, num_buckets, max_distance)
    got = relative_position_bucket(
        distance, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    assert torch.equal(got, want)
    assert got.min() == 0 and got.max() == num_buckets - 1


@pytest.mark.core
@pytest.mark.parametrize("is_decoder", [False, True])
def test_matches_t5_attention(backend, is_decoder):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    config = t5.T5Config(
        d_model=32, d_kv=8, num_heads=4, is_decoder=is_decoder, relative_attention_num_buckets=8,
        relative_attention_max_distance=12, attn_implementation="eager",
    )  # fmt: skip
    layer = t5.T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    batch = BATCHES["ragged"]
    hidden = torch.randn(batch.valid, 32, dtype=torch.float64)

    q, k, v = (project(hidden).unflatten(-1, (4, 8)) for project in (layer.q, layer.k, layer.v))
    bias = RelativePositionBias(layer.relative_attention_bias.weight, bidirectional=not is_decoder, max_distance=12)
    got = layer.o(
        packed_attention(
            q, k, v, batch.cu_seqlens, max_seqlen_q=batch.max_seqlen, causal=is_decoder, scale=1.0, relative_bias=bias
        ).flatten(1)
    )
    outputs = []
    for rows in batch.slices():
        n = rows.stop - rows.start
        if n == 0:
            continue  # Hugging Face's layer refuses it
        mask = torch.full((n, n), -torch.inf, dtype=torch.float64).triu(1) if is_decoder else None
        outputs.append(layer(hidden[None, rows], mask=mask)[0][0])
    want = torch.cat(outputs)

    grad = torch.randn_like(want)
    assert_close(got, want)
    for got_gradient, want_gradient in zip(
        torch.autograd.grad(got, list(layer.parameters()), grad),
        torch.autograd.grad(want, list(layer.parameters()), grad),
        strict=True,
    ):
        assert_close(got_gradient, want_gradient)


def test_pruned_sequence_keeps_its_bias(backend):
    kept = torch.tensor([0, 2, 3, 8, 15, 16, 29])
    q, k, v = torch.randn(3, len(kept), 2, 8, dtype=torch.float64).unbind(0)
    table = torch.randn(8, 2, dtype=torch.float64)
    distance = torch.arange(30)[None, :] - torch.arange(30)[:, None]
    whole = table[relative_position_bucket(distance, num_buckets=8, max_distance=12, bidirectional=True)]
    mask = whole[kept][:, kept].permute(2, 0, 1)
    want = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask).transpose(0, 1)
    got = packed_attention(
        q, k, v, torch.tensor([0, len(kept)], dtype=torch.int32), max_seqlen_q=len(kept),
        relative_bias=RelativePositionBias(table, max_distance=12), positions_q=kept.int(),
    )  # fmt: skip
    assert_close(got, want)


@refusals(
    [
        (dict(table=torch.zeros(8)), r"table must be a floating tensor \[num_buckets, num_heads\], got \[8\] of torch"),
        (dict(table=torch.zeros(8, 2).int()), r"must be a floating tensor .*, got \[8, 2\] of torch.int32"),
        (dict(table=torch.zeros(2, 2)), "table must have at least 4 rows in 2 equal parts, got 2"),
        (dict(table=torch.zeros(7, 2)), "table must have at least 4 rows in 2 equal parts, got 7"),
        (dict(table=torch.zeros(1, 2), bidirectional=False), "must have at least 2 rows in 1 equal parts, got 1"),
        (dict(table=torch.zeros(32, 2), max_distance=8), "max_distance must exceed the 8 exact distances, got 8"),
    ]
)
def test_bad_bias(changed, message):
    with pytest.raises(ValueError, match=message):
        RelativePositionBias(**changed)


class Biased(torch.nn.Module):
    """Attention with the bias that it is given, and another bias."""

    def forward(self, q, cu_seqlens, bias):
        other = RelativePositionBias(bias.table * 2, bias.bidirectional, bias.max_distance)
        return packed_attention(q, q, q, cu_seqlens, max_seqlen_q=5, relative_bias=bias), other


def bias_and_inputs():
    bias = RelativePositionBias(torch.randn(8, 2), bidirectional=False, max_distance=20)
    return bias, (torch.randn(9, 2, 8), torch.tensor([0, 4, 9], dtype=torch.int32), bias)


def test_bias_is_a_pytree():
    bias, _ = bias_and_inputs()
    assert [x is bias.table for x in pytree.tree_leaves({"bias": bias})] == [True]
    doubled = pytree.tree_map(lambda x: x * 2, bias)
    assert torch.equal(doubled.table, bias.table * 2)
    assert (doubled.bidirectional, doubled.max_distance) == (False, 20)
    assert pytree.tree_map(lambda x: x.shape, bias).table == (8, 2)
    assert pytree.tree_structure(bias) != pytree.tree_structure(RelativePositionBias(bias.table))


def test_biases_compare_by_identity():
    bias, _ = bias_and_inputs()
    assert bias == bias and bias != RelativePositionBias(bias.table, False, 20)
    assert len({bias, copy.copy(bias)}) == 2


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_take_and_return_a_bias(strict):
    _, inputs = bias_and_inputs()
    program = torch.export.export(Biased(), inputs, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    out, other = torch.export.load(file).module()(*inputs)
    expected, expected_other = Biased()(*inputs)
    assert torch.equal(out, expected)
    assert torch.equal(other.table, expected_other.table)
    assert (other.bidirectional, other.max_distance) == (False, 20)


def test_compiled_functions_return_a_bias():
    _, inputs = bias_and_inputs()
    out, other = torch.compile(Biased(), fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(out, Biased()(*inputs)[0])
    assert torch.equal(other.table, inputs[2].table * 2)


def test_vmap_over_tables():
    _, (q, cu_seqlens, bias) = bias_and_inputs()
    tables = torch.randn(3, *bias.table.shape)
    biases = pytree.tree_map(lambda _: tables, bias)
    got = torch.func.vmap(lambda bias: Biased()(q, cu_seqlens, bias)[0])(biases)
    for table, out in zip(tables, got, strict=True):
        assert torch.equal(out, Biased()(q, cu_seqlens, RelativePositionBias(table, False, 20))[0])


def test_a_bias_is_copied_and_saved():
    bias, _ = bias_and_inputs()
    file = io.BytesIO()
    torch.save(bias, file)
    file.seek(0)
    for back in (copy.deepcopy(bias), pickle.loads(pickle.dumps(bias)), torch.load(file, weights_only=True)):
        assert torch.equal(back.table, bias.table) and back.table is not bias.table
        assert (back.bidirectional, back.max_distance) == (False, 20)
