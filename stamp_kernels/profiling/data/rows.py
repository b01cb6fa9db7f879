"""Leave-one-out rows: which items are history, target and future in each example."""

from typing import Literal

import numpy as np

from stamp_kernels.ops._checks import check_choice, check_count
from stamp_kernels.profiling.data.interactions import HELD_OUT, Interactions, in_training_part

SAMPLE_SEED = 0


class Rows:
    """Examples, each given by three positions in `items`.

    Attributes:
        items: int64 `[total]`, those of the interactions.
        start, target, end: int64 `[rows]`, positions in `items`: the history is `items[start:target]`, the target is
            `items[target]`, and the items after it are `items[target + 1:end]`.
    """

    def __init__(self, items: np.ndarray, start: np.ndarray, target: np.ndarray, end: np.ndarray) -> None:
        self.items = items
        self.start = start
        self.target = target
        self.end = end

    def __len__(self) -> int:
        return len(self.target)


class TrainingRows(Rows):
    """Every next-item example of the training parts; a training part is a user's items without the last two.

    Each item `t >= 1` of a training part is the target of one row. The history is the up to `max_items` items before
    it, and the auxiliary targets are the items after it in the training part. Rows are in order of user, then `t`.

    Args:
        interactions: the sequences.
        max_items: the most items of a history; earlier ones are cut off.
        min_items: rows whose history has fewer items after the cut are left out.
        rows: the size of a random sample of these rows, the same sample for the same arguments. None: all rows.

    Raises:
        ValueError: `max_items` is below 1, `min_items` is not in `[1, max_items]`, or `rows` is not in
            `[1, number of rows]`.
    """

    def __init__(
        self, interactions: Interactions, max_items: int = 30, min_items: int = 1, rows: int | None = None
    ) -> None:
        check_count("max_items", max_items, 1)
        check_count("min_items", min_items, 1)
        if min_items > max_items:
            raise ValueError(f"min_items must be at most max_items, {max_items}, got {min_items}")
        has_history = in_training_part(interactions)
        has_history[interactions.offsets[:-1]] = False
        target = np.flatnonzero(has_history)
        user = np.searchsorted(interactions.offsets, target, side="right") - 1
        start = np.maximum(interactions.offsets[user], target - max_items)
        end = interactions.offsets[user + 1] - HELD_OUT
        chosen = np.flatnonzero(target - start >= min_items)
        if rows is not None:
            check_count("rows", rows, 1)
            if rows > len(chosen):
                raise ValueError(f"rows must be at most the number of training rows, {len(chosen)}, got {rows}")
            chosen = np.sort(np.random.default_rng(SAMPLE_SEED).choice(chosen, rows, replace=False))
        super().__init__(interactions.items, start[chosen], target[chosen], end[chosen])


class EvaluationRows(Rows):
    """One row per user: predict the last but one item ("validation") or the last one ("test").

    The history is the up to `max_items` items before the target; for the test it includes the validation target. There
    are no auxiliary targets, so `end = target + 1`. Every user has a row, however short the history, so metrics cover
    the whole split whatever rows were trained on and compare with published ones.

    Raises:
        ValueError: `max_items` is below 1, or there is no such split.
    """

    def __init__(self, interactions: Interactions, split: Literal["validation", "test"], max_items: int = 30) -> None:
        check_count("max_items", max_items, 1)
        check_choice("split", split, ("validation", "test"))
        target = interactions.offsets[1:] - (2 if split == "validation" else 1)
        start = np.maximum(interactions.offsets[:-1], target - max_items)
        super().__init__(interactions.items, start, target, target + 1)
