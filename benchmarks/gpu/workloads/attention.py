"""Workloads of `packed_attention`, `attention_centrality` and `tile_list`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stamp_kernels import RelativePositionBias, attention_centrality, packed_attention, tile_list

from .base import MIXED_LENGTHS, Random, Work, Workload, fixed, offsets, ragged

NUM_BUCKETS = 32
MAX_DISTANCE = 128


@dataclass(frozen=True)
class Attention(Workload):
    """`packed_attention` of a ragged batch, or `attention_centrality` after it.

    Attributes:
        lengths: of the sequences of keys, and of queries where `lengths_q` is None.
        tiles: whether the inputs have tile lists.
        tail: number of rows past the last sequence; they hold NaN.
        dropout_p: above 0 the inputs have a `dropout_seed`.
        centrality: "no", "fused" with the forward, or "separate".
    """

    lengths: tuple[int, ...] = ()
    lengths_q: tuple[int, ...] | None = None
    num_heads: int = 6
    num_heads_kv: int = 6
    head_dim: int = 64
    causal: bool = False
    bias: bool = False
    positions: bool = False
    dropout_p: float = 0.0
    centrality: str = "no"
    tiles: bool = False
    tail: int = 0
    backward: bool = True

    def __post_init__(self) -> None:
        if self.backward:
            object.__setattr__(self, "leaves", ("q", "k", "v", *(["bias_table"] if self.bias else [])))

    def _rows(self, random: Random, lengths: Sequence[int], num_heads: int, dtype: torch.dtype) -> Tensor:
        rows = random.normal(sum(lengths) + self.tail, num_heads, self.head_dim, dtype=dtype)
        rows[sum(lengths) :] = torch.nan
        return rows

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        random = Random(device, seed)
        lengths_q = self.lengths_q or self.lengths
        x = dict(
            q=self._rows(random, lengths_q, self.num_heads, dtype),
            k=self._rows(random, self.lengths, self.num_heads_kv, dtype),
            v=self._rows(random, self.lengths, self.num_heads_kv, dtype),
            grad=self._rows(random, lengths_q, self.num_heads, dtype),
            cu_seqlens_q=offsets(lengths_q, device),
        )
        if self.lengths_q is not None:
            x["cu_seqlens_k"] = offsets(self.lengths, device)
        if self.tiles:
            x["tiles_q"] = tile_list(x["cu_seqlens_q"], len(x["q"]))
            if self.lengths_q is not None:
                x["tiles_k"] = tile_list(x["cu_seqlens_k"], len(x["k"]))
        if self.bias:
            # A parameter stays in fp32 under autocast. T5 does not scale q.k, so its queries are smaller.
            x["bias_table"] = random.normal(NUM_BUCKETS, self.num_heads, dtype=torch.float32)
            x["q"] = x["q"] * self.head_dim**-0.5
        if self.positions:  # those of every third token, as after pruning
            kept = torch.cat([3 * torch.arange(n) for n in lengths_q] + [torch.zeros(self.tail, dtype=torch.int64)])
            x["positions"] = kept.to(device, torch.int32)
        if self.dropout_p > 0:
            x["dropout_seed"] = random.integers(2**31, 1)
        return x

    def _options(self, x: dict[str, Tensor]) -> dict[str, Any]:
        return dict(
            causal=self.causal,
            scale=1.0 if self.bias else None,
            relative_bias=self._bias(x["bias_table"]) if self.bias else None,
            positions_q=x.get("positions"),
            tiles_q=x.get("tiles_q"),
            tiles_k=x.get("tiles_k"),
        )

    def _bias(self, bias_table: Tensor) -> RelativePositionBias:
        return RelativePositionBias(bias_table, bidirectional=not self.causal, max_distance=MAX_DISTANCE)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        lengths: dict[str, Any] = dict(
            cu_seqlens_q=x["cu_seqlens_q"], max_seqlen_q=max(self.lengths_q or self.lengths, default=0)
        )
        if self.lengths_q is not None:
            lengths |= dict(cu_seqlens_k=x["cu_seqlens_k"], max_seqlen_k=max(self.lengths))
        options = self._options(x)
        result = packed_attention(
            x["q"], x["k"], x["v"], **lengths, **options, dropout_p=self.dropout_p, dropout_seed=x.get("dropout_seed"),
            return_lse=True, return_centrality=self.centrality == "fused",
        )  # fmt: skip
        outputs = dict(out=result.out, lse=result.lse)
        if self.centrality == "fused":
            outputs["centrality"] = result.centrality
        if self.centrality == "separate":
            if self.bias:
                options["relative_bias"] = self._bias(x["bias_table"].detach())
            outputs["centrality"] = attention_centrality(
                x["q"].detach(), x["k"].detach(), result.lse, **lengths, **options
            )
        return outputs

    def work(self, element_size: int) -> tuple[Work, Work]:
        lengths_q = self.lengths_q or self.lengths
        pairs = sum((n * (n + 1) // 2 if self.causal else n * m) for n, m in zip(lengths_q, self.lengths, strict=True))
        product = 2 * pairs * self.num_heads * self.head_dim
        queries = sum(lengths_q) * self.num_heads * self.head_dim * element_size
        keys = sum(self.lengths) * self.num_heads_kv * self.head_dim * element_size
        lse = 4 * sum(lengths_q) * self.num_heads
        centrality = 4 * sum(self.lengths) if self.centrality != "no" else 0
        return (
            Work(2 * product, 2 * queries + 2 * keys + lse + centrality),
            Work(5 * product, 4 * queries + 4 * keys + lse),
        )


@dataclass(frozen=True)
class TileList(Workload):
    """`tile_list` of a ragged batch."""

    lengths: tuple[int, ...] = ()

    def inputs(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        return dict(cu_seqlens=offsets(self.lengths, device))

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(tiles=tile_list(x["cu_seqlens"], sum(self.lengths)))

    def work(self, element_size: int) -> tuple[Work, Work]:
        return Work(0, 4 * len(self.lengths) + 8 * (sum(self.lengths) // 64 + len(self.lengths))), Work(0, 0)


# T5's encoder at the sizes of TIGER and GRID (6 heads of 64, histories of 30 and 60 items of 4 codes), what is left
# after pruning, T5's decoder, and decoder-only models (head_dim 128, grouped-query attention).
TIMED: tuple[Attention, ...] = (
    Attention("L120", lengths=fixed(256, 120)),
    Attention("L120.bias", lengths=fixed(256, 120), bias=True),
    Attention("L120.bias.dropout", lengths=fixed(256, 120), bias=True, dropout_p=0.1),
    Attention("L120.bias.dropout.centrality", lengths=fixed(256, 120), bias=True, dropout_p=0.1, centrality="fused"),
    Attention("L240", lengths=fixed(256, 240)),
    Attention("L240.bias", lengths=fixed(256, 240), bias=True),
    Attention("L240.bias.dropout", lengths=fixed(256, 240), bias=True, dropout_p=0.1),
    Attention("L240.bias.dropout.centrality", lengths=fixed(256, 240), bias=True, dropout_p=0.1, centrality="fused"),
    Attention("L1024.H8", lengths=fixed(256, 1024), num_heads=8, num_heads_kv=8),
    Attention("L1024.H8.causal", lengths=fixed(256, 1024), num_heads=8, num_heads_kv=8, causal=True),
    Attention(
        "L2048.GQA.d128.causal", lengths=fixed(16, 2048), num_heads=16, num_heads_kv=8, head_dim=128, causal=True
    ),
    Attention("ragged.L94", lengths=ragged(4096), tiles=True),
    Attention("ragged.L94.bias", lengths=ragged(4096), bias=True, tiles=True),
    Attention("L40.bias.positions.dropout", lengths=fixed(256, 40), bias=True, positions=True, dropout_p=0.1),
    Attention("L24.bias", lengths=fixed(4096, 24), bias=True),
    Attention("decoder.L4", lengths=fixed(256, 4), causal=True, bias=True, dropout_p=0.1),
    Attention("cross.4x120", lengths=fixed(256, 120), lengths_q=fixed(256, 4), dropout_p=0.1),
    Attention(
        "cross.4x240.GQA.d128",
        lengths=fixed(256, 240),
        lengths_q=fixed(256, 4),
        num_heads=16,
        num_heads_kv=4,
        head_dim=128,
        causal=True,
    ),
)

COMPILED: tuple[Workload, ...] = (
    Attention("L16.bias.dropout", lengths=fixed(64, 16), bias=True, dropout_p=0.1),
    Attention("L24.bias.centrality", lengths=fixed(64, 24), bias=True, centrality="fused", backward=False),
    Attention("L80.bias.positions.dropout", lengths=fixed(64, 80), bias=True, positions=True, dropout_p=0.1),
    Attention("L200.bias.positions.dropout", lengths=fixed(64, 200), bias=True, positions=True, dropout_p=0.1),
    Attention("L240.separate", lengths=fixed(64, 240), centrality="separate", backward=False),
    Attention("L240.bias.separate", lengths=fixed(64, 240), bias=True, centrality="separate", backward=False),
    Attention("L120.d128.GQA.causal", lengths=fixed(64, 120), num_heads=16, num_heads_kv=8, head_dim=128, causal=True),
    TileList("ragged.L94.tiles", lengths=ragged(4096)),
    Attention("ragged.L94.search", lengths=ragged(64)),
    Attention("ragged.L94.d128.tiles", lengths=ragged(64), head_dim=128, tiles=True),
    Attention("decode.1x240.GQA", lengths=fixed(64, 240), lengths_q=fixed(64, 1), num_heads=14, num_heads_kv=2),
    Attention("L240.d72", lengths=fixed(64, 240), head_dim=72),
    Attention("L240.d80.causal", lengths=fixed(64, 240), head_dim=80, causal=True),
)


def _checked() -> tuple[Workload, ...]:
    """Each kernel (chosen by the longest sequence), plain and with everything that T5 trains with."""
    batches = {
        "slots16": (3, 0, 16, 1, 7, 16, 2, 5, 11),
        "slots32": (32, 5, 0, 17, 32),
        "short": (128, 0, 64, 1, 97, 5),
        "general": MIXED_LENGTHS,
        "long": (3, 2100, 700),
    }
    plain = tuple(
        Attention(
            f"check.{name}.causal.GQA", lengths=lengths, num_heads_kv=2, causal=True, centrality="separate", tail=3
        )
        for name, lengths in batches.items()
    )
    with_everything = tuple(
        Attention(
            f"check.{name}.bias.dropout", lengths=lengths, bias=True, positions=True, dropout_p=0.1, centrality="fused",
            tiles=True, tail=3,
        )
        for name, lengths in batches.items()
    )  # fmt: skip
    others = (
        Attention(
            "check.cross", lengths=MIXED_LENGTHS, lengths_q=(4, 4, 0, 4, 4, 4, 4, 4), dropout_p=0.1, tiles=True, tail=3
        ),
        Attention(
            "check.cross.GQA",
            lengths=MIXED_LENGTHS,
            lengths_q=(4, 1, 0, 4, 8, 4, 3, 4),
            num_heads_kv=2,
            causal=True,
            tail=3,
        ),
        Attention("check.d72", lengths=MIXED_LENGTHS, head_dim=72, tail=3),
        Attention("check.d128.bias", lengths=MIXED_LENGTHS, head_dim=128, bias=True, tail=3),
        Attention(
            "check.d256.causal", lengths=MIXED_LENGTHS, num_heads=2, num_heads_kv=2, head_dim=256, causal=True, tail=3
        ),
    )
    return (*plain, *with_everything, *others, TileList("check.tiles", lengths=MIXED_LENGTHS))


CHECKED: tuple[Workload, ...] = _checked()
