"""Recall and NDCG of a recommender: beam search over the semantic IDs that exist."""

import math

import numpy as np
import torch
from torch import Tensor

from stamp_kernels.profiling.data.batches import NextItemDataset, collate
from stamp_kernels.profiling.recommender.recommender import Recommender

CUTOFFS = (5, 10)
NUM_BEAMS = 10


class ValidPrefixes:
    """The prefixes of the catalogue's semantic IDs, which decide what codes may follow a prefix.

    A prefix of t codes is given by its rank among the catalogue's distinct prefixes of t codes, in lexicographic order,
    or by -1 if it is none of them. The empty prefix has rank 0. Ranks stay below the number of items however many
    levels there are. All codes of a prefix as one number in base `codebook_size` would exceed 64 bits.

    Args:
        semantic_ids: integers `[num_items, codes_per_item]` in [0, codebook_size), at least one item.
        codebook_size: the number of codes per level.
        device: where the searches run.

    Raises:
        ValueError: a code is outside [0, codebook_size), or num_items * codebook_size exceeds 64 bits.
    """

    def __init__(self, semantic_ids: np.ndarray, codebook_size: int, device: torch.device) -> None:
        if semantic_ids.min() < 0 or semantic_ids.max() >= codebook_size:
            raise ValueError(
                f"semantic_ids must be in [0, {codebook_size}), got {semantic_ids.min()} to {semantic_ids.max()}"
            )
        if len(semantic_ids) * codebook_size > 2**63 - 1:
            raise ValueError(
                f"codebook_size must be at most {(2**63 - 1) // len(semantic_ids)} with {len(semantic_ids)} items, "
                f"got {codebook_size}"
            )
        self.codebook_size = codebook_size
        # For each level, ascending: rank * codebook_size + code of every prefix and the code that extends it.
        self._extensions: list[Tensor] = []
        ranks = np.zeros(len(semantic_ids), dtype=np.int64)
        for codes in semantic_ids.T:
            extensions, ranks = np.unique(ranks * codebook_size + codes.astype(np.int64), return_inverse=True)
            self._extensions.append(torch.from_numpy(extensions).to(device))

    def continuations(self, ranks: Tensor, level: int) -> Tensor:
        """Ranks int64 `[..., codebook_size]` of the prefixes of `level` codes with ranks `[...]`, by the next code."""
        codes = torch.arange(self.codebook_size, device=ranks.device)
        return self._find(ranks[..., None] * self.codebook_size + codes, level)

    def ranks(self, codes: Tensor) -> Tensor:
        """Ranks int64 `[...]` of whole semantic IDs, int64 `[..., codes_per_item]` in [0, codebook_size)."""
        ranks = torch.zeros_like(codes[..., 0])
        for level in range(len(self._extensions)):
            ranks = self._find(ranks * self.codebook_size + codes[..., level], level)
        return ranks

    def _find(self, extensions: Tensor, level: int) -> Tensor:
        """The index of each extension among those that exist, or -1. Extensions of rank -1 are negative."""
        known = self._extensions[level]
        nearest = torch.searchsorted(known, extensions).clamp(max=len(known) - 1)
        return torch.where(known[nearest] == extensions, nearest, -1)


def beam_search(recommender: Recommender, encoded: object, num_sequences: int, prefixes: ValidPrefixes) -> Tensor:
    """The most probable semantic IDs, best first: ranks int64 `[B, beams]` (see `ValidPrefixes`).

    A rank is -1 where the catalogue has no more.
    """
    vocabulary = recommender.vocabulary
    device = next(recommender.parameters()).device
    ranks = torch.zeros(num_sequences, 1, dtype=torch.int64, device=device)
    log_likelihoods = torch.zeros(num_sequences, 1, device=device)
    tokens = torch.empty(num_sequences, 1, 0, dtype=torch.int64, device=device)
    for level in range(vocabulary.codes_per_item):
        start, end = vocabulary.level_range(level)
        logits = recommender.next_token_logits(encoded, tokens)
        log_probabilities = logits.float().log_softmax(-1)[..., start:end]
        longer = prefixes.continuations(ranks, level)
        candidates = (log_likelihoods[..., None] + log_probabilities).masked_fill(longer < 0, -torch.inf).flatten(1)
        log_likelihoods, chosen = candidates.topk(min(NUM_BEAMS, candidates.shape[1]), dim=1)
        ranks = longer.flatten(1).gather(1, chosen)
        beam, code = chosen // vocabulary.codebook_size, chosen % vocabulary.codebook_size
        tokens = torch.cat([tokens.gather(1, beam[..., None].expand(-1, -1, level)), (start + code)[..., None]], dim=-1)
    return ranks.masked_fill(log_likelihoods == -torch.inf, -1)


@torch.no_grad()
def evaluate(
    recommender: Recommender, dataset: NextItemDataset, *, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Leave-one-out metrics: how high the beam search ranks the semantic ID of each row's next item.

    Items that share a semantic ID count as one.

    Args:
        recommender: what is evaluated; it is left in the mode in which it was.
        dataset: the rows.
        batch_size: the number of rows in one search.
        device: where the recommender is.

    Returns:
        recall@k and ndcg@k for k in CUTOFFS, means over the rows.
    """
    vocabulary = dataset.vocabulary
    was_training = recommender.training
    recommender.eval()
    prefixes = ValidPrefixes(dataset.semantic_ids, vocabulary.codebook_size, device)
    first_tokens = torch.tensor(
        [vocabulary.level_range(level)[0] for level in range(vocabulary.codes_per_item)], device=device
    )
    sums = dict.fromkeys((f"{metric}@{k}" for metric in ("recall", "ndcg") for k in CUTOFFS), 0.0)
    for first in range(0, len(dataset), batch_size):
        batch = collate(dataset, np.arange(first, min(first + batch_size, len(dataset))), auxiliary_steps=0)
        batch = batch.to(device)
        target = prefixes.ranks(batch.labels - first_tokens)
        found = beam_search(recommender, recommender.encode(batch), len(target), prefixes)
        hits = found == target[:, None]
        for rank in hits.nonzero()[:, 1].tolist():
            for k in CUTOFFS:
                if rank < k:
                    sums[f"recall@{k}"] += 1.0
                    sums[f"ndcg@{k}"] += 1.0 / math.log2(rank + 2)
    recommender.train(was_training)
    return {name: total / len(dataset) for name, total in sums.items()}
