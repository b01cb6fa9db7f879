"""What the families share: rows of packed sequences, and how they lie in memory."""

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Triton's interpreter has no PTX.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Offsets, positions and masks as kernels read them, None where None."""
    return [None if x is None else x.contiguous() for x in tensors]


# triton.cdiv and triton.next_power_of_2 take 2 us outside of a kernel, since they look for tl.constexpr.


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, and 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def power_of_two_divisor(n: int, at_most: int) -> int:
    """The greatest power of two that divides n and `at_most`, itself a power of two."""
    n |= at_most
    return n & -n


@triton.jit
def sequence_ends(row, is_token, cu_seqlens_ptr, num_sequences):
    """int32, in the shape of `row`: the end of the sequence that a row belongs to, where it `is_token`.

    The first end past the row, by a binary search that all rows finish in the same number of steps.
    """
    sequence = tl.zeros_like(row)  # the row's is in sequence, ..., last
    last = sequence + (num_sequences - 1)
    steps_left = num_sequences - 1
    while steps_left > 0:
        middle = (sequence + last) // 2
        is_past = tl.load(cu_seqlens_ptr + middle + 1, mask=is_token, other=0) > row
        last = tl.where(is_past, middle, last)
        sequence = tl.where(is_past, sequence, tl.minimum(middle + 1, last))
        steps_left = steps_left // 2
    return tl.load(cu_seqlens_ptr + sequence + 1, mask=is_token, other=0)
