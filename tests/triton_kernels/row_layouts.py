"""Views of one `[T, H, D]` with different layouts in memory."""

from collections.abc import Callable

import pytest
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def _at_offset(offset: int) -> Layout:
    return lambda x: x.new_empty(x.numel() + offset)[offset:].view(x.shape).copy_(x)


def _rows_apart(extra: int) -> Layout:
    """`extra` unused elements after each row."""
    return lambda x: x.new_empty(x.shape[0], x[0].numel() + extra)[:, : x[0].numel()].view(x.shape).copy_(x)


def _heads_apart(extra: int) -> Layout:
    return lambda x: x.new_empty(*x.shape[:2], x.shape[2] + extra)[..., : x.shape[2]].copy_(x)


# By name: a function that copies x into that layout.
LAYOUTS: dict[str, Layout] = {
    **{f"{offset} elements into the storage": _at_offset(offset) for offset in range(1, 9)},
    **{f"rows {extra} elements apart": _rows_apart(extra) for extra in (1, 4, 8, 24)},
    **{f"heads {extra} elements apart": _heads_apart(extra) for extra in (1, 4, 8)},
    "features 2 elements apart": lambda x: x.new_empty(*x.shape[:2], 2 * x.shape[2])[..., ::2].copy_(x),
    "heads before rows": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "features before rows": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}

_NAMES = list(LAYOUTS)
# Four layouts for the tensors of one call; five calls have every layout.
_MIXES = [_NAMES[min(i, len(_NAMES) - 4) :][:4] for i in range(0, len(_NAMES), 4)]
MIXES: dict[str, list[Layout]] = {str(mix): [LAYOUTS[name] for name in mix] for mix in _MIXES}
mixed_layouts = pytest.mark.parametrize("layouts", list(MIXES.values()), ids=MIXES)
