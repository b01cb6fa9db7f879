"""Rows to batches of semantic-ID tokens.

Each batch is packed and padded side by side, so every configuration reads the same tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stamp_kernels.data import PackingCollator
from stamp_kernels.ops._checks import check_count
from stamp_kernels.packed import PackedBatch
from stamp_kernels.profiling.data.rows import Rows
from stamp_kernels.profiling.data.vocabulary import Vocabulary


class NextItemDataset(Dataset[dict[str, np.ndarray]]):
    """Rows as features for `PackingCollator`: a history, the next item, and the items after it, in tokens.

    Args:
        rows: the examples.
        vocabulary: maps codes to tokens.
        semantic_ids: integers `[num_items, codes_per_item]`.

    Raises:
        ValueError: `semantic_ids` does not fit `vocabulary`.
    """

    def __init__(self, rows: Rows, vocabulary: Vocabulary, semantic_ids: np.ndarray) -> None:
        self.rows = rows
        self.vocabulary = vocabulary
        self.semantic_ids = semantic_ids
        self._tokens_of_item = vocabulary.tokens(semantic_ids)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rows = self.rows
        start, target, end = rows.start[index], rows.target[index], rows.end[index]
        return {
            "input_ids": self._tokens(start, target),
            "labels": self._tokens(target, target + 1),
            "future_ids": self._tokens(target + 1, end),
        }

    def _tokens(self, start: int, end: int) -> np.ndarray:
        """int64 `[(end - start) * codes_per_item]`, the tokens of `rows.items[start:end]`."""
        tokens: np.ndarray = self._tokens_of_item[self.rows.items[start:end]].reshape(-1)
        return tokens


@dataclass(frozen=True, eq=False)
class Batch:
    """One batch of B histories; S is the length of the longest one in tokens.

    Attributes:
        packed_inputs: the histories, with values int64 `[T]` and exact lengths on the CPU.
        input_ids: int64 `[B, S]`, the same histories, padded on the right.
        attention_mask: int64 `[B, S]`, 1 for tokens and 0 for padding.
        labels: int64 `[B, codes_per_item]`, the tokens of the next item.
        future_ids: int64 `[B, auxiliary_steps * codes_per_item]`, the tokens of the items after it, -100 past the end.
            None without auxiliary steps.
    """

    packed_inputs: PackedBatch
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    future_ids: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """Tokens of the longest history and of all histories: the larger, the more memory a step needs."""
        return self.packed_inputs.max_seqlen, len(self.packed_inputs.values)

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on `device`; the lengths stay on the CPU."""
        return replace(
            self,
            packed_inputs=self.packed_inputs.to(device),
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
            future_ids=None if self.future_ids is None else self.future_ids.to(device),
        )


def collate(dataset: NextItemDataset, indices: np.ndarray, auxiliary_steps: int) -> Batch:
    """Make a batch of some rows.

    Args:
        dataset: the examples.
        indices: integers `[B]`, which of them; at least one.
        auxiliary_steps: the number of items after the next one in `future_ids`, at least 0.

    Raises:
        ValueError: `auxiliary_steps` is negative.
        IndexError: there is no such row, or a row has an item without a semantic ID.
    """
    check_count("auxiliary_steps", auxiliary_steps)
    collator = PackingCollator(future_length=auxiliary_steps * dataset.vocabulary.codes_per_item)
    batch: dict[str, Any] = collator([dataset[index] for index in indices])
    packed: PackedBatch = batch["packed_inputs"]
    assert packed.lengths_cpu is not None
    return Batch(
        packed_inputs=packed,
        input_ids=packed.to_padded(padding_value=dataset.vocabulary.pad_id),
        attention_mask=(torch.arange(packed.max_seqlen, device="cpu") < packed.lengths_cpu[:, None]).long(),
        labels=batch["labels"],
        future_ids=batch.get("future_ids"),
    )


def batches(
    dataset: NextItemDataset, batch_size: int, seed: int, auxiliary_steps: int, *, epoch: int = 0
) -> Iterator[Batch]:
    """One epoch of batches in an order drawn from `seed` and `epoch`; an incomplete last batch is dropped.

    Args:
        dataset: the examples.
        batch_size: rows per batch, at most `len(dataset)`.
        seed, epoch: integers of at least 0; the same pair gives the same batches.
        auxiliary_steps: as in `collate`.

    Raises:
        ValueError: at once, if `batch_size`, `seed`, `epoch` or `auxiliary_steps` is out of range.
    """
    check_count("batch_size", batch_size, 1)
    if batch_size > len(dataset):
        raise ValueError(f"batch_size must be at most the number of rows, {len(dataset)}, got {batch_size}")
    check_count("seed", seed)
    check_count("auxiliary_steps", auxiliary_steps)
    check_count("epoch", epoch)
    order = np.random.default_rng((seed, epoch)).permutation(len(dataset))
    firsts = range(0, len(dataset) - batch_size + 1, batch_size)
    return (collate(dataset, order[first : first + batch_size], auxiliary_steps) for first in firsts)
