"""A tile of logits: some rows of hidden states against some classes, and what the cross-entropy kernels share about it.

Conventions of all of them:

- a *softmax* is the rows of one hidden [N, D] against the classes of one range of one weight [V, D]. Steps that share
  hidden, weight, bias and range share a softmax, and a row then has a label for each of its LABELS steps; otherwise
  every step has a softmax of its own, LABELS is 1, and softmax p belongs to step p;
- only rows with a valid label are read. They are listed on the device, once for each hidden (`RowLists`), and a program
  takes BLOCK_N entries of a list. Programs past the list's end have nothing to do, so no count is needed on the host;
- classes are rows of the weight; a label is one too;
- a row's features stand in BLOCK_D columns. If WIDTH <= BLOCK_D a tile has them all and keeps them in place;
  otherwise products go through the width in blocks of BLOCK_K features;
- z are the logits, after bias and cap, in fp32 and natural units.

Gradients of the logits are products' operands in the inputs' dtype. So that fp16 loses nothing, they are taken
relative to `unit`, the largest |gradient of a row's loss|, and times GAIN; sums are scaled back in fp32.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.triton_kernels.constants import device_constant
from stamp_kernels.triton_kernels.device import DeviceProperties, launch_grid
from stamp_kernels.triton_kernels.rows import LOG2_E

# No kernel is compiled anew for the values of these arguments. What divides strides is said by STRIDE_DIVISOR and
# CLASS_DIVISOR, see `Softmaxes.arguments`.
SCALARS = ["label_smoothing", "z_loss"]
SIZES = ["num_rows", "num_softmaxes", "num_splits", "first_class", "end_class", "ignore_index"]
STRIDES = ["stride_hidden_step", "stride_hidden_row", "stride_weight_step", "stride_weight_class", "stride_bias_step"]


# On the host


def ranges_on_device(ranges: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int32 `[len(ranges), 2]`, a constant of the device."""
    return device_constant(("vocab_ranges", ranges), device, lambda: torch.tensor(ranges, dtype=torch.int32))


def elements_of_vector(dtype: torch.dtype) -> int:
    """Of 16 bytes, the most that a thread loads at once."""
    return 16 // dtype.itemsize


def rows_of_vectors(x: Tensor) -> Tensor:
    """x `[..., D]` with rows that begin on 16-byte boundaries, D filled up with zeros to a multiple of 16 bytes.

    Copied only where it is not so: for D = 100, or for a view that begins or steps elsewhere, such as a weight in one
    flat buffer with other parameters. Kernels that loaded element by element would run out of registers.
    """
    vector = elements_of_vector(x.dtype)
    missing = -x.shape[-1] % vector
    if missing > 0:
        return F.pad(x, (0, missing))
    is_aligned = x.data_ptr() % 16 == 0 and all(stride % vector == 0 for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and is_aligned else x.clone(memory_format=torch.contiguous_format)


class Softmaxes(NamedTuple):
    """The arguments of an op as the kernels take them.

    Attributes:
        hidden: `[N, D]` or `[K, N, D]`, features contiguous.
        weight: `[V, D]` or `[K, V, D]`, features contiguous.
        targets: int64 `[N, K]`.
        bias: `[V]` or `[K, V]`, contiguous, or None.
        ranges: (start, end) of the classes of each softmax.
        num_labels: steps that share a softmax.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    ranges: tuple[tuple[int, int], ...]
    num_labels: int

    @property
    def num_rows(self) -> int:
        return self.targets.shape[0]

    @property
    def num_steps(self) -> int:
        return self.targets.shape[1]

    @property
    def width(self) -> int:
        return self.hidden.shape[-1]

    @property
    def num_hidden(self) -> int:
        """1 where all steps share it."""
        return self.hidden.shape[0] if self.hidden.dim() == 3 else 1

    @property
    def has_hidden_per_step(self) -> bool:
        """Whether softmax p has hidden p. So has a softmax that is the only one."""
        return self.num_hidden == self.num_softmaxes

    @property
    def num_weights(self) -> int:
        """1 where all steps share it."""
        return self.weight.shape[0] if self.weight.dim() == 3 else 1

    @property
    def widest_range(self) -> int:
        return max(end - start for start, end in self.ranges)

    @property
    def num_softmaxes(self) -> int:
        return len(self.ranges)

    def range_arguments(self) -> dict[str, Tensor | int | None]:
        """What `load_range` takes. A range that all softmaxes have needs no memory."""
        is_one = len(set(self.ranges)) == 1
        ranges = None if is_one else ranges_on_device(self.ranges, self.hidden.device)
        first_class, end_class = self.ranges[0]
        return dict(ranges_ptr=ranges, first_class=first_class, end_class=end_class)

    def arguments(self) -> dict[str, Tensor | int | None]:
        """What the kernels take of it, by their arguments' names; step strides are 0 where all steps share.

        WIDTH is that of whole vectors. STRIDE_DIVISOR divides the strides of hidden and weight; CLASS_DIVISOR the first
        class of each range and the bias' stride, so that a tile's part of the bias is loaded in vectors.
        """

        def step_stride(x: Tensor | None, shared_dims: int) -> int:
            return 0 if x is None or x.dim() == shared_dims else x.stride(0)

        hidden, weight = rows_of_vectors(self.hidden), rows_of_vectors(self.weight)
        stride_bias_step = step_stride(self.bias, 1)
        first_classes = (start for start, _ in self.ranges)
        return dict(
            **self.range_arguments(),
            hidden_ptr=hidden,
            weight_ptr=weight,
            bias_ptr=self.bias,
            stride_hidden_step=step_stride(hidden, 2),
            stride_hidden_row=hidden.stride(-2),
            stride_weight_step=step_stride(weight, 2),
            stride_weight_class=weight.stride(-2),
            stride_bias_step=stride_bias_step,
            num_rows=self.num_rows,
            num_softmaxes=self.num_softmaxes,
            LABELS=self.num_labels,
            HIDDEN_PER_STEP=self.has_hidden_per_step,
            STRIDE_DIVISOR=elements_of_vector(hidden.dtype),
            CLASS_DIVISOR=1 if self.bias is None else math.gcd(16, stride_bias_step, *first_classes),
            WIDTH=hidden.shape[-1],
        )


def softmaxes_of(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ranges: Sequence[tuple[int, int]]
) -> Softmaxes:
    """The softmaxes of an op's arguments; `ranges` has (start, end) for each step."""
    is_shared = hidden.dim() == 2 and weight.dim() == 2 and (bias is None or bias.dim() == 1)
    one_for_all = is_shared and len(set(ranges)) == 1
    return Softmaxes(
        hidden if hidden.stride(-1) == 1 else hidden.contiguous(),
        weight if weight.stride(-1) == 1 else weight.contiguous(),
        targets,
        None if bias is None else bias.contiguous(),
        tuple(ranges[:1] if one_for_all else ranges),
        targets.shape[1] if one_for_all else 1,
    )


def has_asynchronous_products(properties: DeviceProperties) -> bool:
    """Whether products are wgmma or tcgen05, which read their factors from shared memory, and not mma.sync."""
    return properties.capability[0] in (9, 10)


# What a kernel has in shared memory beside its tiles: sums over rows, layouts in exchange.
_OTHER_SHARED_MEMORY = 3072


def stages_that_fit(properties: DeviceProperties, most: int, resident: int, per_stage: int) -> int:
    """The most stages, `most` at best, of which a block has the memory.

    Counted as the compiler was seen to allocate: what stays, and a buffer for each stage; one less for mma.sync, which
    has read its factors into registers when the next ones arrive.

    Args:
        resident: bytes that stay in shared memory.
        per_stage: bytes that a step of the loop loads.
    """
    free = properties.shared_memory - _OTHER_SHARED_MEMORY - resident
    buffers = free // per_stage
    return max(1, min(most, buffers if has_asynchronous_products(properties) else buffers + 1))


class RowLists(NamedTuple):
    """Which rows have a label, for each hidden.

    Attributes:
        rows: int32 `[num_hidden, N]`, those with a valid label in rising order, the others from the end on.
        lengths: int32 `[num_hidden]`, how many have one.
    """

    rows: Tensor
    lengths: Tensor


_ROWS_PER_PROGRAM = 4096


def list_rows(softmaxes: Softmaxes, ignore_index: int) -> RowLists:
    """One launch, no host sync."""
    targets, num_hidden = softmaxes.targets, softmaxes.num_hidden
    rows = targets.new_empty((num_hidden, softmaxes.num_rows), dtype=torch.int32)
    lengths = targets.new_empty(num_hidden, dtype=torch.int32)
    if softmaxes.num_rows > 0:
        list_rows_kernel[launch_grid(triton.cdiv(softmaxes.num_rows, _ROWS_PER_PROGRAM), num_hidden)](
            rows,
            lengths,
            targets,
            *targets.stride(),
            softmaxes.num_rows,
            softmaxes.num_steps // num_hidden,
            ignore_index,
            BLOCK=_ROWS_PER_PROGRAM,
            num_warps=8,
        )
    return RowLists(rows, lengths)


def gain(dtype: torch.dtype) -> float:
    """GAIN: keeps fp16 probabilities among the normal numbers; those of 100,000 classes are 1e-5 and less."""
    return 1024.0 if dtype == torch.float16 else 1.0


# Which rows


@triton.jit
def _have_labels(
    targets_ptr, row, first_step, num_steps, stride_target_row, stride_target_step, num_rows, ignore_index
):
    """int32 in the shape of `row`: 1 for rows that exist and have a valid label in one of `num_steps` steps."""
    have = tl.zeros(row.shape, tl.int32)
    for step in range(num_steps):
        pointers = targets_ptr + row.to(tl.int64) * stride_target_row + (first_step + step) * stride_target_step
        target = tl.load(pointers, mask=row < num_rows, other=ignore_index)
        have = have | (target != ignore_index).to(tl.int32)
    return have


@triton.jit(do_not_specialize=["num_rows", "num_steps", "ignore_index"])
def list_rows_kernel(
    rows_ptr,  # int32 [num_hidden, N]
    lengths_ptr,  # int32 [num_hidden]
    targets_ptr,  # int64 [N, K]
    stride_target_row, stride_target_step,
    num_rows,
    num_steps,  # of a hidden
    ignore_index,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Where BLOCK rows stand in their hidden's list: those with a label from its start on, the others from its end.

    Grid: [ceil(N / BLOCK), num_hidden]. A program counts what comes before its block by itself: that is read again by
    every program, but in parallel, and a second launch would cost more.
    """
    hidden = tl.program_id(1)
    first_step = hidden * num_steps
    first = tl.program_id(0) * BLOCK
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, first, BLOCK):
        counts += _have_labels(
            targets_ptr, start + tl.arange(0, BLOCK), first_step, num_steps, stride_target_row, stride_target_step,
            num_rows, ignore_index,
        )  # fmt: skip
    row = first + tl.arange(0, BLOCK)
    have = _have_labels(
        targets_ptr, row, first_step, num_steps, stride_target_row, stride_target_step, num_rows, ignore_index
    )
    listed_before = tl.sum(counts, axis=0) + tl.cumsum(have, axis=0) - have
    place = tl.where(have != 0, listed_before, num_rows - 1 - (row - listed_before))
    tl.store(rows_ptr + hidden.to(tl.int64) * num_rows + place, row, mask=row < num_rows)
    if first + BLOCK >= num_rows:
        tl.store(lengths_ptr + hidden, tl.sum(counts, axis=0) + tl.sum(have, axis=0))


@triton.jit
def listed_rows(rows_ptr, hidden, first, num_listed, num_rows, BLOCK_N: tl.constexpr):
    """(row int64, is_listed, exists), each [BLOCK_N]: the entries `first ...` of a hidden's list.

    An entry that exists without being listed is a row without a valid label.
    """
    entry = first + tl.arange(0, BLOCK_N)
    exists = entry < num_rows
    row = tl.load(rows_ptr + hidden.to(tl.int64) * num_rows + entry, mask=exists, other=0)
    return row.to(tl.int64), entry < num_listed, exists


# Which classes


@triton.jit
def load_range(ranges_ptr, first_class, end_class, softmax, CLASS_DIVISOR: tl.constexpr):
    """(first, end) of a softmax's classes: an entry of int32 [num_softmaxes, 2], or what is given for all softmaxes."""
    if ranges_ptr is not None:
        first_class = tl.load(ranges_ptr + 2 * softmax)
        end_class = tl.load(ranges_ptr + 2 * softmax + 1)
    return first_class // CLASS_DIVISOR * CLASS_DIVISOR, end_class


# Logits


@triton.jit
def divisible(stride, DIVISOR: tl.constexpr):
    """A stride in int64. The compiler hears that DIVISOR divides it, and so how wide loads may be."""
    return tl.multiple_of(tl.cast(stride, tl.int64), DIVISOR)


@triton.jit
def load_features(ptr, row, stride, is_row, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`[ROWS, BLOCK]`: the features `start ...` of the rows [ROWS], 0 past WIDTH and where not `is_row`."""
    column = start + tl.arange(0, BLOCK)
    pointers = ptr + (row.to(tl.int64) * stride)[:, None] + column[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(pointers, mask=is_row[:, None], other=0.0)
    return tl.load(pointers, mask=is_row[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def multiply(a_ptr, a_row, a_stride, is_a, b_ptr, b_row, b_stride, is_b, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """fp32 `[A, B]`: products of the rows of two matrices, BLOCK_K features at a time."""
    product = tl.zeros([a_row.shape[0], b_row.shape[0]], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        a = load_features(a_ptr, a_row, a_stride, is_a, start, WIDTH, BLOCK_K)
        b = load_features(b_ptr, b_row, b_stride, is_b, start, WIDTH, BLOCK_K)
        product = tl.dot(a, tl.trans(b), product, input_precision="ieee")
    return product


@triton.jit
def biased_and_capped(z, bias_ptr, class_, exists, softcap):
    """The logits [ROWS, CLASSES] of products with the rows `class_` of the weight."""
    if bias_ptr is not None:
        z += tl.load(bias_ptr + class_, mask=exists, other=0.0).to(tl.float32)[None, :]
    if softcap is not None:
        z = cap(z, softcap)
    return z


@triton.jit
def cap(z, softcap):
    """`softcap * tanh(z / softcap)`."""
    return softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)


@triton.jit
def slope(z, softcap):
    """Of the cap, from the capped logits."""
    return 1.0 - (z / softcap) * (z / softcap)


@triton.jit
def label_logits(
    hidden_ptr, row, stride_hidden_row, weight_ptr, label, stride_weight_class, bias_ptr, is_label, softcap,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_N]: z of one class for each row, 0 where not `is_label`. The pointers are the softmax's."""
    parts = tl.zeros([row.shape[0], BLOCK_K], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        x = load_features(hidden_ptr, row, stride_hidden_row, is_label, start, WIDTH, BLOCK_K)
        w = load_features(weight_ptr, label, stride_weight_class, is_label, start, WIDTH, BLOCK_K)
        parts += x.to(tl.float32) * w.to(tl.float32)
    z = tl.sum(parts, axis=1)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + label, mask=is_label, other=0.0).to(tl.float32)
    if softcap is not None:
        z = cap(z, softcap)
    return z


@triton.jit
def load_label(targets_ptr, row, is_listed, step, stride_target_row, stride_target_step, ignore_index):
    """(label, is_valid), each [BLOCK_N], of a step."""
    pointers = targets_ptr + row * stride_target_row + step * stride_target_step
    label = tl.load(pointers, mask=is_listed, other=0)
    return label, is_listed & (label != ignore_index)


@triton.jit
def exp_of_difference(a, b):
    """exp(a - b), of shapes that broadcast, b not -inf."""
    # The difference comes first: of large numbers it is exact where their products with log2(e) would be rounded.
    return tl.exp2((a - b) * LOG2_E)


@triton.jit
def finite_pivot(largest):
    """What is subtracted before exp: the largest logit, 0 where all are -inf and their difference no number."""
    return tl.where(largest == float("-inf"), 0.0, largest)
