"""The Triton backward of packed attention, interpreted where there is no GPU, against gradients in float64."""

import itertools
from typing import Any

import pytest
import torch
from attention_cases import (
    CASES,
    FEW_QUERIES,
    KEYS_OF_FEW_QUERIES,
    KEYS_OF_RAGGED,
    AttentionCase,
    all_cases,
    assert_results_close,
    dense_attention,
    detached,
    forward_and_backward,
    in_float64,
    shared_op_arguments,
    small_integers,
)
from closeness import assert_close
from op_kernels import launcher, reference
from ragged import BATCHES, RaggedBatch
from row_layouts import mixed_layouts
from torch import Tensor

from stamp_kernels.triton_kernels.aot import TARGETS
from stamp_kernels.triton_kernels.attention import backward as attention_backward
from stamp_kernels.triton_kernels.attention.bias_gradient import sum_over_tiles
from stamp_kernels.triton_kernels.attention.configs import backward_config
from stamp_kernels.triton_kernels.device import H100

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADIENTS = ("dq", "dk", "dv", "dbias_table")

# More than one block of queries and of keys with most tiles, and a part of a block at the end.
LONG = RaggedBatch((67, 3, 0, 130, 33), tail=2)
LONG_KEYS = RaggedBatch((130, 2, 5, 70, 0), tail=1)


def on_device(x: Any) -> Any:
    return x.to(DEVICE) if isinstance(x, Tensor) else x


def backward(
    inputs: dict[str, Any], needs: dict[str, bool] | None = None, **changed: Tensor | int
) -> dict[str, Tensor]:
    """The kernels' gradients by name, for the incoming gradient of `forward_and_backward`: NaN on tail rows."""
    inputs = detached(inputs) | changed
    dropout = (inputs.get("dropout_p", 0.0), inputs.get("dropout_seed"))
    arguments = shared_op_arguments(inputs)
    qkv = tuple(inputs[name] for name in ("q", "k", "v"))
    out, lse, _ = reference("packed_attention_forward")(*qkv, *arguments, None, *dropout, False)
    grad_out = inputs.get("grad_out")
    if grad_out is None:
        grad_out = small_integers(out)
        grad_out[int(inputs["cu_seqlens_q"][-1]) :] = torch.nan
    out[int(inputs["cu_seqlens_q"][-1]) :] = torch.nan
    lse[:, int(inputs["cu_seqlens_q"][-1]) :] = torch.nan
    needs = needs or {name: name != "dbias_table" or "relative_bias" in inputs for name in GRADIENTS}
    arguments = (grad_out, *qkv, out, lse, *arguments, *dropout, *(needs.get(name, False) for name in GRADIENTS))
    gradients = launcher("packed_attention_backward")(*map(on_device, arguments))
    for name, gradient in zip(GRADIENTS, gradients, strict=True):
        assert needs.get(name, False) or gradient.shape == (0,), name
    return {name: x.cpu() for name, x in zip(GRADIENTS, gradients, strict=True) if needs.get(name, False)}


def assert_right(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    want = forward_and_backward(dense_attention, in_float64(inputs))
    assert_results_close(backward(inputs), {name: want[name] for name in GRADIENTS if name in want}, dtype)


@pytest.mark.parametrize("arch", TARGETS)
def test_tiles_suit_the_architecture(arch):
    device = TARGETS[arch]
    for head_dim, dtype, max_q, max_k, has_bias, has_dropout, has_positions in itertools.product(
        (8, 64, 72, 128, 192, 256), (torch.bfloat16, torch.float32), (4, 16, 40, 120, 4096), (4, 16, 40, 120, 4096),
        (False, True), (False, True), (False, True),
    ):  # fmt: skip
        queries, keys = backward_config(
            device, head_dim, dtype, max_q, max_k, has_bias=has_bias, has_dropout=has_dropout,
            has_positions=has_positions,
        )  # fmt: skip
        # Triton 3.6 does not compile the bias gradient on tiles of 32 or 64 queries and 16 keys.
        assert queries.block_m == 16 or queries.block_n >= 32
        for config, passes_over in ((queries, max_k <= queries.block_n), (keys, max_q <= keys.block_m)):
            assert config.block_m in (16, 32, 64, 128) and config.block_n in (16, 32, 64, 128)
            assert config.num_warps in (1, 2, 4, 8)
            assert not passes_over or config.num_stages == 1  # nothing to load ahead
            rows = config.block_m if config is queries else config.block_n
            if arch == 90 and dtype == torch.bfloat16 and rows >= 64 and config.num_warps >= 4:
                assert config.num_warps * 16 <= rows  # more warps compute the same rows again
        if dtype == torch.bfloat16 and head_dim > 128 and max_q > 64 and max_k > 64:
            # 64 queries take 131,072 bytes, and a block of sm_86 or sm_120 has 101,376.
            assert keys.block_m == (64 if device.shared_memory >= 131072 else 32)


@all_cases
def test_matches_dense_attention(case):
    assert_right(case, torch.float32)


@pytest.mark.parametrize("name", ["causal", "gqa", "bias_positions", "cross_bias", "dropout_everything", "no_keys"])
def test_matches_dense_attention_in_fp16(name):
    assert_right(CASES[name], torch.float16)


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [
        (8, torch.float16), (48, torch.float32), (64, torch.float16), (80, torch.float16), (96, torch.float32),
        (256, torch.float16), (256, torch.float32),
    ],
    ids=str,
)  # fmt: skip
def test_head_dims(head_dim, dtype):
    assert_right(AttentionCase(heads=(2, 1), head_dim=head_dim, causal=True, bias="unidirectional"), dtype)


@pytest.mark.parametrize("has_whole_blocks", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(LONG, heads=(2, 1), causal=True),
        AttentionCase(LONG, heads=(1, 1), bias="bidirectional", positions=True),
        AttentionCase(LONG, heads=(1, 1), bias="bidirectional"),
        AttentionCase(LONG, LONG_KEYS, heads=(2, 1), causal=True, bias="unidirectional"),
        AttentionCase(LONG, LONG_KEYS, heads=(1, 1), bias="bidirectional", positions=True),
        AttentionCase(RaggedBatch((1, 70), tail=1), heads=(1, 1), causal=True, dropout_p=0.4),
        AttentionCase(RaggedBatch((40, 2), 0), RaggedBatch((75, 3), 0), heads=(2, 1), head_dim=64, dropout_p=0.4),
    ],
    ids=["causal", "bias_positions", "bias", "cross_causal_bias", "cross_bias_positions", "causal_dropout",
         "cross_dropout"],
)  # fmt: skip
def test_more_than_one_block(monkeypatch, case, has_whole_blocks):
    monkeypatch.setattr(attention_backward, "has_whole_blocks", lambda *_: has_whole_blocks)
    assert_right(case, torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_order_of_tiles_changes_no_bit(causal):
    """By sequence, in a list, and by a search; the bias gradient adds up its tiles in their order."""
    batch = RaggedBatch((128, 100, 120, 65, 128), tail=100)
    inputs = AttentionCase(batch, bias="unidirectional", causal=causal, tiles=True).inputs(torch.float16)
    listed = backward(inputs, max_seqlen_q=1000)
    del inputs["tiles_q"]
    searched = backward(inputs, max_seqlen_q=1000)
    by_sequence = backward(inputs)
    for name in ("dq", "dk", "dv"):
        assert torch.equal(listed[name], by_sequence[name]) and torch.equal(searched[name], by_sequence[name]), name
    assert_close(listed["dbias_table"], by_sequence["dbias_table"], torch.float16)
    assert_close(searched["dbias_table"], by_sequence["dbias_table"], torch.float16)


@pytest.mark.parametrize("lengths", [(70, 3), (16, 17, 100), (1, 64)], ids=str)
def test_key_tiles_of_more_queries_than_query_tiles(lengths):
    case = AttentionCase(RaggedBatch(lengths, tail=1), heads=(2, 1), head_dim=136, bias="bidirectional")
    config = dict(has_bias=True, has_dropout=False, has_positions=False)
    queries, keys = backward_config(H100, 136, torch.float16, max(lengths), max(lengths), **config)
    assert queries.block_m < keys.block_m
    assert_right(case, torch.float16)


@pytest.mark.parametrize("num_buckets", [4, 6, 20, 32])
def test_numbers_of_buckets(num_buckets):
    inputs = AttentionCase(BATCHES["long_among_short"], heads=(3, 1), bias="bidirectional").inputs(torch.float32)
    bias = inputs["relative_bias"]
    table = torch.randn(num_buckets, 3, requires_grad=True)
    inputs["relative_bias"] = type(bias)(table, bias.bidirectional, 40)
    want = forward_and_backward(dense_attention, in_float64(inputs))["dbias_table"]
    assert_close(backward(inputs, {"dbias_table": True})["dbias_table"], want, torch.float32)


def test_many_sequences():
    """More sequences than a program searches in one step, and more tiles than one step of the bias gradient adds."""
    batch = RaggedBatch(tuple(i % 3 for i in range(130)), tail=4)
    assert_right(AttentionCase(batch, heads=(1, 1), head_dim=8, bias="bidirectional"), torch.float32)


@pytest.mark.parametrize("order", ["equal", "falling", "random", "late"])
def test_bias_gradient_of_any_positions(order):
    """Positions that do not fall are searched; the others take a pass for each bucket. Times may be far from 0."""
    batch = RaggedBatch((70, 5, 33), tail=1)
    inputs = AttentionCase(batch, heads=(2, 1), bias="bidirectional", positions=True).inputs(torch.float32)
    positions = inputs["positions_q"]
    inputs["positions_q"] = {
        "equal": positions // 4,
        "falling": 400 - positions,
        "random": torch.randint(0, 60, positions.shape, dtype=torch.int32),
        "late": positions + 1_700_000_000,
    }[order]
    want = forward_and_backward(dense_attention, in_float64(inputs))
    got = backward(inputs)
    assert_close(got["dbias_table"], want["dbias_table"], torch.float32)
    assert_close(got["dq"], want["dq"], torch.float32)


def test_only_what_is_needed():
    """None of the gradients, each one by itself, and all but one: the same bits as all of them."""
    case = AttentionCase(
        RaggedBatch((3, 0, 7), tail=1), heads=(2, 1), causal=True, bias="unidirectional", positions=True, dropout_p=0.3
    )
    inputs = case.inputs(torch.float32)
    every = backward(inputs)
    alone = [{name} for name in GRADIENTS]
    for needed in [set(), *alone, *(set(GRADIENTS) - one for one in alone)]:
        got = backward(inputs, {name: name in needed for name in GRADIENTS})
        assert got.keys() == needed
        assert all(torch.equal(got[name], every[name]) for name in needed), needed


def test_tail_rows_and_rows_without_partner_are_zero():
    case = AttentionCase(batch_k=KEYS_OF_RAGGED, causal=True, bias="unidirectional")
    gradients = backward(case.inputs(torch.float32))
    assert not gradients["dq"][[0, 1, 5, 6, 7]].any()  # they see no key
    assert not gradients["dq"][case.batch.valid :].any()  # NaN is true
    keys_without_query = KEYS_OF_RAGGED.slices()[1]
    for name in ("dk", "dv"):
        assert not gradients[name][keys_without_query].any(), name
        assert not gradients[name][KEYS_OF_RAGGED.valid :].any(), name


def test_strided_inputs():
    """q, k, v as views of one projection; expanded gradients; rows whose distance is not a multiple of 8."""
    batch = BATCHES["ragged"]
    case = AttentionCase(batch, head_dim=16, causal=True)
    qkv = torch.randn(batch.total, 3, 2, 16)
    odd = torch.randn(batch.total, 2 * 16 + 1)[:, :-1].unflatten(1, (2, 16))
    grad_out = torch.randn(1, 1, 16).expand(batch.total, 2, 16)
    summed = torch.ones(()).expand(batch.total, 2, 16)  # the gradient of a sum
    for views, grad in ((qkv.unbind(1), grad_out), ((odd, *qkv.unbind(1)[1:]), summed)):
        strided = dict(zip(("q", "k", "v"), views, strict=True)) | {"grad_out": grad}
        contiguous = {name: x.contiguous() for name, x in strided.items()}
        inputs = case.inputs(torch.float32)
        got, want = backward(inputs, **strided), backward(inputs, **contiguous)
        assert all(torch.equal(got[name], want[name]) for name in want)


@mixed_layouts
def test_rows_anywhere_in_memory(layouts):
    """`promises_are_kept` checks what the compiler is promised."""
    inputs = AttentionCase(RaggedBatch((5, 0, 9), tail=1), head_dim=24).inputs(torch.float16)
    want = forward_and_backward(dense_attention, in_float64(inputs))
    rows = {name: inputs[name].detach() for name in ("q", "k", "v")}
    rows["grad_out"] = small_integers(rows["q"])
    got = backward(inputs, **{name: layout(x) for layout, (name, x) in zip(layouts, rows.items(), strict=True)})
    assert_results_close(got, {name: want[name] for name in got}, torch.float16)


@pytest.mark.parametrize("name", ["causal_bias_positions", "dropout_everything"])
def test_two_runs_give_the_same_bits(name):
    inputs = CASES[name].inputs(torch.float32)
    first, second = backward(inputs), backward(inputs)
    assert all(torch.equal(first[part], second[part]) for part in first)


def test_same_bits_alone_and_in_a_batch():
    case = AttentionCase(RaggedBatch((5, 0, 70, 1, 19), tail=1), heads=(2, 1), causal=True, bias="unidirectional",
                         positions=True)  # fmt: skip
    inputs = detached(case.inputs(torch.float32))
    grad_out = torch.randn(case.batch.total, 2, 16)
    together = backward(inputs, grad_out=grad_out)
    for rows in case.batch.slices():
        alone = {name: inputs[name][rows] for name in ("q", "k", "v", "positions_q")}
        alone["cu_seqlens_q"] = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        gradients = backward(inputs | alone, grad_out=grad_out[rows])  # the batch's max_seqlen
        for name in ("dq", "dk", "dv"):
            assert torch.equal(gradients[name], together[name][rows]), name


@pytest.mark.parametrize("max_seqlen", [14, 33, 4096])
def test_max_seqlen_may_be_an_upper_bound(max_seqlen):
    inputs = CASES["dropout_everything"].inputs(torch.float32)
    want = forward_and_backward(dense_attention, in_float64(inputs))
    got = backward(inputs, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen)
    assert_results_close(got, {name: want[name] for name in got}, torch.float32)


@pytest.mark.parametrize("num_tiles", [0, 1, 512, 513, 2048, 2049, 5000])
def test_sums_over_tiles(num_tiles):
    bucket_sums = torch.randint(-8, 9, (num_tiles, 3, 7), device=DEVICE).float()
    dbias_table = torch.full((7, 3), torch.nan, device=DEVICE)
    sum_over_tiles(dbias_table, bucket_sums)
    assert torch.equal(dbias_table, bucket_sums.sum(0).t())


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_no_heads(dropout_p):
    """Keys that no head reads have gradients of 0."""
    case = AttentionCase(FEW_QUERIES, KEYS_OF_FEW_QUERIES, heads=(0, 1), dropout_p=dropout_p)
    gradients = backward(case.inputs(torch.float32))
    assert gradients["dq"].shape == (FEW_QUERIES.total, 0, 16)
    assert not gradients["dk"].any() and not gradients["dv"].any()
