"""The checks before the cross-entropy's Triton launchers and reference kernels, see `ops._boundary`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stamp_kernels.common.arguments import LossNeeds, LossOptions, StepWeights
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.common.steps import REDUCTIONS
from stamp_kernels.ops._boundary import (
    FLOATING,
    INT64,
    Shape,
    check_at_least,
    check_cu_seqlens,
    check_num_rows,
    check_tensor,
    refuse,
)

_LABELS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_MIN_FLOAT32, _MAX_FLOAT32 = 2.0**-149, torch.finfo(torch.float32).max


def check_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    step_weights: StepWeights,
    options: LossOptions,
    reduction: int,
) -> None:
    """What `stamp::multi_token_cross_entropy_forward` takes."""
    _check_shared(hidden, weight, targets, bias, options)
    _check_step_weights(step_weights, targets)
    if reduction not in REDUCTIONS.values():
        refuse(f"reduction must be 0 (none), 1 (mean) or 2 (sum), got {reduction}")


def check_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    step_scale: Tensor,
    options: LossOptions,
    needs: LossNeeds,
) -> None:
    """What `stamp::multi_token_cross_entropy_backward` takes."""
    _check_shared(hidden, weight, targets, bias, options)
    num_rows, num_steps = targets.shape
    device = targets.device
    check_tensor("step_scale", step_scale, ("K or 0",), FLOATING, device)
    num_scales = step_scale.shape[0]
    if num_scales not in (0, num_steps):
        refuse(f"step_scale must have one entry for each of the {num_steps} steps, or none, got {num_scales}")
    check_tensor("grad_loss", grad_loss, () if num_scales > 0 else targets.shape, FLOATING, device)
    check_tensor("lse", lse, (num_steps, num_rows), (compute_dtype(hidden.dtype),), device)
    _check_needs(needs, bias)


def check_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    step_weights: StepWeights,
    options: LossOptions,
    reduction: int,
    needs: LossNeeds,
) -> None:
    """What `stamp::multi_token_cross_entropy_with_gradients` takes."""
    _check_shared(hidden, weight, targets, bias, options)
    _check_step_weights(step_weights, targets)
    if reduction not in (REDUCTIONS["mean"], REDUCTIONS["sum"]):
        refuse(f"reduction must be 1 (mean) or 2 (sum) for gradients in the forward pass, got {reduction}")
    _check_needs(needs, bias)


def check_shift_targets(labels: Tensor, cu_seqlens: Tensor, steps: int, stride: int, ignore_index: int) -> None:
    """What `stamp::shift_targets` takes."""
    check_tensor("labels", labels, ("total",), _LABELS, labels.device)
    check_num_rows("labels", labels.shape[0])
    check_cu_seqlens("cu_seqlens", cu_seqlens, labels.device)
    check_at_least("steps", steps, 1)
    check_at_least("stride", stride, 1)


def _check_shared(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: LossOptions) -> None:
    device = targets.device
    check_tensor("targets", targets, ("N", "K"), INT64, device)
    num_rows, num_steps = targets.shape
    check_num_rows("targets", num_rows)
    if num_steps == 0:
        refuse(f"targets must have at least one step (column), got shape {list(targets.shape)}")
    _check_per_step("hidden", hidden, num_steps, (num_rows, "D"), FLOATING, device)
    _check_per_step("weight", weight, num_steps, ("V", hidden.shape[-1]), (hidden.dtype,), device)
    num_classes = weight.shape[-2]
    if num_classes == 0:
        refuse(f"weight must have at least one class (row), got shape {list(weight.shape)}")
    if bias is not None:
        _check_per_step("bias", bias, num_steps, (num_classes,), FLOATING, device)
    vocab_ranges, _, label_smoothing, z_loss, softcap = options
    if vocab_ranges is not None:
        _check_ranges(vocab_ranges, num_steps, num_classes)
    is_float64 = hidden.dtype == torch.float64
    largest = math.inf if is_float64 else _MAX_FLOAT32
    if not 0.0 <= label_smoothing <= 1.0:
        refuse(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not 0.0 <= z_loss <= largest or math.isinf(z_loss):
        refuse(f"z_loss must be in [0, inf), got {z_loss}")
    if softcap is not None:
        smallest = 0.0 if is_float64 else _MIN_FLOAT32
        if not (0.0 < softcap < math.inf and smallest <= softcap <= largest):
            refuse(f"softcap must be in (0, inf) in the compute dtype, got {softcap}")


def _check_per_step(
    name: str, x: Tensor, num_steps: int, shape: Shape, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """`x` is one tensor of `shape` for all steps, or `[num_steps, *shape]`."""
    check_tensor(name, x, shape if x.dim() <= len(shape) else (num_steps, *shape), dtypes, device)


def _check_ranges(vocab_ranges: Sequence[int], num_steps: int, num_classes: int) -> None:
    if len(vocab_ranges) != 2 * num_steps:
        refuse(
            f"vocab_ranges must have a start and an end for each of the {num_steps} steps, got {len(vocab_ranges)} "
            "numbers"
        )
    for start, end in zip(vocab_ranges[::2], vocab_ranges[1::2], strict=True):
        if not 0 <= start < end <= num_classes:
            refuse(
                f"vocab_ranges must satisfy 0 <= start < end <= {num_classes} (rows of weight), got ({start}, {end})"
            )


def _check_step_weights(step_weights: StepWeights, targets: Tensor) -> None:
    floats, tensor = step_weights
    num_steps = targets.shape[1]
    if floats is not None and tensor is not None:
        refuse("at most one of step_weights and step_weights_tensor may be given")
    if floats is not None and len(floats) != num_steps:
        refuse(f"step_weights must have one weight for each of the {num_steps} steps, got {len(floats)}")
    if tensor is not None:
        check_tensor("step_weights_tensor", tensor, (num_steps,), FLOATING, targets.device)


def _check_needs(needs: LossNeeds, bias: Tensor | None) -> None:
    if needs.need_bias and bias is None:
        refuse("need_bias needs a bias")
