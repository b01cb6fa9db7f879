"""How many rows select_tokens returns: exact where the lengths are known on the CPU, else a capacity that suffices."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_cases import assert_selects, exact_ceil, importance_batches, oracle
from ragged import BATCHES, RaggedBatch

import stamp_kernels.ops.pruning.budget as budget_ops
from stamp_kernels.ops.pruning.selection import select_tokens


@pytest.fixture
def lengths_only_on_device(monkeypatch):
    """As if cu_seqlens were on a GPU: the kept lengths are not known on the CPU."""
    monkeypatch.setattr(budget_ops, "sizes_are_on_host", lambda cu_seqlens: False)


RAGGED = BATCHES["ragged"]
RAGGED_PROTECT = torch.arange(RAGGED.total) % 5 == 0


@pytest.mark.core
def test_sizes_are_exact_for_known_lengths():
    selection = select_tokens(torch.rand(RAGGED.total), RAGGED.cu_seqlens, 100, keep_ratio=0.5)
    assert selection.indices.shape[0] == selection.cu_seqlens[-1] == sum(math.ceil(n / 2) for n in RAGGED.lengths)
    assert selection.max_seqlen == math.ceil(max(RAGGED.lengths) / 2)


@pytest.mark.core
@pytest.mark.parametrize(
    ("arguments", "rows", "max_seqlen"),
    [
        # T = 31 rows, B = 6 sequences of at most 13 tokens
        ({"keep_ratio": 1 / 3}, 10 + 6, 5),
        ({"keep_ratio": 1 / 3, "min_keep": 0}, 10 + 6, 5),
        ({"keep_ratio": 1 / 3, "min_keep": 3}, 10 + 6 * 3, 5),
        ({"keep_ratio": 0.5, "budget": "max_seqlen"}, 31, 7),
        ({"keep_count": 2}, 6 * 2, 2),
        ({"keep_count": 2, "min_keep": 4}, 6 * 4, 4),
        ({"keep_count": 20}, 31, 13),
        ({"keep_count": torch.full((6,), 2)}, 31, 13),
        ({"keep_ratio": 1 / 3, "protect": RAGGED_PROTECT}, 31, 13),
        ({"keep_ratio": 1 / 3, "protect": RAGGED_PROTECT, "num_protected": 7}, 10 + 6 + 7, 5 + 7),
        ({"keep_count": 1, "protect": RAGGED_PROTECT, "num_protected": 7}, 6 + 7, 1 + 7),
        ({"keep_ratio": 1 / 3, "total_kept": 14}, 14, 5),
    ],
)
def test_capacity_for_lengths_on_the_device(lengths_only_on_device, arguments, rows, max_seqlen):
    importance = torch.rand(RAGGED.total)
    selection = select_tokens(importance, RAGGED.cu_seqlens, RAGGED.max_seqlen, **arguments)
    assert selection.indices.shape[0] == rows
    assert selection.max_seqlen == max_seqlen
    if "keep_count" not in arguments and "budget" not in arguments and "protect" not in arguments:
        budgets = [max(arguments.get("min_keep", 1), exact_ceil(Fraction(1, 3), n)) for n in RAGGED.lengths]
        assert_selects(selection, RAGGED, oracle(RAGGED, importance, None, budgets))


@pytest.mark.parametrize("codes_per_item", [1, 4])
@pytest.mark.parametrize("protecting", [False, True])
@pytest.mark.parametrize("budget", [{"keep_ratio": 1 / 3}, {"keep_count": 2}], ids=str)
def test_sizes_are_exact_with_lengths_cpu(lengths_only_on_device, codes_per_item, protecting, budget):
    batch = RaggedBatch((12, 0, 4, 28, 8), tail=5)
    importance = torch.rand(batch.total)
    protect = torch.arange(batch.total) % 11 == 0 if protecting else None
    items = [range(rows.start, rows.stop, codes_per_item) for rows in batch.slices()]
    protected = [sum(bool(protecting and protect[i : i + codes_per_item].any()) for i in starts) for starts in items]
    selection = select_tokens(
        importance, batch.cu_seqlens, batch.max_seqlen, **budget, codes_per_item=codes_per_item, protect=protect,
        lengths_cpu=torch.tensor(batch.lengths), num_protected=torch.tensor(protected) if protecting else None,
    )  # fmt: skip
    kept = []
    for starts, always in zip(items, protected, strict=True):
        n = len(starts) - always
        kept.append(codes_per_item * (always + min(n, max(1, budget.get("keep_count", math.ceil(n / 3))))))
    assert selection.cu_seqlens.diff().tolist() == kept
    assert selection.indices.shape[0] == sum(kept)
    assert selection.max_seqlen == max(kept)


def test_known_lengths_are_checked(lengths_only_on_device):
    importance, lengths_cpu = torch.rand(RAGGED.total), torch.tensor(RAGGED.lengths)
    arguments = dict(keep_ratio=0.5, lengths_cpu=lengths_cpu)
    with pytest.raises(RuntimeError, match="lengths_cpu has a length 13, more than max_seqlen 12"):
        select_tokens(importance, RAGGED.cu_seqlens, 12, **arguments)
    with pytest.raises(RuntimeError, match="total_kept is 3, but the sequences keep 16 tokens"):
        select_tokens(importance, RAGGED.cu_seqlens, 13, **arguments, total_kept=3)


def test_capacity_never_exceeds_the_input(lengths_only_on_device):
    cu_seqlens = torch.arange(0, 201, 2, dtype=torch.int32)
    selection = select_tokens(torch.rand(200), cu_seqlens, 2, keep_ratio=1.0, min_keep=3)
    assert selection.indices.shape[0] == 200


@settings(max_examples=100)
@given(sample=importance_batches(), ratio=st.floats(0, 1), min_keep=st.integers(0, 3))
def test_capacity_always_suffices(sample, ratio, min_keep):
    batch, importance, protect = sample
    num_protected = None if protect is None else int(protect.sum())
    arguments = {"keep_ratio": ratio, "min_keep": min_keep, "protect": protect, "num_protected": num_protected}
    exact = select_tokens(importance, batch.cu_seqlens, batch.max_seqlen, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget_ops, "sizes_are_on_host", lambda cu_seqlens: False)
        roomy = select_tokens(importance, batch.cu_seqlens, batch.max_seqlen, **arguments)
    rows = exact.indices.shape[0]
    assert roomy.indices[:rows].tolist() == exact.indices.tolist()
    assert roomy.indices[rows:].tolist() == [-1] * (roomy.indices.shape[0] - rows)
    assert torch.equal(roomy.inverse, exact.inverse)
    assert torch.equal(roomy.cu_seqlens, exact.cu_seqlens)
    assert roomy.max_seqlen >= exact.max_seqlen


@pytest.mark.gpu
def test_gpu_sizes_are_exact_with_lengths_cpu():
    importance, cu_seqlens = torch.rand(RAGGED.total, device="cuda"), RAGGED.cu_seqlens.cuda()
    lengths_cpu = torch.tensor(RAGGED.lengths)
    protected = torch.tensor([int(RAGGED_PROTECT[rows].sum()) for rows in RAGGED.slices()])
    torch.cuda.set_sync_debug_mode("error")
    try:
        plain = select_tokens(importance, cu_seqlens, 13, keep_ratio=0.5, lengths_cpu=lengths_cpu)
        roomy = select_tokens(importance, cu_seqlens, 13, keep_ratio=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    protecting = select_tokens(
        importance,
        cu_seqlens,
        13,
        keep_ratio=0.5,
        lengths_cpu=lengths_cpu,
        protect=RAGGED_PROTECT.cuda(),
        num_protected=protected,
    )
    assert plain.indices.shape[0] == plain.cu_seqlens[-1].item()
    assert protecting.indices.shape[0] == protecting.cu_seqlens[-1].item()
    assert roomy.indices.shape[0] == 15 + 6
