"""Interaction sequences to batches of semantic-ID tokens: leave-one-out rows, tokens, batches.

Batches are padded and packed side by side, so that every model compared reads the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch

from stamp_kernels.profiling._checks import check_at_least
from stamp_kernels.profiling.data.interactions import HELD_OUT, Interactions, in_training_part, offsets_of_lengths

__all__ = ["Batch", "EvaluationRows", "TrainingRows", "Vocabulary", "batches", "collate"]

IGNORE_INDEX = -100
SAMPLE_SEED = 0


class _Rows:
    """Examples as three positions each in `items`, see `TrainingRows`."""

    def __init__(self, items: np.ndarray, start: np.ndarray, target: np.ndarray, end: np.ndarray) -> None:
        self.items = items
        self.start = start
        self.target = target
        self.end = end

    def __len__(self) -> int:
        return len(self.target)


class TrainingRows(_Rows):
    """Every next-item example of the training parts: each user's items without the last two.

    Item `t >= 1` of a training part is the target of one row, the up to `max_items` items before it are the history,
    those after it within the training part the auxiliary targets. Rows are in order of user, then `t`.

    Args:
        interactions: the sequences.
        max_items: histories are cut to so many items.
        min_items: rows whose history, after the cut, has fewer items are left out.
        rows: a random sample of so many of these rows, the same for the same arguments; None takes all.

    Attributes:
        items: int64 [total], those of `interactions`.
        start, target, end: int64 [rows], positions in `items`: the history is `items[start:target]`, the target
            `items[target]`, the items after it `items[target + 1:end]`.

    Raises:
        ValueError: if `max_items` is below 1, `min_items` not in [1, max_items], or `rows` not in [1, rows that
            there are].
    """

    def __init__(
        self, interactions: Interactions, max_items: int = 30, min_items: int = 1, rows: int | None = None
    ) -> None:
        check_at_least("max_items", max_items, 1)
        if not 1 <= min_items <= max_items:
            raise ValueError(f"min_items is {min_items}, expected 1 to {max_items}, which is max_items")
        has_history = in_training_part(interactions)
        has_history[interactions.offsets[:-1]] = False
        target = np.flatnonzero(has_history)
        user = np.searchsorted(interactions.offsets, target, side="right") - 1
        start = np.maximum(interactions.offsets[user], target - max_items)
        end = interactions.offsets[user + 1] - HELD_OUT
        chosen = np.flatnonzero(target - start >= min_items)
        if rows is not None:
            check_at_least("rows", rows, 1)
            if rows > len(chosen):
                raise ValueError(f"rows is {rows}, expected at most {len(chosen)}, the number of training rows")
            chosen = np.sort(np.random.default_rng(SAMPLE_SEED).choice(chosen, rows, replace=False))
        super().__init__(interactions.items, start[chosen], target[chosen], end[chosen])


class EvaluationRows(_Rows):
    """One row per user: predict the last but one item ("validation") or the last one ("test").

    The history is the up to `max_items` items before the target, for the test the validation target among them. There
    are no auxiliary targets. Every user has a row, however short the history: metrics are of the whole split, whatever
    rows were trained on, so that they can be compared with others.

    Attributes:
        items, start, target, end: as in `TrainingRows`, with `end = target + 1`.

    Raises:
        ValueError: if `max_items` is below 1, or for another split.
    """

    def __init__(self, interactions: Interactions, split: Literal["validation", "test"], max_items: int = 30) -> None:
        check_at_least("max_items", max_items, 1)
        if split not in ("validation", "test"):
            raise ValueError(f"split is {split!r}, expected 'validation' or 'test'")
        target = interactions.offsets[1:] - (2 if split == "validation" else 1)
        start = np.maximum(interactions.offsets[:-1], target - max_items)
        super().__init__(interactions.items, start, target, target + 1)


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of semantic-ID codes: `1 + level * codebook_size + code`; 0 is padding and the decoder's start.

    Raises:
        ValueError: if `codes_per_item` or `codebook_size` is below 1.
    """

    codes_per_item: int
    codebook_size: int
    pad_id: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_at_least("codes_per_item", self.codes_per_item, 1)
        check_at_least("codebook_size", self.codebook_size, 1)

    @property
    def size(self) -> int:
        return 1 + self.codes_per_item * self.codebook_size

    def level_range(self, level: int) -> tuple[int, int]:
        """The half-open range of the token ids of a level, counted from 0.

        Raises:
            ValueError: if there is no such level.
        """
        if not 0 <= level < self.codes_per_item:
            raise ValueError(f"level is {level}, expected 0 to {self.codes_per_item - 1}")
        start = 1 + level * self.codebook_size
        return start, start + self.codebook_size

    def tokens(self, codes: np.ndarray) -> np.ndarray:
        """Token ids, int64 [..., codes_per_item], of integer codes [..., codes_per_item].

        Raises:
            ValueError: if the last dimension is not `codes_per_item`, or a code lies outside [0, codebook_size).
        """
        if codes.ndim == 0 or codes.shape[-1] != self.codes_per_item:
            raise ValueError(
                f"codes have shape {list(codes.shape)}, expected the last dimension to be {self.codes_per_item}"
            )
        if codes.size and not (codes.min() >= 0 and codes.max() < self.codebook_size):
            raise ValueError(
                f"codes lie in [{codes.min()}, {codes.max()}], expected them in [0, {self.codebook_size - 1}]"
            )
        return codes.astype(np.int64) + (1 + np.arange(self.codes_per_item) * self.codebook_size)


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch, padded and packed; S is the longest history of the batch in tokens, T the sum of all.

    Attributes:
        input_ids: int64 [B, S], histories as tokens, padded with 0 on the right.
        attention_mask: int64 [B, S], 1 for tokens and 0 for padding.
        packed_ids: int64 [T], the same tokens without padding.
        cu_seqlens: int32 [B + 1], where each history starts in `packed_ids`, and T.
        lengths: int64 [B], tokens per history, always on the host.
        max_seqlen: S.
        labels: int64 [B, codes_per_item], the target's tokens.
        future_labels: int64 [B, steps, codes_per_item], the tokens of the items after the target, -100 where there is
            none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    packed_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: torch.Tensor
    max_seqlen: int
    labels: torch.Tensor
    future_labels: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`, with `lengths` left on the host."""
        moved = ("input_ids", "attention_mask", "packed_ids", "cu_seqlens", "labels", "future_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in moved})


def collate(
    rows: TrainingRows | EvaluationRows,
    indices: np.ndarray,
    vocabulary: Vocabulary,
    semantic_ids: np.ndarray,
    auxiliary_steps: int,
) -> Batch:
    """Makes a batch of some rows.

    Args:
        rows: the examples.
        indices: integers [B], which of them.
        vocabulary: gives codes their token ids.
        semantic_ids: integers [num_items, codes_per_item].
        auxiliary_steps: items after the target in `future_labels`, 0 or more.

    Raises:
        ValueError: if `auxiliary_steps` is negative, or `semantic_ids` does not fit `vocabulary`.
        IndexError: if there is no such row, or no such item in `semantic_ids`.
    """
    check_at_least("auxiliary_steps", auxiliary_steps, 0)
    start, target, end = rows.start[indices], rows.target[indices], rows.end[indices]

    num_history = target - start
    item_offsets = offsets_of_lengths(num_history)
    # Position within the packed histories, shifted per row to the position in rows.items.
    history = np.arange(item_offsets[-1]) + np.repeat(start - item_offsets[:-1], num_history)
    packed_ids = vocabulary.tokens(semantic_ids[rows.items[history]]).reshape(-1)

    lengths = num_history * vocabulary.codes_per_item
    max_seqlen = int(lengths.max(initial=0))
    mask = np.arange(max_seqlen) < lengths[:, None]
    input_ids = np.full(mask.shape, vocabulary.pad_id, dtype=np.int64)
    input_ids[mask] = packed_ids

    future = target[:, None] + np.arange(1, auxiliary_steps + 1)
    exists = future < end[:, None]
    # Positions past the end read the target instead, which is always there, and are overwritten.
    future_labels = vocabulary.tokens(semantic_ids[rows.items[np.where(exists, future, target[:, None])]])
    future_labels[~exists] = IGNORE_INDEX

    return Batch(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        packed_ids=torch.from_numpy(packed_ids),
        cu_seqlens=torch.from_numpy((item_offsets * vocabulary.codes_per_item).astype(np.int32)),
        lengths=torch.from_numpy(lengths),
        max_seqlen=max_seqlen,
        labels=torch.from_numpy(vocabulary.tokens(semantic_ids[rows.items[target]])),
        future_labels=torch.from_numpy(future_labels),
    )


def batches(
    rows: TrainingRows | EvaluationRows,
    batch_size: int,
    seed: int,
    vocabulary: Vocabulary,
    semantic_ids: np.ndarray,
    auxiliary_steps: int,
    *,
    epoch: int = 0,
) -> Iterator[Batch]:
    """One epoch of batches in an order drawn from `seed` and `epoch`; the last, incomplete batch is dropped.

    Args:
        batch_size: rows per batch, at most `len(rows)`.
        seed, epoch: integers of at least 0; the same pair gives the same batches.
        rows, vocabulary, semantic_ids, auxiliary_steps: as in `collate`, which also says what is raised.

    Raises:
        ValueError: at once, if `batch_size` is below 1 or above `len(rows)`, or `seed` or `epoch` is negative.
    """
    if not 1 <= batch_size <= len(rows):
        raise ValueError(f"batch_size is {batch_size}, expected 1 to {len(rows)}, the number of rows")
    check_at_least("seed", seed, 0)
    check_at_least("epoch", epoch, 0)
    order = np.random.default_rng((seed, epoch)).permutation(len(rows))
    firsts = range(0, len(rows) - batch_size + 1, batch_size)
    return (
        collate(rows, order[first : first + batch_size], vocabulary, semantic_ids, auxiliary_steps) for first in firsts
    )
