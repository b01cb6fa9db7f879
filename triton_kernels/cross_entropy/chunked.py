"""Multi-token cross-entropy with its gradients, a chunk of rows at a time: for wide states, by the library's products.

For each chunk of rows, and each softmax over them: logits by one product, `softmax_gradient_kernel` in place of them,
and two products that add to the gradients: 6 N V D FLOPs in all, where logits computed anew take 10. What it costs is
memory traffic, and one chunk's logits in fp32. Notation as in `cross_entropy_forward` and `cross_entropy_backward`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.triton_kernels.cross_entropy.tiles import (
    SCALARS,
    Softmaxes,
    cap,
    divisible,
    exp_of_difference,
    finite_pivot,
    gain,
    slope,
)
from stamp_kernels.triton_kernels.device import launch_grid

# Memory of a chunk's logits. Each chunk reads and writes the fp32 gradient of the weight once, 8 V D bytes beside its
# 2 R V D FLOPs; counted for an H100, both take as long where R is 1,000 rows. With 320 MiB these are 2,560 rows of
# 32,768 classes, and 512 of 152,960, where the chunk and that gradient at D = 1,024 are a tenth of 16,384 rows' logits.
CHUNK_BYTES = 320 * 2**20
# Of small vocabularies a chunk would be all there is.
MIN_CHUNKS, MIN_ROWS = 8, 1024

# A row of logits has memory for a multiple of so many classes. It then begins on a 64-byte boundary, and all its loads
# and stores are as wide as a thread can make them, whatever the number of classes.
_ROW_DIVISOR = tl.constexpr(16)


def rows_per_chunk(num_rows: int, num_classes: int) -> int:
    """Rows of a chunk, a multiple of 64; as many of some thousand rows as fit, but an eighth of them at most."""
    by_memory = CHUNK_BYTES // (4 * num_classes) // 64 * 64
    by_share = triton.cdiv(triton.cdiv(num_rows, MIN_CHUNKS), 64) * 64
    return max(64, min(by_memory, max(by_share, MIN_ROWS), triton.cdiv(num_rows, 64) * 64))


@triton.jit
def _finished_logits(logits_ptr, bias_ptr, class_, has_memory, exists, softcap):
    """z of some classes (or one) of a row, with bias and cap; anything where they do not exist."""
    z = tl.load(logits_ptr + class_, mask=has_memory, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + class_, mask=exists, other=0.0).to(tl.float32)
    if softcap is not None:
        z = cap(z, softcap)
    return z


@triton.jit(
    do_not_specialize=[
        "stride_grad", "stride_logits", "num_rows", "first_row", "first_class", "first_step", "ignore_index", *SCALARS
    ]
)  # fmt: skip
def softmax_gradient_kernel(
    grad_ptr,  # [rows of the chunk, V], in the dtype of the products, over the same memory as the logits
    logits_ptr,  # fp32 [rows of the chunk, V]
    losses_ptr,  # fp32 [K, N]
    bias_ptr,  # [V] or None: of this softmax
    targets_ptr,  # int64 [N, K]
    scale_ptr,  # fp32 [K]: gradients of a row's losses
    stride_grad, stride_logits, stride_target_row, stride_target_step,
    num_rows, first_row, first_class, first_step, ignore_index, label_smoothing, z_loss, softcap,
    LABELS: tl.constexpr, SUM_LOGITS: tl.constexpr, NUM_CLASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its losses from its logits, and the gradient of the logits in place of them.

    Grid: [rows of the chunk]. Two passes over the row: an online softmax, and the gradient. A gradient of 16 bits lies
    over the first half of its row: what a block writes has been read, by itself or by a block before it.
    """
    index = tl.program_id(0).to(tl.int64)
    row = first_row + index
    logits_ptr += index * divisible(stride_logits, _ROW_DIVISOR)
    grad_ptr += index * divisible(stride_grad, _ROW_DIVISOR)
    # Past the last class a row goes on up to here. A mask that ended within a vector would take the vector apart.
    end_of_row: tl.constexpr = (NUM_CLASSES + _ROW_DIVISOR - 1) // _ROW_DIVISOR * _ROW_DIVISOR

    lane_max = tl.full([BLOCK], float("-inf"), tl.float32)
    lane_sum = tl.zeros([BLOCK], tl.float32)
    sum_logits = tl.zeros([BLOCK], tl.float32)
    for start in range(0, NUM_CLASSES, BLOCK):
        class_ = start + tl.arange(0, BLOCK)
        exists = class_ < NUM_CLASSES
        z = _finished_logits(logits_ptr, bias_ptr, class_, class_ < end_of_row, exists, softcap)
        if SUM_LOGITS:
            sum_logits += tl.where(exists, z, 0.0)
        z = tl.where(exists, z, float("-inf"))
        new_max = tl.maximum(lane_max, z)
        pivot = finite_pivot(new_max)
        lane_sum = lane_sum * exp_of_difference(lane_max, pivot) + exp_of_difference(z, pivot)
        lane_max = new_max
    row_max = tl.max(lane_max, axis=0)
    lse = row_max + tl.log(tl.sum(lane_sum * exp_of_difference(lane_max, finite_pivot(row_max)), axis=0))

    factor = 0.0
    offset = 0.0
    for i in tl.static_range(LABELS):
        step = first_step + i
        label = tl.load(targets_ptr + row * stride_target_row + step * stride_target_step)
        is_valid = label != ignore_index
        label -= first_class
        # A label outside the range, which only STAMP_KERNELS_CHECK=1 would find, must not be read.
        is_label = is_valid & (label >= 0) & (label < NUM_CLASSES)
        label_logit = _finished_logits(logits_ptr, bias_ptr, label, is_label, is_label, softcap)
        loss = lse - (1.0 - label_smoothing) * label_logit + z_loss * lse * lse
        loss -= label_smoothing / NUM_CLASSES * tl.sum(sum_logits, axis=0)
        tl.store(losses_ptr + tl.cast(step, tl.int64) * num_rows + row, tl.where(is_valid, loss, 0.0))
        scale = tl.where(is_valid, tl.load(scale_ptr + step), 0.0)
        factor += scale * (1.0 + 2.0 * z_loss * lse)
        offset += scale * label_smoothing / NUM_CLASSES

    for start in range(0, NUM_CLASSES, BLOCK):
        class_ = start + tl.arange(0, BLOCK)
        exists = class_ < NUM_CLASSES
        z = _finished_logits(logits_ptr, bias_ptr, class_, class_ < end_of_row, exists, softcap)
        dz = exp_of_difference(z, lse) * factor - offset
        for i in tl.static_range(LABELS):
            step = first_step + i
            label = tl.load(targets_ptr + row * stride_target_row + step * stride_target_step)
            of_label = tl.where(label != ignore_index, (1.0 - label_smoothing) * tl.load(scale_ptr + step), 0.0)
            dz -= tl.where(class_ == label - first_class, of_label, 0.0)
        if softcap is not None:
            dz *= slope(z, softcap)
        tl.debug_barrier()  # every thread has read its part of the block
        tl.store(grad_ptr + class_, dz.to(grad_ptr.dtype.element_ty), mask=class_ < end_of_row)


def _softmax_gradient_tile(num_classes: int) -> dict[str, int]:
    """Blocks of 4,096 classes at most: 16 numbers for each of 256 threads."""
    block = min(4096, triton.next_power_of_2(num_classes))
    return dict(NUM_CLASSES=num_classes, BLOCK=block, num_warps=8 if block > 1024 else 4)


def _set_product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """`out = a b`, or `out += a b`; fp32, of fp32 or 16-bit factors, rounded once."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=int(add), out=out)


def with_gradients(
    softmaxes: Softmaxes,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Losses fp32 `[K, N]`, 0 where ignored, and the gradients of hidden, weight and bias, None where not needed.

    The gradients of 16-bit weights and the biases' come in fp32. No host sync.

    Args:
        scale: fp32 `[K]`, the gradient of a row's loss of each step.
    """
    targets, dtype = softmaxes.targets, softmaxes.hidden.dtype
    num_rows, width, widest = softmaxes.num_rows, softmaxes.width, softmaxes.widest_range
    hidden, weight = (x.unsqueeze(0) if x.dim() == 2 else x for x in (softmaxes.hidden, softmaxes.weight))
    bias = softmaxes.bias if softmaxes.bias is None else softmaxes.bias.view(-1, weight.shape[1])
    unit = torch.linalg.vector_norm(scale, ord=torch.inf)
    relative_scale = torch.where(unit > 0, scale / unit, 0) * gain(dtype)
    unit = unit / gain(dtype)
    is_valid = targets != ignore_index  # [N, K]
    is_listed = is_valid if len(hidden) > 1 else is_valid.any(1, keepdim=True)  # [N, num_hidden]

    losses = scale.new_empty(len(scale), num_rows)
    grad_hidden = hidden.new_empty(hidden.shape) if need_hidden else None
    # In fp32 until all chunks have added to it.
    grad_weight = scale.new_zeros(weight.shape) if need_weight else None
    grad_bias = scale.new_zeros(bias.shape) if need_bias else None
    rows = rows_per_chunk(num_rows, widest)
    logits_memory = scale.new_empty(rows, triton.cdiv(widest, _ROW_DIVISOR.value) * _ROW_DIVISOR.value)
    grad_x_memory = scale.new_empty(rows, width) if need_hidden else None
    for first_row in range(0, num_rows, rows):
        chunk = slice(first_row, min(first_row + rows, num_rows))
        size = chunk.stop - chunk.start
        for softmax, (start, end) in enumerate(softmaxes.ranges):
            of_hidden, of_weight = min(softmax, len(hidden) - 1), min(softmax, len(weight) - 1)
            of_bias = None if bias is None else min(softmax, len(bias) - 1)
            # Without a label a row may hold NaN, and its gradient of 0 would meet it in a product.
            x = hidden[of_hidden, chunk].masked_fill(~is_listed[chunk, of_hidden, None], 0)
            w = weight[of_weight, start:end]
            logits = logits_memory[:size, : end - start]
            dz = logits_memory.view(dtype)[:size, : end - start]
            _set_product(logits, x, w.t())
            softmax_gradient_kernel[launch_grid(size)](
                dz,
                logits,
                losses,
                None if bias is None else bias[of_bias, start:end],
                targets,
                relative_scale,
                dz.stride(0),
                logits.stride(0),
                *targets.stride(),
                num_rows,
                first_row,
                start,
                softmax * softmaxes.num_labels,
                ignore_index,
                label_smoothing,
                z_loss,
                softcap,
                LABELS=softmaxes.num_labels,
                SUM_LOGITS=label_smoothing > 0,
                **_softmax_gradient_tile(end - start),
            )
            if need_weight:
                _set_product(grad_weight[of_weight, start:end], dz.t(), x, add=True)
            if need_bias:
                grad_bias[of_bias, start:end] += dz.sum(0, dtype=torch.float32)
            if need_hidden:
                is_first_of_hidden = softmax == 0 or len(hidden) > 1
                _set_product(grad_x_memory[:size], dz, w, add=not is_first_of_hidden)
                if softmax == len(softmaxes.ranges) - 1 or len(hidden) > 1:
                    torch.mul(grad_x_memory[:size], unit, out=grad_hidden[of_hidden, chunk])
    for grad in (grad_weight, grad_bias):
        if grad is not None:
            grad.mul_(unit)
    return losses, grad_hidden, grad_weight, grad_bias
