"""What the thin autograd.Functions of the ops share."""

from typing import Any

import torch


def without_repeats(*tensors: Any) -> tuple[Any, ...]:
    """The tensors (or None). Under torch.compile a second occurrence of a tensor is replaced by a view.

    torch.compile rejects an autograd.Function that gets the same tensor twice (such as keys that are the queries).
    """
    if not torch.compiler.is_compiling():
        return tensors
    distinct: list[Any] = []
    for x in tensors:
        if x is not None and any(x is y for y in distinct):
            x = x.view_as(x)
        distinct.append(x)
    return tuple(distinct)
