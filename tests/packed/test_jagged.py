"""PackedBatch from and to TorchRec's JaggedTensor. TorchRec is not installed: stand-ins have its methods."""

import dataclasses
import re
import sys
import types

import pytest
import torch
from packed_cases import packed_of, share_memory
from ragged import BATCHES
from torch import Tensor

from stamp_kernels.packed import PackedBatch


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


class StandInKeyedJaggedTensor(StandInJaggedTensor):
    """Several features: offsets of all sequences of one feature, then of the next."""

    def keys(self) -> list[str]:
        return ["items", "shops"]


def test_from_jagged_refuses_what_is_no_jagged_tensor():
    nested = torch.nested.nested_tensor_from_jagged(torch.zeros(2, 1), torch.tensor([0, 2]))
    keyed = StandInKeyedJaggedTensor(torch.arange(4), offsets=torch.tensor([0, 1, 2, 3, 4]))
    for jagged, name, way_out in [
        (keyed, "StandInKeyedJaggedTensor", r": give one of its features, keyed\[key\]"),
        ({"values": 1}, "dict", r": give one of its features, keyed\[key\]"),
        (nested, "NestedTensor", "$"),
        ([1], "list", "$"),
    ]:
        with pytest.raises(ValueError, match=f"jagged must be a JaggedTensor, got {name}{way_out}"):
            PackedBatch.from_jagged(jagged)


def test_from_jagged_without_sequences():
    """TorchRec's offsets then have no entry."""
    jagged = StandInJaggedTensor(torch.zeros(0, 3), offsets=torch.zeros(0, dtype=torch.int64))
    packed = PackedBatch.from_jagged(jagged)
    assert packed.cu_seqlens.tolist() == [0]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.lengths_cpu.tolist() == []
    assert packed.max_seqlen == 0
    assert packed.to_padded().shape == (0, 0, 3)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (torch.tensor([0, 2**32 + 5]), "jagged.offsets()[-1] must be at most the number of rows 5, got 4294967301"),
        (torch.tensor([2**32, 5]), "jagged.offsets()[0] must be 0, got 4294967296"),
        (torch.tensor([0, 4, 3, 5]), "jagged.offsets() must never decrease, got 4 then 3 at index 1"),
    ],
)
def test_from_jagged_reports_wrong_offsets(offsets, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        PackedBatch.from_jagged(StandInJaggedTensor(torch.arange(5), offsets=offsets))


def test_from_jagged_names_offsets_of_another_dtype():
    jagged = StandInJaggedTensor(torch.arange(5), offsets=torch.tensor([0.0, 5.0]))
    message = r"jagged\.offsets\(\) must have dtype torch\.int32, torch\.int64, got torch\.float32"
    with pytest.raises(ValueError, match=message):
        PackedBatch.from_jagged(jagged)


def test_to_jagged_reports_wrong_lengths(torchrec):
    packed = dataclasses.replace(packed_of(BATCHES["no_tail"]), lengths_cpu=torch.tensor([4, 5, 3]))
    with pytest.raises(RuntimeError, match="lengths_cpu must hold the lengths in cu_seqlens, got 5 for sequence 1"):
        packed.to_jagged()
