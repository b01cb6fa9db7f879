"""TokenBudgetBatchSampler: every index once, within max_tokens, balanced ranks, the same plan on every rank."""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from stamp_kernels.data import PackingCollator, TokenBudgetBatchSampler


@st.composite
def settings(draw):
    """Lengths, budgets and ranks, with chunks of one sequence or of all, and with empty sequences."""
    lengths = draw(st.lists(st.integers(0, 40), max_size=60))
    max_tokens = draw(st.integers(max(lengths, default=1) or 1, 150))
    return {
        "lengths": lengths,
        "max_tokens": max_tokens,
        "num_replicas": draw(st.integers(1, 5)),
        "max_sequences": draw(st.none() | st.integers(1, 8)),
        "shuffle": draw(st.booleans()),
        "seed": draw(st.integers(0, 3)),
    }


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def plans_of(arguments: dict, epoch: int = 0) -> list[list[list[int]]]:
    """The batches of every rank."""
    plans = []
    for rank in range(arguments["num_replicas"]):
        sampler = TokenBudgetBatchSampler(rank=rank, **arguments)
        sampler.set_epoch(epoch)
        plan = list(sampler)
        assert len(sampler) == len(plan)
        plans.append(plan)
    return plans


def spread(lengths: list[int], ranks: int) -> list[list[int]]:
    """The lengths on each rank: the longest first, each to the rank with the fewest tokens."""
    loads = [[] for _ in range(ranks)]
    for n in sorted(lengths, reverse=True):
        min(loads, key=sum).append(n)
    return loads


@given(settings(), st.integers(0, 3))
def test_every_index_comes_once_within_the_budget(arguments, epoch):
    plans = plans_of(arguments, epoch)
    lengths = arguments["lengths"]
    assert len({len(plan) for plan in plans}) == 1
    batches = [batch for plan in plans for batch in plan]
    assert sorted(flat(batches)) == list(range(len(lengths)))
    for batch in batches:
        assert all(type(index) is int for index in batch)
        assert sum(lengths[index] for index in batch) <= arguments["max_tokens"]
        assert len(batch) <= (arguments["max_sequences"] or len(lengths))
    # Only in the last step may a batch be empty, and only if there are fewer sequences than ranks.
    for number, step in enumerate(zip(*plans, strict=True), start=1):
        assert all(step) or (number == len(plans[0]) and sum(map(len, step)) < len(plans))


@given(settings())
def test_ranks_of_a_step_are_balanced(arguments):
    """No rank exceeds another by more than the shortest of its own sequences."""
    plans = plans_of({**arguments, "max_sequences": None})
    for step in zip(*plans, strict=True):
        loads = [[arguments["lengths"][index] for index in batch] for batch in step]
        heaviest = max(loads, key=sum)
        assert sum(heaviest) - min(heaviest, default=0) <= min(map(sum, loads))


@given(settings())
def test_steps_are_the_longest_chunks_that_fit(arguments):
    arguments = {**arguments, "shuffle": False, "max_sequences": None}
    lengths, ranks = arguments["lengths"], arguments["num_replicas"]
    first = 0
    for step in zip(*plans_of(arguments), strict=True):
        end = first + sum(map(len, step))
        assert sorted(flat(step)) == list(range(first, end))
        assert all(batch == sorted(batch) for batch in step)
        assert sorted(sum(lengths[i] for i in batch) for batch in step) == sorted(
            map(sum, spread(lengths[first:end], ranks))
        )
        if end < len(lengths):
            assert max(map(sum, spread(lengths[first : end + 1], ranks))) > arguments["max_tokens"]
        first = end
    assert first == len(lengths)


@given(settings())
def test_one_rank_fills_its_batches_in_order(arguments):
    arguments = {**arguments, "num_replicas": 1, "shuffle": False}
    expected, tokens = [], 0
    for index, n in enumerate(arguments["lengths"]):
        full = expected and len(expected[-1]) == arguments["max_sequences"]
        if not expected or full or tokens + n > arguments["max_tokens"]:
            expected.append([])
            tokens = 0
        expected[-1].append(index)
        tokens += n
    assert plans_of(arguments) == [expected]


def test_chunk_that_does_not_spread_is_shortened():
    # 4 x 60 tokens are less than 3 x 100, but two sequences do not fit on a rank.
    plans = plans_of({"lengths": [60] * 7, "max_tokens": 100, "num_replicas": 3, "shuffle": False})
    assert plans == [[[0], [3], [6]], [[1], [4], []], [[2], [5], []]]
    # 28 x 35 tokens are less than 10 x 100, but only 20 sequences fit. The search goes back beyond 20, then forward.
    plans = plans_of({"lengths": [35] * 45, "max_tokens": 100, "num_replicas": 10})
    assert [sum(map(len, step)) for step in zip(*plans, strict=True)] == [20, 20, 5]


def test_equal_lengths_make_fixed_batches():
    plans = plans_of({"lengths": [7] * 26, "max_tokens": 21, "num_replicas": 2, "shuffle": False})
    assert [[len(batch) for batch in plan] for plan in plans] == [[3, 3, 3, 3, 1], [3, 3, 3, 3, 1]]


def test_empty_sequences_use_no_budget_and_are_spread():
    arguments = {"lengths": [0] * 10 + [5], "max_tokens": 5, "num_replicas": 2, "shuffle": False}
    plans = plans_of(arguments)
    # The sequence with tokens comes first. The empty ones all go to the other rank.
    assert plans == [[[10]], [list(range(10))]]
    plans = plans_of({**arguments, "lengths": [0] * 10})
    assert [[len(batch) for batch in plan] for plan in plans] == [[5], [5]]
    plans = plans_of({**arguments, "lengths": [0] * 10, "max_sequences": 2})
    assert [[len(batch) for batch in plan] for plan in plans] == [[2, 2, 1], [2, 2, 1]]


def test_a_full_rank_leaves_sequences_to_the_others():
    # Without max_sequences, sequences 2 to 5 would all go to rank 1.
    arguments = {"lengths": [50, 1, 1, 1, 1, 1], "max_tokens": 100, "num_replicas": 2, "shuffle": False}
    assert plans_of({**arguments, "max_sequences": 3}) == [[[0, 4, 5]], [[1, 2, 3]]]


def test_no_sequences_no_batches():
    for lengths in ([], np.zeros(0, dtype=np.int64), torch.zeros(0, dtype=torch.int64)):
        sampler = TokenBudgetBatchSampler(lengths, 5)
        assert len(sampler) == 0
        assert list(sampler) == []


def test_lists_arrays_and_tensors_give_the_same_plan():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    plan = list(TokenBudgetBatchSampler(lengths, 10))
    for same in (tuple(lengths), np.array(lengths, dtype=np.uint8), torch.tensor(lengths, dtype=torch.int32)):
        assert list(TokenBudgetBatchSampler(same, 10)) == plan


def test_sums_beyond_64_bits_do_not_wrap():
    lengths = [2**61, 2**61, 0, 1, 2**62, 2**62]
    plans = plans_of({"lengths": lengths, "max_tokens": 2**63 - 1, "num_replicas": 1, "shuffle": False})
    assert plans == [[[0, 1, 2, 3], [4], [5]]]


def test_numbers_may_be_numpy_integers():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    sampler = TokenBudgetBatchSampler(
        lengths, np.int32(10), num_replicas=np.int64(2), rank=np.uint8(1), seed=np.int64(3), max_sequences=np.int16(2)
    )
    sampler.set_epoch(np.int64(2), np.int64(1))
    same = TokenBudgetBatchSampler(lengths, 10, num_replicas=2, rank=1, seed=3, max_sequences=2)
    same.set_epoch(2, 1)
    assert list(sampler) == list(same)
    for number in (sampler.max_tokens, sampler.num_replicas, sampler.rank, sampler.seed, sampler.max_sequences):
        assert type(number) is int


def test_default_device_does_not_matter():
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    for shuffle in (True, False):
        expected = list(TokenBudgetBatchSampler(lengths, 10, shuffle=shuffle))
        with torch.device("meta"):
            assert list(TokenBudgetBatchSampler(lengths, 10, shuffle=shuffle)) == expected
            assert list(TokenBudgetBatchSampler([], 10, shuffle=shuffle)) == []


# The order


def order_of(sampler: TokenBudgetBatchSampler) -> list[int]:
    return flat(sampler)


def test_seed_and_epoch_choose_the_order():
    orders = {}
    for seed in range(3):
        sampler = TokenBudgetBatchSampler([1] * 50, 10, seed=seed)
        for epoch in (0, 1, 2):
            sampler.set_epoch(epoch)
            orders[seed, epoch] = tuple(order_of(sampler))
            assert tuple(order_of(sampler)) == orders[seed, epoch]
        sampler.set_epoch(0)
        assert tuple(order_of(sampler)) == orders[seed, 0]
    # Seed 1 in epoch 0 differs from seed 0 in epoch 1, too.
    assert len(set(orders.values())) == len(orders)


def test_no_shuffle_keeps_the_order_of_the_dataset():
    sampler = TokenBudgetBatchSampler([1] * 20, 7, shuffle=False)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        assert order_of(sampler) == list(range(20))


def test_shuffle_does_not_depend_on_lengths():
    # A long sequence is as likely in any place as a short one. The mean of the 200 places of long sequences in ten
    # epochs, each from 0 to 79, has a standard deviation of at most 1.7 around 39.5.
    lengths = [30] * 20 + [1] * 60
    sampler = TokenBudgetBatchSampler(lengths, 30)
    places = []
    for epoch in range(10):
        sampler.set_epoch(epoch)
        places += [place for place, index in enumerate(order_of(sampler)) if index < 20]
    assert abs(np.mean(places) - 39.5) < 5


def test_the_plan_depends_on_no_global_state():
    code = (
        "import torch; from stamp_kernels.data import TokenBudgetBatchSampler; torch.manual_seed(7)\n"
        "print(list(TokenBudgetBatchSampler([n % 7 for n in range(60)], 20, num_replicas=3, rank=1, seed=5)))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    plan = list(TokenBudgetBatchSampler([n % 7 for n in range(60)], 20, num_replicas=3, rank=1, seed=5))
    assert result.stdout.strip() == str(plan)


def test_planning_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    list(TokenBudgetBatchSampler([1] * 30, 4))
    assert torch.equal(torch.get_rng_state(), state)


# drop_last


@given(settings())
def test_drop_last_drops_only_partial_steps(arguments):
    shortest = min(arguments["lengths"], default=0)
    kept = plans_of({**arguments, "drop_last": True})
    all_of_them = plans_of(arguments)
    if not all_of_them[0]:
        assert kept == all_of_them
        return
    last = [plan[-1] for plan in all_of_them]
    full = all(
        sum(arguments["lengths"][i] for i in batch) + shortest > arguments["max_tokens"]
        or len(batch) == arguments["max_sequences"]
        for batch in last
    )
    assert kept == [plan if full else plan[:-1] for plan in all_of_them]


def test_drop_last_keeps_a_full_last_step():
    arguments = {"num_replicas": 2, "drop_last": True}
    for lengths, max_tokens, max_sequences, batches in [
        ([7] * 12, 21, None, 2),
        ([7] * 13, 21, None, 2),
        ([7] * 11, 21, None, 1),
        ([51] * 4, 100, None, 2),
        ([1] * 8, 100, 2, 2),
        ([1] * 7, 100, 2, 1),
        ([1] * 3, 100, None, 0),
    ]:
        plans = plans_of(
            {**arguments, "lengths": lengths, "max_tokens": max_tokens, "max_sequences": max_sequences}, epoch=1
        )
        assert [len(plan) for plan in plans] == [batches, batches]


# Resuming within an epoch


@given(settings(), st.data())
def test_resumes_from_first_batch(arguments, data):
    rank = data.draw(st.integers(0, arguments["num_replicas"] - 1))
    epoch = data.draw(st.integers(0, 2))
    plan = plans_of(arguments, epoch)[rank]
    first = data.draw(st.integers(0, len(plan)))
    sampler = TokenBudgetBatchSampler(rank=rank, **arguments)
    sampler.set_epoch(epoch, first)
    assert len(sampler) == len(plan) - first
    assert list(sampler) == plan[first:]
    assert len(sampler) == len(plan)
    assert list(sampler) == plan


def test_first_batch_holds_until_an_iteration_ends():
    sampler = TokenBudgetBatchSampler([1] * 10, 2, shuffle=False)
    sampler.set_epoch(0, 3)
    assert next(iter(sampler)) == [6, 7]
    assert len(sampler) == 2
    assert list(sampler) == [[6, 7], [8, 9]]
    assert len(sampler) == 5


def test_an_older_iteration_does_not_undo_set_epoch():
    sampler = TokenBudgetBatchSampler([1] * 10, 2, shuffle=False)
    for first_batch in (1, 3):
        sampler.set_epoch(0, 3)
        older = iter(sampler)
        assert next(older) == [6, 7]
        # With a loader that reads ahead an iteration may end after this call, which holds even with the same numbers.
        sampler.set_epoch(0, first_batch)
        assert list(older) == [[8, 9]]
        assert len(sampler) == 5 - first_batch
        assert len(list(sampler)) == 5 - first_batch


def test_batches_may_be_changed_by_their_receiver():
    sampler = TokenBudgetBatchSampler([1] * 10, 4)
    expected = [batch.copy() for batch in sampler]
    for batch in sampler:
        batch.clear()
    assert list(sampler) == expected


class Dataset(torch.utils.data.Dataset):
    """Feature i is token i, repeated lengths[i] times."""

    lengths = (5, 0, 13, 2, 7, 7, 1, 11, 3, 4, 9)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        return {"input_ids": [index] * self.lengths[index], "labels": [index]}


@pytest.mark.parametrize("persistent_workers", [False, True])
def test_loader_with_workers(persistent_workers):
    samplers = [TokenBudgetBatchSampler(Dataset.lengths, 14, num_replicas=4, rank=rank, seed=1) for rank in range(4)]
    loaders = [
        DataLoader(
            Dataset(),
            batch_sampler=sampler,
            collate_fn=PackingCollator(),
            num_workers=2 if rank == 0 else 0,
            persistent_workers=persistent_workers and rank == 0,
        )
        for rank, sampler in enumerate(samplers)
    ]
    orders = []
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        seen = []
        for loader in loaders:
            expected = len(loader)
            batches = list(loader)
            assert len(batches) == expected == len(loaders[0])
            for batch in batches:
                assert batch["packed_inputs"].values.shape[0] <= 14
                seen += batch["labels"].flatten().tolist()
        assert sorted(seen) == list(range(len(Dataset.lengths)))
        orders.append(seen)
    assert orders[0] != orders[1]

    whole = [batch["labels"].tolist() for batch in loaders[0]]
    samplers[0].set_epoch(1, first_batch=1)
    assert len(loaders[0]) == len(whole) - 1
    assert [batch["labels"].tolist() for batch in loaders[0]] == whole[1:]
    assert [batch["labels"].tolist() for batch in loaders[0]] == whole


# Ranks of torch.distributed


def test_reads_ranks_from_torch_distributed(monkeypatch):
    lengths = [3, 1, 4, 1, 5, 9, 2, 6]
    alone = TokenBudgetBatchSampler(lengths, 10)
    assert (alone.num_replicas, alone.rank) == (1, 0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 2)
    sampler = TokenBudgetBatchSampler(lengths, 10)
    assert (sampler.num_replicas, sampler.rank) == (3, 2)
    assert list(sampler) == list(TokenBudgetBatchSampler(lengths, 10, num_replicas=3, rank=2))
    assert list(TokenBudgetBatchSampler(lengths, 10, num_replicas=1, rank=0)) == list(alone)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"lengths": [3, 8, 6, 8]},
            "lengths must be at most max_tokens, 7, got 8 at index 1: cut that sequence, or raise max_tokens",
        ),
        ({"lengths": [3, -2]}, "lengths must be at least 0, got -2 at index 1"),
        ({"lengths": [3.0]}, "lengths must be a one-dimensional sequence of int64 integers: got float at index 0"),
        ({"lengths": torch.ones(3)}, "lengths must have an integer dtype, got torch.float32"),
        ({"lengths": np.ones((3, 1), dtype=int)}, "lengths must be one-dimensional, got shape [3, 1]"),
        ({"lengths": {0: 3, 1: 4}}, "integers: got dict, a mapping, of which only the keys would be read"),
        ({"lengths": {3, 4}}, "integers: got set, which has no order and drops repeated numbers"),
        (
            {"lengths": torch.tensor([1, 2**63], dtype=torch.uint64)},
            f"must hold int64 integers, got {2**63} at index 1",
        ),
        ({"lengths": np.array([2**64 - 1], dtype=np.uint64)}, f"must hold int64 integers, got {2**64 - 1} at index 0"),
        ({"max_tokens": np.True_}, "max_tokens must be an int (not a tensor), got bool"),
        ({"max_tokens": torch.tensor(7)}, "max_tokens must be an int (not a tensor), got Tensor"),
        ({"max_tokens": 0}, "max_tokens must be in [1, inf), got 0"),
        ({"max_tokens": 7.0}, "max_tokens must be an int (not a tensor), got float"),
        ({"max_sequences": 0}, "max_sequences must be in [1, inf), got 0"),
        ({"num_replicas": 0}, "num_replicas must be in [1, inf), got 0"),
        ({"num_replicas": 2, "rank": 2}, "rank must be in [0, 2), got 2"),
        ({"rank": -1}, "rank must be in [0, inf), got -1"),
        ({"seed": -1}, "seed must be in [0, inf), got -1"),
    ],
)
def test_names_the_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TokenBudgetBatchSampler(**{"lengths": [1, 2], "max_tokens": 7, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "epoch must be in [0, inf), got -1"),
        ((0, -1), "first_batch must be in [0, inf), got -1"),
        ((0, 6), "first_batch must be in [0, 5], got 6"),
    ],
)
def test_set_epoch_names_the_bad_argument(arguments, message):
    sampler = TokenBudgetBatchSampler([1] * 10, 2)
    with pytest.raises(ValueError, match=re.escape(message)):
        sampler.set_epoch(*arguments)
    assert len(sampler) == 5
