"""Multi-token cross-entropy, backward, with the logits computed again: what is allocated and launched."""

from typing import Any

import torch
from torch import Tensor

from stamp_kernels.common.arguments import LossNeeds, LossOptions
from stamp_kernels.triton_kernels.cross_entropy.backward_kernels import (
    ENTRIES_PER_PROGRAM,
    RowTerms,
    stamp_cross_entropy_bwd_hidden_kernel,
    stamp_cross_entropy_bwd_row_terms_kernel,
    stamp_cross_entropy_bwd_weight_kernel,
)
from stamp_kernels.triton_kernels.cross_entropy.configs import (
    hidden_gradient_config,
    num_splits,
    weight_gradient_config,
)
from stamp_kernels.triton_kernels.cross_entropy.softmaxes import Softmaxes
from stamp_kernels.triton_kernels.cross_entropy.tiles import PerStep, RowLists
from stamp_kernels.triton_kernels.device import device_properties, launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.rows import ceil_div, next_power_of_2


def backward(
    softmaxes: Softmaxes,
    lists: RowLists,
    lse: Tensor,
    scale: Tensor,
    options: LossOptions,
    needs: LossNeeds,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, `[num_hidden, N, D]` and so on, None where not needed. No host sync.

    Those of hidden and weight are in fp32 where they are sums of splits and in `dtype` otherwise; that of bias is in
    fp32.

    Args:
        softmaxes: of at least one row.
        lse: fp32 `[K, N]`, of the forward.
        scale: the gradient of a row's loss of a step, fp32 `[N, K]`, or `[K]` where all rows have the same.
        dtype: that of the hidden states, or fp32 for gradients that are scaled later.
    """
    of_softmaxes = softmaxes.arguments()
    arguments = dict(
        **of_softmaxes,
        terms=_row_terms(softmaxes, of_softmaxes, lists, lse, scale, options),
        lists=lists,
        num_softmaxes=softmaxes.num_softmaxes,
        softcap=options.softcap,
        PLAIN=softmaxes.steps_per_softmax == 1 and options.label_smoothing == 0 and options.z_loss == 0,
    )
    dhidden = _hidden_gradient(softmaxes, arguments, dtype) if needs.need_hidden else None
    dweight = dbias = None
    if needs.need_weight or needs.need_bias:
        dweight, dbias = _weight_gradients(softmaxes, arguments, needs, dtype)
    return dhidden, dweight, dbias


def _row_terms(
    softmaxes: Softmaxes,
    arguments: dict[str, Any],
    lists: RowLists,
    lse: Tensor,
    scale: Tensor,
    options: LossOptions,
) -> RowTerms:
    num_blocks = ceil_div(softmaxes.num_rows, ENTRIES_PER_PROGRAM.value)
    of_softmaxes = (softmaxes.num_softmaxes, num_blocks * ENTRIES_PER_PROGRAM.value)
    of_steps = (softmaxes.num_steps, num_blocks * ENTRIES_PER_PROGRAM.value)
    is_capped = options.softcap is not None
    target_factor = lse.new_empty(of_steps)
    terms = RowTerms(
        lse=lse.new_empty(of_softmaxes),
        factor=lse.new_empty(of_softmaxes),
        offset=lse.new_empty(of_softmaxes),
        target=lse.new_empty(of_steps, dtype=torch.int32),
        target_factor=target_factor,
        target_slope=lse.new_empty(of_steps) if is_capped else target_factor,
        unit=torch.linalg.vector_norm(scale, ord=torch.inf),
    )
    launch(
        stamp_cross_entropy_bwd_row_terms_kernel,
        launch_grid(num_blocks, softmaxes.num_softmaxes),
        terms=terms,
        lse_ptr=lse,
        targets=softmaxes.target_argument(),
        scale=PerStep(scale, 0 if scale.dim() == 1 else scale.stride(0), scale.stride(-1)),
        lists=lists,
        loss_options=options._replace(vocab_ranges=None),
        **arguments if is_capped else arguments | dict(hidden=None, classes=None, stride_hidden_step=0),
        BLOCK=ENTRIES_PER_PROGRAM.value,
        BLOCK_K=min(64, max(16, next_power_of_2(softmaxes.width))) if is_capped else 16,
        num_warps=8,
        maxnreg=255,  # otherwise ptxas stays at 128 for a second program on a multiprocessor, and spills 8 or 16 bytes
    )
    return terms


def _hidden_gradient(softmaxes: Softmaxes, arguments: dict[str, Any], dtype: torch.dtype) -> Tensor:
    hidden, width, layout = softmaxes.hidden, softmaxes.width, arguments["layout"]
    properties = device_properties(hidden.device)
    config = hidden_gradient_config(
        properties, width, element_size=hidden.element_size(), has_one_softmax=softmaxes.has_hidden_per_step
    )
    is_wide = width > config.block_d
    if properties.capability[0] == 9 and not (is_wide and arguments["softcap"] is not None):
        # Inside a loop over softmaxes, even over one, the loop over classes is shorter: 248 instructions, not 257, at
        # width 128, and 84, not 100, at 512. On sm_86 and sm_100 that spills, and with a cap above width 256.
        layout = layout._replace(hidden_per_step=softmaxes.num_hidden > 1)
    row_tiles, feature_blocks = ceil_div(softmaxes.num_rows, config.block_n), ceil_div(width, config.block_d)
    splits = num_splits(
        row_tiles * feature_blocks * softmaxes.num_hidden,
        ceil_div(softmaxes.widest_range, config.block_v),
        properties,
    )
    shape = (splits, softmaxes.num_hidden, softmaxes.num_rows, layout.width)
    dhidden = hidden.new_empty(shape, dtype=_dtype_of_splits(splits, dtype))
    launch(
        stamp_cross_entropy_bwd_hidden_kernel,
        launch_grid(row_tiles, softmaxes.num_hidden, splits * feature_blocks),
        **arguments | dict(layout=layout),
        dhidden_ptr=dhidden,
        tile=config.tile,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=255 if properties.capability[0] == 8 else None,  # as for the row terms
    )
    return _sum_of_splits(dhidden)[..., :width]


def _weight_gradients(
    softmaxes: Softmaxes, arguments: dict[str, Any], needs: LossNeeds, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    weight, width, num_classes = softmaxes.weight, softmaxes.width, softmaxes.num_classes
    properties = device_properties(weight.device)
    has_all_classes = all(span == (0, num_classes) for span in softmaxes.ranges)
    config = weight_gradient_config(
        properties,
        width,
        element_size=weight.element_size(),
        has_bias=needs.need_bias,
        has_ranges=not has_all_classes,
    )
    class_tiles, feature_blocks = ceil_div(num_classes, config.block_v), ceil_div(width, config.block_d)
    splits = num_splits(
        class_tiles * feature_blocks * softmaxes.num_weights,
        ceil_div(softmaxes.num_rows, config.block_n),
        properties,
    )
    dweight = dbias = None
    if needs.need_weight:
        shape = (splits, softmaxes.num_weights, num_classes, arguments["layout"].width)
        dweight = weight.new_empty(shape, dtype=_dtype_of_splits(splits, dtype))
    if needs.need_bias:
        dbias = weight.new_empty((splits, softmaxes.num_softmaxes, num_classes), dtype=torch.float32)
    launch(
        stamp_cross_entropy_bwd_weight_kernel,
        launch_grid(class_tiles, softmaxes.num_weights, splits * feature_blocks),
        **arguments,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        num_classes=num_classes,
        WEIGHT_PER_STEP=softmaxes.num_weights > 1,
        ALL_CLASSES=has_all_classes,
        tile=config.tile,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if dweight is not None:
        dweight = _sum_of_splits(dweight)[..., :width]
    if dbias is not None:
        dbias = dbias.sum(0 if softmaxes.bias.dim() == 2 else (0, 1))
    return dweight, dbias


def _dtype_of_splits(splits: int, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient's splits: `dtype` where there is one, fp32 where several are added up."""
    return dtype if splits == 1 else torch.float32


def _sum_of_splits(x: Tensor) -> Tensor:
    return x[0] if len(x) == 1 else x.sum(0)
