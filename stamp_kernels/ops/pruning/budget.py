"""How many tokens of each sequence stay: checks of the caller's arguments, and what the CPU knows of the result.

The arithmetic is in `common.budget`.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from stamp_kernels.common.arguments import BudgetArguments
from stamp_kernels.common.budget import ceil_of_ratio, keep_ratio_to_q32, kept_items
from stamp_kernels.common.contents import check_cu_seqlens_contents, check_whole_items, contents_are_checked
from stamp_kernels.ops._checks import check_choice, check_count, check_range, check_tensor

BudgetOf = Literal["sequence", "max_seqlen"]

_INTEGERS = (torch.int32, torch.int64)
_CPU = torch.device("cpu")


class KeepOptions(NamedTuple):
    """The arguments of `select_tokens` and `prune` that say how much stays, under the same names."""

    keep_ratio: float | None
    keep_count: int | Tensor | None
    min_keep: int
    protect: Tensor | None
    total_kept: int | None
    lengths_cpu: Tensor | None
    num_protected: int | Tensor | None
    budget: BudgetOf
    codes_per_item: int | None


class ResolvedBudget(NamedTuple):
    """What the ops are given, and what the CPU knows of their result.

    Attributes:
        arguments: as the ops take them. total_kept is None if the op, which then runs on the CPU, finds it out.
        max_kept: upper bound of the kept lengths in tokens, if total_kept is not None.
        lengths_cpu: int64 `[B]` kept lengths in tokens, if they are known before the op runs.
    """

    arguments: BudgetArguments
    max_kept: int | None = None
    lengths_cpu: Tensor | None = None

    def kept_lengths(self, cu_seqlens_kept: Tensor) -> tuple[int, Tensor | None]:
        """(max_seqlen of the kept sequences, their lengths int64 `[B]` if the CPU knows them)."""
        if self.max_kept is not None:
            return self.max_kept, self.lengths_cpu
        lengths = cu_seqlens_kept.diff().to(torch.int64)
        return (int(lengths.max()) if lengths.numel() > 0 else 0), lengths


def sizes_are_on_host(cu_seqlens: Tensor) -> bool:
    """Whether the op itself sizes its result by the lengths; torch.compile cannot turn contents into sizes."""
    return cu_seqlens.device == _CPU and not torch.compiler.is_compiling()


def resolve_budget(
    total: int, cu_seqlens: Tensor, max_seqlen: int, options: KeepOptions, device: torch.device
) -> ResolvedBudget:
    """Check the arguments, except cu_seqlens, and size the result without a sync.

    Raises:
        ValueError, RuntimeError: as `select_tokens` says.
    """
    num_sequences = cu_seqlens.shape[0] - 1
    options = _checked_options(options, total, num_sequences, device)

    keep_ratio = options.keep_ratio
    if keep_ratio is not None:
        # torch.compile(dynamic=True) makes floats symbolic, and such a symbol cannot be part of a size. As the key of a
        # dict it becomes a number, with a guard on its value; hash() would do, but torch 2.11 cannot trace it.
        (keep_ratio,) = {keep_ratio: None}
    keep_counts = options.keep_count if isinstance(options.keep_count, Tensor) else None
    keep_count = None if isinstance(options.keep_count, Tensor) else options.keep_count
    ratio_q32: int | None = None if keep_ratio is None else keep_ratio_to_q32(keep_ratio)
    codes_per_item = 1 if options.codes_per_item is None else options.codes_per_item
    max_items = max_seqlen // codes_per_item
    if options.budget == "max_seqlen":
        assert ratio_q32 is not None
        keep_count, ratio_q32 = ceil_of_ratio(ratio_q32, max_items), None
    arguments = BudgetArguments(
        ratio_q32, keep_count, keep_counts, options.min_keep, options.protect, codes_per_item, options.total_kept
    )

    _check_claims(total, cu_seqlens, max_seqlen, options, codes_per_item)
    if sizes_are_on_host(cu_seqlens):
        return ResolvedBudget(arguments)
    if _lengths_decide(options):
        return _resolved_by_lengths(arguments, max_seqlen, options)
    num_protected = _total_protected(options)
    max_kept = codes_per_item * _max_kept_items(arguments, max_items, num_protected)
    if options.total_kept is None:
        capacity = _capacity(arguments, total // codes_per_item, num_sequences, num_protected)
        arguments = arguments._replace(total_kept=codes_per_item * capacity)
    return ResolvedBudget(arguments, max_kept)


def _checked_options(options: KeepOptions, total: int, num_sequences: int, device: torch.device) -> KeepOptions:
    keep_ratio, keep_count, num_protected = options.keep_ratio, options.keep_count, options.num_protected
    check_choice("budget", options.budget, ("sequence", "max_seqlen"))
    if (keep_ratio is None) == (keep_count is None):
        raise ValueError(f"exactly one of keep_ratio and keep_count must be given, got {keep_ratio} and {keep_count}")
    if keep_ratio is not None:
        keep_ratio = check_range("keep_ratio", keep_ratio, 0.0, 1.0)
    elif isinstance(keep_count, Tensor):
        check_tensor("keep_count", keep_count, shape=[num_sequences], dtypes=_INTEGERS, device=device)
    else:
        keep_count = check_count("keep_count", keep_count)
    if options.budget == "max_seqlen" and keep_ratio is None:
        raise ValueError('budget="max_seqlen" goes with keep_ratio, got keep_count')
    if options.protect is not None:
        check_tensor("protect", options.protect, shape=[total], dtypes=[torch.bool], device=device)
    if options.lengths_cpu is not None:
        check_tensor("lengths_cpu", options.lengths_cpu, shape=[num_sequences], dtypes=_INTEGERS, device=_CPU)
    if isinstance(num_protected, Tensor):
        check_tensor("num_protected", num_protected, shape=[num_sequences], dtypes=_INTEGERS, device=_CPU)
    elif num_protected is not None:
        num_protected = check_count("num_protected", num_protected)
    if num_protected is not None and options.protect is None:
        raise ValueError("num_protected goes with protect, which is None")
    codes_per_item = options.codes_per_item
    return options._replace(
        keep_ratio=keep_ratio,
        keep_count=keep_count,
        num_protected=num_protected,
        min_keep=check_count("min_keep", options.min_keep),
        total_kept=None if options.total_kept is None else check_count("total_kept", options.total_kept),
        codes_per_item=None if codes_per_item is None else check_count("codes_per_item", codes_per_item, minimum=1),
    )


def _lengths_decide(options: KeepOptions) -> bool:
    """Whether the CPU can compute every sequence's kept length."""
    return (
        options.lengths_cpu is not None
        and not isinstance(options.keep_count, Tensor)
        and (options.protect is None or isinstance(options.num_protected, Tensor))
        and not torch.compiler.is_compiling()
    )


def _resolved_by_lengths(arguments: BudgetArguments, max_seqlen: int, options: KeepOptions) -> ResolvedBudget:
    lengths, num_protected = options.lengths_cpu, options.num_protected
    assert lengths is not None
    codes_per_item, lengths = arguments.codes_per_item, lengths.to(torch.int64)
    num_items = lengths if codes_per_item == 1 else lengths // codes_per_item
    kept = kept_items(arguments, num_items, num_protected.to(torch.int64) if isinstance(num_protected, Tensor) else 0)
    kept = kept if codes_per_item == 1 else codes_per_item * kept
    longest, total_kept = (int(lengths.max()), int(kept.sum())) if lengths.numel() > 0 else (0, 0)
    # These checks read only CPU memory. Without them a wrong length would leave rows on the device unwritten.
    if longest > max_seqlen:
        raise RuntimeError(f"lengths_cpu has a length {longest}, more than max_seqlen {max_seqlen}")
    if options.total_kept is not None and total_kept > options.total_kept:
        raise RuntimeError(f"total_kept is {options.total_kept}, but the sequences keep {total_kept} tokens")
    if options.total_kept is None:
        arguments = arguments._replace(total_kept=total_kept)
    return ResolvedBudget(arguments, int(kept.max()) if kept.numel() > 0 else 0, kept)


def _check_claims(total: int, cu_seqlens: Tensor, max_seqlen: int, options: KeepOptions, codes_per_item: int) -> None:
    """lengths_cpu and num_protected agree with the tensors (RuntimeError), where contents are checked."""
    lengths_cpu, num_protected = options.lengths_cpu, options.num_protected
    if (lengths_cpu is None and num_protected is None) or not contents_are_checked(cu_seqlens.device):
        return
    if cu_seqlens.device.type != "cpu":  # an op on the CPU checks them itself
        check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total, max_seqlen)
    offsets = cu_seqlens.cpu().to(torch.int64)
    if lengths_cpu is not None and not torch.equal(lengths_cpu.to(torch.int64), offsets.diff()):
        raise RuntimeError("lengths_cpu must be the lengths that cu_seqlens gives, and is not")
    if num_protected is None or options.protect is None:
        return
    check_whole_items(cu_seqlens, codes_per_item)
    num_items = total // codes_per_item  # every sequence begins at a multiple of codes_per_item
    items = options.protect[: num_items * codes_per_item].cpu().view(num_items, codes_per_item).any(1)
    protected_before = torch.nn.functional.pad(items.cumsum(0), (1, 0))
    protected = protected_before[offsets // codes_per_item].diff()
    # A total may be too high, which costs tail rows. The numbers of single sequences decide sizes and must be exact.
    if isinstance(num_protected, Tensor):
        agrees = torch.equal(num_protected.to(torch.int64), protected)
    else:
        protected = protected.sum()
        agrees = num_protected >= int(protected)
    if not agrees:
        what = "tokens" if codes_per_item == 1 else "items"
        given = num_protected.tolist() if isinstance(num_protected, Tensor) else num_protected
        raise RuntimeError(
            f"num_protected must be the {what} that protect marks in the sequences, {protected.tolist()}, got {given}"
        )


def _total_protected(options: KeepOptions) -> int | None:
    """Protected items of all sequences. None: the CPU does not know."""
    if options.protect is None:
        return 0
    if isinstance(options.num_protected, Tensor):
        return None if torch.compiler.is_compiling() else int(options.num_protected.sum())
    return options.num_protected


def _capacity(budget: BudgetArguments, num_items: int, num_sequences: int, num_protected: int | None) -> int:
    """An upper bound of the kept items that needs nothing from the device.

    In integers: the product of a float and a quotient of sizes makes torch.compile guard on the remainder. One unit
    more than the ratio, which may have been rounded down, so that a third of 3 is 1.
    """
    if num_protected is None:
        return num_items
    if budget.keep_count is not None:
        most = num_sequences * torch.sym_max(budget.min_keep, budget.keep_count) + num_protected
        return torch.sym_min(num_items, most)
    if budget.ratio_q32 is not None:
        most = ((budget.ratio_q32 + 1) * num_items >> 32) + num_sequences * max(1, budget.min_keep) + num_protected
        return torch.sym_min(num_items, most)
    return num_items


def _max_kept_items(budget: BudgetArguments, max_items: int, num_protected: int | None) -> int:
    """An upper bound of the kept items of each sequence."""
    if num_protected is None or budget.keep_counts is not None:
        return max_items
    most = budget.keep_count if budget.ratio_q32 is None else ceil_of_ratio(budget.ratio_q32, max_items)
    return torch.sym_min(max_items, torch.sym_max(budget.min_keep, most) + num_protected)
