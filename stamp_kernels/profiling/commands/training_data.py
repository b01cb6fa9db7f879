"""The data set of a run: semantic IDs, vocabulary, training rows and test rows."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stamp_kernels.profiling.commands.settings import CommonSettings
from stamp_kernels.profiling.data.batches import NextItemDataset
from stamp_kernels.profiling.data.interactions import Interactions
from stamp_kernels.profiling.data.rows import EvaluationRows, TrainingRows
from stamp_kernels.profiling.data.semantic_ids import assign_semantic_ids
from stamp_kernels.profiling.data.vocabulary import Vocabulary
from stamp_kernels.profiling.recommender.recommender import RecommenderSettings


@dataclass(frozen=True, eq=False)
class TrainingData:
    """A data set as the training loop reads it; semantic_ids is int64 `[num_items, codes_per_item]`."""

    interactions: Interactions
    semantic_ids: np.ndarray
    vocabulary: Vocabulary
    training_set: NextItemDataset
    test_set: NextItemDataset

    def sizes(self, model: RecommenderSettings) -> RecommenderSettings:
        """`model` with the codes_per_item and the codebook_size of the data."""
        return replace(
            model, codes_per_item=self.vocabulary.codes_per_item, codebook_size=self.vocabulary.codebook_size
        )

    def describe(self) -> dict[str, Any]:
        """The data as a report shows it; "checksum" covers every interaction and every semantic ID."""
        checksum = hashlib.sha256()
        for array in (self.interactions.items, self.interactions.offsets, self.semantic_ids):
            checksum.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return {
            "name": self.interactions.name,
            "source": self.interactions.source,
            "users": self.interactions.num_users,
            "items": self.interactions.num_items,
            "interactions": len(self.interactions.items),
            "training_rows": len(self.training_set),
            "semantic_ids": "residual k-means" if self.interactions.semantic_ids is None else "given",
            "codes_per_item": self.vocabulary.codes_per_item,
            "codebook_size": self.vocabulary.codebook_size,
            "checksum": checksum.hexdigest()[:16],
        }


def prepare_data(interactions: Interactions, settings: CommonSettings) -> TrainingData:
    """Make the rows, and the semantic IDs of data that has none.

    Neither depends on a seed, so runs with different seeds train on the same tokens.

    Raises:
        ValueError: there are fewer training rows than `settings.batch_size` or `settings.rows`, `settings.min_items`
            is above `settings.max_items`, or there are more items than semantic IDs.
        ImportError: semantic IDs have to be made and scikit-learn is missing.
    """
    defaults = RecommenderSettings()
    rows = TrainingRows(interactions, settings.max_items, settings.min_items, settings.rows)
    if len(rows) < settings.batch_size:
        long_enough = "" if settings.min_items == 1 else f" with a history of at least {settings.min_items} items"
        raise ValueError(
            f"batch_size must be at most the number of training rows of {interactions.name}{long_enough}, {len(rows)}, "
            f"got {settings.batch_size}"
        )
    semantic_ids = interactions.semantic_ids
    if semantic_ids is None:
        semantic_ids = assign_semantic_ids(
            interactions, codes_per_item=defaults.codes_per_item, codebook_size=defaults.codebook_size
        )
    codebook_size = max(defaults.codebook_size, int(semantic_ids.max()) + 1)
    vocabulary = Vocabulary(semantic_ids.shape[1], codebook_size)
    return TrainingData(
        interactions,
        semantic_ids,
        vocabulary,
        training_set=NextItemDataset(rows, vocabulary, semantic_ids),
        test_set=NextItemDataset(EvaluationRows(interactions, "test", settings.max_items), vocabulary, semantic_ids),
    )
