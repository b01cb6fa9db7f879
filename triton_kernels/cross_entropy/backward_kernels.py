"""Multi-token cross-entropy, backward: the kernels. Logits are computed again for each gradient, never in memory.

For a row x of a softmax over V classes, with s_k the gradient of its loss of step k, s their sum, and y_k its targets:

    dz_v = sum_k s_k (1 + 2 zeta lse) exp(z_v - lse) - s eps / V - sum_k s_k (1 - eps) [v = y_k]
           (times 1 - (z_v / c)^2 where the logits are capped)
    dx = sum_v dz_v W_v          dW_v = sum_rows dz_v x          db_v = sum_rows dz_v

- `stamp_cross_entropy_bwd_row_terms_kernel` writes what dz needs of each row, in the order of the lists, so that the
  other kernels load vectors, and relative to `unit`, so that no product in fp16 underflows;
- `stamp_cross_entropy_bwd_hidden_kernel` keeps rows in place while classes pass by. The targets' part is one row of the
  weight for each target, added in fp32, so no class is compared with the targets;
- `stamp_cross_entropy_bwd_weight_kernel` keeps classes in place while the rows of all steps that share the weight pass
  by, so its gradient is written once.

Where a gradient has too few programs for the device, its sum is split, and the splits are added up in a fixed order.
There are no atomics and no locks.
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
    cap,
    cap_slope,
    divisible,
    exp_of_difference,
    listed_rows,
    load_features,
    load_range,
    load_target,
    multiply,
    target_logits,
)

# The row terms have whole blocks of this many entries. It is a multiple of every BLOCK_N, so no tile passes their end.
ENTRIES_PER_PROGRAM = tl.constexpr(256)

# No kernel is compiled again for other values of these. Layout says what divides the strides.
_VARYING = ["stride_hidden_step", "num_rows", "num_softmaxes", "num_classes", "first_class", "end_class"]


class RowTerms(NamedTuple):
    """The terms of dz_v = factor exp(z_v - lse) - offset - target_factor [v = target], by a row's place in the list.

    Attributes:
        lse: fp32 `[num_softmaxes, num_entries]`; inf where a row has no valid target, so its probabilities are 0.
        factor: fp32 `[num_softmaxes, num_entries]`.
        offset: fp32 `[num_softmaxes, num_entries]`.
        target: int32 `[K, num_entries]`; -1: none.
        target_factor: fp32 `[K, num_entries]`.
        target_slope: fp32 `[K, num_entries]`; `target_factor` times the slope of the cap at the target's logit. Without
            a cap it is the same tensor. The logits take more registers than the sums of the hidden gradient leave.
        unit: fp32 `[]`, the largest |gradient of a row's loss|.
    """

    lse: Tensor
    factor: Tensor
    offset: Tensor
    target: Tensor
    target_factor: Tensor
    target_slope: Tensor
    unit: Tensor


@triton.jit(do_not_specialize=_VARYING)
def stamp_cross_entropy_bwd_row_terms_kernel(
    terms: RowTerms,
    lse_ptr,  # fp32 [K, N]
    targets: PerStep,  # int64 [N, K]
    scale: PerStep,  # fp32 [N, K], or [K] with a row stride of 0: gradients of the rows' losses
    lists: RowLists,
    loss_options: LossOptions,  # without vocab_ranges
    hidden: Rows,  # [N, WIDTH] or [K, N, WIDTH]; None without softcap
    classes: Classes,  # None without softcap
    ranges_ptr,  # int32 [num_softmaxes, 2], or None
    stride_hidden_step, num_rows, first_class, end_class,
    layout: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The terms of BLOCK entries of a list. Entries past its end get terms that make no gradient.

    Grid: [num_entries / BLOCK, num_softmaxes].
    """
    STEPS_PER_SOFTMAX: tl.constexpr = layout.steps_per_softmax
    softmax_index = tl.program_id(1)
    hidden_index = softmax_index if layout.hidden_per_step else 0 * softmax_index
    start = tl.program_id(0) * BLOCK
    num_listed = tl.load(lists.lengths + hidden_index)
    row, is_listed, _ = listed_rows(lists, hidden_index, start, num_listed, num_rows, BLOCK)
    first_class, end_class = load_range(ranges_ptr, first_class, end_class, softmax_index, 1)
    num_entries = tl.num_programs(0) * BLOCK
    unit = tl.load(terms.unit)
    entry = start + tl.arange(0, BLOCK)
    row_lse = tl.full([BLOCK], float("inf"), tl.float32)
    factor = tl.zeros([BLOCK], tl.float32)
    scale_sum = tl.zeros([BLOCK], tl.float32)
    if loss_options.softcap is not None:
        bias = None
        if classes.bias is not None:
            bias = classes.bias + softmax_index * divisible(classes.stride_bias_step, layout.class_divisor)
        softmax = Softmax(
            hidden=hidden.ptr + hidden_index * divisible(stride_hidden_step, layout.stride_divisor),
            stride_row=divisible(hidden.stride_row, layout.stride_divisor),
            weight=classes.weight + softmax_index * divisible(classes.stride_step, layout.stride_divisor),
            stride_class=divisible(classes.stride_class, layout.stride_divisor),
            bias=bias,
            softcap=loss_options.softcap,
        )
    for i in tl.static_range(STEPS_PER_SOFTMAX):
        step = softmax_index * STEPS_PER_SOFTMAX + i
        target, is_valid = load_target(targets, row, is_listed, step, loss_options.ignore_index)
        pointers = scale.ptr + row * scale.stride_row + step * scale.stride_step
        step_scale = tl.load(pointers, mask=is_valid, other=0.0)
        step_scale = layout.gain * tl.where(unit > 0, step_scale / unit, 0.0)
        lse = tl.load(lse_ptr + tl.cast(step, tl.int64) * num_rows + row, mask=is_valid, other=0.0)
        row_lse = tl.where(is_valid, lse, row_lse)  # all steps of a softmax have the same
        factor += step_scale * (1.0 + 2.0 * loss_options.z_loss * lse)
        scale_sum += step_scale
        # A target outside the range, which is found only under STAMP_KERNELS_CHECK=1, must not be read.
        is_target = is_valid & (target >= first_class) & (target < end_class)
        of_step = tl.cast(step, tl.int64) * num_entries + entry
        tl.store(terms.target + of_step, tl.where(is_target, target, -1).to(tl.int32))
        target_factor = (1.0 - loss_options.label_smoothing) * step_scale
        tl.store(terms.target_factor + of_step, target_factor)
        if loss_options.softcap is not None:
            z = target_logits(softmax, row, target, is_target, layout.width, BLOCK_K)
            tl.store(terms.target_slope + of_step, target_factor * cap_slope(z, loss_options.softcap))
    of_softmax = tl.cast(softmax_index, tl.int64) * num_entries + entry
    tl.store(terms.lse + of_softmax, row_lse)
    tl.store(terms.factor + of_softmax, factor)
    tl.store(terms.offset + of_softmax, scale_sum * (loss_options.label_smoothing / (end_class - first_class)))


@triton.jit
def _num_entries(num_rows):
    """Entries of the row terms, in whole blocks."""
    return tl.cdiv(num_rows, ENTRIES_PER_PROGRAM) * ENTRIES_PER_PROGRAM


@triton.jit
def _add_hidden_gradient(
    dx, x, lse, factor, offset, row, is_listed, softmax, start_class, end_class, start_feature,
    MASKED: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """dx [BLOCK_N, BLOCK_D] plus dz W over the classes `start_class ... end_class - 1`, without the targets' part.

    Without MASKED the classes are whole tiles. With MASKED the classes past the end are the last one again, without a
    gradient: masked loads would take more registers.
    """
    BLOCK_V: tl.constexpr = tile.block_v
    for start in range(start_class, end_class, BLOCK_V):
        class_ = start + tl.arange(0, BLOCK_V)
        has_gradient = class_ < end_class
        exists = tl.full([BLOCK_V], True, tl.int1)
        if MASKED:
            class_ = tl.minimum(class_, end_class - 1)
        w = load_features(
            softmax.weight, class_, softmax.stride_class, exists, start_feature, layout.width, tile.block_d
        )  # [BLOCK_V, BLOCK_D]
        # z = x W^T, [BLOCK_N, BLOCK_V]
        if layout.width <= tile.block_d:
            z = tl.dot(x, tl.trans(w), input_precision="ieee")
        else:
            z = multiply(
                softmax.hidden, row, softmax.stride_row, is_listed,
                softmax.weight, class_, softmax.stride_class, exists, layout.width, tile.block_k,
            )  # fmt: skip
        z = biased_and_capped(z, softmax, class_, exists)
        # dz = factor exp(z - lse) - offset
        dz = exp_of_difference(z, lse[:, None]) * factor[:, None] - offset[:, None]
        if softmax.softcap is not None:
            dz *= cap_slope(z, softmax.softcap)
        if MASKED:
            dz = tl.where(has_gradient[None, :], dz, 0.0)
        # dx += dz W, [BLOCK_N, BLOCK_D]
        dx = tl.dot(dz.to(w.dtype), w, dx, input_precision="ieee")
    return dx


@triton.jit(do_not_specialize=_VARYING)
def stamp_cross_entropy_bwd_hidden_kernel(
    dhidden_ptr,  # [num_hidden, N, WIDTH], or fp32 [num_splits, num_hidden, N, WIDTH] where there are several splits
    hidden: Rows,  # [N, WIDTH] or [K, N, WIDTH]
    classes: Classes,
    terms: RowTerms,
    lists: RowLists,
    softcap,
    ranges_ptr,  # int32 [num_softmaxes, 2]: first_class and end_class of each; None: all softmaxes have the same
    stride_hidden_step, num_rows, num_softmaxes, first_class, end_class,
    PLAIN: tl.constexpr, layout: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """BLOCK_D features of the gradient of BLOCK_N rows, from one split of the classes of every softmax over these rows.

    PLAIN: the offset of every row is 0. Rows without a valid target get zeros.

    Grid: [ceil(N / BLOCK_N), num_hidden, num_splits * ceil(WIDTH / BLOCK_D)].
    """
    BLOCK_N: tl.constexpr = tile.block_n
    BLOCK_D: tl.constexpr = tile.block_d
    BLOCK_V: tl.constexpr = tile.block_v
    NUM_FEATURE_BLOCKS: tl.constexpr = (layout.width + tile.block_d - 1) // tile.block_d
    hidden_index = tl.program_id(1)
    start_feature = tl.program_id(2) % NUM_FEATURE_BLOCKS * BLOCK_D
    split = tl.program_id(2) // NUM_FEATURE_BLOCKS
    num_splits = tl.num_programs(2) // NUM_FEATURE_BLOCKS
    start = tl.program_id(0) * BLOCK_N
    num_listed = tl.load(lists.lengths + hidden_index)
    row, is_listed, exists = listed_rows(lists, hidden_index, start, num_listed, num_rows, BLOCK_N)
    num_entries = _num_entries(num_rows)
    first_softmax = hidden_index if layout.hidden_per_step else 0 * hidden_index
    end_softmax = hidden_index + 1 if layout.hidden_per_step else num_softmaxes
    end_softmax = tl.where(start < num_listed, end_softmax, first_softmax)  # rows without a target have nothing to do
    stride_row = divisible(hidden.stride_row, layout.stride_divisor)
    stride_class = divisible(classes.stride_class, layout.stride_divisor)
    hidden_ptr = hidden.ptr + first_softmax * divisible(stride_hidden_step, layout.stride_divisor)
    x = 0.0
    if layout.width <= tile.block_d:
        x = load_features(hidden_ptr, row, stride_row, is_listed, 0, layout.width, BLOCK_D)  # [BLOCK_N, BLOCK_D]

    dx = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for softmax_index in range(first_softmax, end_softmax):
        first_class, end_class = load_range(ranges_ptr, first_class, end_class, softmax_index, layout.class_divisor)
        bias = None
        if classes.bias is not None:
            bias = classes.bias + softmax_index * divisible(classes.stride_bias_step, layout.class_divisor)
        softmax = Softmax(
            hidden=hidden_ptr,
            stride_row=stride_row,
            weight=classes.weight + softmax_index * divisible(classes.stride_step, layout.stride_divisor),
            stride_class=stride_class,
            bias=bias,
            softcap=softcap,
        )
        # dx -= target_factor W_y for each target y
        for i in range(layout.steps_per_softmax):
            of_step = tl.cast(softmax_index * layout.steps_per_softmax + i, tl.int64) * num_entries + start
            of_step += tl.arange(0, BLOCK_N)
            target = tl.load(terms.target + of_step)
            target_factor = tl.load(terms.target_slope + of_step)
            is_target = (target >= 0) & (split == 0)
            w = load_features(
                softmax.weight, target, stride_class, is_target, start_feature, layout.width, BLOCK_D
            )  # [BLOCK_N, BLOCK_D]
            dx -= target_factor[:, None] * w.to(tl.float32)

        of_softmax = tl.cast(softmax_index, tl.int64) * num_entries + start + tl.arange(0, BLOCK_N)
        lse, factor = tl.load(terms.lse + of_softmax), tl.load(terms.factor + of_softmax)
        offset = tl.zeros([BLOCK_N], tl.float32) if PLAIN else tl.load(terms.offset + of_softmax)
        classes_per_split = tl.cdiv(tl.cdiv(end_class - first_class, BLOCK_V), num_splits) * BLOCK_V
        start_split = first_class + split * classes_per_split
        end_split = tl.minimum(start_split + classes_per_split, end_class)
        end_whole = start_split + tl.maximum(end_split - start_split, 0) // BLOCK_V * BLOCK_V
        for masked in tl.static_range(2):
            dx = _add_hidden_gradient(
                dx, x, lse, factor, offset, row, is_listed, softmax,
                end_whole if masked else start_split, end_split if masked else end_whole, start_feature,
                masked, layout, tile,
            )  # fmt: skip

    feature = start_feature + tl.arange(0, BLOCK_D)
    num_hidden = tl.num_programs(1)
    # 128 x 256 sums are 128 registers of a thread: those of the rows would be spilled meanwhile.
    row, _, exists = listed_rows(lists, hidden_index, start, num_listed, num_rows, BLOCK_N, BLOCK_N * BLOCK_D >= 32768)
    row += (tl.cast(split, tl.int64) * num_hidden + hidden_index) * num_rows
    pointers = dhidden_ptr + (row * layout.width)[:, None] + feature[None, :]
    unit = tl.load(terms.unit)
    dx = (dx * (unit / layout.gain)).to(dhidden_ptr.dtype.element_ty)
    tl.store(pointers, dx, mask=exists[:, None] & (feature < layout.width)[None, :])


@triton.jit(do_not_specialize=_VARYING)
def stamp_cross_entropy_bwd_weight_kernel(
    dweight_ptr,  # [num_weights, V, WIDTH], or fp32 [num_splits, num_weights, V, WIDTH]; None: not needed
    dbias_ptr,  # fp32 [num_splits, num_softmaxes, V]; None: not needed
    hidden: Rows,  # [N, WIDTH] or [K, N, WIDTH]
    classes: Classes,
    terms: RowTerms,
    lists: RowLists,
    softcap,
    ranges_ptr,  # int32 [num_softmaxes, 2], or None
    stride_hidden_step, num_rows, num_softmaxes, num_classes, first_class, end_class,
    WEIGHT_PER_STEP: tl.constexpr, ALL_CLASSES: tl.constexpr, PLAIN: tl.constexpr, layout: tl.constexpr,
    tile: tl.constexpr,
):  # fmt: skip
    """BLOCK_D features of the gradient of BLOCK_V classes of one weight, and the gradient of their bias.

    The program passes over one split of the rows of every softmax over the weight; logits are computed with classes
    first. PLAIN: a row has one target, whose factor is that of the row, and its offset is 0. ALL_CLASSES: the range of
    every softmax is all classes; what classes past the last one would get is not stored.

    Grid: [ceil(V / BLOCK_V), num_weights, num_splits * ceil(WIDTH / BLOCK_D)].
    """
    BLOCK_N: tl.constexpr = tile.block_n
    BLOCK_V: tl.constexpr = tile.block_v
    BLOCK_D: tl.constexpr = tile.block_d
    NUM_FEATURE_BLOCKS: tl.constexpr = (layout.width + tile.block_d - 1) // tile.block_d
    STEPS_PER_SOFTMAX: tl.constexpr = layout.steps_per_softmax
    weight_index = tl.program_id(1)
    feature_block = tl.program_id(2) % NUM_FEATURE_BLOCKS
    start_feature = feature_block * BLOCK_D
    split = tl.program_id(2) // NUM_FEATURE_BLOCKS
    num_splits = tl.num_programs(2) // NUM_FEATURE_BLOCKS
    class_ = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    exists = class_ < num_classes
    num_entries = _num_entries(num_rows)
    unit = tl.load(terms.unit)
    first_softmax = weight_index if WEIGHT_PER_STEP else 0 * weight_index
    end_softmax = weight_index + 1 if WEIGHT_PER_STEP else num_softmaxes
    stride_row = divisible(hidden.stride_row, layout.stride_divisor)
    stride_class = divisible(classes.stride_class, layout.stride_divisor)
    weight_ptr = classes.weight + first_softmax * divisible(classes.stride_step, layout.stride_divisor)
    w = 0.0
    if layout.width <= tile.block_d:
        w = load_features(weight_ptr, class_, stride_class, exists, 0, layout.width, BLOCK_D)  # [BLOCK_V, BLOCK_D]

    dw = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for softmax_index in range(first_softmax, end_softmax):
        softmax_64 = tl.cast(softmax_index, tl.int64)
        hidden_index = softmax_index if layout.hidden_per_step else 0 * softmax_index
        hidden_ptr = hidden.ptr + softmax_index * divisible(stride_hidden_step, layout.stride_divisor)
        first_class, end_class = load_range(ranges_ptr, first_class, end_class, softmax_index, layout.class_divisor)
        in_range = (class_ >= first_class) & (class_ < end_class)
        if classes.bias is not None:
            bias_pointers = classes.bias + softmax_64 * classes.stride_bias_step + class_
            bias = tl.load(bias_pointers, mask=in_range, other=0.0).to(tl.float32)
        num_listed = tl.load(lists.lengths + hidden_index)
        some_are_outside = False
        if not ALL_CLASSES:
            # A softmax over other classes has no rows for these. Few tiles lie across the end of a range.
            num_listed = tl.where(tl.max(in_range.to(tl.int32), axis=0) != 0, num_listed, 0)
            some_are_outside = tl.min(in_range.to(tl.int32), axis=0) == 0
        rows_per_split = tl.cdiv(tl.cdiv(num_listed, BLOCK_N), num_splits) * BLOCK_N
        start_split = split * rows_per_split
        db = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
        for start in range(start_split, tl.minimum(start_split + rows_per_split, num_listed), BLOCK_N):
            row, is_listed, _ = listed_rows(lists, hidden_index, start, num_listed, num_rows, BLOCK_N)
            x = load_features(
                hidden_ptr, row, stride_row, is_listed, start_feature, layout.width, BLOCK_D
            )  # [BLOCK_N, BLOCK_D]
            # z^T = W x^T, [BLOCK_V, BLOCK_N]
            if layout.width <= tile.block_d:
                z = tl.dot(w, tl.trans(x), input_precision="ieee")
            else:
                z = multiply(
                    weight_ptr, class_, stride_class, exists,
                    hidden_ptr, row, stride_row, is_listed, layout.width, tile.block_k,
                )  # fmt: skip
            if classes.bias is not None:
                z += bias[:, None]
            if softcap is not None:
                z = cap(z, softcap)
            # dz = factor exp(z - lse) - offset - target_factor [v = target]
            entry = start + tl.arange(0, BLOCK_N)
            of_softmax = softmax_64 * num_entries + entry
            factor = tl.load(terms.factor + of_softmax)[None, :]
            dz = exp_of_difference(z, tl.load(terms.lse + of_softmax)[None, :])
            if PLAIN:
                is_target = class_[:, None] == tl.load(terms.target + of_softmax)[None, :]
                dz = tl.where(is_target, dz - 1.0, dz) * factor
            else:
                dz = dz * factor - tl.load(terms.offset + of_softmax)[None, :]
                for i in tl.static_range(STEPS_PER_SOFTMAX):
                    of_step = (softmax_64 * STEPS_PER_SOFTMAX + i) * num_entries + entry
                    is_target = class_[:, None] == tl.load(terms.target + of_step)[None, :]
                    dz -= tl.where(is_target, tl.load(terms.target_factor + of_step)[None, :], 0.0)
            if softcap is not None:
                dz *= cap_slope(z, softcap)
            if some_are_outside:
                dz = tl.where(in_range[:, None], dz, 0.0)
            if dweight_ptr is not None:
                # dW += dz^T x, [BLOCK_V, BLOCK_D]
                dw = tl.dot(dz.to(x.dtype), x, dw, input_precision="ieee")
            if dbias_ptr is not None:
                db += dz
        if dbias_ptr is not None:
            of_split = dbias_ptr + (tl.cast(split, tl.int64) * num_softmaxes + softmax_index) * num_classes
            tl.store(of_split + class_, tl.sum(db, axis=1) * (unit / layout.gain), mask=exists & (feature_block == 0))

    if dweight_ptr is not None:
        feature = start_feature + tl.arange(0, BLOCK_D)
        num_weights = tl.num_programs(1)
        # In other arithmetic than above, so that the compiler does not keep it during the loops, in spilled registers.
        class_row = tl.cast(tl.program_id(0), tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
        exists = class_row < num_classes
        class_row += (tl.cast(split, tl.int64) * num_weights + weight_index) * num_classes
        pointers = dweight_ptr + (class_row * layout.width)[:, None] + feature[None, :]
        dw = (dw * (unit / layout.gain)).to(dweight_ptr.dtype.element_ty)
        tl.store(pointers, dw, mask=exists[:, None] & (feature < layout.width)[None, :])
