"""Multi-token cross-entropy, forward: what is allocated and launched."""

import torch
from torch import Tensor

from stamp_kernels.common.arguments import LossOptions
from stamp_kernels.common.steps import REDUCTIONS
from stamp_kernels.triton_kernels.cross_entropy.configs import CLASSES_PER_SPLIT, forward_config
from stamp_kernels.triton_kernels.cross_entropy.forward_kernels import (
    ForwardOutputs,
    stamp_cross_entropy_fwd_combine_kernel,
    stamp_cross_entropy_fwd_kernel,
    stamp_cross_entropy_fwd_reduce_kernel,
)
from stamp_kernels.triton_kernels.cross_entropy.softmaxes import Softmaxes
from stamp_kernels.triton_kernels.cross_entropy.tiles import RowLists
from stamp_kernels.triton_kernels.device import device_properties, launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.rows import ceil_div


def forward(
    softmaxes: Softmaxes, lists: RowLists, step_weights: Tensor | None, options: LossOptions, reduction: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, step_losses, step_scale, lse), as the op `stamp::multi_token_cross_entropy_forward` returns them.

    Two or three launches, and the zeros of rows without a target. No host sync.

    Args:
        options: without vocab_ranges, of which the softmaxes have theirs.
    """
    hidden, num_rows, num_steps = softmaxes.hidden, softmaxes.num_rows, softmaxes.num_steps
    config = forward_config(device_properties(hidden.device), softmaxes.width, element_size=hidden.element_size())
    num_tiles = ceil_div(num_rows, config.block_n)
    num_splits = ceil_div(softmaxes.widest_range, CLASSES_PER_SPLIT)
    is_reduced = reduction != REDUCTIONS["none"]
    lse = hidden.new_zeros((num_steps, num_rows), dtype=torch.float32)
    partials_shape = (3, softmaxes.num_softmaxes, num_splits, num_rows)
    out = ForwardOutputs(
        loss_sums=lse.new_empty((num_steps, num_tiles)),
        counts=lse.new_empty((num_steps, num_tiles), dtype=torch.int32),
        losses=None if is_reduced else lse.new_zeros((num_rows, num_steps)),
        lse=lse,
        partials=lse.new_empty(partials_shape) if num_splits > 1 else None,
    )
    if num_tiles > 0:
        arguments = softmaxes.arguments() | dict(
            out=out, targets=softmaxes.targets, lists=lists, loss_options=options, tile=config.tile
        )
        launch(
            stamp_cross_entropy_fwd_kernel,
            launch_grid(num_tiles, softmaxes.num_softmaxes, num_splits),
            **arguments,
            SUM_LOGITS=options.label_smoothing > 0,
            CLASSES_PER_SPLIT=CLASSES_PER_SPLIT,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if num_splits > 1:
            # Without maxnreg the compiler spills to get 80 registers a thread on sm_86 and sm_100.
            launch(
                stamp_cross_entropy_fwd_combine_kernel,
                launch_grid(num_tiles, softmaxes.num_softmaxes),
                **arguments,
                num_splits=num_splits,
                num_warps=8,
                maxnreg=128,
            )
    if not is_reduced:
        return out.losses, lse.new_empty(0), lse.new_empty(0), lse
    loss, step_losses, step_scale = lse.new_empty(()), lse.new_empty(num_steps), lse.new_empty(num_steps)
    launch(
        stamp_cross_entropy_fwd_reduce_kernel,
        launch_grid(1),
        loss_ptr=loss,
        step_losses_ptr=step_losses,
        step_scale_ptr=step_scale,
        loss_sums_ptr=out.loss_sums,
        counts_ptr=out.counts,
        step_weights_ptr=step_weights,
        num_steps=num_steps,
        num_tiles=num_tiles,
        MEAN=reduction == REDUCTIONS["mean"],
        BLOCK=512,
        num_warps=4,
    )
    return loss, step_losses, step_scale, lse
