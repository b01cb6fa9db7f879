"""PackedBatch from and to nested tensors with the jagged layout."""

import dataclasses
import re

import pytest
import torch
from packed_cases import packed_of, share_memory
from ragged import BATCHES

from stamp_kernels.packed import PackedBatch


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", ["ragged", "no_tail", "long_among_short", "all_empty"])
def test_nested_round_trip(name, known):
    batch = BATCHES[name]
    packed = packed_of(batch, 2, known=known)
    packed.values.requires_grad_()
    nested = packed.to_nested()
    assert nested.layout == torch.jagged
    assert [row.tolist() for row in nested.unbind()] == [packed.values[rows].tolist() for rows in batch.slices()]
    assert share_memory(nested.values(), packed.values)

    back = PackedBatch.from_nested(nested)
    assert share_memory(back.values, packed.values)
    assert torch.equal(back.values, packed.values[: batch.valid])
    assert torch.equal(back.cu_seqlens, batch.cu_seqlens)
    assert back.max_seqlen == batch.max_seqlen
    assert back.lengths_cpu.tolist() == list(batch.lengths)
    (back.values * 3).sum().backward()
    assert (packed.values.grad[: batch.valid] == 3).all()
    assert (packed.values.grad[batch.valid :] == 0).all()


def test_from_nested_of_a_list():
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.zeros(0, 3), torch.ones(4, 3)], layout=torch.jagged)
    packed = PackedBatch.from_nested(nested)
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == [0, 2, 2, 6]
    assert packed.max_seqlen == 4


def test_from_nested_names_the_bad_argument():
    with pytest.raises(ValueError, match=r"nested must be a nested tensor with layout=torch\.jagged"):
        PackedBatch.from_nested(torch.zeros(2, 3))
    jagged = packed_of(BATCHES["no_tail"], 2).to_nested()
    holes = torch.nested.narrow(
        torch.zeros(2, 5, 3), 1, torch.tensor([0, 1]), torch.tensor([2, 3]), layout=torch.jagged
    )
    with pytest.raises(ValueError, match=r"nested must be contiguous.*\.contiguous\(\)"):
        PackedBatch.from_nested(holes)
    with pytest.raises(ValueError, match=r"ragged dimension at 2 in \[3, 2, ragged\]: give nested\.transpose\(1, 2\)"):
        PackedBatch.from_nested(jagged.transpose(1, 2))
    assert PackedBatch.from_nested(holes.contiguous()).lengths_cpu.tolist() == [2, 3]


@pytest.mark.parametrize("made_by", ["transpose", "jagged_dim"])
@pytest.mark.parametrize("ragged_dim", [2, 3])
def test_only_the_second_dimension_may_be_ragged(made_by, ragged_dim):
    """Heads before tokens, as attention has them, are not taken for the tokens, and the message's way out works."""
    values, offsets = torch.randn(6, 2, 6), torch.tensor([0, 4, 6])
    if made_by == "transpose":
        nested = torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, ragged_dim).contiguous()
    else:
        moved = values.transpose(0, ragged_dim - 1).contiguous()
        nested = torch.nested.nested_tensor_from_jagged(moved, offsets, jagged_dim=ragged_dim)
    assert nested.is_contiguous()
    with pytest.raises(ValueError, match=rf"ragged dimension at {ragged_dim} in.*transpose\(1, {ragged_dim}\)"):
        PackedBatch.from_nested(nested)
    packed = PackedBatch.from_nested(nested.transpose(1, ragged_dim).contiguous())
    assert torch.equal(packed.values, values)
    assert packed.lengths_cpu.tolist() == [4, 2]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_nested_round_trip_combines_with_the_original(dtype):
    offsets = torch.tensor([0, 4, 6], dtype=dtype)
    nested = torch.nested.nested_tensor_from_jagged(torch.randn(6, 2), offsets)
    packed = PackedBatch.from_nested(nested)
    doubled = dataclasses.replace(packed, values=packed.values * 2)
    total = nested + doubled.to_nested()
    assert torch.equal(total.values(), nested.values() * 3)
    assert torch.equal((total * PackedBatch.from_nested(total).to_nested()).values(), total.values().square())


def test_nested_combines_after_compiled_code():
    nested = torch.nested.nested_tensor_from_jagged(torch.randn(6, 2), torch.tensor([0, 4, 6]))
    compiled = torch.compile(
        lambda packed: dataclasses.replace(packed, values=packed.values * 2).to_nested(),
        fullgraph=True,
        backend="aot_eager",
    )
    packed = dataclasses.replace(PackedBatch.from_nested(nested), lengths_cpu=None)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        total = nested + compiled(packed)
    assert torch.equal(total.values(), nested.values() * 3)


def test_offsets_beyond_32_bits_are_refused():
    values = torch.randn(6, 2)
    for offsets in ([0, 2**32 + 6], [0, 2**32 + 2, 2**33 + 6], [2**32, 2**32 + 6], [0, 5, 3, 6]):
        nested = torch.nested.nested_tensor_from_jagged(values, torch.tensor(offsets))
        with pytest.raises(RuntimeError, match=r"nested\.offsets\(\)(\[0\]|\[-1\])? must"):
            PackedBatch.from_nested(nested)
    values = torch.zeros(2**31, 0)
    with pytest.raises(RuntimeError, match=r"at most 2\*\*31 - 1 tokens, since cu_seqlens is int32, got 2147483648"):
        PackedBatch.from_nested(torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 2**31])))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_seqlen": 12}, "sequence 3 has length 13, more than the given max_seqlen 12"),
        (
            {"lengths_cpu": torch.tensor([5, 0, 1, 12, 3, 7])},
            "lengths_cpu must hold the lengths in cu_seqlens, got 12 for sequence 3 of length 13",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 5, 5, 6, 19, 21, 32], dtype=torch.int32)},
            "cu_seqlens[-1] must be at most the number of rows 31, got 32",
        ),
    ],
)
def test_to_nested_reports_wrong_lengths(fields, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        dataclasses.replace(packed_of(BATCHES["ragged"]), **fields).to_nested()
