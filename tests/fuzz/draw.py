"""What a random case is made of: numbers, ragged batches, tensors with strides."""

import itertools
import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from ragged import RaggedBatch
from torch import Tensor

T = TypeVar("T")

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("ops", "reference", "triton")


class Draw(random.Random):
    """Random choices of one case: the same name gives the same case.

    Attributes:
        backend: what serves the case's calls. Triton's interpreter is slow, so its batches are small, and its bf16
            products are wrong (design.md), so it gets none.
    """

    def __init__(self, name: str, backend: str) -> None:
        super().__init__(name)
        self.backend = backend
        torch.manual_seed(self.getrandbits(63))

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def maybe(self, probability: float, value: T) -> T | None:
        return value if self.chance(probability) else None

    def dtype(self, allowed: Sequence[torch.dtype] = FLOATS) -> torch.dtype:
        if self.backend == "triton":
            allowed = [dtype for dtype in allowed if dtype in (torch.float32, torch.float16)]
        return self.choice(allowed)

    def batch(self, multiple: int = 1) -> RaggedBatch:
        """Sequences of whole items of `multiple` tokens; a quarter of the batches is degenerate in some way."""
        most = 6 if self.backend == "triton" else 24
        lengths: list[int] = []
        shape = self.choice(["none", "empty", "one", "long", "ragged", "ragged", "ragged", "ragged", "ragged"])
        if shape == "empty":
            lengths = [0] * self.randint(1, 4)
        elif shape == "one":
            lengths = [self.randint(1, 3 * most)]
        elif shape == "long":  # several blocks of keys and queries
            lengths = [self.randint(0, 3) for _ in range(self.randint(0, 6))]
            lengths.insert(self.randint(0, len(lengths)), self.choice([most, 64, 97] if most < 24 else [97, 257, 520]))
        elif shape == "ragged":
            lengths = [self.randint(0, most) for _ in range(self.randint(1, 3 if most < 24 else 8))]
        if multiple > 1:
            lengths = [n // multiple * multiple for n in lengths]
        return RaggedBatch(tuple(lengths), tail=self.choice([0, 0, 1, 3, multiple]))

    def upper_bound(self, n: int) -> int:
        """`n`, or something above it."""
        return n + self.choice([0, 0, 0, 1, 7, 100])

    def floats(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)

    def rows(self, batch: RaggedBatch, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """`[total, *shape]` with NaN on the tail rows, which nothing may read, in a random layout."""
        x = self.floats(batch.total, *shape, dtype=dtype, scale=scale)
        x[batch.valid :] = torch.nan
        return self.strided(x)

    def strided(self, x: Tensor) -> Tensor:
        """The same values in some layout. The memory between them holds NaN (integers: a large number)."""
        layout = self.choice(["contiguous", "contiguous", "columns", "rows", "swapped"])
        poison = torch.nan if x.is_floating_point() else 1 if x.dtype == torch.bool else torch.iinfo(x.dtype).max
        if layout == "columns" and x.dim() > 1:
            view = x.new_full((*x.shape[:-1], x.shape[-1] + 5), poison)[..., 2 : 2 + x.shape[-1]]
        elif layout == "rows" and x.dim() > 0:
            view = x.new_full((2 * x.shape[0], *x.shape[1:]), poison)[::2]
        elif layout == "swapped" and x.dim() > 1:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        else:
            return x
        view.copy_(x)
        return view

    def positions(self, batch: RaggedBatch) -> Tensor:
        """int32 `[total]`, increasing within each sequence with gaps."""
        return self.strided(batch.positions())

    def offsets(self, batch: RaggedBatch) -> Tensor:
        """`[B + 1]`, int32 or int64."""
        return self.strided(batch.cu_seqlens.to(self.choice([torch.int32, torch.int32, torch.int64])))

    def mask(self, n: int) -> Tensor:
        return self.strided(torch.rand(n) < self.choice([0.0, 0.3, 0.7, 1.0]))


def offsets(lengths: Sequence[int]) -> Tensor:
    """int32 `[B + 1]`."""
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def slices(cu_seqlens: Tensor) -> list[slice]:
    """The rows of each sequence."""
    return [slice(start, end) for start, end in itertools.pairwise(cu_seqlens.tolist())]
