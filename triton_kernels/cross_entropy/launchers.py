"""The ops of the cross-entropy on a GPU: what they allocate, and which kernels serve them.

The forward and the backward never write logits (`cross_entropy_forward`, `cross_entropy_backward`); the op that makes
gradients with the loss works by chunks of logits (`cross_entropy_chunked`), or by those two where there are few.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from stamp_kernels.common.contents import check_targets_contents
from stamp_kernels.common.steps import REDUCTIONS, step_ranges
from stamp_kernels.triton_kernels.cross_entropy.backward import backward
from stamp_kernels.triton_kernels.cross_entropy.chunked import with_gradients
from stamp_kernels.triton_kernels.cross_entropy.forward import forward
from stamp_kernels.triton_kernels.cross_entropy.tiles import Softmaxes, list_rows, softmaxes_of

# In a pass over fewer logits than this launches are all that counts, and the chunked way has more of them.
MIN_LOGITS_IN_CHUNKS = 2**20


def _weights_on_device(
    step_weights: Sequence[float] | None, step_weights_tensor: Tensor | None, device: torch.device
) -> Tensor | None:
    if step_weights is None:
        return None if step_weights_tensor is None else step_weights_tensor.contiguous()
    # Filled on the device, a run of equal weights at a time: a copy from the host would wait for the device, and one
    # that was kept would pile up where weights change from step to step.
    weights = torch.empty(len(step_weights), dtype=torch.float32, device=device)
    start = 0
    for weight, equal_ones in itertools.groupby(step_weights):
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
    step_weights: Sequence[float] | None,
    step_weights_tensor: Tensor | None,
    vocab_ranges: Sequence[int] | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `stamp::multi_token_cross_entropy_forward`: (loss, step_losses, step_scale, lse). No host sync."""
    softmaxes = _checked(hidden, weight, targets, bias, vocab_ranges, ignore_index)
    weights = _weights_on_device(step_weights, step_weights_tensor, hidden.device)
    lists = list_rows(softmaxes, ignore_index)
    return forward(softmaxes, lists, weights, ignore_index, label_smoothing, z_loss, softcap, reduction)


def _checked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    vocab_ranges: Sequence[int] | None,
    ignore_index: int,
) -> Softmaxes:
    ranges = step_ranges(vocab_ranges, targets.shape[1], weight.shape[-2])
    check_targets_contents(targets, ranges, ignore_index)
    return softmaxes_of(hidden, weight, targets, bias, ranges)


def multi_token_cross_entropy_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    step_scale: Tensor,
    vocab_ranges: Sequence[int] | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op `stamp::multi_token_cross_entropy_backward`: gradients of hidden, weight and bias. No host sync."""
    ranges = step_ranges(vocab_ranges, targets.shape[1], weight.shape[-2])
    softmaxes = softmaxes_of(hidden, weight, targets, bias, ranges)
    if softmaxes.num_rows == 0:
        needs = ((hidden, need_hidden), (weight, need_weight), (weight if bias is None else bias, need_bias))
        return tuple(x.new_zeros(x.shape if is_needed else 0) for x, is_needed in needs)
    scale = grad_loss if step_scale.shape[0] == 0 else grad_loss * step_scale
    grads = backward(
        softmaxes, list_rows(softmaxes, ignore_index), lse, scale, ignore_index, label_smoothing, z_loss, softcap,
        need_hidden, need_weight, need_bias,
    )  # fmt: skip
    return tuple(map(_given, grads, (hidden, weight, weight if bias is None else bias)))


def multi_token_cross_entropy_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    step_weights: Sequence[float] | None,
    step_weights_tensor: Tensor | None,
    vocab_ranges: Sequence[int] | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `stamp::multi_token_cross_entropy_with_gradients`: (loss, step_losses, gradients). No host sync."""
    softmaxes = _checked(hidden, weight, targets, bias, vocab_ranges, ignore_index)
    weights = _weights_on_device(step_weights, step_weights_tensor, hidden.device)
    likes = (hidden, weight, weight if bias is None else bias)
    needs = (need_hidden, need_weight, need_bias)
    if 0 < softmaxes.num_rows * softmaxes.widest_range < MIN_LOGITS_IN_CHUNKS:
        lists = list_rows(softmaxes, ignore_index)
        options = (ignore_index, label_smoothing, z_loss, softcap)
        loss, step_losses, step_scale, lse = forward(softmaxes, lists, weights, *options, reduction)
        return loss, step_losses, *map(_given, backward(softmaxes, lists, lse, step_scale, *options, *needs), likes)
    scale = torch.ones(targets.shape[1], dtype=torch.float32, device=targets.device)
    if reduction == REDUCTIONS["mean"]:
        scale = scale / (targets != ignore_index).sum(dim=0).clamp(min=1)
    weighted_scale = scale if weights is None else scale * weights.to(torch.float32)
    losses, *grads = with_gradients(softmaxes, weighted_scale, ignore_index, label_smoothing, z_loss, softcap, *needs)
    sums = losses.sum(dim=1)
    return (sums * weighted_scale).sum(), sums * scale, *map(_given, grads, likes)
