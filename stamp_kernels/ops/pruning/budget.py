"""How much of every sequence stays: checks of what the caller says, and what of it is known on the host."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stamp_kernels.common.arguments import BudgetArguments
from stamp_kernels.common.budget import ceil_of_ratio, keep_ratio_to_q32, kept_items
from stamp_kernels.common.contents import check_cu_seqlens_contents, check_whole_items, contents_are_checked
from stamp_kernels.ops._checks import check_choice, check_count, check_cu_seqlens, check_range, check_tensor


class ResolvedBudget(NamedTuple):
    """What the ops that select are given, and what the CPU knows of their result.

    Attributes:
        arguments: as the ops take them; total_kept is None where the op, which runs on the CPU, is to find out.
        max_kept: upper bound of the kept lengths in tokens, where total_kept is not None.
        lengths_cpu: int64 `[B]` kept lengths in tokens, where they are known before the op runs.
    """

    arguments: BudgetArguments
    max_kept: int | None = None
    lengths_cpu: Tensor | None = None

    def kept_lengths(self, cu_seqlens_kept: Tensor) -> tuple[int, Tensor | None]:
        """(max_seqlen of the kept sequences, their lengths int64 `[B]` where they are known on the CPU)."""
        if self.max_kept is not None:
            return self.max_kept, self.lengths_cpu
        lengths = cu_seqlens_kept.diff().to(torch.int64)
        return (int(lengths.max()) if lengths.numel() > 0 else 0), lengths


def sizes_are_on_host(cu_seqlens: Tensor) -> bool:
    """Whether an op can size its result by the lengths; torch.compile cannot turn contents into sizes."""
    return cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()


def resolve_budget(
    device: torch.device,
    total: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    keep_ratio: float | None,
    keep_count: int | Tensor | None,
    min_keep: int,
    protect: Tensor | None,
    codes_per_item: int,
    total_kept: int | None,
    lengths_cpu: Tensor | None,
    num_protected: int | Tensor | None,
    budget: str,
) -> ResolvedBudget:
    """Check the arguments of `select_tokens` other than importance, and size its result without a sync.

    Raises:
        ValueError, RuntimeError: as `select_tokens` says.
    """
    check_cu_seqlens("cu_seqlens", cu_seqlens, device)
    check_count("max_seqlen", max_seqlen)
    batch = cu_seqlens.shape[0] - 1
    check_choice("budget", budget, ("sequence", "max_seqlen"))
    if (keep_ratio is None) == (keep_count is None):
        raise ValueError(f"exactly one of keep_ratio and keep_count must be given, got {keep_ratio} and {keep_count}")
    if keep_ratio is not None:
        if not isinstance(keep_ratio, int | float | torch.SymFloat):
            raise ValueError(f"keep_ratio must be a number (not a tensor), got {type(keep_ratio).__name__}")
        check_range("keep_ratio", keep_ratio, 0.0, 1.0)
        # torch.compile(dynamic=True) makes floats symbolic, and such a symbol cannot be part of a size. As the key of a
        # dict it becomes a number, with a guard on its value; hash() would do, but torch 2.11 cannot trace it.
        (keep_ratio,) = {keep_ratio: None}
    elif isinstance(keep_count, Tensor):
        check_tensor("keep_count", keep_count, shape=[batch], dtypes=[torch.int32, torch.int64], device=device)
    else:
        check_count("keep_count", keep_count)
    if budget == "max_seqlen" and keep_ratio is None:
        raise ValueError('budget="max_seqlen" goes with keep_ratio, got keep_count')
    check_count("min_keep", min_keep)
    check_count("codes_per_item", codes_per_item, minimum=1)
    if protect is not None:
        check_tensor("protect", protect, shape=[total], dtypes=[torch.bool], device=device)
    host = torch.device("cpu")
    if lengths_cpu is not None:
        check_tensor("lengths_cpu", lengths_cpu, shape=[batch], dtypes=[torch.int32, torch.int64], device=host)
    if isinstance(num_protected, Tensor):
        check_tensor("num_protected", num_protected, shape=[batch], dtypes=[torch.int32, torch.int64], device=host)
    elif num_protected is not None:
        check_count("num_protected", num_protected)
    if num_protected is not None and protect is None:
        raise ValueError("num_protected goes with protect, which is None")
    if total_kept is not None:
        check_count("total_kept", total_kept)

    keep_counts = keep_count if isinstance(keep_count, Tensor) else None
    count = None if isinstance(keep_count, Tensor) else keep_count
    ratio_q32 = None if keep_ratio is None else keep_ratio_to_q32(keep_ratio)
    max_items = max_seqlen // codes_per_item
    if budget == "max_seqlen":
        ratio_q32, count = None, ceil_of_ratio(ratio_q32, max_items)

    _check_what_the_host_claims(total, cu_seqlens, max_seqlen, protect, codes_per_item, lengths_cpu, num_protected)
    arguments = BudgetArguments(ratio_q32, count, keep_counts, min_keep, protect, codes_per_item, total_kept)
    if sizes_are_on_host(cu_seqlens):
        return ResolvedBudget(arguments)
    protected_is_known = protect is None or isinstance(num_protected, Tensor)
    kept = None
    if lengths_cpu is not None and keep_counts is None and protected_is_known and not torch.compiler.is_compiling():
        kept = codes_per_item * kept_items(
            arguments,
            lengths_cpu.to(torch.int64) // codes_per_item,
            num_protected.to(torch.int64) if isinstance(num_protected, Tensor) else 0,
        )
        # What is known on the host costs nothing to check, and would otherwise leave rows unwritten on the device.
        if batch > 0 and int(lengths_cpu.max()) > max_seqlen:
            raise RuntimeError(f"lengths_cpu has a length {int(lengths_cpu.max())}, more than max_seqlen {max_seqlen}")
        if total_kept is not None and int(kept.sum()) > total_kept:
            raise RuntimeError(f"total_kept is {total_kept}, but the sequences keep {int(kept.sum())} tokens")
        max_kept = int(kept.max()) if batch > 0 else 0
        if total_kept is None:
            total_kept = int(kept.sum())
    else:
        protected = _total_protected(protect, num_protected)
        max_kept = codes_per_item * _max_kept_items(max_items, ratio_q32, count, min_keep, protected)
        if total_kept is None:
            num_items = total // codes_per_item
            total_kept = codes_per_item * _capacity(num_items, batch, keep_ratio, count, min_keep, protected)
    return ResolvedBudget(arguments._replace(total_kept=total_kept), max_kept, kept)


def _check_what_the_host_claims(
    total: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    protect: Tensor | None,
    codes_per_item: int,
    lengths_cpu: Tensor | None,
    num_protected: int | Tensor | None,
) -> None:
    """lengths_cpu and num_protected are what the tensors say (RuntimeError), where contents are checked."""
    if (lengths_cpu is None and num_protected is None) or not contents_are_checked(cu_seqlens.device):
        return
    if cu_seqlens.device.type != "cpu":  # an op on the CPU checks them itself
        check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total, max_seqlen)
    offsets = cu_seqlens.cpu().to(torch.int64)
    if lengths_cpu is not None and not torch.equal(lengths_cpu.to(torch.int64), offsets.diff()):
        raise RuntimeError("lengths_cpu must be the lengths that cu_seqlens gives, and is not")
    if num_protected is None:
        return
    check_whole_items(cu_seqlens, codes_per_item)
    num_items = total // codes_per_item  # every sequence begins at a multiple of codes_per_item
    items = protect[: num_items * codes_per_item].cpu().unflatten(0, (num_items, codes_per_item)).any(1)
    protected_before = torch.nn.functional.pad(items.cumsum(0), (1, 0))
    protected = protected_before[offsets // codes_per_item].diff()
    # A total may be too high, which costs tail rows; what gives each sequence its size must be exact.
    if isinstance(num_protected, Tensor):
        agrees = torch.equal(num_protected.to(torch.int64), protected)
    else:
        agrees = num_protected >= int(protected.sum())
    if not agrees:
        what = "tokens" if codes_per_item == 1 else "items"
        raise RuntimeError(f"num_protected must be the {what} that protect marks in the sequences, and is not")


def _total_protected(protect: Tensor | None, num_protected: int | Tensor | None) -> int | None:
    """Protected items of the whole batch, None where the host does not know."""
    if protect is None:
        return 0
    if isinstance(num_protected, Tensor):
        return None if torch.compiler.is_compiling() else int(num_protected.sum())
    return num_protected


def _capacity(
    num_items: int,
    batch: int,
    keep_ratio: float | None,
    keep_count: int | None,
    min_keep: int,
    num_protected: int | None,
) -> int:
    """An upper bound of the kept items that depends on nothing the device alone knows."""
    if num_protected is None:
        return num_items
    if keep_count is not None:
        return torch.sym_min(num_items, batch * torch.sym_max(min_keep, keep_count) + num_protected)
    if keep_ratio is not None:
        return torch.sym_min(num_items, math.floor(keep_ratio * num_items) + batch * max(1, min_keep) + num_protected)
    return num_items


def _max_kept_items(
    max_items: int, ratio_q32: int | None, keep_count: int | None, min_keep: int, num_protected: int | None
) -> int:
    """An upper bound of the kept items of any sequence."""
    if num_protected is None or (ratio_q32 is None and keep_count is None):
        return max_items
    budget = keep_count if ratio_q32 is None else ceil_of_ratio(ratio_q32, max_items)
    return torch.sym_min(max_items, torch.sym_max(min_keep, budget) + num_protected)
