"""From padded batches to packed ones and back: every base model's inputs and outputs may be padded."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from stamp_kernels.common.rows import sequence_of_row
from stamp_kernels.ops.pruning.gather import gather_tokens
from stamp_kernels.ops.pruning.selection import TokenSelection
from stamp_kernels.packed import PackedBatch

__all__ = ["PaddedLayout", "layout_in_columns", "layout_on_the_left", "pack_padded", "version_of"]


@dataclass(frozen=True)
class PaddedLayout:
    """The places of the packed tokens in a padded batch.

    Attributes:
        mask: bool `[B, S]`, True on tokens.
        selection: for gather_tokens, the packed row of each padded row. None if there is no padding.
        given: the mask as the caller gave it, and its version, to recognize it without reading it.
    """

    mask: Tensor
    selection: TokenSelection | None
    given: tuple[Tensor, int | None] | None = None

    def is_made_with(self, mask: Tensor) -> bool:
        """Whether a mask `[B, S]` says the same as this layout's."""
        given, version = (None, None) if self.given is None else self.given
        if mask is given and version is not None and version_of(mask) == version:
            return True
        return mask.shape == self.mask.shape and torch.equal(mask.bool(), self.mask)

    def pad(self, values: Tensor) -> Tensor:
        """`[T, ...]` to `[B, S, ...]`, 0 on padding."""
        rows = values if self.selection is None else gather_tokens(values, self.selection)
        return rows.unflatten(0, self.mask.shape)

    def pack(self, values: Tensor, fill_value: int) -> Tensor:
        """`[B, S, ...]` to `[T, ...]`, fill_value on tail rows."""
        rows = values.flatten(0, 1)
        if self.selection is None:
            return rows
        return gather_tokens(rows, self.selection_of_tokens(), fill_value=fill_value)

    def selection_of_tokens(self) -> TokenSelection:
        """For gather_tokens, the padded row of each packed row. Only if there is padding."""
        assert self.selection is not None
        packed_row, cu_seqlens, max_seqlen, padded_row, _ = self.selection
        return TokenSelection(padded_row.long(), cu_seqlens, max_seqlen, packed_row.int(), self.mask.numel())

    def first_columns(self) -> Tensor:
        """int64 `[B]`, the column of each history's first token; S if it has none."""
        return (self.mask.cumsum(1) == 0).sum(1)

    def positions(self) -> Tensor:
        """int32 `[B, S]`, each column counted from the first token of its history."""
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        return (columns - self.first_columns()[:, None]).to(torch.int32)


def pack_padded(inputs: Tensor, attention_mask: Tensor | None) -> tuple[PackedBatch, PaddedLayout]:
    """Drop the padding of `[B, S]` or `[B, S, d_model]`.

    If a mask has holes, positions count them, as Hugging Face's models do.

    Raises:
        ValueError: inputs or mask have another shape.
    """
    if inputs.dim() not in (2, 3):
        raise ValueError(f"inputs must be token ids [B, S] or embeddings [B, S, d_model], got {list(inputs.shape)}")
    batch, length = inputs.shape[:2]
    if attention_mask is not None:
        if attention_mask.shape != (batch, length):
            raise ValueError(f"attention_mask must have shape {[batch, length]}, got {list(attention_mask.shape)}")
        pack_by_mask = _pack_at_capacity if torch.compiler.is_exporting() else _pack_by_mask
        packed, layout = pack_by_mask(inputs, attention_mask != 0)  # not the caller's tensor, which may change
        if not torch.compiler.is_compiling():  # graphs do not know versions
            layout = replace(layout, given=(attention_mask, version_of(attention_mask)))
        return packed, layout
    # Without padding all sizes are known on the CPU.
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=inputs.device) * length
    lengths_cpu = torch.full((batch,), length, dtype=torch.int64, device="cpu")
    mask = torch.ones(batch, length, dtype=torch.bool, device=inputs.device)
    return PackedBatch(inputs.flatten(0, 1), cu_seqlens, length, lengths_cpu=lengths_cpu), PaddedLayout(mask, None)


def layout_on_the_left(packed: PackedBatch, length: int) -> PaddedLayout:
    """The layout of a batch whose padding, up to `length` columns, is on the right."""
    total = packed.values.shape[0]
    starts = F.pad(packed.cu_seqlens[:-1], (0, 1))  # the last one is for tail rows
    row = torch.arange(total, device=packed.values.device)
    return layout_in_columns(packed, row - starts[sequence_of_row(packed.cu_seqlens, total)], length)


def layout_in_columns(packed: PackedBatch, columns: Tensor, length: int) -> PaddedLayout:
    """The layout of packed rows that are in these columns `[T]` of a padded batch `[B, length]`."""
    total, batch = packed.values.shape[0], packed.cu_seqlens.shape[0] - 1
    sequence = sequence_of_row(packed.cu_seqlens, total)
    is_tail = sequence == batch
    # Tail rows go to one more place, which is cut off.
    place = torch.where(is_tail, batch * length, sequence * length + columns)
    row = torch.arange(total, device=columns.device)
    packed_row = torch.full((batch * length + 1,), -1, device=columns.device).scatter(0, place, row)[:-1]
    padded_row = torch.where(is_tail, -1, place).to(torch.int32)
    selection = TokenSelection(packed_row, packed.cu_seqlens, packed.max_seqlen, padded_row, total)
    return PaddedLayout((packed_row >= 0).view(batch, length), selection)


def version_of(x: Tensor) -> int | None:
    """How often a tensor was changed in place. Inference tensors do not count it."""
    return None if x.is_inference() else x._version


@torch.compiler.disable(reason="the number of tokens in a mask is a size that the CPU has to read")
def _pack_by_mask(inputs: Tensor, mask: Tensor) -> tuple[PackedBatch, PaddedLayout]:
    packed = PackedBatch.from_padded(inputs, mask)
    total, length = packed.values.shape[0], mask.shape[1]
    valid = mask.flatten()
    valid_up_to = valid.cumsum(0)
    packed_row = torch.where(valid, valid_up_to - 1, -1)
    # Packed row j is the padded row where the number of valid rows reaches j + 1.
    padded_row = torch.searchsorted(valid_up_to, torch.arange(1, total + 1, device=mask.device)).to(torch.int32)
    num_runs = mask[:, :1].sum(1) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if (num_runs > 1).any():  # holes
        sequence, column = padded_row // length, padded_row % length
        packed = replace(packed, positions=column - column[packed.cu_seqlens[sequence]])
    selection = TokenSelection(packed_row, packed.cu_seqlens, packed.max_seqlen, padded_row, total)
    return packed, PaddedLayout(mask, selection)


def _pack_at_capacity(inputs: Tensor, mask: Tensor) -> tuple[PackedBatch, PaddedLayout]:
    """With B * S rows, of which those that are too many are tail rows: no size depends on the mask, as torch.export
    needs it.
    """
    batch, length = mask.shape
    valid = mask.flatten()
    valid_up_to = valid.cumsum(0)
    row = torch.arange(batch * length, device=mask.device)
    padded_row = torch.where(row < valid_up_to[-1], torch.searchsorted(valid_up_to, row + 1), -1)
    packed_row = torch.where(valid, valid_up_to - 1, -1)
    cu_seqlens = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    packing = TokenSelection(padded_row, cu_seqlens, length, packed_row.to(torch.int32), batch * length)
    unpacking = TokenSelection(packed_row, cu_seqlens, length, padded_row.to(torch.int32), batch * length)
    first_column = mask.int().argmax(1)[padded_row.clamp(min=0) // length]
    positions = torch.where(padded_row < 0, 0, padded_row % length - first_column).to(torch.int32)
    packed = PackedBatch(gather_tokens(inputs.flatten(0, 1), packing), cu_seqlens, length, positions=positions)
    return packed, PaddedLayout(mask, unpacking)
