"""What the cross-entropy kernels share: a tile of logits, some rows of hidden states against some classes.

    z_v = x W_v^T + b_v        capped, with softcap c: c tanh(z_v / c)

- A *softmax* is the rows of one hidden [N, D] against the classes of one range of one weight [V, D]. Steps that share
  hidden, weight, bias and range share a softmax; a row then has a target for each of these steps. Otherwise every step
  has a softmax of its own, and softmax p belongs to step p.
- Only rows with a valid target are read. They are listed on the device, once for each hidden (`RowLists`), and a
  program takes BLOCK_N entries of a list. A program past the end of its list returns, so the CPU needs no count.
- Classes are rows of the weight, and a target is a class.
- The features of a row are in BLOCK_D columns. If WIDTH <= BLOCK_D, a tile keeps all of them in place. Otherwise the
  products go through the width in blocks of BLOCK_K features.
- The logits z are in fp32 and natural units, after bias and softcap.
- The gradients of the logits are factors of products, in the dtype of the inputs. So that they do not underflow in
  fp16, they are relative to `unit`, the largest |gradient of a row's loss|, and multiplied by `gain`. The sums are
  scaled back in fp32.

Names: `start_*` is the first entry, class or feature of a tile or split and `end_*` the one after its last, `num_*` a
count, `*_ptr` a base pointer, `stride_*` a distance in elements; `row` and `class_` are the rows and classes of a tile.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.triton_kernels.rows import LOG2_E

# Arguments of kernels


class Rows(NamedTuple):
    """The rows of a matrix, `ptr[row * stride_row + column]`.

    The distance between the hidden states of two steps depends on the number of rows and is an argument of its own,
    because a member of a tuple cannot be kept from specialising the kernel.
    """

    ptr: Tensor
    stride_row: int


class Classes(NamedTuple):
    """The unembedding: what makes logits of hidden states. A step stride of 0: all steps share the weight or the bias.

    Attributes:
        weight: `[V, WIDTH]` or `[K, V, WIDTH]`.
        bias: `[V]` or `[K, V]`, or None.
    """

    weight: Tensor
    stride_step: int
    stride_class: int
    bias: Tensor | None
    stride_bias_step: int


class Softmax(NamedTuple):
    """The rows and classes of one softmax, made in a kernel.

    Attributes:
        hidden: `[N, WIDTH]`, pointer.
        weight: `[V, WIDTH]`, pointer.
        bias: `[V]`, pointer, or None.
    """

    hidden: Tensor
    stride_row: int
    weight: Tensor
    stride_class: int
    bias: Tensor | None
    softcap: float | None


class PerStep(NamedTuple):
    """A number for each row and step, `[N, K]`."""

    ptr: Tensor
    stride_row: int
    stride_step: int


class RowLists(NamedTuple):
    """Which rows have a valid target, for each hidden.

    Attributes:
        rows: int32 `[num_hidden, N]`, rows with a valid target from the start in rising order, others from the end.
        lengths: int32 `[num_hidden]`, the number of rows with a valid target.
    """

    rows: Tensor
    lengths: Tensor


class Layout(NamedTuple):
    """What a kernel knows of its softmaxes at compile time.

    Attributes:
        steps_per_softmax: the number of targets that a row has in a softmax.
        hidden_per_step: whether softmax p has hidden p; otherwise all have hidden 0.
        width: features of a row, in whole vectors of 16 bytes.
        stride_divisor: divides the strides of hidden and weight.
        class_divisor: divides the first class of every range and the stride of the bias.
        gain: see above.
    """

    steps_per_softmax: int
    hidden_per_step: bool
    width: int
    stride_divisor: int
    class_divisor: int
    gain: float


class Tile(NamedTuple):
    """Rows x classes, the features that a program keeps, and the features of a product at a time."""

    block_n: int
    block_v: int
    block_d: int
    block_k: int


# Rows


@triton.jit
def listed_rows(lists, hidden, start, num_listed, num_rows, BLOCK_N: tl.constexpr, AGAIN: tl.constexpr = False):
    """(row int64, is_listed, exists), each [BLOCK_N]: the entries from `start` on of a hidden's list.

    An entry that exists and is not listed is a row without a valid target.

    Args:
        AGAIN: read the entries from memory, though the program has read them before. Otherwise the compiler merges
            both reads and keeps the rows in registers in between.
    """
    # A load with another cache modifier, of an address in other arithmetic, is another one to the compiler.
    entry = (tl.cast(start, tl.int64) if AGAIN else start) + tl.arange(0, BLOCK_N)
    exists = entry < num_rows
    cache_modifier: tl.constexpr = ".cg" if AGAIN else ""
    pointers = lists.rows + hidden.to(tl.int64) * num_rows + entry
    row = tl.load(pointers, mask=exists, other=0, cache_modifier=cache_modifier)
    return row.to(tl.int64), entry < num_listed, exists


@triton.jit
def load_target(targets, row, is_listed, step, ignore_index):
    """(target, is_valid), each [BLOCK_N], of one step."""
    pointers = targets.ptr + row * targets.stride_row + step * targets.stride_step
    target = tl.load(pointers, mask=is_listed, other=0)
    return target, is_listed & (target != ignore_index)


# Classes


@triton.jit
def load_range(ranges_ptr, first_class, end_class, softmax, CLASS_DIVISOR: tl.constexpr):
    """(first class, end) of a softmax: a row of int32 [num_softmaxes, 2], or what is given for all softmaxes."""
    if ranges_ptr is not None:
        first_class = tl.load(ranges_ptr + 2 * softmax)
        end_class = tl.load(ranges_ptr + 2 * softmax + 1)
    return first_class // CLASS_DIVISOR * CLASS_DIVISOR, end_class


# Logits


@triton.jit
def divisible(stride, DIVISOR: tl.constexpr):
    """A stride in int64, with the promise to the compiler that DIVISOR divides it: loads may be as wide as that."""
    return tl.multiple_of(tl.cast(stride, tl.int64), DIVISOR)


@triton.jit
def load_features(ptr, row, stride, is_row, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, BLOCK]: the features from `start` on of the rows [ROWS], 0 past WIDTH and where not `is_row`."""
    column = start + tl.arange(0, BLOCK)
    pointers = ptr + (row.to(tl.int64) * stride)[:, None] + column[None, :]
    if WIDTH % BLOCK == 0:
        return tl.load(pointers, mask=is_row[:, None], other=0.0)
    return tl.load(pointers, mask=is_row[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def multiply(a_ptr, a_row, a_stride, is_a, b_ptr, b_row, b_stride, is_b, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """fp32 [A, B]: the products of the rows of two matrices, BLOCK_K features at a time."""
    product = tl.zeros([a_row.shape[0], b_row.shape[0]], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        a = load_features(a_ptr, a_row, a_stride, is_a, start, WIDTH, BLOCK_K)  # [A, BLOCK_K]
        b = load_features(b_ptr, b_row, b_stride, is_b, start, WIDTH, BLOCK_K)  # [B, BLOCK_K]
        product = tl.dot(a, tl.trans(b), product, input_precision="ieee")
    return product


@triton.jit
def biased_and_capped(z, softmax, class_, exists):
    """The logits [ROWS, CLASSES] from the products with the rows `class_` of the weight."""
    if softmax.bias is not None:
        z += tl.load(softmax.bias + class_, mask=exists, other=0.0).to(tl.float32)[None, :]
    if softmax.softcap is not None:
        z = cap(z, softmax.softcap)
    return z


@triton.jit
def cap(z, softcap):
    """`softcap * tanh(z / softcap)`, to a few units in the last place of the result.

    An exponential gives tanh x only to an absolute 1e-7, which a large cap multiplies. Below 1/2 the odd polynomial
    x + x^3 p(x^2) takes its place: the best one of this degree, to a relative 2e-8.

    `1 / (exp(2 |x|) + 1)` is a squared `rsqrt`, to 2^-22 of itself: two instructions, where a division takes six, since
    its divisor may be too large for a reciprocal. Of x < 0 the result would be larger than tanh x, and so would its
    error; the sign comes back as a bit. The reciprocal of the cap is the same for all logits.
    """
    x = z * (1.0 / softcap)
    square = x * x
    p = ((0.01721996 * square - 0.05303469) * square + 0.13325712) * square - 0.33333136
    root = tl.rsqrt(tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    size = softcap - (2.0 * softcap) * (root * root)
    sign = z.to(tl.int32, bitcast=True) & -(2**31)
    by_exponential = (size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(square < 0.25, z + z * (square * p), by_exponential)


@triton.jit
def cap_slope(z, softcap):
    """The derivative of `cap`, from the capped logits: `1 - (z / softcap)^2`."""
    return 1.0 - (z * (1.0 / softcap)) * (z * (1.0 / softcap))


@triton.jit
def target_logits(softmax, row, target, is_target, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """fp32 [BLOCK_N]: the logit of one class for each row, 0 where not `is_target`."""
    products = tl.zeros([row.shape[0], BLOCK_K], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        x = load_features(softmax.hidden, row, softmax.stride_row, is_target, start, WIDTH, BLOCK_K)
        w = load_features(softmax.weight, target, softmax.stride_class, is_target, start, WIDTH, BLOCK_K)
        products += x.to(tl.float32) * w.to(tl.float32)
    z = tl.sum(products, axis=1)
    if softmax.bias is not None:
        z += tl.load(softmax.bias + target, mask=is_target, other=0.0).to(tl.float32)
    if softmax.softcap is not None:
        z = cap(z, softmax.softcap)
    return z


@triton.jit
def exp_of_difference(a, b):
    """exp(a - b), of shapes that broadcast, b not -inf."""
    # The difference comes first: it is exact for large numbers, whose products with log2(e) would be rounded.
    return tl.exp2((a - b) * LOG2_E)


@triton.jit
def finite_pivot(largest):
    """What is subtracted before exp: the largest logit, or 0 where all are -inf, since -inf - -inf is NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)
