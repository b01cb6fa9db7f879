"""Prune: importance, selection and gather in one op, with the fewest launches."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.common.arguments import BudgetArguments
from stamp_kernels.common.exported import exported
from stamp_kernels.ops._autograd import OpFunction, call_below_autograd, first_order, without_repeats
from stamp_kernels.ops._checks import check_count, check_tensor, checked_cu_seqlens
from stamp_kernels.ops._library import define_op, imported_once
from stamp_kernels.ops.pruning import _boundary
from stamp_kernels.ops.pruning.budget import BudgetOf, KeepOptions, resolve_budget
from stamp_kernels.ops.pruning.gather import (
    FillValue,
    any_requires_grad,
    check_rows,
    checked_fill_values,
    fill_tail_rows,
    gradients_of_gathered,
    list_of_tensors,
    mark_outputs_without_grad,
)
from stamp_kernels.ops.pruning.importance import NORM_ORDERS, Norm, Normalize, check_importance_arguments
from stamp_kernels.ops.pruning.selection import TokenSelection, rows_of_result
from stamp_kernels.reference import pruning as reference

if TYPE_CHECKING:  # NamedTuples are generic from Python 3.11 on
    from typing import Generic, TypeVar

    Rows = TypeVar("Rows", Tensor, list[Tensor])

    class PrunedTokens(NamedTuple, Generic[Rows]):
        x: Rows
        positions: Tensor
        selection: TokenSelection
        lengths_cpu: Tensor | None
else:

    @exported
    class PrunedTokens(NamedTuple):
        """What `prune` returns.

        Attributes:
            x: the kept rows, a tensor or a list as they were given; tail rows are fill_value.
            positions: int32 `[T']`, original position of each kept token; 0 on tail rows.
            selection: which tokens they are.
            lengths_cpu: int64 `[B]`, the kept lengths, if the CPU knows them.
        """

        x: Tensor | list[Tensor]
        positions: Tensor
        selection: TokenSelection
        lengths_cpu: Tensor | None


def _fake(
    x: list[Tensor],
    centrality: Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    norm_order: int,
    per_visible_query: bool,
    budget: BudgetArguments,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    total_kept = rows_of_result(budget.total_kept)
    return (
        [tensor.new_empty(total_kept, *tensor.shape[1:]) for tensor in x],
        cu_seqlens.new_empty(total_kept),
        cu_seqlens.new_empty(total_kept, dtype=torch.int64),
        cu_seqlens.new_empty(cu_seqlens.shape[0]),
        cu_seqlens.new_empty(x[0].shape[0]),
    )


@imported_once
def _triton() -> Callable[..., Any]:
    from stamp_kernels.triton_kernels.pruning.prune import prune  # imports Triton

    return prune


def _differentiable(x: list[Tensor], *arguments: Any) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """The op for inputs that require grad."""
    *others, budget = arguments
    outputs = _Prune.apply((*others, *budget), *x)
    positions, indices, cu_seqlens, inverse = outputs[len(x) :]
    return list(outputs[: len(x)]), positions, indices, cu_seqlens, inverse


_prune = define_op(
    "prune(Tensor[] x, Tensor centrality, Tensor? positions, Tensor cu_seqlens, SymInt max_seqlen, int norm_order, "
    "bool per_visible_query, int? ratio_q32, SymInt? keep_count, Tensor? keep_counts, SymInt min_keep, "
    "Tensor? protect, int codes_per_item, SymInt? total_kept) -> (Tensor[], Tensor, Tensor, Tensor, Tensor)",
    check=_boundary.check_prune,
    reference=reference.prune,
    triton=_triton,
    fake=_fake,
    differentiable=_differentiable,
    groups=(BudgetArguments,),
)


class _Prune(OpFunction):
    @staticmethod
    def forward(arguments: tuple[Any, ...], *x: Tensor) -> tuple[Tensor, ...]:
        rows, *selected = call_below_autograd(_prune, list(x), *arguments)
        return *rows, *selected

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        num_tensors = len(inputs) - 1
        ctx.set_materialize_grads(False)
        selected = output[num_tensors:]
        mark_outputs_without_grad(ctx, (*ctx.needs_input_grad[1:], *[False] * len(selected)), output)
        ctx.save_for_backward(selected[-1])  # inverse

    @staticmethod
    @first_order("prune")
    def backward(ctx: Any, saved: tuple[Tensor], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_grad = ctx.needs_input_grad[1:]
        return None, *gradients_of_gathered(needs_grad, grads[: len(needs_grad)], saved[0])


@overload
def prune(
    x: Tensor, centrality: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, positions: Tensor | None = ...,
    norm: Norm = ..., normalize: Normalize = ..., keep_ratio: float | None = ..., keep_count: int | Tensor | None = ...,
    min_keep: int = ..., protect: Tensor | None = ..., total_kept: int | None = ..., lengths_cpu: Tensor | None = ...,
    num_protected: int | Tensor | None = ..., budget: BudgetOf = ..., codes_per_item: int | None = ...,
    fill_value: float = ...,
) -> "PrunedTokens[Tensor]": ...  # fmt: skip
@overload
def prune(
    x: list[Tensor], centrality: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, positions: Tensor | None = ...,
    norm: Norm = ..., normalize: Normalize = ..., keep_ratio: float | None = ..., keep_count: int | Tensor | None = ...,
    min_keep: int = ..., protect: Tensor | None = ..., total_kept: int | None = ..., lengths_cpu: Tensor | None = ...,
    num_protected: int | Tensor | None = ..., budget: BudgetOf = ..., codes_per_item: int | None = ...,
    fill_value: FillValue = ...,
) -> "PrunedTokens[list[Tensor]]": ...  # fmt: skip
def prune(
    x: Tensor | list[Tensor],  # [T, D] floating, and what else goes along
    centrality: Tensor,  # [T] fp32 or fp64
    cu_seqlens: Tensor,  # [B + 1] int32 or int64
    max_seqlen: int,
    *,
    positions: Tensor | None = None,  # [T] int32
    norm: Norm = "l1",
    normalize: Normalize = "none",
    keep_ratio: float | None = None,
    keep_count: int | Tensor | None = None,
    min_keep: int = 1,
    protect: Tensor | None = None,  # [T] bool
    total_kept: int | None = None,
    lengths_cpu: Tensor | None = None,  # [B] integers on the CPU
    num_protected: int | Tensor | None = None,
    budget: BudgetOf = "sequence",
    codes_per_item: int | None = None,
    fill_value: FillValue = 0,
) -> Any:
    """Keep the most important tokens of every sequence: importance, selection and gather in one.

    Gives what `token_importance`, `select_tokens` and `gather_tokens` give one after the other, in fewer launches
    (arXiv 2604.05329, section SAP). Gradients reach the kept rows of x; the importance gets none.

    Args:
        x: the hidden states `[T, D]` after which tokens are pruned, in any floating dtype; or a list of tensors
            `[T, ...]` of any dtypes that starts with them, all of which are gathered.
        centrality, norm, normalize: as in `token_importance`.
        cu_seqlens: int32 or int64 `[B + 1]`, offsets of the sequences, on the same device.
        max_seqlen: the longest length, or an upper bound.
        positions: each token's index in its original sequence. None: its index in this one.
        keep_ratio, keep_count, min_keep, protect, total_kept, lengths_cpu, num_protected, budget, codes_per_item: as in
            `select_tokens`.
        fill_value: as in `gather_tokens`: the value of tail rows. Targets in x need ignore_index, as in
            `prune([hidden, targets], ..., fill_value=[0, -100])`.

    Returns:
        PrunedTokens with T' rows: see `select_tokens`.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: contents are wrong, see `select_tokens`.
    """
    tensors = list_of_tensors(x)
    hidden, is_list = tensors[0], not isinstance(x, Tensor)
    total = check_importance_arguments(hidden, centrality, norm, normalize, "x[0]" if is_list else "x")
    cu_seqlens = checked_cu_seqlens("cu_seqlens", cu_seqlens, hidden.device)
    max_seqlen = check_count("max_seqlen", max_seqlen)
    check_rows(tensors, total, "as many as x[0]", hidden.device)
    fill_values = checked_fill_values(fill_value, tensors, is_list=is_list)
    if positions is not None:
        check_tensor("positions", positions, shape=[total], dtypes=[torch.int32], device=hidden.device)
    options = KeepOptions(
        keep_ratio, keep_count, min_keep, protect, total_kept, lengths_cpu, num_protected, budget, codes_per_item
    )
    resolved = resolve_budget(total, cu_seqlens, max_seqlen, options, hidden.device)
    per_visible_query = normalize == "visible_queries"
    arguments = (centrality.detach(), positions, cu_seqlens, max_seqlen, NORM_ORDERS[norm], per_visible_query)
    if reference_is_forced():
        rows, *selected = reference.prune(tensors, *arguments, resolved.arguments)
    elif not any_requires_grad(tensors):
        rows, *selected = call_below_autograd(_prune, tensors, *arguments, *resolved.arguments)
    else:
        outputs = _Prune.apply((*arguments, *resolved.arguments), *without_repeats(*tensors))
        rows, selected = list(outputs[: len(tensors)]), outputs[len(tensors) :]
    kept_positions, indices, cu_seqlens_kept, inverse = selected
    rows = fill_tail_rows(rows, indices, fill_values)
    max_kept, kept_lengths = resolved.kept_lengths(cu_seqlens_kept)
    selection = TokenSelection(indices, cu_seqlens_kept, max_kept, inverse, total)
    return PrunedTokens(rows if is_list else rows[0], kept_positions, selection, kept_lengths)
