"""Token importance: the attention that each token receives, without an attention map in memory, and the score."""

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.ops._autocast import cast_for_autocast
from stamp_kernels.ops._checks import FLOATING_DTYPES, check_choice, check_cu_seqlens, check_tensor
from stamp_kernels.ops._library import define_op
from stamp_kernels.ops.attention import (
    check_attention_inputs,
    flat_bias,
    num_query_key_pairs,
)
from stamp_kernels.reference import importance as reference
from stamp_kernels.reference._precision import compute_dtype
from stamp_kernels.relative_position import RelativePositionBias


def _attention_centrality_fake(q, k, lse, *rest):
    return lse.new_empty(k.shape[0])


def _attention_centrality_flops(q, k, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *rest, out_val=None):
    """One product, Q K^T; causal masking is not subtracted, as in torch's own formulas."""
    pairs = num_query_key_pairs(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return 2 * pairs * q.shape[1] * q.shape[2]


def _attention_centrality_triton(*args):
    from stamp_kernels.triton_kernels.importance import attention_centrality  # imports Triton

    return attention_centrality(*args)


# cu_seqlens_k None stands for self-attention: keys have the offsets and positions of the queries.
_attention_centrality = define_op(
    "attention_centrality(Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale, Tensor? bias_table, "
    "bool bias_bidirectional, int bias_max_distance, Tensor? positions_q, Tensor? positions_k, "
    "Tensor? query_mask) -> Tensor",
    public_name="attention_centrality",
    reference=reference.attention_centrality,
    triton=_attention_centrality_triton,
    fake=_attention_centrality_fake,
    flops=_attention_centrality_flops,
)


def attention_centrality(
    q: Tensor,  # [Tq, Hq, D]
    k: Tensor,  # [Tk, Hkv, D]
    lse: Tensor,  # [Hq, Tq]
    cu_seqlens_q: Tensor,  # [B + 1] int32
    max_seqlen_q: int,
    cu_seqlens_k: Tensor | None = None,  # [B + 1] int32
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    relative_bias: RelativePositionBias | None = None,
    positions_q: Tensor | None = None,  # [Tq] int32
    positions_k: Tensor | None = None,  # [Tk] int32
    query_mask: Tensor | None = None,  # [Tq] bool
) -> Tensor:
    """The attention each key receives: the column sums of the softmax, `sum_heads sum_queries exp(s - lse)`.

    For whoever has the lse of an attention that computed no column sums: one from another library, or one whose
    query_mask is known only afterwards. FastV, PyramidDrop and H2O rank tokens by it too. Where the attention is ours,
    `packed_attention(return_centrality=True)` gives the same for less. Two runs give the same bits: keys own their
    sums, without atomics.

    lse must come from attention with the same q, k and keyword arguments; nothing checks that. Dropout does not
    matter: lse is taken before it. Not differentiable: no gradient flows through the scores (arXiv 2604.05329).
    Under autocast q and k are cast to the autocast dtype.

    Args:
        q: `[Tq, Hq, D]` in fp32, fp16, bf16, or fp64 on the CPU; D a multiple of 8 up to 256. Strided views are fine.
        k: `[Tk, Hkv, D]` of the same dtype, Hq a multiple of Hkv.
        lse: `[Hq, Tq]` in fp32 (fp64 for fp64 inputs), log of the sum of exponentiated scores. A query with lse -inf
            (it sees no key) votes nothing.
        cu_seqlens_q, max_seqlen_q, cu_seqlens_k, max_seqlen_k, causal, scale, relative_bias, positions_q, positions_k:
            as in `packed_attention`.
        query_mask: which queries vote. None: all.

    Returns:
        `[Tk]` in the dtype of lse; 0 on tail rows (those from `cu_seqlens_k[-1]` on) and where no query votes.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: cu_seqlens is not a rising sequence from 0 to at most T, or a sequence is longer than its
            max_seqlen (on the CPU, or under STAMP_KERNELS_CHECK=1).
    """
    q, k = cast_for_autocast(q=q, k=k)
    check_attention_inputs(
        q,
        k,
        cu_seqlens_q,
        max_seqlen_q,
        cu_seqlens_k,
        max_seqlen_k,
        relative_bias,
        positions_q,
        positions_k,
        query_mask,
    )
    total_q, num_heads, head_dim = q.shape
    check_tensor("lse", lse, shape=[num_heads, total_q], dtypes=[compute_dtype(q.dtype)], device=q.device)
    max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    bias_table, *bias_rest = flat_bias(relative_bias, positions_q, positions_k)
    scale = head_dim**-0.5 if scale is None else float(scale)
    arguments = (
        q, k, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, bias_table, *bias_rest,
        query_mask,
    )  # fmt: skip
    with torch.no_grad():
        if not reference_is_forced():
            return _attention_centrality(*arguments)
        with torch.autocast(q.device.type, enabled=False):  # the inputs have been cast; products inside stay in fp32
            return reference.attention_centrality(*arguments)


NORM_ORDERS = {"l1": 1, "l2": 2}


def _token_importance_fake(hidden, centrality, cu_seqlens, norm_order, per_visible_query):
    return hidden.new_empty(hidden.shape[0], dtype=compute_dtype(hidden.dtype))


def _token_importance_triton(*args):
    from stamp_kernels.triton_kernels.importance import token_importance  # imports Triton

    return token_importance(*args)


_token_importance = define_op(
    "token_importance(Tensor hidden, Tensor centrality, Tensor? cu_seqlens, int norm_order, bool per_visible_query) "
    "-> Tensor",
    public_name="token_importance",
    reference=reference.token_importance,
    triton=_token_importance_triton,
    fake=_token_importance_fake,
)


def token_importance(
    hidden: Tensor,  # [T, D] floating
    centrality: Tensor,  # [T] fp32 or fp64
    cu_seqlens: Tensor | None = None,  # [B + 1] int32
    *,
    norm: str = "l1",
    normalize: str = "none",
) -> Tensor:
    """Score every token by the norm of its hidden state times the attention it receives, in one pass over `hidden`.

    `importance[i] = ||hidden[i]|| * centrality[i]` (arXiv 2604.05329, section SAP). The norm is computed in fp32 (fp64
    for fp64) whatever the dtype of hidden, under autocast too. Not differentiable: no gradient flows through the
    scores.

    Args:
        hidden: `[T, D]`, the output of the block after which tokens are pruned.
        centrality: `[T]` in fp32 or fp64, the attention that each token receives in that block, summed over heads and
            queries: from `packed_attention(return_centrality=True)` or `attention_centrality`.
        cu_seqlens: int32 `[B + 1]` on the same device. Rows from `cu_seqlens[-1]` on are tail rows and score 0. None:
            every row is a token.
        norm: `"l1"` or `"l2"`.
        normalize: `"none"` for the sum as the paper has it. `"visible_queries"` divides it by the number of queries
            that see the token in causal attention, n - i for token i of the n in its packed sequence: in the plain
            sum early tokens collect more because more queries see them. Needs cu_seqlens.

    Returns:
        `[T]` in fp32, fp64 where hidden is fp64.

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: cu_seqlens is not a rising sequence from 0 to at most T (on the CPU, or under
            STAMP_KERNELS_CHECK=1).
    """
    check_scoring(hidden, centrality, cu_seqlens, norm, normalize)
    score = reference.token_importance if reference_is_forced() else _token_importance
    return score(hidden.detach(), centrality.detach(), cu_seqlens, NORM_ORDERS[norm], normalize == "visible_queries")


def check_scoring(
    hidden: Tensor, centrality: Tensor, cu_seqlens: Tensor | None, norm: str, normalize: str, name: str = "hidden"
) -> int:
    """The arguments of `token_importance`; T. `name` is that of the hidden states."""
    check_tensor(name, hidden, shape=["total", "width"], dtypes=FLOATING_DTYPES)
    total, device = hidden.shape[0], hidden.device
    check_tensor("centrality", centrality, shape=[total], dtypes=[torch.float32, torch.float64], device=device)
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, device)
    check_choice("norm", norm, tuple(NORM_ORDERS))
    check_choice("normalize", normalize, ("none", "visible_queries"))
    if normalize == "visible_queries" and cu_seqlens is None:
        raise ValueError('normalize="visible_queries" counts the queries of each sequence: cu_seqlens must be given')
    return total
