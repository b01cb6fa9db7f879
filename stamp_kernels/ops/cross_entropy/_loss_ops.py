"""The ops of the multi-token cross-entropy, and the autograd.Functions around them."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stamp_kernels.common.arguments import LossNeeds, LossOptions, StepWeights
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.common.steps import REDUCTIONS, step_ranges
from stamp_kernels.ops._autograd import OpFunction, call_below_autograd, first_order
from stamp_kernels.ops._library import define_op
from stamp_kernels.ops.cross_entropy import _boundary
from stamp_kernels.reference import cross_entropy as reference


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
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: LossNeeds, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in `dtype`. None: in the dtypes of the inputs."""
    like_bias = weight.new_empty(0) if bias is None else bias
    return (
        hidden.new_empty(hidden.shape if needs.need_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if needs.need_weight else (0,), dtype=dtype),
        like_bias.new_empty(like_bias.shape if needs.need_bias else (0,), dtype=dtype),
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
    return loss, step_losses, *_gradients_fake(hidden, weight, bias, needs, dtype)


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


@functools.cache  # an import statement takes a microsecond at every call
def _launchers() -> Any:
    from stamp_kernels.triton_kernels.cross_entropy import multi_token_cross_entropy  # imports Triton

    return multi_token_cross_entropy


def _is_for_the_reference(hidden: Tensor) -> bool:
    """Whether Triton has no kernel for it: fp64, which exists for gradcheck, and states without features."""
    return hidden.dtype == torch.float64 or hidden.shape[-1] == 0


def _forward_triton(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _is_for_the_reference(hidden):
        return reference.multi_token_cross_entropy_forward(hidden, *args)
    return _launchers().multi_token_cross_entropy_forward(hidden, *args)


def _backward_triton(grad_loss: Tensor, hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if _is_for_the_reference(hidden):
        return reference.multi_token_cross_entropy_backward(grad_loss, hidden, *args)
    return _launchers().multi_token_cross_entropy_backward(grad_loss, hidden, *args)


def _with_gradients_triton(hidden: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if _is_for_the_reference(hidden):
        return reference.multi_token_cross_entropy_with_gradients(hidden, *args)
    return _launchers().multi_token_cross_entropy_with_gradients(hidden, *args)


def _differentiable_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward op for inputs that require grad."""
    outputs: tuple[Tensor, Tensor, Tensor, Tensor] = RecomputedGradients.apply(hidden, weight, bias, targets, *others)
    return outputs


def _differentiable_with_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op with gradients for inputs that require grad."""
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = GradientsInForward.apply(
        hidden, weight, bias, targets, *others
    )
    return outputs


_forward = define_op(
    "multi_token_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "float[]? step_weights, Tensor? step_weights_tensor, int[]? vocab_ranges, int ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, int reduction) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_boundary.check_forward,
    reference=reference.multi_token_cross_entropy_forward,
    triton=_forward_triton,
    fake=_forward_fake,
    flops=_forward_flops,
    differentiable=_differentiable_forward,
    groups=(StepWeights, LossOptions),
)
_backward = define_op(
    "multi_token_cross_entropy_backward(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "Tensor lse, Tensor step_scale, int[]? vocab_ranges, int ignore_index, float label_smoothing, float z_loss, "
    "float? softcap, bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    check=_boundary.check_backward,
    reference=reference.multi_token_cross_entropy_backward,
    triton=_backward_triton,
    fake=_backward_fake,
    flops=_backward_flops,
    backward_of="multi_token_cross_entropy",
    groups=(LossOptions, LossNeeds),
)
_with_gradients = define_op(
    "multi_token_cross_entropy_with_gradients(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "float[]? step_weights, Tensor? step_weights_tensor, int[]? vocab_ranges, int ignore_index, "
    "float label_smoothing, float z_loss, float? softcap, int reduction, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_boundary.check_with_gradients,
    reference=reference.multi_token_cross_entropy_with_gradients,
    triton=_with_gradients_triton,
    fake=_with_gradients_fake,
    flops=_with_gradients_flops,
    differentiable=_differentiable_with_gradients,
    groups=(StepWeights, LossOptions, LossNeeds),
)


class GradientsInForward(OpFunction):
    """The forward makes the gradients with the loss, from the same logits; the backward scales them."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        step_weights: StepWeights,
        options: LossOptions,
        reduction: int,
        needs: LossNeeds,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = call_below_autograd(
            _with_gradients, hidden, weight, targets, bias, *step_weights, *options, reduction, *needs
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
        hidden, weight, bias, *_ = inputs
        loss, step_losses, *kept = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(step_losses, *kept)
        # The loss is saved for `first_order`: the inputs, on which the gradients depend, are not kept.
        ctx.save_for_backward(loss, *kept)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]

    @staticmethod
    @first_order("multi_token_cross_entropy")
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_loss: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * 3
        if grad_loss is not None:
            kept = saved[1:]
            grads = [
                _scaled(x, grad_loss, dtype) if needed else None
                for x, dtype, needed in zip(kept, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
            ]
        return *grads, *[None] * 5


def _scaled(kept: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`kept * factor` in the dtype of kept, and then cast once.

    Scaling in 16 bits would round twice, and in fp16 overflow with a loss scale or underflow without one. It is not
    done in place: a second backward pass through the same graph needs the kept gradient unscaled.
    """
    if kept.dtype == dtype or torch._C._are_functorch_transforms_active():  # those do not support out=
        return (kept * factor).to(dtype)
    return torch.mul(kept, factor, out=kept.new_empty(kept.shape, dtype=dtype))  # without a copy in the dtype of kept


class RecomputedGradients(OpFunction):
    """The backward computes the logits again, from the lse that the forward keeps."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        step_weights: StepWeights,
        options: LossOptions,
        reduction: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = call_below_autograd(
            _forward, hidden, weight, targets, bias, *step_weights, *options, reduction
        )
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        hidden, weight, bias, targets, _, options, _ = inputs
        _, step_losses, step_scale, lse = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(step_losses, step_scale, lse)
        ctx.save_for_backward(hidden, weight, targets, bias, lse, step_scale)
        ctx.options = options

    @staticmethod
    @first_order("multi_token_cross_entropy")
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_loss: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needs = LossNeeds(*ctx.needs_input_grad[:3])
        grads: list[Tensor | None] = [None] * 3
        if grad_loss is not None and any(needs):
            computed = call_below_autograd(_backward, grad_loss, *saved, *ctx.options, *needs)
            grads = [grad if needed else None for grad, needed in zip(computed, needs, strict=True)]
        return *grads, *[None] * 4
