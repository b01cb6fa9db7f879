"""The peers of select_tokens keep the same tokens."""

import math

import pytest
import torch
from torch import Tensor

from stamp_kernels import select_tokens
from stamp_kernels.profiling.peers.pruning import num_kept, padded_topk, sort_within_sequences, topk_per_sequence

LENGTHS = [7, 1, 30, 12, 3]
KEEP_RATIO = 1 / 3


@pytest.fixture
def importance() -> Tensor:
    return torch.rand(sum(LENGTHS))


@pytest.fixture
def expected(importance):
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return select_tokens(importance, cu_seqlens, max(LENGTHS), keep_ratio=KEEP_RATIO)


def test_loop_over_the_sequences(importance, expected):
    selection = topk_per_sequence(importance, LENGTHS, KEEP_RATIO)
    assert torch.equal(selection.indices, expected.indices)
    assert torch.equal(selection.cu_seqlens, expected.cu_seqlens)


def test_one_sort(importance, expected):
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    kept = torch.tensor([num_kept(n, KEEP_RATIO) for n in LENGTHS])
    selection = sort_within_sequences(importance, sequence, cu_seqlens, kept, int(kept.sum()))
    assert torch.equal(selection.indices, expected.indices)
    assert torch.equal(selection.cu_seqlens, expected.cu_seqlens)


def test_padded_topk_holds_the_best_of_every_row(importance, expected):
    padded = torch.full((len(LENGTHS), max(LENGTHS)), -math.inf)
    for row, of_sequence in zip(padded, importance.split(LENGTHS), strict=True):
        row[: len(of_sequence)] = of_sequence
    columns = padded_topk(padded, num_kept(max(LENGTHS), KEEP_RATIO))
    offsets = expected.cu_seqlens.tolist()
    start = 0
    for i, n in enumerate(LENGTHS):
        best = (expected.indices[offsets[i] : offsets[i + 1]] - start).tolist()
        assert set(best) <= set(columns[i].tolist())
        assert columns[i].tolist() == sorted(columns[i].tolist())
        start += n
