"""Valid calls of packed_attention, attention_centrality and tile_list."""

from typing import Any

import torch
from ragged import RaggedBatch
from torch import Tensor

from fuzz.attention_oracle import attention
from fuzz.calls import Call
from fuzz.draw import FLOATS, Draw
from fuzz.judge import Case, Near
from stamp_kernels import RelativePositionBias, tile_list
from stamp_kernels.common.precision import compute_dtype


def _bias(draw: Draw, heads: int) -> RelativePositionBias:
    bidirectional = draw.chance(0.5)
    num_buckets = draw.choice([4, 8, 32]) if bidirectional else draw.choice([2, 7, 32])
    exact = num_buckets // (2 if bidirectional else 1) // 2
    table = draw.strided(draw.floats(num_buckets, heads, dtype=draw.dtype(FLOATS)))
    return RelativePositionBias(table, bidirectional, exact + draw.choice([1, 5, 112]))


def _inputs(draw: Draw) -> dict[str, Any]:
    """The arguments that packed_attention and attention_centrality share, and v."""
    dtype = draw.dtype()
    batch = draw.batch()
    is_cross = draw.chance(0.3)
    batch_k = batch
    if is_cross:
        lengths = [draw.choice([n, draw.randint(0, 20), 0]) for n in batch.lengths]
        batch_k = RaggedBatch(tuple(lengths), tail=draw.choice([0, 2]))
    heads_kv = draw.choice([1, 2, 3])
    heads = heads_kv * draw.choice([1, 1, 2, 3])
    head_dim = 8 * draw.randint(1, 4 if draw.backend == "triton" else draw.choice([4, 12, 32]))
    scale = draw.choice([None, None, draw.uniform(-1.5, 1.5) * head_dim**-0.5])
    inputs: dict[str, Any] = dict(
        q=draw.rows(batch, heads, head_dim, dtype=dtype),
        k=draw.rows(batch_k, heads_kv, head_dim, dtype=dtype),
        v=draw.rows(batch_k, heads_kv, head_dim, dtype=dtype),
        cu_seqlens_q=draw.offsets(batch),
        max_seqlen_q=draw.upper_bound(batch.max_seqlen),
        causal=draw.chance(0.4),
        scale=scale,
    )
    if is_cross:
        inputs |= dict(cu_seqlens_k=draw.offsets(batch_k), max_seqlen_k=draw.upper_bound(batch_k.max_seqlen))
    if draw.chance(0.4):
        inputs["relative_bias"] = _bias(draw, heads)
    if draw.chance(0.4):
        inputs["positions_q"] = draw.positions(batch)
    if draw.chance(0.2):
        inputs["positions_k"] = draw.positions(batch_k)
    if draw.chance(0.3):
        inputs["tiles_q"] = tile_list(batch.cu_seqlens, batch.total)
    if draw.chance(0.2):
        inputs["tiles_k"] = tile_list(batch_k.cu_seqlens, batch_k.total)
    if draw.chance(0.4):
        inputs["centrality_query_mask"] = draw.mask(batch.total)
    return inputs


def _without_tiles(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in inputs.items() if name not in ("tiles_q", "tiles_k")}


def packed_attention(draw: Draw) -> Case:
    inputs = _inputs(draw)
    flags = {f"return_{part}": True for part in ("lse", "centrality") if draw.chance(0.6)}
    mask = inputs.get("centrality_query_mask")
    if mask is not None and draw.chance(0.2):  # a query that does not count leaves no trace, not even as NaN
        inputs["q"][~mask] = torch.nan
        grad_out = None
    else:
        grad_out = draw.maybe(0.8, draw.strided(draw.floats(*inputs["q"].shape, dtype=inputs["q"].dtype)))
    needs = [name for name in ("q", "k", "v", "table") if grad_out is not None and draw.chance(0.8)]
    for name in ("q", "k", "v"):
        inputs[name].requires_grad_(name in needs)
    bias = inputs.get("relative_bias")
    if bias is not None:
        bias.table.requires_grad_("table" in needs)
    call = Call("stamp_kernels.packed_attention", inputs | flags)

    def run() -> dict[str, Any]:
        result = call.make()
        parts = dict(out=result) if isinstance(result, Tensor) else result._asdict()
        leaves = {name: inputs[name] for name in ("q", "k", "v") if name in needs}
        if bias is not None and "table" in needs:
            leaves["table"] = bias.table
        if leaves:
            found = torch.autograd.grad(
                parts["out"], list(leaves.values()), grad_out, allow_unused=True, materialize_grads=True
            )
            parts |= {f"d{name}": x for name, x in zip(leaves, found, strict=True)}
        return {name: x for name, x in parts.items() if x is not None}

    def want() -> dict[str, Any]:
        truth = attention(**_without_tiles(inputs), grad_out=grad_out)
        dtype = inputs["q"].dtype
        wanted = dict(out=Near(truth.out[0], dtype, truth.out[1]))
        for part in ("lse", "centrality"):
            if f"return_{part}" in flags:
                value, magnitude = getattr(truth, part)
                wanted[part] = Near(value, compute_dtype(dtype), magnitude, precision=dtype)
        for name in ("q", "k", "v"):
            if name in needs:
                value, magnitude = getattr(truth, f"d{name}")
                wanted[f"d{name}"] = Near(value, dtype, magnitude)
        if bias is not None and "table" in needs:
            wanted["dtable"] = Near(truth.dbias[0], bias.table.dtype, truth.dbias[1], precision=dtype)
        return wanted

    return Case(call, run, want)


def attention_centrality(draw: Draw) -> Case:
    inputs = _inputs(draw)
    truth = attention(**_without_tiles(inputs))
    dtype = compute_dtype(inputs["q"].dtype)
    v, mask = inputs.pop("v"), inputs.pop("centrality_query_mask", None)
    del v
    lse = truth.lse[0].to(dtype)
    if mask is not None:
        inputs["query_mask"] = mask
        if draw.chance(0.3):
            inputs["q"][~mask] = torch.nan
            lse[:, ~mask] = torch.nan
    call = Call("stamp_kernels.attention_centrality", inputs | dict(lse=draw.strided(lse)))
    return Case(
        call,
        run=lambda: dict(centrality=call.make()),
        want=lambda: dict(centrality=Near(truth.centrality[0], dtype, precision=inputs["q"].dtype)),
    )


def listed_tiles(lengths: tuple[int, ...], total: int) -> Tensor:
    by_number = sorted(range(len(lengths)), key=lambda i: -lengths[i] // 64)
    tiles = [(i, start) for i in by_number for start in range(0, lengths[i], 64)]
    unused = total // 64 + len(lengths) - len(tiles)
    return torch.tensor([*tiles, *[(-1, -1)] * unused], dtype=torch.int32).reshape(-1, 2)


def draw_tile_list(draw: Draw) -> Case:
    lengths = tuple(draw.choice([0, 1, 63, 64, 65, draw.randint(0, 400)]) for _ in range(draw.randint(0, 80)))
    batch = RaggedBatch(lengths, tail=draw.choice([0, 1, 300]))
    call = Call("stamp_kernels.tile_list", dict(cu_seqlens=draw.offsets(batch), total=batch.total))
    return Case(call, lambda: dict(tiles=call.make()), lambda: dict(tiles=listed_tiles(batch.lengths, batch.total)))


SUBJECTS = {
    "packed_attention": packed_attention,
    "attention_centrality": attention_centrality,
    "tile_list": draw_tile_list,
}
