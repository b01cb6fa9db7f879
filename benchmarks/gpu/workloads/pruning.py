"""Workloads of `token_importance`, `select_tokens`, `gather_tokens` and `prune`."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stamp_kernels import TokenSelection, gather_tokens, prune, select_tokens, token_importance

from .base import MIXED_LENGTHS, Random, Work, Workload, fixed, offsets, ragged

KEEP_RATIO = 1 / 3


@dataclass(frozen=True)
class Prune(Workload):
    """`prune` of states and labels. The L1 norms are whole numbers, so that no dtype has near ties."""

    lengths: tuple[int, ...] = ()
    width: int = 128
    protect: bool = False
    codes_per_item: int = 1
    tail: int = 0
    leaves: tuple[str, ...] = ("hidden",)

    @property
    def num_kept(self) -> int:
        return sum(math.ceil(n * KEEP_RATIO) for n in self.lengths)

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        random = Random(device, seed)
        total = sum(self.lengths) + self.tail
        x = dict(
            hidden=random.signs(total, self.width, dtype=dtype),
            centrality=(random.permutation(total) + 1).to(torch.float32),
            labels=random.integers(1024, total),
            cu_seqlens=offsets(self.lengths, device),
        )
        if self.protect:
            x["protect"] = random.uniform(total) < 0.05
        else:  # with protected tokens the number of kept rows is not known here
            x["grad"] = random.normal(self.num_kept, self.width, dtype=dtype)
        return x

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        pruned = prune(
            [x["hidden"], x["labels"]], x["centrality"], x["cu_seqlens"], max(self.lengths, default=0),
            keep_ratio=KEEP_RATIO, protect=x.get("protect"), codes_per_item=self.codes_per_item,
            lengths_cpu=torch.tensor(self.lengths) if not self.protect else None,
        )  # fmt: skip
        rows, labels = pruned.x
        return dict(
            rows=rows, labels=labels, positions=pruned.positions, indices=pruned.selection.indices,
            cu_seqlens=pruned.selection.cu_seqlens,
        )  # fmt: skip

    def work(self, element_size: int) -> tuple[Work, Work]:
        row = self.width * element_size
        read = sum(self.lengths) * (row + 8) + self.num_kept * (row + 8)
        return Work(0, read + self.num_kept * (row + 24) + 4 * sum(self.lengths)), Work(
            0, (self.num_kept + sum(self.lengths)) * row + 4 * sum(self.lengths)
        )


@dataclass(frozen=True)
class ImportanceAndSelection(Workload):
    """`token_importance` and `select_tokens`, each as its own op."""

    lengths: tuple[int, ...] = ()
    width: int = 128

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        return Prune("", lengths=self.lengths, width=self.width).inputs(device, dtype, seed)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        importance = token_importance(x["hidden"], x["centrality"], x["cu_seqlens"], normalize="visible_queries")
        selection = select_tokens(
            x["centrality"], x["cu_seqlens"], max(self.lengths), keep_ratio=KEEP_RATIO,
            lengths_cpu=torch.tensor(self.lengths),
        )  # fmt: skip
        return dict(importance=importance, indices=selection.indices, inverse=selection.inverse)

    def work(self, element_size: int) -> tuple[Work, Work]:
        total = sum(self.lengths)
        return Work(0, total * (self.width * element_size + 16)), Work(0, 0)


@dataclass(frozen=True)
class Gather(Workload):
    """`gather_tokens` of every third row."""

    rows: int = 0
    width: int = 128
    leaves: tuple[str, ...] = ("x",)

    @property
    def num_kept(self) -> int:
        return self.rows // 3

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        random = Random(device, seed)
        indices = torch.arange(0, 3 * self.num_kept, 3, device=device)
        row = torch.arange(self.rows, device=device)
        inverse = torch.where((row % 3 == 0) & (row < 3 * self.num_kept), row // 3, -1).to(torch.int32)
        return dict(
            x=random.normal(self.rows, self.width, dtype=dtype),
            grad=random.normal(self.num_kept, self.width, dtype=dtype),
            indices=indices,
            inverse=inverse,
        )

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        cu_seqlens = torch.zeros(2, dtype=torch.int32, device=x["x"].device)
        selection = TokenSelection(x["indices"], cu_seqlens, self.num_kept, x["inverse"], self.rows)
        return dict(rows=gather_tokens(x["x"], selection))

    def work(self, element_size: int) -> tuple[Work, Work]:
        row = self.width * element_size
        return Work(0, self.num_kept * (2 * row + 8)), Work(0, self.num_kept * row + self.rows * (row + 4))


TIMED: tuple[Workload, ...] = (
    Prune("prune.256x240", lengths=fixed(256, 240)),
    Prune("prune.ragged", lengths=ragged(4096)),
    Gather("gather.128", rows=61_440, width=128),
    Gather("gather.1024", rows=61_440, width=1024),
)

COMPILED: tuple[Workload, ...] = (
    ImportanceAndSelection("score", lengths=fixed(256, 240)),
    ImportanceAndSelection("score.long", lengths=(8192, 100), width=1024),
    Prune("prune.protected.items", lengths=fixed(256, 240), protect=True, codes_per_item=4),
)

CHECKED: tuple[Workload, ...] = (
    Prune("check.prune", lengths=MIXED_LENGTHS, tail=3),
    Prune("check.prune.many", lengths=(8, 0, 12) * 200, width=100, protect=True, codes_per_item=4, tail=3),
    Prune("check.prune.long", lengths=(20_000, 4, 8, 2000), width=16, protect=True, codes_per_item=4),
    Gather("check.gather.odd", rows=3001, width=33),
    ImportanceAndSelection("check.score", lengths=MIXED_LENGTHS),
    ImportanceAndSelection("check.score.long", lengths=(9000, 100), width=1000),
)
