"""Workloads of `multi_token_cross_entropy` and `shift_targets`."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stamp_kernels import multi_token_cross_entropy, shift_targets

from .base import MIXED_LENGTHS, Random, Work, Workload, fixed, offsets

# The share of targets that are ignored, as padding and pruned targets are.
IGNORED_SHARE = 0.1


@dataclass(frozen=True)
class CrossEntropy(Workload):
    """`multi_token_cross_entropy`.

    Attributes:
        rows, width, vocabulary, steps: N, D, V, K.
        hidden_per_step: hidden states `[K, N, D]`.
        codebooks: the vocabulary is K codebooks in order, one per step (`vocab_ranges`).
        has_bias: a bias `[V]`, input "bias".
        options: further arguments of the function.
    """

    rows: int = 0
    width: int = 0
    vocabulary: int = 0
    steps: int = 1
    hidden_per_step: bool = False
    codebooks: bool = False
    has_bias: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    leaves: tuple[str, ...] = ("hidden", "weight")

    @property
    def num_classes(self) -> int:
        """Of each softmax."""
        return self.vocabulary // self.steps if self.codebooks else self.vocabulary

    @property
    def num_softmaxes(self) -> int:
        """Softmaxes per row: steps that share hidden states and classes share one."""
        return self.steps if self.hidden_per_step or self.codebooks else 1

    @property
    def num_listed(self) -> int:
        """About how many rows of a hidden have a target that is not ignored."""
        steps_of_hidden = 1 if self.hidden_per_step else self.steps
        return round(self.rows * (1 - IGNORED_SHARE**steps_of_hidden))

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        random = Random(device, seed)
        shape = (self.steps, self.rows, self.width) if self.hidden_per_step else (self.rows, self.width)
        targets = random.integers(self.num_classes, self.rows, self.steps)
        if self.codebooks:
            targets = targets + self.num_classes * torch.arange(self.steps, device=device)
        targets = torch.where(random.uniform(self.rows, self.steps) < IGNORED_SHARE, -100, targets)
        inputs = dict(
            hidden=random.normal(*shape, dtype=dtype),
            weight=random.normal(self.vocabulary, self.width, dtype=dtype) / math.sqrt(self.width),
            targets=targets,
        )
        return inputs | dict(bias=random.normal(self.vocabulary, dtype=dtype)) if self.has_bias else inputs

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        ranges = None
        if self.codebooks:
            ranges = [(k * self.num_classes, (k + 1) * self.num_classes) for k in range(self.steps)]
        result = multi_token_cross_entropy(
            x["hidden"],
            x["weight"],
            x["targets"],
            bias=x.get("bias"),
            vocab_ranges=ranges,
            return_step_losses=True,
            **dict(self.options),
        )
        return dict(loss=result.loss, step_losses=result.step_losses)

    def work(self, element_size: int) -> tuple[Work, Work]:
        product = 2 * self.num_softmaxes * self.num_listed * self.width * self.num_classes
        hidden = self.rows * self.width * element_size * (self.steps if self.hidden_per_step else 1)
        num_bytes = hidden + self.vocabulary * self.width * element_size
        return Work(product, num_bytes), Work(2 * product, 2 * num_bytes)


@dataclass(frozen=True)
class ShiftTargets(Workload):
    """`shift_targets`, four items ahead."""

    lengths: tuple[int, ...] = ()

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        random = Random(device, seed)
        return dict(labels=random.integers(1024, sum(self.lengths)), cu_seqlens=offsets(self.lengths, device))

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(targets=shift_targets(x["labels"], x["cu_seqlens"], steps=4, stride=4))

    def work(self, element_size: int) -> tuple[Work, Work]:
        return Work(0, 40 * sum(self.lengths)), Work(0, 0)


# The losses of semantic IDs and of text.
TIMED: tuple[Workload, ...] = (
    CrossEntropy("CE.D128.V1024", rows=32_768, width=128, vocabulary=1024),
    CrossEntropy("CE.D128.V4096", rows=65_536, width=128, vocabulary=4096),
    CrossEntropy("CE.D128.V32768", rows=32_768, width=128, vocabulary=32_768),
    CrossEntropy("CE.4x256", rows=32_768, width=128, vocabulary=1024, steps=4, hidden_per_step=True, codebooks=True),
    CrossEntropy("CE.K4.shared", rows=32_768, width=128, vocabulary=1024, steps=4),
    CrossEntropy("CE.D512.V32000", rows=32_768, width=512, vocabulary=32_000),
    CrossEntropy("CE.D768.V50257", rows=16_384, width=768, vocabulary=50_257),
    CrossEntropy("CE.D1024.V152960", rows=16_384, width=1024, vocabulary=152_960),
)

_MINIMAL = (("memory", "minimal"),)
_SOFTCAP = (("softcap", 30.0),)
_EVERYTHING = (("label_smoothing", 0.1), ("z_loss", 1e-3), ("softcap", 20.0), ("step_weights", (1.0, 0.5, 0.25)))

COMPILED: tuple[Workload, ...] = (
    CrossEntropy("CE.D64.V256", rows=4096, width=64, vocabulary=256),
    CrossEntropy("CE.D100.V1000", rows=4096, width=100, vocabulary=1000),
    CrossEntropy("CE.D200.V4096", rows=8192, width=200, vocabulary=4096),
    CrossEntropy("CE.D256.V4096", rows=8192, width=256, vocabulary=4096),
    CrossEntropy("CE.D512.minimal", rows=8192, width=512, vocabulary=32_000, options=_MINIMAL),
    # So many programs that no sum is split: the gradients are stored in 16 bits.
    CrossEntropy("CE.D200.softcap", rows=32_768, width=200, vocabulary=32_768, options=_SOFTCAP),
    CrossEntropy("CE.D256.softcap", rows=32_768, width=256, vocabulary=32_768, options=_SOFTCAP),
    CrossEntropy("CE.D256.unsplit", rows=32_768, width=256, vocabulary=32_768),
    CrossEntropy("CE.D512.minimal.softcap", rows=32_768, width=512, vocabulary=32_768, options=_MINIMAL + _SOFTCAP),
    CrossEntropy(
        "CE.4x4096.shared.softcap", rows=32_768, width=256, vocabulary=16_384, steps=4, codebooks=True, options=_SOFTCAP
    ),
    CrossEntropy(
        "CE.D256.bias", rows=32_768, width=256, vocabulary=32_768, has_bias=True, leaves=("hidden", "weight", "bias")
    ),
    ShiftTargets("shift", lengths=fixed(256, 240)),
)

CHECKED: tuple[Workload, ...] = (
    CrossEntropy("check.CE.free", rows=500, width=64, vocabulary=2200, steps=3, options=_EVERYTHING),
    CrossEntropy("check.CE.odd", rows=500, width=200, vocabulary=1001, steps=3, hidden_per_step=True),
    CrossEntropy(
        "check.CE.ranges", rows=500, width=128, vocabulary=1024, steps=4, hidden_per_step=True, codebooks=True
    ),
    CrossEntropy("check.CE.splits", rows=300, width=128, vocabulary=9000),
    CrossEntropy("check.CE.chunked", rows=2000, width=512, vocabulary=2201, steps=3, options=_EVERYTHING),
    CrossEntropy("check.CE.minimal", rows=500, width=512, vocabulary=2201, options=_MINIMAL),
    ShiftTargets("check.shift", lengths=MIXED_LENGTHS),
)
