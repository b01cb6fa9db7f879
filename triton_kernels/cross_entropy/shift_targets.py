"""Targets of multi-step prediction: the labels ahead of every row, within its sequence.

    targets[t, k - 1] = labels[t + k * step_stride]

From the end of the sequence of t on, targets are ignore_index.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.contents import check_cu_seqlens_contents
from stamp_kernels.triton_kernels.device import launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.rows import ceil_div, sequence_ends

_BLOCK = 256


@triton.jit(do_not_specialize=["stride_label", "num_sequences", "total", "num_steps", "step_stride", "ignore_index"])
def stamp_shift_targets_kernel(
    targets_ptr,  # int64 [T, num_steps]
    labels_ptr,  # integers [T]
    cu_seqlens_ptr,  # int32 [B + 1]
    stride_label,
    num_sequences,
    total,
    num_steps,
    step_stride,  # rows from one step to the next, at most T
    ignore_index,
    BLOCK: tl.constexpr,
):
    """All targets of BLOCK rows.

    Grid: [ceil(T / BLOCK)].
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = row < tl.load(cu_seqlens_ptr + num_sequences)
    end = sequence_ends(row, is_token, cu_seqlens_ptr, num_sequences)
    ahead = row.to(tl.int64)
    for step in range(num_steps):
        ahead += step_stride
        inside = is_token & (ahead < end)
        label = tl.load(labels_ptr + ahead * stride_label, mask=inside, other=0).to(tl.int64)
        pointers = targets_ptr + row.to(tl.int64) * num_steps + step
        tl.store(pointers, tl.where(inside, label, ignore_index), mask=row < total)


def shift_targets(labels: Tensor, cu_seqlens: Tensor, steps: int, stride: int, ignore_index: int) -> Tensor:
    """The op `stamp::shift_targets`: int64 `[T, steps]`. One launch, no host sync."""
    total = labels.shape[0]
    check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total)
    targets = labels.new_empty((total, steps), dtype=torch.int64)
    if total > 0:
        launch(
            stamp_shift_targets_kernel,
            launch_grid(ceil_div(total, _BLOCK)),
            targets_ptr=targets,
            labels_ptr=labels,
            cu_seqlens_ptr=cu_seqlens.contiguous(),
            stride_label=labels.stride(0),
            num_sequences=cu_seqlens.shape[0] - 1,
            total=total,
            num_steps=steps,
            step_stride=min(stride, total),
            ignore_index=ignore_index,
            BLOCK=_BLOCK,
            num_warps=4,
        )
    return targets
