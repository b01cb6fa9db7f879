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

    The key of a prefix of t codes is the number whose digits in base `codebook_size` are the codes.
    """

    def __init__(self, semantic_ids: np.ndarray, codebook_size: int, device: torch.device) -> None:
        self.codebook_size = codebook_size
        self._sorted_keys: list[Tensor] = []  # of the prefixes of 1, 2, ... codes
        keys = np.zeros(len(semantic_ids), dtype=np.int64)
        for codes in semantic_ids.T:
            keys = keys * codebook_size + codes
            self._sorted_keys.append(torch.from_numpy(np.unique(keys)).to(device))

    def continuations(self, keys: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """The continuations of prefixes of `level` codes by one code.

        Args:
            keys: int64 `[...]`.
            level: the number of codes of each prefix.

        Returns:
            keys int64 `[..., codebook_size]`, and bool `[..., codebook_size]`, which of them exist.
        """
        longer = keys[..., None] * self.codebook_size + torch.arange(self.codebook_size, device=keys.device)
        valid_keys = self._sorted_keys[level]
        nearest = torch.searchsorted(valid_keys, longer).clamp(max=len(valid_keys) - 1)
        return longer, valid_keys[nearest] == longer


def beam_search(recommender: Recommender, encoded: object, num_sequences: int, prefixes: ValidPrefixes) -> Tensor:
    """The most probable semantic IDs, best first: keys int64 `[B, beams]`, -1 where the catalogue has no more."""
    vocabulary = recommender.vocabulary
    device = next(recommender.parameters()).device
    keys = torch.zeros(num_sequences, 1, dtype=torch.int64, device=device)
    log_likelihoods = torch.zeros(num_sequences, 1, device=device)
    tokens = torch.empty(num_sequences, 1, 0, dtype=torch.int64, device=device)
    for level in range(vocabulary.codes_per_item):
        start, end = vocabulary.level_range(level)
        logits = recommender.next_token_logits(encoded, tokens)
        log_probabilities = logits.float().log_softmax(-1)[..., start:end]
        longer, exist = prefixes.continuations(keys, level)
        candidates = (log_likelihoods[..., None] + log_probabilities).masked_fill(~exist, -torch.inf).flatten(1)
        log_likelihoods, chosen = candidates.topk(min(NUM_BEAMS, candidates.shape[1]), dim=1)
        keys = longer.flatten(1).gather(1, chosen)
        beam, code = chosen // vocabulary.codebook_size, chosen % vocabulary.codebook_size
        tokens = torch.cat([tokens.gather(1, beam[..., None].expand(-1, -1, level)), (start + code)[..., None]], dim=-1)
    return keys.masked_fill(log_likelihoods == -torch.inf, -1)


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
    first_tokens = torch.tensor([vocabulary.level_range(level)[0] for level in range(vocabulary.codes_per_item)])
    sums = dict.fromkeys((f"{metric}@{k}" for metric in ("recall", "ndcg") for k in CUTOFFS), 0.0)
    for first in range(0, len(dataset), batch_size):
        batch = collate(dataset, np.arange(first, min(first + batch_size, len(dataset))), auxiliary_steps=0)
        target = torch.zeros(len(batch.labels), dtype=torch.int64)
        for codes in (batch.labels - first_tokens).T:
            target = target * vocabulary.codebook_size + codes
        batch = batch.to(device)
        found = beam_search(recommender, recommender.encode(batch), len(target), prefixes)
        hits = found == target.to(device)[:, None]
        for rank in hits.nonzero()[:, 1].tolist():
            for k in CUTOFFS:
                if rank < k:
                    sums[f"recall@{k}"] += 1.0
                    sums[f"ndcg@{k}"] += 1.0 / math.log2(rank + 2)
    recommender.train(was_training)
    return {name: total / len(dataset) for name, total in sums.items()}
