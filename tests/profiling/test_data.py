"""Leave-one-out rows, tokens and batches, each against an obvious loop or by its error message."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_interactions import HISTORIES, make_interactions

from stamp_kernels.profiling.data.batches import Batch, NextItemDataset, batches, collate
from stamp_kernels.profiling.data.rows import EvaluationRows, Rows, TrainingRows
from stamp_kernels.profiling.data.vocabulary import Vocabulary

# ---- rows ----------------------------------------------------------------------------------------------------------

Row = tuple[list[int], int, list[int]]

any_histories = st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=12), min_size=1, max_size=6)


def rows_of(rows: Rows) -> list[Row]:
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
    assert positions[-1] - positions[0] > 60  # spread over all rows
    assert sample == rows_of(TrainingRows(interactions, 9, 4, rows=30))
    assert rows_of(TrainingRows(interactions, 9, 4, rows=138)) == every


def test_rows_take_30_items_by_default() -> None:
    interactions = make_interactions([list(range(50))])
    for rows in (TrainingRows(interactions), EvaluationRows(interactions, "test")):
        assert (rows.target - rows.start).max() == 30


def test_row_errors() -> None:
    interactions = make_interactions(HISTORIES)
    with pytest.raises(ValueError, match=r"max_items must be in \[1, inf\), got 0"):
        TrainingRows(interactions, 0)
    with pytest.raises(ValueError, match=r"min_items must be in \[1, inf\), got 0"):
        TrainingRows(interactions, 5, 0)
    with pytest.raises(ValueError, match="min_items must be at most max_items, 5, got 6"):
        TrainingRows(interactions, 5, 6)
    with pytest.raises(ValueError, match=r"rows must be in \[1, inf\), got 0"):
        TrainingRows(interactions, rows=0)
    with pytest.raises(ValueError, match="rows must be at most the number of training rows, 12, got 13"):
        TrainingRows(interactions, rows=13)
    with pytest.raises(ValueError, match=r"max_items must be in \[1, inf\), got -1"):
        EvaluationRows(interactions, "test", -1)
    with pytest.raises(ValueError, match=r"split must be one of \('validation', 'test'\), got 'train'"):
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
        with pytest.raises(ValueError, match=rf"level must be in \[0, 3\), got {level}"):
            vocabulary.level_range(level)
    with pytest.raises(ValueError, match=r"codes must have shape \[..., 3\], got \[4, 2\]"):
        vocabulary.tokens(np.zeros((4, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"codes must be in \[0, 5\), got 0 to 5"):
        vocabulary.tokens(np.array([0, 5, 0]))
    with pytest.raises(ValueError, match=r"codes must be in \[0, 5\), got -1 to 0"):
        vocabulary.tokens(np.array([0, -1, 0]))
    with pytest.raises(ValueError, match=r"codes_per_item must be in \[1, inf\), got 0"):
        Vocabulary(0, 5)
    with pytest.raises(ValueError, match=r"codebook_size must be in \[1, inf\), got 0"):
        Vocabulary(3, 0)
    assert Vocabulary(1, 2**24 - 1).size == 2**24
    for codes_per_item, codebook_size in ((1, 2**24), (4, 10**7), (4, 2**62)):
        message = f"codes_per_item \\* codebook_size must be below 16777216, got {codes_per_item} \\* {codebook_size}"
        with pytest.raises(ValueError, match=message):
            Vocabulary(codes_per_item, codebook_size)


# ---- batches -------------------------------------------------------------------------------------------------------

CODES_PER_ITEM, CODEBOOK_SIZE = 3, 4
VOCABULARY = Vocabulary(CODES_PER_ITEM, CODEBOOK_SIZE)
SEMANTIC_IDS = np.array([[item // 4, item % 4, (item * 3) % 4] for item in range(10)])


def dataset_of(rows: Rows, semantic_ids: np.ndarray = SEMANTIC_IDS) -> NextItemDataset:
    return NextItemDataset(rows, VOCABULARY, semantic_ids)


def fields_of(batch: Batch) -> dict[str, torch.Tensor]:
    """Every tensor of a batch, by name."""
    packed = batch.packed_inputs
    assert packed.positions is None
    return {
        "packed_ids": packed.values,
        "cu_seqlens": packed.cu_seqlens,
        "lengths_cpu": packed.lengths_cpu,
        **{name: getattr(batch, name) for name in ("input_ids", "attention_mask", "labels", "future_ids")},
    }


def expected_batch(rows: list[Row], steps: int) -> dict[str, list]:
    def tokens(items: list[int]) -> list[int]:
        return [
            1 + level * CODEBOOK_SIZE + int(SEMANTIC_IDS[item, level])
            for item in items
            for level in range(CODES_PER_ITEM)
        ]

    histories = [tokens(history) for history, _, _ in rows]
    longest = max(map(len, histories))
    cu_seqlens = [0]
    for history in histories:
        cu_seqlens.append(cu_seqlens[-1] + len(history))
    futures = [tokens(later[:steps]) for _, _, later in rows]
    return {
        "packed_ids": [token for history in histories for token in history],
        "cu_seqlens": cu_seqlens,
        "lengths_cpu": [len(history) for history in histories],
        "input_ids": [history + [0] * (longest - len(history)) for history in histories],
        "attention_mask": [[1] * len(history) + [0] * (longest - len(history)) for history in histories],
        "labels": [tokens([target]) for _, target, _ in rows],
        "future_ids": [future + [-100] * (steps * CODES_PER_ITEM - len(future)) for future in futures],
    }


def assert_equal(first: Batch, second: Batch) -> None:
    others = fields_of(second)
    assert all(torch.equal(x, others[name]) for name, x in fields_of(first).items())
    assert first.packed_inputs.max_seqlen == second.packed_inputs.max_seqlen


@given(any_histories, st.integers(1, 8), st.integers(1, 4), st.sampled_from(["train", "validation", "test"]), st.data())
def test_collate_equals_the_loop(
    histories: list[list[int]], max_items: int, steps: int, split: str, draw: st.DataObject
) -> None:
    histories = [*histories, [0, 1, 2, 3]]  # at least one training row
    interactions = make_interactions(histories)
    rows = TrainingRows(interactions, max_items) if split == "train" else EvaluationRows(interactions, split, max_items)
    indices = draw.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    batch = collate(dataset_of(rows), np.array(indices), steps)

    every = rows_of(rows)
    expected = expected_batch([every[index] for index in indices], steps)
    for name, x in fields_of(batch).items():
        assert x.tolist() == expected[name], name
        assert x.dtype == (torch.int32 if name == "cu_seqlens" else torch.int64), name
    longest = max(expected["lengths_cpu"])
    assert type(batch.packed_inputs.max_seqlen) is int
    assert batch.packed_inputs.max_seqlen == longest
    assert batch.size == (longest, len(expected["packed_ids"]))


def test_no_auxiliary_steps_have_no_future() -> None:
    dataset = dataset_of(TrainingRows(make_interactions(HISTORIES)))
    batch = collate(dataset, np.arange(3), 0)
    assert batch.future_ids is None
    assert batch.to("meta").future_ids is None
    assert torch.equal(batch.input_ids, collate(dataset, np.arange(3), 2).input_ids)


def test_collate_does_not_depend_on_the_default_device() -> None:
    dataset = dataset_of(TrainingRows(make_interactions(HISTORIES)))
    with torch.device("meta"):
        batch = collate(dataset, np.arange(3), 2)
    assert_equal(batch, collate(dataset, np.arange(3), 2))


def test_collate_errors() -> None:
    rows = TrainingRows(make_interactions(HISTORIES))
    with pytest.raises(ValueError, match=r"auxiliary_steps must be in \[0, inf\), got -1"):
        collate(dataset_of(rows), np.array([0]), -1)
    with pytest.raises(ValueError, match=r"codes must have shape \[..., 3\], got \[10, 2\]"):
        dataset_of(rows, SEMANTIC_IDS[:, :2])
    with pytest.raises(ValueError, match=r"codes must be in \[0, 4\), got 4 to \d"):
        dataset_of(rows, SEMANTIC_IDS + 4)
    with pytest.raises(IndexError):
        collate(dataset_of(rows), np.array([len(rows)]), 0)
    with pytest.raises(IndexError):
        collate(dataset_of(rows, SEMANTIC_IDS[:3]), np.arange(len(rows)), 0)


def test_batch_to_leaves_lengths_on_the_cpu() -> None:
    batch = collate(dataset_of(TrainingRows(make_interactions(HISTORIES))), np.arange(3), 2)
    moved = batch.to("meta")
    before = fields_of(batch)
    for name, x in fields_of(moved).items():
        assert x.device.type == ("cpu" if name == "lengths_cpu" else "meta"), name
        assert x.shape == before[name].shape
    assert moved.size == batch.size
    assert_equal(batch.to(torch.device("cpu")), batch)


def batch_keys(rows: TrainingRows, batch_size: int, seed: int, epoch: int = 0) -> list[list[int]]:
    """The labels of each batch, which identify its rows."""
    dataset = NextItemDataset(rows, Vocabulary(1, 100), np.arange(100)[:, None])
    made = batches(dataset, batch_size, seed, 0, epoch=epoch)
    return [(batch.labels[:, 0] - 1).tolist() for batch in made]


def test_batches_are_a_seeded_shuffle() -> None:
    """The incomplete last batch is dropped."""
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
    dataset = dataset_of(TrainingRows(make_interactions(HISTORIES), max_items=3))
    (batch,) = batches(dataset, len(dataset), 1, 2)
    order = np.random.default_rng((1, 0)).permutation(len(dataset))
    assert_equal(batch, collate(dataset, order, 2))


def test_batches_errors_come_at_once() -> None:
    """Not when the first batch is read."""
    dataset = dataset_of(TrainingRows(make_interactions(HISTORIES)))
    with pytest.raises(ValueError, match=r"batch_size must be in \[1, inf\), got 0"):
        batches(dataset, 0, 0, 0)
    with pytest.raises(ValueError, match="batch_size must be at most the number of rows, 12, got 13"):
        batches(dataset, 13, 0, 0)
    with pytest.raises(ValueError, match=r"seed must be in \[0, inf\), got -1"):
        batches(dataset, 1, -1, 0)
    with pytest.raises(ValueError, match=r"auxiliary_steps must be in \[0, inf\), got -1"):
        batches(dataset, 1, 0, -1)
    with pytest.raises(ValueError, match=r"epoch must be in \[0, inf\), got -1"):
        batches(dataset, 1, 0, 0, epoch=-1)
