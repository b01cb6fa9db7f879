"""PackedBatch: sequences of different lengths one after another, without padding."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import _tensor_symint_registry

from stamp_kernels.common.contents import check_cu_seqlens_contents, contents_are_checked
from stamp_kernels.common.exported import exported_dataclass
from stamp_kernels.common.rows import sequence_of_row
from stamp_kernels.common.tiles import lengths_are_alike, num_listed_tiles
from stamp_kernels.ops._checks import check_choice, check_count, check_range, check_tensor, checked_cu_seqlens
from stamp_kernels.ops.attention.tile_list import tile_list
from stamp_kernels.ops.pruning.gather import check_fill_value, gather_tokens
from stamp_kernels.ops.pruning.selection import TokenSelection

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import JaggedTensor

__all__ = ["PackedBatch"]

_CPU = torch.device("cpu")
_INTEGERS = (torch.int32, torch.int64)
_INT32_MAX = 2**31 - 1


# eq=False: comparing tensors gives tensors, so packed batches compare by identity.
@exported_dataclass()
@dataclasses.dataclass(frozen=True, eq=False)
class PackedBatch:
    """Sequences packed one after another, in the layout of variable-length attention kernels.

    Differentiable through `values`. `dataclasses.replace(packed, values=...)` puts other values into the same layout.
    A PackedBatch is a pytree with its fields as leaves, for torch.export too, and functions under torch.compile may
    create, read, take and return one. Only the constructor checks the fields: `tree_map` may put anything into them.

    Attributes:
        values: `[T, ...]`, the rows of all sequences. T may exceed `cu_seqlens[-1]`. The rows past it are tail rows:
            they belong to no sequence and are never read.
        cu_seqlens: int32 `[B + 1]` on the device of values. Sequence b is `values[cu_seqlens[b]:cu_seqlens[b + 1]]`.
            Offsets in int64, as TorchRec and FBGEMM have them, are converted.
        max_seqlen: the longest length, or an upper bound of it. An integer of another type (NumPy's) is converted.
        positions: int32 `[T]`, each token's index in its original sequence. It survives pruning. None: 0, 1, ..., n - 1
            in every sequence.
        lengths_cpu: int32 or int64 `[B]`, the lengths on the CPU, if they are known there. Sizes that depend on them
            are then exact without a sync.
        tiles: int32 `[N, 2]`, `tile_list(cu_seqlens, T)` for attention's kernels, see `with_tiles`. Other offsets need
            another one, or None.

    Raises:
        ValueError: a field has a wrong shape, dtype or device. Contents are not read.
    """

    values: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    positions: Tensor | None = None
    lengths_cpu: Tensor | None = None
    tiles: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("values", self.values)
        if self.values.dim() == 0:
            raise ValueError("values must have shape [total, ...], got a tensor without dimensions")
        cu_seqlens = checked_cu_seqlens("cu_seqlens", self.cu_seqlens, self.values.device)
        if cu_seqlens is not self.cu_seqlens:
            object.__setattr__(self, "cu_seqlens", cu_seqlens)  # the class is frozen
        max_seqlen = check_count("max_seqlen", self.max_seqlen)
        check_range("max_seqlen", max_seqlen, 0, _INT32_MAX)
        if max_seqlen is not self.max_seqlen:
            object.__setattr__(self, "max_seqlen", max_seqlen)
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
        if self.tiles is not None:
            shape = [num_listed_tiles(self.values.shape[0], self.cu_seqlens.shape[0] - 1), 2]
            check_tensor("tiles", self.tiles, shape=shape, dtypes=[torch.int32], device=self.values.device)

    @classmethod
    def from_padded(cls, x: Tensor, mask: Tensor | None = None, *, lengths: Tensor | None = None) -> "PackedBatch":
        """Drop the padding of `x`.

        Packs the valid tokens of every row in their order. The padding may be on the right, on the left or scattered.
        The CPU needs the lengths to size the result. That costs one sync, and none if the mask or the lengths are on
        the CPU, which is allowed even if x is on a GPU. It is a graph break under torch.compile, and a program of
        torch.export is given the PackedBatch instead.

        Args:
            x: `[B, S, ...]`, any dtype.
            mask: bool or integer `[B, S]`, nonzero where a token is valid, like Hugging Face's attention_mask. This is
                the opposite of the key_padding_mask of torch.nn.MultiheadAttention, which is True on padding: give
                `~key_padding_mask`. A mask that is almost surely inverted causes a UserWarning (if x is on the CPU, or
                under STAMP_KERNELS_CHECK=1).
            lengths: int32 or int64 `[B]`, 0 to S, for padding on the right. Exactly one of mask and lengths must be
                given.

        Returns:
            A batch with lengths_cpu and an exact max_seqlen, and without positions: the valid tokens of a row count
            as 0, 1, ..., n - 1.

        Raises:
            ValueError: an argument has a wrong shape or dtype.
            RuntimeError: a length is outside 0 to S, or more than 2**31 - 1 tokens are valid.
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
            lengths_cpu = mask.sum(1).cpu()
        elif lengths is not None and mask is None:
            check_tensor("lengths", lengths, shape=[batch], dtypes=_INTEGERS)
            lengths_cpu = lengths.to(_CPU, torch.int64)
            if batch > 0:
                low, high = int(lengths_cpu.min()), int(lengths_cpu.max())
                if low < 0 or high > padded_length:
                    raise RuntimeError(f"lengths must be in [0, {padded_length}], got {low} to {high}")
        else:
            given = "neither" if mask is None else "both"
            raise ValueError(f"exactly one of mask and lengths must be given, got {given}")

        total = int(lengths_cpu.sum())
        check_num_tokens(total)
        max_seqlen = int(lengths_cpu.max()) if batch > 0 else 0
        lengths_cpu = lengths_cpu.to(torch.int32)
        if mask is not None:
            mask = mask.to(x.device, non_blocking=True)
            if contents_are_checked(x.device) and _looks_inverted(x, mask, lengths_cpu):
                warnings.warn(
                    "mask looks inverted: it is True only on equal tokens at the ends of rows, and a row has none. "
                    "It must be True on valid tokens: if it is True on padding, give ~mask",
                    stacklevel=2,
                )
        else:
            assert lengths is not None
            column = torch.arange(padded_length, device=x.device)
            mask = column < lengths.to(x.device, non_blocking=True).unsqueeze(1)
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
            ValueError: padding_side is not allowed, padding_value is no number that the dtype holds, total_length is
                below max_seqlen, or B * S exceeds 2**31 - 1.
            RuntimeError: cu_seqlens does not rise from 0 to at most T, or a sequence is longer than max_seqlen
                (checked on the CPU, or under STAMP_KERNELS_CHECK=1).
        """
        check_choice("padding_side", padding_side, ("right", "left"))
        check_fill_value("padding_value", padding_value, self.values.dtype)
        batch = self.cu_seqlens.shape[0] - 1
        if total_length is None:
            total_length = self.max_seqlen
        total_length = check_count("total_length", total_length, self.max_seqlen)
        if max(batch, 1) * total_length > _INT32_MAX:
            raise ValueError(
                f"total_length must be at most {_INT32_MAX // max(batch, 1)} with {batch} sequences, got {total_length}"
            )
        total, device = self.values.shape[0], self.values.device
        check_cu_seqlens_contents("cu_seqlens", self.cu_seqlens, total, self.max_seqlen)
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

        # gather_tokens reads only the two row maps of a selection, for which padding is a tail row.
        selection = TokenSelection(packed_row, self.cu_seqlens, self.max_seqlen, padded_row, total)
        padded = gather_tokens(self.values, selection, fill_value=padding_value)
        return padded.unflatten(0, (batch, total_length))

    @classmethod
    def from_nested(cls, nested: Tensor) -> "PackedBatch":
        """The values and offsets of a nested tensor with the jagged layout, without a copy of the values.

        One sync for the lengths if the tensor is not on the CPU.

        Raises:
            ValueError: the layout is not torch.jagged, the ragged dimension is not the second, or the tensor is not
                contiguous.
            RuntimeError: the offsets do not rise from 0 to at most T, or T is above 2**31 - 1.
        """
        if not (isinstance(nested, Tensor) and nested.is_nested and nested.layout == torch.jagged):
            raise ValueError("nested must be a nested tensor with layout=torch.jagged")
        ragged_dim = nested._ragged_idx  # type: ignore[attr-defined]  # of jagged tensors
        if ragged_dim != 1:
            raise ValueError(
                f"nested must have shape [batch, ragged, ...], got the ragged dimension at {ragged_dim} in "
                f"{_shape_of_nested(nested)}: give nested.transpose(1, {ragged_dim}).contiguous()"
            )
        if not nested.is_contiguous():
            raise ValueError("nested must be contiguous, without holes: call .contiguous() first")
        offsets: Tensor = nested.offsets()  # type: ignore[attr-defined]
        packed = cls._from_offsets("nested.offsets()", nested.values(), offsets)
        if not torch.compiler.is_compiling():
            # Nested tensors combine only if their ragged sizes are the same symbol. Torch keeps one for each tensor of
            # offsets. cu_seqlens gets that of the original, as the copy of the offsets does in Tensor.to(device).
            _tensor_symint_registry[packed.cu_seqlens] = nested.shape[1]
        return packed

    def to_nested(self) -> Tensor:
        """A nested tensor `[B, ragged, ...]` with the layout torch.jagged over the same values, without a copy.

        A nested tensor has no tail rows, so they are cut off. Without lengths_cpu that costs one sync. All nested
        tensors made from one cu_seqlens have the same ragged size, so torch combines them; so does the one that
        `from_nested` took, except inside torch.compile.

        Raises:
            RuntimeError: as from `to_padded`, or lengths_cpu differs from the lengths in cu_seqlens.
        """
        return torch.nested.nested_tensor_from_jagged(
            self._values_without_tail(), self.cu_seqlens, max_seqlen=self.max_seqlen
        )

    @classmethod
    def from_jagged(cls, jagged: "JaggedTensor") -> "PackedBatch":
        """The values and offsets of a TorchRec JaggedTensor, without a copy of the values. Weights are left out.

        One sync for the lengths if the tensor is not on the CPU. Offsets without an entry, as TorchRec has them without
        sequences, give an empty batch.

        Raises:
            ValueError: jagged is no JaggedTensor. For a feature of a KeyedJaggedTensor give `keyed[key]`, for a nested
                tensor call `from_nested`.
            RuntimeError: the offsets do not rise from 0 to at most T, or T is above 2**31 - 1.
        """
        if hasattr(jagged, "keys"):
            raise ValueError(
                f"jagged must be a JaggedTensor, got {type(jagged).__name__}: give one of its features, keyed[key]"
            )
        if isinstance(jagged, Tensor) or not hasattr(jagged, "offsets"):
            raise ValueError(f"jagged must be a JaggedTensor, got {type(jagged).__name__}")
        offsets = jagged.offsets()
        if offsets.shape == (0,):
            offsets = offsets.new_zeros(1)
        return cls._from_offsets("jagged.offsets()", jagged.values(), offsets)

    def to_jagged(self) -> "JaggedTensor":
        """A TorchRec JaggedTensor over the same values, without a copy.

        A JaggedTensor has no tail rows, so they are cut off. Without lengths_cpu that costs one sync.

        Raises:
            ImportError: torchrec is not installed.
            RuntimeError: as from `to_nested`.
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

    def with_tiles(self) -> "PackedBatch":
        """The same batch with a tile list, for `packed_attention(..., tiles_q=packed.tiles)` in every layer.

        Without one on the CPU, and where most kernels would not read it because the longest sequence takes about as
        many tiles as the mean. Never syncs. A stamped model calls it for each batch and after each pruning.
        """
        total, batch = self.values.shape[0], self.cu_seqlens.shape[0] - 1
        if self.tiles is not None or self.values.is_cpu:
            return self
        # In a graph the question would be a guard on the sizes.
        if not torch.compiler.is_compiling() and lengths_are_alike(total, batch, self.max_seqlen):
            return self
        return dataclasses.replace(self, tiles=tile_list(self.cu_seqlens, total))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedBatch":
        """The same batch on another device. lengths_cpu stays on the CPU."""

        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return self._replaced_on_device(moved)

    def pin_memory(self) -> "PackedBatch":
        """The same batch in page-locked CPU memory, from where `to(device, non_blocking=True)` does not wait.

        A DataLoader with pin_memory=True calls it. lengths_cpu never leaves the CPU and is not pinned.
        """
        return self._replaced_on_device(Tensor.pin_memory)

    def _replaced_on_device(self, function: Callable[[Tensor], Tensor]) -> "PackedBatch":
        """The same batch with the results of `function` instead of its tensors, except lengths_cpu."""
        return dataclasses.replace(
            self,
            values=function(self.values),
            cu_seqlens=function(self.cu_seqlens),
            positions=None if self.positions is None else function(self.positions),
            tiles=None if self.tiles is None else function(self.tiles),
        )

    @classmethod
    def _from_offsets(cls, name: str, values: Tensor, offsets: Tensor) -> "PackedBatch":
        """`name` names the offsets in error messages. Checking them costs no other sync than reading the lengths."""
        check_tensor(name, offsets, shape=["batch + 1"], dtypes=_INTEGERS)
        offsets_cpu = offsets.to(_CPU, torch.int64)
        check_cu_seqlens_contents(name, offsets_cpu, values.shape[0])
        check_num_tokens(int(offsets_cpu[-1]))
        lengths_cpu = offsets_cpu.diff().to(torch.int32)
        max_seqlen = int(lengths_cpu.max()) if lengths_cpu.numel() > 0 else 0
        return cls(values, offsets.to(torch.int32), max_seqlen, lengths_cpu=lengths_cpu)

    def _values_without_tail(self) -> Tensor:
        check_cu_seqlens_contents("cu_seqlens", self.cu_seqlens, self.values.shape[0], self.max_seqlen)
        if self.lengths_cpu is None:
            return self.values[: int(self.cu_seqlens[-1])]
        if contents_are_checked(self.cu_seqlens.device):
            lengths = self.cu_seqlens.diff().to(_CPU)
            wrong = (lengths != self.lengths_cpu).nonzero()
            if len(wrong) > 0:
                i = int(wrong[0])
                raise RuntimeError(
                    f"lengths_cpu must hold the lengths in cu_seqlens, got {int(self.lengths_cpu[i])} for sequence {i} "
                    f"of length {int(lengths[i])}"
                )
        return self.values[: int(self.lengths_cpu.sum())]


def check_num_tokens(total: int) -> None:
    """cu_seqlens can address that many tokens (RuntimeError)."""
    if total > _INT32_MAX:
        raise RuntimeError(f"a PackedBatch holds at most 2**31 - 1 tokens, since cu_seqlens is int32, got {total}")


def _shape_of_nested(nested: Tensor) -> str:
    sizes = [str(size) if isinstance(size, int) else "ragged" for size in nested.shape]
    return f"[{', '.join(sizes)}]"


def _looks_inverted(x: Tensor, mask: Tensor, lengths: Tensor) -> bool:
    """Whether a mask is almost surely True on padding, for x `[B, S, ...]`, mask bool `[B, S]` and its lengths `[B]`.

    The inverted mask of right padding looks like that of left padding to a fixed length with an empty row: some row is
    empty, and none begins with a valid token. So the tokens decide: padding has one value, histories have several.
    """
    if len(lengths) == 0 or lengths.min() > 0 or lengths.sum() < 2 or bool(mask[:, 0].any()):
        return False
    tokens = x.detach().flatten(0, 1).unsqueeze(-1).flatten(1)  # [B * S, values of a token]
    inside = tokens[mask.flatten()]
    if not bool((inside == inside[0]).all()):
        return False
    outside = tokens[~mask.flatten()]
    return not bool((outside == inside[0]).all(1).any() or (outside == outside[0]).all())
