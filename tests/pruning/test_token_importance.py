"""token_importance against a loop over the tokens in float64."""

import math
import re

import pytest
import torch
import torch._dynamo.testing
from closeness import assert_close
from devices import every_device
from hypothesis import given
from pairwise import pairwise
from ragged import BATCHES, RaggedBatch, ragged_batches
from torch import Tensor

from stamp_kernels.ops.pruning.importance import token_importance


def expected_importance(
    hidden: Tensor, centrality: Tensor, batch: RaggedBatch, norm: str = "l1", normalize: str = "none"
) -> Tensor:
    expected = torch.zeros(batch.total, dtype=torch.float64)
    for rows in batch.slices():
        for row in range(rows.start, rows.stop):
            h = hidden[row].double()
            size = h.abs().sum() if norm == "l1" else h.square().sum().sqrt()
            queries = rows.stop - row if normalize == "visible_queries" else 1
            expected[row] = size * centrality[row].double() / queries
    return expected


def inputs(batch: RaggedBatch, width: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states and centralities, NaN in the tail rows."""
    hidden, centrality = torch.randn(batch.total, width).to(dtype), torch.rand(batch.total)
    hidden[batch.valid :], centrality[batch.valid :] = math.nan, math.nan
    return hidden, centrality.double() if dtype == torch.float64 else centrality


@pytest.mark.core
@every_device
@pairwise(name=BATCHES, norm=["l1", "l2"], normalize=["none", "visible_queries"])
def test_is_norm_times_centrality(device, norm, normalize, name):
    batch = BATCHES[name]
    hidden, centrality = inputs(batch)
    importance = token_importance(
        hidden.to(device), centrality.to(device), batch.cu_seqlens.to(device), norm=norm, normalize=normalize
    ).cpu()
    assert importance.dtype == torch.float32
    assert_close(importance, expected_importance(hidden, centrality, batch, norm, normalize))
    assert (importance[batch.valid :] == 0).all()


@given(batch=ragged_batches())
def test_ragged_batches(batch):
    hidden, centrality = inputs(batch, width=3)
    importance = token_importance(hidden, centrality, batch.cu_seqlens, normalize="visible_queries")
    assert_close(importance, expected_importance(hidden, centrality, batch, normalize="visible_queries"))


@pytest.mark.parametrize("width", [0, 1, 3, 64, 100, 896])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_device
def test_result_is_fp32_whatever_the_inputs(device, dtype, width):
    batch = BATCHES["ragged"]
    hidden, centrality = inputs(batch, width, dtype)
    for norm in ("l1", "l2"):
        importance = token_importance(hidden.to(device), centrality.to(device), batch.cu_seqlens.to(device), norm=norm)
        assert importance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # Exact to fp32 for the half precisions too: the inputs are exact, and only the sums could lose digits.
        assert_close(importance.cpu(), expected_importance(hidden, centrality, batch, norm))


@every_device
def test_half_precision_norms_do_not_overflow(device):
    hidden = torch.full((2, 512), 60000.0, dtype=torch.float16, device=device)
    centrality = torch.ones(2, device=device)
    for norm, expected in (("l1", 512 * 60000.0), ("l2", math.sqrt(512) * 60000.0)):
        assert_close(token_importance(hidden, centrality, norm=norm).cpu(), torch.full((2,), expected).double())


def test_every_row_is_a_token_without_cu_seqlens():
    batch = RaggedBatch((9,), tail=0)
    hidden, centrality = inputs(batch)
    assert_close(token_importance(hidden, centrality), expected_importance(hidden, centrality, batch))


@every_device
def test_strided_inputs(device):
    hidden, centrality = torch.randn(7, 3, 10, device=device), torch.rand(7, 2, device=device)
    importance = token_importance(hidden[:, 1, ::2], centrality[:, 1])
    assert_close(importance, hidden[:, 1, ::2].double().abs().sum(1) * centrality[:, 1].double())


def test_autocast_changes_nothing():
    batch = BATCHES["ragged"]
    hidden, centrality = inputs(batch)
    expected = token_importance(hidden, centrality, batch.cu_seqlens, norm="l2")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_importance(hidden, centrality, batch.cu_seqlens, norm="l2"), expected)


def test_importance_gets_no_gradient():
    hidden, centrality = torch.randn(5, 4, requires_grad=True), torch.rand(5, requires_grad=True)
    assert not token_importance(hidden, centrality).requires_grad


@pytest.mark.parametrize("name", ["ragged", "no_sequences"])
def test_opcheck(name):
    batch = BATCHES[name]
    hidden, centrality = torch.randn(batch.total, 8), torch.rand(batch.total)
    op = torch.ops.stamp.token_importance.default
    torch.library.opcheck(op, (hidden.bfloat16(), centrality, batch.cu_seqlens, 1, True))
    torch.library.opcheck(op, (hidden, centrality, None, 2, False))


def test_compiles_once_for_all_sizes():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(token_importance, fullgraph=True, dynamic=True, backend=counter)
    for batch in (RaggedBatch((3, 4), 2), RaggedBatch((5, 0, 9), 0), RaggedBatch((2,) * 50, 1)):
        arguments = (torch.randn(batch.total, 24), torch.rand(batch.total), batch.cu_seqlens)
        importance = compiled(*arguments, normalize="visible_queries")
        assert torch.equal(importance, token_importance(*arguments, normalize="visible_queries"))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": [1.0]}, "hidden must be a tensor, got list"),
        ({"hidden": torch.zeros(5, 2, 2)}, "hidden must have shape [total, width], got [5, 2, 2]"),
        ({"hidden": torch.zeros(5, 2, dtype=torch.int64)}, "hidden must have dtype torch.float32, torch.float16"),
        ({"centrality": torch.zeros(4)}, "centrality must have shape [5], got [4]"),
        ({"centrality": torch.zeros(5).half()}, "centrality must have dtype torch.float32, torch.float64, got"),
        (
            {"cu_seqlens": torch.tensor([0.0, 5.0])},
            "cu_seqlens must have dtype torch.int32, torch.int64, got torch.float32",
        ),
        ({"norm": "l3"}, "norm must be one of ('l1', 'l2'), got 'l3'"),
        ({"normalize": "mean"}, "normalize must be one of ('none', 'visible_queries'), got 'mean'"),
        ({"normalize": "visible_queries"}, 'normalize="visible_queries" counts the queries of each sequence'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_names_the_bad_argument(arguments, message):
    good = {"hidden": torch.zeros(5, 2), "centrality": torch.zeros(5)}
    with pytest.raises(ValueError, match=re.escape(message)):
        token_importance(**{**good, **arguments})


def test_reports_bad_contents():
    with pytest.raises(RuntimeError, match=r"cu_seqlens\[-1\] must be at most the number of rows 5, got 6"):
        token_importance(torch.zeros(5, 2), torch.zeros(5), torch.tensor([0, 6], dtype=torch.int32))
