"""PackingCollator: packs users' histories in the DataLoader's workers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stamp_kernels.data._integers import integers_of
from stamp_kernels.ops._checks import check_count
from stamp_kernels.packed import PackedBatch, check_num_tokens

__all__ = ["PackingCollator"]

_IGNORE_INDEX = -100


@dataclasses.dataclass(frozen=True)
class PackingCollator:
    """A `collate_fn` that packs histories one after another, without padding, and keeps their lengths on the CPU.

    For torch's DataLoader (it can be pickled and runs in workers, and its PackedBatch can be pinned) and Hugging Face's
    Trainer. The Trainer drops dataset columns that are no arguments of the model's forward before they get here. If the
    forward has other arguments than the keys below, set `remove_unused_columns=False`.

    A feature is a mapping. Its rows are lists, NumPy arrays or tensors, one-dimensional and of any integer dtype:

    - `"input_ids"`: a user's history as semantic-ID tokens; may be empty;
    - `"labels"`: the tokens of the target item;
    - `"future_ids"`: the tokens of the items after the target, any number of items. Not read if future_length is 0;
    - `"attention_mask"`: optional, in all features or in none, as long as input_ids. Tokens where it is 0 are padding
      and are left out.

    Other keys are ignored, so that a dataset may have columns of its own (a user's id, a timestamp).

    Args:
        future_length: the number of future tokens of each feature, 0 for none. More tokens are cut, fewer are padded.

    Raises:
        ValueError: future_length is not an int of at least 0.
    """

    future_length: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "future_length", check_count("future_length", self.future_length))  # it is frozen

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of B features. B may be 0, for a rank that has no sequences in a step.

        Returns:
            `"packed_inputs"`: a PackedBatch with values int64 `[T]`, lengths_cpu int64 `[B]`, an exact max_seqlen,
            and no positions; `"labels"`: int64 `[B, longest]`, padded with -100 on the right; and, unless
            future_length is 0, `"future_ids"`: int64 `[B, future_length]`, padded with -100 on the right.

        Raises:
            ValueError: a key is missing from a feature, or its value is not a row of integers.
            RuntimeError: the histories have more than 2**31 - 1 tokens.
        """
        histories = _rows(features, "input_ids")
        lengths = _lengths(histories)
        check_num_tokens(int(lengths.sum()))
        values = _concatenated(histories)
        if any("attention_mask" in feature for feature in features):
            masks = _rows(features, "attention_mask", allow_bool=True)
            _check_masks(masks, histories)
            values, lengths = _without_padding(values, lengths, _concatenated(masks) != 0)
        labels = _rows(features, "labels")
        batch: dict[str, Any] = {"packed_inputs": _packed(values, lengths), "labels": _padded(labels, _longest(labels))}
        if self.future_length > 0:
            future = _rows(features, "future_ids")
            # Slicing a tensor costs more than creating one, and most rows are short enough.
            future = [row if row.numel() <= self.future_length else row[: self.future_length] for row in future]
            batch["future_ids"] = _padded(future, self.future_length)
        return batch


def _rows(features: Sequence[Mapping[str, Any]], key: str, *, allow_bool: bool = False) -> list[Tensor]:
    """One int64 `[n]` for each feature."""
    rows = []
    for index, feature in enumerate(features):
        if not isinstance(feature, Mapping):
            raise ValueError(f"features[{index}] must be a mapping, got {type(feature).__name__}")
        if key not in feature:
            raise ValueError(f"features[{index}] must have the key {key!r}, got {list(feature)}")
        rows.append(integers_of(f"features[{index}][{key!r}]", feature[key], allow_bool=allow_bool))
    return rows


def _check_masks(masks: list[Tensor], histories: list[Tensor]) -> None:
    for index, (mask, history) in enumerate(zip(masks, histories, strict=True)):
        if len(mask) != len(history):
            raise ValueError(
                f"features[{index}]['attention_mask'] must be as long as its input_ids, {len(history)}, got {len(mask)}"
            )


def _lengths(rows: list[Tensor]) -> Tensor:
    return torch.tensor([row.numel() for row in rows], dtype=torch.int64, device="cpu")


def _longest(rows: list[Tensor]) -> int:
    return max((row.numel() for row in rows), default=0)


def _concatenated(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64, device="cpu")


def _without_padding(values: Tensor, lengths: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
    sequence = torch.repeat_interleave(lengths)
    return values[is_valid], torch.bincount(sequence[is_valid], minlength=len(lengths))


def _packed(values: Tensor, lengths: Tensor) -> PackedBatch:
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    max_seqlen = int(lengths.max()) if len(lengths) > 0 else 0
    return PackedBatch(values, cu_seqlens, max_seqlen, lengths_cpu=lengths)


def _padded(rows: list[Tensor], width: int) -> Tensor:
    """int64 `[B, width]`. No row may be longer than width."""
    padded = torch.full((len(rows), width), _IGNORE_INDEX, dtype=torch.int64, device="cpu")
    padded[torch.arange(width, device="cpu") < _lengths(rows).unsqueeze(1)] = _concatenated(rows)
    return padded
