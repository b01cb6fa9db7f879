"""PackingCollator on lists, arrays and tensors, against loops over the features."""

import pickle
import re
from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from stamp_kernels.data import PackingCollator
from stamp_kernels.packed import PackedBatch

KINDS = {
    "list": list,
    "tuple": tuple,
    "int64 tensor": lambda row: torch.tensor(row, dtype=torch.int64),
    "int32 tensor": lambda row: torch.tensor(row, dtype=torch.int32),
    "int64 array": lambda row: np.array(row, dtype=np.int64),
    "int32 array": lambda row: np.array(row, dtype=np.int32),
    "uint16 array": lambda row: np.array(row, dtype=np.uint16),
    "big-endian array": lambda row: np.array(row, dtype=">i4"),
    "reversed view": lambda row: np.array(row[::-1], dtype=np.int64)[::-1],
    "list of NumPy integers": lambda row: [np.int32(token) for token in row],
}

rows = st.lists(st.integers(0, 60_000), max_size=9)
features_of_rows = st.lists(
    st.fixed_dictionaries({"input_ids": rows, "labels": rows, "future_ids": rows}), min_size=0, max_size=6
)


def padded(rows: list[list[int]], width: int) -> list[list[int]]:
    return [(row + [-100] * width)[:width] for row in rows]


def check_packed(packed: PackedBatch, histories: list[list[int]]) -> None:
    lengths = [len(history) for history in histories]
    assert isinstance(packed, PackedBatch)
    assert packed.values.dtype == torch.int64
    assert packed.values.tolist() == [token for history in histories for token in history]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    assert packed.max_seqlen == max(lengths, default=0)
    assert type(packed.max_seqlen) is int
    assert packed.positions is None
    assert packed.lengths_cpu.dtype == torch.int64
    assert packed.lengths_cpu.tolist() == lengths


@given(features=features_of_rows, future_length=st.integers(0, 11), data=st.data())
def test_equals_the_loop_for_every_kind_of_row(features, future_length, data):
    given_features = [
        {key: KINDS[data.draw(st.sampled_from(list(KINDS)))](row) for key, row in feature.items()}
        for feature in features
    ]
    batch = PackingCollator(future_length)(given_features)
    assert list(batch) == ["packed_inputs", "labels", *(["future_ids"] if future_length > 0 else [])]
    check_packed(batch["packed_inputs"], [feature["input_ids"] for feature in features])

    labels = [feature["labels"] for feature in features]
    longest = max((len(row) for row in labels), default=0)
    assert batch["labels"].dtype == torch.int64
    assert batch["labels"].shape == (len(features), longest)
    assert batch["labels"].tolist() == padded(labels, longest)
    if future_length > 0:
        assert batch["future_ids"].dtype == torch.int64
        assert batch["future_ids"].shape == (len(features), future_length)
        assert batch["future_ids"].tolist() == padded([feature["future_ids"] for feature in features], future_length)


@pytest.mark.parametrize("kind", KINDS)
def test_takes_every_kind_of_row(kind):
    features = [{"input_ids": KINDS[kind](row), "labels": KINDS[kind](row[:2])} for row in ([5, 6, 7], [8])]
    batch = PackingCollator()(features)
    check_packed(batch["packed_inputs"], [[5, 6, 7], [8]])
    assert batch["labels"].tolist() == [[5, 6], [8, -100]]


def test_no_features_make_an_empty_batch():
    batch = PackingCollator(4)([])
    check_packed(batch["packed_inputs"], [])
    assert batch["labels"].shape == (0, 0)
    assert batch["future_ids"].shape == (0, 4)
    assert {batch["labels"].dtype, batch["future_ids"].dtype} == {torch.int64}


def test_batch_shares_no_memory_with_the_dataset():
    history = torch.tensor([1, 2, 3])
    batch = PackingCollator()([{"input_ids": history, "labels": history}])
    batch["packed_inputs"].values.fill_(0)
    batch["labels"].fill_(0)
    assert history.tolist() == [1, 2, 3]


def test_other_keys_are_ignored():
    feature = {"input_ids": [1, 2], "labels": [3], "user": "u7", "future_ids": "not read with future_length 0"}
    batch = PackingCollator()([UserDict(feature)])
    assert list(batch) == ["packed_inputs", "labels"]


def test_too_many_tokens_are_refused_before_copying():
    history = torch.zeros(1, dtype=torch.int64).expand(2**30)
    with pytest.raises(RuntimeError, match=r"at most 2\*\*31 - 1 tokens, since cu_seqlens is int32, got 2147483648"):
        PackingCollator()([{"input_ids": history, "labels": [1]}] * 2)


def test_default_device_does_not_matter():
    features = [
        {"input_ids": [5, 6, 7], "labels": [8], "future_ids": [9], "attention_mask": [1, 0, 1]},
        {"input_ids": [], "labels": [1, 2], "future_ids": [], "attention_mask": []},
    ]
    for given_features in (features, []):
        expected = PackingCollator(2)(given_features)
        with torch.device("meta"):
            batch = PackingCollator(2)(given_features)
        check_packed(batch["packed_inputs"], [[5, 7], []] if given_features else [])
        assert torch.equal(batch["labels"], expected["labels"])
        assert torch.equal(batch["future_ids"], expected["future_ids"])


def test_future_length_may_be_a_numpy_integer():
    collator = PackingCollator(np.int64(5))
    assert type(collator.future_length) is int
    assert collator == PackingCollator(5)


# attention_mask


MASK_KINDS = {
    "list": lambda mask: [int(valid) for valid in mask],
    "bool tensor": lambda mask: torch.tensor(mask, dtype=torch.bool),
    "bool array": lambda mask: np.array(mask, dtype=bool),
    "int64 tensor": lambda mask: torch.tensor(mask, dtype=torch.int64),
}


@pytest.mark.parametrize("kind", MASK_KINDS)
@given(histories=st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=8), min_size=1, max_size=5))
def test_masked_tokens_are_not_packed(kind, histories):
    features = [
        {
            "input_ids": [token for token, _ in history],
            "attention_mask": MASK_KINDS[kind]([valid for _, valid in history]),
            "labels": [],
        }
        for history in histories
    ]
    batch = PackingCollator()(features)
    check_packed(batch["packed_inputs"], [[token for token, valid in history if valid] for history in histories])


# In the DataLoader


class Dataset(torch.utils.data.Dataset):
    """Feature i has i tokens. The numbers of its target and future tokens vary too."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {
            "input_ids": list(range(index)),
            "labels": np.arange(1 + index % 2),
            "future_ids": torch.arange(index % 3 * 2),
        }


def test_batches_cross_from_worker_processes():
    batches = [[3, 1], [], [0], [9, 0, 2]]
    loader = DataLoader(Dataset(), batch_sampler=batches, collate_fn=PackingCollator(3), num_workers=2)
    results = list(loader)
    assert len(results) == len(batches)
    for indices, result in zip(batches, results, strict=True):
        check_packed(result["packed_inputs"], [list(range(i)) for i in indices])
        assert result["labels"].tolist() == padded(
            [list(range(1 + i % 2)) for i in indices], max((1 + i % 2 for i in indices), default=0)
        )
        assert result["future_ids"].tolist() == padded([list(range(i % 3 * 2)) for i in indices], 3)


def test_survives_pickling():
    collator = pickle.loads(pickle.dumps(PackingCollator(5)))
    assert collator == PackingCollator(5)
    assert collator([])["future_ids"].shape == (0, 5)


@pytest.mark.gpu
def test_a_loader_pins_its_batches():
    loader = DataLoader(Dataset(), batch_size=5, collate_fn=PackingCollator(3), num_workers=2, pin_memory=True)
    for batch in loader:
        assert batch["packed_inputs"].values.is_pinned()
        assert batch["packed_inputs"].cu_seqlens.is_pinned()
        assert batch["labels"].is_pinned()
        moved = batch["packed_inputs"].to("cuda", non_blocking=True)
        assert torch.equal(moved.values.cpu(), batch["packed_inputs"].values)


# Bad input

GOOD = {"input_ids": [1, 2], "labels": [3], "future_ids": [4]}


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ([1, 2], "features[1] must be a mapping, got list"),
        ({"labels": [3]}, "features[1] must have the key 'input_ids', got ['labels']"),
        ({"input_ids": [1]}, "features[1] must have the key 'labels', got ['input_ids']"),
        (
            {"input_ids": [1], "labels": [3]},
            "features[1] must have the key 'future_ids', got ['input_ids', 'labels']",
        ),
        (
            {**GOOD, "attention_mask": [1, 1]},
            "features[0] must have the key 'attention_mask', got ['input_ids', 'labels', 'future_ids']",
        ),
        (
            {**GOOD, "input_ids": torch.ones(1, 2, dtype=torch.int64)},
            "features[1]['input_ids'] must be one-dimensional, got shape [1, 2]",
        ),
        ({**GOOD, "labels": np.int64(3)}, "features[1]['labels'] must be one-dimensional, got shape []"),
        (
            {**GOOD, "labels": torch.ones(2)},
            "features[1]['labels'] must have an integer dtype, got torch.float32",
        ),
        (
            {**GOOD, "labels": torch.ones(2, dtype=torch.bool)},
            "features[1]['labels'] must have an integer dtype, got torch.bool",
        ),
        ({**GOOD, "future_ids": np.ones(2)}, "features[1]['future_ids'] must have an integer dtype, got float64"),
        (
            {**GOOD, "input_ids": np.ones(2, dtype=bool)},
            "features[1]['input_ids'] must have an integer dtype, got bool",
        ),
        (
            {**GOOD, "input_ids": torch.ones(2, dtype=torch.int64, device="meta")},
            "features[1]['input_ids'] must be on cpu, got meta",
        ),
        (
            {**GOOD, "input_ids": [1, 2.0]},
            "features[1]['input_ids'] must be a one-dimensional sequence of int64 integers: got float at index 1",
        ),
        ({**GOOD, "input_ids": [[1, 2]]}, "sequence of int64 integers: got list at index 0"),
        ({**GOOD, "labels": 3}, "features[1]['labels'] must be a one-dimensional sequence of int64 integers: got int"),
        ({**GOOD, "labels": None}, "got NoneType"),
        ({**GOOD, "labels": "ab"}, "got str at index 0"),
        ({**GOOD, "labels": [0, 2**63]}, f"got numbers from 0 to {2**63}"),
        (
            {**GOOD, "labels": np.array([0, 2**63], dtype=np.uint64)},
            f"features[1]['labels'] must hold int64 integers, got {2**63} at index 1",
        ),
        ({**GOOD, "input_ids": {0: 5, 1: 6}}, "features[1]['input_ids'] must be a one-dimensional sequence of int64"),
        ({**GOOD, "input_ids": UserDict({0: 5})}, "got UserDict, a mapping, of which only the keys would be read"),
        ({**GOOD, "labels": frozenset({5})}, "got frozenset, which has no order and drops repeated numbers"),
    ],
)
def test_names_the_bad_feature(feature, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PackingCollator(2)([GOOD, feature])


def test_names_a_mask_of_another_length():
    features = [{**GOOD, "attention_mask": [1, 1]}, {**GOOD, "attention_mask": [1]}]
    message = "features[1]['attention_mask'] must be as long as its input_ids, 2, got 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        PackingCollator()(features)


@pytest.mark.parametrize(
    ("future_length", "message"),
    [
        (-1, "future_length must be in [0, inf), got -1"),
        (2.0, "future_length must be an int (not a tensor), got float"),
    ],
)
def test_names_a_bad_future_length(future_length, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PackingCollator(future_length)
