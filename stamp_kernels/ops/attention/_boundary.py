"""The checks before attention's Triton launchers and reference kernels, see `ops._boundary`."""

import math

import torch
from torch import Tensor

from stamp_kernels.common.arguments import AttentionNeeds, BiasArguments, DropoutArguments, Sequences
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.common.tiles import num_listed_tiles
from stamp_kernels.ops._boundary import (
    BOOL,
    FLOATING,
    INT32,
    INT64,
    check_at_least,
    check_cu_seqlens,
    check_num_rows,
    check_sizes,
    check_tensor,
    refuse,
)

_MAX_HEAD_DIM = 256
_MAX_FLOAT32 = torch.finfo(torch.float32).max
_ON_A_GPU = FLOATING[:3]


def check_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
    bias: BiasArguments,
    centrality_query_mask: Tensor | None,
    dropout: DropoutArguments,
    return_centrality: bool,
) -> None:
    """What `stamp::packed_attention_forward` takes."""
    q_sizes, k_sizes, dtypes, device = _check_shared(q, k, sequences, scale, bias)
    check_tensor("v", v, k_sizes, dtypes, device)
    if centrality_query_mask is not None:
        check_tensor("centrality_query_mask", centrality_query_mask, q_sizes[:1], BOOL, device)
    _check_dropout(dropout, device)


def check_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
    bias: BiasArguments,
    dropout: DropoutArguments,
    needs: AttentionNeeds,
) -> None:
    """What `stamp::packed_attention_backward` takes."""
    q_sizes, k_sizes, dtypes, device = _check_shared(q, k, sequences, scale, bias)
    check_tensor("v", v, k_sizes, dtypes, device)
    check_tensor("out", out, q_sizes, dtypes, device)
    check_tensor("grad_out", grad_out, q_sizes, dtypes, device)
    _check_lse(lse, q_sizes, dtypes, device)
    _check_dropout(dropout, device)
    if needs.need_dbias and bias.bias_table is None:
        refuse("need_dbias needs a bias_table")


def check_centrality(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
    bias: BiasArguments,
    query_mask: Tensor | None,
) -> None:
    """What `stamp::attention_centrality` takes."""
    q_sizes, _, dtypes, device = _check_shared(q, k, sequences, scale, bias)
    _check_lse(lse, q_sizes, dtypes, device)
    if query_mask is not None:
        check_tensor("query_mask", query_mask, q_sizes[:1], BOOL, device)


def check_tile_list(cu_seqlens: Tensor, total: int) -> None:
    """What `stamp::tile_list` takes."""
    check_cu_seqlens("cu_seqlens", cu_seqlens, cu_seqlens.device)
    check_at_least("total", total, 0)
    check_num_rows("total", total)


def _check_shared(
    q: Tensor, k: Tensor, sequences: Sequences, scale: float, bias: BiasArguments
) -> tuple[torch.Size, torch.Size, tuple[torch.dtype], torch.device]:
    """What the three ops have in common. Returns the sizes of q and of k, their dtype and their device."""
    # Every attribute of a tensor is read once: each takes about 50 ns, and sizes 100.
    device, q_sizes, k_sizes, dtypes = q.device, q.shape, k.shape, (q.dtype,)
    if len(q_sizes) != 3:
        check_sizes("q", q_sizes, ("total_q", "num_heads", "head_dim"))
    check_tensor("q", q, q_sizes, FLOATING if q.is_cpu else _ON_A_GPU, device)
    total_q, num_heads, head_dim = q_sizes
    if head_dim % 8 != 0 or not 0 < head_dim <= _MAX_HEAD_DIM:
        refuse(f"q: head_dim must be a multiple of 8 from 8 to {_MAX_HEAD_DIM}, got {head_dim}")
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, tiles_q, tiles_k = sequences
    is_self_attention = cu_seqlens_k is None
    if len(k_sizes) != 3 or k_sizes[2] != head_dim or (is_self_attention and k_sizes[0] != total_q):
        check_sizes("k", k_sizes, (total_q if is_self_attention else "total_k", "num_heads_kv", head_dim))
    check_tensor("k", k, k_sizes, dtypes, device)
    total_k, num_heads_kv, _ = k_sizes
    if num_heads_kv == 0 or num_heads % num_heads_kv != 0:
        refuse(f"k: num_heads_kv must divide the {num_heads} heads of q, got {num_heads_kv}")
    check_num_rows("q", total_q)
    check_num_rows("k", total_k)

    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, device)
    if cu_seqlens_k is not None:
        check_tensor("cu_seqlens_k", cu_seqlens_k, cu_seqlens_q.shape, INT32, device)
    check_at_least("max_seqlen_q", max_seqlen_q, 0)
    check_at_least("max_seqlen_k", max_seqlen_k, 0)
    if tiles_q is not None:
        check_tensor("tiles_q", tiles_q, (num_listed_tiles(total_q, sequences.num_sequences), 2), INT32, device)
    if tiles_k is not None:
        check_tensor("tiles_k", tiles_k, (num_listed_tiles(total_k, sequences.num_sequences), 2), INT32, device)
    if not abs(scale) <= _MAX_FLOAT32 and not (dtypes[0] == torch.float64 and math.isfinite(scale)):
        refuse(f"scale must be finite, got {scale}")

    table, is_bidirectional, max_distance, positions_q, positions_k = bias
    if positions_q is not None:
        check_tensor("positions_q", positions_q, q_sizes[:1], INT32, device)
    if positions_k is not None:
        check_tensor("positions_k", positions_k, k_sizes[:1], INT32, device)
    if table is not None:
        check_tensor("bias_table", table, ("num_buckets", num_heads), FLOATING, device)
        _check_buckets(table.shape[0], is_bidirectional, max_distance)
    return q_sizes, k_sizes, dtypes, device


def _check_buckets(num_buckets: int, is_bidirectional: bool, max_distance: int) -> None:
    directions = 2 if is_bidirectional else 1
    num_exact = num_buckets // directions // 2
    if num_buckets % directions != 0 or num_exact < 1:
        refuse(f"bias_table must have at least {2 * directions} rows in {directions} equal parts, got {num_buckets}")
    if max_distance <= num_exact:
        refuse(f"bias_max_distance must exceed the {num_exact} exact distances, got {max_distance}")


def _check_dropout(dropout: DropoutArguments, device: torch.device) -> None:
    p, seed = dropout
    if not 0.0 <= p < 1.0:
        refuse(f"dropout_p must be in [0, 1), got {p}")
    if seed is not None:
        check_tensor("dropout_seed", seed, (1,), INT64, device)
    elif p > 0.0:
        refuse(f"dropout_p {p} needs a dropout_seed")


def _check_lse(lse: Tensor, q_sizes: torch.Size, dtypes: tuple[torch.dtype], device: torch.device) -> None:
    check_tensor("lse", lse, (q_sizes[1], q_sizes[0]), (compute_dtype(dtypes[0]),), device)
