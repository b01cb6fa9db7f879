"""Cases of token selection and gather, and what they must give, for pruning's tests."""

import math
from fractions import Fraction

import torch
from hypothesis import strategies as st
from ragged import RaggedBatch, ragged_batches
from torch import Tensor

from stamp_kernels import TokenSelection, select_tokens

# Selection

# Few distinct values, so that ties are everywhere, with the ends of the order and the values next to them.
VALUES = [-math.inf, -2.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0000001, 3.4e38, math.inf, math.nan]

# Of the tokens to keep.
RATIOS = st.sampled_from([Fraction(0), Fraction(1), Fraction(1, 3), Fraction(2, 3), Fraction(1, 2), Fraction(3, 7)])


def oracle(batch: RaggedBatch, importance: Tensor, protect: Tensor | None, budgets: list[int]) -> list[list[int]]:
    """Rows that each sequence keeps; `budgets` are the numbers of unprotected tokens that it may keep."""
    values = importance.tolist()
    kept = []
    for rows, budget in zip(batch.slices(), budgets, strict=True):
        always = [i for i in range(rows.start, rows.stop) if protect is not None and protect[i]]
        others = [i for i in range(rows.start, rows.stop) if i not in set(always)]
        others.sort(key=lambda i: (math.isnan(values[i]), 0.0 if math.isnan(values[i]) else -values[i], i))
        kept.append(sorted(always + others[:budget]))
    return kept


def unprotected_lengths(batch: RaggedBatch, protect: Tensor | None) -> list[int]:
    return [rows.stop - rows.start - (0 if protect is None else int(protect[rows].sum())) for rows in batch.slices()]


def exact_ceil(ratio: Fraction, n: int) -> int:
    return math.ceil(ratio * n)


def assert_selects(selection: TokenSelection, batch: RaggedBatch, kept: list[list[int]]) -> None:
    """The selection names exactly the rows `kept`, and its fields agree with one another."""
    rows = [row for sequence in kept for row in sequence]
    offsets = torch.tensor([0, *(len(sequence) for sequence in kept)]).cumsum(0)
    assert selection.cu_seqlens.dtype == torch.int32
    assert selection.cu_seqlens.tolist() == offsets.tolist()
    assert selection.indices.dtype == torch.int64
    assert selection.indices.shape[0] >= len(rows)
    assert selection.indices.tolist() == rows + [-1] * (selection.indices.shape[0] - len(rows))
    inverse = [-1] * batch.total
    for kept_row, row in enumerate(rows):
        inverse[row] = kept_row
    assert selection.inverse.dtype == torch.int32
    assert selection.inverse.tolist() == inverse
    assert selection.total_source == batch.total
    assert max((len(sequence) for sequence in kept), default=0) <= selection.max_seqlen <= batch.max_seqlen


@st.composite
def importance_batches(draw) -> tuple[RaggedBatch, Tensor, Tensor | None]:
    batch = draw(ragged_batches())
    importance = torch.tensor(draw(st.lists(st.sampled_from(VALUES), min_size=batch.total, max_size=batch.total)))
    importance = importance.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])))
    protect = draw(st.none() | st.lists(st.booleans(), min_size=batch.total, max_size=batch.total))
    return batch, importance, None if protect is None else torch.tensor(protect, dtype=torch.bool)


# Gather

STRIDED = {
    "columns": lambda x: x[:, 2:5],
    "every_second_row": lambda x: torch.cat([x, x], 1).view(-1, x.shape[1])[::2],
    "transposed": lambda x: x.t().contiguous().t(),
    "expanded_rows": lambda x: x[:1].expand_as(x),
    "expanded_columns": lambda x: x[:, :1].expand_as(x),
    "steps_in_columns": lambda x: x[:, ::2],
    "inner_transposed": lambda x: x.unflatten(1, (2, 4)).transpose(1, 2),
}


def selection_of(batch: RaggedBatch, device: str = "cpu", tail: int = 2) -> TokenSelection:
    """About half of the batch, with tail rows."""
    importance = torch.rand(batch.total)
    exact = select_tokens(importance, batch.cu_seqlens, batch.max_seqlen, keep_ratio=0.5)
    total_kept = exact.indices.shape[0] + tail
    return select_tokens(
        importance.to(device), batch.cu_seqlens.to(device), batch.max_seqlen, keep_ratio=0.5, total_kept=total_kept
    )


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape, device=device) < 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32, device=device).to(dtype)
    return torch.randint(0, 100, shape, device=device).to(dtype)


def expected_rows(x: Tensor, selection: TokenSelection) -> Tensor:
    """index_select of the kept rows, zeros on tail rows."""
    kept = selection.indices[selection.indices >= 0]
    tail = x.new_zeros((selection.indices.shape[0] - kept.shape[0], *x.shape[1:]))
    return torch.cat([x.index_select(0, kept), tail])
