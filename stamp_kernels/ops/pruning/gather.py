"""Gather: the rows that a selection keeps, and their gradients."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.ops._autograd import without_repeats
from stamp_kernels.ops._checks import check_tensor
from stamp_kernels.ops._library import define_op
from stamp_kernels.ops.pruning.selection import TokenSelection
from stamp_kernels.reference import pruning as reference


def _fake(x: list[Tensor], row_map: Tensor) -> list[Tensor]:
    return [tensor.new_empty(row_map.shape[0], *tensor.shape[1:]) for tensor in x]


def _gather_rows(x: list[Tensor], row_map: Tensor) -> list[Tensor]:
    return [reference.gather_rows(tensor, row_map) for tensor in x]


def _forward_triton(*args: Any) -> list[Tensor]:
    from stamp_kernels.triton_kernels.pruning.gather import gather_tokens_forward  # imports Triton

    return gather_tokens_forward(*args)


def _backward_triton(*args: Any) -> list[Tensor]:
    from stamp_kernels.triton_kernels.pruning.gather import gather_tokens_backward  # imports Triton

    return gather_tokens_backward(*args)


_forward = define_op(
    "gather_tokens_forward(Tensor[] x, Tensor indices) -> Tensor[]",
    public_name="gather_tokens",
    reference=_gather_rows,
    triton=_forward_triton,
    fake=_fake,
)
# The backward is a gather too: row t of the gradient is row inverse[t] of the incoming one, so nothing is added up.
_backward = define_op(
    "gather_tokens_backward(Tensor[] grad, Tensor inverse) -> Tensor[]",
    public_name="gather_tokens",
    reference=_gather_rows,
    triton=_backward_triton,
    fake=_fake,
)


def mark_outputs_without_grad(ctx: Any, inputs_need_grad: Sequence[bool], outputs: Sequence[Tensor]) -> None:
    """Of tensors gathered together, one that requires grad does not make the others differentiable."""
    ctx.mark_non_differentiable(*(y for y, needs in zip(outputs, inputs_need_grad, strict=True) if not needs))


def gradients_of_gathered(
    inputs_need_grad: Sequence[bool], grads: Sequence[Tensor | None], inverse: Tensor
) -> list[Tensor | None]:
    """The gradients of tensors from those of their gathered rows, in one launch."""
    needed = [i for i, grad in enumerate(grads) if grad is not None and inputs_need_grad[i]]
    grad_x: list[Tensor | None] = [None] * len(grads)
    if needed:
        for i, grad in zip(needed, _backward([grads[i] for i in needed], inverse), strict=True):
            grad_x[i] = grad
    return grad_x


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, inverse: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inverse)
        outputs = _forward(list(x), indices)
        mark_outputs_without_grad(ctx, ctx.needs_input_grad[2:], outputs)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return None, None, *gradients_of_gathered(ctx.needs_input_grad[2:], grads, inverse)


@overload
def gather_tokens(x: Tensor, selection: TokenSelection) -> Tensor: ...
@overload
def gather_tokens(x: list[Tensor], selection: TokenSelection) -> list[Tensor]: ...
def gather_tokens(x: Tensor | list[Tensor], selection: TokenSelection) -> Tensor | list[Tensor]:
    """Take the rows that a selection keeps, of one tensor or of several at once.

    `y[j] = x[selection.indices[j]]`; tail rows are 0. The gradient of row t is that of its kept row, or 0 if it was
    dropped: one write per row and no atomics, since the indices are unique.

    Args:
        x: a tensor `[T, ...]` or a non-empty list of such tensors, of any dtypes, with T = selection.total_source.
        selection: what `select_tokens` returned, on the same device.

    Returns:
        The same structure with T' = len(selection.indices) rows.

    Raises:
        ValueError: an empty list, a tensor with another number of rows or on another device.
        RuntimeError: an index outside the rows (on the CPU, or under STAMP_KERNELS_CHECK=1).
    """
    check_tensor("selection.indices", selection.indices, shape=["kept"], dtypes=[torch.int64])
    device = selection.indices.device
    check_tensor(
        "selection.inverse", selection.inverse, shape=[selection.total_source], dtypes=[torch.int32], device=device
    )
    tensors = list_of_tensors(x)
    check_rows(tensors, selection.total_source, "selection.total_source", device, is_list=not isinstance(x, Tensor))
    if reference_is_forced():
        rows = _gather_rows(tensors, selection.indices)
    else:
        rows = list(_GatherTokens.apply(selection.indices, selection.inverse, *without_repeats(*tensors)))
    return rows[0] if isinstance(x, Tensor) else rows


def list_of_tensors(x: Tensor | list[Tensor]) -> list[Tensor]:
    if not isinstance(x, Tensor | list | tuple):
        raise ValueError(f"x must be a tensor or a non-empty list of tensors, got {type(x).__name__}")
    tensors = [x] if isinstance(x, Tensor) else list(x)
    if not tensors:
        raise ValueError("x must be a tensor or a non-empty list of tensors, got an empty list")
    return tensors


def check_rows(tensors: list[Tensor], total: int, total_is: str, device: torch.device, *, is_list: bool = True) -> None:
    """All have `total` rows and are on `device`; `total_is` says in the message what the number is."""
    for i, tensor in enumerate(tensors):
        name = f"x[{i}]" if is_list else "x"
        check_tensor(name, tensor, device=device)
        if tensor.dim() == 0 or tensor.shape[0] != total:
            raise ValueError(f"{name} must have {total} rows ({total_is}), got shape {list(tensor.shape)}")
