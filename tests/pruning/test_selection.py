"""select_tokens against a stable sort in Python; what it refuses, opcheck and torch.compile."""

import math
import re
from fractions import Fraction

import pytest
import torch
import torch._dynamo.testing
from devices import every_device
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import RATIOS, assert_selects, exact_ceil, importance_batches, oracle, unprotected_lengths
from ragged import BATCHES, RaggedBatch

from stamp_kernels.common.budget import ceil_of_ratio, keep_ratio_to_q32
from stamp_kernels.ops.pruning.gather import gather_tokens
from stamp_kernels.ops.pruning.selection import select_tokens

RAGGED = BATCHES["ragged"]
RAGGED_PROTECT = torch.arange(RAGGED.total) % 5 == 0


@every_device
@settings(max_examples=100)
@given(sample=importance_batches(), ratio=RATIOS, min_keep=st.integers(0, 3))
def test_keeps_the_best_share_of_each_sequence(device, sample, ratio, min_keep):
    batch, importance, protect = sample
    selection = select_tokens(
        importance.to(device),
        batch.cu_seqlens.to(device),
        batch.max_seqlen,
        keep_ratio=float(ratio),
        min_keep=min_keep,
        protect=None if protect is None else protect.to(device),
    )
    budgets = [max(min_keep, exact_ceil(ratio, n)) for n in unprotected_lengths(batch, protect)]
    assert_selects(selection, batch, oracle(batch, importance, protect, budgets))


@pytest.mark.core
@every_device
@settings(max_examples=100)
@given(sample=importance_batches(), data=st.data(), min_keep=st.integers(0, 2), as_tensor=st.booleans())
def test_keeps_a_given_count_of_each_sequence(device, sample, data, min_keep, as_tensor):
    batch, importance, protect = sample
    if as_tensor:
        counts = data.draw(st.lists(st.integers(0, 15), min_size=batch.num_sequences, max_size=batch.num_sequences))
        keep_count = torch.tensor(counts, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])), device=device)
    else:
        keep_count = data.draw(st.integers(0, 15))
        counts = [keep_count] * batch.num_sequences
    selection = select_tokens(
        importance.to(device),
        batch.cu_seqlens.to(device),
        batch.max_seqlen,
        keep_count=keep_count,
        min_keep=min_keep,
        protect=None if protect is None else protect.to(device),
    )
    kept = oracle(batch, importance, protect, [max(min_keep, count) for count in counts])
    assert_selects(selection, batch, kept)


@given(sample=importance_batches(), ratio=RATIOS)
def test_budget_of_max_seqlen_is_common_to_all(sample, ratio):
    batch, importance, protect = sample
    max_seqlen = batch.max_seqlen + 4  # an upper bound, as a padded length is
    selection = select_tokens(
        importance, batch.cu_seqlens, max_seqlen, keep_ratio=float(ratio), protect=protect, budget="max_seqlen"
    )
    budget = max(1, exact_ceil(ratio, max_seqlen))
    assert_selects(selection, batch, oracle(batch, importance, protect, [budget] * batch.num_sequences))


@given(denominator=st.integers(1, 64), data=st.data())
def test_ceiling_is_exact_for_small_fractions(denominator, data):
    # The fixed point is off by at most 1.5 n / 2**32, which cannot carry a multiple of 1 / denominator over an integer.
    ratio = Fraction(data.draw(st.integers(0, denominator)), denominator)
    lengths = data.draw(st.lists(st.integers(0, 2**24), min_size=1))
    ratio_q32 = keep_ratio_to_q32(float(ratio))
    expected = [exact_ceil(ratio, n) for n in lengths]
    assert [ceil_of_ratio(ratio_q32, n) for n in lengths] == expected
    assert ceil_of_ratio(ratio_q32, torch.tensor(lengths)).tolist() == expected


def test_ceiling_holds_at_the_longest_sequence():
    longest = torch.tensor([2**31 - 1])
    assert ceil_of_ratio(keep_ratio_to_q32(1.0), longest).item() == 2**31 - 1
    assert ceil_of_ratio(keep_ratio_to_q32(0.0), longest).item() == 0


@pytest.mark.core
@pytest.mark.parametrize("name", BATCHES)
@every_device
def test_named_batches(device, name):
    batch = BATCHES[name]
    importance = torch.rand(batch.total)
    importance[batch.valid :] = math.inf  # tail rows are never chosen, however important
    selection = select_tokens(importance.to(device), batch.cu_seqlens.to(device), batch.max_seqlen, keep_ratio=0.5)
    kept = oracle(batch, importance, None, [max(1, exact_ceil(Fraction(1, 2), n)) for n in batch.lengths])
    assert_selects(selection, batch, kept)


@every_device
def test_many_sequences(device):
    lengths = tuple(torch.randint(0, 9, (5000,)).tolist())
    batch = RaggedBatch(lengths, tail=7)
    importance = torch.randint(0, 4, (batch.total,)).float()
    selection = select_tokens(importance.to(device), batch.cu_seqlens.to(device), batch.max_seqlen, keep_ratio=1 / 3)
    kept = oracle(batch, importance, None, [max(1, exact_ceil(Fraction(1, 3), n)) for n in lengths])
    assert_selects(selection, batch, kept)


@every_device
def test_strided_importance(device):
    batch = BATCHES["ragged"]
    importance = torch.rand(batch.total, 3, device=device)
    cu_seqlens = batch.cu_seqlens.to(device)
    selection = select_tokens(importance[:, 1], cu_seqlens, batch.max_seqlen, keep_count=2)
    expected = select_tokens(importance[:, 1].contiguous(), cu_seqlens, batch.max_seqlen, keep_count=2)
    assert torch.equal(selection.indices, expected.indices)


def test_importance_gets_no_gradient():
    batch = BATCHES["ragged"]
    importance = torch.rand(batch.total, requires_grad=True)
    selection = select_tokens(importance, batch.cu_seqlens, batch.max_seqlen, keep_ratio=0.5)
    assert not selection.indices.requires_grad
    assert not gather_tokens(torch.rand(batch.total, 2), selection).requires_grad


# The dispatcher and torch.compile


@pytest.mark.parametrize("name", ["ragged", "no_sequences"])
def test_opcheck(name):
    batch = BATCHES[name]
    importance, protect = torch.rand(batch.total), torch.rand(batch.total) < 0.2
    counts = torch.full((batch.num_sequences,), 2)
    for ratio_q32, count, keep_counts in ((2**31, None, None), (None, 3, None), (None, None, counts)):
        torch.library.opcheck(
            torch.ops.stamp.select_tokens.default,
            (importance, batch.cu_seqlens, batch.max_seqlen, ratio_q32, count, keep_counts, 1, protect, 1, batch.total),
        )


COMPILED_BUDGETS = [
    {"keep_ratio": 1 / 3},
    {"keep_ratio": 0.5, "budget": "max_seqlen"},
    {"keep_count": 3, "min_keep": 2},
    {"keep_ratio": 1 / 3, "protected": True},
    {"keep_ratio": 1 / 3, "protected": True, "num_protected": 5},
]


@pytest.mark.parametrize("budget", COMPILED_BUDGETS, ids=str)
def test_compiles_once_for_all_sizes(budget):
    budget = dict(budget)
    protected = budget.pop("protected", False)

    def prune(x, importance, cu_seqlens, max_seqlen, protect):
        selection = select_tokens(importance, cu_seqlens, max_seqlen, protect=protect if protected else None, **budget)
        values, positions = gather_tokens([x, torch.arange(x.shape[0])], selection)
        return values * 2, positions, selection

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prune, fullgraph=True, dynamic=True, backend=counter)
    compilations = None
    for lengths, tail in (((3, 4), 2), ((5, 0, 9, 21), 0), ((2, 2, 2, 2, 2, 80), 11), ((97,) * 4, 1)):
        batch = RaggedBatch(lengths, tail)
        importance = torch.rand(batch.total)
        protect = torch.arange(batch.total) % (batch.total // 4) == 1
        x, x_eager = (torch.ones(batch.total, 13, requires_grad=True) for _ in range(2))
        values, positions, selection = compiled(x, importance, batch.cu_seqlens, batch.max_seqlen, protect)
        values.sum().backward()
        expected = prune(x_eager, importance, batch.cu_seqlens, batch.max_seqlen, protect)
        expected[0].sum().backward()
        rows = expected[1].shape[0]
        assert torch.equal(positions[:rows], expected[1])
        assert torch.equal(selection.cu_seqlens, expected[2].cu_seqlens)
        assert torch.equal(values[:rows], expected[0])
        assert (values[rows:] == 0).all()
        assert torch.equal(x.grad, x_eager.grad)
        compilations = compilations or counter.frame_count
        assert counter.frame_count == compilations


# Refusals

T, B = 31, 6


@pytest.mark.core
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"importance": [1.0]}, "importance must be a tensor, got list"),
        ({"importance": torch.zeros(T, 1)}, f"importance must have shape [total], got [{T}, 1]"),
        ({"importance": torch.zeros(T, dtype=torch.int64)}, "importance must have dtype torch.float32, torch.float16"),
        ({"cu_seqlens": torch.zeros(2, 2)}, "cu_seqlens must have shape [batch + 1], got [2, 2]"),
        ({"cu_seqlens": torch.zeros(B + 1)}, "cu_seqlens must have dtype torch.int32, torch.int64, got torch.float32"),
        ({"cu_seqlens": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens must have batch + 1 >= 1 entries"),
        ({"max_seqlen": torch.tensor(3)}, "max_seqlen must be an int (not a tensor), got Tensor"),
        ({"max_seqlen": -1}, "max_seqlen must be in [0, inf), got -1"),
        ({"keep_ratio": None}, "exactly one of keep_ratio and keep_count must be given, got None and None"),
        ({"keep_count": 3}, "exactly one of keep_ratio and keep_count must be given, got 0.5 and 3"),
        ({"keep_ratio": 1.5}, "keep_ratio must be in [0.0, 1.0], got 1.5"),
        ({"keep_ratio": math.nan}, "keep_ratio must be in [0.0, 1.0], got nan"),
        ({"keep_ratio": torch.tensor(0.5)}, "keep_ratio must be a number (not a tensor), got Tensor"),
        ({"keep_ratio": None, "keep_count": -1}, "keep_count must be in [0, inf), got -1"),
        (
            {"keep_ratio": None, "keep_count": torch.ones(2, dtype=torch.int64)},
            f"keep_count must have shape [{B}], got [2]",
        ),
        ({"keep_ratio": None, "keep_count": torch.ones(B)}, "keep_count must have dtype torch.int32, torch.int64, got"),
        ({"min_keep": -1}, "min_keep must be in [0, inf), got -1"),
        ({"protect": torch.zeros(T)}, "protect must have dtype torch.bool, got torch.float32"),
        ({"protect": torch.zeros(2, dtype=torch.bool)}, f"protect must have shape [{T}], got [2]"),
        ({"total_kept": -1}, "total_kept must be in [0, inf), got -1"),
        ({"lengths_cpu": torch.zeros(2, dtype=torch.int64)}, f"lengths_cpu must have shape [{B}], got [2]"),
        ({"lengths_cpu": torch.zeros(B)}, "lengths_cpu must have dtype torch.int32, torch.int64, got torch.float32"),
        ({"num_protected": 3}, "num_protected goes with protect, which is None"),
        ({"protect": RAGGED_PROTECT, "num_protected": -2}, "num_protected must be in [0, inf), got -2"),
        ({"budget": "batch"}, "budget must be one of ('sequence', 'max_seqlen'), got 'batch'"),
        ({"keep_ratio": None, "keep_count": 2, "budget": "max_seqlen"}, 'budget="max_seqlen" goes with keep_ratio'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_names_the_bad_argument(arguments, message):
    good = {
        "importance": torch.zeros(T),
        "cu_seqlens": RAGGED.cu_seqlens,
        "max_seqlen": RAGGED.max_seqlen,
        "keep_ratio": 0.5,
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        select_tokens(**{**good, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": torch.tensor([1, 5], dtype=torch.int32)}, "cu_seqlens[0] must be 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 5, 3], dtype=torch.int32)}, "cu_seqlens must never decrease, got 5 then 3"),
        ({"cu_seqlens": torch.tensor([0, T + 1], dtype=torch.int32)}, "must be at most the number of rows 31, got 32"),
        ({"max_seqlen": 12}, "sequence 3 has length 13, more than the given max_seqlen 12"),
        ({"lengths_cpu": torch.ones(B, dtype=torch.int64)}, "lengths_cpu must be the lengths that cu_seqlens gives"),
        ({"total_kept": 3}, "total_kept is 3, but the sequences keep"),
        (
            {"keep_ratio": None, "keep_count": torch.tensor([1, 1, 1, -4, 1, 1])},
            "keep_count must not be negative, got -4",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_reports_bad_contents(arguments, message):
    good = {"cu_seqlens": RAGGED.cu_seqlens, "max_seqlen": 40, "keep_ratio": 0.5}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        select_tokens(torch.zeros(T), **{**good, **arguments})


@pytest.mark.parametrize("num_protected", [1, torch.tensor([0, 0])])
def test_num_protected_must_be_what_protect_marks(num_protected):
    protect = torch.tensor([True, True, False, False, False])
    cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="num_protected must be the tokens that protect marks in the sequences"):
        select_tokens(torch.rand(5), cu_seqlens, 3, keep_ratio=0.5, protect=protect, num_protected=num_protected)


@pytest.mark.parametrize("name", ["keep_count", "min_keep", "total_kept"])
def test_counts_must_be_ints(name):
    arguments = {"keep_count": 1} | {name: 2.5}
    with pytest.raises(ValueError, match=rf"{name} must be an int \(not a tensor\), got float"):
        select_tokens(torch.rand(3), torch.tensor([0, 3], dtype=torch.int32), 3, **arguments)


@pytest.mark.gpu
def test_devices_must_agree():
    with pytest.raises(ValueError, match="cu_seqlens must be on cuda:0, got cpu"):
        select_tokens(torch.zeros(T, device="cuda"), RAGGED.cu_seqlens, 13, keep_ratio=0.5)
