"""PackedBatch: to and from padded, nested and TorchRec tensors."""

import dataclasses
import re
import sys
import types

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from ragged import BATCHES, RaggedBatch, ragged_batches
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.pin_memory import pin_memory as torch_pin_memory

from stamp_kernels.packed import PackedBatch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def packed_of(batch: RaggedBatch, *shape: int, known: bool = True, device: str = "cpu") -> PackedBatch:
    values = torch.randn(batch.total, *shape, device=device)
    lengths_cpu = torch.tensor(batch.lengths, dtype=torch.int64) if known else None
    return PackedBatch(values, batch.cu_seqlens.to(device), batch.max_seqlen, lengths_cpu=lengths_cpu)


def share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def padded_mask(lengths: tuple[int, ...], padded_length: int, padding: str) -> Tensor:
    """Bool [B, S] with the given numbers of valid tokens in each row."""
    column = torch.arange(padded_length)
    rows = []
    for n in lengths:
        if padding == "right":
            rows.append(column < n)
        elif padding == "left":
            rows.append(column >= padded_length - n)
        else:
            rows.append(torch.randperm(padded_length) < n)
    return torch.stack(rows) if rows else torch.zeros(0, padded_length, dtype=torch.bool)


# Padded


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


# Nested tensors


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
    for nested in (jagged.transpose(1, 2), holes):
        with pytest.raises(ValueError, match=r"nested must be contiguous.*\.contiguous\(\)"):
            PackedBatch.from_nested(nested)
    assert PackedBatch.from_nested(holes.contiguous()).lengths_cpu.tolist() == [2, 3]


# TorchRec


class StandInJaggedTensor:
    """The part of torchrec.sparse.jagged_tensor.JaggedTensor that PackedBatch uses. Its offsets may be int64."""

    def __init__(self, values: Tensor, weights=None, lengths: Tensor | None = None, offsets: Tensor | None = None):
        self._values, self._lengths, self._offsets = values, lengths, offsets

    def values(self) -> Tensor:
        return self._values

    def lengths(self) -> Tensor:
        return self._lengths

    def offsets(self) -> Tensor:
        return self._offsets


@pytest.fixture
def torchrec(monkeypatch):
    module = types.ModuleType("torchrec.sparse.jagged_tensor")
    module.JaggedTensor = StandInJaggedTensor
    monkeypatch.setitem(sys.modules, "torchrec", types.ModuleType("torchrec"))
    monkeypatch.setitem(sys.modules, "torchrec.sparse", types.ModuleType("torchrec.sparse"))
    monkeypatch.setitem(sys.modules, "torchrec.sparse.jagged_tensor", module)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", BATCHES)
def test_jagged_round_trip(torchrec, name, known):
    batch = BATCHES[name]
    packed = packed_of(batch, known=known)
    jagged = packed.to_jagged()
    assert isinstance(jagged, StandInJaggedTensor)
    assert torch.equal(jagged.values(), packed.values[: batch.valid])
    assert share_memory(jagged.values(), packed.values)
    assert jagged.lengths().tolist() == list(batch.lengths)
    assert torch.equal(jagged.offsets(), batch.cu_seqlens)

    back = PackedBatch.from_jagged(jagged)
    assert share_memory(back.values, packed.values)
    assert torch.equal(back.cu_seqlens, batch.cu_seqlens)
    assert back.max_seqlen == batch.max_seqlen
    assert back.lengths_cpu.tolist() == list(batch.lengths)


def test_from_jagged_takes_int64_offsets():
    packed = PackedBatch.from_jagged(StandInJaggedTensor(torch.arange(5), offsets=torch.tensor([0, 3, 5])))
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.max_seqlen == 3


def test_to_jagged_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchrec", None)
    with pytest.raises(ImportError, match="to_jagged needs TorchRec: `pip install torchrec`"):
        packed_of(BATCHES["ragged"]).to_jagged()


# The object itself


@pytest.mark.parametrize("name", BATCHES)
def test_materialized_positions_count_from_0_in_every_sequence(name):
    batch = BATCHES[name]
    packed = packed_of(batch)
    expected = [i for n in batch.lengths for i in range(n)] + [0] * batch.tail
    assert packed.materialized_positions().tolist() == expected
    assert packed.materialized_positions().dtype == torch.int32
    positions = batch.positions()
    assert dataclasses.replace(packed, positions=positions).materialized_positions() is positions


@pytest.mark.parametrize("device", DEVICES)
def test_to_moves_what_lives_on_the_device(device):
    batch = BATCHES["ragged"]
    packed = dataclasses.replace(packed_of(batch, 2), positions=batch.positions())
    moved = packed.to(device)
    assert {moved.values.device.type, moved.cu_seqlens.device.type, moved.positions.device.type} == {device}
    assert moved.lengths_cpu is packed.lengths_cpu
    assert packed_of(batch).to(device).positions is None


@pytest.mark.parametrize("with_positions", [True, False])
def test_pin_memory_pins_what_moves_to_the_device(monkeypatch, with_positions):
    pinned = []

    def pin(x: Tensor) -> Tensor:
        pinned.append(x)
        return x.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    batch = BATCHES["ragged"]
    packed = dataclasses.replace(packed_of(batch, 2), positions=batch.positions() if with_positions else None)
    # What the DataLoader's thread calls for a batch that is a mapping.
    result = torch_pin_memory({"packed": packed})["packed"]
    moving = [packed.values, packed.cu_seqlens, *([packed.positions] if with_positions else [])]
    assert [id(x) for x in pinned] == [id(x) for x in moving]
    assert isinstance(result, PackedBatch)
    assert result.values is not packed.values
    assert torch.equal(result.values, packed.values)
    assert torch.equal(result.cu_seqlens, packed.cu_seqlens)
    assert torch.equal(result.positions, packed.positions) if with_positions else result.positions is None
    assert result.max_seqlen == packed.max_seqlen
    assert result.lengths_cpu is packed.lengths_cpu


@pytest.mark.gpu
def test_pinned_batches_move_without_a_sync():
    batch = BATCHES["ragged"]
    pinned = dataclasses.replace(packed_of(batch, 2), positions=batch.positions()).pin_memory()
    assert pinned.values.is_pinned()
    assert pinned.cu_seqlens.is_pinned()
    assert pinned.positions.is_pinned()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = pinned.to("cuda", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(moved.values.cpu(), pinned.values)
    assert torch.equal(moved.positions.cpu(), pinned.positions)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed_of(BATCHES["ragged"]).max_seqlen = 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": [1.0]}, "values must be a tensor, got list"),
        ({"values": torch.tensor(1.0)}, "values must have shape [total, ...], got a tensor without dimensions"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must have dtype torch.int32, got torch.int64"),
        ({"max_seqlen": 5.0}, "max_seqlen must be an int (not a tensor), got float"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, "positions must have shape [5], got [4]"),
        ({"positions": torch.zeros(5)}, "positions must have dtype torch.int32, got torch.float32"),
        ({"lengths_cpu": torch.tensor([2, 3])}, "lengths_cpu must have shape [1], got [2]"),
        (
            {"lengths_cpu": torch.tensor([5.0])},
            "lengths_cpu must have dtype torch.int32, torch.int64, got torch.float32",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_names_the_bad_field(fields, message):
    good = {"values": torch.zeros(5, 2), "cu_seqlens": torch.tensor([0, 5], dtype=torch.int32), "max_seqlen": 5}
    with pytest.raises(ValueError, match=re.escape(message)):
        PackedBatch(**{**good, **fields})


@pytest.mark.gpu
def test_lengths_cpu_stays_on_the_cpu():
    with pytest.raises(ValueError, match="lengths_cpu must be on cpu, got cuda:0"):
        dataclasses.replace(packed_of(BATCHES["ragged"]), lengths_cpu=torch.tensor(BATCHES["ragged"].lengths).cuda())


def test_is_a_pytree():
    packed = packed_of(BATCHES["ragged"], 2)
    leaves, spec = pytree.tree_flatten({"packed": packed})
    assert any(leaf is packed.values for leaf in leaves)
    back = pytree.tree_unflatten(leaves, spec)["packed"]
    assert isinstance(back, PackedBatch)
    assert back.values is packed.values
    assert back.positions is None
    doubled = pytree.tree_map_only(Tensor, lambda x: x * 2, packed)
    assert torch.equal(doubled.values, packed.values * 2)


@pytest.mark.parametrize("known", [True, False])
def test_compiles_in_and_out_once_for_all_sizes(known):
    def double(packed: PackedBatch) -> tuple[PackedBatch, Tensor]:
        made = PackedBatch(packed.values * 2, packed.cu_seqlens, packed.max_seqlen, packed.materialized_positions())
        made = dataclasses.replace(made, lengths_cpu=packed.lengths_cpu)
        return made, made.to_padded(made.max_seqlen + 1, padding_side="left", padding_value=-1)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(double, fullgraph=True, dynamic=True, backend=counter)
    for batch in (RaggedBatch((3, 4), 2), RaggedBatch((5, 0, 9), 0), RaggedBatch((2,) * 50, 1)):
        packed = packed_of(batch, 24, known=known)
        values = packed.values.requires_grad_()
        (made, padded), (made_eager, padded_eager) = compiled(packed), double(packed)
        assert isinstance(made, PackedBatch)
        assert torch.equal(made.positions, made_eager.positions)
        assert made.max_seqlen == batch.max_seqlen
        assert (made.lengths_cpu is not None) == known
        assert torch.equal(padded, padded_eager)
        gradient, gradient_eager = (torch.autograd.grad(y.square().sum(), values)[0] for y in (padded, padded_eager))
        assert torch.equal(gradient, gradient_eager)
    assert counter.frame_count == 1
