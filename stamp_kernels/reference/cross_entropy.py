"""Multi-token cross-entropy in plain PyTorch: the oracle, and the kernels of devices without fused ones.

The auxiliary loss of arXiv 2604.05329 (section MAP), after Gloeckle et al. 2024: sum over steps k of w_k CE(step k).
With the logits z = W x + b (soft-capped: c tanh(z / c)) over the V classes of the step's range, the loss of one row is

    lse = log(sum_v exp(z_v))
    loss = lse - (1 - eps) z_y - eps / V sum_v z_v + zeta lse^2        eps: label_smoothing, zeta: z_loss

and its gradient is

    dloss / dz_v = (p_v - (1 - eps) [v = y] - eps / V) + 2 zeta lse p_v             (x 1 - (z_v / c)^2 if soft-capped)

with p_v = exp(z_v - lse). The part of the z-loss comes last: with one class left p = 1, and the rest is exactly 0.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stamp_kernels.common.arguments import LossNeeds, LossOptions, StepWeights
from stamp_kernels.common.contents import check_cu_seqlens_contents, check_targets_contents
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.common.rows import sequence_of_row
from stamp_kernels.common.steps import REDUCTIONS, step_ranges

# Size of a tile of logits, and its largest width. Measured on two AVX-512 cores: forward and backward in 130 ms for
# N = V = 4,096 and D = 128 (F.cross_entropy: 157 to 185), and within 25 % of the best of 20 settings for V from 256 to
# 65,536.
TILE_BYTES = 2 * 2**20
TILE_CLASSES = 2048


class _Step(NamedTuple):
    """One step's part of the arguments."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D], V the width of the range
    bias: Tensor | None  # [V]
    targets: Tensor  # [N, 1] int64, counted from the start of the range, 0 where ignored
    valid: Tensor  # [N, 1] bool, False where ignored


def _of_step(x: Tensor, k: int, shared_dims: int) -> Tensor:
    """The tensor of step k: `x` if all steps share it, else `x[k]`."""
    return x if x.dim() == shared_dims else x[k]


def _steps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ranges: list[tuple[int, int]],
    ignore_index: int,
) -> Iterator[_Step]:
    dtype = compute_dtype(hidden.dtype)
    for k, (start, end) in enumerate(ranges):
        column = targets[:, k, None]
        valid = column != ignore_index
        yield _Step(
            hidden=_of_step(hidden, k, shared_dims=2),
            weight=_of_step(weight, k, shared_dims=2)[start:end].to(dtype),
            bias=None if bias is None else _of_step(bias, k, shared_dims=1)[start:end].to(dtype),
            targets=torch.where(valid, column - start, 0),
            valid=valid,
        )


def _read_rows(step: _Step, rows: slice) -> Tensor:
    """Hidden rows in the accumulation dtype. Ignored rows are 0, so that a NaN in them reaches no sum."""
    return step.hidden[rows].to(step.weight.dtype).masked_fill(~step.valid[rows], 0)


def _logits(x: Tensor, step: _Step, classes: slice, softcap: float | None) -> Tensor:
    weight = step.weight[classes]
    logits = x @ weight.T if step.bias is None else torch.addmm(step.bias[classes], x, weight.T)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _row_losses(lse: Tensor, target_logit: Tensor, mean_logit: Tensor, valid: Tensor, options: LossOptions) -> Tensor:
    """Every row's loss, 0 where ignored."""
    loss = lse - (1 - options.label_smoothing) * target_logit + options.z_loss * lse.square()
    if options.label_smoothing > 0:  # otherwise a class with a bias of -inf would give 0 * inf
        loss = loss - options.label_smoothing * mean_logit
    return loss.masked_fill(~valid, 0)


def _reduce(
    losses: Tensor, targets: Tensor, step_weights: StepWeights, ignore_index: int, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    """From losses [K, N]: the loss, the losses of the steps [K], and the weight [K] of a row's loss in each step.

    Without reduction: the losses [N, K], and two empty tensors.
    """
    if reduction == REDUCTIONS["none"]:
        return losses.T.contiguous(), losses.new_empty(0), losses.new_empty(0)
    step_sums = losses.sum(dim=1)
    scale = torch.ones_like(step_sums)
    if reduction == REDUCTIONS["mean"]:
        scale = scale / (targets != ignore_index).sum(dim=0).clamp(min=1)
    weighted_scale = scale
    weights = (
        step_weights.step_weights if step_weights.step_weights_tensor is None else step_weights.step_weights_tensor
    )
    if weights is not None:
        # One multiplication per step: copying a tensor of the floats to the device would sync.
        weighted_scale = torch.stack([scale[k] * w for k, w in enumerate(weights)]).to(scale.dtype)
    return (step_sums * weighted_scale).sum(), step_sums * scale, weighted_scale


def multi_token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    step_weights: StepWeights,
    options: LossOptions,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """The loss of `stamp_kernels.multi_token_cross_entropy`, and its step_losses (empty without reduction).

    Differentiable; keeps the logits of every step.
    """
    dtype = compute_dtype(hidden.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)  # once, so that autograd rounds their gradients once
    bias = None if bias is None else bias.to(dtype)
    ranges = step_ranges(options.vocab_ranges, targets.shape[1], weight.shape[-2])
    check_targets_contents(targets, ranges, options.ignore_index)
    losses = []
    for step in _steps(hidden, weight, targets, bias, ranges, options.ignore_index):
        logits = _logits(_read_rows(step, slice(None)), step, slice(None), options.softcap)
        lse = torch.logsumexp(logits, dim=1, keepdim=True)
        target_logit, mean_logit = logits.gather(1, step.targets), logits.mean(dim=1, keepdim=True)
        losses.append(_row_losses(lse, target_logit, mean_logit, step.valid, options)[:, 0])
    loss, step_losses, _ = _reduce(torch.stack(losses), targets, step_weights, options.ignore_index, reduction)
    return loss, step_losses.detach()


def _tiles(step: _Step) -> Iterator[tuple[slice, slice]]:
    """(rows, classes) of a step's tiles of logits: all rows for one chunk of classes before the next chunk.

    In that order the weight of the classes and its gradient, the larger tensors, stay in cache.
    """
    num_rows, num_classes = step.targets.shape[0], step.weight.shape[0]
    tile_classes = min(num_classes, TILE_CLASSES)
    tile_rows = TILE_BYTES // (tile_classes * step.weight.itemsize)
    for first_class in range(0, num_classes, tile_classes):
        for first_row in range(0, num_rows, tile_rows):
            yield slice(first_row, first_row + tile_rows), slice(first_class, first_class + tile_classes)


def _targets_in_tile(step: _Step, rows: slice, classes: slice, tile_classes: int) -> tuple[Tensor, Tensor]:
    """Each row's target counted from the tile's first class, clamped into the tile, and whether it is in the tile."""
    targets = step.targets[rows] - classes.start
    in_tile = (targets >= 0) & (targets < tile_classes)
    return targets.clamp(0, tile_classes - 1), in_tile


def multi_token_cross_entropy_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    step_weights: StepWeights,
    options: LossOptions,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `stamp::multi_token_cross_entropy_forward`, a tile of one step's logits at a time.

    Returns:
        loss: scalar, or `[N, K]` without reduction.
        step_losses: `[K]` unweighted means or sums; empty without reduction.
        step_scale: `[K]`, the weight of a row's loss in the loss; empty without reduction.
        lse: `[K, N]`, 0 where ignored.
    """
    num_rows, num_steps = targets.shape
    ranges = step_ranges(options.vocab_ranges, num_steps, weight.shape[-2])
    check_targets_contents(targets, ranges, options.ignore_index)
    losses = hidden.new_empty((num_steps, num_rows), dtype=compute_dtype(hidden.dtype))
    lse = torch.empty_like(losses)
    for k, step in enumerate(_steps(hidden, weight, targets, bias, ranges, options.ignore_index)):
        lse_k = losses.new_full((num_rows, 1), -torch.inf)
        target_logit, sum_logits = losses.new_zeros((num_rows, 1)), losses.new_zeros((num_rows, 1))
        for rows, classes in _tiles(step):
            logits = _logits(_read_rows(step, rows), step, classes, options.softcap)
            lse_k[rows] = torch.logaddexp(lse_k[rows], torch.logsumexp(logits, dim=1, keepdim=True))
            in_chunk, in_tile = _targets_in_tile(step, rows, classes, logits.shape[1])
            target_logit[rows] += torch.where(in_tile, logits.gather(1, in_chunk), 0)
            if options.label_smoothing > 0:
                sum_logits[rows] += logits.sum(dim=1, keepdim=True)
        mean_logit = sum_logits / step.weight.shape[0]
        losses[k] = _row_losses(lse_k, target_logit, mean_logit, step.valid, options)[:, 0]
        lse[k] = lse_k.masked_fill(~step.valid, 0)[:, 0]
    return *_reduce(losses, targets, step_weights, options.ignore_index, reduction), lse


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
    """The op `stamp::multi_token_cross_entropy_backward`: gradients of hidden, weight and bias, empty if not needed.

    Sums over steps and rows are kept in fp32 (fp64) and cast once, at the end.
    """
    grad_hidden, grad_weight, grad_bias = _gradients(
        grad_loss, hidden, weight, targets, bias, lse, step_scale, options, needs
    )
    like_bias = weight if bias is None else bias
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias.to(like_bias.dtype)


def _gradients(
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
    """Gradients of hidden, weight and bias in the compute dtype, empty if not needed.

    Recomputes each tile's logits, whose probabilities are `exp(logits - lse)`.
    """
    num_rows, num_steps = targets.shape
    ranges = step_ranges(options.vocab_ranges, num_steps, weight.shape[-2])
    dtype = compute_dtype(hidden.dtype)
    grad_hidden = hidden.new_zeros(hidden.shape if needs.need_hidden else 0, dtype=dtype)
    grad_weight = weight.new_zeros(weight.shape if needs.need_weight else 0, dtype=dtype)
    grad_bias = weight.new_zeros(bias.shape if bias is not None and needs.need_bias else 0, dtype=dtype)
    for k, step in enumerate(_steps(hidden, weight, targets, bias, ranges, options.ignore_index)):
        grad_rows = grad_loss[:, k] if step_scale.shape[0] == 0 else (grad_loss * step_scale[k]).expand(num_rows)
        grad_rows = torch.where(step.valid, grad_rows[:, None], 0)
        # With an infinite lse the probabilities of an ignored row are 0; with its stored 0 they could overflow.
        lse_rows = torch.where(step.valid, lse[k][:, None], torch.inf)
        z_factor = 2 * options.z_loss * lse[k][:, None]
        for rows, classes in _tiles(step):
            x = _read_rows(step, rows)
            logits = _logits(x, step, classes, options.softcap)
            grad = (logits - lse_rows[rows]).exp_()
            of_z_loss = grad * z_factor[rows] if options.z_loss > 0 else None
            if options.label_smoothing > 0:
                grad -= options.label_smoothing / step.weight.shape[0]
            in_chunk, in_tile = _targets_in_tile(step, rows, classes, logits.shape[1])
            grad.scatter_(1, in_chunk, grad.gather(1, in_chunk) - (1 - options.label_smoothing) * in_tile.to(dtype))
            if of_z_loss is not None:
                grad += of_z_loss
            grad *= grad_rows[rows]
            if options.softcap is not None:
                grad *= 1 - (logits / options.softcap).square()
            if needs.need_hidden:
                _of_step(grad_hidden, k, shared_dims=2)[rows].addmm_(grad, step.weight[classes])
            if needs.need_weight:
                _of_step(grad_weight, k, shared_dims=2)[slice(*ranges[k])][classes].addmm_(grad.T, x)
            if needs.need_bias:
                _of_step(grad_bias, k, shared_dims=1)[slice(*ranges[k])][classes].add_(grad.sum(dim=0))
    return grad_hidden, grad_weight, grad_bias


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
    """The op `stamp::multi_token_cross_entropy_with_gradients`: loss, step losses, and the gradients of the loss.

    The gradients are in the compute dtype: they wait for that of the loss, which scales them before they are rounded.
    """
    loss, step_losses, step_scale, lse = multi_token_cross_entropy_forward(
        hidden, weight, targets, bias, step_weights, options, reduction
    )
    grads = _gradients(torch.ones_like(loss), hidden, weight, targets, bias, lse, step_scale, options, needs)
    return loss, step_losses, *grads


def shift_targets(labels: Tensor, cu_seqlens: Tensor, steps: int, stride: int, ignore_index: int) -> Tensor:
    """The op `stamp::shift_targets`: int64 `[T, steps]`; column k - 1 is the label k * stride ahead in its sequence."""
    total = labels.shape[0]
    check_cu_seqlens_contents("cu_seqlens", cu_seqlens, total)
    if total == 0:
        return labels.new_empty((0, steps), dtype=torch.int64)
    stride = min(stride, total)  # `total` is past every end already, and a longer stride could overflow
    # Tail rows are treated as one more sequence that ends at 0, so they have no label ahead.
    ends = torch.cat([cu_seqlens[1:], cu_seqlens.new_zeros(1)])[sequence_of_row(cu_seqlens, total)]
    rows = torch.arange(total, device=labels.device)
    ahead = rows[:, None] + stride * torch.arange(1, steps + 1, device=labels.device)
    inside = ahead < ends[:, None]
    return torch.where(inside, labels[torch.where(inside, ahead, 0)].to(torch.int64), ignore_index)
