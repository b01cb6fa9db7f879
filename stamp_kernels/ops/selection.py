"""Selection: which tokens of each packed sequence stay, and the gather of their rows."""

import math

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.ops._autograd import without_repeats
from stamp_kernels.ops._checks import (
    FLOATING_DTYPES,
    check_choice,
    check_count,
    check_cu_seqlens,
    check_range,
    check_tensor,
)
from stamp_kernels.ops._library import define_op
from stamp_kernels.reference import selection as reference
from stamp_kernels.reference._contents import check_cu_seqlens_contents, contents_are_checked
from stamp_kernels.reference.selection import TokenSelection


def _select_tokens_fake(
    importance, cu_seqlens, max_seqlen, ratio_q32, keep_count, keep_counts, min_keep, protect, total_kept
):
    return (
        importance.new_empty(total_kept, dtype=torch.int64),
        cu_seqlens.new_empty(cu_seqlens.shape[0]),
        importance.new_empty(importance.shape[0], dtype=torch.int32),
    )


_select_tokens = define_op(
    "select_tokens(Tensor importance, Tensor cu_seqlens, SymInt max_seqlen, int? ratio_q32, SymInt? keep_count, "
    "Tensor? keep_counts, SymInt min_keep, Tensor? protect, SymInt total_kept) -> (Tensor, Tensor, Tensor)",
    public_name="select_tokens",
    reference=reference.select_tokens,
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
) -> TokenSelection:
    """Choose the most important tokens of every sequence, in their original order, without a host sync.

    A sequence with p protected tokens and n others keeps the protected ones and the `min(n, max(min_keep, budget))`
    most important others. Protected tokens stand outside the budget, so that a history is pruned alike with and
    without its labels. Higher importance comes first, then the lower index; -0.0 equals 0.0 and NaN comes after
    -inf. No gradient flows through the choice (arXiv 2604.05329, section SAP).

    Args:
        importance: `[T]`, any floating dtype. Rows from `cu_seqlens[-1]` on are tail rows and never chosen.
        cu_seqlens: int32 `[B + 1]`, offsets of the sequences, on the same device.
        max_seqlen: the longest length, or an upper bound of it.
        keep_ratio: budget `ceil(keep_ratio * n)`, in [0, 1]. Exactly one of keep_ratio and keep_count must be given.
        keep_count: the budget itself: one int, or an integer tensor `[B]` on the same device.
        min_keep: least budget of a sequence that has so many tokens.
        protect: bool `[T]`, tokens that always stay.
        total_kept: T', when the caller knows how many tokens stay (or an upper bound: the rest become tail rows).
        lengths_cpu: the lengths on the host, from which T' is computed exactly.
        num_protected: what is known on the host of the protected tokens: their total (or more), or `[B]` numbers on
            the CPU.
        budget: `"sequence"`, or `"max_seqlen"` to take the ratio of max_seqlen for every sequence, as padded
            implementations do.

    Returns:
        TokenSelection. T' is exact with total_kept, with lengths_cpu (and `[B]` num_protected where protect is given)
        and when cu_seqlens is on the CPU (outside torch.compile). Otherwise it is the capacity
        `floor(keep_ratio * T) + B * max(1, min_keep) + num_protected`, for one count (or budget="max_seqlen")
        `min(T, B * max(count, min_keep) + num_protected)`, and T for counts on the device or where num_protected is
        needed and unknown; the rows past `selection.cu_seqlens[-1]` are tail rows with index -1.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: contents are wrong (on the CPU, or under STAMP_KERNELS_CHECK=1): cu_seqlens is not a rising
            sequence from 0 to at most T, a sequence is longer than max_seqlen, a keep_count is negative, lengths_cpu or
            num_protected is not what the tensors say, or more tokens stay than total_kept.
    """
    check_tensor("importance", importance, shape=["total"], dtypes=FLOATING_DTYPES)
    device = importance.device
    total = importance.shape[0]
    check_cu_seqlens("cu_seqlens", cu_seqlens, device)
    check_count("max_seqlen", max_seqlen)
    batch = cu_seqlens.shape[0] - 1
    check_choice("budget", budget, ("sequence", "max_seqlen"))
    if (keep_ratio is None) == (keep_count is None):
        raise ValueError(f"exactly one of keep_ratio and keep_count must be given, got {keep_ratio} and {keep_count}")
    if keep_ratio is not None:
        check_range("keep_ratio", keep_ratio, 0.0, 1.0)
        # torch.compile(dynamic=True) makes floats symbolic, and such a symbol cannot be part of a size: hashing it
        # guards on its value.
        hash(keep_ratio)
    elif isinstance(keep_count, Tensor):
        check_tensor("keep_count", keep_count, shape=[batch], dtypes=[torch.int32, torch.int64], device=device)
    else:
        check_count("keep_count", keep_count)
    if budget == "max_seqlen" and keep_ratio is None:
        raise ValueError('budget="max_seqlen" goes with keep_ratio, got keep_count')
    check_count("min_keep", min_keep)
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
    ratio_q32 = None if keep_ratio is None else reference.keep_ratio_to_q32(keep_ratio)
    if budget == "max_seqlen":
        ratio_q32, count = None, reference.ceil_of_ratio(ratio_q32, max_seqlen)

    kept = _kept_lengths_on_host(
        cu_seqlens, total, max_seqlen, ratio_q32, count, keep_counts, min_keep, protect, lengths_cpu, num_protected
    )
    if kept is not None:
        max_kept = int(kept.max()) if batch > 0 else 0
        if total_kept is None:
            total_kept = int(kept.sum())
    else:
        max_kept = _max_kept(max_seqlen, ratio_q32, count, min_keep, protect, num_protected)
        if total_kept is None:
            total_kept = _capacity(total, batch, keep_ratio, count, min_keep, protect, num_protected)

    select = reference.select_tokens if reference_is_forced() else _select_tokens
    indices, cu_seqlens_kept, inverse = select(
        importance.detach(), cu_seqlens, max_seqlen, ratio_q32, count, keep_counts, min_keep, protect, total_kept
    )
    return TokenSelection(indices, cu_seqlens_kept, max_kept, inverse, total)


def _kept_lengths_on_host(
    cu_seqlens: Tensor,
    total: int,
    max_seqlen: int,
    ratio_q32: int | None,
    keep_count: int | None,
    keep_counts: Tensor | None,
    min_keep: int,
    protect: Tensor | None,
    lengths_cpu: Tensor | None,
    num_protected: int | Tensor | None,
) -> Tensor | None:
    """int64 `[B]` kept lengths, where everything that decides them is on the host; None elsewhere.

    torch.compile cannot turn tensor contents into sizes, so compiled code gets None.
    """
    if torch.compiler.is_compiling():
        return None
    if keep_counts is not None and keep_counts.device.type != "cpu":
        return None
    if contents_are_checked(cu_seqlens.device):
        lengths, protected = _lengths_and_protected(cu_seqlens, total, max_seqlen, protect)
        if lengths_cpu is not None and not torch.equal(lengths_cpu.to(torch.int64), lengths):
            raise RuntimeError("lengths_cpu must be the lengths that cu_seqlens gives, and is not")
        if num_protected is not None and not _agrees(num_protected, protected):
            raise RuntimeError("num_protected must be the tokens that protect marks in the sequences, and is not")
    if cu_seqlens.device.type != "cpu":
        if lengths_cpu is None or not (protect is None or isinstance(num_protected, Tensor)):
            return None
        lengths = lengths_cpu.to(torch.int64)
        protected = torch.zeros_like(lengths) if num_protected is None else num_protected.to(torch.int64)
    return reference.kept_lengths(
        lengths,
        protected,
        ratio_q32=ratio_q32,
        keep_count=keep_count,
        keep_counts=keep_counts,
        min_keep=min_keep,
    )


def _lengths_and_protected(
    cu_seqlens: Tensor, total: int, max_seqlen: int, protect: Tensor | None
) -> tuple[Tensor, Tensor]:
    """int64 `[B]` lengths and protected tokens of the sequences, on the host."""
    check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total, max_seqlen)
    offsets = cu_seqlens.cpu().to(torch.int64)
    if protect is None:
        return offsets.diff(), torch.zeros_like(offsets[1:])
    protected_before = torch.nn.functional.pad(protect.cpu().cumsum(0), (1, 0))
    return offsets.diff(), protected_before[offsets].diff()


def _agrees(num_protected: int | Tensor, protected: Tensor) -> bool:
    """A total may be too high, which costs tail rows; what gives each sequence its size must be exact."""
    if isinstance(num_protected, Tensor):
        return torch.equal(num_protected.to(torch.int64), protected)
    return num_protected >= int(protected.sum())


def _protected_on_host(protect: Tensor | None, num_protected: int | Tensor | None) -> int | None:
    """How many tokens are protected in all, None where only the device knows."""
    if protect is None:
        return 0
    if isinstance(num_protected, Tensor):
        return None if torch.compiler.is_compiling() else int(num_protected.sum())
    return num_protected


def _capacity(
    total: int,
    batch: int,
    keep_ratio: float | None,
    keep_count: int | None,
    min_keep: int,
    protect: Tensor | None,
    num_protected: int | Tensor | None,
) -> int:
    """An upper bound of the kept tokens that depends on nothing the device alone knows."""
    protected = _protected_on_host(protect, num_protected)
    if protected is None:
        return total
    if keep_count is not None:
        return torch.sym_min(total, batch * torch.sym_max(min_keep, keep_count) + protected)
    if keep_ratio is not None:
        return math.floor(keep_ratio * total) + batch * max(1, min_keep) + protected
    return total


def _max_kept(
    max_seqlen: int,
    ratio_q32: int | None,
    keep_count: int | None,
    min_keep: int,
    protect: Tensor | None,
    num_protected: int | Tensor | None,
) -> int:
    """An upper bound of the longest kept sequence."""
    protected = _protected_on_host(protect, num_protected)
    if protected is None or (ratio_q32 is None and keep_count is None):
        return max_seqlen
    budget = keep_count if ratio_q32 is None else reference.ceil_of_ratio(ratio_q32, max_seqlen)
    return torch.sym_min(max_seqlen, torch.sym_max(min_keep, budget) + protected)


def _gather_rows_fake(x, indices):
    return [tensor.new_empty(indices.shape[0], *tensor.shape[1:]) for tensor in x]


def _gather_rows_reference(x, indices):
    return [reference.gather_rows(tensor, indices) for tensor in x]


_gather_tokens_forward = define_op(
    "gather_tokens_forward(Tensor[] x, Tensor indices) -> Tensor[]",
    public_name="gather_tokens",
    reference=_gather_rows_reference,
    fake=_gather_rows_fake,
)
# The adjoint gathers too: row t of the gradient is row inverse[t] of what arrives, so nothing is added up.
_gather_tokens_backward = define_op(
    "gather_tokens_backward(Tensor[] grad, Tensor inverse) -> Tensor[]",
    public_name="gather_tokens",
    reference=_gather_rows_reference,
    fake=_gather_rows_fake,
)


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, indices: Tensor, inverse: Tensor, *x: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inverse)
        outputs = _gather_tokens_forward(list(x), indices)
        # One tensor that requires grad does not make the others differentiable.
        wanted = ctx.needs_input_grad[2:]
        ctx.mark_non_differentiable(*(y for y, needs_grad in zip(outputs, wanted, strict=True) if not needs_grad))
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        wanted = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[2 + i]]
        grad_x: list[Tensor | None] = [None] * len(grads)
        if wanted:
            for i, grad in zip(wanted, _gather_tokens_backward([grads[i] for i in wanted], inverse), strict=True):
                grad_x[i] = grad
        return None, None, *grad_x


def gather_tokens(x: Tensor | list[Tensor], selection: TokenSelection) -> Tensor | list[Tensor]:
    """Take the rows that a selection keeps, of one tensor or of many in one launch.

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
    tensors = [x] if isinstance(x, Tensor) else list(x)
    if not tensors:
        raise ValueError("x must be a tensor or a non-empty list of tensors, got an empty list")
    check_tensor("selection.indices", selection.indices, shape=["kept"], dtypes=[torch.int64])
    device = selection.indices.device
    check_tensor(
        "selection.inverse", selection.inverse, shape=[selection.total_source], dtypes=[torch.int32], device=device
    )
    for i, tensor in enumerate(tensors):
        name = "x" if isinstance(x, Tensor) else f"x[{i}]"
        check_tensor(name, tensor, device=device)
        if tensor.dim() == 0 or tensor.shape[0] != selection.total_source:
            raise ValueError(
                f"{name} must have {selection.total_source} rows (selection.total_source), "
                f"got shape {list(tensor.shape)}"
            )
    if reference_is_forced():
        return reference.gather_tokens(x, selection)
    outputs = _GatherTokens.apply(selection.indices, selection.inverse, *without_repeats(*tensors))
    return outputs[0] if isinstance(x, Tensor) else list(outputs)
