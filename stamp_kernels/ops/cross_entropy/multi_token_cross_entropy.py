"""Cross-entropy of several future tokens or items at once, from hidden states, without logits in memory."""

import math
import numbers
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.common.arguments import LossNeeds, LossOptions, StepWeights
from stamp_kernels.common.exported import exported
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.common.steps import REDUCTIONS
from stamp_kernels.ops._autocast import cast_for_autocast
from stamp_kernels.ops._checks import (
    FLOATING_DTYPES,
    check_choice,
    check_flags,
    check_int,
    check_range,
    check_tensor,
    check_vocab_ranges,
)
from stamp_kernels.ops.cross_entropy._loss_ops import GradientsInForward, RecomputedGradients
from stamp_kernels.reference import cross_entropy as reference

Reduction = Literal["none", "mean", "sum"]
Memory = Literal["auto", "minimal"]


@exported
class MultiTokenLoss(NamedTuple):
    """What `multi_token_cross_entropy` returns with return_step_losses.

    Attributes:
        loss: the differentiable loss, a scalar.
        step_losses: `[K]`, the mean or sum of each step, unweighted and detached.
    """

    loss: Tensor
    step_losses: Tensor


# On a GPU the gradient of a wider row does not fit the registers of a program, and the logits are computed once for
# each block of features.
_MAX_RECOMPUTED_WIDTH = 256


def gradients_come_with_the_loss(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether it is faster to make the gradients with the loss than to compute the logits again in the backward.

    With the loss: 6 N V D FLOPs, and the logits go through memory chunk by chunk. Again: 10 N V D FLOPs (14 and more
    above _MAX_RECOMPUTED_WIDTH), and no logits in memory.

    On a CPU with the loss is always faster, since chunks stay in its caches. On a GPU a logit's way to memory and back
    costs 12 bytes (six times 2) against 4 D FLOPs saved: about the same at D = 270 on an H100, by counting; this has
    not been measured. fp32 products are exact, without matrix units, and so too slow to compute again.
    """
    return device.type == "cpu" or width > _MAX_RECOMPUTED_WIDTH or dtype == torch.float32


def _check_shared_or_per_step(
    name: str,
    x: Tensor,
    shape: Sequence[int | str],
    num_steps: int,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """`x` is one tensor of `shape` for all steps, or `[num_steps, *shape]`."""
    check_tensor(name, x, dtypes=dtypes, device=device)
    if x.dim() not in (len(shape), len(shape) + 1):
        sizes = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{sizes}] or [{num_steps}, {sizes}], got {list(x.shape)}")
    check_tensor(name, x, shape=shape if x.dim() == len(shape) else [num_steps, *shape])


def _check_not_padded(hidden: Tensor, weight: Tensor, targets: Tensor, says_steps: bool) -> None:
    """Padded sequences `[B, T, D]` with targets `[B, T]` have the shape of states per step where B == T."""
    if hidden.dim() == 3 and weight.dim() == 2 and not says_steps and 1 < targets.shape[0] == targets.shape[1]:
        num_rows, num_steps = targets.shape
        raise ValueError(
            f"hidden {list(hidden.shape)} with targets [{num_rows}, {num_steps}] could be padded sequences or states "
            "of each step: flatten padded sequences to hidden [B * T, D] and targets [B * T, 1], or give step_weights "
            "(of ones) if the first dimension of hidden is the steps"
        )


def _flat_ranges(vocab_ranges: Sequence[tuple[int, int]], num_steps: int, vocab_size: int) -> list[int]:
    """start, end, start, ... of all steps."""
    ranges = check_vocab_ranges(vocab_ranges, vocab_size)
    if len(ranges) != num_steps:
        raise ValueError(
            f"vocab_ranges must have one (start, end) for each of the {num_steps} steps, got {vocab_ranges}"
        )
    return [bound for span in ranges for bound in span]


def _checked_softcap(softcap: float | None, dtype: torch.dtype) -> float | None:
    """None where there is no cap. A cap must be a normal number in the dtype of the logits."""
    if softcap is None:
        return None
    logits_dtype = compute_dtype(dtype)
    limits = torch.finfo(logits_dtype)
    if not isinstance(softcap, numbers.Real | torch.SymFloat) or not (
        limits.tiny <= softcap <= limits.max or softcap == math.inf
    ):
        raise ValueError(
            f"softcap must be None (or inf), or a positive number that {logits_dtype} logits can be divided by, "
            f"{limits.tiny:.1e} to {limits.max:.1e}, got {softcap!r}"
        )
    return None if softcap == math.inf else float(softcap)


def _checked_step_weights(
    step_weights: Sequence[float] | Tensor | None, num_steps: int, device: torch.device
) -> StepWeights:
    if isinstance(step_weights, Tensor):
        check_tensor("step_weights", step_weights, shape=[num_steps], dtypes=FLOATING_DTYPES, device=device)
        if step_weights.requires_grad:
            raise ValueError("step_weights must not require grad: the loss is not differentiable in them")
        return StepWeights(None, step_weights)
    if step_weights is None:
        return StepWeights(None, None)
    if not isinstance(step_weights, Sequence) and not hasattr(step_weights, "__array_interface__"):
        raise ValueError(f"step_weights must be floats or a tensor, got {type(step_weights).__name__}")
    if len(step_weights) != num_steps:
        raise ValueError(f"step_weights must have one weight for each of the {num_steps} steps, got {step_weights}")
    return StepWeights([float(check_range("step_weights", weight, -math.inf)) for weight in step_weights], None)


@overload
def multi_token_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ...,
    step_weights: Sequence[float] | Tensor | None = ..., vocab_ranges: Sequence[tuple[int, int]] | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., z_loss: float = ..., softcap: float | None = ...,
    reduction: Reduction = ..., return_step_losses: Literal[False] = ..., memory: Memory = ...,
) -> Tensor: ...  # fmt: skip
@overload
def multi_token_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ...,
    step_weights: Sequence[float] | Tensor | None = ..., vocab_ranges: Sequence[tuple[int, int]] | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., z_loss: float = ..., softcap: float | None = ...,
    reduction: Reduction = ..., return_step_losses: Literal[True], memory: Memory = ...,
) -> MultiTokenLoss: ...  # fmt: skip
@overload
def multi_token_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = ...,
    step_weights: Sequence[float] | Tensor | None = ..., vocab_ranges: Sequence[tuple[int, int]] | None = ...,
    ignore_index: int = ..., label_smoothing: float = ..., z_loss: float = ..., softcap: float | None = ...,
    reduction: Reduction = ..., return_step_losses: bool = ..., memory: Memory = ...,
) -> Tensor | MultiTokenLoss: ...  # fmt: skip
def multi_token_cross_entropy(
    hidden: Tensor,  # [N, D] or [K, N, D]
    weight: Tensor,  # [V, D] or [K, V, D]
    targets: Tensor,  # [N, K] int64
    *,
    bias: Tensor | None = None,  # [V] or [K, V]
    step_weights: Sequence[float] | Tensor | None = None,  # [K]
    vocab_ranges: Sequence[tuple[int, int]] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: Reduction = "mean",
    return_step_losses: bool = False,
    memory: Memory = "auto",
) -> Tensor | MultiTokenLoss:
    """`sum_k step_weights[k] * CE(softmax(hidden_k weight_k^T + bias_k), targets[:, k])` over K prediction steps.

    The loss of multi-step prediction (arXiv 2604.05329, section MAP, after Gloeckle et al. 2024). The logits are never
    in memory as a whole, forward or backward. Differentiable in hidden, weight and bias, to first order. Logits, lse
    and losses are fp32 (fp64 for fp64 inputs; for one exception see memory); gradients are summed in that dtype and
    cast once, at the end. Under autocast hidden and weight are cast to the autocast dtype.

    Args:
        hidden: `[N, D]`, shared by the steps, or `[K, N, D]`, one per step, in fp32, fp16, bf16 or fp64. Strided views
            are fine. Padded sequences `[B, T, D]` are flattened to `[B * T, D]`, and their targets to `[B * T, 1]`. A
            row without a valid target is not read: it may hold NaN, and its gradient is 0.
        weight: the unembedding, `[V, D]` shared or `[K, V, D]`, in hidden's dtype.
        targets: int64 `[N, K]`, absolute ids (rows of weight), or ignore_index.
        bias: added to the logits, `[V]` shared or `[K, V]`, in fp32 or weight's dtype.
        step_weights: K floats, or a floating tensor `[K]` on the same device. With a tensor torch.compile does not
            specialise on the values, and a captured CUDA graph reads it at every replay; floats become part of the
            graph. Not differentiable. None: all 1. They are not normalised.
        vocab_ranges: K pairs (start, end): the softmax of step k covers only rows start to end - 1 of weight (one
            semantic-ID level's codebook), which must contain its targets. Other logits are not computed. None: all.
            On a GPU, call `prepare` before the first call that a CUDA graph captures.
        ignore_index: targets of this value have no loss.
        label_smoothing: share of the target spread evenly over the classes of the step's range, as in
            `torch.nn.functional.cross_entropy`, in [0, 1].
        z_loss: adds `z_loss * lse^2` to every valid row's loss (PaLM, arXiv 2204.02311).
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2, arXiv 2408.00118). None or inf: no cap.
        reduction: of each step over its valid rows: `"mean"` (0 if there are none), or `"sum"`. `"none"` gives
            every row's loss, unweighted, 0 where ignored.
        return_step_losses: return a MultiTokenLoss with every step's loss beside the total.
        memory: `"minimal"` keeps only the lse and computes the logits again in the backward. `"auto"` makes the
            gradients with the loss where that is faster (on a CPU, and on a GPU for states wider than 256 and in fp32;
            never with reduction "none"). They are kept in fp32 (fp64) until the backward scales and casts them. On a
            GPU this takes memory for the logits of some rows, 320 MiB or those of 2,048 rows up to 1 GiB; logits of
            16-bit inputs are rounded to their dtype there, as `torch.nn.functional.linear` rounds them. The recomputing
            way rounds none and skips rows without a valid target: with few valid rows of wide states `"minimal"` is
            faster too.

    Returns:
        A scalar, `[N, K]` with reduction="none", or MultiTokenLoss(loss, step_losses `[K]`, unweighted and detached).

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: a target is neither ignore_index nor in its step's range (on the CPU, or under
            STAMP_KERNELS_CHECK=1).

    Example:
        >>> hidden, embedding = torch.randn(5, 64, requires_grad=True), torch.nn.Embedding(1_000, 64)
        >>> labels, cu_seqlens = torch.randint(1_000, (5,)), torch.tensor([0, 3, 5], dtype=torch.int32)
        >>> targets = shift_targets(labels, cu_seqlens, steps=2)
        >>> multi_token_cross_entropy(hidden, embedding.weight, targets, step_weights=[1.0, 0.3]).backward()
    """
    check_tensor("targets", targets, shape=["N", "K"], dtypes=[torch.int64])
    device = targets.device
    num_rows, num_steps = targets.shape
    if num_steps == 0:
        raise ValueError(f"targets must have at least one step (column), got shape {list(targets.shape)}")
    check_tensor("hidden", hidden, dtypes=FLOATING_DTYPES)
    check_tensor("weight", weight, dtypes=FLOATING_DTYPES)
    hidden, weight = cast_for_autocast(hidden=hidden, weight=weight)  # only then must their dtypes agree
    _check_shared_or_per_step("hidden", hidden, [num_rows, "D"], num_steps, FLOATING_DTYPES, device)
    _check_shared_or_per_step("weight", weight, ["V", hidden.shape[-1]], num_steps, [hidden.dtype], device)
    vocab_size = weight.shape[-2]
    if vocab_size == 0:
        raise ValueError(f"weight must have at least one row, got shape {list(weight.shape)}")
    if bias is not None:
        _check_shared_or_per_step("bias", bias, [vocab_size], num_steps, [torch.float32, weight.dtype], device)
    weights = _checked_step_weights(step_weights, num_steps, device)
    _check_not_padded(hidden, weight, targets, says_steps=step_weights is not None or vocab_ranges is not None)
    options = LossOptions(
        vocab_ranges=None if vocab_ranges is None else _flat_ranges(vocab_ranges, num_steps, vocab_size),
        ignore_index=check_int("ignore_index", ignore_index),
        label_smoothing=check_range("label_smoothing", label_smoothing, 0.0, 1.0),
        z_loss=check_range("z_loss", z_loss, 0.0, math.inf, below_high=True),
        softcap=_checked_softcap(softcap, hidden.dtype),
    )
    check_flags(return_step_losses=return_step_losses)
    check_choice("reduction", reduction, tuple(REDUCTIONS))
    check_choice("memory", memory, ("auto", "minimal"))
    if return_step_losses and reduction == "none":
        raise ValueError('return_step_losses goes with reduction "mean" or "sum", got "none"')

    arguments = (targets, weights, options, REDUCTIONS[reduction])
    if reference_is_forced():
        with torch.autocast(device.type, enabled=False):
            loss, step_losses = reference.multi_token_cross_entropy(hidden, weight, bias, *arguments)
    else:
        needs = LossNeeds(hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
        in_forward = (
            torch.is_grad_enabled()
            and any(needs)
            and reduction != "none"
            and memory == "auto"
            and gradients_come_with_the_loss(device, hidden.dtype, hidden.shape[-1])
        )
        if in_forward:
            loss, step_losses, *_ = GradientsInForward.apply(hidden, weight, bias, *arguments, needs)
        else:
            loss, step_losses, *_ = RecomputedGradients.apply(hidden, weight, bias, *arguments)
    return MultiTokenLoss(loss, step_losses) if return_step_losses else loss
