"""The ops of the cross-entropy on a GPU: what they allocate, and which kernels serve them.

The forward and the backward never write logits (`cross_entropy_forward`, `cross_entropy_backward`); the op that makes
gradients with the loss works by chunks of logits (`cross_entropy_chunked`), or by those two where there are few.
"""

import itertools

import torch
from torch import Tensor

from stamp_kernels.common.arguments import LossNeeds, LossOptions, StepWeights
from stamp_kernels.common.contents import check_targets_contents
from stamp_kernels.common.steps import REDUCTIONS, step_ranges
from stamp_kernels.triton_kernels.cross_entropy.backward import backward
from stamp_kernels.triton_kernels.cross_entropy.chunked import with_gradients
from stamp_kernels.triton_kernels.cross_entropy.forward import forward
from stamp_kernels.triton_kernels.cross_entropy.tiles import Softmaxes, list_rows, softmaxes_of

# In a pass over fewer logits than this launches are all that counts, and the chunked way has more of them.
MIN_LOGITS_IN_CHUNKS = 2**20


def _weights_on_device(step_weights: StepWeights, device: torch.device) -> Tensor | None:
    if step_weights.step_weights_tensor is not None:
        return step_weights.step_weights_tensor.contiguous()
    if step_weights.step_weights is None:
        return None
    # Filled on the device, a run of equal weights at a time: a copy from the host would wait for the device, and one
    # that was kept would pile up where weights change from step to step.
    weights = torch.empty(len(step_weights.step_weights), dtype=torch.float32, device=device)
    start = 0
    for weight, equal_ones in itertools.groupby(step_weights.step_weights):
        end = start + len(list(equal_ones))
        weights[start:end].fill_(weight)
        start = end
    return weights


def _given(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient as the ops return it: in the shape and dtype of what it belongs to, or empty where not needed."""
    return like.new_empty(0) if grad is None else grad.to(like.dtype).contiguous().view(like.shape)


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
    softmaxes = _checked(hidden, weight, targets, bias, options)
    weights = _weights_on_device(step_weights, hidden.device)
    lists = list_rows(softmaxes, options.ignore_index)
    return forward(softmaxes, lists, weights, *options[1:], reduction)


def _checked(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: LossOptions) -> Softmaxes:
    ranges = step_ranges(options.vocab_ranges, targets.shape[1], weight.shape[-2])
    check_targets_contents(targets, ranges, options.ignore_index)
    return softmaxes_of(hidden, weight, targets, bias, ranges)


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
    likes = (hidden, weight, weight if bias is None else bias)
    if softmaxes.num_rows == 0:
        return tuple(x.new_zeros(x.shape if is_needed else 0) for x, is_needed in zip(likes, needs, strict=True))
    scale = grad_loss if step_scale.shape[0] == 0 else grad_loss * step_scale
    grads = backward(softmaxes, list_rows(softmaxes, options.ignore_index), lse, scale, *options[1:], *needs)
    return tuple(map(_given, grads, likes))


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
    """The op `stamp::multi_token_cross_entropy_with_gradients`: (loss, step_losses, gradients). No host sync."""
    softmaxes = _checked(hidden, weight, targets, bias, options)
    weights = _weights_on_device(step_weights, hidden.device)
    likes = (hidden, weight, weight if bias is None else bias)
    if 0 < softmaxes.num_rows * softmaxes.widest_range < MIN_LOGITS_IN_CHUNKS:
        lists = list_rows(softmaxes, options.ignore_index)
        loss, step_losses, step_scale, lse = forward(softmaxes, lists, weights, *options[1:], reduction)
        grads = backward(softmaxes, lists, lse, step_scale, *options[1:], *needs)
        return loss, step_losses, *map(_given, grads, likes)
    scale = torch.ones(targets.shape[1], dtype=torch.float32, device=targets.device)
    if reduction == REDUCTIONS["mean"]:
        scale = scale / (targets != options.ignore_index).sum(dim=0).clamp(min=1)
    weighted_scale = scale if weights is None else scale * weights.to(torch.float32)
    losses, *grads = with_gradients(softmaxes, weighted_scale, *options[1:], *needs)
    sums = losses.sum(dim=1)
    return (sums * weighted_scale).sum(), sums * scale, *map(_given, grads, likes)
