"""Metrics that need no training: chance and popularity."""

import numpy as np

from stamp_kernels.profiling.commands.training_data import TrainingData
from stamp_kernels.profiling.data.interactions import in_training_part
from stamp_kernels.profiling.recommender.evaluate import CUTOFFS


def reference_metrics(data: TrainingData) -> dict[str, dict[str, float]]:
    """Metrics of the test split without training, which the recommenders have to beat.

    Items that share a semantic ID count as one, as in `evaluate`.

    Returns:
        By name, recall@k and ndcg@k for k in CUTOFFS. "chance": the expectation of a random order. "popularity":
        semantic IDs by how often they occur in the training part, equally frequent ones in their own order.
        "popularity, unseen": the same without the IDs that the user had before.
    """
    interactions = data.interactions
    _, id_of_item = np.unique(data.semantic_ids, axis=0, return_inverse=True)
    ids = id_of_item.reshape(-1)[interactions.items]
    num_ids = int(id_of_item.max()) + 1
    popularity = np.bincount(ids[in_training_part(interactions)], minlength=num_ids)
    rank_of_id = np.empty(num_ids, dtype=np.int64)
    rank_of_id[np.argsort(-popularity, kind="stable")] = np.arange(num_ids)

    user = np.repeat(np.arange(interactions.num_users), np.diff(interactions.offsets))
    is_target = np.zeros(len(ids), dtype=bool)
    is_target[data.test_set.rows.target] = True
    ranks = rank_of_id[ids[is_target]]  # one per user, in the order of the users
    had_user, had_rank = np.unique(np.stack([user[~is_target], rank_of_id[ids[~is_target]]]), axis=1)
    # Without the IDs before it that the user had, the target moves up. A target that the user had gets no rank at all.
    moved_up = np.bincount(had_user[had_rank < ranks[had_user]], minlength=interactions.num_users)
    unseen_ranks = ranks - moved_up
    unseen_ranks[had_user[had_rank == ranks[had_user]]] = num_ids + max(CUTOFFS)  # beyond every cut-off
    return {
        "chance": _metrics_of_ranks(np.arange(num_ids)),
        "popularity": _metrics_of_ranks(ranks),
        "popularity, unseen": _metrics_of_ranks(unseen_ranks),
    }


def _metrics_of_ranks(ranks: np.ndarray) -> dict[str, float]:
    """recall@k and ndcg@k of targets at these ranks, which count from 0."""
    gains = 1 / np.log2(ranks + 2)
    recall = {f"recall@{k}": float((ranks < k).mean()) for k in CUTOFFS}
    return recall | {f"ndcg@{k}": float(np.where(ranks < k, gains, 0).mean()) for k in CUTOFFS}
