"""Attention in float64: a loop over the sequences, from the equations in the docstring of `packed_attention`.

Every part comes with its magnitude, the same sums over absolute values (see `judge.Near`).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fuzz.draw import slices


class AttentionTruth(NamedTuple):
    """(value, magnitude) of each part, float64; the gradients are those of `(out * grad_out).sum()`."""

    out: tuple[Tensor, Tensor]
    lse: tuple[Tensor, Tensor]
    centrality: tuple[Tensor, Tensor]
    dq: tuple[Tensor, Tensor]
    dk: tuple[Tensor, Tensor]
    dv: tuple[Tensor, Tensor]
    dbias: tuple[Tensor, Tensor]


def t5_bucket(distance: int, num_buckets: int, max_distance: int, bidirectional: bool) -> int:
    """The bucket of one distance, key minus query (Raffel et al. 2020; the logarithm in fp32 as in transformers)."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = num_buckets // 2
    if distance < exact:
        return first + distance
    octaves = torch.log(torch.tensor(float(distance)) / exact) / math.log(max_distance / exact)
    return first + min(exact + int(octaves * (num_buckets - exact)), num_buckets - 1)


def _buckets(positions_q: Tensor, positions_k: Tensor, bias: Any) -> Tensor:
    """int64 [n, m]."""
    distances = positions_k.long() - positions_q.long().unsqueeze(1)
    options = (bias.table.shape[0], bias.max_distance, bias.bidirectional)
    bucket_of = {d: t5_bucket(d, *options) for d in distances.unique().tolist()}
    flat = [bucket_of[d] for d in distances.flatten().tolist()]
    return torch.tensor(flat, dtype=torch.int64).view(distances.shape)


def visible(n: int, m: int, causal: bool) -> Tensor:
    """bool [n, m]: whether query i sees key j; causal masks are aligned bottom-right."""
    i, j = torch.arange(n).unsqueeze(1), torch.arange(m)
    return j <= i + (m - n) if causal else torch.ones(n, m, dtype=torch.bool)


def _gradients(
    p: Tensor, q: Tensor, k: Tensor, v: Tensor, do: Tensor, scale: float, sign: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dQ, dK, dV and dS [heads, n, m]: with sign -1 the gradients, with absolute values and +1 their magnitudes."""
    dv = p.mT @ do
    dp = do @ v.mT
    ds = p * (dp + sign * (p * dp).sum(-1, keepdim=True))
    return scale * ds @ k, scale * ds.mT @ q, dv, ds


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None, *,
    causal: bool = False, scale: float | None = None, relative_bias: Any = None, positions_q: Tensor | None = None,
    positions_k: Tensor | None = None, centrality_query_mask: Tensor | None = None, grad_out: Tensor | None = None,
    **_: Any,
) -> AttentionTruth:  # fmt: skip
    """The arguments of `packed_attention`, without dropout."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        positions_k = positions_q if positions_k is None else positions_k
    table = None if relative_bias is None else relative_bias.table.detach().double()

    def zeros(*shape: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)

    truth = AttentionTruth(
        zeros(*q.shape), zeros(heads, q.shape[0]), zeros(k.shape[0]), zeros(*q.shape), zeros(*k.shape),
        zeros(*v.shape), zeros(*((0, 0) if table is None else table.shape)),
    )  # fmt: skip

    for rows, keys in zip(slices(cu_seqlens_q), slices(cu_seqlens_k), strict=True):
        n, m = rows.stop - rows.start, keys.stop - keys.start
        of_q = q.detach()[rows].double().transpose(0, 1)  # [heads, n, D]
        of_k, of_v = (
            x.detach()[keys].double().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v)
        )  # [heads, m, D]
        scores = scale * of_q @ of_k.mT
        if table is not None:
            positions = [
                torch.arange(length) if x is None else x[part]
                for x, part, length in ((positions_q, rows, n), (positions_k, keys, m))
            ]
            buckets = _buckets(positions[0], positions[1], relative_bias)
            scores = scores + table[buckets].permute(2, 0, 1)
        scores = scores.masked_fill(~visible(n, m, causal), -math.inf)
        lse = scores.logsumexp(-1)
        p = (scores - lse.unsqueeze(-1)).masked_fill(~visible(n, m, causal), -math.inf).exp()

        counts = torch.ones(n, dtype=torch.bool) if centrality_query_mask is None else centrality_query_mask[rows]
        votes = p[:, counts].sum((0, 1))
        truth.out[0][rows], truth.out[1][rows] = (p @ of_v).transpose(0, 1), (p @ of_v.abs()).transpose(0, 1)
        truth.lse[0][:, rows], truth.lse[1][:, rows] = lse, lse.abs() + 1
        truth.centrality[0][keys] = votes
        truth.centrality[1][keys] = votes
        if grad_out is None:
            continue
        do = grad_out[rows].double().transpose(0, 1)
        absolute = [x.abs() for x in (of_q, of_k, of_v, do)]
        for i, (dq, dk, dv, ds) in enumerate(
            (_gradients(p, of_q, of_k, of_v, do, scale, -1), _gradients(p, *absolute, abs(scale), +1))
        ):
            truth.dq[i][rows] = dq.transpose(0, 1)
            for part, grad in ((truth.dk, dk), (truth.dv, dv)):
                part[i][keys] = grad.unflatten(0, (-1, group)).sum(1).transpose(0, 1)
            if table is not None:
                truth.dbias[i].index_add_(0, buckets.flatten(), ds.flatten(1).T)
    return truth
