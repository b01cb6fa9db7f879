"""The importance kernel, interpreted where there is no GPU, against the reference in float64."""

import itertools

import pytest
import torch
from closeness import assert_close
from hypothesis import given
from ragged import BATCHES, RaggedBatch, ragged_batches
from torch import Tensor

pytest.importorskip("triton")

from stamp_kernels.reference.pruning import token_importance as reference
from stamp_kernels.triton_kernels.pruning.configs import importance_config
from stamp_kernels.triton_kernels.pruning.importance import token_importance
from stamp_kernels.triton_kernels.rows import power_of_two_divisor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

variants = pytest.mark.parametrize(("norm_order", "per_visible_query"), list(itertools.product((1, 2), (False, True))))


def inputs(batch: RaggedBatch, width: int = 24, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Hidden states and centralities, NaN in the tail rows."""
    hidden, centrality = torch.randn(batch.total, width).to(dtype), torch.rand(batch.total)
    hidden[batch.valid :], centrality[batch.valid :] = torch.nan, torch.nan
    return hidden, centrality


def run(hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor | None, *rest: int | bool) -> Tensor:
    on_device = (x if x is None else x.to(DEVICE) for x in (hidden, centrality, cu_seqlens))
    return token_importance(*on_device, *rest).cpu()


def assert_right(hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor | None, *rest: int | bool) -> None:
    got = run(hidden, centrality, cu_seqlens, *rest)
    assert got.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    # To fp32 accuracy for half precision too: the inputs are exact, and sums are in fp32.
    assert_close(got, reference(hidden.double(), centrality.double(), cu_seqlens, *rest))


@variants
@pytest.mark.parametrize("name", BATCHES)
def test_named_batches(name, norm_order, per_visible_query):
    batch = BATCHES[name]
    assert_right(*inputs(batch), batch.cu_seqlens, norm_order, per_visible_query)
    got = run(*inputs(batch), batch.cu_seqlens, norm_order, per_visible_query)
    assert not got[batch.valid :].any()  # NaN is true


@given(batch=ragged_batches(max_batch=12))
def test_ragged_batches(batch):
    assert_right(*inputs(batch, width=3), batch.cu_seqlens, 1, True)


@pytest.mark.parametrize("width", [0, 1, 3, 16, 100, 128, 1024, 1500, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_and_widths(dtype, width):
    batch = BATCHES["ragged"]
    norm_order = 1 + (width + dtype.itemsize // 4) % 2  # one of the two for each width and dtype
    assert_right(*inputs(batch, width, dtype), batch.cu_seqlens, norm_order, False)


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 4, 5, 127, 300])
def test_finds_the_sequence_among_any_number(num_sequences):
    lengths = torch.randint(0, 5, (num_sequences,)).tolist()
    batch = RaggedBatch(tuple(lengths), tail=70)
    assert_right(*inputs(batch, width=2), batch.cu_seqlens, 1, True)


@pytest.mark.parametrize("norm_order", [1, 2])
def test_without_cu_seqlens_all_rows_are_tokens(norm_order):
    hidden, centrality = inputs(RaggedBatch((150,), tail=0), width=40)
    assert_right(hidden, centrality, None, norm_order, False)
    assert run(hidden[:0], centrality[:0], None, norm_order, False).shape == (0,)


def test_half_precision_norms_do_not_overflow():
    hidden, centrality = torch.full((2, 512), 60000.0, dtype=torch.float16), torch.ones(2)
    assert_right(hidden, centrality, None, 1, False)
    assert_right(hidden, centrality, None, 2, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_centrality_of_the_other_precision(dtype):
    batch = BATCHES["ragged"]
    hidden, centrality = inputs(batch, dtype=dtype)
    other = torch.float64 if dtype == torch.float32 else torch.float32
    assert_right(hidden, centrality.to(other), batch.cu_seqlens, 1, True)


def test_strided_arguments():
    hidden, centrality = torch.randn(7, 3, 10), torch.rand(7, 2)
    cu_seqlens = torch.tensor([[0, 9], [3, 9], [7, 9]], dtype=torch.int32)
    for view in (hidden[:, 1], hidden[:, 1, ::2], hidden[:, 2, 3:8], hidden[:1, 1].expand(7, 10), hidden[:, 0].t()):
        rows = view.shape[0]
        offsets = cu_seqlens[:, 0].clamp(max=rows)
        assert_right(view, centrality[:1, 0].expand(rows), offsets, 1, True)
    assert_right(hidden[:, 1], centrality[:, 1], cu_seqlens[:, 0], 2, False)


@variants
@pytest.mark.parametrize("width", [40, 1500])
def test_bits_do_not_depend_on_the_batch(width, norm_order, per_visible_query):
    batch = RaggedBatch((5, 0, 70, 16), tail=2)
    hidden, centrality = inputs(batch, width)
    together = run(hidden, centrality, batch.cu_seqlens, norm_order, per_visible_query)
    again = run(hidden, centrality, batch.cu_seqlens, norm_order, per_visible_query)
    assert torch.equal(together, again)
    for rows in batch.slices():
        cu_seqlens = torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        alone = run(hidden[rows], centrality[rows], cu_seqlens, norm_order, per_visible_query)
        assert torch.equal(alone, together[rows])


@pytest.mark.parametrize("width", [0, 1, 16, 100, 128, 1024, 5000])
def test_tiles_depend_only_on_the_width(width):
    for element_size in (2, 4, 8):
        config = importance_config(width, element_size=element_size)
        assert 512 <= config.rows * config.columns <= 4096
        assert config.columns >= min(width, 1024)


def test_power_of_two_divisor():
    divisors = [power_of_two_divisor(n, 16) for n in (0, 1, 2, 3, 12, 16, 48, 96)]
    assert divisors == [16, 1, 2, 1, 4, 16, 16, 16]
