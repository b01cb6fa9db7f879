"""Buckets of distances far beyond a table's size, interpreted where there is no GPU, against the formula."""

from typing import Any

import pytest
import torch
from attention_cases import (
    CASES,
    AttentionCase,
    assert_results_close,
    dense_attention,
    detached,
    forward_and_backward,
    in_float64,
    shared_op_arguments,
    small_integers,
)
from op_kernels import launcher
from ragged import RaggedBatch
from torch import Tensor

pytest.importorskip("triton")

from stamp_kernels.relative_position import RelativePositionBias, relative_position_bucket
from stamp_kernels.triton_kernels import constants
from stamp_kernels.triton_kernels.attention import relative_bias
from stamp_kernels.triton_kernels.attention.relative_bias import FAR, distance_buckets, ranges_of_buckets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
SECONDS_OF_A_YEAR = 31_536_000


@pytest.fixture(autouse=True)
def no_constants(monkeypatch):
    monkeypatch.setattr(constants, "_CONSTANTS", {})


def results(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """out, lse, centrality and the gradients of the launchers, as `forward_and_backward` gives them."""
    inputs = detached(inputs)
    dropout = inputs.get("dropout_p", 0.0), inputs.get("dropout_seed")
    arguments = [*(inputs[name] for name in ("q", "k", "v")), *shared_op_arguments(inputs)]
    *arguments, mask, p, seed = (
        x.to(DEVICE) if isinstance(x, Tensor) else x
        for x in (*arguments, inputs.get("centrality_query_mask"), *dropout)
    )
    out, lse, centrality = launcher("packed_attention_forward")(*arguments, mask, p, seed, True)
    grad_out = small_integers(inputs["q"]).to(DEVICE)
    grads = launcher("packed_attention_backward")(
        grad_out, *arguments[:3], out, lse, *arguments[3:], p, seed, *[True] * 4
    )
    names = ("out", "lse", "centrality", "dq", "dk", "dv", "dbias_table")
    return {name: x.cpu() for name, x in zip(names, (out, lse, centrality, *grads), strict=True)}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("num_buckets", "max_distance"), [(32, 128), (8, 12), (4, 100), (64, 77), (16, 9), (32, 3_000), (128, 65)]
)
def test_ranges_are_those_of_the_formula(num_buckets, max_distance, bidirectional):
    distances = torch.arange(-2 * max_distance, 2 * max_distance + 1)
    want = relative_position_bucket(
        distances, num_buckets=num_buckets, max_distance=max_distance, bidirectional=bidirectional
    )
    first, last = ranges_of_buckets(num_buckets, max_distance, bidirectional)
    is_inside = (first[:, None] <= distances) & (distances <= last[:, None])
    assert torch.equal(is_inside, torch.arange(num_buckets)[:, None] == want)
    assert first.min() == -FAR and last[first <= last].max() == FAR


@pytest.mark.parametrize(
    "name", ["bias", "causal_bias_positions", "bias_positions", "cross_bias", "dropout_everything"]
)
def test_a_search_gives_the_bits_of_the_table(monkeypatch, name):
    inputs = CASES[name].inputs(torch.float32)
    by_table = results(inputs)
    monkeypatch.setattr(relative_bias, "MAX_TABLE_DISTANCE", 8)
    constants._CONSTANTS.clear()
    by_search = results(inputs)
    assert {x.dim() for (of, *_), x in constants._CONSTANTS.items() if of[0] == "distance_buckets"} == {2}
    for part, expected in by_table.items():
        assert torch.equal(by_search[part], expected), part


@pytest.mark.parametrize("lengths", [(5, 0, 9, 30), (5, 70, 140)], ids=["slots", "general"])
def test_positions_in_seconds(lengths):
    """The cost depends on the number of buckets and tokens, not on the distances."""
    batch = RaggedBatch(lengths, tail=1)
    inputs = AttentionCase(batch, heads=(2, 1), bias="bidirectional").inputs(torch.float32)
    table = torch.randn(32, 2, requires_grad=True)
    inputs["relative_bias"] = RelativePositionBias(table, max_distance=SECONDS_OF_A_YEAR)
    inputs["positions_q"] = torch.randint(0, 2 * SECONDS_OF_A_YEAR, (batch.total,), dtype=torch.int32)
    want = forward_and_backward(dense_attention, in_float64(inputs))
    assert_results_close(results(inputs), want, torch.float32)
    assert sum(x.nbytes for x in constants._CONSTANTS.values()) < 1_000


@pytest.mark.parametrize("max_distance", [2**16, 2**16 + 1, SECONDS_OF_A_YEAR, 2**40])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_constants_of_any_max_distance(max_distance, bidirectional):
    buckets = distance_buckets(32, max_distance, bidirectional, CPU)
    assert buckets.nbytes <= 2**20
    distances = torch.randint(-(2**30), 2**30, (10_000,))
    distances = torch.cat(
        [distances, distances >> 7, distances >> 14, distances >> 21, torch.tensor([-(2**30), 2**30])]
    )
    want = relative_position_bucket(distances, num_buckets=32, max_distance=max_distance, bidirectional=bidirectional)
    if max_distance <= relative_bias.MAX_TABLE_DISTANCE:
        radius = buckets.shape[0] // 2
        got = buckets[distances.clamp(-radius, radius) + radius]
    else:
        begins, of_range = buckets
        got = of_range[torch.searchsorted(begins, distances.to(torch.int32), right=True) - 1]
    assert torch.equal(got.long(), want)
