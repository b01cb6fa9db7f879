"""Multi-token cross-entropy with its gradients, from the logits of a row chunk: the kernel.

With the notation of `forward_kernels.py` and `backward_kernels.py`, for each row of the chunk:

    z_v = logits_v + b_v         capped: c tanh(z_v / c)
    lse = log sum_v exp(z_v)
    loss_k = lse - (1 - eps) z_{y_k} - eps / V sum_v z_v + zeta lse^2
    p_v = exp(z_v - lse)
    dz_v = (s p_v - s eps / V - sum_k s_k (1 - eps) [v = y_k]) + 2 s zeta lse p_v           s = sum_k s_k

The part of the z-loss comes last: with one class left p = 1, and what remains of the rest is exactly 0.
"""

import triton
import triton.language as tl

from stamp_kernels.common.arguments import LossOptions
from stamp_kernels.triton_kernels.cross_entropy.tiles import (
    PerStep,
    Rows,
    cap,
    cap_slope,
    divisible,
    exp_of_difference,
    finite_pivot,
)

# A row of logits has memory for a multiple of this many classes. It then begins on a 32-byte boundary, and all its
# loads and stores are as wide as a thread can make them, whatever the number of classes.
ROW_DIVISOR = tl.constexpr(16)


@triton.jit
def _finished_logits(logits_ptr, bias_ptr, class_, has_memory, exists, softcap):
    """z of some classes (or one) of a row, with bias and cap; any number where they do not exist."""
    z = tl.load(logits_ptr + class_, mask=has_memory, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + class_, mask=exists, other=0.0).to(tl.float32)
    if softcap is not None:
        z = cap(z, softcap)
    return z


@triton.jit
def _load_target(targets, row, step, first_class, ignore_index, NUM_CLASSES: tl.constexpr):
    """(target int32, is_valid) of a row: the target counts from the first class; -1 where it is none of the classes.

    A valid target outside the range is found only under STAMP_KERNELS_CHECK=1. It must not be read.
    """
    target = tl.load(targets.ptr + row * targets.stride_row + step * targets.stride_step)
    is_valid = target != ignore_index
    target -= first_class
    return tl.where(is_valid & (target >= 0) & (target < NUM_CLASSES), target, -1).to(tl.int32), is_valid


@triton.jit(do_not_specialize=["num_rows", "first_row", "first_class", "first_step"])
def stamp_cross_entropy_chunk_kernel(
    logits: Rows,  # [rows of the chunk, NUM_CLASSES], in the dtype of the hidden states
    losses_ptr,  # fp32 [K, N]
    bias_ptr,  # [NUM_CLASSES] or None: of this softmax
    targets: PerStep,  # int64 [N, K]
    scale_ptr,  # fp32 [K]: gradients of a row's losses
    loss_options: LossOptions,  # without vocab_ranges
    num_rows,  # N
    first_row,  # of the chunk
    first_class,  # of the softmax
    first_step,  # of the softmax
    STEPS_PER_SOFTMAX: tl.constexpr,
    SUM_LOGITS: tl.constexpr,
    NUM_CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its losses from its logits, and then the gradient of the logits in their place.

    Two passes over the row: an online softmax, and the gradient. A thread overwrites only what it has read itself.

    Grid: [rows of the chunk].
    """
    index = tl.program_id(0).to(tl.int64)
    row = first_row + index
    logits_ptr = logits.ptr + index * divisible(logits.stride_row, ROW_DIVISOR)
    # The memory of a row goes on up to here. A mask that ended within a vector would break up its load.
    END_OF_ROW: tl.constexpr = (NUM_CLASSES + ROW_DIVISOR - 1) // ROW_DIVISOR * ROW_DIVISOR
    softcap = loss_options.softcap
    label_smoothing = loss_options.label_smoothing

    # lse: every vector of classes that a thread loads has an online softmax of its own until the end of the row
    VECTOR: tl.constexpr = min(128 // logits.ptr.dtype.element_ty.primitive_bitwidth, BLOCK)
    vector_max = tl.full([BLOCK // VECTOR], float("-inf"), tl.float32)
    vector_sum = tl.zeros([BLOCK // VECTOR], tl.float32)
    sum_logits = tl.zeros([BLOCK], tl.float32)
    for start in range(0, NUM_CLASSES, BLOCK):
        class_ = start + tl.arange(0, BLOCK)
        exists = class_ < NUM_CLASSES
        z = _finished_logits(logits_ptr, bias_ptr, class_, class_ < END_OF_ROW, exists, softcap)  # [BLOCK]
        if SUM_LOGITS:
            sum_logits += tl.where(exists, z, 0.0)
        z = tl.reshape(tl.where(exists, z, float("-inf")), [BLOCK // VECTOR, VECTOR])
        new_max = tl.maximum(vector_max, tl.max(z, axis=1))  # [BLOCK / VECTOR]
        pivot = finite_pivot(new_max)
        new_sum = tl.sum(exp_of_difference(z, pivot[:, None]), axis=1)
        vector_sum = vector_sum * exp_of_difference(vector_max, pivot) + new_sum
        vector_max = new_max
    row_max = tl.max(vector_max, axis=0)
    row_sum = tl.sum(vector_sum * exp_of_difference(vector_max, finite_pivot(row_max)), axis=0)
    lse = row_max + tl.log(row_sum)

    # loss_k, and the terms of dz that all classes share
    scale_sum = 0.0
    for i in tl.static_range(STEPS_PER_SOFTMAX):
        step = first_step + i
        target, is_valid = _load_target(targets, row, step, first_class, loss_options.ignore_index, NUM_CLASSES)
        target_logit = _finished_logits(logits_ptr, bias_ptr, target, target >= 0, target >= 0, softcap)
        loss = lse - (1.0 - label_smoothing) * target_logit + loss_options.z_loss * lse * lse
        loss -= label_smoothing / NUM_CLASSES * tl.sum(sum_logits, axis=0)
        tl.store(losses_ptr + tl.cast(step, tl.int64) * num_rows + row, tl.where(is_valid, loss, 0.0))
        scale_sum += tl.where(is_valid, tl.load(scale_ptr + step), 0.0)
    offset = scale_sum * (label_smoothing / NUM_CLASSES)
    z_factor = scale_sum * (2.0 * loss_options.z_loss * lse)

    tl.debug_barrier()  # every thread has read the target logits
    # dz = scale_sum p - offset - sum_k target_factor_k [v = y_k] + z_factor p
    for start in range(0, NUM_CLASSES, BLOCK):
        class_ = start + tl.arange(0, BLOCK)
        exists = class_ < NUM_CLASSES
        z = _finished_logits(logits_ptr, bias_ptr, class_, class_ < END_OF_ROW, exists, softcap)  # [BLOCK]
        p = exp_of_difference(z, lse)
        dz = p * scale_sum - offset
        for i in tl.static_range(STEPS_PER_SOFTMAX):
            step = first_step + i
            target, _ = _load_target(targets, row, step, first_class, loss_options.ignore_index, NUM_CLASSES)
            target_factor = (1.0 - label_smoothing) * tl.load(scale_ptr + step)
            dz -= tl.where(class_ == target, target_factor, 0.0)
        dz += p * z_factor
        if softcap is not None:
            dz *= cap_slope(z, softcap)
        tl.store(logits_ptr + class_, dz.to(logits_ptr.dtype.element_ty), mask=class_ < END_OF_ROW)
