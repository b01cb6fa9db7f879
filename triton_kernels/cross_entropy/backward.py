"""Multi-token cross-entropy, backward, without logits in memory: they are computed again, once for each gradient.

For a row x of a softmax, with s_k the gradient of its loss of step k and s their sum:

    dz_v = sum_k s_k (1 + 2 zeta lse) exp(z_v - lse) - s eps / V - sum_k s_k (1 - eps) [v = y_k]
           (times 1 - (z_v / c)^2 where the logits are capped)
    dx = sum_v dz_v W_v          dW_v = sum_rows dz_v x          db_v = sum_rows dz_v

- `row_terms_kernel` writes what this takes of each row, in the order of the lists, so that the other kernels read it in
  vectors, and relative to `unit`, so that no product in fp16 underflows;
- `hidden_gradient_kernel`: rows in place, classes pass by. The labels' part is a row of the weight for each label,
  added in fp32: no look at every class whether it is a label;
- `weight_gradient_kernel`: classes in place, rows pass by, those of all steps that share the weight, so that its
  gradient is written once.

Where a gradient has too few programs for the device, its sum is split into parts that are added up in a fixed order.
Neither atomics nor locks.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.triton_kernels.cross_entropy.tiles import (
    SCALARS,
    SIZES,
    STRIDES,
    RowLists,
    Softmaxes,
    biased_and_capped,
    cap,
    divisible,
    exp_of_difference,
    gain,
    has_asynchronous_products,
    label_logits,
    listed_rows,
    load_features,
    load_label,
    load_range,
    multiply,
    slope,
    stages_that_fit,
)
from stamp_kernels.triton_kernels.device import DeviceProperties, device_properties, launch_grid

# A multiple of every BLOCK_N: no program meets the end of the terms.
_ENTRIES_PER_PROGRAM = tl.constexpr(256)


@triton.jit(do_not_specialize=[*SCALARS, *SIZES, "num_entries"])
def row_terms_kernel(
    lse_ptr,  # fp32 [num_softmaxes, num_entries]; +inf where a row has no valid label: its probabilities are 0
    factor_ptr,  # fp32 [num_softmaxes, num_entries]
    offset_ptr,  # fp32 [num_softmaxes, num_entries]
    label_ptr,  # int32 [K, num_entries]; -1: none
    of_label_ptr,  # fp32 [K, num_entries]
    step_lse_ptr,  # fp32 [K, N]
    targets_ptr,  # int64 [N, K]
    scale_ptr,  # fp32 [N, K], or [K] with a row stride of 0: gradients of the rows' losses
    unit_ptr,  # fp32 []: the largest of |scale|
    ranges_ptr,  # int32 [num_softmaxes, 2], or None: first_class and end_class
    rows_ptr,  # int32 [num_hidden, N]
    lengths_ptr,  # int32 [num_hidden]
    stride_target_row, stride_target_step, stride_scale_row, stride_scale_step,
    num_rows, num_entries, first_class, end_class, ignore_index, label_smoothing, z_loss,
    LABELS: tl.constexpr, HIDDEN_PER_STEP: tl.constexpr, GAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The terms of dz_v = factor exp(z_v - lse) - offset - sum of of_label at the labels, for BLOCK entries of a list.

    Grid: [num_entries / BLOCK, num_softmaxes]. Entries past the list's end get terms of no gradient.
    """
    softmax = tl.program_id(1)
    hidden = softmax if HIDDEN_PER_STEP else 0 * softmax
    first = tl.program_id(0) * BLOCK
    row, is_listed, _ = listed_rows(rows_ptr, hidden, first, tl.load(lengths_ptr + hidden), num_rows, BLOCK)
    first_class, end_class = load_range(ranges_ptr, first_class, end_class, softmax, 1)
    num_entries = divisible(num_entries, BLOCK)
    unit = tl.load(unit_ptr)
    entry = first + tl.arange(0, BLOCK)
    row_lse = tl.full([BLOCK], float("inf"), tl.float32)
    factor = tl.zeros([BLOCK], tl.float32)
    total_scale = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(LABELS):
        step = softmax * LABELS + i
        label, is_valid = load_label(
            targets_ptr, row, is_listed, step, stride_target_row, stride_target_step, ignore_index
        )
        scale = tl.load(scale_ptr + row * stride_scale_row + step * stride_scale_step, mask=is_valid, other=0.0)
        scale = GAIN * tl.where(unit > 0, scale / unit, 0.0)
        lse = tl.load(step_lse_ptr + tl.cast(step, tl.int64) * num_rows + row, mask=is_valid, other=0.0)
        row_lse = tl.where(is_valid, lse, row_lse)  # the same for all labels of a softmax
        factor += scale * (1.0 + 2.0 * z_loss * lse)
        total_scale += scale
        # A label outside the range, which only STAMP_KERNELS_CHECK=1 would find, must not be read.
        is_label = is_valid & (label >= first_class) & (label < end_class)
        of_step = tl.cast(step, tl.int64) * num_entries + entry
        tl.store(label_ptr + of_step, tl.where(is_label, label, -1).to(tl.int32))
        tl.store(of_label_ptr + of_step, (1.0 - label_smoothing) * scale)
    of_softmax = tl.cast(softmax, tl.int64) * num_entries + entry
    tl.store(lse_ptr + of_softmax, row_lse)
    tl.store(factor_ptr + of_softmax, factor)
    tl.store(offset_ptr + of_softmax, total_scale * (label_smoothing / (end_class - first_class)))


@triton.jit
def _add_hidden_gradient(
    acc, x, lse, factor, offset, row, is_listed, first_class, end_class, first_feature,
    hidden_ptr, weight_ptr, bias_ptr, stride_hidden_row, stride_weight_class, softcap,
    MASKED: tl.constexpr, RESIDENT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc `[BLOCK_N, BLOCK_D]` plus dz W over the classes `first_class ... end_class - 1`, but for the labels' part.

    MASKED False promises whole blocks of classes.
    """
    for start in range(first_class, end_class, BLOCK_V):
        class_ = start + tl.arange(0, BLOCK_V)
        exists = (class_ < end_class) if MASKED else tl.full([BLOCK_V], True, tl.int1)
        w = load_features(weight_ptr, class_, stride_weight_class, exists, first_feature, WIDTH, BLOCK_D)
        if RESIDENT:
            z = tl.dot(x, tl.trans(w), input_precision="ieee")  # [BLOCK_N, BLOCK_V]
        else:
            z = multiply(
                hidden_ptr, row, stride_hidden_row, is_listed, weight_ptr, class_, stride_weight_class, exists,
                WIDTH, BLOCK_K,
            )  # fmt: skip
        z = biased_and_capped(z, bias_ptr, class_, exists, softcap)
        dz = exp_of_difference(z, lse[:, None]) * factor[:, None] - offset[:, None]
        if softcap is not None:
            dz *= slope(z, softcap)
        if MASKED:
            dz = tl.where(exists[None, :], dz, 0.0)
        acc = tl.dot(dz.to(w.dtype), w, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "num_entries"])
def hidden_gradient_kernel(
    grad_hidden_ptr,  # [num_hidden, N, WIDTH], or fp32 [num_splits, num_hidden, N, WIDTH] where there are several
    hidden_ptr,  # [N, WIDTH] or [K, N, WIDTH]
    weight_ptr,  # [V, WIDTH] or [K, V, WIDTH]
    bias_ptr,  # [V] or [K, V], or None
    lse_ptr,  # the terms of `row_terms_kernel`
    factor_ptr,
    offset_ptr,
    label_ptr,
    of_label_ptr,
    unit_ptr,  # fp32 []
    ranges_ptr,  # int32 [num_softmaxes, 2], or None: first_class and end_class
    rows_ptr,  # int32 [num_hidden, N]
    lengths_ptr,  # int32 [num_hidden]
    stride_hidden_step, stride_hidden_row, stride_weight_step, stride_weight_class, stride_bias_step,
    num_rows, num_entries, num_softmaxes, num_splits, first_class, end_class, softcap,
    LABELS: tl.constexpr, HIDDEN_PER_STEP: tl.constexpr, PLAIN: tl.constexpr, GAIN: tl.constexpr,
    STRIDE_DIVISOR: tl.constexpr, CLASS_DIVISOR: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_D features of the gradient of BLOCK_N rows, from one split of the classes of every softmax over them.

    Grid: [ceil(N / BLOCK_N), num_hidden, ceil(WIDTH / BLOCK_D) * num_splits]. Rows without a label get zeros.
    """
    hidden = tl.program_id(1)
    num_feature_blocks: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    first_feature = tl.program_id(2) % num_feature_blocks * BLOCK_D
    split = tl.program_id(2) // num_feature_blocks
    first = tl.program_id(0) * BLOCK_N
    num_listed = tl.load(lengths_ptr + hidden)
    row, is_listed, exists = listed_rows(rows_ptr, hidden, first, num_listed, num_rows, BLOCK_N)
    entry = first + tl.arange(0, BLOCK_N)
    unit = tl.load(unit_ptr)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_softmax = hidden if HIDDEN_PER_STEP else 0 * hidden
    end_softmax = hidden + 1 if HIDDEN_PER_STEP else num_softmaxes
    end_softmax = tl.where(first < num_listed, end_softmax, first_softmax)  # nothing to do for rows without a label
    num_entries = divisible(num_entries, _ENTRIES_PER_PROGRAM)
    stride_hidden_row = divisible(stride_hidden_row, STRIDE_DIVISOR)
    stride_weight_class = divisible(stride_weight_class, STRIDE_DIVISOR)
    hidden_ptr += first_softmax * divisible(stride_hidden_step, STRIDE_DIVISOR)
    RESIDENT: tl.constexpr = WIDTH <= BLOCK_D
    x = 0.0
    if RESIDENT:
        x = load_features(hidden_ptr, row, stride_hidden_row, is_listed, 0, WIDTH, BLOCK_D)
    for softmax in range(first_softmax, end_softmax):
        first_class, end_class = load_range(ranges_ptr, first_class, end_class, softmax, CLASS_DIVISOR)
        weight_of_softmax = weight_ptr + softmax * divisible(stride_weight_step, STRIDE_DIVISOR)
        bias_of_softmax = None
        if bias_ptr is not None:
            bias_of_softmax = bias_ptr + softmax * divisible(stride_bias_step, CLASS_DIVISOR)
        for i in range(LABELS):
            of_step = tl.cast(softmax * LABELS + i, tl.int64) * num_entries + entry
            label = tl.load(label_ptr + of_step)
            of_label = tl.load(of_label_ptr + of_step)
            is_label = (label >= 0) & (split == 0)
            if softcap is not None:
                z = label_logits(
                    hidden_ptr, row, stride_hidden_row, weight_of_softmax, label, stride_weight_class, bias_of_softmax,
                    is_label, softcap, WIDTH, BLOCK_K,
                )  # fmt: skip
                of_label *= slope(z, softcap)
            w = load_features(weight_of_softmax, label, stride_weight_class, is_label, first_feature, WIDTH, BLOCK_D)
            acc -= of_label[:, None] * w.to(tl.float32)

        of_softmax = tl.cast(softmax, tl.int64) * num_entries + entry
        lse, factor = tl.load(lse_ptr + of_softmax), tl.load(factor_ptr + of_softmax)
        offset = tl.zeros([BLOCK_N], tl.float32) if PLAIN else tl.load(offset_ptr + of_softmax)
        classes_per_split = tl.cdiv(tl.cdiv(end_class - first_class, BLOCK_V), num_splits) * BLOCK_V
        split_first = first_class + split * classes_per_split
        split_end = tl.minimum(split_first + classes_per_split, end_class)
        whole_end = split_first + tl.maximum(split_end - split_first, 0) // BLOCK_V * BLOCK_V
        for masked in tl.static_range(2):
            acc = _add_hidden_gradient(
                acc, x, lse, factor, offset, row, is_listed,
                whole_end if masked else split_first, split_end if masked else whole_end, first_feature,
                hidden_ptr, weight_of_softmax, bias_of_softmax, stride_hidden_row, stride_weight_class, softcap,
                masked, RESIDENT, WIDTH, BLOCK_V, BLOCK_D, BLOCK_K,
            )  # fmt: skip

    feature = first_feature + tl.arange(0, BLOCK_D)
    num_hidden = tl.num_programs(1)
    row += (tl.cast(split, tl.int64) * num_hidden + hidden) * num_rows
    pointers = grad_hidden_ptr + (row * WIDTH)[:, None] + feature[None, :]
    grad = (acc * (unit / GAIN)).to(grad_hidden_ptr.dtype.element_ty)
    tl.store(pointers, grad, mask=exists[:, None] & (feature < WIDTH)[None, :])


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "num_entries", "num_classes"])
def weight_gradient_kernel(
    grad_weight_ptr,  # [num_weights, V, WIDTH], or fp32 [num_splits, num_weights, V, WIDTH]; None: not needed
    grad_bias_ptr,  # fp32 [num_splits, num_softmaxes, V]; None: not needed
    hidden_ptr, weight_ptr, bias_ptr, lse_ptr, factor_ptr, offset_ptr, label_ptr, of_label_ptr, unit_ptr, ranges_ptr,
    rows_ptr, lengths_ptr,
    stride_hidden_step, stride_hidden_row, stride_weight_step, stride_weight_class, stride_bias_step,
    num_rows, num_entries, num_softmaxes, num_splits, num_classes, first_class, end_class, softcap,
    LABELS: tl.constexpr, HIDDEN_PER_STEP: tl.constexpr, WEIGHT_PER_STEP: tl.constexpr, ALL_CLASSES: tl.constexpr,
    PLAIN: tl.constexpr, GAIN: tl.constexpr, STRIDE_DIVISOR: tl.constexpr, CLASS_DIVISOR: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_D features of the gradient of BLOCK_V classes of one weight, and the gradient of their bias.

    Grid: [ceil(V / BLOCK_V), num_weights, ceil(WIDTH / BLOCK_D) * num_splits]. Every softmax over the weight is passed
    through, one split of its rows, whose logits are computed with classes first. Inputs as in `hidden_gradient_kernel`.
    PLAIN: the factor of a row is that of its one label too, and there is no offset. ALL_CLASSES: the range of every
    softmax is all classes; what classes past the last one would get is not stored.
    """
    weight = tl.program_id(1)
    num_feature_blocks: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    feature_block = tl.program_id(2) % num_feature_blocks
    first_feature = feature_block * BLOCK_D
    split = tl.program_id(2) // num_feature_blocks
    class_ = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    exists = class_ < num_classes
    unit = tl.load(unit_ptr)
    first_softmax = weight if WEIGHT_PER_STEP else 0 * weight
    end_softmax = weight + 1 if WEIGHT_PER_STEP else num_softmaxes
    num_entries = divisible(num_entries, _ENTRIES_PER_PROGRAM)
    stride_hidden_row = divisible(stride_hidden_row, STRIDE_DIVISOR)
    stride_weight_class = divisible(stride_weight_class, STRIDE_DIVISOR)
    weight_ptr += first_softmax * divisible(stride_weight_step, STRIDE_DIVISOR)
    RESIDENT: tl.constexpr = WIDTH <= BLOCK_D
    w = 0.0
    if RESIDENT:
        w = load_features(weight_ptr, class_, stride_weight_class, exists, 0, WIDTH, BLOCK_D)  # [BLOCK_V, BLOCK_D]

    acc = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for softmax in range(first_softmax, end_softmax):
        softmax_64 = tl.cast(softmax, tl.int64)
        hidden = softmax if HIDDEN_PER_STEP else 0 * softmax
        first_class, end_class = load_range(ranges_ptr, first_class, end_class, softmax, CLASS_DIVISOR)
        in_range = (class_ >= first_class) & (class_ < end_class)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + softmax_64 * stride_bias_step + class_, mask=in_range, other=0.0).to(tl.float32)
        num_listed = tl.load(lengths_ptr + hidden)
        some_are_outside = False
        if not ALL_CLASSES:
            # A softmax over other classes has no rows for these. Few blocks lie across the end of a range.
            num_listed = tl.where(tl.max(in_range.to(tl.int32), axis=0) != 0, num_listed, 0)
            some_are_outside = tl.min(in_range.to(tl.int32), axis=0) == 0
        rows_per_split = tl.cdiv(tl.cdiv(num_listed, BLOCK_N), num_splits) * BLOCK_N
        split_first = split * rows_per_split
        bias_parts = tl.zeros([BLOCK_V, BLOCK_N], tl.float32)
        for first in range(split_first, tl.minimum(split_first + rows_per_split, num_listed), BLOCK_N):
            row, is_listed, _ = listed_rows(rows_ptr, hidden, first, num_listed, num_rows, BLOCK_N)
            of_hidden = hidden_ptr + softmax * divisible(stride_hidden_step, STRIDE_DIVISOR)
            x = load_features(of_hidden, row, stride_hidden_row, is_listed, first_feature, WIDTH, BLOCK_D)
            if RESIDENT:
                z = tl.dot(w, tl.trans(x), input_precision="ieee")  # [BLOCK_V, BLOCK_N]
            else:
                z = multiply(
                    weight_ptr, class_, stride_weight_class, exists, of_hidden, row, stride_hidden_row, is_listed,
                    WIDTH, BLOCK_K,
                )  # fmt: skip
            if bias_ptr is not None:
                z += bias[:, None]
            if softcap is not None:
                z = cap(z, softcap)
            entry = first + tl.arange(0, BLOCK_N)
            of_softmax = softmax_64 * num_entries + entry
            factor = tl.load(factor_ptr + of_softmax)[None, :]
            dz = exp_of_difference(z, tl.load(lse_ptr + of_softmax)[None, :])
            if PLAIN:
                is_label = class_[:, None] == tl.load(label_ptr + of_softmax)[None, :]
                dz = tl.where(is_label, dz - 1.0, dz) * factor
            else:
                dz = dz * factor - tl.load(offset_ptr + of_softmax)[None, :]
                for i in tl.static_range(LABELS):
                    of_step = (softmax_64 * LABELS + i) * num_entries + entry
                    is_label = class_[:, None] == tl.load(label_ptr + of_step)[None, :]
                    dz -= tl.where(is_label, tl.load(of_label_ptr + of_step)[None, :], 0.0)
            if softcap is not None:
                dz *= slope(z, softcap)
            if some_are_outside:
                dz = tl.where(in_range[:, None], dz, 0.0)
            if grad_weight_ptr is not None:
                acc = tl.dot(dz.to(x.dtype), x, acc, input_precision="ieee")
            if grad_bias_ptr is not None:
                bias_parts += dz
        if grad_bias_ptr is not None:
            of_split = grad_bias_ptr + (tl.cast(split, tl.int64) * num_softmaxes + softmax) * num_classes
            grad_bias = tl.sum(bias_parts, axis=1) * (unit / GAIN)
            tl.store(of_split + class_, grad_bias, mask=exists & (feature_block == 0))

    if grad_weight_ptr is not None:
        feature = first_feature + tl.arange(0, BLOCK_D)
        num_weights = tl.num_programs(1)
        class_row = (tl.cast(split, tl.int64) * num_weights + weight) * num_classes + class_
        pointers = grad_weight_ptr + (class_row * WIDTH)[:, None] + feature[None, :]
        grad = (acc * (unit / GAIN)).to(grad_weight_ptr.dtype.element_ty)
        tl.store(pointers, grad, mask=exists[:, None] & (feature < WIDTH)[None, :])


class GradientConfig(NamedTuple):
    """Tile of rows x classes, the features of a gradient that a program has, and those of a product at a time."""

    block_n: int
    block_v: int
    block_d: int
    block_k: int
    num_warps: int
    num_stages: int


def _fitting(properties: DeviceProperties, config: GradientConfig, width: int, element_size: int) -> GradientConfig:
    """With as many stages as a block has shared memory for: at most those of `config`."""
    block_n, block_v, block_d, block_k, _, most_stages = config
    # dz, and the tile that stays: of rows or of classes.
    resident, per_stage = block_n * block_v, max(block_n, block_v) * block_d
    if width <= block_d:
        resident += max(block_n, block_v) * block_d
    else:
        per_stage += (block_n + block_v) * block_k
    num_stages = stages_that_fit(properties, most_stages, resident * element_size, per_stage * element_size)
    return config._replace(num_stages=num_stages)


def hidden_gradient_config(
    properties: DeviceProperties, width: int, *, element_size: int, has_one_softmax: bool
) -> GradientConfig:
    """Tiles by counting, unmeasured: a thread of 256 holds 64 sums of a 128 x 128 gradient and 32 logits, half of both
    with mma.sync, whose factors and addresses take registers. fp32 goes without matrix units; its products are unrolled
    in registers, so its tiles are small. What deviates had spills, by the architecture's number.

    Args:
        has_one_softmax: whether only one passes over a row's hidden.
    """
    block_d = max(16, triton.next_power_of_2(width))
    architecture = properties.capability[0]
    if element_size == 4:
        config = GradientConfig(32, 32, min(block_d, 64), min(block_d, 64), num_warps=4, num_stages=1)
    elif block_d > 256:
        config = GradientConfig(64, 64, 256, 128 if architecture == 10 else 64, num_warps=8, num_stages=2)
    elif block_d > 128:
        block_v = 32 if architecture == 10 and not has_one_softmax else 64
        config = GradientConfig(64, block_v, 256, 64, num_warps=8, num_stages=2)
    else:
        block_n = 128 if has_asynchronous_products(properties) else 64
        num_stages = 2 if architecture == 12 else 3
        config = GradientConfig(block_n, 64, block_d, min(block_d, 64), num_warps=8, num_stages=num_stages)
    return _fitting(properties, config, width, element_size)


def weight_gradient_config(properties: DeviceProperties, width: int, *, element_size: int) -> GradientConfig:
    """Tiles by counting, unmeasured. Four warps are one warp group of an H100, of which three blocks share a processor
    then. What deviates had spills, by the architecture's number.
    """
    block_d = max(16, triton.next_power_of_2(width))
    architecture = properties.capability[0]
    if element_size == 4:
        config = GradientConfig(32, 32, min(block_d, 64), min(block_d, 64), num_warps=4, num_stages=1)
    elif block_d > 128:
        config = GradientConfig(64, 64, 256, 64, num_warps=8, num_stages=1 if architecture == 10 else 2)
    else:
        num_stages = 2 if architecture == 10 and block_d <= 64 else 3
        num_warps = 4 if architecture == 9 or (architecture == 12 and block_d <= 64) else 8
        config = GradientConfig(64, 64, block_d, min(block_d, 64), num_warps=num_warps, num_stages=num_stages)
    return _fitting(properties, config, width, element_size)


# A part of a sum is at least so many tiles: less is not worth the traffic of adding parts up.
_LEAST_TILES_PER_SPLIT = 4


def num_splits(num_programs: int, num_tiles: int, device: torch.device) -> int:
    """Parts of a gradient's sum over `num_tiles` tiles: as many as give each processor two programs."""
    wanted = 2 * device_properties(device).num_processors // max(num_programs, 1)
    return max(1, min(wanted, num_tiles // _LEAST_TILES_PER_SPLIT))


def _row_terms(
    softmaxes: Softmaxes,
    lists: RowLists,
    step_lse: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> dict[str, Tensor]:
    """The terms and the unit by the names of the kernels' arguments; entries in whole blocks."""
    num_softmaxes = softmaxes.num_softmaxes
    num_blocks = triton.cdiv(softmaxes.num_rows, _ENTRIES_PER_PROGRAM.value)
    num_entries = num_blocks * _ENTRIES_PER_PROGRAM.value
    lse, factor, offset = (step_lse.new_empty(num_softmaxes, num_entries) for _ in range(3))
    of_label = step_lse.new_empty(softmaxes.num_steps, num_entries)
    label = of_label.new_empty(of_label.shape, dtype=torch.int32)
    unit = torch.linalg.vector_norm(scale, ord=torch.inf)
    row_terms_kernel[launch_grid(num_blocks, num_softmaxes)](
        lse,
        factor,
        offset,
        label,
        of_label,
        step_lse,
        softmaxes.targets,
        scale,
        unit,
        rows_ptr=lists.rows,
        lengths_ptr=lists.lengths,
        stride_target_row=softmaxes.targets.stride(0),
        stride_target_step=softmaxes.targets.stride(1),
        stride_scale_row=0 if scale.dim() == 1 else scale.stride(0),
        stride_scale_step=scale.stride(-1),
        num_rows=softmaxes.num_rows,
        num_entries=num_entries,
        ignore_index=ignore_index,
        **softmaxes.range_arguments(),
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        LABELS=softmaxes.num_labels,
        HIDDEN_PER_STEP=softmaxes.has_hidden_per_step,
        GAIN=gain(softmaxes.hidden.dtype),
        BLOCK=_ENTRIES_PER_PROGRAM.value,
        num_warps=8,
    )
    return dict(
        lse_ptr=lse, factor_ptr=factor, offset_ptr=offset, label_ptr=label, of_label_ptr=of_label, unit_ptr=unit
    )


def backward(
    softmaxes: Softmaxes,
    lists: RowLists,
    lse: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, `[num_hidden, N, D]` and so on, None where not needed. No host sync.

    In fp32 where they are sums of parts.

    Args:
        softmaxes: of at least one row.
        lse: fp32 `[K, N]`, of the forward.
        scale: fp32 `[N, K]`, or `[K]` where all rows have the same: the gradient of a row's loss of a step.
    """
    terms = _row_terms(softmaxes, lists, lse, scale, ignore_index, label_smoothing, z_loss)
    inputs = dict(
        **softmaxes.arguments(),
        **terms,
        rows_ptr=lists.rows,
        lengths_ptr=lists.lengths,
        num_entries=terms["lse_ptr"].shape[1],
        softcap=softcap,
        PLAIN=softmaxes.num_labels == 1 and label_smoothing == 0 and z_loss == 0,
        GAIN=gain(softmaxes.hidden.dtype),
    )
    grad_hidden = _hidden_gradient(softmaxes, inputs) if need_hidden else None
    grad_weight = grad_bias = None
    if need_weight or need_bias:
        grad_weight, grad_bias = _weight_gradients(softmaxes, inputs, need_weight, need_bias)
    return grad_hidden, grad_weight, grad_bias


def _hidden_gradient(softmaxes: Softmaxes, inputs: dict[str, Any]) -> Tensor:
    hidden, width = softmaxes.hidden, softmaxes.width
    properties = device_properties(hidden.device)
    config = hidden_gradient_config(
        properties, width, element_size=hidden.element_size(), has_one_softmax=softmaxes.has_hidden_per_step
    )
    if properties.capability[0] == 9:
        # Within a loop over softmaxes, be it one, the loop over classes is shorter: 248 instructions, not 257, at width
        # 128, and 67, not 77, at 1,024. On sm_86 and sm_100 that spills.
        inputs = inputs | dict(HIDDEN_PER_STEP=softmaxes.num_hidden > 1)
    row_blocks, feature_blocks = triton.cdiv(softmaxes.num_rows, config.block_n), triton.cdiv(width, config.block_d)
    splits = num_splits(
        row_blocks * feature_blocks * softmaxes.num_hidden,
        triton.cdiv(softmaxes.widest_range, config.block_v),
        hidden.device,
    )
    parts = _parts(splits, (softmaxes.num_hidden, softmaxes.num_rows, inputs["WIDTH"]), hidden)
    hidden_gradient_kernel[launch_grid(row_blocks, softmaxes.num_hidden, feature_blocks * splits)](
        parts, **inputs, num_splits=splits, **_tile(config)
    )
    return _sum_of(parts)[..., :width]


def _weight_gradients(
    softmaxes: Softmaxes, inputs: dict[str, Any], need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    weight, num_classes, width = softmaxes.weight, softmaxes.weight.shape[-2], softmaxes.width
    config = weight_gradient_config(device_properties(weight.device), width, element_size=weight.element_size())
    class_blocks, feature_blocks = triton.cdiv(num_classes, config.block_v), triton.cdiv(width, config.block_d)
    splits = num_splits(
        class_blocks * feature_blocks * softmaxes.num_weights,
        triton.cdiv(softmaxes.num_rows, config.block_n),
        weight.device,
    )
    parts = _parts(splits, (softmaxes.num_weights, num_classes, inputs["WIDTH"]), weight) if need_weight else None
    bias_parts = None
    if need_bias:
        bias_parts = weight.new_empty((splits, softmaxes.num_softmaxes, num_classes), dtype=torch.float32)
    weight_gradient_kernel[launch_grid(class_blocks, softmaxes.num_weights, feature_blocks * splits)](
        parts,
        bias_parts,
        **inputs,
        num_splits=splits,
        num_classes=num_classes,
        WEIGHT_PER_STEP=softmaxes.num_weights > 1,
        ALL_CLASSES=all(span == (0, num_classes) for span in softmaxes.ranges),
        **_tile(config),
    )
    grad_weight = grad_bias = None
    if need_weight:
        grad_weight = _sum_of(parts)[..., :width]
    if need_bias:
        grad_bias = bias_parts.sum(0 if softmaxes.bias.dim() == 2 else (0, 1))
    return grad_weight, grad_bias


def _parts(splits: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory for the parts of a gradient: itself where there is one, in fp32 where they are to be added up."""
    return like.new_empty((splits, *shape), dtype=like.dtype if splits == 1 else torch.float32)


def _sum_of(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _tile(config: GradientConfig) -> dict[str, int]:
    names = ("BLOCK_N", "BLOCK_V", "BLOCK_D", "BLOCK_K", "num_warps", "num_stages")
    return dict(zip(names, config, strict=True))
