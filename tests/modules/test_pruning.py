"""SemanticAdaptivePruning against a loop over the sequences, and against pruning of padded rows."""

import dataclasses
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import BATCHES, RaggedBatch, ragged_batches
from torch import Tensor

import stamp_kernels.ops.pruning.budget as budget_ops
from stamp_kernels.modules.pruning import SemanticAdaptivePruning
from stamp_kernels.ops.pruning.gather import gather_tokens
from stamp_kernels.packed import PackedBatch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
THIRD = 1 / 3


def packed_of(batch: RaggedBatch, width: int = 6, **fields) -> PackedBatch:
    """Hidden states with NaN in the tail rows, which must not reach any result."""
    hidden = torch.randn(batch.total, width)
    hidden[batch.valid :] = math.nan
    return PackedBatch(hidden, batch.cu_seqlens, batch.max_seqlen, **fields)


def kept_rows(
    batch: RaggedBatch,
    hidden: Tensor,
    centrality: Tensor,
    *,
    ratio: Fraction = Fraction(1, 3),
    min_keep: int = 1,
    codes_per_item: int = 1,
    protect: Tensor | None = None,
    norm: int = 1,
    per_visible_query: bool = False,
) -> list[list[int]]:
    """The rows that each sequence keeps."""
    kept = []
    for rows in batch.slices():
        importance = hidden[rows].norm(norm, dim=1) * centrality[rows]
        if per_visible_query:
            n = rows.stop - rows.start
            importance = importance / torch.arange(n, 0, -1)
        items = range(len(importance) // codes_per_item)
        tokens = {item: list(range(item * codes_per_item, (item + 1) * codes_per_item)) for item in items}
        importance_of = {item: sum(importance[token].item() for token in tokens[item]) for item in items}
        always = [
            item for item in items if protect is not None and any(protect[rows.start + token] for token in tokens[item])
        ]
        others = sorted(set(items) - set(always), key=lambda item: (-importance_of[item], item))
        budget = max(min_keep, math.ceil(ratio * len(others)))
        kept.append([rows.start + token for item in sorted(always + others[:budget]) for token in tokens[item]])
    return kept


def assert_pruned(pruned: PackedBatch, source: PackedBatch, kept: list[list[int]]) -> None:
    rows = torch.tensor([row for sequence in kept for row in sequence], dtype=torch.int64)
    lengths = [len(sequence) for sequence in kept]
    assert torch.equal(pruned.values[: len(rows)], source.values[rows])
    assert (pruned.values[len(rows) :] == 0).all()
    assert pruned.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert max(lengths, default=0) <= pruned.max_seqlen <= source.max_seqlen
    if pruned.positions is not None:
        assert torch.equal(pruned.positions[: len(rows)], source.materialized_positions()[rows])
    if pruned.lengths_cpu is not None:
        assert pruned.lengths_cpu.tolist() == lengths


@settings(max_examples=60)
@given(
    batch=ragged_batches(),
    ratio=st.sampled_from([Fraction(0), Fraction(1, 3), Fraction(1, 2), Fraction(1)]),
    min_keep=st.integers(0, 2),
    with_positions=st.booleans(),
    with_lengths=st.booleans(),
    protecting=st.booleans(),
)
def test_prunes_like_a_loop_over_the_sequences(batch, ratio, min_keep, with_positions, with_lengths, protecting):
    packed = packed_of(
        batch,
        positions=batch.positions() if with_positions else None,
        lengths_cpu=torch.tensor(batch.lengths, dtype=torch.int64) if with_lengths else None,
    )
    centrality = torch.rand(batch.total)
    protect = torch.rand(batch.total) < 0.3 if protecting else None
    prune = SemanticAdaptivePruning(float(ratio), min_keep=min_keep)
    pruned, selection, _ = prune(packed, centrality, protect=protect)
    kept = kept_rows(batch, packed.values, centrality, ratio=ratio, min_keep=min_keep, protect=protect)
    assert_pruned(pruned, packed, kept)
    assert selection.indices.tolist() == [row for sequence in kept for row in sequence]
    assert pruned.positions is not None
    assert pruned.lengths_cpu is not None


@settings(max_examples=60)
@given(
    items=ragged_batches(max_length=5),
    codes_per_item=st.integers(1, 4),
    tail=st.integers(0, 6),
    min_keep=st.integers(0, 2),
    with_lengths=st.booleans(),
    protecting=st.booleans(),
)
def test_whole_items_are_kept_or_dropped(items, codes_per_item, tail, min_keep, with_lengths, protecting):
    batch = RaggedBatch(tuple(n * codes_per_item for n in items.lengths), tail)
    packed = packed_of(batch, lengths_cpu=torch.tensor(batch.lengths, dtype=torch.int64) if with_lengths else None)
    centrality = torch.rand(batch.total)
    protect = torch.rand(batch.total) < 0.1 if protecting else None
    prune = SemanticAdaptivePruning(THIRD, codes_per_item=codes_per_item, min_keep=min_keep)
    pruned, selection, _ = prune(packed, centrality, protect=protect)
    kept = kept_rows(
        batch, packed.values, centrality, min_keep=min_keep, codes_per_item=codes_per_item, protect=protect
    )
    assert_pruned(pruned, packed, kept)
    assert selection.indices.tolist() == [row for sequence in kept for row in sequence]
    inverse = {row: kept_row for kept_row, row in enumerate(selection.indices.tolist())}
    assert selection.inverse.tolist() == [inverse.get(row, -1) for row in range(batch.total)]
    assert selection.total_source == batch.total


@pytest.mark.parametrize("normalize", ["none", "visible_queries"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("device", DEVICES)
def test_norm_and_normalize_reach_the_importance(device, norm, normalize):
    batch = BATCHES["long_among_short"]
    packed, centrality = packed_of(batch), torch.rand(batch.total)
    prune = SemanticAdaptivePruning(THIRD, norm=norm, normalize=normalize)
    pruned, *_ = prune(packed.to(device), centrality.to(device))
    kept = kept_rows(
        batch,
        packed.values,
        centrality,
        norm={"l1": 1, "l2": 2}[norm],
        per_visible_query=normalize == "visible_queries",
    )
    assert_pruned(pruned.to("cpu"), packed, kept)


@pytest.mark.core
def test_full_rows_prune_like_padded_rows():
    """Without padding, the padded arithmetic of earlier implementations keeps the same tokens."""
    batch_size, length = 5, 12
    hidden = torch.randn(batch_size, length, 8)
    attention = torch.randn(batch_size, 3, length, length).softmax(-1)  # [B, H, query, key]
    importance = attention.sum((1, 2)) * hidden.abs().sum(-1)
    keep = importance.topk(length // 3, dim=1).indices.sort(dim=1).values
    expected = hidden.gather(1, keep.unsqueeze(2).expand(-1, -1, 8))

    packed = PackedBatch.from_padded(hidden, torch.ones(batch_size, length, dtype=torch.bool))
    pruned, *_ = SemanticAdaptivePruning(THIRD)(packed, attention.sum((1, 2)).flatten())
    assert torch.equal(pruned.to_padded(), expected)
    assert torch.equal(pruned.positions.view(batch_size, -1), keep.int())


def test_compact_positions_count_the_kept_tokens():
    batch = BATCHES["ragged"]
    packed = packed_of(batch, positions=batch.positions())
    pruned, *_ = SemanticAdaptivePruning(0.5, positions="compact")(packed, torch.rand(batch.total))
    assert pruned.positions is None
    assert pruned.materialized_positions().tolist() == [i for n in batch.lengths for i in range(math.ceil(n / 2))]


@pytest.mark.core
def test_original_positions_survive_two_prunings():
    batch = RaggedBatch((16, 8), tail=0)
    packed = PackedBatch(torch.arange(24.0).unsqueeze(1), batch.cu_seqlens, 16)  # every value is its own row
    prune = SemanticAdaptivePruning(0.5)
    once, *_ = prune(packed, torch.rand(24))
    twice, *_ = prune(once, torch.rand(12))
    starts = torch.tensor([0.0] * 4 + [16.0] * 2)
    assert twice.cu_seqlens.tolist() == [0, 4, 6]
    assert torch.equal(twice.positions, (twice.values[:, 0] - starts).int())


def test_evaluation_prunes_where_asked():
    batch = BATCHES["ragged"]
    packed, centrality = packed_of(batch), torch.rand(batch.total)
    training_only = SemanticAdaptivePruning(0.5, prune_in_eval=False)
    assert training_only(packed, centrality).selection is not None
    result = training_only.eval()(packed, centrality)
    assert result.packed is packed
    assert result.selection is None and result.targets is None
    assert SemanticAdaptivePruning(0.5).eval()(packed, centrality).selection is not None


@pytest.mark.core
def test_gradient_reaches_only_kept_tokens():
    batch = BATCHES["ragged"]
    packed = packed_of(batch)
    hidden = packed.values.requires_grad_()
    centrality = torch.rand(batch.total, requires_grad=True)
    pruned, selection, _ = SemanticAdaptivePruning(THIRD)(packed, centrality)
    weight = torch.randn_like(pruned.values)
    pruned.values.backward(weight)
    expected = torch.zeros_like(hidden).index_copy(0, selection.indices, weight)
    assert torch.equal(hidden.grad, expected)
    assert centrality.grad is None


@pytest.mark.parametrize("shape", [(), (2,)])
def test_targets_follow_their_tokens(monkeypatch, shape):
    batch = BATCHES["ragged"]
    packed, centrality = packed_of(batch), torch.rand(batch.total)
    targets = torch.randint(9, (batch.total, *shape))
    prune = SemanticAdaptivePruning(THIRD, prune_in_eval=False)
    exact = prune(packed, centrality, targets=targets)
    rows = torch.tensor([row for kept in kept_rows(batch, packed.values, centrality) for row in kept])
    assert torch.equal(exact.targets, targets[rows])
    monkeypatch.setattr(budget_ops, "sizes_are_on_host", lambda cu_seqlens: False)
    roomy = prune(packed, centrality, targets=targets, ignore_index=-1)
    assert torch.equal(roomy.targets[: len(rows)], targets[rows])
    assert len(roomy.targets) > len(rows) and (roomy.targets[len(rows) :] == -1).all()


def test_selection_gathers_what_belongs_to_the_tokens():
    batch = BATCHES["ragged"]
    packed = packed_of(batch)
    labels = torch.arange(batch.total)
    pruned, selection, _ = SemanticAdaptivePruning(THIRD)(packed, torch.rand(batch.total))
    assert torch.equal(packed.values[gather_tokens(labels, selection)], pruned.values)


def test_pruning_is_one_op():
    batch = BATCHES["ragged"]
    packed, centrality = packed_of(batch), torch.rand(batch.total)
    with torch.profiler.profile() as profile:
        SemanticAdaptivePruning(THIRD)(packed, centrality, targets=torch.arange(batch.total))
    ops = [event.name for event in profile.events() if event.name.startswith("stamp::")]
    assert ops == ["stamp::prune"]


# Lengths that only the device knows


@pytest.mark.parametrize("codes_per_item", [None, 4])
def test_capacity_if_only_the_device_knows_the_lengths(monkeypatch, codes_per_item):
    monkeypatch.setattr(budget_ops, "sizes_are_on_host", lambda cu_seqlens: False)
    batch = RaggedBatch((12, 0, 4, 28), tail=6)
    packed, centrality = packed_of(batch), torch.rand(batch.total)
    prune = SemanticAdaptivePruning(THIRD, codes_per_item=codes_per_item)
    pruned, selection, _ = prune(packed, centrality)
    kept = kept_rows(batch, packed.values, centrality, codes_per_item=codes_per_item or 1)
    assert_pruned(pruned, packed, kept)
    num_kept = sum(map(len, kept))
    # T = 50 tokens are 12 items and a remainder
    assert selection.indices.shape[0] == (50 // 3 + 4 if codes_per_item is None else 4 * (12 // 3 + 4))
    assert selection.indices[num_kept:].eq(-1).all()

    protect = torch.zeros(batch.total, dtype=torch.bool)
    protect[5] = True
    assert prune(packed, centrality, protect=protect).packed.values.shape[0] == (50 if codes_per_item is None else 48)
    known = prune(packed, centrality, protect=protect, num_protected=1).packed
    assert known.values.shape[0] == selection.indices.shape[0] + (codes_per_item or 1)


def test_lengths_cpu_with_num_protected_on_the_cpu():
    batch = BATCHES["ragged"]
    packed = packed_of(batch, lengths_cpu=torch.tensor(batch.lengths))
    protect = torch.arange(batch.total) % 4 == 0
    num_protected = torch.tensor([int(protect[rows].sum()) for rows in batch.slices()])
    pruned, *_ = SemanticAdaptivePruning(THIRD)(
        packed, torch.rand(batch.total), protect=protect, num_protected=num_protected
    )
    assert torch.equal(pruned.lengths_cpu, pruned.cu_seqlens.diff().long())


@pytest.mark.gpu
@pytest.mark.parametrize("codes_per_item", [None, 4])
def test_never_syncs(codes_per_item):
    batch = RaggedBatch((12, 0, 4, 28), tail=6)
    lengths_cpu = torch.tensor(batch.lengths)
    source = packed_of(batch, lengths_cpu=lengths_cpu)
    packed, centrality = source.to("cuda"), torch.rand(batch.total)
    on_device = centrality.cuda()
    prune = SemanticAdaptivePruning(THIRD, codes_per_item=codes_per_item)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pruned, *_ = prune(packed, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    kept = kept_rows(batch, source.values, centrality, codes_per_item=codes_per_item or 1)
    assert pruned.values.shape[0] == sum(map(len, kept))
    assert_pruned(pruned.to("cpu"), source, kept)


@pytest.mark.parametrize("codes_per_item", [None, 4])
def test_compiles_once_for_all_sizes(codes_per_item):
    prune = SemanticAdaptivePruning(THIRD, codes_per_item=codes_per_item)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prune, fullgraph=True, dynamic=True, backend=counter)
    compilations = None
    for lengths, tail in (((8, 4), 3), ((20, 0, 16), 2), ((12, 12, 12, 80), 9)):
        batch = RaggedBatch(lengths, tail)
        packed, centrality = packed_of(batch, 24), torch.rand(batch.total)
        hidden = packed.values.requires_grad_()
        pruned, *_ = compiled(packed, centrality)
        kept = kept_rows(batch, packed.values, centrality, codes_per_item=codes_per_item or 1)
        assert_pruned(pruned, packed, kept)
        pruned.values.sum().backward()
        assert hidden.grad.sum() == 24 * sum(map(len, kept))
        compilations = compilations or counter.frame_count
        assert counter.frame_count == compilations


# Budgets of the padded length


@pytest.mark.parametrize("protecting", [False, True])
@pytest.mark.parametrize("codes_per_item", [None, 4])
def test_padded_budget_needs_no_lengths(monkeypatch, protecting, codes_per_item):
    """Two prunings of a padded length of 40: of 40, 20, 10 columns, also if the CPU does not know the lengths."""
    batch = RaggedBatch((12, 0, 4, 28), tail=4)
    packed = PackedBatch(torch.rand(batch.total, 6), batch.cu_seqlens, 40)
    protect = torch.zeros(batch.total, dtype=torch.bool) if protecting else None
    prune = SemanticAdaptivePruning(0.5, budget="max_seqlen", codes_per_item=codes_per_item)
    results = []
    for sizes_are_on_host in (True, False):
        monkeypatch.setattr(budget_ops, "sizes_are_on_host", lambda _, known=sizes_are_on_host: known)
        once = prune(packed, packed.values[:, 0], protect=protect).packed
        twice = prune(once, once.values[:, 0]).packed
        results.append((once.cu_seqlens.diff().tolist(), twice.cu_seqlens.diff().tolist(), twice.max_seqlen))
    kept_of_20 = [min(n, 20) for n in batch.lengths]
    assert (
        results[0]
        == results[1]
        == (
            (kept_of_20, kept_of_20, 20)
            if protecting
            else (
                kept_of_20,
                [min(n, 12 if codes_per_item else 10) for n in batch.lengths],
                12 if codes_per_item else 10,
            )
        )
    )


# Protected ends


def kept_between_ends(
    batch: RaggedBatch,
    importance: Tensor,
    first: int,
    last: int,
    codes_per_item: int,
    *,
    ratio: Fraction = Fraction(1, 3),
    min_keep: int = 1,
    columns: int | None = None,
) -> list[list[int]]:
    """The rows that each sequence keeps; `columns` is the padded length if it decides the budget."""
    kept = []
    for rows in batch.slices():
        tokens = list(range(rows.start, rows.stop))
        if len(tokens) <= first + last:
            kept.append(tokens)
            continue
        middle = tokens[first : len(tokens) - last]
        items = [middle[i : i + codes_per_item] for i in range(0, len(middle), codes_per_item)]
        of = len(items) if columns is None else columns // codes_per_item
        items.sort(key=lambda item: -sum(importance[token].item() for token in item))  # stable: ties by place
        best = [token for item in items[: max(min_keep, math.ceil(ratio * of))] for token in item]
        kept.append(sorted(tokens[:first] + best + tokens[len(tokens) - last :]))
    return kept


@settings(max_examples=100)
@given(
    items=ragged_batches(max_length=6),
    codes_per_item=st.integers(1, 5),
    first=st.integers(0, 6),
    last=st.integers(0, 6),
    tail=st.integers(0, 6),
    min_keep=st.integers(0, 2),
    lengths_known=st.sampled_from(["lengths_cpu", "on_host", "never"]),
    budget=st.sampled_from(["sequence", "max_seqlen"]),
    with_targets=st.booleans(),
)
def test_whole_items_between_protected_ends(
    items, codes_per_item, first, last, tail, min_keep, lengths_known, budget, with_targets
):
    """Sequences of 0 and 1 items are that many tokens, which the ends may be longer than."""
    ends = first + last
    lengths = tuple(n if 0 < ends >= n < 2 else ends + codes_per_item * n for n in items.lengths)
    batch = RaggedBatch(lengths, tail)
    packed = packed_of(
        batch, lengths_cpu=torch.tensor(lengths, dtype=torch.int64) if lengths_known == "lengths_cpu" else None
    )
    packed = dataclasses.replace(packed, max_seqlen=batch.max_seqlen + 3)
    centrality, targets = torch.rand(batch.total), torch.randint(9, (batch.total,))
    prune = SemanticAdaptivePruning(
        THIRD,
        codes_per_item=codes_per_item,
        min_keep=min_keep,
        budget=budget,
        protect_first=first,
        protect_last=last,
    )
    with pytest.MonkeyPatch.context() as patch:
        if lengths_known != "on_host":
            patch.setattr(budget_ops, "sizes_are_on_host", lambda cu_seqlens: False)
        pruned, selection, kept_targets = prune(packed, centrality, targets=targets if with_targets else None)
    columns = packed.max_seqlen if budget == "max_seqlen" else None
    importance = packed.values.abs().sum(1) * centrality
    kept = kept_between_ends(batch, importance, first, last, codes_per_item, min_keep=min_keep, columns=columns)
    assert_pruned(pruned, packed, kept)
    rows = [row for sequence in kept for row in sequence]
    inverse = {row: kept_row for kept_row, row in enumerate(rows)}
    assert selection.inverse.tolist() == [inverse.get(row, -1) for row in range(batch.total)]
    if with_targets:
        assert kept_targets[: len(rows)].tolist() == targets[rows].tolist()
        assert (kept_targets[len(rows) :] == -100).all()
    if lengths_known == "lengths_cpu":
        assert pruned.values.shape[0] == len(rows) and pruned.lengths_cpu is not None
    longest = ends + codes_per_item * max(
        min_keep, math.ceil(Fraction(1, 3) * ((packed.max_seqlen - (0 if columns else ends)) // codes_per_item))
    )
    assert pruned.max_seqlen <= min(packed.max_seqlen, longest)
    assert budget == "sequence" or pruned.max_seqlen == min(packed.max_seqlen, longest)


def test_capacity_of_protected_ends(monkeypatch):
    """Without known lengths: a third of 51 tokens in items, one more item and both ends for each of 3 sequences."""
    monkeypatch.setattr(budget_ops, "sizes_are_on_host", lambda cu_seqlens: False)
    batch = RaggedBatch((2, 34, 10), tail=5)
    for codes_per_item, capacity in ((4, 4 * (12 // 3 + 3) + 3 * 2), (1, 51 // 3 + 3 + 3 * 2)):
        prune = SemanticAdaptivePruning(THIRD, codes_per_item=codes_per_item, protect_first=1, protect_last=1)
        assert prune(packed_of(batch), torch.rand(51)).packed.values.shape[0] == capacity


def test_protected_ends_survive_two_prunings():
    batch = RaggedBatch((2 + 4 * 8, 1, 2 + 4 * 3), tail=3)
    prune = SemanticAdaptivePruning(0.5, codes_per_item=4, protect_first=1, protect_last=1)
    packed = packed_of(batch)
    once, *_ = prune(packed, torch.rand(batch.total))
    twice, *_ = prune(once, torch.rand(once.values.shape[0]))
    assert twice.cu_seqlens.diff().tolist() == [2 + 4 * 2, 1, 2 + 4 * 1]
    for b, rows in enumerate(batch.slices()):
        positions = twice.positions[twice.cu_seqlens[b] : twice.cu_seqlens[b + 1]].tolist()
        assert positions[0] == 0 and positions[-1] == rows.stop - rows.start - 1
        items = [positions[i : i + 4] for i in range(1, len(positions) - 1, 4)]
        assert all(item == list(range(item[0], item[0] + 4)) and item[0] % 4 == 1 for item in items)


@pytest.mark.gpu
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("budget", ["sequence", "max_seqlen"])
@pytest.mark.parametrize("codes_per_item", [None, 4])
def test_protected_ends_never_sync(codes_per_item, budget, with_lengths):
    batch = RaggedBatch((14, 0, 1, 6, 30), tail=6)
    source = packed_of(batch, lengths_cpu=torch.tensor(batch.lengths) if with_lengths else None)
    packed, centrality = source.to("cuda"), torch.rand(batch.total)
    on_device = centrality.cuda()
    prune = SemanticAdaptivePruning(
        THIRD, codes_per_item=codes_per_item, budget=budget, protect_first=1, protect_last=1
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        pruned, *_ = prune(packed, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    columns = batch.max_seqlen if budget == "max_seqlen" else None
    importance = source.values.abs().sum(1) * centrality
    kept = kept_between_ends(batch, importance, 1, 1, codes_per_item or 1, columns=columns)
    assert_pruned(pruned.to("cpu"), source, kept)


@pytest.mark.parametrize("budget", ["sequence", "max_seqlen"])
@pytest.mark.parametrize("codes_per_item", [None, 4])
def test_protected_ends_compile_once_for_all_sizes(codes_per_item, budget):
    prune = SemanticAdaptivePruning(
        THIRD, codes_per_item=codes_per_item, budget=budget, protect_first=1, protect_last=1
    )
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(prune, fullgraph=True, dynamic=True, backend=counter)
    compilations = None
    for lengths, tail in (((10, 6), 3), ((22, 0, 18), 2), ((14, 14, 1, 82), 8)):
        batch = RaggedBatch(lengths, tail)
        packed = packed_of(batch, 24, lengths_cpu=torch.tensor(lengths))
        centrality = torch.rand(batch.total)
        hidden = packed.values.requires_grad_()
        pruned, *_ = compiled(packed, centrality)
        columns = batch.max_seqlen if budget == "max_seqlen" else None
        importance = packed.values.abs().sum(1) * centrality
        kept = kept_between_ends(batch, importance, 1, 1, codes_per_item or 1, columns=columns)
        assert_pruned(pruned, packed, kept)
        pruned.values.sum().backward()
        assert hidden.grad.sum() == 24 * sum(map(len, kept))
        compilations = compilations or counter.frame_count
        assert counter.frame_count == compilations


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_ratio": 1.1}, "keep_ratio must be in [0.0, 1.0], got 1.1"),
        ({"norm": "l0"}, "norm must be one of ('l1', 'l2'), got 'l0'"),
        ({"positions": "none"}, "positions must be one of ('original', 'compact'), got 'none'"),
        ({"normalize": "mean"}, "normalize must be one of ('none', 'visible_queries'), got 'mean'"),
        ({"min_keep": -1}, "min_keep must be in [0, inf), got -1"),
        ({"budget": "batch"}, "budget must be one of ('sequence', 'max_seqlen'), got 'batch'"),
        ({"codes_per_item": 0}, "codes_per_item must be in [1, inf), got 0"),
        ({"keep_ratio": "1/3"}, "keep_ratio must be a number (not a tensor), got str"),
        ({"keep_ratio": None}, "keep_ratio must be a number (not a tensor), got NoneType"),
        ({"min_keep": 1.5}, "min_keep must be an int (not a tensor), got float"),
        ({"protect_first": -1}, "protect_first must be in [0, inf), got -1"),
        ({"protect_last": 1.5}, "protect_last must be an int (not a tensor), got float"),
    ],
)
def test_names_the_bad_argument(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SemanticAdaptivePruning(**{"keep_ratio": 0.5, **arguments})


def test_numpy_numbers_count_as_numbers():
    prune = SemanticAdaptivePruning(np.float32(0.5), min_keep=np.int64(2), codes_per_item=np.int32(4))
    assert repr(prune) == repr(SemanticAdaptivePruning(0.5, min_keep=2, codes_per_item=4))


def test_names_the_bad_input():
    batch = BATCHES["ragged"]
    packed, centrality = packed_of(batch), torch.rand(batch.total)
    prune = SemanticAdaptivePruning(0.5)
    with pytest.raises(ValueError, match=re.escape(f"centrality must have shape [{batch.total}], got [3]")):
        prune(packed, torch.rand(3))
    for targets, message in (
        (torch.zeros(3, dtype=torch.int64), f"targets must have a row for each of the {batch.total} rows of packed"),
        (torch.tensor(1), "rows of packed, got shape []"),
        (torch.zeros(batch.total), "targets must have dtype torch.int64, got torch.float32"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            prune(packed, centrality, targets=targets)
    with pytest.raises(ValueError, match=r"ignore_index must be an int \(not a tensor\), got str"):
        prune(packed, centrality, targets=torch.arange(batch.total), ignore_index="-100")
    for wrong in (None, packed.values):
        with pytest.raises(ValueError, match=f"packed must be a PackedBatch, got {type(wrong).__name__}"):
            prune(wrong, centrality)
    by_item = SemanticAdaptivePruning(0.5, codes_per_item=3)
    for pruning in (prune, by_item):
        with pytest.raises(ValueError, match=re.escape(f"protect must have shape [{batch.total}], got [99]")):
            pruning(packed, centrality, protect=torch.zeros(99, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"whole items of codes_per_item 3 tokens, got a sequence of 5"):
        by_item(packed, centrality)
    between_ends = SemanticAdaptivePruning(0.5, codes_per_item=3, protect_first=1, protect_last=1)
    message = (
        r"between protect_first 1 and protect_last 1 must be whole items of codes_per_item 3 tokens, "
        r"got 11 of the 13 tokens of sequence 3"
    )
    with pytest.raises(RuntimeError, match=message):
        between_ends(packed, centrality)
    with pytest.raises(ValueError, match="protect goes with protect_first=0 and protect_last=0, got both"):
        between_ends(packed, centrality, protect=torch.zeros(batch.total, dtype=torch.bool))
    falling = dataclasses.replace(packed, cu_seqlens=torch.tensor([0, 8, 5], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="cu_seqlens must never decrease, got 8 then 5"):
        between_ends(falling, centrality)


def test_repr_names_the_settings():
    assert repr(SemanticAdaptivePruning(0.5, codes_per_item=4)) == (
        "SemanticAdaptivePruning(keep_ratio=0.5, norm=l1, positions=original, normalize=none, prune_in_eval=True, "
        "min_keep=1, codes_per_item=4, budget=sequence, protect_first=0, protect_last=0)"
    )
