"""Attention centrality: the attention that each key receives, without an attention map in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.common.arguments import BiasArguments, Sequences
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.ops._autocast import cast_for_autocast
from stamp_kernels.ops._checks import check_flags, check_tensor
from stamp_kernels.ops._library import define_op, imported_once
from stamp_kernels.ops.attention import _boundary
from stamp_kernels.ops.attention._inputs import (
    check_q_and_k,
    check_query_mask,
    checked_bias,
    checked_scale,
    checked_sequences,
    num_query_key_pairs,
)
from stamp_kernels.reference import attention as reference
from stamp_kernels.relative_position import RelativePositionBias


def _fake(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    sequences: Sequences,
    causal: bool,
    scale: float,
    bias: BiasArguments,
    query_mask: Tensor | None,
) -> Tensor:
    return lse.new_empty(k.shape[0])


def _flops(q: Tensor, k: Tensor, lse: Tensor, sequences: Sequences, *_: object) -> int:
    """One product, Q K^T; causal masking is not subtracted, as in torch's own formulas."""
    return 2 * num_query_key_pairs(sequences) * q.shape[1] * q.shape[2]


@imported_once
def _triton() -> Callable[..., Any]:
    from stamp_kernels.triton_kernels.attention.centrality import attention_centrality  # imports Triton

    return attention_centrality


# cu_seqlens_k None means self-attention: keys have the offsets, positions and tiles of the queries.
_attention_centrality = define_op(
    "attention_centrality(Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? tiles_q, Tensor? tiles_k, bool causal, float scale, "
    "Tensor? bias_table, bool bias_bidirectional, int bias_max_distance, Tensor? positions_q, Tensor? positions_k, "
    "Tensor? query_mask) -> Tensor",
    check=_boundary.check_centrality,
    reference=reference.attention_centrality,
    triton=_triton,
    fake=_fake,
    flops=_flops,
    groups=(Sequences, BiasArguments),
)


def attention_centrality(
    q: Tensor,  # [Tq, Hq, D]
    k: Tensor,  # [Tk, Hkv, D]
    lse: Tensor,  # [Hq, Tq]
    cu_seqlens_q: Tensor,  # [B + 1] int32 or int64
    cu_seqlens_k: Tensor | None = None,  # [B + 1] int32 or int64
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    relative_bias: RelativePositionBias | None = None,
    positions_q: Tensor | None = None,  # [Tq] int32
    positions_k: Tensor | None = None,  # [Tk] int32
    tiles_q: Tensor | None = None,  # [Nq, 2] int32
    tiles_k: Tensor | None = None,  # [Nk, 2] int32
    query_mask: Tensor | None = None,  # [Tq] bool
) -> Tensor:
    """The attention that each key receives: the column sums of the softmax, `sum_heads sum_queries exp(s - lse)`.

    For an attention that returned its lse but no centrality: one of another library, or one whose
    centrality_query_mask is known only afterwards. FastV, PyramidDrop and H2O rank tokens by these sums too.
    `packed_attention(return_centrality=True)` gives the same and costs less. Two runs give the same bits: each key
    adds up its own sum, without atomics.

    lse must come from attention with the same q, k and keyword arguments; nothing checks that. Dropout makes no
    difference, since lse is taken before it. Not differentiable: the paper lets no gradient through the importance
    (arXiv 2604.05329). Under autocast q and k are cast to the autocast dtype.

    Args:
        q: `[Tq, Hq, D]` in fp32, fp16, bf16, or fp64 on the CPU; D a multiple of 8 up to 256. Strided views are fine.
        k: `[Tk, Hkv, D]` of the same dtype, Hq a multiple of Hkv.
        lse: `[Hq, Tq]` in fp32 (fp64 for fp64 inputs), log of the sum of exponentiated scores. A query with lse -inf
            (it sees no key) adds nothing.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, relative_bias, positions_q, positions_k,
        tiles_q, tiles_k: as in `packed_attention`.
        query_mask: which queries count. None: all.

    Returns:
        `[Tk]` in the dtype of lse; 0 on tail rows (those from `cu_seqlens_k[-1]` on) and where no query counts.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: cu_seqlens does not rise from 0 to at most T, or a sequence is longer than its max_seqlen (on the
            CPU, or under STAMP_KERNELS_CHECK=1); tiles are those of other offsets (on a GPU
            under STAMP_KERNELS_CHECK=1; the CPU's kernels do not read them).
    """
    q, k = cast_for_autocast(q=q, k=k)
    check_q_and_k(q, k, is_self_attention=cu_seqlens_k is None)
    sequences = checked_sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, tiles_q, tiles_k, q, k)
    bias = checked_bias(relative_bias, positions_q, positions_k, q, k)
    check_query_mask("query_mask", query_mask, q)
    check_flags(causal=causal)
    total_q, num_heads, head_dim = q.shape
    check_tensor("lse", lse, shape=[num_heads, total_q], dtypes=[compute_dtype(q.dtype)], device=q.device)
    scale = checked_scale(scale, head_dim)
    with torch.no_grad():
        if not reference_is_forced():
            return _attention_centrality(q, k, lse, *sequences, causal, scale, *bias, query_mask)
        with torch.autocast(q.device.type, enabled=False):  # the inputs are cast; products of the reference stay fp32
            return reference.attention_centrality(q, k, lse, sequences, causal, scale, bias, query_mask)
