"""The cross-entropy of several steps in float64, from the docstring of `multi_token_cross_entropy`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuzz.draw import slices


class LossTruth(NamedTuple):
    """(value, magnitude) of each part, float64; the gradients are those of `(loss * grad_loss).sum()`."""

    loss: tuple[Tensor, Tensor]
    step_losses: tuple[Tensor, Tensor]
    dhidden: tuple[Tensor, Tensor]
    dweight: tuple[Tensor, Tensor]
    dbias: tuple[Tensor, Tensor]


def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None,
    step_weights: Sequence[float] | Tensor | None = None, vocab_ranges: Sequence[tuple[int, int]] | None = None,
    ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None,
    reduction: str = "mean", grad_loss: Tensor | None = None, **_: Any,
) -> LossTruth:  # fmt: skip
    num_rows, num_steps = targets.shape
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    step_weights = [1.0] * num_steps if step_weights is None else [float(x) for x in step_weights]
    grad_loss = torch.ones(()) if grad_loss is None else grad_loss.double()
    loss = torch.zeros((num_rows, num_steps) if reduction == "none" else (), dtype=torch.float64)
    magnitude = loss.clone()
    step_losses, step_magnitudes = (torch.zeros(num_steps, dtype=torch.float64) for _ in range(2))
    gradient_magnitudes = [torch.zeros(0) if x is None else torch.zeros_like(x) for x in leaves]

    for step in range(num_steps):
        valid = (targets[:, step] != ignore_index).nonzero().flatten()
        start, end = (0, weight.shape[-2]) if vocab_ranges is None else vocab_ranges[step]
        h, w = (x if x.dim() == 2 else x[step] for x in leaves[:2])  # [N, D], [V, D]
        h, w = h[valid], w[start:end]
        logits = h @ w.T  # [valid, classes]
        b = leaves[2]
        if b is not None:
            logits = logits + (b if b.dim() == 1 else b[step])[start:end]
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        lse = logits.logsumexp(1)
        column = (targets[valid, step] - start).unsqueeze(1)
        of_target = logits.gather(1, column).squeeze(1)
        smooth = label_smoothing
        losses = lse - (1 - smooth) * of_target - smooth * logits.mean(1) + z_loss * lse**2
        sizes = lse.abs() + (1 - smooth) * of_target.abs() + smooth * logits.abs().mean(1) + z_loss * lse**2
        sizes = sizes.detach()

        share = 1.0 if reduction != "mean" else 1.0 / max(len(valid), 1)
        if reduction == "none":
            loss = loss.index_put((valid, torch.tensor(step)), losses)
            magnitude[valid, step] = sizes
            upstream = grad_loss[valid, step].abs()
        else:
            loss = loss + step_weights[step] * share * losses.sum()
            magnitude = magnitude + abs(step_weights[step]) * share * sizes.sum()
            step_losses[step] = share * losses.detach().sum()
            step_magnitudes[step] = share * sizes.sum()
            upstream = (grad_loss * step_weights[step] * share).abs().expand(len(valid))

        # |d loss / d logits| before anything cancels, and through it those of hidden, weight and bias.
        p = logits.detach().softmax(1)
        d = p * (1 + 2 * z_loss * lse.detach().abs().unsqueeze(1)) + smooth / max(end - start, 1)
        d = upstream.unsqueeze(1) * d.scatter_add(1, column, torch.ones_like(d[:, :1]) * (1 - smooth))
        dh, dw, db = (
            x if x.dim() == len(x_shape) else x[step]
            for x, x_shape in zip(gradient_magnitudes, ((0, 0), (0, 0), (0,)), strict=True)
        )
        dh.index_add_(0, valid, d @ w.detach().abs())
        dw[start:end] += d.T @ h.detach().abs()
        if b is not None:
            db[start:end] += d.sum(0)

    gradients = [None] * 3
    if loss.requires_grad:
        inputs = [x for x in leaves if x is not None]
        found = list(torch.autograd.grad((loss * grad_loss).sum(), inputs, allow_unused=True))
        gradients = [None if x is None else found.pop(0) for x in leaves]
    of_leaves = [
        (torch.zeros_like(m) if g is None else g, m) for g, m in zip(gradients, gradient_magnitudes, strict=True)
    ]
    return LossTruth((loss.detach(), magnitude), (step_losses, step_magnitudes), *of_leaves)


def shifted(labels: Tensor, cu_seqlens: Tensor, *, steps: int, stride: int = 1, ignore_index: int = -100) -> Tensor:
    """`shift_targets`, label by label."""
    result = torch.full((len(labels), steps), ignore_index, dtype=torch.int64)
    for rows in slices(cu_seqlens):
        for t in range(rows.start, rows.stop):
            for k in range(1, steps + 1):
                if t + k * stride < rows.stop:
                    result[t, k - 1] = int(labels[t + k * stride])
    return result
