"""Gather: the rows that a selection keeps, and their gradients."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.ops._autograd import OpFunction, call_below_autograd, first_order, without_repeats
from stamp_kernels.ops._checks import check_tensor
from stamp_kernels.ops._library import define_op, imported_once
from stamp_kernels.ops.pruning import _boundary
from stamp_kernels.ops.pruning.selection import TokenSelection
from stamp_kernels.reference import pruning as reference

# The value of tail rows: a number, or one for each tensor of a list.
FillValue: TypeAlias = float | Sequence[float]


def _fake(x: list[Tensor], row_map: Tensor) -> list[Tensor]:
    return [tensor.new_empty(row_map.shape[0], *tensor.shape[1:]) for tensor in x]


def _gather_rows(x: list[Tensor], row_map: Tensor) -> list[Tensor]:
    return [reference.gather_rows(tensor, row_map) for tensor in x]


@imported_once
def _forward_triton() -> Callable[..., Any]:
    from stamp_kernels.triton_kernels.pruning.gather import gather_tokens_forward  # imports Triton

    return gather_tokens_forward


@imported_once
def _backward_triton() -> Callable[..., Any]:
    from stamp_kernels.triton_kernels.pruning.gather import gather_tokens_backward  # imports Triton

    return gather_tokens_backward


_forward = define_op(
    "gather_tokens_forward(Tensor[] x, Tensor indices) -> Tensor[]",
    check=_boundary.check_gather_forward,
    reference=_gather_rows,
    triton=_forward_triton,
    fake=_fake,
    differentiable=_gather_rows,  # by torch's own gradient, since a raw call brings no inverse map
)
# The backward is a gather too: row t of the gradient is row inverse[t] of the incoming one, so nothing is added up.
_backward = define_op(
    "gather_tokens_backward(Tensor[] grad, Tensor inverse) -> Tensor[]",
    check=_boundary.check_gather_backward,
    reference=_gather_rows,
    triton=_backward_triton,
    fake=_fake,
    backward_of="gather_tokens",
)


def mark_outputs_without_grad(ctx: Any, inputs_need_grad: Sequence[bool], outputs: Sequence[Tensor]) -> None:
    """Of tensors gathered together, one that requires grad does not make the others differentiable."""
    ctx.mark_non_differentiable(*(y for y, needs in zip(outputs, inputs_need_grad, strict=True) if not needs))


def any_requires_grad(tensors: Sequence[Tensor]) -> bool:
    """Whether an autograd.Function is needed.

    Without need, torch.compile (2.11 to 2.13) inlines its forward, and with a variable number of inputs mistakes the
    first of them for a ctx.
    """
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def gradients_of_gathered(
    inputs_need_grad: Sequence[bool], grads: Sequence[Tensor | None], inverse: Tensor
) -> list[Tensor | None]:
    """The gradients of tensors from those of their gathered rows, in one launch."""
    needed = [i for i, grad in enumerate(grads) if grad is not None and inputs_need_grad[i]]
    grad_x: list[Tensor | None] = [None] * len(grads)
    if needed:
        computed = call_below_autograd(_backward, [grads[i] for i in needed], inverse)
        for i, grad in zip(needed, computed, strict=True):
            grad_x[i] = grad
    return grad_x


class _GatherTokens(OpFunction):
    @staticmethod
    def forward(indices: Tensor, inverse: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        return tuple(call_below_autograd(_forward, list(x), indices))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        mark_outputs_without_grad(ctx, ctx.needs_input_grad[2:], output)
        ctx.save_for_backward(inputs[1])  # inverse

    @staticmethod
    @first_order("gather_tokens")
    def backward(ctx: Any, saved: tuple[Tensor], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *gradients_of_gathered(ctx.needs_input_grad[2:], grads, saved[0])


@overload
def gather_tokens(x: Tensor, selection: TokenSelection, *, fill_value: float = ...) -> Tensor: ...
@overload
def gather_tokens(x: list[Tensor], selection: TokenSelection, *, fill_value: FillValue = ...) -> list[Tensor]: ...
def gather_tokens(
    x: Tensor | list[Tensor], selection: TokenSelection, *, fill_value: FillValue = 0
) -> Tensor | list[Tensor]:
    """Take the rows that a selection keeps, of one tensor or of several at once.

    `y[j] = x[selection.indices[j]]`, and fill_value on tail rows. The gradient of row t is that of its kept row, or 0
    if it was dropped: one write per row and no atomics, since the indices are unique.

    0 is a class like any other, so targets need `fill_value=ignore_index`: without it a loss counts the tail rows. A
    selection has them under torch.compile, with total_kept, and on a GPU whose lengths the CPU does not know.

    Args:
        x: a tensor `[T, ...]` or a non-empty list of such tensors, of any dtypes, with T = selection.total_source.
        selection: what `select_tokens` returned, on the same device.
        fill_value: the value of tail rows, which gets no gradient; for a list one number, or one for each tensor.

    Returns:
        The same structure with T' = len(selection.indices) rows.

    Raises:
        ValueError: an empty list, a tensor with another number of rows or on another device, a fill_value that is not
            a number or that a tensor's dtype cannot hold.
        RuntimeError: an index outside the rows (on the CPU, or under STAMP_KERNELS_CHECK=1).

    Example:
        >>> cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)
        >>> importance = torch.tensor([0.1, 0.3, 0.2, 0.5, 0.4])
        >>> selection = select_tokens(importance, cu_seqlens, 3, keep_count=1, total_kept=3)
        >>> gather_tokens(torch.tensor([4, 5, 6, 7, 8]), selection, fill_value=-100)
        tensor([   5,    7, -100])
    """
    if not isinstance(selection, TokenSelection):
        raise ValueError(f"selection must be a TokenSelection, got {type(selection).__name__}")
    check_tensor("selection.indices", selection.indices, shape=["kept"], dtypes=[torch.int64])
    device = selection.indices.device
    check_tensor(
        "selection.inverse", selection.inverse, shape=[selection.total_source], dtypes=[torch.int32], device=device
    )
    tensors, is_list = list_of_tensors(x), not isinstance(x, Tensor)
    check_rows(tensors, selection.total_source, "selection.total_source", device, is_list=is_list)
    fill_values = checked_fill_values(fill_value, tensors, is_list=is_list)
    if reference_is_forced():
        rows = _gather_rows(tensors, selection.indices)
    elif not any_requires_grad(tensors):
        rows = call_below_autograd(_forward, tensors, selection.indices)
    else:
        rows = list(_GatherTokens.apply(selection.indices, selection.inverse, *without_repeats(*tensors)))
    rows = fill_tail_rows(rows, selection.indices, fill_values)
    return rows if is_list else rows[0]


def checked_fill_values(fill_value: FillValue, tensors: list[Tensor], *, is_list: bool) -> list[float]:
    """One value for each tensor, which its dtype can hold."""
    if is_list and isinstance(fill_value, list | tuple):
        if len(fill_value) != len(tensors):
            raise ValueError(
                f"fill_value must be a number, or one for each of the {len(tensors)} tensors, got {fill_value}"
            )
        names, values = [f"fill_value[{i}]" for i in range(len(tensors))], list(fill_value)
    else:
        names, values = ["fill_value"] * len(tensors), [fill_value] * len(tensors)
    for name, value, tensor in zip(names, values, tensors, strict=True):
        check_fill_value(name, value, tensor.dtype)
    return values


def check_fill_value(name: str, value: float, dtype: torch.dtype) -> None:
    if isinstance(value, int) and value == 0:  # the default, which every dtype can hold
        return
    if not isinstance(value, Real | torch.SymInt):
        raise ValueError(f"{name} must be a number, got {type(value).__name__}")
    if dtype == torch.bool:
        fits, allowed = value in (0, 1), "False or True"
    elif dtype.is_floating_point or dtype.is_complex:
        largest = torch.finfo(dtype).max
        fits, allowed = not math.isfinite(value) or abs(value) <= largest, f"at most {largest} in magnitude"
    else:
        low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
        fits = isinstance(value, Integral | torch.SymInt) and low <= value <= high
        allowed = f"an integer from {low} to {high}"
    if not fits:
        raise ValueError(f"{name} must be {allowed} for a tensor of {dtype}, got {value}")


def fill_tail_rows(rows: list[Tensor], row_map: Tensor, fill_values: list[float]) -> list[Tensor]:
    """Gathered rows with another value than 0, which the ops write, where row_map is -1.

    This is a pass of its own over the tensors with such a value. In practice those are targets: few bytes beside hidden
    states, so the kernels need no argument for it.
    """
    if all(value == 0 for value in fill_values):
        return rows
    is_tail = row_map < 0
    return [
        x if value == 0 else x.masked_fill(is_tail.view(-1, *[1] * (x.dim() - 1)), value)
        for x, value in zip(rows, fill_values, strict=True)
    ]


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
