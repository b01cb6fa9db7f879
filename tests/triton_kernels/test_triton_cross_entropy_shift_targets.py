"""The kernel of shift_targets, interpreted where there is no GPU, against the reference: exactly equal."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ragged import BATCHES, RaggedBatch, ragged_batches
from torch import Tensor

pytest.importorskip("triton")

from stamp_kernels.reference.cross_entropy import shift_targets as reference
from stamp_kernels.triton_kernels.cross_entropy.shift_targets import shift_targets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def assert_equal(labels: Tensor, cu_seqlens: Tensor, steps: int, stride: int, ignore_index: int = -100) -> Tensor:
    got = shift_targets(labels.to(DEVICE), cu_seqlens.to(DEVICE), steps, stride, ignore_index).cpu()
    assert got.dtype == torch.int64
    assert torch.equal(got, reference(labels, cu_seqlens, steps, stride, ignore_index))
    return got


@given(batch=ragged_batches(max_batch=12), steps=st.integers(1, 4), stride=st.integers(1, 5))
def test_ragged_batches(batch, steps, stride):
    assert_equal(torch.arange(batch.total) + 7, batch.cu_seqlens, steps, stride, -1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_integer_dtypes(dtype):
    batch = BATCHES["ragged"]
    assert_equal(torch.randint(0, 200, (batch.total,)).to(dtype), batch.cu_seqlens, 3, 2)


@pytest.mark.parametrize("name", BATCHES)
def test_labels_of_tail_rows_never_show(name):
    batch = BATCHES[name]
    labels = torch.arange(batch.total)
    labels[batch.valid :] = 999
    assert not (assert_equal(labels, batch.cu_seqlens, 5, 1) == 999).any()


def test_more_rows_than_a_program_has():
    batch = RaggedBatch((400, 0, 3, *range(40), 150), tail=5)
    assert_equal(torch.arange(batch.total), batch.cu_seqlens, 2, 3)


@pytest.mark.parametrize("stride", [98, 2**31, 2**62, 2**63 - 1])
def test_past_every_end(stride):
    batch = BATCHES["long_among_short"]
    assert (assert_equal(torch.arange(batch.total), batch.cu_seqlens, 5, min(stride, 2**40)) == -100).all()
    assert (shift_targets(torch.arange(batch.total).to(DEVICE), batch.cu_seqlens.to(DEVICE), 5, stride, -1) == -1).all()


def test_strided_labels_and_offsets():
    batch = BATCHES["ragged"]
    labels = torch.randint(0, 100, (batch.total, 3))
    offsets = torch.stack([batch.cu_seqlens, batch.cu_seqlens + 1], dim=1)
    assert_equal(labels[:, 1], offsets[:, 0], 2, 1)
    assert_equal(labels[:1, 1].expand(batch.total), offsets[:, 0], 2, 1)


def test_contents_are_checked_where_asked(monkeypatch):
    monkeypatch.setenv("STAMP_KERNELS_CHECK", "1")
    with pytest.raises(RuntimeError, match=r"cu_seqlens\[-1\] must be at most the number of rows 5, got 6"):
        shift_targets(torch.arange(5).to(DEVICE), torch.tensor([0, 6], dtype=torch.int32).to(DEVICE), 1, 1, -100)
