"""PackedBatch from and to padded tensors."""

import dataclasses
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from packed_cases import packed_of, padded_mask
from ragged import BATCHES, RaggedBatch, ragged_batches

from stamp_kernels.packed import PackedBatch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@given(batch=ragged_batches(), room=st.integers(0, 3), padding=st.sampled_from(["right", "left", "scattered"]))
def test_from_padded_packs_the_valid_tokens(batch, room, padding):
    mask = padded_mask(batch.lengths, batch.max_seqlen + room, padding)
    x = torch.randn(*mask.shape, 3)
    packed = PackedBatch.from_padded(x, mask)
    assert torch.equal(packed.values, x[mask])
    assert torch.equal(packed.cu_seqlens, batch.cu_seqlens)
    assert packed.max_seqlen == batch.max_seqlen
    assert packed.positions is None
    assert packed.lengths_cpu.tolist() == list(batch.lengths)


@given(batch=ragged_batches(), room=st.integers(0, 3))
def test_lengths_mean_padding_on_the_right(batch, room):
    mask = padded_mask(batch.lengths, batch.max_seqlen + room, "right")
    x = torch.randn(*mask.shape, 3)
    for dtype in (torch.int32, torch.int64):
        packed = PackedBatch.from_padded(x, lengths=torch.tensor(batch.lengths, dtype=dtype))
        assert torch.equal(packed.values, x[mask])
        assert torch.equal(packed.cu_seqlens, batch.cu_seqlens)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("device", DEVICES)
def test_integer_masks_and_token_ids(device, dtype):
    mask = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=dtype, device=device)
    token_ids = torch.arange(9, device=device).view(3, 3)
    packed = PackedBatch.from_padded(token_ids, mask)
    assert packed.values.tolist() == [1, 2, 3]
    assert packed.values.dtype == torch.int64
    assert packed.cu_seqlens.tolist() == [0, 2, 3, 3]


@given(batch=ragged_batches(), room=st.integers(0, 3), side=st.sampled_from(["right", "left"]))
def test_to_padded_puts_each_sequence_in_a_row(batch, room, side):
    packed = packed_of(batch, 2)
    padded = packed.to_padded(batch.max_seqlen + room, padding_side=side, padding_value=-7)
    mask = padded_mask(batch.lengths, batch.max_seqlen + room, side)
    assert padded.shape == (*mask.shape, 2)
    assert torch.equal(padded[mask], packed.values[: batch.valid])
    assert (padded[~mask] == -7).all()


@pytest.mark.parametrize("name", BATCHES)
def test_to_padded_has_the_longest_sequences_width(name):
    batch = BATCHES[name]
    assert packed_of(batch, 2).to_padded().shape == (batch.num_sequences, batch.max_seqlen, 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_padded_round_trip(dtype, shape):
    batch = BATCHES["ragged"]
    values = torch.randint(0, 2, (batch.total, *shape)).to(dtype)
    packed = PackedBatch(values, batch.cu_seqlens, batch.max_seqlen)
    for side in ("right", "left"):
        padded = packed.to_padded(padding_side=side)
        back = PackedBatch.from_padded(padded, padded_mask(batch.lengths, batch.max_seqlen, side))
        assert back.values.dtype == dtype
        assert torch.equal(back.values, values[: batch.valid])
        assert torch.equal(back.cu_seqlens, batch.cu_seqlens)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_reach_only_valid_tokens(device):
    batch = BATCHES["ragged"]
    packed = packed_of(batch, 2, device=device)
    packed.values[batch.valid :] = torch.nan
    values = packed.values.requires_grad_()
    weight = torch.randn(batch.num_sequences, batch.max_seqlen, 2, device=device)
    mask = padded_mask(batch.lengths, batch.max_seqlen, "right").to(device)
    weight_with_nan = weight.masked_fill(~mask.unsqueeze(2), torch.nan)
    packed.to_padded(padding_value=3).backward(weight_with_nan)
    assert torch.equal(values.grad[: batch.valid], weight[mask])
    assert (values.grad[batch.valid :] == 0).all()

    x = torch.randn(*mask.shape, 2, device=device, requires_grad=True)
    PackedBatch.from_padded(x, mask).values.backward(weight[mask])
    assert torch.equal(x.grad, weight * mask.unsqueeze(2))


def test_gradcheck():
    batch = RaggedBatch((3, 0, 1, 2), tail=2)
    values = torch.randn(batch.total, 2, dtype=torch.float64, requires_grad=True)
    mask = padded_mask(batch.lengths, 4, "scattered")
    x = torch.randn(4, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda values: PackedBatch(values, batch.cu_seqlens, 3).to_padded(padding_side="left"), values
    )
    assert torch.autograd.gradcheck(lambda x: PackedBatch.from_padded(x, mask).values, x)


@pytest.mark.gpu
def test_cpu_masks_and_lengths_cost_no_sync():
    x = torch.randn(3, 4, 2, device="cuda")
    mask = padded_mask((4, 0, 2), 4, "left")
    lengths = torch.tensor([4, 0, 2])
    torch.cuda.set_sync_debug_mode("error")
    try:
        from_mask = PackedBatch.from_padded(x, mask)
        from_lengths = PackedBatch.from_padded(x, lengths=lengths)
        padded = from_lengths.to_padded(padding_side="left")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(from_mask.values, x[mask.cuda()])
    assert torch.equal(from_lengths.values, x[padded_mask((4, 0, 2), 4, "right").cuda()])
    assert torch.equal(padded[mask.cuda()], from_lengths.values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(3)}, "x must have shape [batch, padded length, ...], got [3]"),
        ({}, "exactly one of mask and lengths must be given, got neither"),
        (
            {"mask": torch.ones(2, 3), "lengths": torch.ones(2)},
            "exactly one of mask and lengths must be given, got both",
        ),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask must have shape [2, 3], got [2, 4]"),
        ({"mask": torch.ones(2, 3)}, "mask must have dtype bool or an integer dtype, got torch.float32"),
        ({"lengths": torch.ones(3, dtype=torch.int64)}, "lengths must have shape [2], got [3]"),
        ({"lengths": torch.ones(2)}, "lengths must have dtype torch.int32, torch.int64, got torch.float32"),
    ],
)
def test_from_padded_names_the_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PackedBatch.from_padded(**{"x": torch.zeros(2, 3), **arguments})


@pytest.mark.parametrize("lengths", [[-1, 2], [0, 4]])
def test_from_padded_reports_lengths_that_do_not_fit(lengths):
    message = f"lengths must be in [0, 3], got {lengths[0]} to {lengths[1]}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        PackedBatch.from_padded(torch.zeros(2, 3), lengths=torch.tensor(lengths))


def test_to_padded_names_the_bad_argument():
    packed = packed_of(BATCHES["ragged"])
    with pytest.raises(ValueError, match=re.escape("total_length must be in [13, inf), got 12")):
        packed.to_padded(12)
    with pytest.raises(ValueError, match=re.escape("padding_side must be one of ('right', 'left'), got 'both'")):
        packed.to_padded(padding_side="both")


def test_to_padded_reports_bad_contents():
    packed = dataclasses.replace(packed_of(BATCHES["ragged"]), max_seqlen=12)
    with pytest.raises(RuntimeError, match="sequence 3 has length 13, more than the given max_seqlen 12"):
        packed.to_padded()


# Numbers beyond 32 bits


@pytest.mark.parametrize("length", [2**32 + 1, 2**32, -(2**32), 2**63 - 1])
def test_long_lengths_are_not_truncated(length):
    with pytest.raises(RuntimeError, match=re.escape("lengths must be in [0, 3]")):
        PackedBatch.from_padded(torch.zeros(2, 3), lengths=torch.tensor([2, length]))


def test_too_many_valid_tokens_are_refused():
    x = torch.zeros(2**16, 2**15, 0)
    with pytest.raises(RuntimeError, match=r"at most 2\*\*31 - 1 tokens, since cu_seqlens is int32, got 2147483648"):
        PackedBatch.from_padded(x, lengths=torch.full((2**16,), 2**15))


@pytest.mark.parametrize("batch", [BATCHES["no_sequences"], BATCHES["ragged"]])
def test_too_large_padded_results_are_refused(batch):
    most = (2**31 - 1) // max(batch.num_sequences, 1)
    message = f"total_length must be at most {most} with {batch.num_sequences} sequences"
    for length in (most + 1, 2**40):
        with pytest.raises(ValueError, match=re.escape(message)):
            packed_of(batch).to_padded(length)


def test_total_length_may_be_a_numpy_integer():
    packed = packed_of(BATCHES["ragged"], 2)
    assert torch.equal(packed.to_padded(np.int64(15)), packed.to_padded(15))
    for bad in (15.0, True, torch.tensor(15)):
        with pytest.raises(ValueError, match="total_length must be an int"):
            packed.to_padded(bad)


# Inverted masks


def right_padded(lengths: tuple[int, ...], width: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids from 1 and 0 on padding (with a shape: their embeddings), and the mask."""
    mask = padded_mask(lengths, width, "right")
    ids = torch.randint(1, 100, mask.shape) * mask
    return (torch.randn(100, *shape)[ids] if shape else ids), mask


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_inverted_mask_causes_a_warning(shape):
    x, mask = right_padded((3, 7, 1, 5), 7, *shape)
    with pytest.warns(UserWarning, match="mask looks inverted.*give ~mask"):
        PackedBatch.from_padded(x, ~mask)


@given(
    batch=ragged_batches(),
    room=st.integers(0, 3),
    padding=st.sampled_from(["right", "left", "scattered"]),
    embedded=st.booleans(),
)
@example(batch=RaggedBatch((0, 2, 3), 0), room=2, padding="left", embedded=True)
def test_masks_that_are_right_cause_no_warning(batch, room, padding, embedded):
    """Left padding to a fixed length with an empty row has the pattern of an inverted mask."""
    mask = padded_mask(batch.lengths, batch.max_seqlen + room, padding)
    ids = torch.randint(1, 4, mask.shape) * mask
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PackedBatch.from_padded(torch.randn(4, 2)[ids] if embedded else ids, mask)
