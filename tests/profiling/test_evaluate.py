"""The beam search and the metrics, against an exhaustive ranking of the catalogue."""

import dataclasses
import re

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
    return dataset_of(catalogue, VOCABULARY)


def dataset_of(catalogue: np.ndarray, vocabulary: Vocabulary) -> NextItemDataset:
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
    return NextItemDataset(EvaluationRows(interactions, "test"), vocabulary, catalogue)


def exhaustive_ranking(recommender, batch, catalogue, vocabulary=VOCABULARY) -> np.ndarray:
    """Items of the catalogue, the most probable first, by one prefix at a time: `[B, items]`."""
    encoded = recommender.encode(batch)
    tokens = torch.from_numpy(vocabulary.tokens(catalogue))
    prefixes = tokens.expand(len(batch.labels), -1, -1)
    log_likelihoods = torch.zeros(len(batch.labels), NUM_ITEMS)
    for level in range(vocabulary.codes_per_item):
        logits = recommender.next_token_logits(encoded, prefixes[..., :level])
        log_likelihoods += logits.log_softmax(-1).gather(-1, prefixes[..., level, None])[..., 0]
    return log_likelihoods.argsort(dim=1, descending=True).numpy()


def expected_metrics(ranking: np.ndarray, dataset: NextItemDataset) -> dict[str, float]:
    rank = (ranking == dataset.rows.items[dataset.rows.target][:, None]).argmax(axis=1)
    expected = {f"recall@{k}": (rank < k).mean() for k in (5, 10)}
    return expected | {f"ndcg@{k}": np.where(rank < k, 1 / np.log2(rank + 2), 0.0).mean() for k in (5, 10)}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_search_and_metrics_equal_the_exhaustive_ranking(name, catalogue, dataset):
    recommender = build_recommender(name, SETTINGS, seed=0).eval()
    batch = collate(dataset, np.arange(len(dataset)), 0)
    with torch.no_grad():
        ranking = exhaustive_ranking(recommender, batch, catalogue)
        found = beam_search(
            recommender, recommender.encode(batch), len(dataset), ValidPrefixes(catalogue, 4, torch.device("cpu"))
        )
    in_order = sorted(map(tuple, catalogue.tolist()))
    ranks = np.array([in_order.index(tuple(codes)) for codes in catalogue.tolist()])
    assert found.shape == (len(dataset), NUM_BEAMS)
    assert (found[:, NUM_ITEMS:] == -1).all()
    np.testing.assert_array_equal(found[:, :NUM_ITEMS].numpy(), ranks[ranking])

    expected = expected_metrics(ranking, dataset)
    # Padded pruning depends on the batch: its k is a share of the longest row.
    batch_size = len(dataset) if name == "padded-prune" else 6
    got = evaluate(recommender, dataset, batch_size=batch_size, device=torch.device("cpu"))
    assert got == pytest.approx(expected)


def test_evaluation_leaves_the_mode_as_it_was(dataset):
    recommender = build_recommender("packed", SETTINGS, seed=0)
    assert recommender.training
    evaluate(recommender, dataset, batch_size=8, device=torch.device("cpu"))
    assert recommender.training


def test_metrics_of_ids_beyond_64_bits():
    """The IDs differ in the first of 9 codes of 256, which a number of 64 bits in base 256 does not hold."""
    catalogue = np.zeros((NUM_ITEMS, 9), dtype=np.int64)
    catalogue[:, 0] = np.arange(NUM_ITEMS) * 20
    catalogue[:, 5] = np.arange(NUM_ITEMS) % 2
    vocabulary = Vocabulary(9, 256)
    dataset = dataset_of(catalogue, vocabulary)
    settings = dataclasses.replace(SETTINGS, codes_per_item=9, codebook_size=256)
    recommender = build_recommender("packed", settings, seed=0).eval()
    with torch.no_grad():
        ranking = exhaustive_ranking(recommender, collate(dataset, np.arange(len(dataset)), 0), catalogue, vocabulary)
    got = evaluate(recommender, dataset, batch_size=6, device=torch.device("cpu"))
    assert got == pytest.approx(expected_metrics(ranking, dataset))


# Valid prefixes


@pytest.mark.parametrize("codebook_size", [1, 3, 256])
@pytest.mark.parametrize("codes_per_item", [1, 4, 9, 20])
def test_prefixes_have_the_ranks_of_their_tuples(codebook_size, codes_per_item):
    generator = np.random.default_rng(0)
    catalogue = generator.integers(0, codebook_size, (30, codes_per_item))
    catalogue[10:20, 1:] = catalogue[0, 1:]  # items that share all codes but the first
    catalogue[20:, :-1] = catalogue[0, :-1]  # and all but the last
    tuples = [tuple(codes) for codes in catalogue.tolist()]
    prefixes = ValidPrefixes(catalogue.astype(np.uint8), codebook_size, torch.device("cpu"))

    rank_of = {(): 0}
    for level in range(codes_per_item):
        longer = {prefix: rank for rank, prefix in enumerate(sorted({each[: level + 1] for each in tuples}))}
        expected = torch.full((len(rank_of) + 1, codebook_size), -1)  # the last row continues no prefix
        for prefix, rank in longer.items():
            expected[rank_of[prefix[:-1]], prefix[-1]] = rank
        assert torch.equal(prefixes.continuations(torch.tensor([*rank_of.values(), -1]), level), expected)
        rank_of = longer
    others = generator.integers(0, codebook_size, (30, codes_per_item))
    for codes in (catalogue, others):
        expected_ranks = [rank_of.get(tuple(each), -1) for each in codes.tolist()]
        assert prefixes.ranks(torch.from_numpy(codes)).tolist() == expected_ranks


@pytest.mark.parametrize(
    ("codebook_size", "message"),
    [
        (7, "semantic_ids must be in [0, 7), got 0 to 8"),
        (2**61, f"codebook_size must be at most {(2**63 - 1) // 9} with 9 items, got {2**61}"),
    ],
)
def test_prefixes_name_what_they_cannot_represent(codebook_size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ValidPrefixes(np.arange(9)[:, None], codebook_size, torch.device("cpu"))
