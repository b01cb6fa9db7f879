"""Multi-token cross-entropy, forward: the kernels. The logits are never in memory.

For a row x of a softmax over the V classes v of a range, with targets y_k:

    z_v = x W_v^T + b_v                                        capped: c tanh(z_v / c)
    lse = log sum_v exp(z_v)
    loss_k = lse - (1 - eps) z_{y_k} - eps / V sum_v z_v + zeta lse^2       eps: label_smoothing, zeta: z_loss

- `stamp_cross_entropy_fwd_kernel` keeps rows in place while classes pass by, with an online softmax. Many classes are
  split among programs;
- `stamp_cross_entropy_fwd_combine_kernel` joins the splits of a row, where there are several;
- `stamp_cross_entropy_fwd_reduce_kernel` adds up tiles of rows to the loss of each step and the total.

The logit of a target is a product of its own, with one row of the weight. It would cost more to ask of every class of
every tile whether it is a target.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.arguments import LossOptions
from stamp_kernels.triton_kernels.cross_entropy.tiles import (
    Classes,
    PerStep,
    RowLists,
    Rows,
    Softmax,
    biased_and_capped,
    divisible,
    exp_of_difference,
    finite_pivot,
    listed_rows,
    load_features,
    load_range,
    load_target,
    multiply,
    target_logits,
)

# No kernel is compiled again for other values of these. Layout says what divides the strides.
_VARYING = ["stride_hidden_step", "num_rows", "num_splits", "first_class", "end_class"]


class ForwardOutputs(NamedTuple):
    """What the forward writes; num_tiles is the number of tiles of rows.

    Attributes:
        loss_sums: fp32 `[K, num_tiles]`, sums of the losses of a tile.
        counts: int32 `[K, num_tiles]`, valid targets of a tile.
        losses: fp32 `[N, K]`, or None where only sums are needed.
        lse: fp32 `[K, N]`.
        partials: fp32 `[3, num_softmaxes, num_splits, N]`, the `OnlineSoftmax` of every split, by place in the list of
            rows; None with one split.
    """

    loss_sums: Tensor
    counts: Tensor
    losses: Tensor | None
    lse: Tensor
    partials: Tensor | None


class OnlineSoftmax(NamedTuple):
    """What is known of a row after some classes, each `[BLOCK_N]`.

    Attributes:
        row_max: `max_v z_v`.
        row_sum: `sum_v exp(z_v - row_max)`.
        sum_logits: `sum_v z_v`.
    """

    row_max: Tensor
    row_sum: Tensor
    sum_logits: Tensor


@triton.jit
def _add_classes(
    state, x, row, is_listed, softmax, start_class, end_class,
    MASKED: tl.constexpr, SUM_LOGITS: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """The state with the classes `start_class ... end_class - 1` added; without MASKED they are whole tiles."""
    BLOCK_V: tl.constexpr = tile.block_v
    row_max = state.row_max
    row_sum = state.row_sum
    sum_logits = state.sum_logits
    for start in range(start_class, end_class, BLOCK_V):
        class_ = start + tl.arange(0, BLOCK_V)
        exists = (class_ < end_class) if MASKED else tl.full([BLOCK_V], True, tl.int1)
        # z = x W^T, [BLOCK_N, BLOCK_V]
        if layout.width <= tile.block_d:
            w = load_features(softmax.weight, class_, softmax.stride_class, exists, 0, layout.width, tile.block_d)
            z = tl.dot(x, tl.trans(w), input_precision="ieee")
        else:
            z = multiply(
                softmax.hidden, row, softmax.stride_row, is_listed,
                softmax.weight, class_, softmax.stride_class, exists, layout.width, tile.block_d,
            )  # fmt: skip
        z = biased_and_capped(z, softmax, class_, exists)
        if SUM_LOGITS:
            sum_logits += tl.sum(tl.where(exists[None, :], z, 0.0) if MASKED else z, axis=1)
        if MASKED:
            z = tl.where(exists[None, :], z, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(z, axis=1))
        pivot = finite_pivot(new_max)
        row_sum = row_sum * exp_of_difference(row_max, pivot) + tl.sum(exp_of_difference(z, pivot[:, None]), axis=1)
        row_max = new_max
    return OnlineSoftmax(row_max=row_max, row_sum=row_sum, sum_logits=sum_logits)


@triton.jit
def _store_losses(
    out, state, row, is_listed, softmax, softmax_index, targets, loss_options, first_class, end_class, num_rows,
    layout: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Losses of a tile of rows from their finished state; the sum and the number of losses for each step."""
    STEPS_PER_SOFTMAX: tl.constexpr = layout.steps_per_softmax
    num_tiles = tl.num_programs(0)
    num_steps = tl.num_programs(1) * STEPS_PER_SOFTMAX
    lse = state.row_max + tl.log(state.row_sum)
    label_smoothing = loss_options.label_smoothing
    for i in tl.static_range(STEPS_PER_SOFTMAX):
        step = softmax_index * STEPS_PER_SOFTMAX + i
        target, is_valid = load_target(targets, row, is_listed, step, loss_options.ignore_index)
        # A target outside the range, which is found only under STAMP_KERNELS_CHECK=1, must not be read.
        is_target = is_valid & (target >= first_class) & (target < end_class)
        z = target_logits(softmax, row, target, is_target, layout.width, BLOCK_K)
        loss = lse - (1.0 - label_smoothing) * z + loss_options.z_loss * lse * lse
        loss -= label_smoothing / (end_class - first_class) * state.sum_logits
        loss = tl.where(is_valid, loss, 0.0)
        tl.store(out.lse + tl.cast(step, tl.int64) * num_rows + row, tl.where(is_valid, lse, 0.0), mask=is_listed)
        if out.losses is not None:
            tl.store(out.losses + row * num_steps + step, loss, mask=is_listed)
        tl.store(out.loss_sums + step * num_tiles + tl.program_id(0), tl.sum(loss, axis=0))
        tl.store(out.counts + step * num_tiles + tl.program_id(0), tl.sum(is_valid.to(tl.int32), axis=0))


@triton.jit
def _store_no_losses(out, softmax_index, STEPS_PER_SOFTMAX: tl.constexpr):
    """A tile of rows without valid targets."""
    num_tiles = tl.num_programs(0)
    for i in tl.static_range(STEPS_PER_SOFTMAX):
        step = softmax_index * STEPS_PER_SOFTMAX + i
        tl.store(out.loss_sums + step * num_tiles + tl.program_id(0), 0.0)
        tl.store(out.counts + step * num_tiles + tl.program_id(0), 0)


@triton.jit(do_not_specialize=_VARYING)
def stamp_cross_entropy_fwd_kernel(
    out: ForwardOutputs,
    hidden: Rows,  # [N, WIDTH] or [K, N, WIDTH]
    classes: Classes,
    targets: PerStep,  # int64 [N, K]
    lists: RowLists,
    loss_options: LossOptions,  # without vocab_ranges
    ranges_ptr,  # int32 [num_softmaxes, 2]: first_class and end_class of each; None: all softmaxes have the same
    stride_hidden_step, num_rows, first_class, end_class,
    SUM_LOGITS: tl.constexpr, CLASSES_PER_SPLIT: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one softmax against one split of its classes; the losses too, if there is one split.

    Grid: [ceil(N / BLOCK_N), num_softmaxes, num_splits].
    """
    BLOCK_N: tl.constexpr = tile.block_n
    softmax_index = tl.program_id(1)
    split = tl.program_id(2)
    hidden_index = softmax_index if layout.hidden_per_step else 0 * softmax_index
    num_listed = tl.load(lists.lengths + hidden_index)
    start = tl.program_id(0) * BLOCK_N
    if start >= num_listed:
        if out.partials is None:
            _store_no_losses(out, softmax_index, layout.steps_per_softmax)
        return

    row, is_listed, _ = listed_rows(lists, hidden_index, start, num_listed, num_rows, BLOCK_N)
    first_class, end_class = load_range(ranges_ptr, first_class, end_class, softmax_index, layout.class_divisor)
    bias = None
    if classes.bias is not None:
        bias = classes.bias + softmax_index * divisible(classes.stride_bias_step, layout.class_divisor)
    softmax = Softmax(
        hidden=hidden.ptr + softmax_index * divisible(stride_hidden_step, layout.stride_divisor),
        stride_row=divisible(hidden.stride_row, layout.stride_divisor),
        weight=classes.weight + softmax_index * divisible(classes.stride_step, layout.stride_divisor),
        stride_class=divisible(classes.stride_class, layout.stride_divisor),
        bias=bias,
        softcap=loss_options.softcap,
    )
    x = 0.0
    if layout.width <= tile.block_d:
        x = load_features(softmax.hidden, row, softmax.stride_row, is_listed, 0, layout.width, tile.block_d)

    start_split = first_class + split * CLASSES_PER_SPLIT
    end_split = tl.minimum(start_split + CLASSES_PER_SPLIT, end_class)
    end_whole = start_split + tl.maximum(end_split - start_split, 0) // tile.block_v * tile.block_v
    state = OnlineSoftmax(
        row_max=tl.full([BLOCK_N], float("-inf"), tl.float32),
        row_sum=tl.zeros([BLOCK_N], tl.float32),
        sum_logits=tl.zeros([BLOCK_N], tl.float32),
    )
    state = _add_classes(state, x, row, is_listed, softmax, start_split, end_whole, False, SUM_LOGITS, layout, tile)
    state = _add_classes(state, x, row, is_listed, softmax, end_whole, end_split, True, SUM_LOGITS, layout, tile)

    if out.partials is None:
        _store_losses(
            out, state, row, is_listed, softmax, softmax_index, targets, loss_options, first_class, end_class, num_rows,
            layout, tile.block_k,
        )  # fmt: skip
    else:
        entry = start + tl.arange(0, BLOCK_N)
        num_splits = tl.num_programs(2)
        of_split = out.partials + (tl.cast(softmax_index, tl.int64) * num_splits + split) * num_rows + entry
        stride_kind = tl.cast(tl.num_programs(1), tl.int64) * num_splits * num_rows
        tl.store(of_split, state.row_max, mask=is_listed)
        tl.store(of_split + stride_kind, state.row_sum, mask=is_listed)
        tl.store(of_split + 2 * stride_kind, state.sum_logits, mask=is_listed)


@triton.jit(do_not_specialize=_VARYING)
def stamp_cross_entropy_fwd_combine_kernel(
    out: ForwardOutputs,
    hidden: Rows,  # [N, WIDTH] or [K, N, WIDTH]
    classes: Classes,
    targets: PerStep,  # int64 [N, K]
    lists: RowLists,
    loss_options: LossOptions,  # without vocab_ranges
    ranges_ptr,  # int32 [num_softmaxes, 2], or None
    stride_hidden_step, num_rows, num_splits, first_class, end_class,
    layout: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Losses of BLOCK_N rows of one softmax from the partial sums of its splits, in the order of the splits.

    Grid: [ceil(N / BLOCK_N), num_softmaxes].
    """
    BLOCK_N: tl.constexpr = tile.block_n
    softmax_index = tl.program_id(1)
    hidden_index = softmax_index if layout.hidden_per_step else 0 * softmax_index
    num_listed = tl.load(lists.lengths + hidden_index)
    start = tl.program_id(0) * BLOCK_N
    if start >= num_listed:
        _store_no_losses(out, softmax_index, layout.steps_per_softmax)
        return

    row, is_listed, _ = listed_rows(lists, hidden_index, start, num_listed, num_rows, BLOCK_N)
    softmax_64 = tl.cast(softmax_index, tl.int64)
    stride_kind = tl.cast(tl.num_programs(1), tl.int64) * num_splits * num_rows
    row_max = tl.full([BLOCK_N], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_N], tl.float32)
    sum_logits = tl.zeros([BLOCK_N], tl.float32)
    for split in range(num_splits):
        of_split = out.partials + (softmax_64 * num_splits + split) * num_rows + start + tl.arange(0, BLOCK_N)
        split_max = tl.load(of_split, mask=is_listed, other=0.0)
        new_max = tl.maximum(row_max, split_max)
        pivot = finite_pivot(new_max)
        split_sum = tl.load(of_split + stride_kind, mask=is_listed, other=0.0)
        row_sum = row_sum * exp_of_difference(row_max, pivot) + split_sum * exp_of_difference(split_max, pivot)
        sum_logits += tl.load(of_split + 2 * stride_kind, mask=is_listed, other=0.0)
        row_max = new_max

    first_class, end_class = load_range(ranges_ptr, first_class, end_class, softmax_index, layout.class_divisor)
    bias = None
    if classes.bias is not None:
        bias = classes.bias + softmax_64 * classes.stride_bias_step
    softmax = Softmax(
        hidden=hidden.ptr + softmax_index * divisible(stride_hidden_step, layout.stride_divisor),
        stride_row=divisible(hidden.stride_row, layout.stride_divisor),
        weight=classes.weight + softmax_index * divisible(classes.stride_step, layout.stride_divisor),
        stride_class=divisible(classes.stride_class, layout.stride_divisor),
        bias=bias,
        softcap=loss_options.softcap,
    )
    _store_losses(
        out, OnlineSoftmax(row_max=row_max, row_sum=row_sum, sum_logits=sum_logits), row, is_listed, softmax,
        softmax_index, targets, loss_options, first_class, end_class, num_rows, layout, tile.block_k,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_steps", "num_tiles"])
def stamp_cross_entropy_fwd_reduce_kernel(
    loss_ptr,  # fp32 []
    step_losses_ptr,  # fp32 [K]
    step_scale_ptr,  # fp32 [K]
    loss_sums_ptr,  # fp32 [K, num_tiles]
    counts_ptr,  # int32 [K, num_tiles]
    step_weights_ptr,  # floating [K], or None: all 1
    num_steps,
    num_tiles,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`sum_k w_k loss_k`, where loss_k is the mean over the valid targets of step k (0 if there are none) or their sum.

    step_scale is the gradient of a row's loss in the result. The order of the sums depends only on the number of rows.

    Grid: [1].
    """
    total = 0.0
    for step in range(num_steps):
        sums = tl.zeros([BLOCK], tl.float32)
        counts = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_tiles, BLOCK):
            tile = start + tl.arange(0, BLOCK)
            sums += tl.load(loss_sums_ptr + step * num_tiles + tile, mask=tile < num_tiles, other=0.0)
            counts += tl.load(counts_ptr + step * num_tiles + tile, mask=tile < num_tiles, other=0)
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
