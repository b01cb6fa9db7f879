"""Leave-one-out rows, tokens and batches, each against an obvious loop or by its error text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_interactions import HISTORIES, make_interactions

from stamp_kernels.profiling.data.batches import Batch, EvaluationRows, TrainingRows, Vocabulary, batches, collate

# ---- rows ----------------------------------------------------------------------------------------------------------

Row = tuple[list[int], int, list[int]]

any_histories = st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=12), min_size=1, max_size=6)


def rows_of(rows: TrainingRows | EvaluationRows) -> list[Row]:
    triples = zip(rows.start, rows.target, rows.end, strict=True)
    return [(rows.items[s:t].tolist(), int(rows.items[t]), rows.items[t + 1 : e].tolist()) for s, t, e in triples]


def expected_training_rows(histories: list[list[int]], max_items: int) -> list[Row]:
    expected = []
    for history in histories:
        train = history[:-2]
        for t in range(1, len(train)):
            expected.append((train[max(0, t - max_items) : t], train[t], train[t + 1 :]))
    return expected


@given(any_histories, st.integers(1, 12))
def test_rows_equal_the_loop(histories: list[list[int]], max_items: int) -> None:
    interactions = make_interactions(histories)
    training = TrainingRows(interactions, max_items)
    assert rows_of(training) == expected_training_rows(histories, max_items)
    assert len(training) == sum(max(0, len(history) - 3) for history in histories)

    validation = EvaluationRows(interactions, "validation", max_items)
    assert rows_of(validation) == [(history[:-2][-max_items:], history[-2], []) for history in histories]
    test = EvaluationRows(interactions, "test", max_items)
    assert rows_of(test) == [(history[:-1][-max_items:], history[-1], []) for history in histories]


@given(any_histories, st.integers(1, 12), st.data())
def test_rows_with_short_histories_are_left_out(
    histories: list[list[int]], max_items: int, draw: st.DataObject
) -> None:
    min_items = draw.draw(st.integers(1, max_items))
    training = TrainingRows(make_interactions(histories), max_items, min_items)
    expected = [row for row in expected_training_rows(histories, max_items) if len(row[0]) >= min_items]
    assert rows_of(training) == expected


def test_a_sample_of_rows() -> None:
    interactions = make_interactions([list(range(100)), list(range(100, 150))])  # each row has another target
    every = rows_of(TrainingRows(interactions, 9, 4))
    assert len(every) == 94 + 44
    sample = rows_of(TrainingRows(interactions, 9, 4, rows=30))
    assert len(sample) == 30
    positions = [every.index(row) for row in sample]
    assert positions == sorted(set(positions))
    assert positions[-1] - positions[0] > 60  # from all over
    assert sample == rows_of(TrainingRows(interactions, 9, 4, rows=30))
    assert rows_of(TrainingRows(interactions, 9, 4, rows=138)) == every


def test_rows_take_30_items_by_default() -> None:
    interactions = make_interactions([list(range(50))])
    for rows in (TrainingRows(interactions), EvaluationRows(interactions, "test")):
        assert (rows.target - rows.start).max() == 30


def test_row_errors() -> None:
    interactions = make_interactions(HISTORIES)
    with pytest.raises(ValueError, match="max_items is 0, expected at least 1"):
        TrainingRows(interactions, 0)
    for min_items in (0, 6):
        with pytest.raises(ValueError, match=f"min_items is {min_items}, expected 1 to 5, which is max_items"):
            TrainingRows(interactions, 5, min_items)
    with pytest.raises(ValueError, match="rows is 0, expected at least 1"):
        TrainingRows(interactions, rows=0)
    with pytest.raises(ValueError, match="rows is 13, expected at most 12, the number of training rows"):
        TrainingRows(interactions, rows=13)
    with pytest.raises(ValueError, match="max_items is -1, expected at least 1"):
        EvaluationRows(interactions, "test", -1)
    with pytest.raises(ValueError, match="split is 'train', expected 'validation' or 'test'"):
        EvaluationRows(interactions, "train")


# ---- tokens --------------------------------------------------------------------------------------------------------


def test_vocabulary() -> None:
    vocabulary = Vocabulary(codes_per_item=3, codebook_size=5)
    assert vocabulary.size == 16
    assert vocabulary.pad_id == 0
    assert [vocabulary.level_range(level) for level in range(3)] == [(1, 6), (6, 11), (11, 16)]
    codes = np.array([[0, 0, 0], [4, 2, 4]], dtype=np.uint8)
    assert vocabulary.tokens(codes).tolist() == [[1, 6, 11], [5, 8, 15]]
    assert vocabulary.tokens(codes).dtype == np.int64
    large = Vocabulary(codes_per_item=2, codebook_size=256)
    for dtype in (np.uint8, np.uint64):
        tokens = large.tokens(np.array([255, 255], dtype=dtype))
        assert tokens.tolist() == [256, 512]
        assert tokens.dtype == np.int64


def test_vocabulary_errors() -> None:
    vocabulary = Vocabulary(codes_per_item=3, codebook_size=5)
    for level in (-1, 3):
        with pytest.raises(ValueError, match=f"level is {level}, expected 0 to 2"):
            vocabulary.level_range(level)
    with pytest.raises(ValueError, match=r"codes have shape \[4, 2\], expected the last dimension to be 3"):
        vocabulary.tokens(np.zeros((4, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"codes lie in \[0, 5\], expected them in \[0, 4\]"):
        vocabulary.tokens(np.array([0, 5, 0]))
    with pytest.raises(ValueError, match=r"codes lie in \[-1, 0\], expected them in \[0, 4\]"):
        vocabulary.tokens(np.array([0, -1, 0]))
    with pytest.raises(ValueError, match="codes_per_item is 0, expected at least 1"):
        Vocabulary(0, 5)
    with pytest.raises(ValueError, match="codebook_size is 0, expected at least 1"):
        Vocabulary(3, 0)


# ---- batches -------------------------------------------------------------------------------------------------------

LEVELS, CODEBOOK_SIZE = 3, 4
VOCABULARY = Vocabulary(LEVELS, CODEBOOK_SIZE)
SEMANTIC_IDS = np.array([[item // 4, item % 4, (item * 3) % 4] for item in range(10)])

BATCH_FIELDS = ("input_ids", "attention_mask", "packed_ids", "cu_seqlens", "lengths", "labels", "future_labels")


def expected_batch(rows: list[Row], steps: int) -> dict[str, list]:
    def tokens(items: list[int]) -> list[int]:
        return [1 + level * CODEBOOK_SIZE + int(SEMANTIC_IDS[item, level]) for item in items for level in range(LEVELS)]

    histories = [tokens(history) for history, _, _ in rows]
    longest = max(map(len, histories))
    cu_seqlens = [0]
    for history in histories:
        cu_seqlens.append(cu_seqlens[-1] + len(history))
    futures = []
    for _, _, later in rows:
        steps_of_row = []
        for step in range(steps):
            steps_of_row.append(tokens([later[step]]) if step < len(later) else [-100] * LEVELS)
        futures.append(steps_of_row)
    return {
        "input_ids": [history + [0] * (longest - len(history)) for history in histories],
        "attention_mask": [[1] * len(history) + [0] * (longest - len(history)) for history in histories],
        "packed_ids": [token for history in histories for token in history],
        "cu_seqlens": cu_seqlens,
        "lengths": [len(history) for history in histories],
        "labels": [tokens([target]) for _, target, _ in rows],
        "future_labels": futures,
    }


def assert_equal(first: Batch, second: Batch) -> None:
    assert all(torch.equal(getattr(first, field), getattr(second, field)) for field in BATCH_FIELDS)
    assert first.max_seqlen == second.max_seqlen


@given(any_histories, st.integers(1, 8), st.integers(0, 4), st.sampled_from(["train", "validation", "test"]), st.data())
def test_collate_equals_the_loop(
    histories: list[list[int]], max_items: int, steps: int, split: str, draw: st.DataObject
) -> None:
    histories = [*histories, [0, 1, 2, 3]]  # one training row at least
    interactions = make_interactions(histories)
    rows = TrainingRows(interactions, max_items) if split == "train" else EvaluationRows(interactions, split, max_items)
    indices = draw.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    batch = collate(rows, np.array(indices), VOCABULARY, SEMANTIC_IDS, steps)

    every = rows_of(rows)
    expected = expected_batch([every[index] for index in indices], steps)
    for field in BATCH_FIELDS:
        assert getattr(batch, field).tolist() == expected[field], field
        assert getattr(batch, field).dtype == (torch.int32 if field == "cu_seqlens" else torch.int64), field
    assert batch.future_labels.shape == (len(indices), steps, LEVELS)
    assert type(batch.max_seqlen) is int
    assert batch.max_seqlen == max(expected["lengths"])


def test_collate_of_no_rows() -> None:
    rows = TrainingRows(make_interactions(HISTORIES))
    batch = collate(rows, np.zeros(0, dtype=np.int64), VOCABULARY, SEMANTIC_IDS, 2)
    assert batch.input_ids.shape == batch.attention_mask.shape == (0, 0)
    assert batch.cu_seqlens.tolist() == [0]
    assert batch.labels.shape == (0, LEVELS)
    assert batch.future_labels.shape == (0, 2, LEVELS)
    assert batch.max_seqlen == 0


def test_collate_errors() -> None:
    rows = TrainingRows(make_interactions(HISTORIES))
    first = np.array([0])
    with pytest.raises(ValueError, match="auxiliary_steps is -1, expected at least 0"):
        collate(rows, first, VOCABULARY, SEMANTIC_IDS, -1)
    with pytest.raises(ValueError, match="expected the last dimension to be 3"):
        collate(rows, first, VOCABULARY, SEMANTIC_IDS[:, :2], 0)
    with pytest.raises(ValueError, match=r"codes lie in \[4, \d\], expected them in \[0, 3\]"):
        collate(rows, first, VOCABULARY, SEMANTIC_IDS + 4, 0)
    with pytest.raises(IndexError):
        collate(rows, np.array([len(rows)]), VOCABULARY, SEMANTIC_IDS, 0)
    with pytest.raises(IndexError):
        collate(rows, np.arange(len(rows)), VOCABULARY, SEMANTIC_IDS[:3], 0)


def test_batch_to_leaves_the_lengths_on_the_host() -> None:
    rows = TrainingRows(make_interactions(HISTORIES))
    batch = collate(rows, np.arange(3), VOCABULARY, SEMANTIC_IDS, 2)
    moved = batch.to("meta")
    for field in BATCH_FIELDS:
        assert getattr(moved, field).device.type == ("cpu" if field == "lengths" else "meta"), field
        assert getattr(moved, field).shape == getattr(batch, field).shape
    assert moved.max_seqlen == batch.max_seqlen
    assert_equal(batch.to(torch.device("cpu")), batch)


def batch_keys(rows: TrainingRows, batch_size: int, seed: int, epoch: int = 0) -> list[list[int]]:
    """The rows of each batch, each row known by its label."""
    vocabulary, ids = Vocabulary(1, 100), np.arange(100)[:, None]
    made = batches(rows, batch_size, seed, vocabulary, ids, 0, epoch=epoch)
    return [(batch.labels[:, 0] - 1).tolist() for batch in made]


def test_batches_are_a_seeded_shuffle_without_the_incomplete_one() -> None:
    rows = TrainingRows(make_interactions([list(range(100))]))  # 97 rows, each with another target
    assert len(rows) == 97
    made = batch_keys(rows, 10, seed=5)
    assert [len(batch) for batch in made] == [10] * 9
    seen = [key for batch in made for key in batch]
    assert len(set(seen)) == 90
    assert set(seen) <= set(range(1, 98))
    assert seen != sorted(seen)
    assert made == batch_keys(rows, 10, seed=5)
    others = [made, batch_keys(rows, 10, seed=6), batch_keys(rows, 10, seed=5, epoch=1), batch_keys(rows, 10, 6, 1)]
    assert all(a != b for i, a in enumerate(others) for b in others[:i])
    assert sorted(key for batch in batch_keys(rows, 97, seed=0) for key in batch) == list(range(1, 98))


def test_batches_are_collated_rows() -> None:
    rows = TrainingRows(make_interactions(HISTORIES), max_items=3)
    (batch,) = batches(rows, len(rows), 1, VOCABULARY, SEMANTIC_IDS, 2)
    order = np.random.default_rng((1, 0)).permutation(len(rows))
    assert_equal(batch, collate(rows, order, VOCABULARY, SEMANTIC_IDS, 2))


def test_batches_errors_come_at_once() -> None:
    rows = TrainingRows(make_interactions(HISTORIES))
    for size in (0, len(rows) + 1):
        with pytest.raises(ValueError, match=f"batch_size is {size}, expected 1 to {len(rows)}, the number of rows"):
            batches(rows, size, 0, VOCABULARY, SEMANTIC_IDS, 0)
    with pytest.raises(ValueError, match="seed is -1, expected at least 0"):
        batches(rows, 1, -1, VOCABULARY, SEMANTIC_IDS, 0)
    with pytest.raises(ValueError, match="epoch is -1, expected at least 0"):
        batches(rows, 1, 0, VOCABULARY, SEMANTIC_IDS, 0, epoch=-1)
