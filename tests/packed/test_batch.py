"""PackedBatch itself: its fields, its checks, other devices, pytrees, torch.compile and torch.export."""

import dataclasses
import io
import re

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from packed_cases import packed_of
from ragged import BATCHES, RaggedBatch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data._utils.pin_memory import pin_memory as torch_pin_memory

from stamp_kernels.ops.attention.tile_list import tile_list
from stamp_kernels.packed import PackedBatch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


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
    packed = dataclasses.replace(packed, tiles=tile_list(packed.cu_seqlens, batch.total))
    moved = packed.to(device)
    assert moved.tiles.device.type == device and torch.equal(moved.tiles.cpu(), packed.tiles)
    assert packed.to("meta").tiles.is_meta
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
    packed = dataclasses.replace(packed, tiles=tile_list(packed.cu_seqlens, batch.total))
    # What the DataLoader's thread calls for a batch that is a mapping.
    result = torch_pin_memory({"packed": packed})["packed"]
    moving = [packed.values, packed.cu_seqlens, *([packed.positions] if with_positions else []), packed.tiles]
    assert [id(x) for x in pinned] == [id(x) for x in moving]
    assert isinstance(result, PackedBatch)
    assert result.values is not packed.values
    assert torch.equal(result.values, packed.values)
    assert torch.equal(result.cu_seqlens, packed.cu_seqlens)
    assert torch.equal(result.positions, packed.positions) if with_positions else result.positions is None
    assert result.max_seqlen == packed.max_seqlen
    assert result.lengths_cpu is packed.lengths_cpu


def test_batches_get_tiles_where_kernels_read_them():
    packed = packed_of(RaggedBatch((1000, 3, 70, 0, 90), tail=7), 2)
    assert packed.with_tiles() is packed  # kernels for the CPU have a list of their own
    listed = packed.to("meta").with_tiles()
    assert listed.tiles.shape == (1170 // 64 + 5, 2)
    assert listed.with_tiles() is listed
    assert dataclasses.replace(listed, values=listed.values[:, :1]).tiles is listed.tiles
    for lengths in ((), (64, 3, 1, 20), (120, 100, 90, 120), (1000,)):  # the longest is not much longer than the mean
        alike = packed_of(RaggedBatch(lengths, tail=7), 2).to("meta")
        assert alike.with_tiles() is alike


class WithTiles(torch.nn.Module):
    def forward(self, packed: PackedBatch) -> PackedBatch:
        return packed.with_tiles()


def test_tiles_in_a_program_guard_no_size():
    packed = packed_of(RaggedBatch((100, *[90] * 19), tail=5), 2, known=False).to("meta")
    assert packed.with_tiles() is packed
    shapes = [{0: torch.export.Dim("T", max=10**6)}, None, None]
    program = torch.export.export(WithTiles(), (packed,), dynamic_shapes=(shapes,))
    assert program.module()(packed).tiles.shape == (packed.values.shape[0] // 64 + 20, 2)


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
        (
            {"cu_seqlens": torch.tensor([0.0, 5.0])},
            "cu_seqlens must have dtype torch.int32, torch.int64, got torch.float32",
        ),
        ({"max_seqlen": 5.0}, "max_seqlen must be an int (not a tensor), got float"),
        ({"max_seqlen": True}, "max_seqlen must be an int (not a tensor), got bool"),
        ({"max_seqlen": np.True_}, "max_seqlen must be an int (not a tensor), got bool"),
        ({"max_seqlen": torch.tensor(5)}, "max_seqlen must be an int (not a tensor), got Tensor"),
        ({"max_seqlen": np.int64(-1)}, "max_seqlen must be in [0, inf), got -1"),
        ({"max_seqlen": 2**31}, "max_seqlen must be in [0, 2147483647], got 2147483648"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, "positions must have shape [5], got [4]"),
        ({"positions": torch.zeros(5)}, "positions must have dtype torch.int32, got torch.float32"),
        ({"lengths_cpu": torch.tensor([2, 3])}, "lengths_cpu must have shape [1], got [2]"),
        ({"tiles": torch.zeros(2, 2, dtype=torch.int32)}, "tiles must have shape [1, 2], got [2, 2]"),
        ({"tiles": torch.zeros(1, 2)}, "tiles must have dtype torch.int32, got torch.float32"),
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


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_max_seqlen_may_be_a_numpy_integer(kind):
    packed = PackedBatch(torch.zeros(5), torch.tensor([0, 5], dtype=torch.int32), kind(5))
    assert type(packed.max_seqlen) is int
    assert packed.max_seqlen == 5


def test_tree_map_may_change_fields_to_anything():
    packed = packed_of(BATCHES["ragged"], 2)
    shapes = pytree.tree_map(lambda x: x.shape if isinstance(x, Tensor) else None, packed)
    assert (shapes.values, shapes.cu_seqlens, shapes.max_seqlen) == ((31, 2), (7,), None)
    assert shapes.positions is None
    marks = pytree.tree_map_with_path(lambda path, x: pytree.keystr(path), packed)
    assert (marks.values, marks.lengths_cpu) == (".values", ".lengths_cpu")
    assert pytree.tree_leaves(pytree.tree_map(lambda x: None, packed)) == []


def test_vmap_reads_packed_batches():
    packed = packed_of(BATCHES["ragged"])
    weights = torch.randn(4)
    got = torch.func.vmap(lambda packed, weight: packed.values * weight, in_dims=(None, 0))(packed, weights)
    assert torch.equal(got, weights.unsqueeze(1) * packed.values)


class Doubled(torch.nn.Module):
    def forward(self, packed: PackedBatch) -> PackedBatch:
        return dataclasses.replace(packed, values=packed.values * 2)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_programs_take_and_return_packed_batches(strict):
    dynamic = torch.export.Dim.DYNAMIC
    first = packed_of(RaggedBatch((3, 4), 2), 2)
    shapes = [{0: dynamic}, {0: dynamic}, dynamic, {0: dynamic}]  # of the fields that are not None
    program = torch.export.export(Doubled(), (first,), dynamic_shapes=(shapes,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (RaggedBatch((3, 4), 2), RaggedBatch((5, 9, 2), 0)):
        packed = packed_of(batch, 2)
        made = loaded(packed)
        assert isinstance(made, PackedBatch)
        assert torch.equal(made.values, packed.values * 2)
        assert torch.equal(made.cu_seqlens, packed.cu_seqlens)
        assert made.max_seqlen == packed.max_seqlen
        assert made.positions is None
