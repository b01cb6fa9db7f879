"""Cross-entropy of semantic-ID levels that each have a head of their own, without logits in memory."""

import itertools
from collections.abc import Iterable
from typing import Literal, overload

import torch
from torch import Tensor, nn

from stamp_kernels.modules._arguments import as_tuple
from stamp_kernels.ops._checks import FLOATING_DTYPES, check_int, check_tensor
from stamp_kernels.ops.cross_entropy.multi_token_cross_entropy import MultiTokenLoss, multi_token_cross_entropy

__all__ = ["per_level_cross_entropy"]

# What no code plus the rows of the heads before it can be.
_IGNORED = torch.iinfo(torch.int64).min


@overload
def per_level_cross_entropy(
    states: Tensor, heads: Iterable[nn.Module], codes: Tensor, *, ignore_index: int = ...,
    label_smoothing: float = ..., return_step_losses: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def per_level_cross_entropy(
    states: Tensor, heads: Iterable[nn.Module], codes: Tensor, *, ignore_index: int = ...,
    label_smoothing: float = ..., return_step_losses: Literal[True],
) -> MultiTokenLoss: ...  # fmt: skip
@overload
def per_level_cross_entropy(
    states: Tensor, heads: Iterable[nn.Module], codes: Tensor, *, ignore_index: int = ...,
    label_smoothing: float = ..., return_step_losses: bool = ...,
) -> Tensor | MultiTokenLoss: ...  # fmt: skip
def per_level_cross_entropy(
    states: Tensor,  # [B, L, D]
    heads: Iterable[nn.Module],  # L layers
    codes: Tensor,  # [B, L] int64
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    return_step_losses: bool = False,
) -> Tensor | MultiTokenLoss:
    """`sum_l F.cross_entropy(heads[l](states[:, l]), codes[:, l])` over L levels, without logits in memory.

    For decoders that have one nn.Linear for each level of the semantic ID, in place of one unembedding for all. The
    logits are those of `multi_token_cross_entropy`, whose precision, gradients and autocast this function has. Hooks of
    the heads do not run.

    Args:
        states: `[B, L, D]`, the decoder's states, in fp32, fp16, bf16 or fp64. State l of a row predicts its code l.
        heads: an nn.ModuleList or a sequence of L nn.Linear from D features to as many as their level has codes. The
            levels may have codebooks of different sizes, and some heads a bias.
        codes: int64 `[B, L]`, counted from 0 within each level, or ignore_index.
        ignore_index: codes of this value have no loss.
        label_smoothing: as in `multi_token_cross_entropy`, over the codes of the level.
        return_step_losses: return a MultiTokenLoss with every level's loss beside the sum.

    Returns:
        A scalar, the sum of the levels' losses, each a mean over the rows that have a code (0 if there are none). Or
        MultiTokenLoss(loss, step_losses `[L]`, detached).

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value, or a head has a forward of its own.
        RuntimeError: a code is neither ignore_index nor of its level (on the CPU, or under STAMP_KERNELS_CHECK=1).

    Example:
        >>> heads = nn.ModuleList(nn.Linear(64, size, bias=False) for size in (256, 256, 1_000))
        >>> states = torch.randn(8, 3, 64, requires_grad=True)  # of the decoder: three codes of eight users' items
        >>> codes = torch.stack([torch.randint(head.out_features, (8,)) for head in heads], dim=1)
        >>> per_level_cross_entropy(states, heads, codes).backward()
    """
    check_tensor("states", states, shape=["B", "L", "D"], dtypes=FLOATING_DTYPES)
    num_rows, num_levels, width = states.shape
    layers = _checked_heads(heads, num_levels, width, states)
    check_tensor("codes", codes, shape=[num_rows, num_levels], dtypes=[torch.int64], device=states.device)
    ignore_index = check_int("ignore_index", ignore_index)

    sizes = [layer.weight.shape[0] for layer in layers]
    bias = None
    if any(layer.bias is not None for layer in layers):
        biases: list[Tensor] = [
            layer.weight.new_zeros(size) if layer.bias is None else layer.bias
            for layer, size in zip(layers, sizes, strict=True)
        ]
        bias = torch.stack(biases) if len(set(sizes)) == 1 else torch.cat(biases)
    targets, vocab_ranges = codes, None
    weights: list[Tensor] = [layer.weight for layer in layers]
    if len(set(sizes)) == 1:
        weight = torch.stack(weights)  # [L, V, D]
    else:
        # One matrix with the levels below each other. Each level's softmax covers only its own rows.
        weight = torch.cat(weights)
        vocab_ranges = list(itertools.pairwise(itertools.accumulate(sizes, initial=0)))
        levels = [codes[:, level] + start for level, (start, _) in enumerate(vocab_ranges)]
        targets = torch.stack(levels, dim=1).masked_fill(codes == ignore_index, _IGNORED)
        ignore_index = _IGNORED
    return multi_token_cross_entropy(
        states.transpose(0, 1),
        weight,
        targets,
        bias=bias,
        vocab_ranges=vocab_ranges,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        return_step_losses=return_step_losses,
    )


def _checked_heads(heads: Iterable[nn.Module], num_levels: int, width: int, states: Tensor) -> list[nn.Linear]:
    layers: list[nn.Linear] = []
    for level, head in enumerate(as_tuple("heads", heads, "nn.Linear")):
        name = f"heads[{level}]"
        if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
            raise ValueError(f"{name} must be an nn.Linear without a forward of its own, got {type(head).__name__}")
        check_tensor(f"{name}.weight", head.weight, shape=["codes", width], device=states.device)
        # Under autocast the loss casts states and weights to one dtype.
        if not torch.is_autocast_enabled(states.device.type):
            check_tensor(f"{name}.weight", head.weight, dtypes=[states.dtype])
        layers.append(head)
    if len(layers) != num_levels or num_levels == 0:
        raise ValueError(
            f"heads must have one nn.Linear for each of the {num_levels} levels of states, at least one, "
            f"got {len(layers)}"
        )
    return layers
