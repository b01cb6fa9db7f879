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
from stamp_kernels.triton_kernels.device import DeviceProperties, device_properties, launch_grid
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
    """Gradients of hidden, weight and bias, in their shapes, None where not needed. No host sync.

    Those of hidden and weight are in fp32 where they are sums of splits and in `dtype` otherwise; that of bias is in
    fp32.

    Args:
        softmaxes: of at least one row.
        lse: fp32 `[K, N]`, of the forward.
        scale: the gradient of a row's loss of a step, fp32 `[N, K]`, or `[K]` where all rows have the same.
        options: without vocab_ranges, of which the softmaxes have theirs.
        dtype: that of the hidden states, or fp32 for gradients that are scaled later.
    """
    properties = device_properties(softmaxes.hidden.device)
    arguments = softmaxes.arguments()
    terms = _row_terms(softmaxes, arguments, lists, lse, scale, options)
    arguments |= dict(
        terms=terms,
        lists=lists,
        num_softmaxes=softmaxes.num_softmaxes,
        softcap=options.softcap,
        PLAIN=softmaxes.steps_per_softmax == 1 and options.label_smoothing == 0 and options.z_loss == 0,
    )
    dhidden = _hidden_gradient(softmaxes, arguments, properties, dtype) if needs.need_hidden else None
    dweight = dbias = None
    if needs.need_weight or needs.need_bias:
        dweight, dbias = _weight_gradients(softmaxes, arguments, properties, needs, dtype)
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
    num_entries = num_blocks * ENTRIES_PER_PROGRAM.value
    of_steps = (softmaxes.num_steps, num_entries)
    is_capped = options.softcap is not None
    row_lse, factor, offset = lse.new_empty((3, softmaxes.num_softmaxes, num_entries)).unbind()
    target_factor = lse.new_empty(of_steps)
    terms = RowTerms(
        lse=row_lse,
        factor=factor,
        offset=offset,
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
        targets=softmaxes.targets,
        scale=PerStep(scale, 0 if scale.dim() == 1 else scale.stride(0), scale.stride(-1)),
        lists=lists,
        loss_options=options,
        **arguments if is_capped else arguments | dict(hidden=None, classes=None, stride_hidden_step=0),
        BLOCK=ENTRIES_PER_PROGRAM.value,
        BLOCK_K=min(64, max(16, next_power_of_2(softmaxes.width))) if is_capped else 16,
        num_warps=8,
        maxnreg=255,  # otherwise ptxas stays at 128 for a second program on a multiprocessor, and spills 8 or 16 bytes
    )
    return terms


def _hidden_gradient(
    softmaxes: Softmaxes, arguments: dict[str, Any], properties: DeviceProperties, dtype: torch.dtype
) -> Tensor:
    hidden, width, layout = softmaxes.hidden, softmaxes.width, arguments["layout"]
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
    dhidden = _memory_for_gradient(hidden, layout.width, splits, dtype)
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
    return _gradient_in(dhidden, hidden)


def _weight_gradients(
    softmaxes: Softmaxes,
    arguments: dict[str, Any],
    properties: DeviceProperties,
    needs: LossNeeds,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    weight, width, num_classes = softmaxes.weight, softmaxes.width, softmaxes.num_classes
    has_all_classes = softmaxes.has_all_classes
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
        dweight = _memory_for_gradient(weight, arguments["layout"].width, splits, dtype)
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
        dweight = _gradient_in(dweight, weight)
    if dbias is not None:
        dbias = dbias.sum(0 if softmaxes.bias.dim() == 2 else (0, 1))
    return dweight, dbias


def _memory_for_gradient(x: Tensor, width: int, splits: int, dtype: torch.dtype) -> Tensor:
    """For the gradient of x, with `width` features a row, or for several splits of it, in fp32."""
    shape = (*x.shape[:-1], width)
    return x.new_empty(shape, dtype=dtype) if splits == 1 else x.new_empty((splits, *shape), dtype=torch.float32)


def _gradient_in(memory: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, in the shape of x."""
    gradient = memory if memory.dim() == x.dim() else memory.sum(0)
    return gradient if gradient.shape == x.shape else gradient[..., : x.shape[-1]]
