"""shift_targets against a loop over sequences."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from hypothesis import given
from hypothesis import strategies as st
from ragged import BATCHES, RaggedBatch, ragged_batches

from stamp_kernels._backend import use_backend
from stamp_kernels.ops.cross_entropy import multi_token_cross_entropy as loss_module
from stamp_kernels.ops.cross_entropy import shift_targets as targets_module
from stamp_kernels.ops.cross_entropy.multi_token_cross_entropy import multi_token_cross_entropy
from stamp_kernels.ops.cross_entropy.shift_targets import shift_targets


def shifted_by_loop(batch, labels, steps, stride, ignore_index):
    targets = torch.full((batch.total, steps), ignore_index)
    for rows in batch.slices():
        for row in range(rows.start, rows.stop):
            for k in range(1, steps + 1):
                if row + k * stride < rows.stop:
                    targets[row, k - 1] = int(labels[row + k * stride])
    return targets


@pytest.mark.core
@given(batch=ragged_batches(), steps=st.integers(1, 4), stride=st.integers(1, 5))
def test_matches_a_loop(batch, steps, stride):
    labels = torch.arange(batch.total, dtype=torch.int32) + 7
    want = shifted_by_loop(batch, labels, steps, stride, -1)
    for backend in ("auto", "reference"):
        with use_backend(backend):
            got = shift_targets(labels, batch.cu_seqlens, steps=steps, stride=stride, ignore_index=-1)
        assert got.dtype == torch.int64
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_any_integer_dtype(dtype):
    batch = BATCHES["ragged"]
    labels = torch.randint(0, 100, (batch.total,)).to(dtype)
    got = shift_targets(labels, batch.cu_seqlens, steps=2)
    assert torch.equal(got, shifted_by_loop(batch, labels, 2, 1, -100))


def test_keeps_ignored_labels():
    labels = torch.tensor([1, -100, 3])
    got = shift_targets(labels, torch.tensor([0, 3], dtype=torch.int32), steps=1)
    assert got[:, 0].tolist() == [-100, 3, -100]


def test_strided_inputs(backend):
    batch = BATCHES["ragged"]
    labels = torch.randint(0, 100, (batch.total, 3))[:, 1]
    cu_seqlens = torch.stack([batch.cu_seqlens, batch.cu_seqlens + 1], dim=1)[:, 0]
    got = shift_targets(labels, cu_seqlens, steps=2)
    assert torch.equal(got, shifted_by_loop(batch, labels, 2, 1, -100))
    one_label = torch.tensor(7).expand(batch.total)
    got = shift_targets(one_label, cu_seqlens, steps=2)
    assert torch.equal(got, shifted_by_loop(batch, one_label, 2, 1, -100))


def test_many_rows(backend):
    """Several threads share them; a thread's rows begin inside a sequence or among empty ones."""
    batch = RaggedBatch((4001, 0, 0, 7, *range(0, 300, 2), 9001, 0), tail=5)
    labels = torch.arange(batch.total)
    got = shift_targets(labels, batch.cu_seqlens, steps=3, stride=2)
    assert torch.equal(got, shifted_by_loop(batch, labels, 3, 2, -100))


@pytest.mark.core
@pytest.mark.parametrize(("steps", "stride"), [(1, 1), (2, 1), (3, 2), (40, 1), (2, 40)])
def test_reads_no_tail_label(backend, steps, stride):
    """No row of the last sequence gets one, and tail rows have no target."""
    lengths = (4, 0, 6)
    batch = RaggedBatch(lengths, tail=50)
    labels = torch.arange(batch.total)
    labels[batch.valid :] = 999
    got = shift_targets(labels, batch.cu_seqlens, steps=steps, stride=stride)
    assert not (got == 999).any()
    assert (got[batch.valid :] == -100).all()
    for k in range(1, steps + 1):
        assert (got[:, k - 1] != -100).sum() == sum(max(n - k * stride, 0) for n in lengths)


@pytest.mark.parametrize("stride", [98, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1])
def test_strides_past_every_end(backend, stride):
    """`steps * stride` may exceed every integer type."""
    batch = BATCHES["long_among_short"]
    got = shift_targets(torch.arange(batch.total), batch.cu_seqlens, steps=5, stride=stride)
    assert got.shape == (batch.total, 5)
    assert (got == -100).all()


@pytest.mark.parametrize(("offsets", "total"), [([0], 0), ([0, 0, 0], 0), ([0], 4), ([0, 0], 4)])
def test_no_rows_in_sequences(backend, offsets, total):
    cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
    assert shift_targets(torch.arange(total), cu_seqlens, steps=3).tolist() == [[-100] * 3] * total


def test_loss_equals_that_of_padded_labels():
    """A step's loss over a packed batch equals F.cross_entropy of the padded batch's shifted labels."""
    batch = BATCHES["ragged"]
    hidden, weight = torch.randn(batch.total, 20).double(), torch.randn(53, 20).double()
    labels = torch.randint(53, (batch.total,))
    targets = shift_targets(labels, batch.cu_seqlens, steps=2)
    got = multi_token_cross_entropy(hidden, weight, targets, return_step_losses=True)

    padded_labels = torch.full((batch.num_sequences, batch.max_seqlen), -100)
    padded_hidden = torch.zeros(batch.num_sequences, batch.max_seqlen, 20).double()
    for i, rows in enumerate(batch.slices()):
        padded_labels[i, : rows.stop - rows.start] = labels[rows]
        padded_hidden[i, : rows.stop - rows.start] = hidden[rows]
    for k in (1, 2):
        logits = (padded_hidden @ weight.T)[:, :-k]
        want = F.cross_entropy(logits.flatten(0, 1), padded_labels[:, k:].flatten())
        assert_close(got.step_losses[k - 1], want)


def test_opcheck():
    for batch in (BATCHES["ragged"], BATCHES["no_sequences"]):
        labels = torch.arange(batch.total)
        torch.library.opcheck(torch.ops.stamp.shift_targets.default, (labels, batch.cu_seqlens, 3, 2, -100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": torch.zeros(5)}, r"labels must have dtype torch\.int64, .*got torch\.float32"),
        ({"labels": torch.zeros(5, 1, dtype=torch.int64)}, r"labels must have shape \[T\], got \[5, 1\]"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, r"cu_seqlens must have dtype torch\.int32"),
        ({"steps": 0}, r"steps must be in \[1, inf\), got 0"),
        ({"stride": 0}, r"stride must be in \[1, inf\), got 0"),
    ],
)
def test_bad_arguments(arguments, message):
    good = {"labels": torch.arange(5), "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32), "steps": 1}
    with pytest.raises(ValueError, match=message):
        shift_targets(**good | arguments)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5], r"cu_seqlens\[0\] must be 0, got 1"),
        ([0, 3, 2], "cu_seqlens must never decrease, got 3 then 2 at index 1"),
        ([0, 6], r"cu_seqlens\[-1\] must be at most the number of rows 5, got 6"),
    ],
    ids=str,
)
def test_bad_contents(backend, offsets, message):
    with pytest.raises(RuntimeError, match=message):
        shift_targets(torch.arange(5), torch.tensor(offsets, dtype=torch.int32), steps=1)


@pytest.mark.parametrize(
    ("labels", "steps", "stride", "message"),
    [
        (torch.zeros(5, 1, dtype=torch.int64), 1, 1, "labels must have one dimension, got 2"),
        (torch.zeros(5), 1, 1, "labels must be int64, int32, int16, int8 or uint8"),
        (torch.arange(5), 0, 1, "steps and stride must be at least 1, got 0 and 1"),
        (torch.arange(5), 1, -2, "steps and stride must be at least 1, got 1 and -2"),
    ],
)
def test_raw_op_bad_arguments(labels, steps, stride, message):
    """The op itself checks what keeps its reads inside the tensors."""
    with pytest.raises(RuntimeError, match=message):
        torch.ops.stamp.shift_targets(labels, torch.tensor([0, 5], dtype=torch.int32), steps, stride, -100)


@pytest.mark.parametrize("module", [loss_module, targets_module], ids=lambda module: module.__name__.split(".")[-1])
def test_examples(module):
    """In the docstrings of this family."""
    result = doctest.testmod(module, extraglobs={"torch": torch, "shift_targets": shift_targets})
    assert result.attempted > 0 and result.failed == 0
