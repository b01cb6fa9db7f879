"""Importance, selection and gathering, from the docstrings of the public functions: loops in Python's own numbers."""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuzz.draw import offsets, slices


def importance(hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor | None, norm: str, normalize: str) -> Tensor:
    """float64 [T]; 0 on tail rows."""
    result = torch.zeros(hidden.shape[0], dtype=torch.float64)
    for rows in [slice(0, hidden.shape[0])] if cu_seqlens is None else slices(cu_seqlens):
        x = hidden.detach()[rows].double()
        result[rows] = centrality[rows].double() * (x.abs().sum(1) if norm == "l1" else (x * x).sum(1).sqrt())
        if normalize == "visible_queries":
            result[rows] /= torch.arange(len(x), 0, -1)
    return result


def budget(
    n: int, i: int, *, keep_ratio: float | None = None, keep_count: int | Tensor | None = None, min_keep: int = 1,
    max_items: int | None = None, **_: Any,
) -> int:  # fmt: skip
    """How many of the n unprotected items of sequence i stay. max_items: the n of budget="max_seqlen"."""
    if keep_ratio is not None:
        # The contract takes the ratio in units of 2**-32 and lets the product exceed a whole number by n units.
        n_of_ratio = n if max_items is None else max_items
        wanted = math.ceil(Fraction((round(keep_ratio * 2**32) - 1) * n_of_ratio, 2**32))
    else:
        wanted = int(keep_count[i]) if isinstance(keep_count, Tensor) else keep_count
    return min(n, max(min_keep, wanted))


class Selected(NamedTuple):
    indices: Tensor  # int64 [kept + tail]
    cu_seqlens: Tensor  # int32 [B + 1]
    inverse: Tensor  # int32 [T]
    lengths: list[int]


def select(
    scores: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, protect: Tensor | None = None,
    codes_per_item: int | None = None, total_kept: int | None = None, budget_of: str = "sequence", **options: Any,
) -> Selected:  # fmt: skip
    """The arguments of `select_tokens`; its `budget` is called budget_of."""
    codes = codes_per_item or 1
    max_items = max_seqlen // codes if budget_of == "max_seqlen" else None
    values = scores.detach().double().tolist()
    kept: list[int] = []
    lengths = []
    for i, rows in enumerate(slices(cu_seqlens)):
        items = [range(first, first + codes) for first in range(rows.start, rows.stop, codes)]
        protected = [item for item in items if protect is not None and any(bool(protect[t]) for t in item)]
        others = [item for item in items if item not in protected]
        # Higher importance first (NaN last), then the lower index; sorted() keeps the order of equal keys.
        order = sorted(others, key=lambda item: _descending(sum(values[t] for t in item)))
        chosen = protected + order[: budget(len(others), i, max_items=max_items, **options)]
        kept += sorted(t for item in chosen for t in item)
        lengths.append(codes * len(chosen))
    inverse = torch.full((len(values),), -1, dtype=torch.int32)
    inverse[kept] = torch.arange(len(kept), dtype=torch.int32)
    tail = 0 if total_kept is None else total_kept - len(kept)
    return Selected(torch.tensor(kept + [-1] * tail, dtype=torch.int64), offsets(lengths), inverse, lengths)


def _descending(x: float) -> tuple[bool, float]:
    return (True, 0.0) if math.isnan(x) else (False, -x)


def take_rows(x: Tensor, row_map: Tensor, fill_value: float = 0) -> Tensor:
    """Row j is row row_map[j] of x, or fill_value where that is -1."""
    result = torch.full((len(row_map), *x.shape[1:]), fill_value, dtype=x.dtype)
    for j, row in enumerate(row_map.tolist()):
        if row >= 0:
            result[j] = x.detach()[row]
    return result
