"""The targets of multi-step prediction."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.ops._checks import check_count, check_int, check_tensor, checked_cu_seqlens
from stamp_kernels.ops._library import define_op, imported_once
from stamp_kernels.ops.cross_entropy import _boundary
from stamp_kernels.reference import cross_entropy as reference

_INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _fake(labels: Tensor, cu_seqlens: Tensor, steps: int, stride: int, ignore_index: int) -> Tensor:
    return labels.new_empty((labels.shape[0], steps), dtype=torch.int64)


@imported_once
def _triton() -> Callable[..., Any]:
    from stamp_kernels.triton_kernels.cross_entropy.shift_targets import shift_targets  # imports Triton

    return shift_targets


_shift_targets = define_op(
    "shift_targets(Tensor labels, Tensor cu_seqlens, int steps, int stride, int ignore_index) -> Tensor",
    check=_boundary.check_shift_targets,
    reference=reference.shift_targets,
    triton=_triton,
    fake=_fake,
)


def shift_targets(
    labels: Tensor,  # [T] integers
    cu_seqlens: Tensor,  # [B + 1] int32 or int64
    *,
    steps: int,
    stride: int = 1,
    ignore_index: int = -100,
) -> Tensor:
    """The targets of multi-step prediction: for every row the labels `stride, 2 stride, ..., steps * stride` ahead.

    Targets never cross into the next sequence. With semantic IDs of L codes, stride 1 predicts the next tokens and
    stride L the same level of the next items. Shift before pruning and prune the targets with the states, so that a
    kept token keeps its true targets: `packed, selection, targets = prune(packed, centrality, targets=targets)` with a
    SemanticAdaptivePruning, or `gather_tokens(targets, selection, fill_value=ignore_index)`.

    Args:
        labels: `[T]`, any integer dtype, one label per row (not shifted: row t's own token). A label equal to
            ignore_index stays ignored.
        cu_seqlens: int32 or int64 `[B + 1]`, offsets of the sequences, on the same device.
        steps: K, how many labels ahead.
        stride: rows from one step to the next.
        ignore_index: the target past the end of a sequence and on tail rows.

    Returns:
        int64 `[T, steps]`; column k - 1 is step k.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: cu_seqlens does not rise from 0 to at most T (on the CPU, or under STAMP_KERNELS_CHECK=1).

    Example:
        >>> shift_targets(torch.tensor([1, 2, 3, 7, 8]), torch.tensor([0, 3, 5], dtype=torch.int32), steps=2)
        tensor([[   2,    3],
                [   3, -100],
                [-100, -100],
                [   8, -100],
                [-100, -100]])
    """
    check_tensor("labels", labels, shape=["T"], dtypes=_INTEGER_DTYPES)
    cu_seqlens = checked_cu_seqlens("cu_seqlens", cu_seqlens, labels.device)
    ignore_index = check_int("ignore_index", ignore_index)
    steps, stride = check_count("steps", steps, 1), check_count("stride", stride, 1)
    shift = reference.shift_targets if reference_is_forced() else _shift_targets
    targets: Tensor = shift(labels, cu_seqlens, steps, stride, ignore_index)
    return targets
