"""Cross-entropy of several future tokens or items at once, from hidden states, without logits in memory."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.common.arguments import LossNeeds, LossOptions, StepWeights
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.common.steps import REDUCTIONS, step_ranges
from stamp_kernels.ops._autocast import cast_for_autocast
from stamp_kernels.ops._checks import FLOATING_DTYPES, check_choice, check_range, check_tensor
from stamp_kernels.ops._library import define_op
from stamp_kernels.reference import cross_entropy as reference

Reduction = Literal["none", "mean", "sum"]
Memory = Literal["auto", "minimal"]


class MultiTokenLoss(NamedTuple):
    """What `multi_token_cross_entropy` returns with return_step_losses.

    Attributes:
        loss: the differentiable loss, a scalar.
        step_losses: `[K]`, the mean or sum of each step, unweighted and detached.
    """

    loss: Tensor
    step_losses: Tensor


def _num_logits(targets: Tensor, weight: Tensor, vocab_ranges: Sequence[int] | None) -> int:
    """Logits of all steps together: rows times the width of each step's range."""
    num_rows, num_steps = targets.shape
    ranges = step_ranges(vocab_ranges, num_steps, weight.shape[-2])
    return num_rows * sum(end - start for start, end in ranges)


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    step_weights: StepWeights,
    options: LossOptions,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_rows, num_steps = targets.shape
    dtype = compute_dtype(hidden.dtype)
    is_reduced = reduction != REDUCTIONS["none"]
    return (
        hidden.new_empty(() if is_reduced else (num_rows, num_steps), dtype=dtype),
        hidden.new_empty(num_steps if is_reduced else 0, dtype=dtype),
        hidden.new_empty(num_steps if is_reduced else 0, dtype=dtype),
        hidden.new_empty((num_steps, num_rows), dtype=dtype),
    )


def _forward_flops(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    step_weights: StepWeights,
    options: LossOptions,
    reduction: int,
) -> int:
    """One product, for the logits of each step's range."""
    return 2 * _num_logits(targets, weight, options.vocab_ranges) * hidden.shape[-1]


def _gradients_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: LossNeeds
) -> tuple[Tensor, Tensor, Tensor]:
    like_bias = weight.new_empty(0) if bias is None else bias
    return (
        hidden.new_empty(hidden.shape if needs.need_hidden else (0,)),
        weight.new_empty(weight.shape if needs.need_weight else (0,)),
        like_bias.new_empty(like_bias.shape if needs.need_bias else (0,)),
    )


def _backward_fake(
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
    return _gradients_fake(hidden, weight, bias, needs)


def _gradients_flops(hidden: Tensor, weight: Tensor, targets: Tensor, options: LossOptions, needs: LossNeeds) -> int:
    """The logits, and one product for each gradient of hidden and weight that is needed."""
    products = 1 + needs.need_hidden + needs.need_weight
    return 2 * products * _num_logits(targets, weight, options.vocab_ranges) * hidden.shape[-1]


def _backward_flops(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    step_scale: Tensor,
    options: LossOptions,
    needs: LossNeeds,
) -> int:
    return _gradients_flops(hidden, weight, targets, options, needs)


def _with_gradients_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    step_weights: StepWeights,
    options: LossOptions,
    reduction: int,
    needs: LossNeeds,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden.dtype)
    loss, step_losses = hidden.new_empty((), dtype=dtype), hidden.new_empty(targets.shape[1], dtype=dtype)
    return loss, step_losses, *_gradients_fake(hidden, weight, bias, needs)


def _with_gradients_flops(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    step_weights: StepWeights,
    options: LossOptions,
    reduction: int,
    needs: LossNeeds,
) -> int:
    return _gradients_flops(hidden, weight, targets, options, needs)


def _is_for_the_reference(hidden: Tensor) -> bool:
    """Whether Triton has no kernel for it: fp64, which exists for gradcheck, and states without features."""
    return hidden.dtype == torch.float64 or hidden.shape[-1] == 0


def _forward_triton(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _is_for_the_reference(hidden):
        return reference.multi_token_cross_entropy_forward(hidden, *args)
    from stamp_kernels.triton_kernels.cross_entropy import multi_token_cross_entropy as launchers  # imports Triton

    return launchers.multi_token_cross_entropy_forward(hidden, *args)


def _backward_triton(grad_loss: Tensor, hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if _is_for_the_reference(hidden):
        return reference.multi_token_cross_entropy_backward(grad_loss, hidden, *args)
    from stamp_kernels.triton_kernels.cross_entropy import multi_token_cross_entropy as launchers  # imports Triton

    return launchers.multi_token_cross_entropy_backward(grad_loss, hidden, *args)


def _with_gradients_triton(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _is_for_the_reference(hidden):
        return reference.multi_token_cross_entropy_with_gradients(hidden, *args)
    from stamp_kernels.triton_kernels.cross_entropy import multi_token_cross_entropy as launchers  # imports Triton

    return launchers.multi_token_cross_entropy_with_gradients(hidden, *args)


_forward = define_op(
    "multi_token_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "float[]? step_weights, Tensor? step_weights_tensor, int[]? vocab_ranges, int ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, int reduction) -> (Tensor, Tensor, Tensor, Tensor)",
    public_name="multi_token_cross_entropy",
    reference=reference.multi_token_cross_entropy_forward,
    triton=_forward_triton,
    fake=_forward_fake,
    flops=_forward_flops,
    groups=(StepWeights, LossOptions),
)
_backward = define_op(
    "multi_token_cross_entropy_backward(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "Tensor lse, Tensor step_scale, int[]? vocab_ranges, int ignore_index, float label_smoothing, float z_loss, "
    "float? softcap, bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    public_name="multi_token_cross_entropy",
    reference=reference.multi_token_cross_entropy_backward,
    triton=_backward_triton,
    fake=_backward_fake,
    flops=_backward_flops,
    groups=(LossOptions, LossNeeds),
)
_with_gradients = define_op(
    "multi_token_cross_entropy_with_gradients(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "float[]? step_weights, Tensor? step_weights_tensor, int[]? vocab_ranges, int ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, int reduction, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    public_name="multi_token_cross_entropy",
    reference=reference.multi_token_cross_entropy_with_gradients,
    triton=_with_gradients_triton,
    fake=_with_gradients_fake,
    flops=_with_gradients_flops,
    groups=(StepWeights, LossOptions, LossNeeds),
)


class _GradientsInForward(torch.autograd.Function):
    """The forward makes the gradients with the loss, from the same logits; the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        step_weights: StepWeights,
        options: LossOptions,
        reduction: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        loss, step_losses, *grads = _with_gradients(
            hidden, weight, targets, bias, *step_weights, *options, reduction, *ctx.needs_input_grad[:3]
        )
        ctx.mark_non_differentiable(step_losses)
        ctx.save_for_backward(*grads)
        return loss, step_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 3
        if grad_loss is not None:
            needs = ctx.needs_input_grad[:3]
            # Not in place: a second backward pass through the same graph needs them unscaled.
            grads = [
                x * grad_loss.to(x.dtype) if need else None for x, need in zip(ctx.saved_tensors, needs, strict=True)
            ]
        return *grads, *[None] * 4


class _MultiTokenCrossEntropy(torch.autograd.Function):
    """The backward computes the logits again, from the lse that the forward keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        step_weights: StepWeights,
        options: LossOptions,
        reduction: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        loss, step_losses, step_scale, lse = _forward(hidden, weight, targets, bias, *step_weights, *options, reduction)
        ctx.mark_non_differentiable(step_losses)
        ctx.save_for_backward(hidden, weight, targets, bias, lse, step_scale)
        ctx.options = options
        return loss, step_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = LossNeeds(*ctx.needs_input_grad[:3])
        grads: list[Tensor | None] = [None] * 3
        if grad_loss is not None and any(needs):
            computed = _backward(grad_loss, *ctx.saved_tensors, *ctx.options, *needs)
            grads = [grad if needed else None for grad, needed in zip(computed, needs, strict=True)]
        return *grads, *[None] * 4


# On a GPU the gradient of a wider row does not fit the registers of a program, and the logits are computed once for
# each block of features.
_MAX_RECOMPUTED_WIDTH = 256


def gradients_come_with_the_loss(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether it is faster to make the gradients with the loss than to compute the logits again in the backward.

    With the loss: 6 N V D FLOPs, and the logits go through memory chunk by chunk. Again: 10 N V D FLOPs (14 and more
    above _MAX_RECOMPUTED_WIDTH), and no logits in memory.

    On a CPU with the loss is always faster, since chunks stay in its caches. On a GPU a logit's way to memory and back
    costs 18 bytes against 4 D FLOPs saved: about the same at D = 400 on an H100, by counting; this has not been
    measured. fp32 products are exact, without matrix units, and so too slow to compute again.
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


def _check_vocab_ranges(vocab_ranges: Sequence[tuple[int, int]], num_steps: int, vocab_size: int) -> None:
    if len(vocab_ranges) != num_steps:
        raise ValueError(
            f"vocab_ranges must have one (start, end) for each of the {num_steps} steps, got {vocab_ranges}"
        )
    for start, end in vocab_ranges:
        if not 0 <= start < end <= vocab_size:
            raise ValueError(
                f"vocab_ranges must satisfy 0 <= start < end <= {vocab_size} (rows of weight), got {(start, end)}"
            )


def _checked_step_weights(
    step_weights: Sequence[float] | Tensor | None, num_steps: int, device: torch.device
) -> StepWeights:
    if isinstance(step_weights, Tensor):
        check_tensor("step_weights", step_weights, shape=[num_steps], dtypes=FLOATING_DTYPES, device=device)
        if step_weights.requires_grad:
            raise ValueError("step_weights must not require grad: the loss is not differentiable in them")
        return StepWeights(None, step_weights)
    if step_weights is not None and len(step_weights) != num_steps:
        raise ValueError(f"step_weights must have one weight for each of the {num_steps} steps, got {step_weights}")
    return StepWeights(step_weights, None)


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
    and losses are fp32 (fp64 for fp64 inputs); gradients are summed in that dtype and cast once, at the end. Under
    autocast hidden and weight are cast to the autocast dtype.

    Args:
        hidden: `[N, D]`, shared by the steps, or `[K, N, D]`, one per step, in fp32, fp16, bf16 or fp64. Strided views
            are fine. A row without a valid target is not read: it may hold NaN, and its gradient is 0.
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
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2, arXiv 2408.00118). None: no cap.
        reduction: of each step over its valid rows: `"mean"` (0 if there are none), or `"sum"`. `"none"` gives
            every row's loss, unweighted, 0 where ignored.
        return_step_losses: return a MultiTokenLoss with every step's loss beside the total.
        memory: `"minimal"` keeps only the lse and computes the logits again in the backward. `"auto"` makes the
            gradients with the loss where that is faster (on a CPU, and on a GPU for states wider than 256 and in fp32;
            never with reduction "none") and keeps them until the backward. On a GPU the recomputing way skips rows
            without a valid target: with few valid rows of wide states `"minimal"` is faster too.

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
    if vocab_ranges is not None:
        _check_vocab_ranges(vocab_ranges, num_steps, vocab_size)
    check_range("label_smoothing", label_smoothing, 0.0, 1.0)
    check_range("z_loss", z_loss, 0.0)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    check_choice("reduction", reduction, tuple(REDUCTIONS))
    check_choice("memory", memory, ("auto", "minimal"))
    if return_step_losses and reduction == "none":
        raise ValueError('return_step_losses goes with reduction "mean" or "sum", got "none"')

    flat_ranges = None if vocab_ranges is None else [bound for span in vocab_ranges for bound in span]
    options = LossOptions(flat_ranges, ignore_index, label_smoothing, z_loss, softcap)
    arguments = (targets, weights, options, REDUCTIONS[reduction])
    if reference_is_forced():
        with torch.autocast(device.type, enabled=False):
            loss, step_losses = reference.multi_token_cross_entropy(hidden, weight, bias, *arguments)
    else:
        needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        in_forward = (
            needs_grad
            and reduction != "none"
            and memory == "auto"
            and gradients_come_with_the_loss(device, hidden.dtype, hidden.shape[-1])
        )
        function = _GradientsInForward if in_forward else _MultiTokenCrossEntropy
        loss, step_losses = function.apply(hidden, weight, bias, *arguments)
    return MultiTokenLoss(loss, step_losses) if return_step_losses else loss
