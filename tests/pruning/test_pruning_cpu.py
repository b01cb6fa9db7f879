"""The compiled pruning of the CPU: every instruction set, long sequences, large outputs.

test_token_importance.py, test_selection.py, test_gather.py and test_prune.py check what these ops are; here is what
only the compiled kernels could get wrong.
"""

import math

import pytest
import torch
from closeness import assert_close
from devices import CAPABILITIES
from hypothesis import given
from hypothesis import strategies as st
from pairwise import pairwise
from torch import Tensor

from stamp_kernels import TokenSelection, gather_tokens, prune, select_tokens, token_importance

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def best(scores: Tensor, k: int) -> list[int]:
    """The k best by a stable sort: NaN last, -0.0 as 0.0, ties by the lower index."""
    values = [(math.isnan(x), 0.0 if math.isnan(x) else -x, i) for i, x in enumerate(scores.tolist())]
    return sorted(i for _, _, i in sorted(values)[:k])


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.core
@pairwise(indirect=["capability"], distinct=[2, 50, 10_000], dtype=DTYPES, capability=CAPABILITIES)
def test_every_count_of_short_sequences(capability, distinct, dtype):
    for n in (1, 2, 15, 16, 17, 31, 33, 64):
        scores = (torch.randint(0, distinct, (n,)) - distinct // 2).to(dtype)
        for k in range(n + 1):
            kept = select_tokens(scores, offsets(n), n, keep_count=k, min_keep=0)
            assert kept.indices.tolist() == best(scores, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_scores(capability, dtype):
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    values = [math.nan, -math.inf, -largest, -1.0, -smallest, -smallest / 4, -0.0, 0.0, smallest / 4, smallest, 1.0]
    scores = torch.tensor([*values, largest, math.inf, math.nan], dtype=torch.float64).to(dtype)
    scores = scores[torch.randperm(len(scores))].repeat(2)
    protect = torch.rand(len(scores)) < 0.2
    others = [i for i in range(len(scores)) if not protect[i]]
    for k in range(len(others) + 1):
        kept = select_tokens(scores, offsets(len(scores)), len(scores), keep_count=k, min_keep=0, protect=protect)
        expected = sorted(protect.nonzero().flatten().tolist() + [others[i] for i in best(scores[others], k)])
        assert kept.indices.tolist() == expected


@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=8), seed=st.integers(0, 100))
def test_sequences_of_many_vectors(lengths, seed):
    cu_seqlens = offsets(*lengths)
    scores = torch.randint(0, 200, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).float()
    kept = select_tokens(scores, cu_seqlens, max(lengths), keep_ratio=1 / 3)
    expected = []
    for start, n in zip(cu_seqlens.tolist(), lengths, strict=False):
        expected += [start + i for i in best(scores[start : start + n], -(-n // 3))]
    assert kept.indices.tolist() == expected


@pytest.mark.parametrize("codes_per_item", [1, 4])
def test_everything_stays(codes_per_item):
    lengths = (8, 0, 40, 4)
    scores = torch.rand(sum(lengths))
    kept = select_tokens(scores, offsets(*lengths), 40, keep_ratio=1.0, codes_per_item=codes_per_item)
    assert torch.equal(kept.indices, torch.arange(sum(lengths)))
    assert torch.equal(kept.inverse.long(), kept.indices)


@pytest.mark.parametrize("ties", [False, True])
def test_a_very_long_sequence_among_short_ones(capability, ties):
    lengths = (3, 65_536, 0, 70)
    scores = torch.randint(0, 5, (sum(lengths),)).float() if ties else torch.rand(sum(lengths))
    cu_seqlens = offsets(*lengths)
    kept = select_tokens(scores, cu_seqlens, 65_536, keep_ratio=1 / 3)
    expected = []
    for start, n in zip(cu_seqlens.tolist(), lengths, strict=False):
        order = torch.sort(scores[start : start + n], descending=True, stable=True).indices[: -(-n // 3)]
        expected.append(start + order.sort().values)
    assert torch.equal(kept.indices, torch.cat(expected))


@pytest.mark.core
@pairwise(indirect=["capability"], width=[1, 7, 16, 100, 128, 1000], dtype=DTYPES, capability=CAPABILITIES)
def test_importance_of_every_width_and_dtype(capability, width, dtype):
    hidden, centrality = torch.randn(50, width).to(dtype), torch.rand(50)
    cu_seqlens = offsets(20, 0, 29)
    ends = torch.tensor([20] * 20 + [49] * 29)
    for order, norm in ((1, "l1"), (2, "l2")):
        want = torch.linalg.vector_norm(hidden[:49].double(), order, dim=1) * centrality[:49].double()
        got = token_importance(hidden, centrality, cu_seqlens, norm=norm)
        assert_close(got[:49], want)
        assert got[49] == 0
        got = token_importance(hidden, centrality, cu_seqlens, norm=norm, normalize="visible_queries")
        assert_close(got[:49], want / (ends - torch.arange(49)))


def test_prune_has_the_bits_of_token_importance(capability):
    """Otherwise it would decide near ties differently."""
    lengths = (300, 1, 0, 77, 500)
    cu_seqlens = offsets(*lengths)
    # The rows differ only in the order of their numbers, so their sums differ only in the last bits.
    row = torch.randn(96)
    hidden = torch.stack([row[torch.randperm(96)] for _ in range(sum(lengths))])
    centrality = torch.ones(len(hidden))
    importance = token_importance(hidden, centrality, cu_seqlens)
    assert 2 < importance.unique().numel() < len(importance)
    expected = select_tokens(importance, cu_seqlens, 500, keep_ratio=1 / 3)
    kept = prune(hidden, centrality, cu_seqlens, 500, keep_ratio=1 / 3)
    assert torch.equal(kept.selection.indices, expected.indices)


def test_thread_count_does_not_change_results():
    lengths = torch.randint(0, 300, (200,))
    cu_seqlens = offsets(*lengths.tolist())
    hidden, centrality = torch.randn(int(lengths.sum()), 64), torch.rand(int(lengths.sum()))

    def run() -> list[Tensor]:
        kept = prune(hidden, centrality, cu_seqlens, 300, keep_ratio=1 / 3)
        importance = token_importance(hidden, centrality, cu_seqlens, normalize="visible_queries")
        return [kept.x, kept.positions, importance, *select_tokens(importance, cu_seqlens, 300, keep_count=9)[:2]]

    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("row_bytes", [4096, 4104])
def test_gradient_larger_than_the_caches(row_bytes):
    """The kernel writes around the caches where rows are aligned."""
    rows = 56 * 1024 * 1024 // row_bytes
    inverse = torch.full((rows,), -1, dtype=torch.int32)
    indices = torch.randperm(rows)[: rows // 3].sort().values
    inverse[indices] = torch.arange(len(indices), dtype=torch.int32)
    selection = TokenSelection(indices, offsets(len(indices)), len(indices), inverse, rows)
    x = torch.zeros(rows, row_bytes // 4, requires_grad=True)
    weight = torch.randn(len(indices), row_bytes // 4)
    (gradient,) = torch.autograd.grad(gather_tokens(x, selection), x, weight)
    assert torch.equal(gradient[indices], weight)
    assert gradient.count_nonzero() == weight.count_nonzero()
