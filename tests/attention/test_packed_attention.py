"""packed_attention against torch's attention: values, gradients, torch.compile, autocast, FLOPs, and what is refused.

test_attention_bias.py has T5's bias, test_attention_dropout.py the dropout.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    BAD_ARGUMENTS,
    BAD_CONTENTS,
    BAD_INPUT_CASE,
    CASES,
    KEYS_OF_RAGGED,
    AttentionCase,
    all_cases,
    assert_results_close,
    dense_attention,
    detached,
    forward_and_backward,
    in_float64,
    leaves,
    refusals,
    shared_op_arguments,
    small_integers,
)
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from pairwise import pairwise
from ragged import BATCHES, RaggedBatch, ragged_batches
from torch.utils.flop_counter import FlopCounterMode

import stamp_kernels.flops  # noqa: F401  (registers the formulas)
from stamp_kernels._backend import use_backend
from stamp_kernels.ops.attention.packed_attention import packed_attention
from stamp_kernels.relative_position import RelativePositionBias

FORWARD = torch.ops.stamp.packed_attention_forward.default
BACKWARD = torch.ops.stamp.packed_attention_backward.default


def forward_arguments(inputs):
    inputs = detached(inputs)
    return (
        *(inputs[name] for name in ("q", "k", "v")),
        *shared_op_arguments(inputs),
        inputs.get("centrality_query_mask"),
        inputs.get("dropout_p", 0.0),
        inputs.get("dropout_seed"),
        True,
    )


def backward_arguments(inputs, needs):
    inputs = detached(inputs)
    out, lse, _ = FORWARD(*forward_arguments(inputs))
    return (
        small_integers(out),
        *(inputs[name] for name in ("q", "k", "v")),
        out,
        lse,
        *shared_op_arguments(inputs),
        inputs.get("dropout_p", 0.0),
        inputs.get("dropout_seed"),
        *needs,
    )


# Values


@pytest.mark.core
@all_cases
def test_matches_dense_attention(backend, case):
    inputs = case.inputs()
    assert_results_close(forward_and_backward(packed_attention, inputs), forward_and_backward(dense_attention, inputs))


@given(
    batch=ragged_batches(), keys=st.lists(st.integers(0, 12), min_size=6, max_size=6), causal=st.booleans(),
    cross=st.booleans(),
)  # fmt: skip
def test_any_lengths_match_dense_attention(batch, keys, causal, cross):
    torch.manual_seed(0)  # for every example, so that hypothesis can repeat a failure
    # One more sequence: if every query saw a single key, the gradients of the scores would have no relative error.
    batch = RaggedBatch((*batch.lengths, 5), batch.tail)
    batch_k = RaggedBatch((*keys[: batch.num_sequences - 1], 4), tail=1) if cross else None
    inputs = AttentionCase(batch, batch_k, heads=(2, 1), head_dim=8, causal=causal, bias="bidirectional").inputs()
    want = forward_and_backward(dense_attention, inputs)
    for name in ("auto", "reference"):
        with use_backend(name):
            assert_results_close(forward_and_backward(packed_attention, inputs), want)


@pairwise(
    indirect=["backend"],
    head_dim=[8, 40, 48, 64, 80, 256],
    dtype=[torch.float32, torch.float16, torch.bfloat16],
    backend=["auto", "reference"],
)
def test_lower_precision_matches_dense_attention(backend, head_dim, dtype):
    case = AttentionCase(heads=(4, 2), head_dim=head_dim, causal=True, bias="unidirectional", query_mask=True)
    inputs = case.inputs(dtype)
    want = forward_and_backward(dense_attention, in_float64(inputs))
    got = forward_and_backward(packed_attention, inputs)
    assert got["out"].dtype == got["dq"].dtype == got["dbias_table"].dtype == dtype
    assert got["lse"].dtype == got["centrality"].dtype == torch.float32
    assert_results_close(got, want, dtype)


def test_causal_matches_torch(backend):
    batch, length = 3, 7
    q, k, v = torch.randn(3, batch * length, 2, 8, dtype=torch.float64).unbind(0)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
    padded = (x.unflatten(0, (batch, length)).transpose(1, 2) for x in (q, k, v))
    want = F.scaled_dot_product_attention(*padded, is_causal=True).transpose(1, 2).flatten(0, 1)
    assert_close(packed_attention(q, k, v, cu_seqlens, max_seqlen_q=length, causal=True), want)


def test_thousands_of_short_sequences(backend):
    lengths = torch.arange(5000) % 4
    batch = RaggedBatch(tuple(lengths.tolist()), tail=5)
    inputs = detached(AttentionCase(batch, head_dim=8).inputs())
    valid = torch.arange(3) < lengths[:, None]  # [B, 3]
    padded = []
    for name in ("q", "k", "v"):
        x = torch.zeros(5000, 3, 2, 8, dtype=torch.float64)
        x[valid] = inputs[name][: batch.valid]
        padded.append(x.transpose(1, 2))
    want = F.scaled_dot_product_attention(*padded, attn_mask=valid[:, None, None, :]).transpose(1, 2)[valid]
    assert_close(packed_attention(**inputs)[: batch.valid], want)


def test_strided_views_of_one_projection(backend):
    batch = BATCHES["ragged"]
    qkv = torch.randn(batch.total, 3, 2, 16, dtype=torch.float64, requires_grad=True)
    gradients = []
    for views in (qkv.unbind(1), [x.contiguous() for x in qkv.unbind(1)]):
        out = packed_attention(*views, batch.cu_seqlens, max_seqlen_q=batch.max_seqlen)
        gradients.append((out.detach(), *torch.autograd.grad(out.sum(), qkv)))  # a gradient of strides 0
    assert_close(gradients[0][0], gradients[1][0])
    assert_close(gradients[0][1], gradients[1][1])


@pytest.mark.core
@pytest.mark.parametrize("name", ["causal", "cross_bias_positions", "dropout_everything"])
def test_tail_rows_are_zero(backend, name):
    inputs = CASES[name].inputs()  # tail rows hold NaN, also in the incoming gradient
    results = forward_and_backward(packed_attention, inputs)
    valid_q = CASES[name].batch.valid
    valid_k = (CASES[name].batch_k or CASES[name].batch).valid
    for part, valid in (("out", valid_q), ("dq", valid_q), ("dk", valid_k), ("dv", valid_k), ("centrality", valid_k)):
        assert not results[part][valid:].any(), part  # NaN is true
    assert not results["lse"][:, valid_q:].any()


def test_queries_without_keys(backend):
    # n_q = 13 and n_k = 11: aligned bottom-right, the first two queries of sequence 3 come before every key.
    inputs = AttentionCase(batch_k=KEYS_OF_RAGGED, causal=True, bias="unidirectional").inputs()
    results = forward_and_backward(packed_attention, inputs)
    blind = [0, 1, 5, 6, 7]  # n_q = 5 with n_k = 3, n_q = 1 with n_k = 0, n_q = 13 with n_k = 11
    assert results["lse"].isneginf().any(0).nonzero().flatten().tolist() == blind
    assert results["lse"].isneginf().all(0).nonzero().flatten().tolist() == blind
    assert not results["out"][blind].any()
    assert not results["dq"][blind].any()
    assert all(results[name].isfinite().all() for name in ("out", "centrality", *leaves(inputs)))


def test_sequence_alone_as_in_the_batch(backend):
    case = AttentionCase(heads=(4, 2), causal=True, bias="unidirectional", positions=True)
    inputs = case.inputs()
    together = forward_and_backward(packed_attention, inputs)
    grad_out = small_integers(inputs["q"])
    for rows in case.batch.slices():
        alone = {name: inputs[name][rows].detach().requires_grad_() for name in ("q", "k", "v")}
        alone["cu_seqlens_q"] = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        alone["positions_q"] = inputs["positions_q"][rows]
        out, lse, _ = packed_attention(**inputs | alone, return_lse=True)
        wrt = [alone[name] for name in ("q", "k", "v")]
        dq, dk, dv = torch.autograd.grad(out, wrt, grad_out[rows], allow_unused=True, materialize_grads=True)
        for name, x in dict(out=out.detach(), dq=dq, dk=dk, dv=dv).items():
            assert_close(x, together[name][rows])
        assert_close(lse, together["lse"][:, rows])


@pytest.mark.parametrize("name", ["causal_bias_positions", "dropout_everything"])
def test_two_runs_give_the_same_bits(name):
    inputs = CASES[name].inputs(torch.float32)
    first = forward_and_backward(packed_attention, inputs)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        second = forward_and_backward(packed_attention, inputs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[part], second[part]) for part in first)


def test_what_is_returned(backend):
    inputs = CASES["plain"].inputs()
    out = packed_attention(**inputs)
    assert isinstance(out, torch.Tensor) and out.requires_grad
    for lse, centrality in ((True, False), (False, True), (True, True)):
        output = packed_attention(**inputs, return_lse=lse, return_centrality=centrality)
        assert output._fields == ("out", "lse", "centrality")
        assert (output.lse is not None, output.centrality is not None) == (lse, centrality)
        assert not any(x.requires_grad for x in output[1:] if x is not None)
        assert torch.equal(output.out, out)


# Autograd


def test_gradcheck(backend):
    batch = RaggedBatch((3, 0, 2), tail=0)
    case = AttentionCase(batch, RaggedBatch((2, 1, 3), tail=0), heads=(2, 1), head_dim=8, causal=True, dropout_p=0.3,
                         bias="bidirectional")  # fmt: skip
    inputs = case.inputs()
    bias = inputs.pop("relative_bias")

    def attention(q, k, v, table):
        return packed_attention(
            **inputs | dict(q=q, k=k, v=v), relative_bias=RelativePositionBias(table, max_distance=bias.max_distance)
        )

    assert torch.autograd.gradcheck(attention, (inputs["q"], inputs["k"], inputs["v"], bias.table))


NEEDS = ("dq", "dk", "dv", "dbias_table")


@pytest.mark.parametrize("needed", NEEDS)
def test_unneeded_gradients_are_not_computed(needed):
    inputs = CASES["causal_bias_positions"].inputs()
    every = BACKWARD(*backward_arguments(inputs, [True] * 4))
    only = BACKWARD(*backward_arguments(inputs, [name == needed for name in NEEDS]))
    for name, gradient, whole in zip(NEEDS, only, every, strict=True):
        if name == needed:
            assert torch.equal(gradient, whole)
        else:
            assert gradient.shape == (0,)


@pytest.mark.parametrize("needed", NEEDS)
def test_autograd_asks_for_what_is_needed(backend, needed):
    inputs = CASES["bias"].inputs()
    want = forward_and_backward(packed_attention, inputs)[needed]
    frozen = detached(inputs)
    leaf = leaves(frozen)[needed].requires_grad_()
    out = packed_attention(**frozen)
    assert_close(torch.autograd.grad(out, leaf, small_integers(out))[0], want)


def test_raw_forward_is_differentiable():
    inputs = CASES["plain"].inputs()
    out = packed_attention(**inputs)
    raw, _, _ = FORWARD(inputs["q"], *forward_arguments(inputs)[1:])
    grad_out = small_integers(out)
    got, want = (torch.autograd.grad(x, inputs["q"], grad_out)[0] for x in (raw, out))
    assert torch.equal(got, want)


def test_raw_backward_refuses_to_lose_a_gradient():
    inputs = CASES["plain"].inputs()
    with pytest.raises(RuntimeError, match=r"packed_attention_backward.default is the backward of stamp_kernels"):
        BACKWARD(inputs["q"], *backward_arguments(inputs, [True] * 3 + [False])[1:])


# torch.compile, autocast, FLOP counts


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("plain", torch.float32),
        ("causal_bias_positions", torch.bfloat16),
        ("dropout_everything", torch.float64),
        ("all_empty", torch.float16),
    ],
)
def test_opcheck(name, dtype):
    inputs = CASES[name].inputs(dtype)
    torch.library.opcheck(FORWARD, forward_arguments(inputs))
    has_bias = "relative_bias" in inputs
    torch.library.opcheck(BACKWARD, backward_arguments(inputs, [True, True, True, has_bias]))
    torch.library.opcheck(BACKWARD, backward_arguments(inputs, [False, True, False, False]))


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_compiled_training_step(cross):
    def forward(q, k, v, table, others):
        bias = RelativePositionBias(table, bidirectional=False, max_distance=12)
        output = packed_attention(
            q, k, v, **others, causal=True, relative_bias=bias, dropout_p=0.2, return_lse=True,
            return_centrality=True,
        )  # fmt: skip
        return output.out, output.lse, output.centrality

    def step(forward, inputs):
        torch.manual_seed(0)  # the seed of dropout is drawn inside
        others = {name: x for name, x in inputs.items() if name.startswith(("cu_seqlens", "max_seqlen", "positions"))}
        wrt = list(leaves(inputs).values())
        out, lse, centrality = forward(*wrt, others)
        return out.detach(), lse, centrality, *torch.autograd.grad(out, wrt, small_integers(out))

    torch._dynamo.reset()
    compiled = torch.compile(forward, backend="aot_eager", fullgraph=True, dynamic=True)
    batches = [((5, 2), (3, 4)), ((2, 7, 3), (6, 1, 2)), ((3, 2, 2, 9), (4, 4, 4, 4))]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths, lengths_k in batches:
            batch_k = RaggedBatch(lengths_k, tail=3) if cross else None
            case = AttentionCase(RaggedBatch(lengths, tail=2), batch_k, bias="unidirectional", positions=True)
            inputs = case.inputs()
            for got, want in zip(step(compiled, inputs), step(forward, inputs), strict=True):
                assert torch.equal(got, want)


def test_autocast_casts_only_q_k_v(backend):
    inputs = AttentionCase(bias="bidirectional", query_mask=True).inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = forward_and_backward(packed_attention, inputs)
    assert got["out"].dtype == torch.bfloat16
    assert got["lse"].dtype == got["centrality"].dtype == torch.float32
    assert all(got[name].dtype == torch.float32 for name in leaves(inputs))

    rounded = inputs | {name: inputs[name].bfloat16() for name in ("q", "k", "v")}
    want = packed_attention(**rounded, return_lse=True, return_centrality=True)
    assert all(torch.equal(got[name], x) for name, x in want._asdict().items())


def test_autocast_leaves_float64_alone(backend):
    inputs = CASES["plain"].inputs()
    want = forward_and_backward(packed_attention, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_results_close(forward_and_backward(packed_attention, inputs), want)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)), ids=str)
def test_flop_count(needed):
    case = AttentionCase(batch_k=KEYS_OF_RAGGED, heads=(4, 2), causal=True)
    inputs = detached(case.inputs())
    for name, wanted in zip(("q", "k", "v"), needed, strict=True):
        inputs[name].requires_grad_(wanted)
    pairs = sum(n_q * n_k for n_q, n_k in zip(case.batch.lengths, case.batch_k.lengths, strict=True))
    product = 2 * pairs * 4 * 16
    with FlopCounterMode(display=False) as counter:
        out = packed_attention(**inputs)
    assert counter.get_total_flops() == 2 * product
    if any(needed):
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        need_dq, need_dk, _ = needed
        # The scores again, the gradient of the weights unless only dv is needed, and one product for each gradient.
        assert counter.get_total_flops() == (1 + (need_dq or need_dk) + sum(needed)) * product


def test_flop_count_without_contents_is_upper_bound():
    inputs = detached(CASES["cross"].inputs())
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        with FlopCounterMode(display=False) as counter:
            packed_attention(**fake)
    assert counter.get_total_flops() == 2 * 2 * (6 * 13 * 11) * 2 * 16  # B * max_seqlen_q * max_seqlen_k pairs


# Refusals


@pytest.mark.core
@refusals(
    [
        *BAD_ARGUMENTS,
        (dict(v=torch.zeros(31, 4, 8)), r"v must have shape \[31, 2, 8\], got \[31, 4, 8\]"),
        (dict(v=torch.zeros(31, 2, 8)), "v must have dtype torch.float64, got torch.float32"),
        (dict(dropout_p=1.0), r"dropout_p must be in \[0.0, 1.0\), got 1.0"),
        (dict(dropout_p=-0.1), r"dropout_p must be in \[0.0, 1.0\), got -0.1"),
        (dict(dropout_p=float("nan")), r"dropout_p must be in \[0.0, 1.0\), got nan"),
        (dict(dropout_p="0.1"), r"dropout_p must be a number \(not a tensor\), got str"),
        (dict(v=torch.zeros(31, 2, 16, dtype=torch.float64)), r"v: head_dim must be that of q and k, 8, got 16: pad"),
        (dict(causal="yes"), r"causal must be True or False, got 'yes'"),
        (dict(scale="1"), r"scale must be a number \(not a tensor\), got str"),
        (dict(scale=float("inf")), r"scale must be in \[-3.4028234663852886e\+38, .*, got inf"),
        (
            dict(dropout_p=0.1, dropout_seed=torch.zeros(2, dtype=torch.int64)),
            r"dropout_seed must have shape \[1\], got \[2\]",
        ),
        (
            dict(dropout_p=0.1, dropout_seed=torch.zeros(1, dtype=torch.int32)),
            "dropout_seed must have dtype torch.int64, got torch.int32",
        ),
    ]
)
def test_bad_arguments(changed, message):
    with pytest.raises(ValueError, match=message):
        packed_attention(**BAD_INPUT_CASE.inputs() | changed)


@refusals(BAD_CONTENTS)
def test_bad_contents(backend, changed, message):
    with pytest.raises(RuntimeError, match=message):
        packed_attention(**BAD_INPUT_CASE.inputs() | changed)


def test_compiled_with_one_tensor_thrice():
    """Queries are keys and values, offsets and positions are given twice; torch.compile takes each tensor only once."""
    x = torch.randn(7, 2, 8, dtype=torch.float64, requires_grad=True)
    cu_seqlens, positions = torch.tensor([0, 3, 7], dtype=torch.int32), torch.arange(7, dtype=torch.int32)
    table = torch.randn(8, 2, dtype=torch.float64)

    def attend(x):
        bias = RelativePositionBias(table, max_distance=16)
        return packed_attention(
            x, x, x, cu_seqlens, cu_seqlens, 4, 4, relative_bias=bias, positions_q=positions, positions_k=positions
        )

    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(x)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    expected = attend(x)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
    assert_close(out, expected)
    assert_close(grad, expected_grad)


def test_offsets_given_twice_are_cross_attention():
    """Keys may have other tail rows and other positions: 0, 1, ... where none are given."""
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)
    q, k = torch.randn(7, 2, 8, dtype=torch.float64), torch.randn(9, 2, 8, dtype=torch.float64)
    bias = RelativePositionBias(torch.randn(8, 2, dtype=torch.float64), max_distance=16)
    positions = torch.arange(0, 14, 2, dtype=torch.int32)
    results = [
        packed_attention(q, k, k, cu_seqlens, offsets, 4, 4, relative_bias=bias, positions_q=positions)
        for offsets in (cu_seqlens, cu_seqlens.clone())
    ]
    assert torch.equal(*results)
