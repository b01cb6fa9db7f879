"""PackedBatch: sequences of different lengths one after another, without padding."""

import dataclasses
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from stamp_kernels.common.contents import check_cu_seqlens_contents
from stamp_kernels.common.rows import sequence_of_row
from stamp_kernels.ops._checks import check_choice, check_count, check_cu_seqlens, check_range, check_tensor
from stamp_kernels.ops.pruning.gather import gather_tokens
from stamp_kernels.ops.pruning.selection import TokenSelection

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import JaggedTensor

__all__ = ["PackedBatch"]

_CPU = torch.device("cpu")
_INTEGERS = (torch.int32, torch.int64)


# eq=False: comparing tensors gives tensors, so packed batches compare by identity.
@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences packed one after another, in the layout of variable-length attention kernels.

    Differentiable through `values`. `dataclasses.replace(packed, values=...)` puts other values into the same layout.
    A PackedBatch is a pytree, and functions under torch.compile may create, read, take and return one.

    Attributes:
        values: `[T, ...]`, the rows of all sequences. T may exceed `cu_seqlens[-1]`. The rows past it are tail rows:
            they belong to no sequence and are never read.
        cu_seqlens: int32 `[B + 1]` on the device of values. Sequence b is `values[cu_seqlens[b]:cu_seqlens[b + 1]]`.
        max_seqlen: the longest length, or an upper bound of it.
        positions: int32 `[T]`, each token's index in its original sequence. It survives pruning. None: 0, 1, ..., n - 1
            in every sequence.
        lengths_cpu: int32 or int64 `[B]`, the lengths on the CPU, if they are known there. Sizes that depend on them
            are then exact without a sync.

    Raises:
        ValueError: a field has a wrong shape, dtype or device. Contents are not read.
    """

    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor | None = None
    lengths_cpu: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("values", self.values)
        if self.values.dim() == 0:
            raise ValueError("values must have shape [total, ...], got a tensor without dimensions")
        check_cu_seqlens("cu_seqlens", self.cu_seqlens, self.values.device)
        check_count("max_seqlen", self.max_seqlen)
        if self.positions is not None:
            check_tensor(
                "positions",
                self.positions,
                shape=[self.values.shape[0]],
                dtypes=[torch.int32],
                device=self.values.device,
            )
        if self.lengths_cpu is not None:
            batch = self.cu_seqlens.shape[0] - 1
            check_tensor("lengths_cpu", self.lengths_cpu, shape=[batch], dtypes=_INTEGERS, device=_CPU)

    @classmethod
    def from_padded(cls, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None) -> "PackedBatch":
        """Drop the padding of `x`.

        Packs the valid tokens of every row in their order. The padding may be on the right, on the left or scattered.
        The CPU needs the lengths to size the result. That costs one sync, and none if the mask or the lengths are on
        the CPU, which is allowed even if x is on a GPU.

        Args:
            x: `[B, S, ...]`, any dtype.
            mask: bool or integer `[B, S]`, nonzero where a token is valid.
            lengths: int32 or int64 `[B]`, 0 to S, for padding on the right. Exactly one of mask and lengths must be
                given.

        Returns:
            A batch with lengths_cpu and an exact max_seqlen, and without positions: the valid tokens of a row count
            as 0, 1, ..., n - 1.

        Raises:
            ValueError: an argument has a wrong shape or dtype.
            RuntimeError: a length is outside 0 to S.
        """
        check_tensor("x", x)
        if x.dim() < 2:
            raise ValueError(f"x must have shape [batch, padded length, ...], got {list(x.shape)}")
        batch, padded_length = x.shape[:2]
        if mask is not None and lengths is None:
            check_tensor("mask", mask, shape=[batch, padded_length])
            if mask.is_floating_point() or mask.is_complex():
                raise ValueError(f"mask must have dtype bool or an integer dtype, got {mask.dtype}")
            mask = mask.bool()
            lengths_cpu = mask.sum(1, dtype=torch.int32).cpu()
            mask = mask.to(x.device, non_blocking=True)
        elif lengths is not None and mask is None:
            check_tensor("lengths", lengths, shape=[batch], dtypes=_INTEGERS)
            lengths_cpu = lengths.to(_CPU, torch.int32)
            if batch > 0:
                low, high = int(lengths_cpu.min()), int(lengths_cpu.max())
                if low < 0 or high > padded_length:
                    raise RuntimeError(f"lengths must be in [0, {padded_length}], got {low} to {high}")
            column = torch.arange(padded_length, device=x.device)
            mask = column < lengths.to(x.device, non_blocking=True).unsqueeze(1)
        else:
            given = "neither" if mask is None else "both"
            raise ValueError(f"exactly one of mask and lengths must be given, got {given}")

        total = int(lengths_cpu.sum())
        max_seqlen = int(lengths_cpu.max()) if batch > 0 else 0
        valid = mask.flatten()
        valid_up_to = valid.cumsum(0)
        # Packed row j is the padded row where the number of valid rows reaches j + 1.
        padded_row = torch.searchsorted(valid_up_to, torch.arange(1, total + 1, device=x.device))
        packed_row = torch.where(valid, valid_up_to - 1, -1).to(torch.int32)
        cu_seqlens = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        selection = TokenSelection(padded_row, cu_seqlens, max_seqlen, packed_row, batch * padded_length)
        return cls(gather_tokens(x.flatten(0, 1), selection), cu_seqlens, max_seqlen, lengths_cpu=lengths_cpu)

    def to_padded(
        self,
        total_length: int | None = None,
        padding_side: Literal["right", "left"] = "right",
        padding_value: float = 0,
    ) -> Tensor:
        """One row for each sequence, padded with `padding_value`. Never syncs; tail rows are left out.

        Args:
            total_length: S, at least max_seqlen. None: max_seqlen.
            padding_side: with `"left"` all rows end in the last column.
            padding_value: the value on padding.

        Returns:
            `[B, S, ...]` in the dtype of values.

        Raises:
            ValueError: padding_side is not allowed, or total_length is below max_seqlen.
            RuntimeError: cu_seqlens does not rise from 0 to at most T, or a sequence is longer than max_seqlen
                (checked on the CPU, or under STAMP_KERNELS_CHECK=1).
        """
        check_choice("padding_side", padding_side, ("right", "left"))
        if total_length is None:
            total_length = self.max_seqlen
        check_range("total_length", total_length, self.max_seqlen)
        total, device = self.values.shape[0], self.values.device
        check_cu_seqlens_contents("cu_seqlens", self.cu_seqlens, total, self.max_seqlen)
        batch = self.cu_seqlens.shape[0] - 1
        starts, ends = self.cu_seqlens[:-1].unsqueeze(1), self.cu_seqlens[1:].unsqueeze(1)
        column = torch.arange(total_length, device=device)
        # Column 0 of padded row b is this packed row. With padding on the left it is before the sequence's first row.
        first = starts if padding_side == "right" else ends - total_length
        packed_row = first + column  # [B, S]
        packed_row = torch.where((packed_row >= starts) & (packed_row < ends), packed_row, -1).flatten()

        row = torch.arange(total, device=device)
        sequence = sequence_of_row(self.cu_seqlens, total)
        is_tail = sequence == batch
        first_of_row = torch.cat([first.flatten(), first.new_zeros(1)])[sequence]
        padded_row = torch.where(is_tail, -1, sequence * total_length + row - first_of_row).to(torch.int32)

        # gather_tokens reads only the two row maps of a selection.
        selection = TokenSelection(packed_row, self.cu_seqlens, self.max_seqlen, padded_row, total)
        padded = gather_tokens(self.values, selection)
        if padding_value != 0:
            is_padding = (packed_row < 0).view(-1, *[1] * (padded.dim() - 1))
            padded = padded.masked_fill(is_padding, padding_value)
        return padded.unflatten(0, (batch, total_length))

    @classmethod
    def from_nested(cls, nested: Tensor) -> "PackedBatch":
        """The values and offsets of a nested tensor with the jagged layout, without a copy of the values.

        One sync for the lengths if the tensor is not on the CPU.

        Raises:
            ValueError: the layout is not torch.jagged, or the tensor is not contiguous with the ragged dimension
                second.
        """
        if not (isinstance(nested, Tensor) and nested.is_nested and nested.layout == torch.jagged):
            raise ValueError("nested must be a nested tensor with layout=torch.jagged")
        if not nested.is_contiguous():
            raise ValueError(
                "nested must be contiguous, with the ragged dimension second and no holes: call .contiguous() first"
            )
        return cls._from_offsets(nested.values(), nested.offsets())  # type: ignore[attr-defined]  # of jagged tensors

    def to_nested(self) -> Tensor:
        """A nested tensor `[B, ragged, ...]` with the layout torch.jagged over the same values, without a copy.

        A nested tensor has no tail rows, so they are cut off. Without lengths_cpu that costs one sync.
        """
        return torch.nested.nested_tensor_from_jagged(
            self._values_without_tail(), self.cu_seqlens, max_seqlen=self.max_seqlen
        )

    @classmethod
    def from_jagged(cls, jagged: "JaggedTensor") -> "PackedBatch":
        """The values and offsets of a TorchRec JaggedTensor, without a copy of the values. Weights are left out.

        One sync for the lengths if the tensor is not on the CPU. For one feature of a KeyedJaggedTensor give
        `keyed[key]`.
        """
        return cls._from_offsets(jagged.values(), jagged.offsets())

    def to_jagged(self) -> "JaggedTensor":
        """A TorchRec JaggedTensor over the same values, without a copy.

        A JaggedTensor has no tail rows, so they are cut off. Without lengths_cpu that costs one sync.

        Raises:
            ImportError: torchrec is not installed.
        """
        try:
            from torchrec.sparse.jagged_tensor import JaggedTensor
        except ImportError as error:
            raise ImportError("to_jagged needs TorchRec: `pip install torchrec`") from error
        return JaggedTensor(values=self._values_without_tail(), lengths=self.cu_seqlens.diff(), offsets=self.cu_seqlens)

    def materialized_positions(self) -> Tensor:
        """int32 `[T]`: `positions`; if that is None, 0, 1, ..., n - 1 in every sequence and 0 on tail rows."""
        if self.positions is not None:
            return self.positions
        total = self.values.shape[0]
        row = torch.arange(total, device=self.values.device, dtype=torch.int32)
        sequence = sequence_of_row(self.cu_seqlens, total)
        position = row - self.cu_seqlens[sequence]
        return torch.where(row < self.cu_seqlens[-1], position, 0)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        """The same batch on another device. lengths_cpu stays on the CPU."""
        positions = self.positions
        return dataclasses.replace(
            self,
            values=self.values.to(device, non_blocking=non_blocking),
            cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking),
            positions=None if positions is None else positions.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> "PackedBatch":
        """The same batch in page-locked CPU memory, from where `to(device, non_blocking=True)` does not wait.

        A DataLoader with pin_memory=True calls it. lengths_cpu never leaves the CPU and is not pinned.
        """
        positions = self.positions
        return dataclasses.replace(
            self,
            values=self.values.pin_memory(),
            cu_seqlens=self.cu_seqlens.pin_memory(),
            positions=None if positions is None else positions.pin_memory(),
        )

    @classmethod
    def _from_offsets(cls, values: Tensor, offsets: Tensor) -> "PackedBatch":
        lengths_cpu = offsets.diff().to(_CPU, torch.int32)
        max_seqlen = int(lengths_cpu.max()) if lengths_cpu.numel() > 0 else 0
        return cls(values, offsets.to(torch.int32), max_seqlen, lengths_cpu=lengths_cpu)

    def _values_without_tail(self) -> Tensor:
        num_tokens = self.cu_seqlens[-1] if self.lengths_cpu is None else self.lengths_cpu.sum()
        return self.values[: int(num_tokens)]


# FSDP2 and torch.export find the tensors inside arguments and results through the pytree.
torch.export.register_dataclass(PackedBatch, serialized_type_name="stamp_kernels.PackedBatch")
