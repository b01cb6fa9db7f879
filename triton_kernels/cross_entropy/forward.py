"""Multi-token cross-entropy, forward, without logits in memory: two kernels, three where the classes are many.

For a row x of a softmax over the classes v of a range, with labels y_k:

    z_v = W_v x + b_v        (capped: c tanh(z_v / c))
    lse = log sum_v exp(z_v)
    loss_k = lse - (1 - eps) z_{y_k} - eps / V sum_v z_v + zeta lse^2        eps: label_smoothing, zeta: z_loss

- `forward_kernel`: rows in place, classes pass by, an online softmax. Many classes are shared among programs
  (`CLASSES_PER_SPLIT`, which depends on the classes alone: a row has the same bits alone or in a batch);
- `combine_kernel` joins the splits of a row, where there are several;
- `reduce_kernel`: from sums over blocks of rows to the loss of each step and the total.

Labels' logits are products of their own, a row of the weight for each label: a look at every class of every tile
whether it is a label would cost more.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.steps import REDUCTIONS
from stamp_kernels.triton_kernels.cross_entropy.tiles import (
    SCALARS,
    SIZES,
    STRIDES,
    RowLists,
    Softmaxes,
    biased_and_capped,
    divisible,
    exp_of_difference,
    finite_pivot,
    has_asynchronous_products,
    label_logits,
    listed_rows,
    load_features,
    load_label,
    load_range,
    multiply,
    stages_that_fit,
)
from stamp_kernels.triton_kernels.device import DeviceProperties, device_properties, launch_grid

# Classes that a program passes over one after the other: few rows still are many programs, and what a split leaves
# behind (three numbers a row) is nothing beside a pass over so many classes.
CLASSES_PER_SPLIT = 4096


@triton.jit
def _add_classes(
    row_max, row_sum, sum_logits, x, row, is_listed, first_class, end_class,
    hidden_ptr, weight_ptr, bias_ptr, stride_hidden_row, stride_weight_class, softcap,
    MASKED: tl.constexpr, SUM_LOGITS: tl.constexpr, RESIDENT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax over the classes `first_class ... end_class - 1`, BLOCK_V at a time.

    The state after some classes, each [BLOCK_N]: row_max = max_v z_v, row_sum = sum_v exp(z_v - row_max), sum_logits =
    sum_v z_v. MASKED False promises whole blocks.
    """
    for start in range(first_class, end_class, BLOCK_V):
        class_ = start + tl.arange(0, BLOCK_V)
        exists = (class_ < end_class) if MASKED else tl.full([BLOCK_V], True, tl.int1)
        if RESIDENT:
            w = load_features(weight_ptr, class_, stride_weight_class, exists, 0, WIDTH, BLOCK_D)
            z = tl.dot(x, tl.trans(w), input_precision="ieee")  # [BLOCK_N, BLOCK_V]
        else:
            z = multiply(
                hidden_ptr, row, stride_hidden_row, is_listed, weight_ptr, class_, stride_weight_class, exists,
                WIDTH, BLOCK_D,
            )  # fmt: skip
        z = biased_and_capped(z, bias_ptr, class_, exists, softcap)
        if SUM_LOGITS:
            sum_logits += tl.sum(tl.where(exists[None, :], z, 0.0) if MASKED else z, axis=1)
        if MASKED:
            z = tl.where(exists[None, :], z, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(z, axis=1))
        pivot = finite_pivot(new_max)
        row_sum = row_sum * exp_of_difference(row_max, pivot) + tl.sum(exp_of_difference(z, pivot[:, None]), axis=1)
        row_max = new_max
    return row_max, row_sum, sum_logits


@triton.jit
def _finish_rows(
    loss_sums_ptr, counts_ptr, losses_ptr, lse_ptr, lse, sum_logits, block, row, is_listed, softmax,
    first_class, end_class, hidden_ptr, weight_ptr, bias_ptr, targets_ptr,
    stride_hidden_row, stride_weight_class, stride_target_row, stride_target_step,
    num_rows, num_steps, num_blocks, ignore_index, label_smoothing, z_loss, softcap,
    LABELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Losses of a block of rows from their lse, and their sum and number for each step of the softmax."""
    for i in tl.static_range(LABELS):
        step = softmax * LABELS + i
        label, is_valid = load_label(
            targets_ptr, row, is_listed, step, stride_target_row, stride_target_step, ignore_index
        )
        # A label outside the range, which only STAMP_KERNELS_CHECK=1 would find, must not be read.
        is_label = is_valid & (label >= first_class) & (label < end_class)
        label_logit = label_logits(
            hidden_ptr, row, stride_hidden_row, weight_ptr, label, stride_weight_class, bias_ptr, is_label, softcap,
            WIDTH, BLOCK_K,
        )  # fmt: skip
        loss = lse - (1.0 - label_smoothing) * label_logit + z_loss * lse * lse
        loss -= label_smoothing / (end_class - first_class) * sum_logits
        loss = tl.where(is_valid, loss, 0.0)
        tl.store(lse_ptr + tl.cast(step, tl.int64) * num_rows + row, tl.where(is_valid, lse, 0.0), mask=is_listed)
        if losses_ptr is not None:
            tl.store(losses_ptr + row * num_steps + step, loss, mask=is_listed)
        tl.store(loss_sums_ptr + step * num_blocks + block, tl.sum(loss, axis=0))
        tl.store(counts_ptr + step * num_blocks + block, tl.sum(is_valid.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=[*SCALARS, *SIZES, *STRIDES, "num_blocks"])
def forward_kernel(
    loss_sums_ptr,  # fp32 [K, num_blocks]
    counts_ptr,  # int32 [K, num_blocks]
    losses_ptr,  # fp32 [N, K] or None
    lse_ptr,  # fp32 [K, N]
    partials_ptr,  # fp32 [3, num_softmaxes, num_splits, N], by place in the list, or None: one split
    hidden_ptr,  # [N, WIDTH] or [K, N, WIDTH]
    weight_ptr,  # [V, WIDTH] or [K, V, WIDTH]
    bias_ptr,  # [V] or [K, V], or None
    targets_ptr,  # int64 [N, K]
    ranges_ptr,  # int32 [num_softmaxes, 2], or None: first_class and end_class
    rows_ptr,  # int32 [num_hidden, N]
    lengths_ptr,  # int32 [num_hidden]
    stride_hidden_step, stride_hidden_row, stride_weight_step, stride_weight_class, stride_bias_step,
    stride_target_row, stride_target_step,
    num_rows, num_steps, num_softmaxes, num_splits, first_class, end_class, num_blocks, ignore_index, label_smoothing,
    z_loss, softcap,
    LABELS: tl.constexpr, HIDDEN_PER_STEP: tl.constexpr, SUM_LOGITS: tl.constexpr, CLASSES_PER_SPLIT: tl.constexpr,
    STRIDE_DIVISOR: tl.constexpr, CLASS_DIVISOR: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one softmax against one split of its classes; losses too, where that is all of them.

    Grid: [num_blocks, num_softmaxes, num_splits].
    """
    block = tl.program_id(0)
    softmax = tl.program_id(1)
    split = tl.program_id(2)
    hidden = softmax if HIDDEN_PER_STEP else 0 * softmax
    num_listed = tl.load(lengths_ptr + hidden)
    first = block * BLOCK_N
    if first >= num_listed:
        if partials_ptr is None:
            for i in tl.static_range(LABELS):
                tl.store(loss_sums_ptr + (softmax * LABELS + i) * num_blocks + block, 0.0)
                tl.store(counts_ptr + (softmax * LABELS + i) * num_blocks + block, 0)
        return

    row, is_listed, _ = listed_rows(rows_ptr, hidden, first, num_listed, num_rows, BLOCK_N)
    first_class, end_class = load_range(ranges_ptr, first_class, end_class, softmax, CLASS_DIVISOR)
    stride_hidden_row = divisible(stride_hidden_row, STRIDE_DIVISOR)
    stride_weight_class = divisible(stride_weight_class, STRIDE_DIVISOR)
    hidden_ptr += softmax * divisible(stride_hidden_step, STRIDE_DIVISOR)
    weight_ptr += softmax * divisible(stride_weight_step, STRIDE_DIVISOR)
    if bias_ptr is not None:
        bias_ptr += softmax * divisible(stride_bias_step, CLASS_DIVISOR)
    RESIDENT: tl.constexpr = WIDTH <= BLOCK_D
    x = 0.0
    if RESIDENT:
        x = load_features(hidden_ptr, row, stride_hidden_row, is_listed, 0, WIDTH, BLOCK_D)  # [BLOCK_N, BLOCK_D]

    split_first = first_class + split * CLASSES_PER_SPLIT
    split_end = tl.minimum(split_first + CLASSES_PER_SPLIT, end_class)
    whole_end = split_first + tl.maximum(split_end - split_first, 0) // BLOCK_V * BLOCK_V
    row_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_N], tl.float32)
    sum_logits = tl.zeros([BLOCK_N], tl.float32)
    for masked in tl.static_range(2):
        row_max, row_sum, sum_logits = _add_classes(
            row_max, row_sum, sum_logits, x, row, is_listed,
            whole_end if masked else split_first, split_end if masked else whole_end,
            hidden_ptr, weight_ptr, bias_ptr, stride_hidden_row, stride_weight_class, softcap,
            masked, SUM_LOGITS, RESIDENT, WIDTH, BLOCK_V, BLOCK_D,
        )  # fmt: skip

    if partials_ptr is None:
        _finish_rows(
            loss_sums_ptr, counts_ptr, losses_ptr, lse_ptr, row_max + tl.log(row_sum), sum_logits, block, row,
            is_listed, softmax, first_class, end_class, hidden_ptr, weight_ptr, bias_ptr,
            targets_ptr, stride_hidden_row, stride_weight_class, stride_target_row, stride_target_step,
            num_rows, num_steps, num_blocks, ignore_index, label_smoothing, z_loss, softcap, LABELS, WIDTH,
            BLOCK_D if BLOCK_D < 64 else 64,
        )  # fmt: skip
    else:
        entry = first + tl.arange(0, BLOCK_N)
        of_split = partials_ptr + (tl.cast(softmax, tl.int64) * num_splits + split) * num_rows + entry
        kind = tl.cast(num_softmaxes, tl.int64) * num_splits * num_rows
        tl.store(of_split, row_max, mask=is_listed)
        tl.store(of_split + kind, row_sum, mask=is_listed)
        tl.store(of_split + 2 * kind, sum_logits, mask=is_listed)


@triton.jit(do_not_specialize=[*SCALARS, *SIZES, *STRIDES, "num_blocks"])
def combine_kernel(
    loss_sums_ptr, counts_ptr, losses_ptr, lse_ptr, partials_ptr, hidden_ptr, weight_ptr, bias_ptr, targets_ptr,
    ranges_ptr, rows_ptr, lengths_ptr,
    stride_hidden_step, stride_hidden_row, stride_weight_step, stride_weight_class, stride_bias_step,
    stride_target_row, stride_target_step,
    num_rows, num_steps, num_softmaxes, num_splits, first_class, end_class, num_blocks, ignore_index, label_smoothing,
    z_loss, softcap,
    LABELS: tl.constexpr, HIDDEN_PER_STEP: tl.constexpr, STRIDE_DIVISOR: tl.constexpr, CLASS_DIVISOR: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Losses of BLOCK_N rows of one softmax from the partial sums of its splits, in their order.

    Grid: [num_blocks, num_softmaxes]. The arguments are those of `forward_kernel`.
    """
    block = tl.program_id(0)
    softmax = tl.program_id(1)
    hidden = softmax if HIDDEN_PER_STEP else 0 * softmax
    num_listed = tl.load(lengths_ptr + hidden)
    first = block * BLOCK_N
    if first >= num_listed:
        for i in tl.static_range(LABELS):
            tl.store(loss_sums_ptr + (softmax * LABELS + i) * num_blocks + block, 0.0)
            tl.store(counts_ptr + (softmax * LABELS + i) * num_blocks + block, 0)
        return

    row, is_listed, _ = listed_rows(rows_ptr, hidden, first, num_listed, num_rows, BLOCK_N)
    softmax_64 = tl.cast(softmax, tl.int64)
    kind = tl.cast(num_softmaxes, tl.int64) * num_splits * num_rows
    row_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_N], tl.float32)
    sum_logits = tl.zeros([BLOCK_N], tl.float32)
    for split in range(num_splits):
        of_split = partials_ptr + (softmax_64 * num_splits + split) * num_rows + first + tl.arange(0, BLOCK_N)
        split_max = tl.load(of_split, mask=is_listed, other=0.0)
        new_max = tl.maximum(row_max, split_max)
        pivot = finite_pivot(new_max)
        split_sum = tl.load(of_split + kind, mask=is_listed, other=0.0)
        row_sum = row_sum * exp_of_difference(row_max, pivot) + split_sum * exp_of_difference(split_max, pivot)
        sum_logits += tl.load(of_split + 2 * kind, mask=is_listed, other=0.0)
        row_max = new_max
    first_class, end_class = load_range(ranges_ptr, first_class, end_class, softmax, CLASS_DIVISOR)
    _finish_rows(
        loss_sums_ptr, counts_ptr, losses_ptr, lse_ptr, row_max + tl.log(row_sum), sum_logits, block, row, is_listed,
        softmax, first_class, end_class,
        hidden_ptr + softmax * divisible(stride_hidden_step, STRIDE_DIVISOR),
        weight_ptr + softmax * divisible(stride_weight_step, STRIDE_DIVISOR),
        None if bias_ptr is None else bias_ptr + softmax_64 * stride_bias_step, targets_ptr,
        divisible(stride_hidden_row, STRIDE_DIVISOR), divisible(stride_weight_class, STRIDE_DIVISOR),
        stride_target_row, stride_target_step,
        num_rows, num_steps, num_blocks, ignore_index, label_smoothing, z_loss, softcap, LABELS, WIDTH, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_steps", "num_blocks"])
def reduce_kernel(
    loss_ptr,  # fp32 []
    step_losses_ptr,  # fp32 [K]
    step_scale_ptr,  # fp32 [K]
    loss_sums_ptr,  # fp32 [K, num_blocks]
    counts_ptr,  # int32 [K, num_blocks]
    step_weights_ptr,  # floating [K], or None: all 1
    num_steps, num_blocks,
    MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`sum_k w_k loss_k`, each loss_k a mean over its valid rows (0 where there are none) or a sum.

    Grid: [1]. Sums run block after block, in an order that the number of rows alone decides.
    """
    total = 0.0
    for step in range(num_steps):
        sums = tl.zeros([BLOCK], tl.float32)
        counts = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_blocks, BLOCK):
            block = start + tl.arange(0, BLOCK)
            sums += tl.load(loss_sums_ptr + step * num_blocks + block, mask=block < num_blocks, other=0.0)
            counts += tl.load(counts_ptr + step * num_blocks + block, mask=block < num_blocks, other=0)
        scale = 1.0
        if MEAN:
            scale = 1.0 / tl.maximum(tl.sum(counts, axis=0), 1).to(tl.float32)
        step_loss = tl.sum(sums, axis=0)
        weight = 1.0
        if step_weights_ptr is not None:
            weight = tl.load(step_weights_ptr + step).to(tl.float32)
        tl.store(step_losses_ptr + step, step_loss * scale)
        tl.store(step_scale_ptr + step, scale * weight)
        total += step_loss * scale * weight
    tl.store(loss_ptr, total)


class ForwardConfig(NamedTuple):
    """Tile of rows x classes, and the features that are in place at a time."""

    block_n: int
    block_v: int
    block_d: int
    num_warps: int
    num_stages: int


def forward_config(properties: DeviceProperties, width: int, *, element_size: int) -> ForwardConfig:
    """Tiles by counting, unmeasured: a thread of 256 holds 64 logits of a 128 x 128 tile. Shared memory holds the rows
    and blocks of classes: 128 KB at width 128 on an H100, 98 KB with mma.sync, of 99 KB that an A10 or an RTX 4090 has.
    fp32 goes without matrix units; its products are unrolled in registers, so its tiles are small.
    """
    block_d = max(16, triton.next_power_of_2(width))
    if element_size == 4:
        return ForwardConfig(32, 32, min(block_d, 64), num_warps=4, num_stages=2)
    block_n = 128
    if block_d > 256:
        # With mma.sync, whose factors and addresses take registers, blocks of 64 features spilled on sm_80 and sm_86.
        block_d, most_stages = (64, 3) if has_asynchronous_products(properties) else (32, 4)
        block_v = 128
        resident, per_stage = 0, (block_n + block_v) * block_d
    else:
        # On sm_120, four labels a row and 64 classes of 256 features spilled.
        block_v = 128 if block_d <= 128 else 32 if properties.capability[0] == 12 else 64
        most_stages = 3 if block_d <= 128 else 2
        resident, per_stage = block_n * block_d, block_v * block_d
    num_stages = stages_that_fit(properties, most_stages, resident * element_size, per_stage * element_size)
    return ForwardConfig(block_n, block_v, block_d, num_warps=8, num_stages=num_stages)


def forward(
    softmaxes: Softmaxes,
    lists: RowLists,
    step_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, step_losses, step_scale, lse), as the op `stamp::multi_token_cross_entropy_forward` gives them.

    Two or three launches, and the zeros of rows without a label. No host sync.
    """
    hidden, targets = softmaxes.hidden, softmaxes.targets
    num_rows, num_steps = targets.shape
    properties = device_properties(hidden.device)
    config = forward_config(properties, softmaxes.width, element_size=hidden.element_size())
    num_blocks = triton.cdiv(num_rows, config.block_n)
    num_splits = triton.cdiv(softmaxes.widest_range, CLASSES_PER_SPLIT)
    is_reduced = reduction != REDUCTIONS["none"]
    lse = hidden.new_zeros((num_steps, num_rows), dtype=torch.float32)
    losses = None if is_reduced else lse.new_zeros((num_rows, num_steps))
    loss_sums = lse.new_empty((num_steps, num_blocks))
    counts = lse.new_empty((num_steps, num_blocks), dtype=torch.int32)
    partials = None
    if num_splits > 1:
        partials = lse.new_empty((3, softmaxes.num_softmaxes, num_splits, num_rows))
    arguments: dict[str, Any] = dict(
        **softmaxes.arguments(),
        loss_sums_ptr=loss_sums,
        counts_ptr=counts,
        losses_ptr=losses,
        lse_ptr=lse,
        partials_ptr=partials,
        targets_ptr=targets,
        rows_ptr=lists.rows,
        lengths_ptr=lists.lengths,
        stride_target_row=targets.stride(0),
        stride_target_step=targets.stride(1),
        num_steps=num_steps,
        num_splits=num_splits,
        num_blocks=num_blocks,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        BLOCK_N=config.block_n,
    )
    if num_blocks > 0:
        forward_kernel[launch_grid(num_blocks, softmaxes.num_softmaxes, num_splits)](
            **arguments,
            SUM_LOGITS=label_smoothing > 0,
            CLASSES_PER_SPLIT=CLASSES_PER_SPLIT,
            BLOCK_V=config.block_v,
            BLOCK_D=config.block_d,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if num_splits > 1:
            # Left to itself, the compiler spills to get 80 registers a thread on sm_86 and sm_100.
            combine_kernel[launch_grid(num_blocks, softmaxes.num_softmaxes)](
                **arguments, BLOCK_K=min(config.block_d, 64), num_warps=8, maxnreg=128
            )
    if not is_reduced:
        return losses, lse.new_empty(0), lse.new_empty(0), lse
    loss, step_losses, step_scale = lse.new_empty(()), lse.new_empty(num_steps), lse.new_empty(num_steps)
    reduce_kernel[launch_grid(1)](
        loss, step_losses, step_scale, loss_sums, counts, step_weights, num_steps, num_blocks,
        MEAN=reduction == REDUCTIONS["mean"], BLOCK=512, num_warps=4,
    )  # fmt: skip
    return loss, step_losses, step_scale, lse
