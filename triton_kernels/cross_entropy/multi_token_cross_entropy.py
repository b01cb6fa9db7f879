"""The ops of the multi-token cross-entropy on a GPU: which kernels serve them.

The forward and the backward never write logits (`forward.py`, `backward.py`). The op that makes the gradients with the
loss works on row chunks of logits (`chunked.py`), or calls those two where there are few logits.
"""

import itertools

import torch
from torch import Tensor

from stamp_kernels.common.arguments import LossNeeds, LossOptions, StepWeights
from stamp_kernels.common.contents import check_targets_contents
from stamp_kernels.common.steps import REDUCTIONS, step_ranges
from stamp_kernels.triton_kernels.cross_entropy.backward import backward
from stamp_kernels.triton_kernels.cross_entropy.chunked import with_gradients
from stamp_kernels.triton_kernels.cross_entropy.configs import MIN_LOGITS_IN_CHUNKS
from stamp_kernels.triton_kernels.cross_entropy.forward import forward
from stamp_kernels.triton_kernels.cross_entropy.row_lists import list_rows
from stamp_kernels.triton_kernels.cross_entropy.softmaxes import Softmaxes, softmaxes_of


def multi_token_cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    step_weights: StepWeights,
    options: LossOptions,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `stamp::multi_token_cross_entropy_forward`: (loss, step_losses, step_scale, lse). No host sync."""
    softmaxes = _checked_softmaxes(hidden, weight, targets, bias, options)
    weights = _weights_on_device(step_weights, hidden.device)
    lists = list_rows(softmaxes, options.ignore_index)
    return forward(softmaxes, lists, weights, options._replace(vocab_ranges=None), reduction)


def multi_token_cross_entropy_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    step_scale: Tensor,
    options: LossOptions,
    needs: LossNeeds,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `stamp::multi_token_cross_entropy_backward`: gradients of hidden, weight and bias. No host sync."""
    ranges = step_ranges(options.vocab_ranges, targets.shape[1], weight.shape[-2])
    softmaxes = softmaxes_of(hidden, weight, targets, bias, ranges)
    inputs = (hidden, weight, weight if bias is None else bias)
    if softmaxes.num_rows == 0:
        return tuple(x.new_zeros(x.shape if is_needed else 0) for x, is_needed in zip(inputs, needs, strict=True))
    scale = grad_loss if step_scale.shape[0] == 0 else grad_loss * step_scale
    lists = list_rows(softmaxes, options.ignore_index)
    options = options._replace(vocab_ranges=None)
    grads = backward(softmaxes, lists, lse, scale, options, needs, dtype=hidden.dtype)
    return tuple(_as_returned(grad, x, x.dtype) for grad, x in zip(grads, inputs, strict=True))


def multi_token_cross_entropy_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    step_weights: StepWeights,
    options: LossOptions,
    reduction: int,
    needs: LossNeeds,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `stamp::multi_token_cross_entropy_with_gradients`: (loss, step_losses, gradients in fp32). No host sync.

    The gradients wait for that of the loss, which scales them: rounded before, they could underflow in fp16.
    """
    softmaxes = _checked_softmaxes(hidden, weight, targets, bias, options)
    weights = _weights_on_device(step_weights, hidden.device)
    options = options._replace(vocab_ranges=None)
    inputs = (hidden, weight, weight if bias is None else bias)
    if 0 < softmaxes.num_rows * softmaxes.widest_range < MIN_LOGITS_IN_CHUNKS:
        lists = list_rows(softmaxes, options.ignore_index)
        loss, step_losses, step_scale, lse = forward(softmaxes, lists, weights, options, reduction)
        grads = backward(softmaxes, lists, lse, step_scale, options, needs, dtype=torch.float32)
    else:
        loss, step_losses, *grads = _in_chunks(softmaxes, weights, options, reduction, needs)
    returned = (_as_returned(grad, x, torch.float32) for grad, x in zip(grads, inputs, strict=True))
    return loss, step_losses, *returned


def _in_chunks(
    softmaxes: Softmaxes, step_weights: Tensor | None, options: LossOptions, reduction: int, needs: LossNeeds
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(loss, step_losses, gradients) by row chunks of logits."""
    targets = softmaxes.targets.ptr
    scale = torch.ones(softmaxes.num_steps, dtype=torch.float32, device=targets.device)
    if reduction == REDUCTIONS["mean"]:
        scale = scale / (targets != options.ignore_index).sum(dim=0).clamp(min=1)
    weighted_scale = scale if step_weights is None else scale * step_weights.to(torch.float32)
    losses, *grads = with_gradients(softmaxes, weighted_scale, options, needs)
    sums = losses.sum(dim=1)
    return (sums * weighted_scale).sum(), sums * scale, *grads


def _checked_softmaxes(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: LossOptions
) -> Softmaxes:
    ranges = step_ranges(options.vocab_ranges, targets.shape[1], weight.shape[-2])
    check_targets_contents(targets, ranges, options.ignore_index)
    return softmaxes_of(hidden, weight, targets, bias, ranges)


def _weights_on_device(step_weights: StepWeights, device: torch.device) -> Tensor | None:
    if step_weights.step_weights_tensor is not None:
        return step_weights.step_weights_tensor.contiguous()
    if step_weights.step_weights is None:
        return None
    # Filled on the device, one run of equal weights at a time. A copy from the CPU would wait for the device, and
    # cached copies would pile up where the weights change from step to step.
    weights = torch.empty(len(step_weights.step_weights), dtype=torch.float32, device=device)
    start = 0
    for weight, equal_ones in itertools.groupby(step_weights.step_weights):
        end = start + len(list(equal_ones))
        weights[start:end].fill_(weight)
        start = end
    return weights


def _as_returned(grad: Tensor | None, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of x as the ops return it: in `dtype`, contiguous, and empty where not needed."""
    return x.new_empty(0, dtype=dtype) if grad is None else grad.to(dtype).contiguous()
