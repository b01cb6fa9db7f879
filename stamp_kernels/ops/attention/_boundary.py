"""The checks before attention's Triton launchers and reference kernels, see `ops._boundary`."""

import math

import torch
from torch import Tensor

from stamp_kernels.common.arguments import AttentionNeeds, BiasArguments, DropoutArguments, Sequences
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.ops._boundary import (
    BOOL,
    FLOATING,
    INT32,
    INT64,
    check_at_least,
    check_cu_seqlens,
    check_num_rows,
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
    _check_shared(q, k, sequences, scale, bias)
    check_tensor("v", v, k.shape, (q.dtype,), q.device)
    if centrality_query_mask is not None:
        check_tensor("centrality_query_mask", centrality_query_mask, (q.shape[0],), BOOL, q.device)
    _check_dropout(dropout, q.device)


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
    _check_shared(q, k, sequences, scale, bias)
    dtypes = (q.dtype,)
    check_tensor("v", v, k.shape, dtypes, q.device)
    check_tensor("out", out, q.shape, dtypes, q.device)
    check_tensor("grad_out", grad_out, q.shape, dtypes, q.device)
    _check_lse(lse, q)
    _check_dropout(dropout, q.device)
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
    _check_shared(q, k, sequences, scale, bias)
    _check_lse(lse, q)
    if query_mask is not None:
        check_tensor("query_mask", query_mask, (q.shape[0],), BOOL, q.device)


def _check_shared(q: Tensor, k: Tensor, sequences: Sequences, scale: float, bias: BiasArguments) -> None:
    device = q.device
    check_tensor("q", q, ("total_q", "num_heads", "head_dim"), FLOATING if device.type == "cpu" else _ON_A_GPU, device)
    total_q, num_heads, head_dim = q.shape
    if head_dim % 8 != 0 or not 0 < head_dim <= _MAX_HEAD_DIM:
        refuse(f"q: head_dim must be a multiple of 8 from 8 to {_MAX_HEAD_DIM}, got {head_dim}")
    is_self_attention = sequences.cu_seqlens_k is None
    check_tensor("k", k, (total_q if is_self_attention else "total_k", "num_heads_kv", head_dim), (q.dtype,), device)
    num_heads_kv = k.shape[1]
    if num_heads_kv == 0 or num_heads % num_heads_kv != 0:
        refuse(f"k: num_heads_kv must divide the {num_heads} heads of q, got {num_heads_kv}")
    check_num_rows("q", q)
    check_num_rows("k", k)

    check_cu_seqlens("cu_seqlens_q", sequences.cu_seqlens_q, device)
    if sequences.cu_seqlens_k is not None:
        check_tensor("cu_seqlens_k", sequences.cu_seqlens_k, sequences.cu_seqlens_q.shape, INT32, device)
    check_at_least("max_seqlen_q", sequences.max_seqlen_q, 0)
    check_at_least("max_seqlen_k", sequences.max_seqlen_k, 0)
    if not abs(scale) <= _MAX_FLOAT32 and not (q.dtype == torch.float64 and math.isfinite(scale)):
        refuse(f"scale must be finite, got {scale}")
    _check_bias(bias, q, k)


def _check_bias(bias: BiasArguments, q: Tensor, k: Tensor) -> None:
    table, is_bidirectional, max_distance, positions_q, positions_k = bias
    if positions_q is not None:
        check_tensor("positions_q", positions_q, (q.shape[0],), INT32, q.device)
    if positions_k is not None:
        check_tensor("positions_k", positions_k, (k.shape[0],), INT32, q.device)
    if table is None:
        return
    check_tensor("bias_table", table, ("num_buckets", q.shape[1]), FLOATING, q.device)
    num_buckets, directions = table.shape[0], 2 if is_bidirectional else 1
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


def _check_lse(lse: Tensor, q: Tensor) -> None:
    check_tensor("lse", lse, (q.shape[1], q.shape[0]), (compute_dtype(q.dtype),), q.device)
