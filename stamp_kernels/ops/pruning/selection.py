"""Selection: which tokens of each packed sequence stay."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.common.arguments import BudgetArguments
from stamp_kernels.common.exported import exported
from stamp_kernels.ops._checks import FLOATING_DTYPES, check_count, check_tensor, checked_cu_seqlens
from stamp_kernels.ops._library import define_op, imported_once
from stamp_kernels.ops.pruning import _boundary
from stamp_kernels.ops.pruning.budget import BudgetOf, KeepOptions, resolve_budget
from stamp_kernels.reference import pruning as reference


@exported
class TokenSelection(NamedTuple):
    """The tokens that stay, as `select_tokens` returns them.

    Attributes:
        indices: int64 `[T']`, source row of each kept row, ascending; -1 on tail rows.
        cu_seqlens: int32 `[B + 1]`, offsets of the kept sequences.
        max_seqlen: upper bound of the kept lengths; exact if the CPU knows the lengths.
        inverse: int32 `[T]`, kept row of each source row; -1 if it was dropped.
        total_source: T, the number of source rows.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    inverse: Tensor
    total_source: int


def rows_of_result(total_kept: int | None) -> Any:
    """For a fake kernel: None, the number that the op finds out when it runs, becomes a symbol."""
    return torch.library.get_ctx().new_dynamic_size() if total_kept is None else total_kept


def _fake(
    importance: Tensor, cu_seqlens: Tensor, max_seqlen: int, budget: BudgetArguments
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        importance.new_empty(rows_of_result(budget.total_kept), dtype=torch.int64),
        cu_seqlens.new_empty(cu_seqlens.shape[0]),
        importance.new_empty(importance.shape[0], dtype=torch.int32),
    )


@imported_once
def _triton() -> Callable[..., Any]:
    from stamp_kernels.triton_kernels.pruning.selection import select_tokens  # imports Triton

    return select_tokens


_select_tokens = define_op(
    "select_tokens(Tensor importance, Tensor cu_seqlens, SymInt max_seqlen, int? ratio_q32, SymInt? keep_count, "
    "Tensor? keep_counts, SymInt min_keep, Tensor? protect, int codes_per_item, SymInt? total_kept) "
    "-> (Tensor, Tensor, Tensor)",
    check=_boundary.check_select_tokens,
    reference=reference.select_tokens,
    triton=_triton,
    fake=_fake,
    groups=(BudgetArguments,),
)


def select_tokens(
    importance: Tensor,  # [T] floating
    cu_seqlens: Tensor,  # [B + 1] int32 or int64
    max_seqlen: int,
    *,
    keep_ratio: float | None = None,
    keep_count: int | Tensor | None = None,
    min_keep: int = 1,
    protect: Tensor | None = None,  # [T] bool
    total_kept: int | None = None,
    lengths_cpu: Tensor | None = None,  # [B] integers on the CPU
    num_protected: int | Tensor | None = None,
    budget: BudgetOf = "sequence",
    codes_per_item: int | None = None,
) -> TokenSelection:
    """Choose the most important tokens of every sequence, in their original order, without a host sync.

    A sequence with p protected tokens and n others keeps the protected ones and the `min(n, max(min_keep, budget))`
    most important others. Protected tokens do not count toward the budget, so a history is pruned alike with and
    without its labels. Higher importance comes first, then the lower index; -0.0 equals 0.0 and NaN comes after
    -inf. No gradient flows through the choice (arXiv 2604.05329, section SAP).

    With codes_per_item the tokens of an item (all codes of its semantic ID) are kept or dropped together. The
    importance of an item is the sum over its tokens, an item is protected if one of its tokens is, and keep_ratio,
    keep_count, min_keep and num_protected count items. All other arguments and the result count tokens.

    Args:
        importance: `[T]`, any floating dtype. Rows from `cu_seqlens[-1]` on are tail rows and never chosen.
        cu_seqlens: int32 or int64 `[B + 1]`, offsets of the sequences, on the same device.
        max_seqlen: the longest length, or an upper bound. On a GPU only lengths_cpu checks it, and the rows of a longer
            sequence may stay unwritten.
        keep_ratio: budget `ceil(keep_ratio * n)`, in [0, 1]. Exactly one of keep_ratio and keep_count must be given.
            The ratio is rounded to a multiple of 2^-32, and an excess over a whole number of up to n * 2^-32 does not
            count, so that a third of 3 is 1 on every device. A ratio below 2^-33 is 0. torch.compile specialises on
            its value: give a keep_count if it changes from step to step.
        keep_count: the budget itself: one int, or an integer tensor `[B]` on the same device.
        min_keep: smallest budget of a sequence that has as many tokens.
        protect: bool `[T]`, tokens that always stay.
        total_kept: T', if the caller knows how many tokens stay (or an upper bound: the rest become tail rows).
        lengths_cpu: the lengths on the CPU, from which T' is computed exactly.
        num_protected: the number of protected tokens, if the CPU knows it: their total (or an upper bound), or `[B]`
            numbers on the CPU.
        budget: `"sequence"`, or `"max_seqlen"` to take the ratio of max_seqlen for every sequence, as padded
            implementations do.
        codes_per_item: tokens of an item. None: every token is an item. A sequence must consist of whole items; where
            contents are not checked, tokens after its last whole item are dropped.

    Returns:
        TokenSelection. T' is total_kept if that is given. Outside torch.compile it is exact if cu_seqlens is on the
        CPU, and with lengths_cpu unless keep_count is a tensor (with `[B]` num_protected if protect is given).
        Otherwise it is the capacity `min(T, floor(keep_ratio * T) + B * max(1, min_keep) + num_protected)`; for one
        count (or budget="max_seqlen") `min(T, B * max(count, min_keep) + num_protected)`; and T for counts on the
        device or if num_protected is needed and unknown (all in items: T tokens are `T // codes_per_item` items). The
        rows past `selection.cu_seqlens[-1]` are tail rows with index -1.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: contents are wrong (on the CPU, or under STAMP_KERNELS_CHECK=1): cu_seqlens does not rise from 0
            to at most T, a sequence is longer than max_seqlen or not whole items, a keep_count is negative,
            lengths_cpu or num_protected disagrees with the tensors, or more tokens stay than total_kept.
    """
    check_tensor("importance", importance, shape=["total"], dtypes=FLOATING_DTYPES)
    total, max_seqlen = importance.shape[0], check_count("max_seqlen", max_seqlen)
    cu_seqlens = checked_cu_seqlens("cu_seqlens", cu_seqlens, importance.device)
    options = KeepOptions(
        keep_ratio, keep_count, min_keep, protect, total_kept, lengths_cpu, num_protected, budget, codes_per_item
    )
    resolved = resolve_budget(total, cu_seqlens, max_seqlen, options, importance.device)
    importance = importance.detach()
    if reference_is_forced():
        selected = reference.select_tokens(importance, cu_seqlens, max_seqlen, resolved.arguments)
    else:
        selected = _select_tokens(importance, cu_seqlens, max_seqlen, *resolved.arguments)
    indices, cu_seqlens_kept, inverse = selected
    max_kept, _ = resolved.kept_lengths(cu_seqlens_kept)
    return TokenSelection(indices, cu_seqlens_kept, max_kept, inverse, total)
