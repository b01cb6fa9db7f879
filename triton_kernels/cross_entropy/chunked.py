"""Multi-token cross-entropy with its gradients, a row chunk at a time: for wide hidden states, by cuBLAS products.

For each row chunk and each softmax over it: one product makes the logits, `stamp_cross_entropy_chunk_kernel` replaces
them by their gradients, and two products add to the gradients of hidden and weight. These are 6 N V D FLOPs in all,
where logits that are computed again take 10. The price is memory for the logits of one chunk, and traffic.

Logits have the dtype of the hidden states, as those of `torch.nn.functional.linear`: with 16 bits a logit goes through
memory six times in 2 bytes. It is rounded once, from an fp32 sum; bias, cap, softmax and loss are in fp32.
"""

import torch
from torch import Tensor

from stamp_kernels.common.arguments import LossNeeds, LossOptions
from stamp_kernels.triton_kernels.cross_entropy.chunked_kernels import ROW_DIVISOR, stamp_cross_entropy_chunk_kernel
from stamp_kernels.triton_kernels.cross_entropy.configs import chunk_config, row_chunk_size
from stamp_kernels.triton_kernels.cross_entropy.softmaxes import Softmaxes, gain
from stamp_kernels.triton_kernels.cross_entropy.tiles import Rows
from stamp_kernels.triton_kernels.device import launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.rows import ceil_div


def _set_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """`out = a b`, or `out += a b`: out in fp32, of fp32 or 16-bit factors, rounded once."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)


def with_gradients(
    softmaxes: Softmaxes, scale: Tensor, options: LossOptions, needs: LossNeeds
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Losses fp32 `[K, N]`, 0 where ignored, and the gradients of hidden, weight and bias, None where not needed.

    The gradients are in fp32, in the shapes of the inputs. No host sync.

    Args:
        scale: fp32 `[K]`, the gradient of a row's loss of each step.
        options: without vocab_ranges, of which the softmaxes have theirs.
    """
    dtype = softmaxes.hidden.dtype
    num_rows, widest = softmaxes.num_rows, softmaxes.widest_range
    hidden, weight = (x.unsqueeze(0) if x.dim() == 2 else x for x in (softmaxes.hidden, softmaxes.weight))
    bias = softmaxes.bias if softmaxes.bias is None else softmaxes.bias.view(-1, weight.shape[1])
    unit = torch.linalg.vector_norm(scale, ord=torch.inf)
    relative_scale = torch.where(unit > 0, scale / unit, 0) * gain(dtype)
    unit = unit / gain(dtype)
    is_ignored = softmaxes.targets.ptr == options.ignore_index  # [N, K]
    is_unlisted = is_ignored if len(hidden) > 1 else is_ignored.all(1, keepdim=True)  # [N, num_hidden]

    losses = scale.new_empty(len(scale), num_rows)
    dhidden = scale.new_empty(hidden.shape) if needs.need_hidden else None
    dweight = scale.new_zeros(weight.shape) if needs.need_weight else None
    dbias = scale.new_zeros(bias.shape) if needs.need_bias else None
    row_memory = ceil_div(widest, ROW_DIVISOR.value) * ROW_DIVISOR.value
    chunk_size = row_chunk_size(num_rows, row_memory * dtype.itemsize)
    logits_memory = hidden.new_empty(chunk_size, row_memory)
    for first_row in range(0, num_rows, chunk_size):
        rows = slice(first_row, min(first_row + chunk_size, num_rows))
        size = rows.stop - rows.start
        for softmax, (start, end) in enumerate(softmaxes.ranges):
            of_hidden, of_weight = min(softmax, len(hidden) - 1), min(softmax, len(weight) - 1)
            of_bias = None if bias is None else min(softmax, len(bias) - 1)
            # A row without a valid target may hold NaN, which a product would add to the gradients even times 0.
            x = hidden[of_hidden, rows].masked_fill(is_unlisted[rows, of_hidden, None], 0)
            w = weight[of_weight, start:end]
            logits = logits_memory[:size, : end - start]
            # z = x W^T, [size, V]
            torch.mm(x, w.t(), out=logits)
            config = chunk_config(end - start)
            launch(
                stamp_cross_entropy_chunk_kernel,
                launch_grid(size),
                logits=Rows(logits, logits.stride(0)),
                losses_ptr=losses,
                bias_ptr=None if bias is None else bias[of_bias, start:end],
                targets=softmaxes.targets,
                scale_ptr=relative_scale,
                loss_options=options,
                num_rows=num_rows,
                first_row=first_row,
                first_class=start,
                first_step=softmax * softmaxes.steps_per_softmax,
                STEPS_PER_SOFTMAX=softmaxes.steps_per_softmax,
                SUM_LOGITS=options.label_smoothing > 0,
                NUM_CLASSES=end - start,
                BLOCK=config.block,
                num_warps=config.num_warps,
            )
            dz = logits  # the kernel has replaced them
            if needs.need_weight:
                # dW += dz^T x, [V, D]
                _set_product(dweight[of_weight, start:end], dz.t(), x, add=True)
            if needs.need_bias:
                dbias[of_bias, start:end] += dz.sum(0, dtype=torch.float32)
            if needs.need_hidden:
                # dx += dz W, [size, D]
                is_first_of_hidden = softmax == 0 or len(hidden) > 1
                _set_product(dhidden[of_hidden, rows], dz, w, add=not is_first_of_hidden)
    given = (softmaxes.hidden, softmaxes.weight, softmaxes.bias)
    grads = zip((dhidden, dweight, dbias), given, strict=True)
    return losses, *(None if grad is None else grad.mul_(unit).view(x.shape) for grad, x in grads)
