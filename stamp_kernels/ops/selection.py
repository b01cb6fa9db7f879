"""Selection: which tokens of each packed sequence stay, and the gather of their rows."""

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.ops._autograd import without_repeats
from stamp_kernels.ops._budget import resolve_budget
from stamp_kernels.ops._checks import FLOATING_DTYPES, check_tensor
from stamp_kernels.ops._library import define_op
from stamp_kernels.reference import selection as reference
from stamp_kernels.reference.selection import TokenSelection


def rows_of_result(total_kept: int | None) -> int:
    """For a fake kernel: None, the number that the op is to find out, is a symbol."""
    return torch.library.get_ctx().new_dynamic_size() if total_kept is None else total_kept


def _select_tokens_fake(
    importance, cu_seqlens, max_seqlen, ratio_q32, keep_count, keep_counts, min_keep, protect, item_length, total_kept
):
    rows = rows_of_result(total_kept)
    return (
        importance.new_empty(rows, dtype=torch.int64),
        cu_seqlens.new_empty(cu_seqlens.shape[0]),
        importance.new_empty(importance.shape[0], dtype=torch.int32),
    )


def _select_tokens_triton(*args):
    from stamp_kernels.triton_kernels.selection import select_tokens  # imports Triton

    return select_tokens(*args)


_select_tokens = define_op(
    "select_tokens(Tensor importance, Tensor cu_seqlens, SymInt max_seqlen, int? ratio_q32, SymInt? keep_count, "
    "Tensor? keep_counts, SymInt min_keep, Tensor? protect, int item_length, SymInt? total_kept) "
    "-> (Tensor, Tensor, Tensor)",
    public_name="select_tokens",
    reference=reference.select_tokens,
    triton=_select_tokens_triton,
    fake=_select_tokens_fake,
)


def select_tokens(
    importance: Tensor,  # [T] floating
    cu_seqlens: Tensor,  # [B + 1] int32
    max_seqlen: int,
    *,
    keep_ratio: float | None = None,
    keep_count: int | Tensor | None = None,
    min_keep: int = 1,
    protect: Tensor | None = None,  # [T] bool
    total_kept: int | None = None,
    lengths_cpu: Tensor | None = None,  # [B] integers on the CPU
    num_protected: int | Tensor | None = None,
    budget: str = "sequence",
    item_length: int = 1,
) -> TokenSelection:
    """Choose the most important tokens of every sequence, in their original order, without a host sync.

    A sequence with p protected tokens and n others keeps the protected ones and the `min(n, max(min_keep, budget))`
    most important others. Protected tokens stand outside the budget, so that a history is pruned alike with and
    without its labels. Higher importance comes first, then the lower index; -0.0 equals 0.0 and NaN comes after
    -inf. No gradient flows through the choice (arXiv 2604.05329, section SAP).

    With item_length the tokens of an item (all codes of its semantic ID) stay or go together: an item scores the sum
    of its tokens, it is protected where one of them is, and keep_ratio, keep_count, min_keep and num_protected count
    items. All else, the result included, is of tokens.

    Args:
        importance: `[T]`, any floating dtype. Rows from `cu_seqlens[-1]` on are tail rows and never chosen.
        cu_seqlens: int32 `[B + 1]`, offsets of the sequences, on the same device.
        max_seqlen: the longest length, or an upper bound of it. On a GPU nothing checks that but lengths_cpu, and the
            rows of a sequence that is longer may stay unwritten.
        keep_ratio: budget `ceil(keep_ratio * n)`, in [0, 1]. Exactly one of keep_ratio and keep_count must be given.
            torch.compile specialises on its value: one that changes from step to step is better given as a keep_count.
        keep_count: the budget itself: one int, or an integer tensor `[B]` on the same device.
        min_keep: least budget of a sequence that has so many tokens.
        protect: bool `[T]`, tokens that always stay.
        total_kept: T', when the caller knows how many tokens stay (or an upper bound: the rest become tail rows).
        lengths_cpu: the lengths on the host, from which T' is computed exactly.
        num_protected: what is known on the host of the protected tokens: their total (or more), or `[B]` numbers on
            the CPU.
        budget: `"sequence"`, or `"max_seqlen"` to take the ratio of max_seqlen for every sequence, as padded
            implementations do.
        item_length: tokens of an item. Every sequence must be whole items; where contents are not checked, tokens
            after a sequence's last whole item are dropped.

    Returns:
        TokenSelection. T' is total_kept where that is given. Outside torch.compile it is exact where cu_seqlens is on
        the CPU, and with lengths_cpu unless keep_count is a tensor (and with `[B]` num_protected where protect is
        given). Otherwise it is the capacity `min(T, floor(keep_ratio * T) + B * max(1, min_keep) + num_protected)`, for
        one count (or budget="max_seqlen") `min(T, B * max(count, min_keep) + num_protected)`, and T for counts on the
        device or where num_protected is needed and unknown (all in items, of which T makes `T // item_length`); the
        rows past `selection.cu_seqlens[-1]` are tail rows with index -1.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: contents are wrong (on the CPU, or under STAMP_KERNELS_CHECK=1): cu_seqlens is not a rising
            sequence from 0 to at most T, a sequence is longer than max_seqlen or not whole items, a keep_count is
            negative, lengths_cpu or num_protected is not what the tensors say, or more tokens stay than total_kept.
    """
    check_tensor("importance", importance, shape=["total"], dtypes=FLOATING_DTYPES)
    total = importance.shape[0]
    resolved = resolve_budget(
        importance.device,
        total,
        cu_seqlens,
        max_seqlen,
        keep_ratio=keep_ratio,
        keep_count=keep_count,
        min_keep=min_keep,
        protect=protect,
        item_length=item_length,
        total_kept=total_kept,
        lengths_cpu=lengths_cpu,
        num_protected=num_protected,
        budget=budget,
    )
    select = reference.select_tokens if reference_is_forced() else _select_tokens
    indices, cu_seqlens_kept, inverse = select(importance.detach(), cu_seqlens, max_seqlen, *resolved.op_arguments)
    max_kept, _ = resolved.kept_lengths(cu_seqlens_kept)
    return TokenSelection(indices, cu_seqlens_kept, max_kept, inverse, total)


def _gather_rows_fake(x, indices):
    return [tensor.new_empty(indices.shape[0], *tensor.shape[1:]) for tensor in x]


def _gather_rows_reference(x, indices):
    return [reference.gather_rows(tensor, indices) for tensor in x]


def _gather_tokens_forward_triton(*args):
    from stamp_kernels.triton_kernels.gather import gather_tokens_forward  # imports Triton

    return gather_tokens_forward(*args)


def _gather_tokens_backward_triton(*args):
    from stamp_kernels.triton_kernels.gather import gather_tokens_backward  # imports Triton

    return gather_tokens_backward(*args)


_gather_tokens_forward = define_op(
    "gather_tokens_forward(Tensor[] x, Tensor indices) -> Tensor[]",
    public_name="gather_tokens",
    reference=_gather_rows_reference,
    triton=_gather_tokens_forward_triton,
    fake=_gather_rows_fake,
)
# The adjoint gathers too: row t of the gradient is row inverse[t] of what arrives, so nothing is added up.
_gather_tokens_backward = define_op(
    "gather_tokens_backward(Tensor[] grad, Tensor inverse) -> Tensor[]",
    public_name="gather_tokens",
    reference=_gather_rows_reference,
    triton=_gather_tokens_backward_triton,
    fake=_gather_rows_fake,
)


def mark_outputs_without_grad(ctx, inputs_need_grad: tuple[bool, ...], outputs: list[Tensor]) -> None:
    """Of tensors gathered together, one that requires grad does not make the others differentiable."""
    ctx.mark_non_differentiable(*(y for y, needs in zip(outputs, inputs_need_grad, strict=True) if not needs))


def gradients_of_gathered(
    inputs_need_grad: tuple[bool, ...], grads: tuple[Tensor | None, ...], inverse: Tensor
) -> list[Tensor | None]:
    """The gradients of tensors from those of their gathered rows, all together."""
    wanted = [i for i, grad in enumerate(grads) if grad is not None and inputs_need_grad[i]]
    grad_x: list[Tensor | None] = [None] * len(grads)
    if wanted:
        for i, grad in zip(wanted, _gather_tokens_backward([grads[i] for i in wanted], inverse), strict=True):
            grad_x[i] = grad
    return grad_x


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices: Tensor, inverse: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inverse)
        outputs = _gather_tokens_forward(list(x), indices)
        mark_outputs_without_grad(ctx, ctx.needs_input_grad[2:], outputs)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return None, None, *gradients_of_gathered(ctx.needs_input_grad[2:], grads, inverse)


def gather_tokens(x: Tensor | list[Tensor], selection: TokenSelection) -> Tensor | list[Tensor]:
    """Take the rows that a selection keeps, of one tensor or of many together.

    `y[j] = x[selection.indices[j]]`; tail rows are 0. The gradient of row t is that of its kept row, or 0 where it was
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
        return reference.gather_tokens(x, selection)
    outputs = _GatherTokens.apply(selection.indices, selection.inverse, *without_repeats(*tensors))
    return outputs[0] if isinstance(x, Tensor) else list(outputs)


def list_of_tensors(x: Tensor | list[Tensor]) -> list[Tensor]:
    if not isinstance(x, Tensor | list | tuple):
        raise ValueError(f"x must be a tensor or a non-empty list of tensors, got {type(x).__name__}")
    tensors = [x] if isinstance(x, Tensor) else list(x)
    if not tensors:
        raise ValueError("x must be a tensor or a non-empty list of tensors, got an empty list")
    return tensors


def check_rows(tensors: list[Tensor], total: int, total_is: str, device: torch.device, *, is_list: bool = True) -> None:
    """All have `total` rows and are on `device`; `total_is` says what the number is."""
    for i, tensor in enumerate(tensors):
        name = f"x[{i}]" if is_list else "x"
        check_tensor(name, tensor, device=device)
        if tensor.dim() == 0 or tensor.shape[0] != total:
            raise ValueError(f"{name} must have {total} rows ({total_is}), got shape {list(tensor.shape)}")
