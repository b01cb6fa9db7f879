"""attention_centrality against the column sums of an explicit softmax, and what holds for every op."""

import pytest
import torch
from attention_cases import (
    BAD_ARGUMENTS,
    BAD_CONTENTS,
    BAD_INPUT_CASE,
    CASES,
    KEYS_OF_RAGGED,
    AttentionCase,
    all_cases,
    dense_attention,
    detached,
    in_float64,
    refusals,
    shared_op_arguments,
)
from closeness import assert_close
from pairwise import pairwise
from ragged import BATCHES, RaggedBatch
from torch.utils.flop_counter import FlopCounterMode

import stamp_kernels.flops  # noqa: F401  (registers the formula)
from stamp_kernels.ops.attention.attention_centrality import attention_centrality
from stamp_kernels.ops.attention.packed_attention import packed_attention

OP = torch.ops.stamp.attention_centrality.default


def with_lse(inputs):
    """Keyword arguments of attention_centrality from packed_attention's; the lse of tail rows is NaN."""
    lse = packed_attention(**inputs, return_lse=True).lse.detach()
    lse[:, int(inputs["cu_seqlens_q"][-1]) :] = torch.nan
    return named_for_centrality(inputs) | dict(lse=lse)


def named_for_centrality(inputs):
    """packed_attention's keyword arguments under attention_centrality's names, without those that it does not have."""
    names = {name: name for name in inputs if name not in ("v", "dropout_p", "dropout_seed")}
    if "centrality_query_mask" in names:
        names["centrality_query_mask"] = "query_mask"
    return {new: inputs[name] for name, new in names.items()}


def op_arguments(inputs):
    inputs = detached(inputs)
    return (
        inputs["q"],
        inputs["k"],
        with_lse(inputs)["lse"],
        *shared_op_arguments(inputs),
        inputs.get("centrality_query_mask"),
    )


@pytest.mark.core
@all_cases
def test_column_sums_of_the_softmax(backend, case):
    inputs = case.inputs()  # tail rows of q and k hold NaN; only packed_attention has dropout
    got = attention_centrality(**with_lse(inputs))
    assert not got.requires_grad
    assert_close(got, dense_attention(**inputs).centrality)
    assert_close(got, packed_attention(**inputs, return_centrality=True).centrality)
    assert not got[(case.batch_k or case.batch).valid :].any()  # NaN is true


def test_equals_lse_of_transposed_attention(backend):
    """log centrality_j = logsumexp over queries i of (s_ij - lse_i): the lse of attention from the keys to the queries.

    Eight more features add - lse_i to its scores: 1, 0, ... in the keys and - lse_i, 0, ... in the queries.
    """
    case = AttentionCase(batch_k=KEYS_OF_RAGGED, scale=0.3)
    inputs = detached(case.inputs())
    centrality = attention_centrality(**with_lse(inputs))

    lse = with_lse(inputs)["lse"]
    minus_lse = torch.zeros(*inputs["q"].shape[:2], 8, dtype=torch.float64)
    minus_lse[..., 0] = (-lse.t() / case.scale).masked_fill(lse.t().isneginf(), 0)
    one = torch.zeros(*inputs["k"].shape[:2], 8, dtype=torch.float64)
    one[..., 0] = 1
    queries, keys = torch.cat([inputs["q"], minus_lse], -1), torch.cat([inputs["k"], one], -1)
    transposed = packed_attention(
        keys, queries, torch.zeros_like(queries), inputs["cu_seqlens_k"], inputs["cu_seqlens_q"],
        inputs["max_seqlen_k"], inputs["max_seqlen_q"], scale=case.scale, return_lse=True,
    )  # fmt: skip
    valid = case.batch_k.valid
    assert_close(centrality[:valid], transposed.lse[:, :valid].exp().sum(0))


def test_every_query_counts_once(backend):
    case = AttentionCase(batch_k=KEYS_OF_RAGGED, causal=True, heads=(4, 2), query_mask=True)
    inputs = with_lse(case.inputs())
    sees_a_key = ~inputs["lse"][0, : case.batch.valid].isneginf()
    total = 4 * (sees_a_key & inputs["query_mask"][: case.batch.valid]).sum()
    assert_close(attention_centrality(**inputs).sum(), total.double())


def test_masked_queries_may_hold_anything(backend):
    inputs = with_lse(CASES["causal"].inputs())
    want = attention_centrality(**inputs)
    inputs["q"] = inputs["q"].detach().masked_fill(~inputs["query_mask"][:, None, None], 3.0)
    assert torch.equal(attention_centrality(**inputs), want)


@pairwise(
    indirect=["backend"],
    head_dim=[8, 40, 48, 64, 80, 256],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    backend=["auto", "reference"],
)
def test_lower_precision(backend, head_dim, dtype):
    inputs = AttentionCase(head_dim=head_dim, heads=(4, 2), causal=True, bias="unidirectional", query_mask=True).inputs(
        dtype
    )
    got = attention_centrality(**with_lse(inputs))
    assert got.dtype == torch.float32
    assert_close(got, dense_attention(**in_float64(inputs)).centrality)


def test_strided_views(backend):
    batch = BATCHES["ragged"]
    q, k, _ = torch.randn(batch.total, 3, 2, 16, dtype=torch.float64).unbind(1)
    inputs = dict(q=q, k=k, v=k, cu_seqlens_q=batch.cu_seqlens, max_seqlen_q=batch.max_seqlen)
    arguments = with_lse(inputs)
    arguments["lse"] = arguments["lse"].t().contiguous().t()
    assert_close(attention_centrality(**arguments), dense_attention(**inputs).centrality)


def test_two_runs_give_the_same_bits():
    inputs = with_lse(CASES["causal_bias_positions"].inputs(torch.float32))
    assert torch.equal(attention_centrality(**inputs), attention_centrality(**inputs))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("causal", torch.float32),
        ("causal_bias_positions", torch.bfloat16),
        ("cross_bias_positions", torch.float64),
        ("all_empty", torch.float16),
    ],
)
def test_opcheck(name, dtype):
    torch.library.opcheck(OP, op_arguments(CASES[name].inputs(dtype)))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_compiled(cross):
    torch._dynamo.reset()
    compiled = torch.compile(attention_centrality, backend="aot_eager", fullgraph=True, dynamic=True)
    batches = [((5, 2), (3, 4)), ((2, 7, 3), (6, 1, 2)), ((3, 2, 2, 9), (4, 4, 4, 4))]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths, lengths_k in batches:
            batch_k = RaggedBatch(lengths_k, tail=3) if cross else None
            inputs = AttentionCase(
                RaggedBatch(lengths, tail=2), batch_k, bias="unidirectional", positions=True, query_mask=True
            ).inputs()
            arguments = with_lse(inputs)  # its q, k and table require grad
            assert torch.equal(compiled(**arguments), attention_centrality(**arguments))


def test_autocast(backend):
    inputs = AttentionCase(bias="bidirectional").inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        arguments = with_lse(inputs)
        got = attention_centrality(**arguments)
    rounded = {name: inputs[name].bfloat16() for name in ("q", "k")}
    assert got.dtype == torch.float32
    assert torch.equal(got, attention_centrality(**arguments | rounded))


def test_flop_count():
    case = AttentionCase(batch_k=KEYS_OF_RAGGED, heads=(4, 2))
    arguments = with_lse(case.inputs())
    pairs = sum(n_q * n_k for n_q, n_k in zip(case.batch.lengths, case.batch_k.lengths, strict=True))
    with FlopCounterMode(display=False) as counter:
        attention_centrality(**arguments)
    assert counter.get_total_flops() == 2 * pairs * 4 * 16


@refusals(
    [
        *BAD_ARGUMENTS,
        (dict(lse=torch.zeros(31, 4)), r"lse must have shape \[4, 31\], got \[31, 4\]"),
        (dict(lse=torch.zeros(4, 31)), "lse must have dtype torch.float64, got torch.float32"),
        (dict(lse=torch.zeros(4, 31, device="meta", dtype=torch.float64)), "lse must be on cpu, got meta"),
        (dict(lse=None), "lse must be a tensor, got NoneType"),
    ]
)
def test_bad_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        attention_centrality(**with_lse(BAD_INPUT_CASE.inputs()) | named_for_centrality(changed))


@refusals(BAD_CONTENTS)
def test_bad_contents(backend, changed, message):
    with pytest.raises(RuntimeError, match=message):
        attention_centrality(**with_lse(BAD_INPUT_CASE.inputs()) | named_for_centrality(changed))
