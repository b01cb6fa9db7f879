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
    is_aligned = x.data_ptr() % 16 == 0 and all(stride % vector == 0 for stride in x.stride()[:-1])
    return x if x.stride(-1) == 1 and is_aligned else x.clone(memory_format=torch.contiguous_format)


def gain(dtype: torch.dtype) -> float:
    """Keeps the probabilities in fp16 among the normal numbers; those of 100,000 classes are 1e-5 and less."""
    return 1024.0 if dtype == torch.float16 else 1.0


def _step_stride(x: Tensor | None, shared_dims: int) -> int:
    """The distance between the parts of two steps, 0 where all steps share x."""
    return 0 if x is None or x.dim() == shared_dims else x.stride(0)


class Softmaxes(NamedTuple):
    """Hidden states, classes and targets, and which of them form a softmax.

    Attributes:
        hidden: `[N, D]` or `[K, N, D]`, features contiguous.
        weight: `[V, D]` or `[K, V, D]`, features contiguous.
        targets: int64 `[N, K]`.
        bias: `[V]` or `[K, V]`, contiguous, or None.
        ranges: (start, end) of the classes of each softmax.
        steps_per_softmax: the number of steps that share a softmax.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    ranges: tuple[tuple[int, int], ...]
    steps_per_softmax: int

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
        """1 where all steps share the hidden states."""
        return self.hidden.shape[0] if self.hidden.dim() == 3 else 1

    @property
    def has_hidden_per_step(self) -> bool:
        """Whether softmax p has hidden p. This holds for a single softmax too."""
        return self.num_hidden == self.num_softmaxes

    @property
    def num_weights(self) -> int:
        """1 where all steps share the weight."""
        return self.weight.shape[0] if self.weight.dim() == 3 else 1

    @property
    def num_classes(self) -> int:
        return self.weight.shape[-2]

    @property
    def widest_range(self) -> int:
        return max(end - start for start, end in self.ranges)

    @property
    def num_softmaxes(self) -> int:
        return len(self.ranges)

    def target_argument(self) -> PerStep:
        return PerStep(self.targets, self.targets.stride(0), self.targets.stride(1))

    def range_arguments(self) -> dict[str, Tensor | int | None]:
        """What `load_range` takes. A range that all softmaxes share needs no memory on the device."""
        is_one = len(set(self.ranges)) == 1
        ranges = None if is_one else ranges_on_device(self.ranges, self.hidden.device)
        first_class, end_class = self.ranges[0]
        return dict(ranges_ptr=ranges, first_class=first_class, end_class=end_class)

    def layout(self) -> Layout:
        vector = elements_per_vector(self.hidden.dtype)
        first_classes = (start for start, _ in self.ranges)
        # Where it is more than 1, a tile's part of the bias is loaded in vectors.
        class_divisor = 1 if self.bias is None else math.gcd(16, _step_stride(self.bias, 1), *first_classes)
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
        return dict(
            **self.range_arguments(),
            hidden=Rows(hidden, hidden.stride(-2)),
            stride_hidden_step=_step_stride(hidden, 2),
            classes=Classes(
                weight=weight,
                stride_step=_step_stride(weight, 2),
                stride_class=weight.stride(-2),
                bias=self.bias,
                stride_bias_step=_step_stride(self.bias, 1),
            ),
            num_rows=self.num_rows,
            layout=self.layout(),
        )


def softmaxes_of(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ranges: Sequence[tuple[int, int]]
) -> Softmaxes:
    """The softmaxes of an op's arguments; `ranges` has (start, end) for each step."""
    is_shared = hidden.dim() == 2 and weight.dim() == 2 and (bias is None or bias.dim() == 1)
    has_one_softmax = is_shared and len(set(ranges)) == 1
    return Softmaxes(
        hidden if hidden.stride(-1) == 1 else hidden.contiguous(),
        weight if weight.stride(-1) == 1 else weight.contiguous(),
        targets,
        None if bias is None else bias.contiguous(),
        tuple(ranges[:1] if has_one_softmax else ranges),
        targets.shape[1] if has_one_softmax else 1,
    )
