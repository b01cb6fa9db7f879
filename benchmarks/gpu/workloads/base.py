"""What all workloads share: the interface, random inputs, and sequence lengths."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Work(NamedTuple):
    """The minimum work of a call: arithmetic, and memory traffic with each input read and each output written once."""

    flops: float
    num_bytes: float


class Random:
    """Random tensors on one device. The same seed gives the same sequence; on `meta` there are only shapes."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def signs(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """+1 and -1."""
        return torch.where(self.uniform(*shape) < 0.5, 1.0, -1.0).to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Workload(ABC):
    """One call of a public function.

    Inputs are tensors by name. `leaves` names the inputs that get a gradient. The input "grad" is the gradient of the
    first output; without it, that gradient is 1 everywhere.
    """

    name: str

    leaves: tuple[str, ...] = ()

    @abstractmethod
    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]: ...

    @abstractmethod
    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, the differentiable one first."""

    @abstractmethod
    def work(self, element_size: int) -> tuple[Work, Work]:
        """(forward, backward)."""

    def run(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs and the gradients, named d<leaf>."""
        x = x | {name: x[name].detach().requires_grad_() for name in self.leaves}
        outputs = self.forward(x)
        if not self.leaves:
            return outputs
        first = next(iter(outputs.values()))
        grad = x["grad"] if "grad" in x else torch.ones_like(first)
        # Backward runs in this thread: autograd has no thread for the tensors of a device that is not present.
        with torch.autograd.set_multithreading_enabled(False):
            gradients = torch.autograd.grad(first, [x[name] for name in self.leaves], grad)
        outputs = {name: out.detach() for name, out in outputs.items()}
        return outputs | {f"d{name}": grad for name, grad in zip(self.leaves, gradients, strict=True)}


def offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """cu_seqlens, int32 `[len(lengths) + 1]`."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def fixed(num_sequences: int, length: int) -> tuple[int, ...]:
    return (length,) * num_sequences


def ragged(num_sequences: int, mean: int = 94) -> tuple[int, ...]:
    """Lengths around the mean, from 8 to 400, as in the micro-benchmarks."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(num_sequences).log_normal_(0, 0.5, generator=generator)
    return tuple((lengths * mean / lengths.mean()).round().clamp(8, 400).int().tolist())


# Sequences of all kinds in one small batch: empty, one token, tile sizes and their neighbours.
MIXED_LENGTHS = (33, 0, 1, 257, 64, 5, 5, 120)
