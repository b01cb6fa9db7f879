"""The key-major centrality kernel, interpreted where there is no GPU, against the float64 oracle."""

import pytest
import torch
from attention_cases import (
    CASES,
    KEYS_OF_RAGGED,
    AttentionCase,
    all_cases,
    dense_attention,
    detached,
    in_float64,
    shared_op_arguments,
)
from closeness import assert_close
from op_kernels import launcher, reference
from ragged import BATCHES, RaggedBatch
from row_layouts import mixed_layouts

pytest.importorskip("triton")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(inputs, lse):
    inputs = detached(inputs)
    arguments = (inputs["q"], inputs["k"], lse, *shared_op_arguments(inputs), inputs.get("centrality_query_mask"))
    return launcher("attention_centrality")(
        *(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments)
    ).cpu()


def lse_and_centrality(inputs):
    """Of the oracle: lse in fp32, NaN on tail rows, and the centrality in float64."""
    want = dense_attention(**detached(in_float64(inputs)))
    lse = want.lse.float()
    lse[:, int(inputs["cu_seqlens_q"][-1]) :] = torch.nan
    return lse, want.centrality


@all_cases
def test_column_sums_of_the_softmax(case, dtype=torch.float16):
    inputs = case.inputs(dtype)
    lse, want = lse_and_centrality(inputs)
    got = run(inputs, lse)
    assert got.dtype == torch.float32
    assert_close(got, want)
    assert not got[(case.batch_k or case.batch).valid :].any()


@pytest.mark.parametrize("name", ["gqa", "causal_bias_positions", "dropout_everything"])
def test_column_sums_in_fp32(name):
    test_column_sums_of_the_softmax(CASES[name], torch.float32)


@pytest.mark.parametrize("head_dim", [8, 40, 64, 80])
def test_head_dims(head_dim):
    case = AttentionCase(heads=(4, 2), head_dim=head_dim, causal=True, bias="unidirectional", query_mask=True)
    inputs = case.inputs(torch.float16)
    lse, want = lse_and_centrality(inputs)
    assert_close(run(inputs, lse), want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_several_blocks_of_queries_and_keys(causal, cross):
    batch_k = RaggedBatch((131, 31, 64), tail=1) if cross else None
    case = AttentionCase(
        RaggedBatch((75, 64, 130), tail=70), batch_k, heads=(2, 1), causal=causal, bias="bidirectional",
        positions=True, query_mask=True,
    )  # fmt: skip
    inputs = case.inputs(torch.float16)
    lse, want = lse_and_centrality(inputs)
    assert_close(run(inputs, lse), want)


def test_order_of_tiles_changes_no_bit():
    batch = RaggedBatch((128, 100, 120, 65, 128), tail=100)
    inputs = AttentionCase(batch, causal=True, bias="unidirectional", query_mask=True, tiles=True).inputs(torch.float16)
    lse, _ = lse_and_centrality(inputs)
    by_sequence = run(inputs, lse)
    inputs["max_seqlen_q"] = 1000
    listed = run(inputs, lse)
    del inputs["tiles_q"]
    assert torch.equal(listed, by_sequence) and torch.equal(run(inputs, lse), by_sequence)


def test_strided_views():
    batch = BATCHES["ragged"]
    q, k, _ = torch.randn(batch.total, 3, 2, 17)[..., 1:].unbind(1)
    inputs = dict(q=q, k=k, v=k, cu_seqlens_q=batch.cu_seqlens, max_seqlen_q=batch.max_seqlen, causal=False, scale=None)
    lse, want = lse_and_centrality(inputs)
    assert_close(run(inputs, lse.t().contiguous().t()), want)


@mixed_layouts
def test_rows_anywhere_in_memory(layouts):
    """`promises_are_kept` checks what the compiler is promised."""
    inputs = detached(AttentionCase(RaggedBatch((5, 0, 9), tail=1), head_dim=24).inputs(torch.float16))
    lse, want = lse_and_centrality(inputs)
    for q_layout, k_layout in (layouts[:2], layouts[2:]):
        assert_close(run(inputs | dict(q=q_layout(inputs["q"]), k=k_layout(inputs["k"])), lse), want)


def test_every_counting_query_adds_one():
    inputs = AttentionCase(batch_k=KEYS_OF_RAGGED, causal=True, heads=(4, 2), query_mask=True).inputs(torch.float32)
    lse, _ = lse_and_centrality(inputs)
    valid = int(inputs["cu_seqlens_q"][-1])
    rows_that_count = 4 * (~lse[0, :valid].isneginf() & inputs["centrality_query_mask"][:valid]).sum()
    assert_close(run(inputs, lse).sum(), rows_that_count.float())  # a row of weights sums to 1


def test_same_bits_alone_and_in_a_batch():
    case = AttentionCase(RaggedBatch((5, 0, 70, 16), tail=2), heads=(2, 1), causal=True, bias="bidirectional")
    inputs = case.inputs(torch.float32)
    lse, _ = lse_and_centrality(inputs)
    batch = run(inputs, lse)
    assert torch.equal(batch, run(inputs, lse))
    for rows in case.batch.slices():
        alone = {name: inputs[name][rows] for name in ("q", "k", "v")}
        cu_seqlens = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        assert torch.equal(run(inputs | alone | dict(cu_seqlens_q=cu_seqlens), lse[:, rows]), batch[rows])


@pytest.mark.parametrize("kernel", [launcher, reference])
@pytest.mark.parametrize(
    "lengths", [(5, 0, 9, 1), (140, 9, 33)], ids=["slots", "general"]
)  # of the forward, which has the sums from its own kernels for sequences of up to 128
def test_nan_in_queries_that_do_not_count(kernel, lengths):
    batch = RaggedBatch(lengths, tail=2)
    inputs = detached(
        AttentionCase(batch, batch, heads=(2, 1), causal=True, bias="unidirectional").inputs(torch.float32)
    )
    mask = torch.ones(batch.total, dtype=torch.bool)
    mask[[1, batch.valid - 2]] = False
    inputs["q"][1], inputs["q"][batch.valid - 2] = torch.nan, torch.inf
    inputs["centrality_query_mask"] = mask
    want = dense_attention(**detached(in_float64(inputs)))
    shared = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in shared_op_arguments(inputs)]
    q, k, v, mask = (inputs[name].to(DEVICE) for name in ("q", "k", "v", "centrality_query_mask"))
    _, lse, centrality = kernel("packed_attention_forward")(q, k, v, *shared, mask, 0.0, None, True)
    assert_close(centrality.cpu(), want.centrality)
    assert_close(kernel("attention_centrality")(q, k, lse, *shared, mask).cpu(), want.centrality)
    everyone = kernel("attention_centrality")(q, k, lse, *shared, None)
    assert everyone.isnan().any()
