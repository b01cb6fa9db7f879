"""Cases of packed attention, an oracle that computes sequence by sequence, and bad inputs, for attention's tests."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from ragged import BATCHES, RaggedBatch
from torch import Tensor

from stamp_kernels.ops.attention._inputs import bias_arguments
from stamp_kernels.ops.attention.packed_attention import AttentionOutput
from stamp_kernels.ops.attention.tile_list import tile_list
from stamp_kernels.relative_position import RelativePositionBias, relative_position_bucket

# So small that the sequences below reach the logarithmic buckets and the shared last one.
NUM_BUCKETS, MAX_DISTANCE = 8, 12
DROPOUT_SEED = -0x0123456789ABCDEF  # negative: both halves of the key have their high bits set

KEYS_OF_RAGGED = RaggedBatch((3, 4, 0, 11, 2, 9), tail=2)  # beside BATCHES["ragged"]: n_k < n_q, n_k = 0, n_q = 0

# As in the decoder of a semantic-ID model, where the heads of a group share tiles on a GPU; n_q = 0, n_k = 0, n_k < n_q
FEW_QUERIES = RaggedBatch((4, 0, 1, 4, 3, 2), tail=2)
KEYS_OF_FEW_QUERIES = RaggedBatch((40, 3, 0, 67, 2, 33), tail=1)


@dataclass(frozen=True)
class AttentionCase:
    batch: RaggedBatch = BATCHES["ragged"]
    batch_k: RaggedBatch | None = None  # None: self-attention
    heads: tuple[int, int] = (2, 2)  # of q, of k and v
    head_dim: int = 16
    causal: bool = False
    scale: float | None = None
    bias: str | None = None  # "bidirectional" or "unidirectional"
    positions: bool = False
    query_mask: bool = False
    dropout_p: float = 0.0
    tiles: bool = False

    def inputs(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Keyword arguments of packed_attention. Tail rows hold NaN, which shows whether anything reads them."""
        batch_k = self.batch_k or self.batch

        def rows(batch: RaggedBatch, heads: int) -> Tensor:
            x = torch.randn(batch.total, heads, self.head_dim, dtype=torch.float64).to(dtype)
            x[batch.valid :] = torch.nan
            return x.requires_grad_()

        inputs = dict(
            q=rows(self.batch, self.heads[0]),
            k=rows(batch_k, self.heads[1]),
            v=rows(batch_k, self.heads[1]),
            cu_seqlens_q=self.batch.cu_seqlens,
            max_seqlen_q=self.batch.max_seqlen,
            causal=self.causal,
            scale=self.scale,
        )
        if self.batch_k is not None:
            inputs |= dict(cu_seqlens_k=batch_k.cu_seqlens, max_seqlen_k=batch_k.max_seqlen)
        if self.bias is not None:
            table = torch.randn(NUM_BUCKETS, self.heads[0], dtype=torch.float64).to(dtype).requires_grad_()
            inputs["relative_bias"] = RelativePositionBias(table, self.bias == "bidirectional", MAX_DISTANCE)
        if self.positions:
            inputs["positions_q"] = self.batch.positions()
            if self.batch_k is not None:
                inputs["positions_k"] = batch_k.positions()
        if self.query_mask:
            inputs["centrality_query_mask"] = torch.rand(self.batch.total) < 0.6
        if self.tiles:
            inputs["tiles_q"] = tile_list(self.batch.cu_seqlens, self.batch.total)
            if self.batch_k is not None:
                inputs["tiles_k"] = tile_list(batch_k.cu_seqlens, batch_k.total)
        if self.dropout_p > 0:
            inputs |= dict(dropout_p=self.dropout_p, dropout_seed=torch.tensor([DROPOUT_SEED]))
        return inputs


CASES = {
    "plain": AttentionCase(),
    "causal": AttentionCase(causal=True, query_mask=True),
    "scale": AttentionCase(scale=-0.7),
    "gqa": AttentionCase(heads=(6, 2), query_mask=True),
    "multi_query_causal": AttentionCase(heads=(3, 1), causal=True),
    "bias": AttentionCase(bias="bidirectional", scale=1.0, query_mask=True),
    "causal_bias_positions": AttentionCase(causal=True, bias="unidirectional", positions=True, heads=(4, 2)),
    "bias_positions": AttentionCase(bias="bidirectional", positions=True, batch=BATCHES["long_among_short"]),
    "cross": AttentionCase(batch_k=KEYS_OF_RAGGED, query_mask=True),
    "cross_causal": AttentionCase(batch_k=KEYS_OF_RAGGED, causal=True, heads=(4, 2)),
    "cross_bias": AttentionCase(batch_k=KEYS_OF_RAGGED, bias="bidirectional"),
    "cross_bias_positions": AttentionCase(batch_k=KEYS_OF_RAGGED, bias="bidirectional", positions=True),
    "tiles": AttentionCase(tiles=True, heads=(4, 2), query_mask=True),
    "causal_bias_tiles": AttentionCase(
        tiles=True, causal=True, bias="unidirectional", positions=True, batch=BATCHES["long_among_short"]
    ),
    "cross_tiles": AttentionCase(batch_k=KEYS_OF_RAGGED, tiles=True, bias="bidirectional"),
    "few_queries": AttentionCase(FEW_QUERIES, KEYS_OF_FEW_QUERIES, heads=(6, 2), causal=True, query_mask=True),
    "dropout": AttentionCase(dropout_p=0.3),
    "dropout_everything": AttentionCase(
        dropout_p=0.5, batch_k=KEYS_OF_RAGGED, causal=True, bias="unidirectional", heads=(4, 2), query_mask=True
    ),
    "one_sequence": AttentionCase(batch=BATCHES["one_sequence"], bias="bidirectional"),
    "no_tail": AttentionCase(batch=BATCHES["no_tail"], causal=True),
    "all_empty": AttentionCase(batch=BATCHES["all_empty"], bias="bidirectional"),
    "no_sequences": AttentionCase(batch=BATCHES["no_sequences"], bias="bidirectional"),
    "no_keys": AttentionCase(batch=BATCHES["no_tail"], batch_k=RaggedBatch((0, 0, 0), tail=1)),
}
all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def philox_words(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-7 of Salmon et al. 2011, table 2 and figure 2, in Python's own integers."""
    c0, c1, c2, c3 = counter
    for i in range(7):
        k0, k1 = ((k + i * weyl) % 2**32 for k, weyl in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def contract_keep_mask(p: float, seed: int, sequence: int, shape: tuple[int, int, int]) -> Tensor:
    """The contract's dropout mask of one sequence, word by word: bool [heads, n_q, n_k]."""
    keep = torch.empty(shape, dtype=torch.bool)
    for head in range(shape[0]):
        for i in range(shape[1]):
            for j in range(shape[2]):
                groups = (n // 16 * 8 + n % 8 for n in (i, j))
                words = philox_words((*groups, head, sequence), (seed % 2**32, seed // 2**32 % 2**32))
                keep[head, i, j] = words[i // 8 % 2 * 2 + j // 8 % 2] >= int(p * 2**32)
    return keep


def dense_attention(
    q, k, v, cu_seqlens_q, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, *, causal=False, scale=None,
    relative_bias=None, positions_q=None, positions_k=None, tiles_q=None, tiles_k=None, centrality_query_mask=None,
    dropout_p=0.0, dropout_seed=None, return_lse=False, return_centrality=False,
) -> AttentionOutput:  # fmt: skip
    """Sequence by sequence with torch's attention and an explicit mask, lse and centrality from explicit scores."""
    if cu_seqlens_k is None:
        cu_seqlens_k, positions_k = cu_seqlens_q, positions_q
    num_heads = q.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    out = (
        torch.zeros_like(q) + q[:0].sum()
    )  # 0 that depends on q, so that a batch without a sequence has a gradient too
    lse, centrality = q.new_zeros(num_heads, q.shape[0]), q.new_zeros(k.shape[0])
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(starts_q) - 1):
        rows_q, rows_k = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        q_i, k_i, v_i = (x.transpose(0, 1) for x in (q[rows_q], k[rows_k], v[rows_k]))  # [H, n, D]
        k_i, v_i = (x.repeat_interleave(num_heads // len(x), dim=0) for x in (k_i, v_i))
        n_q, n_k = q_i.shape[1], k_i.shape[1]
        mask = q.new_zeros(num_heads, n_q, n_k)
        if causal:
            mask = mask.masked_fill(~torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q), -torch.inf)
        if relative_bias is not None:
            position_q = torch.arange(n_q) if positions_q is None else positions_q[rows_q]
            position_k = torch.arange(n_k) if positions_k is None else positions_k[rows_k]
            buckets = relative_position_bucket(
                position_k[None, :] - position_q[:, None],
                num_buckets=len(relative_bias.table),
                max_distance=relative_bias.max_distance,
                bidirectional=relative_bias.bidirectional,
            )
            mask = mask + relative_bias.table[buckets].permute(2, 0, 1)
        scores = scale * q_i @ k_i.transpose(1, 2) + mask
        lse[:, rows_q] = scores.detach().logsumexp(-1)
        weights = (scores - lse[:, rows_q, None]).exp().nan_to_num(0)  # 0 where the query sees no key
        counted = slice(None) if centrality_query_mask is None else centrality_query_mask[rows_q]
        centrality[rows_k] = weights.detach()[:, counted].sum((0, 1))
        if dropout_p > 0:
            keep = contract_keep_mask(dropout_p, dropout_seed.item(), i, (num_heads, n_q, n_k))
            sees_no_key = scores.detach().isneginf().all(-1, keepdim=True)
            weights = scores.masked_fill(sees_no_key, 0).softmax(-1).masked_fill(sees_no_key, 0)
            out[rows_q] = (weights * keep / (1 - dropout_p) @ v_i).transpose(0, 1)
        elif n_q > 0 and n_k > 0:
            out[rows_q] = F.scaled_dot_product_attention(q_i, k_i, v_i, attn_mask=mask, scale=scale).transpose(0, 1)
    return AttentionOutput(out, lse, centrality)


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values in float64, as new leaves."""
    converted = {name: inputs[name].detach().double().requires_grad_() for name in ("q", "k", "v")}
    bias = inputs.get("relative_bias")
    if bias is not None:
        table = bias.table.detach().double().requires_grad_()
        converted["relative_bias"] = RelativePositionBias(table, bias.bidirectional, bias.max_distance)
    return inputs | converted


def detached(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs without gradients, as the raw ops need them."""
    converted = {name: inputs[name].detach() for name in ("q", "k", "v")}
    bias = inputs.get("relative_bias")
    if bias is not None:
        converted["relative_bias"] = RelativePositionBias(bias.table.detach(), bias.bidirectional, bias.max_distance)
    return inputs | converted


def shared_op_arguments(inputs: dict[str, Any]) -> tuple:
    """The arguments that all three raw ops take between their tensors and their last arguments."""
    return (
        inputs["cu_seqlens_q"],
        inputs.get("cu_seqlens_k"),
        inputs["max_seqlen_q"],
        inputs.get("max_seqlen_k", inputs["max_seqlen_q"]),
        inputs.get("tiles_q"),
        inputs.get("tiles_k"),
        inputs["causal"],
        inputs["scale"] or inputs["q"].shape[2] ** -0.5,
        *bias_arguments(inputs.get("relative_bias"), inputs.get("positions_q"), inputs.get("positions_k")),
    )


def leaves(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that have a gradient, by the gradient's name."""
    tensors = {f"d{name}": inputs[name] for name in ("q", "k", "v")}
    return tensors | ({"dbias_table": inputs["relative_bias"].table} if "relative_bias" in inputs else {})


def small_integers(out: Tensor) -> Tensor:
    """A gradient of `out`, exact in every dtype."""
    return torch.randint(-4, 5, out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)


def forward_and_backward(attention: Callable[..., AttentionOutput], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """out, lse, centrality and the gradients, for an incoming gradient whose tail rows hold NaN."""
    output = attention(**inputs, return_lse=True, return_centrality=True)
    grad_out = small_integers(output.out)
    grad_out[int(inputs["cu_seqlens_q"][-1]) :] = torch.nan
    gradients = torch.autograd.grad(
        output.out, list(leaves(inputs).values()), grad_out, allow_unused=True, materialize_grads=True
    )
    results = output._asdict() | dict(zip(leaves(inputs), gradients, strict=True))
    return {name: x.detach() for name, x in results.items()}


def assert_results_close(got: dict[str, Tensor], want: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """Every part by relative norm, to the bound of `dtype` (lse and centrality: their own); -inf in the same places."""
    assert got.keys() == want.keys()
    for name, expected in want.items():
        hidden = expected.isneginf()  # lse of queries that see no key
        assert torch.equal(got[name].isneginf(), hidden), name
        bound_of = None if name in ("lse", "centrality") else dtype
        try:
            assert_close(got[name].masked_fill(hidden, 0), expected.masked_fill(hidden, 0), bound_of)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


# Changes to the arguments of BAD_INPUT_CASE that both packed_attention and attention_centrality refuse.
BAD_INPUT_CASE = AttentionCase(heads=(4, 2), head_dim=8)  # T = 31, B = 6
_TOTAL = BAD_INPUT_CASE.batch.total
_CU = BAD_INPUT_CASE.batch.cu_seqlens
_TABLE = torch.zeros(8, 4)


def _bad_rows(*shape: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


BAD_ARGUMENTS = [
    (dict(q=_bad_rows(_TOTAL, 4)), r"q must have shape \[total_q, num_heads_q, head_dim\], got \[31, 4\]"),
    (dict(q=_bad_rows(_TOTAL, 4, 8, dtype=torch.int32)), "q must have dtype torch.float32, .*, got torch.int32"),
    (dict(q=_bad_rows(_TOTAL, 4, 8, device="meta")), "k must be on meta, got cpu"),
    (
        {name: _bad_rows(_TOTAL, 4, 8, device="meta") for name in ("q", "k")},
        "q must have dtype float32, float16 or bfloat16 on this device, got torch.float64",
    ),
    (dict(k=_bad_rows(_TOTAL, 2, 16)), r"k must have shape \[31, num_heads_kv, 8\], got \[31, 2, 16\]"),
    (dict(k=_bad_rows(_TOTAL + 1, 2, 8)), r"k must have shape \[31, num_heads_kv, 8\], got \[32, 2, 8\]"),
    (dict(k=_bad_rows(_TOTAL, 2, 8, dtype=torch.float32)), "k must have dtype torch.float64, got torch.float32"),
    (dict(k=_bad_rows(_TOTAL, 3, 8)), "k: num_heads_kv must divide the 4 heads of q, got 3"),
    (dict(k=_bad_rows(_TOTAL, 0, 8)), "k: num_heads_kv must divide the 4 heads of q, got 0"),
    *(
        (
            dict(q=_bad_rows(_TOTAL, 4, dim), k=_bad_rows(_TOTAL, 2, dim)),
            f"q: head_dim must be a multiple of 8 up to 256, got {dim}",
        )
        for dim in (0, 12, 264)
    ),
    (dict(cu_seqlens_q=_CU.tolist()), "cu_seqlens_q must be a tensor, got list"),
    (dict(cu_seqlens_q=_CU.float()), "cu_seqlens_q must have dtype torch.int32, torch.int64, got torch.float32"),
    (dict(cu_seqlens_q=_CU[:0]), r"cu_seqlens_q must have batch \+ 1 >= 1 entries, got shape \[0\]"),
    (dict(cu_seqlens_q=_CU.to("meta")), "cu_seqlens_q must be on cpu, got meta"),
    (dict(max_seqlen_q=torch.tensor(13)), r"max_seqlen_q must be an int \(not a tensor\), got Tensor"),
    (dict(max_seqlen_q=-1), r"max_seqlen_q must be in \[0, inf\), got -1"),
    (dict(cu_seqlens_k=_CU.clone()), "cu_seqlens_k and max_seqlen_k must be given together"),
    (dict(max_seqlen_k=13), "cu_seqlens_k and max_seqlen_k must be given together"),
    (dict(cu_seqlens_k=_CU[:3].clone(), max_seqlen_k=5), r"cu_seqlens_k must have shape \[7\], got \[3\]"),
    (dict(cu_seqlens_k=_CU.clone(), max_seqlen_k=13.0), r"max_seqlen_k must be an int \(not a tensor\), got float"),
    (dict(tiles_q=[[0, 0]]), "tiles_q must be a tensor, got list"),
    (dict(tiles_q=tile_list(_CU, _TOTAL + 64)), r"tiles_q must have shape \[6, 2\], got \[7, 2\]"),
    (dict(tiles_k=tile_list(_CU, _TOTAL).long()), "tiles_k must have dtype torch.int32, got torch.int64"),
    (
        dict(relative_bias=RelativePositionBias(_TABLE[:, :3])),
        r"relative_bias.table must have shape \[num_buckets, 4\], got \[8, 3\]",
    ),
    (dict(relative_bias=RelativePositionBias(_TABLE.to("meta"))), "relative_bias.table must be on cpu, got meta"),
    (dict(positions_q=torch.arange(_TOTAL)), "positions_q must have dtype torch.int32, got torch.int64"),
    (
        dict(positions_k=torch.zeros(_TOTAL - 1, dtype=torch.int32)),
        r"positions_k must have shape \[31\], got \[30\]",
    ),
    (
        dict(centrality_query_mask=torch.ones(_TOTAL)),
        "query_mask must have dtype torch.bool, got torch.float32",
    ),
    (
        dict(centrality_query_mask=torch.ones(_TOTAL + 1, dtype=torch.bool)),
        r"query_mask must have shape \[31\], got \[32\]",
    ),
    (dict(max_seqlen_q=None), r"max_seqlen_q must be an int \(not a tensor\), got NoneType"),
]
BAD_CONTENTS = [
    (dict(cu_seqlens_q=_CU + 1), r"cu_seqlens_q\[0\] must be 0, got 1"),
    (
        dict(cu_seqlens_q=_CU[[0, 2, 1, 3, 4, 5, 3]]),
        "cu_seqlens_q must never decrease, got 21 then 6 at index 5",
    ),
    (
        dict(cu_seqlens_q=_CU + 4 * (_CU == 28).int()),
        r"cu_seqlens_q\[-1\] must be at most the number of rows 31, got 32",
    ),
    (dict(max_seqlen_q=12), "cu_seqlens_q: sequence 3 has length 13, more than the given max_seqlen 12"),
    (
        dict(cu_seqlens_k=_CU.clone(), max_seqlen_k=12),
        "cu_seqlens_k: sequence 3 has length 13, more than the given max_seqlen 12",
    ),
    (
        dict(cu_seqlens_k=_CU + 4 * (_CU == 28).int(), max_seqlen_k=13),
        r"cu_seqlens_k\[-1\] must be at most the number of rows 31, got 32",
    ),
]


def refusals(cases: list[tuple[dict[str, Any], str]]) -> pytest.MarkDecorator:
    """Parametrise over (changed arguments, pattern of the message)."""
    return pytest.mark.parametrize(("changed", "message"), cases, ids=[message for _, message in cases])
