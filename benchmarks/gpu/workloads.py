"""Named inputs of the public ops: what is compiled ahead of time, checked on a GPU and timed there.

A workload makes its inputs on any device and runs the public function on them, forward or with its gradients. On
`meta` tensors that records what the launchers would compile (machine_code.py), on a GPU it computes (correctness.py)
and is timed (timings.py), and on a CPU the same scripts can be rehearsed.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stamp_kernels import (
    RelativePositionBias,
    attention_centrality,
    gather_tokens,
    multi_token_cross_entropy,
    packed_attention,
    prune,
    select_tokens,
    shift_targets,
    token_importance,
)
from stamp_kernels.ops.pruning.selection import TokenSelection

NUM_BUCKETS = 32
KEEP_RATIO = 1 / 3


class Work(NamedTuple):
    """The least that has to be done: arithmetic, and memory traffic with inputs read and outputs written once."""

    flops: float
    num_bytes: float


class Random:
    """Random tensors of one device: the same sequence for the same seed; on `meta`, shapes alone."""

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
    """One call of a public function, by name.

    Inputs are named tensors. Those in `leaves` have a gradient; "grad" is the gradient of the first output, ones where
    there is none.
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
        """(of the forward, of the backward)."""

    def run(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs and the gradients, named d<leaf>."""
        x = x | {name: x[name].detach().requires_grad_() for name in self.leaves}
        outputs = self.forward(x)
        if not self.leaves:
            return outputs
        first = next(iter(outputs.values()))
        grad = x["grad"] if "grad" in x else torch.ones_like(first)
        # In this thread: the engine has none for the tensors of a device that is not there.
        with torch.autograd.set_multithreading_enabled(False):
            gradients = torch.autograd.grad(first, [x[name] for name in self.leaves], grad)
        outputs = {name: out.detach() for name, out in outputs.items()}
        return outputs | {f"d{name}": grad for name, grad in zip(self.leaves, gradients, strict=True)}


def offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """int32 cu_seqlens."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


@dataclass(frozen=True)
class Attention(Workload):
    """`packed_attention` of a ragged batch, or `attention_centrality` after it.

    Attributes:
        lengths: of the keys' sequences, and of the queries' where `query_lengths` is None.
        tail: rows past the last sequence, NaN.
        dropout_p: with a seed among the inputs.
        centrality: "no", "fused" with the forward, or "separate".
    """

    lengths: tuple[int, ...] = ()
    query_lengths: tuple[int, ...] | None = None
    heads: int = 6
    heads_kv: int = 6
    head_dim: int = 64
    causal: bool = False
    bias: bool = False
    positions: bool = False
    dropout_p: float = 0.0
    centrality: str = "no"
    tail: int = 0
    backward: bool = True

    def __post_init__(self) -> None:
        if self.backward:
            object.__setattr__(self, "leaves", ("q", "k", "v", *(["table"] if self.bias else [])))

    def _rows(self, random: Random, lengths: Sequence[int], heads: int, dtype: torch.dtype) -> Tensor:
        rows = random.normal(sum(lengths) + self.tail, heads, self.head_dim, dtype=dtype)
        rows[sum(lengths) :] = torch.nan
        return rows

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        random = Random(device, seed)
        query_lengths = self.query_lengths or self.lengths
        x = dict(
            q=self._rows(random, query_lengths, self.heads, dtype),
            k=self._rows(random, self.lengths, self.heads_kv, dtype),
            v=self._rows(random, self.lengths, self.heads_kv, dtype),
            grad=self._rows(random, query_lengths, self.heads, dtype),
            cu_seqlens=offsets(query_lengths, device),
        )
        if self.query_lengths is not None:
            x["cu_seqlens_k"] = offsets(self.lengths, device)
        if self.bias:  # a parameter, which stays in fp32 under autocast; T5 does not scale its scores
            x["table"] = random.normal(NUM_BUCKETS, self.heads, dtype=torch.float32)
            x["q"] = x["q"] * self.head_dim**-0.5
        if self.positions:  # of tokens that pruning has left
            kept = torch.cat([3 * torch.arange(n) for n in query_lengths] + [torch.zeros(self.tail, dtype=torch.int64)])
            x["positions"] = kept.to(device, torch.int32)
        if self.dropout_p > 0:
            x["seed"] = random.integers(2**31, 1)
        return x

    def _options(self, x: dict[str, Tensor]) -> dict[str, Any]:
        bias = None
        if self.bias:
            bias = RelativePositionBias(x["table"], bidirectional=not self.causal, max_distance=128)
        return dict(
            causal=self.causal, scale=1.0 if self.bias else None, relative_bias=bias, positions_q=x.get("positions")
        )

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        lengths: dict[str, Any] = dict(
            cu_seqlens_q=x["cu_seqlens"], max_seqlen_q=max(self.query_lengths or self.lengths, default=0)
        )
        if self.query_lengths is not None:
            lengths |= dict(cu_seqlens_k=x["cu_seqlens_k"], max_seqlen_k=max(self.lengths))
        options = self._options(x)
        result = packed_attention(
            x["q"], x["k"], x["v"], **lengths, **options, dropout_p=self.dropout_p, dropout_seed=x.get("seed"),
            return_lse=True, return_centrality=self.centrality == "fused",
        )  # fmt: skip
        outputs = dict(out=result.out, lse=result.lse)
        if self.centrality == "fused":
            outputs["centrality"] = result.centrality
        if self.centrality == "separate":
            if self.bias:
                options["relative_bias"] = RelativePositionBias(x["table"].detach(), not self.causal, 128)
            outputs["centrality"] = attention_centrality(
                x["q"].detach(), x["k"].detach(), result.lse, **lengths, **options
            )
        return outputs

    def work(self, element_size: int) -> tuple[Work, Work]:
        query_lengths = self.query_lengths or self.lengths
        pairs = sum(
            (n * (n + 1) // 2 if self.causal else n * m) for n, m in zip(query_lengths, self.lengths, strict=True)
        )
        product = 2 * pairs * self.heads * self.head_dim
        queries = sum(query_lengths) * self.heads * self.head_dim * element_size
        keys = sum(self.lengths) * self.heads_kv * self.head_dim * element_size
        lse = 4 * sum(query_lengths) * self.heads
        centrality = 4 * sum(self.lengths) if self.centrality != "no" else 0
        return (
            Work(2 * product, 2 * queries + 2 * keys + lse + centrality),
            Work(5 * product, 4 * queries + 4 * keys + lse),
        )


@dataclass(frozen=True)
class CrossEntropy(Workload):
    """`multi_token_cross_entropy`.

    Attributes:
        rows, width, vocabulary, steps: N, D, V, K.
        hidden_per_step: hidden states `[K, N, D]`.
        codebooks: the vocabulary is K codebooks in order, one for each step (`vocab_ranges`).
        options: further arguments of the function.
    """

    rows: int = 0
    width: int = 0
    vocabulary: int = 0
    steps: int = 1
    hidden_per_step: bool = False
    codebooks: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    leaves: tuple[str, ...] = ("hidden", "weight")

    @property
    def classes(self) -> int:
        """Of each softmax."""
        return self.vocabulary // self.steps if self.codebooks else self.vocabulary

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        random = Random(device, seed)
        shape = (self.steps, self.rows, self.width) if self.hidden_per_step else (self.rows, self.width)
        targets = random.integers(self.classes, self.rows, self.steps)
        if self.codebooks:
            targets = targets + self.classes * torch.arange(self.steps, device=device)
        targets = torch.where(random.uniform(self.rows, self.steps) < 0.1, -100, targets)  # padding, and pruned targets
        return dict(
            hidden=random.normal(*shape, dtype=dtype),
            weight=random.normal(self.vocabulary, self.width, dtype=dtype) / math.sqrt(self.width),
            targets=targets,
        )

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        ranges = None
        if self.codebooks:
            ranges = [(k * self.classes, (k + 1) * self.classes) for k in range(self.steps)]
        result = multi_token_cross_entropy(
            x["hidden"], x["weight"], x["targets"], vocab_ranges=ranges, return_step_losses=True, **dict(self.options)
        )
        return dict(loss=result.loss, step_losses=result.step_losses)

    def work(self, element_size: int) -> tuple[Work, Work]:
        softmaxes = self.steps if self.hidden_per_step or self.codebooks else 1
        product = 2 * softmaxes * self.rows * self.width * self.classes
        hidden = self.rows * self.width * element_size * (self.steps if self.hidden_per_step else 1)
        num_bytes = hidden + self.vocabulary * self.width * element_size
        return Work(product, num_bytes), Work(2 * product, 2 * num_bytes)


@dataclass(frozen=True)
class Prune(Workload):
    """`prune` of states and labels, with L1 norms that are whole numbers: no near ties, whatever the dtype."""

    lengths: tuple[int, ...] = ()
    width: int = 128
    protect: bool = False
    codes_per_item: int = 1
    tail: int = 0
    leaves: tuple[str, ...] = ("hidden",)

    @property
    def kept(self) -> int:
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
        else:  # otherwise the number of kept rows depends on what is protected
            x["grad"] = random.normal(self.kept, self.width, dtype=dtype)
        return x

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = prune(
            [x["hidden"], x["labels"]], x["centrality"], x["cu_seqlens"], max(self.lengths, default=0),
            keep_ratio=KEEP_RATIO, protect=x.get("protect"), codes_per_item=self.codes_per_item,
            lengths_cpu=torch.tensor(self.lengths) if not self.protect else None,
        )  # fmt: skip
        rows, labels = kept.x
        return dict(
            rows=rows, labels=labels, positions=kept.positions, indices=kept.selection.indices,
            cu_seqlens=kept.selection.cu_seqlens,
        )  # fmt: skip

    def work(self, element_size: int) -> tuple[Work, Work]:
        row = self.width * element_size
        read = sum(self.lengths) * (row + 8) + self.kept * (row + 8)
        return Work(0, read + self.kept * (row + 24) + 4 * sum(self.lengths)), Work(
            0, (self.kept + sum(self.lengths)) * row + 4 * sum(self.lengths)
        )


@dataclass(frozen=True)
class Score(Workload):
    """`token_importance` and `select_tokens` by themselves."""

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
    """`gather_tokens` of a third of the rows."""

    rows: int = 0
    width: int = 128
    leaves: tuple[str, ...] = ("x",)

    @property
    def kept(self) -> int:
        return self.rows // 3

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        random = Random(device, seed)
        indices = torch.arange(0, 3 * self.kept, 3, device=device)
        row = torch.arange(self.rows, device=device)
        inverse = torch.where((row % 3 == 0) & (row < 3 * self.kept), row // 3, -1).to(torch.int32)
        return dict(
            x=random.normal(self.rows, self.width, dtype=dtype),
            grad=random.normal(self.kept, self.width, dtype=dtype),
            indices=indices,
            inverse=inverse,
        )

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        cu_seqlens = torch.zeros(2, dtype=torch.int32, device=x["x"].device)
        selection = TokenSelection(x["indices"], cu_seqlens, self.kept, x["inverse"], self.rows)
        return dict(rows=gather_tokens(x["x"], selection))

    def work(self, element_size: int) -> tuple[Work, Work]:
        row = self.width * element_size
        return Work(0, self.kept * (2 * row + 8)), Work(0, self.kept * row + self.rows * (row + 4))


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


def fixed(num_sequences: int, length: int) -> tuple[int, ...]:
    return (length,) * num_sequences


def ragged(num_sequences: int, mean: int = 94) -> tuple[int, ...]:
    """Lengths around the mean, from 8 to 400, as the micro-benchmarks have them."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(num_sequences).log_normal_(0, 0.5, generator=generator)
    return tuple((lengths * mean / lengths.mean()).round().clamp(8, 400).int().tolist())


# T5's encoder at the sizes of TIGER and GRID (6 heads of 64, histories of 30 and 60 items of 4 codes), what is left
# after pruning, its decoder, decoder-only models (d 128, grouped heads), and the cross-entropies of semantic IDs and of
# text.
TIMED: tuple[Workload, ...] = (
    Attention("L120", lengths=fixed(256, 120)),
    Attention("L120.bias", lengths=fixed(256, 120), bias=True),
    Attention("L120.bias.dropout", lengths=fixed(256, 120), bias=True, dropout_p=0.1),
    Attention("L120.bias.dropout.centrality", lengths=fixed(256, 120), bias=True, dropout_p=0.1, centrality="fused"),
    Attention("L240", lengths=fixed(256, 240)),
    Attention("L240.bias", lengths=fixed(256, 240), bias=True),
    Attention("L240.bias.dropout", lengths=fixed(256, 240), bias=True, dropout_p=0.1),
    Attention("L240.bias.dropout.centrality", lengths=fixed(256, 240), bias=True, dropout_p=0.1, centrality="fused"),
    Attention("L1024.H8", lengths=fixed(256, 1024), heads=8, heads_kv=8),
    Attention("L1024.H8.causal", lengths=fixed(256, 1024), heads=8, heads_kv=8, causal=True),
    Attention("L2048.GQA.d128.causal", lengths=fixed(16, 2048), heads=16, heads_kv=8, head_dim=128, causal=True),
    Attention("ragged.L94", lengths=ragged(4096)),
    Attention("ragged.L94.bias", lengths=ragged(4096), bias=True),
    Attention("L40.bias.positions.dropout", lengths=fixed(256, 40), bias=True, positions=True, dropout_p=0.1),
    Attention("L24.bias", lengths=fixed(4096, 24), bias=True),
    Attention("decoder.L4", lengths=fixed(256, 4), causal=True, bias=True, dropout_p=0.1),
    Attention("cross.4x120", lengths=fixed(256, 120), query_lengths=fixed(256, 4), dropout_p=0.1),
    CrossEntropy("CE.D128.V1024", rows=32_768, width=128, vocabulary=1024),
    CrossEntropy("CE.D128.V4096", rows=65_536, width=128, vocabulary=4096),
    CrossEntropy("CE.D128.V32768", rows=32_768, width=128, vocabulary=32_768),
    CrossEntropy("CE.4x256", rows=32_768, width=128, vocabulary=1024, steps=4, hidden_per_step=True, codebooks=True),
    CrossEntropy("CE.K4.shared", rows=32_768, width=128, vocabulary=1024, steps=4),
    CrossEntropy("CE.D512.V32000", rows=32_768, width=512, vocabulary=32_000),
    CrossEntropy("CE.D768.V50257", rows=16_384, width=768, vocabulary=50_257),
    CrossEntropy("CE.D1024.V152960", rows=16_384, width=1024, vocabulary=152_960),
    Prune("prune.256x240", lengths=fixed(256, 240)),
    Prune("prune.ragged", lengths=ragged(4096)),
    Gather("gather.128", rows=61_440, width=128),
    Gather("gather.1024", rows=61_440, width=1024),
)

# What else T5, Qwen and the benchmarks launch: compiled, not timed.
COMPILED: tuple[Workload, ...] = (
    Attention("L16.bias.dropout", lengths=fixed(64, 16), bias=True, dropout_p=0.1),
    Attention("L80.bias.positions.dropout", lengths=fixed(64, 80), bias=True, positions=True, dropout_p=0.1),
    Attention("L200.bias.positions.dropout", lengths=fixed(64, 200), bias=True, positions=True, dropout_p=0.1),
    Attention("L240.separate", lengths=fixed(64, 240), centrality="separate", backward=False),
    Attention("L240.bias.separate", lengths=fixed(64, 240), bias=True, centrality="separate", backward=False),
    Attention("L120.d128.GQA.causal", lengths=fixed(64, 120), heads=16, heads_kv=8, head_dim=128, causal=True),
    Attention("L240.d72", lengths=fixed(64, 240), head_dim=72),
    Attention("L240.d80.causal", lengths=fixed(64, 240), head_dim=80, causal=True),
    CrossEntropy("CE.D64.V256", rows=4096, width=64, vocabulary=256),
    CrossEntropy("CE.D100.V1000", rows=4096, width=100, vocabulary=1000),
    CrossEntropy("CE.D256.V4096", rows=8192, width=256, vocabulary=4096),
    CrossEntropy("CE.D512.minimal", rows=8192, width=512, vocabulary=32_000, options=(("memory", "minimal"),)),
    ShiftTargets("shift", lengths=fixed(256, 240)),
    Score("score", lengths=fixed(256, 240)),
    Score("score.long", lengths=(8192, 100), width=1024),
    Prune("prune.protected.items", lengths=fixed(256, 240), protect=True, codes_per_item=4),
)

_MIXED = (33, 0, 1, 257, 64, 5, 5, 120)
_EVERYTHING = (("label_smoothing", 0.1), ("z_loss", 1e-3), ("softcap", 20.0), ("step_weights", (1.0, 0.5, 0.25)))


def _checked_attention() -> tuple[Attention, ...]:
    """Each kernel (by the longest sequence), plain and with everything that T5 trains with."""
    batches = {
        "slots16": (3, 0, 16, 1, 7, 16, 2, 5, 11),
        "slots32": (32, 5, 0, 17, 32),
        "short": (128, 0, 64, 1, 97, 5),
        "general": _MIXED,
        "long": (3, 2100, 700),
    }
    plain = tuple(
        Attention(f"check.{name}.causal.GQA", lengths=lengths, heads_kv=2, causal=True, centrality="separate", tail=3)
        for name, lengths in batches.items()
    )
    whole = tuple(
        Attention(
            f"check.{name}.bias.dropout", lengths=lengths, bias=True, positions=True, dropout_p=0.1, centrality="fused",
            tail=3,
        )
        for name, lengths in batches.items()
    )  # fmt: skip
    others = (
        Attention("check.cross", lengths=_MIXED, query_lengths=(4, 4, 0, 4, 4, 4, 4, 4), dropout_p=0.1, tail=3),
        Attention("check.d72", lengths=_MIXED, head_dim=72, tail=3),
        Attention("check.d128.bias", lengths=_MIXED, head_dim=128, bias=True, tail=3),
        Attention("check.d256.causal", lengths=_MIXED, heads=2, heads_kv=2, head_dim=256, causal=True, tail=3),
    )
    return (*plain, *whole, *others)


# Small, ragged, with tail rows: every kernel once, against float64.
CHECKED: tuple[Workload, ...] = (
    *_checked_attention(),
    CrossEntropy("check.CE.free", rows=500, width=64, vocabulary=2200, steps=3, options=_EVERYTHING),
    CrossEntropy("check.CE.odd", rows=500, width=200, vocabulary=1001, steps=3, hidden_per_step=True),
    CrossEntropy(
        "check.CE.ranges", rows=500, width=128, vocabulary=1024, steps=4, hidden_per_step=True, codebooks=True
    ),
    CrossEntropy("check.CE.splits", rows=300, width=128, vocabulary=9000),
    CrossEntropy("check.CE.chunked", rows=2000, width=512, vocabulary=2201, steps=3, options=_EVERYTHING),
    CrossEntropy("check.CE.minimal", rows=500, width=512, vocabulary=2201, options=(("memory", "minimal"),)),
    Prune("check.prune", lengths=_MIXED, tail=3),
    Prune("check.prune.many", lengths=(8, 0, 12) * 200, width=100, protect=True, codes_per_item=4, tail=3),
    Prune("check.prune.long", lengths=(20_000, 4, 8, 2000), width=16, protect=True, codes_per_item=4),
    Gather("check.gather.odd", rows=3001, width=33),
    ShiftTargets("check.shift", lengths=_MIXED),
    Score("check.score", lengths=_MIXED),
    Score("check.score.long", lengths=(9000, 100), width=1000),
)
