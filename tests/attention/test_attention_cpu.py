"""The compiled attention of the CPU: every instruction set, sequences of many blocks, and equal bits.

test_packed_attention.py checks what attention is; here is what only these kernels could get wrong.
"""

import pytest
import torch
from attention_cases import (
    CASES,
    DROPOUT_SEED,
    AttentionCase,
    all_cases,
    assert_results_close,
    dense_attention,
    detached,
    forward_and_backward,
    in_float64,
)
from devices import CAPABILITIES
from pairwise import pairwise
from ragged import RaggedBatch

from stamp_kernels._backend import use_backend
from stamp_kernels.ops.attention.attention_centrality import attention_centrality
from stamp_kernels.ops.attention.packed_attention import packed_attention
from stamp_kernels.profiling.measure import peak_bytes
from stamp_kernels.relative_position import RelativePositionBias, relative_position_bucket

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# Instruction sets


@all_cases
def test_every_case_matches_dense_attention(capability, case):
    inputs = case.inputs(torch.float32)
    want = forward_and_backward(dense_attention, in_float64(inputs))
    assert_results_close(forward_and_backward(packed_attention, inputs), want, torch.float32)


@pytest.mark.core
@pairwise(indirect=["capability"], head_dim=[8, 24, 64, 80, 96, 256], dtype=DTYPES, capability=CAPABILITIES)
def test_every_head_dim_and_dtype(capability, head_dim, dtype):
    case = AttentionCase(heads=(4, 2), head_dim=head_dim, causal=True, bias="bidirectional", query_mask=True)
    inputs = case.inputs(dtype)
    want = forward_and_backward(dense_attention, in_float64(inputs))
    assert_results_close(forward_and_backward(packed_attention, inputs), want, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_of_every_value(capability, dtype):
    """With one key of weight 1 out is v, so each value goes through both conversions."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    v = every.view(-1, 1, 256)
    zeros = torch.zeros_like(v)
    cu_seqlens = torch.arange(len(v) + 1, dtype=torch.int32)
    out = packed_attention(zeros, zeros, v, cu_seqlens, max_seqlen_q=1)
    assert torch.equal(out.isnan(), v.isnan())
    assert torch.equal(out.nan_to_num(0, torch.inf, -torch.inf), v.nan_to_num(0, torch.inf, -torch.inf))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_to_the_nearest(capability, dtype):
    """With two keys of weight 1/2 out is the mean, rounded as torch does, over- and underflow included."""
    v = torch.randn(2**14, 1, 64) * 10.0 ** torch.randint(-9, 6, (2**14, 1, 1))
    v = v.to(dtype)
    v = v.masked_fill(v.isinf(), 1.0)
    zeros = torch.zeros_like(v)
    cu_seqlens = torch.arange(0, len(v) + 1, 2, dtype=torch.int32)
    out = packed_attention(zeros, zeros, v, cu_seqlens, max_seqlen_q=2)
    mean = v.float().unflatten(0, (-1, 2)).mul(0.5).sum(1).to(dtype)
    assert torch.equal(out[::2], mean)


# Sequences of many blocks

LONG = RaggedBatch((3, 530, 0, 1090, 257), tail=2)
LONG_KEYS = RaggedBatch((700, 12, 5, 1290, 0), tail=1)


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(LONG, heads=(2, 1), head_dim=40, query_mask=True),
        AttentionCase(LONG, causal=True, bias="unidirectional", query_mask=True, dropout_p=0.2),
        AttentionCase(LONG, bias="bidirectional", positions=True),
        AttentionCase(LONG, LONG_KEYS, heads=(2, 1), causal=True, bias="bidirectional", positions=True, dropout_p=0.1),
        AttentionCase(LONG_KEYS, LONG, query_mask=True, scale=0.9),
    ],
    ids=["grouped", "causal_bias_dropout", "positions", "cross_everything", "cross"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sequences(case, dtype):
    inputs = case.inputs(dtype)
    with use_backend("reference"):
        want = forward_and_backward(packed_attention, in_float64(inputs))
    assert_results_close(forward_and_backward(packed_attention, inputs), want, dtype)


def test_centrality_of_long_sequences_from_lse():
    inputs = detached(AttentionCase(LONG, causal=True, heads=(4, 2), query_mask=True).inputs(torch.float32))
    fused = packed_attention(**inputs, return_lse=True, return_centrality=True)
    del inputs["v"]
    with use_backend("reference"):
        want = attention_centrality(inputs["q"], inputs["k"], fused.lse, LONG.cu_seqlens,
                                    max_seqlen_q=LONG.max_seqlen, causal=True,
                                    query_mask=inputs["centrality_query_mask"])  # fmt: skip
    got = attention_centrality(
        inputs["q"], inputs["k"], fused.lse, LONG.cu_seqlens, max_seqlen_q=LONG.max_seqlen, causal=True,
        query_mask=inputs["centrality_query_mask"],
    )  # fmt: skip
    for centrality in (fused.centrality, got):
        assert_results_close({"centrality": centrality}, {"centrality": want.double()})


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 20), (8, 12), (16, 1000), (64, 4096)])
def test_buckets_are_those_of_the_formula(num_buckets, max_distance, bidirectional):
    """Each sequence is one query and one key, so lse is the score, and the score is the number of the bucket."""
    distances = torch.cat([torch.arange(-200, 201), torch.arange(-5000, 5001, 97)]).to(torch.int32)
    table = torch.arange(num_buckets, dtype=torch.float32)[:, None]
    total = len(distances)
    zeros = torch.zeros(total, 1, 8)
    cu_seqlens_q, cu_seqlens_k = torch.arange(2 * total + 2, dtype=torch.int32).remainder(total + 1).chunk(2)
    result = packed_attention(
        zeros, zeros, zeros, cu_seqlens_q, cu_seqlens_k, 1, 1,
        relative_bias=RelativePositionBias(table, bidirectional, max_distance),
        positions_q=torch.zeros(total, dtype=torch.int32), positions_k=distances, return_lse=True,
    )  # fmt: skip
    want = relative_position_bucket(
        distances, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    assert torch.equal(result.lse[0], want.float())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("lengths", [(5, 40), (5, 600)], ids=["fused", "from_lse"])
def test_masked_query_leaves_no_trace_in_centrality(capability, lengths, value):
    """Not even a NaN: it is left out, not multiplied by 0."""
    inputs = detached(AttentionCase(RaggedBatch(lengths, tail=0), heads=(4, 2)).inputs(torch.float32))
    mask = torch.rand(sum(lengths)) < 0.6
    mask[[2, 9]] = False
    inputs["centrality_query_mask"] = mask
    want = packed_attention(**inputs, return_centrality=True).centrality
    inputs["q"][[2, 9]] = value
    got = packed_attention(**inputs, return_lse=True, return_centrality=True)
    assert torch.equal(got.centrality, want)
    from_lse = attention_centrality(
        inputs["q"], inputs["k"], got.lse, inputs["cu_seqlens_q"], max_seqlen_q=max(lengths), query_mask=mask
    )
    assert_results_close({"centrality": from_lse}, {"centrality": want.double()})


@pytest.mark.parametrize("scale", [0.0, 0.125])
def test_centrality_of_equal_weights_keeps_its_digits(capability, scale):
    batch = RaggedBatch((439, 900), tail=0)
    inputs = AttentionCase(batch, heads=(4, 2), scale=scale).inputs(torch.float32)
    want = dense_attention(**detached(in_float64(inputs))).centrality
    got = packed_attention(**detached(inputs), return_centrality=True).centrality
    assert_results_close({"centrality": got}, {"centrality": want})


# Positions with distances of up to 2^30 - 1, which a table of distances could not hold


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 30_000_000), (64, 10**12), (6, 5000)])
def test_buckets_of_distant_positions(num_buckets, max_distance, bidirectional):
    """Random distances of every size, and those on both sides of each bucket's first distance."""
    table = torch.arange(num_buckets, dtype=torch.float32)[:, None]

    def buckets(distances: torch.Tensor) -> torch.Tensor:
        return relative_position_bucket(
            distances, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
        )

    first, last = torch.zeros(num_buckets, dtype=torch.int64), torch.full((num_buckets,), 2**30 - 1)
    numbers = buckets(-last)[0] - torch.arange(num_buckets)  # bisect for the first distance of each bucket
    for _ in range(31):
        middle = (first + last) // 2
        reaches = buckets(-middle) >= numbers
        first, last = torch.where(reaches, first, middle + 1), torch.where(reaches, middle, last)
    near = (first[:, None] + torch.arange(-2, 3)).flatten()
    random = (2 ** (30 * torch.rand(2000, dtype=torch.float64))).long()
    distances = torch.cat([near, random, -near, -random, torch.tensor([2**30 - 1])]).clamp(1 - 2**30, 2**30 - 1)
    distances = distances.to(torch.int32)
    total = len(distances)
    zeros = torch.zeros(total, 1, 8)
    offsets = torch.arange(total + 1, dtype=torch.int32)
    result = packed_attention(
        zeros, zeros, zeros, offsets, offsets, 1, 1,
        relative_bias=RelativePositionBias(table, bidirectional, max_distance),
        positions_q=torch.zeros(total, dtype=torch.int32), positions_k=distances, return_lse=True,
    )  # fmt: skip
    assert torch.equal(result.lse[0], buckets(distances).float())


@pytest.mark.parametrize("case", ["bias_positions", "cross_bias_positions"])
def test_distant_positions_match_dense_attention(capability, case):
    inputs = CASES[case].inputs(torch.float32)
    for name in {"positions_q", "positions_k"} & inputs.keys():
        inputs[name] *= 100_000
    bias = inputs["relative_bias"]
    inputs["relative_bias"] = RelativePositionBias(bias.table, bias.bidirectional, 30_000_000)
    want = forward_and_backward(dense_attention, in_float64(inputs))
    assert_results_close(forward_and_backward(packed_attention, inputs), want, torch.float32)


def test_memory_does_not_grow_with_positions():
    """The bias of 64 tokens took 1.8 GiB at positions of 3e7."""
    inputs = detached(AttentionCase(RaggedBatch((64,), tail=0), bias="bidirectional").inputs(torch.float32))
    inputs["relative_bias"] = RelativePositionBias(inputs["relative_bias"].table, True, 30_000_000)
    inputs["positions_q"] = torch.arange(64, dtype=torch.int32) * 500_000
    assert peak_bytes(lambda: packed_attention(**inputs), torch.device("cpu")) < 2**20


def test_positions_too_far_apart():
    inputs = detached(AttentionCase(bias="bidirectional", positions=True).inputs(torch.float32))
    inputs["positions_q"][0] = 2**31 - 1
    with pytest.raises(
        RuntimeError, match=r"positions_q and positions_k must lie at most 1073741823 apart, got .* 214748"
    ):
        packed_attention(**inputs)


# Bits


@pairwise(indirect=["capability"], dtype=[*DTYPES, torch.float64], causal=[False, True], capability=CAPABILITIES)
def test_sequence_has_same_bits_in_any_batch(capability, causal, dtype):
    lengths = (5, 300, 5, 0, 64, 17, 1, 640, 64, 5)
    batch = RaggedBatch(lengths, tail=1)
    case = AttentionCase(batch, heads=(4, 2), head_dim=24, causal=causal, bias="bidirectional", positions=True)
    inputs = case.inputs(dtype) | dict(max_seqlen_q=700)
    together = forward_and_backward(packed_attention, inputs)
    for rows in batch.slices():
        n = rows.stop - rows.start
        alone = {name: inputs[name][rows].detach().requires_grad_() for name in ("q", "k", "v")}
        alone |= dict(positions_q=inputs["positions_q"][rows], cu_seqlens_q=torch.tensor([0, n], dtype=torch.int32))
        output = packed_attention(**inputs | alone, return_lse=True, return_centrality=True)
        assert torch.equal(output.out, together["out"][rows])
        assert torch.equal(output.lse, together["lse"][:, rows])
        assert torch.equal(output.centrality, together["centrality"][rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_same_bits_in_any_batch(capability, dtype):
    batch = RaggedBatch((5, 300, 5, 0, 64, 17, 1, 640, 64, 5), tail=0)
    inputs = AttentionCase(batch, heads=(4, 2), head_dim=24, bias="bidirectional").inputs(dtype)
    grad = torch.randn_like(inputs["q"])
    names = ("q", "k", "v")
    together = torch.autograd.grad(packed_attention(**inputs), [inputs[name] for name in names], grad)
    for rows in batch.slices():
        alone = {name: inputs[name][rows].detach().requires_grad_() for name in names}
        cu_seqlens = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        out = packed_attention(**inputs | alone | dict(cu_seqlens_q=cu_seqlens))
        gradients = torch.autograd.grad(out, [alone[name] for name in names], grad[rows])
        for got, want in zip(gradients, together, strict=True):
            assert torch.equal(got, want[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_count_does_not_change_bits(dtype):
    batch = RaggedBatch((*range(40), 700, 3, 260), tail=1)
    case = AttentionCase(batch, heads=(4, 2), causal=True, bias="bidirectional", positions=True, dropout_p=0.3)
    inputs = case.inputs(dtype)
    threads = torch.get_num_threads()
    runs = []
    try:
        for number in (1, 2, 3, 3):
            torch.set_num_threads(number)
            runs.append(forward_and_backward(packed_attention, inputs))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in runs[0])


# Layouts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_of_a_packed_projection(dtype):
    batch = RaggedBatch((5, 0, 90, 13), tail=2)
    packed = torch.randn(batch.total, 3, 4, 24).to(dtype)
    q, k, v = packed.unbind(1)
    grad = torch.randn(batch.total, 4, 24).to(dtype)

    def run(q, k, v, grad):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        output = packed_attention(*leaves, batch.cu_seqlens, max_seqlen_q=batch.max_seqlen, dropout_p=0.1,
                                  dropout_seed=torch.tensor([DROPOUT_SEED]), return_lse=True)  # fmt: skip
        return output.out, output.lse, *torch.autograd.grad(output.out, leaves, grad)

    want = run(q.contiguous(), k.contiguous(), v.contiguous(), grad)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad)]
    expanded = grad[:1, :1].expand_as(grad)
    for got in (run(q, k, v, grad), run(*transposed)):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for got, other in zip(run(q, k, v, expanded), run(q, k, v, expanded.contiguous()), strict=True):
        assert torch.equal(got, other)
