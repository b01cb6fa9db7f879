"""What the thin autograd.Functions of the ops share."""

import torch
from torch import Tensor


def without_repeats(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors, under torch.compile with a view in place of one that stands there twice.

    torch.compile refuses an autograd.Function that gets one tensor twice (keys that are the queries, say).
    """
    if not torch.compiler.is_compiling():
        return tensors
    distinct: list[Tensor | None] = []
    for x in tensors:
        is_repeat = x is not None and any(x is y for y in distinct)
        distinct.append(x.view_as(x) if is_repeat else x)
    return tuple(distinct)
