"""The beam search and the metrics, against an exhaustive ranking of the catalogue."""

import numpy as np
import pytest
import torch

from stamp_kernels.profiling.data.batches import NextItemDataset, collate
from stamp_kernels.profiling.data.interactions import Interactions
from stamp_kernels.profiling.data.rows import EvaluationRows
from stamp_kernels.profiling.data.vocabulary import Vocabulary
from stamp_kernels.profiling.recommender.evaluate import NUM_BEAMS, ValidPrefixes, beam_search, evaluate
from stamp_kernels.profiling.recommender.recommender import CONFIGURATIONS, RecommenderSettings, build_recommender

SETTINGS = RecommenderSettings(
    codes_per_item=3, codebook_size=4, num_layers=2, d_model=16, num_heads=2, d_kv=8, d_ff=24, prune_after_block=1
)
VOCABULARY = Vocabulary(3, 4)
NUM_ITEMS = 9  # fewer than the beams, so the search sees the whole catalogue


@pytest.fixture
def catalogue() -> np.ndarray:
    codes = np.random.default_rng(0).permutation(4**3)[:NUM_ITEMS]
    return np.stack([codes // 16, codes // 4 % 4, codes % 4], axis=1)


@pytest.fixture
def dataset(catalogue: np.ndarray) -> NextItemDataset:
    generator = np.random.default_rng(1)
    lengths = generator.integers(3, 12, size=20)
    interactions = Interactions(
        name="random",
        items=generator.integers(0, NUM_ITEMS, size=lengths.sum()),
        offsets=np.concatenate([[0], lengths.cumsum()]),
        num_items=NUM_ITEMS,
        semantic_ids=None,
        source="random",
    )
    return NextItemDataset(EvaluationRows(interactions, "test"), VOCABULARY, catalogue)


def exhaustive_ranking(recommender, batch, catalogue) -> np.ndarray:
    """Items of the catalogue, the most probable first, by one prefix at a time: `[B, items]`."""
    encoded = recommender.encode(batch)
    tokens = torch.from_numpy(VOCABULARY.tokens(catalogue))
    prefixes = tokens.expand(len(batch.labels), -1, -1)
    log_likelihoods = torch.zeros(len(batch.labels), NUM_ITEMS)
    for level in range(3):
        logits = recommender.next_token_logits(encoded, prefixes[..., :level])
        log_likelihoods += logits.log_softmax(-1).gather(-1, prefixes[..., level, None])[..., 0]
    return log_likelihoods.argsort(dim=1, descending=True).numpy()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_search_and_metrics_equal_the_exhaustive_ranking(name, catalogue, dataset):
    recommender = build_recommender(name, SETTINGS, seed=0).eval()
    batch = collate(dataset, np.arange(len(dataset)), 0)
    with torch.no_grad():
        ranking = exhaustive_ranking(recommender, batch, catalogue)
        found = beam_search(
            recommender, recommender.encode(batch), len(dataset), ValidPrefixes(catalogue, 4, torch.device("cpu"))
        )
    keys = catalogue @ np.array([16, 4, 1])
    assert found.shape == (len(dataset), NUM_BEAMS)
    assert (found[:, NUM_ITEMS:] == -1).all()
    np.testing.assert_array_equal(found[:, :NUM_ITEMS].numpy(), keys[ranking])

    target = dataset.rows.items[dataset.rows.target]
    rank = (ranking == target[:, None]).argmax(axis=1)
    expected = {f"recall@{k}": (rank < k).mean() for k in (5, 10)}
    expected |= {f"ndcg@{k}": np.where(rank < k, 1 / np.log2(rank + 2), 0.0).mean() for k in (5, 10)}
    # Padded pruning depends on the batch: its k is a share of the longest row.
    batch_size = len(dataset) if name == "padded-prune" else 6
    got = evaluate(recommender, dataset, batch_size=batch_size, device=torch.device("cpu"))
    assert got == pytest.approx(expected)


def test_evaluation_leaves_the_mode_as_it_was(dataset):
    recommender = build_recommender("packed", SETTINGS, seed=0)
    assert recommender.training
    evaluate(recommender, dataset, batch_size=8, device=torch.device("cpu"))
    assert recommender.training
