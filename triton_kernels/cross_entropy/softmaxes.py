"""The arguments of a cross-entropy op as softmaxes, which is how the kernels take them."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stamp_kernels.triton_kernels.constants import device_constant
from stamp_kernels.triton_kernels.cross_entropy.tiles import Classes, Layout, PerStep, Rows


def ranges_on_device(ranges: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """int32 `[len(ranges), 2]`, a constant of the device."""
    return device_constant(("vocab_ranges", ranges), device, lambda: torch.tensor(ranges, dtype=torch.int32))


def elements_per_vector(dtype: torch.dtype) -> int:
    """The number of elements in 16 bytes, the most that a thread loads at once."""
    return 16 // dtype.itemsize


def rows_of_vectors(x: Tensor) -> Tensor:
    """x `[..., D]` with rows that begin on 16-byte boundaries, and D padded with zeros to a multiple of 16 bytes.

    A copy is made only where x is not like that: for D = 100, or for a view with another offset or stride, such as a
    weight in one flat buffer with other parameters. Kernels that loaded element by element would run out of registers.
    """
    vector = elements_per_vector(x.dtype)
    missing = -x.shape[-1] % vector
    if missing > 0:
        return F.pad(x, (0, missing))
    *strides, stride_feature = x.stride()
    is_aligned = x.data_ptr() % 16 == 0 and math.gcd(vector, *strides) == vector
    return x if stride_feature == 1 and is_aligned else x.clone(memory_format=torch.contiguous_format)


def gain(dtype: torch.dtype) -> float:
    """Keeps the probabilities in fp16 among the normal numbers; those of 100,000 classes are 1e-5 and less."""
    return 1024.0 if dtype == torch.float16 else 1.0


def _strides_of_steps_and_rows(x: Tensor) -> tuple[int, int]:
    """Of `[num_rows, D]`, which all steps share and whose stride from step to step is 0, or `[K, num_rows, D]`."""
    strides = x.stride()
    return 0 if len(strides) == 2 else strides[0], strides[-2]


class Softmaxes(NamedTuple):
    """Hidden states, classes and targets, and which of them form a softmax.

    Attributes:
        hidden: `[N, D]` or `[K, N, D]`, features contiguous.
        weight: `[V, D]` or `[K, V, D]`, features contiguous.
        targets: int64 `[N, K]`.
        bias: `[V]` or `[K, V]`, contiguous, or None.
        ranges: (start, end) of the classes of each softmax.
        steps_per_softmax: the number of steps that share a softmax.
        num_rows, num_steps, num_classes, width: N, K, V, D.
        num_hidden, num_weights: K, or 1 where all steps share the hidden states or the weight.
        num_softmaxes: the number of ranges.
    """

    hidden: Tensor
    weight: Tensor
    targets: PerStep
    bias: Tensor | None
    ranges: tuple[tuple[int, int], ...]
    steps_per_softmax: int
    num_rows: int
    num_steps: int
    num_classes: int
    width: int
    num_hidden: int
    num_weights: int
    num_softmaxes: int

    @property
    def has_hidden_per_step(self) -> bool:
        """Whether softmax p has hidden p. This holds for a single softmax too."""
        return self.num_hidden == self.num_softmaxes

    @property
    def has_all_classes(self) -> bool:
        """Whether the range of every softmax is all classes."""
        return set(self.ranges) == {(0, self.num_classes)}

    @property
    def widest_range(self) -> int:
        return max([end - start for start, end in self.ranges])

    @property
    def stride_bias_step(self) -> int:
        """The distance between the biases of two steps, 0 where all steps share one or there is none."""
        return self.num_classes if self.bias is not None and self.bias.dim() == 2 else 0

    def range_arguments(self) -> dict[str, Tensor | int | None]:
        """What `load_range` takes. A range that all softmaxes share needs no memory on the device."""
        is_one = len(set(self.ranges)) == 1
        ranges = None if is_one else ranges_on_device(self.ranges, self.hidden.device)
        first_class, end_class = self.ranges[0]
        return dict(ranges_ptr=ranges, first_class=first_class, end_class=end_class)

    def layout(self) -> Layout:
        vector = elements_per_vector(self.hidden.dtype)
        class_divisor = 1
        if self.bias is not None:  # where it is more than 1, a tile's part of the bias is loaded in vectors
            class_divisor = math.gcd(16, self.stride_bias_step, *[start for start, _ in self.ranges])
        return Layout(
            steps_per_softmax=self.steps_per_softmax,
            hidden_per_step=self.has_hidden_per_step,
            width=self.width + -self.width % vector,
            stride_divisor=vector,
            class_divisor=class_divisor,
            gain=gain(self.hidden.dtype),
        )

    def arguments(self) -> dict[str, Any]:
        """What the kernels that multiply take, by the names of their arguments."""
        hidden, weight = rows_of_vectors(self.hidden), rows_of_vectors(self.weight)
        stride_hidden_step, stride_row = _strides_of_steps_and_rows(hidden)
        stride_weight_step, stride_class = _strides_of_steps_and_rows(weight)
        return self.range_arguments() | dict(
            hidden=Rows(hidden, stride_row),
            stride_hidden_step=stride_hidden_step,
            classes=Classes(weight, stride_weight_step, stride_class, self.bias, self.stride_bias_step),
            num_rows=self.num_rows,
            layout=self.layout(),
        )


def softmaxes_of(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ranges: Sequence[tuple[int, int]]
) -> Softmaxes:
    """The softmaxes of an op's arguments; `ranges` has (start, end) for each step."""
    num_rows, num_steps = targets.shape
    *steps_of_hidden, _, width = hidden.shape
    *steps_of_weight, num_classes, _ = weight.shape
    is_shared = not steps_of_hidden and not steps_of_weight and (bias is None or bias.dim() == 1)
    has_one_softmax = is_shared and len(set(ranges)) == 1
    ranges = tuple(ranges[:1] if has_one_softmax else ranges)
    return Softmaxes(
        hidden=hidden if hidden.stride(-1) == 1 else hidden.contiguous(),
        weight=weight if weight.stride(-1) == 1 else weight.contiguous(),
        targets=PerStep(targets, *targets.stride()),
        bias=None if bias is None else bias.contiguous(),
        ranges=ranges,
        steps_per_softmax=num_steps if has_one_softmax else 1,
        num_rows=num_rows,
        num_steps=num_steps,
        num_classes=num_classes,
        width=width,
        num_hidden=num_steps if steps_of_hidden else 1,
        num_weights=num_steps if steps_of_weight else 1,
        num_softmaxes=len(ranges),
    )
