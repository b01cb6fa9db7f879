"""Packed attention: softmax attention over sequences laid end to end, with T5's bias, dropout and centrality."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.common.arguments import AttentionNeeds, BiasArguments, DropoutArguments, Sequences
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.ops._autocast import cast_for_autocast
from stamp_kernels.ops._autograd import without_repeats
from stamp_kernels.ops._checks import FLOATING_DTYPES, check_count, check_cu_seqlens, check_range, check_tensor
from stamp_kernels.ops._library import define_op
from stamp_kernels.reference import attention as reference
from stamp_kernels.relative_position import RelativePositionBias

MAX_HEAD_DIM = 256

# In both, cu_seqlens_k None stands for self-attention: keys have the offsets and positions of the queries.
_FORWARD_SCHEMA = (
    "packed_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
    "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale, "
    "Tensor? bias_table, bool bias_bidirectional, int bias_max_distance, Tensor? positions_q, Tensor? positions_k, "
    "Tensor? centrality_query_mask, float dropout_p, Tensor? dropout_seed, bool return_centrality) "
    "-> (Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "packed_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale, "
    "Tensor? bias_table, bool bias_bidirectional, int bias_max_distance, Tensor? positions_q, Tensor? positions_k, "
    "float dropout_p, Tensor? dropout_seed, bool need_dq, bool need_dk, bool need_dv, bool need_dbias) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


class AttentionOutput(NamedTuple):
    """What `packed_attention` returns as soon as one `return_` flag is set; None where not asked for.

    Attributes:
        out: `[Tq, Hq, D]`, dtype of q.
        lse: `[Hq, Tq]`, fp32 (fp64 for fp64 inputs): log of the sum of exponentiated scores; -inf where no key is seen.
        centrality: `[Tk]`, fp32 (fp64): the attention each key receives, over heads and voting queries, before dropout.
    """

    out: Tensor
    lse: Tensor | None
    centrality: Tensor | None


def num_query_key_pairs(sequences: Sequences) -> int:
    """Pairs that meet in a score; an upper bound where the lengths are not at hand (fake tensors)."""
    cu_seqlens_q = sequences.cu_seqlens_q
    cu_seqlens_k = cu_seqlens_q if sequences.cu_seqlens_k is None else sequences.cu_seqlens_k
    if isinstance(cu_seqlens_q, torch._subclasses.FakeTensor) or cu_seqlens_q.is_meta:
        return sequences.num_sequences * sequences.max_seqlen_q * sequences.max_seqlen_k
    return int((cu_seqlens_q.diff().long() * cu_seqlens_k.diff().long()).sum())


def _forward_fake(
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
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(q.dtype)
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape[1], q.shape[0], dtype=dtype),
        q.new_empty(k.shape[0] if return_centrality else 0, dtype=dtype),
    )


def _forward_flops(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, *_: object) -> int:
    """Two products, Q K^T and P V; causal masking is not subtracted, as in torch's own formulas."""
    return 2 * 2 * num_query_key_pairs(sequences) * q.shape[1] * q.shape[2]


def _backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = bias.bias_table
    return (
        q.new_empty(q.shape if needs.need_dq else (0,)),
        k.new_empty(k.shape if needs.need_dk else (0,)),
        v.new_empty(v.shape if needs.need_dv else (0,)),
        table.new_empty(table.shape) if needs.need_dbias and table is not None else q.new_empty(0),
    )


def _backward_flops(
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
) -> int:
    """Q K^T again, dO V^T unless dV is all that is needed, and one product for each of dQ, dK and dV."""
    need_dq, need_dk, need_dv, need_dbias = needs
    products = 1 + (need_dq or need_dk or need_dbias) + need_dq + need_dk + need_dv
    return 2 * products * num_query_key_pairs(sequences) * q.shape[1] * q.shape[2]


def _forward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from stamp_kernels.triton_kernels.attention.forward import packed_attention_forward  # imports Triton

    return packed_attention_forward(*args)


def _backward_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from stamp_kernels.triton_kernels.attention.backward import packed_attention_backward  # imports Triton

    return packed_attention_backward(*args)


_forward = define_op(
    _FORWARD_SCHEMA,
    public_name="packed_attention",
    reference=reference.packed_attention_forward,
    triton=_forward_triton,
    fake=_forward_fake,
    flops=_forward_flops,
    groups=(Sequences, BiasArguments, DropoutArguments),
)
_backward = define_op(
    _BACKWARD_SCHEMA,
    public_name="packed_attention",
    reference=reference.packed_attention_backward,
    triton=_backward_triton,
    fake=_backward_fake,
    flops=_backward_flops,
    groups=(Sequences, BiasArguments, DropoutArguments, AttentionNeeds),
)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias_table: Tensor | None,  # once more beside `bias`, since it has a gradient
        sequences: Sequences,
        causal: bool,
        scale: float,
        bias: BiasArguments,
        centrality_query_mask: Tensor | None,
        dropout: DropoutArguments,
        return_centrality: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        bias = bias._replace(bias_table=bias_table)
        out, lse, centrality = _forward(
            q, k, v, *sequences, causal, scale, *bias, centrality_query_mask, *dropout, return_centrality
        )
        ctx.mark_non_differentiable(lse, centrality)
        ctx.save_for_backward(
            q, k, v, out, lse, sequences.cu_seqlens_q, sequences.cu_seqlens_k, bias_table, bias.positions_q,
            bias.positions_k, dropout.dropout_seed,
        )  # fmt: skip
        ctx.max_seqlens = (sequences.max_seqlen_q, sequences.max_seqlen_k)
        ctx.causal, ctx.scale, ctx.dropout_p = causal, scale, dropout.dropout_p
        ctx.bias_options = (bias.bias_bidirectional, bias.bias_max_distance)
        return out, lse, centrality

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = AttentionNeeds(*ctx.needs_input_grad[:4])
        grads: list[Tensor | None] = [None] * 4
        if grad_out is not None and any(needs):
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, bias_table, *positions, dropout_seed = ctx.saved_tensors
            sequences = Sequences(cu_seqlens_q, cu_seqlens_k, *ctx.max_seqlens)
            bias = BiasArguments(bias_table, *ctx.bias_options, *positions)
            dropout = DropoutArguments(ctx.dropout_p, dropout_seed)
            computed = _backward(
                grad_out, q, k, v, out, lse, *sequences, ctx.causal, ctx.scale, *bias, *dropout, *needs
            )
            grads = [grad if needed else None for grad, needed in zip(computed, needs, strict=True)]
        return *grads, *[None] * 7


def check_attention_inputs(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    relative_bias: RelativePositionBias | None,
    positions_q: Tensor | None,
    positions_k: Tensor | None,
    query_mask: Tensor | None,
    query_mask_name: str,
) -> None:
    """The checks that packed_attention and attention_centrality share."""
    check_tensor("q", q, shape=["total_q", "num_heads_q", "head_dim"], dtypes=FLOATING_DTYPES)
    device = q.device
    total_q, num_heads, head_dim = q.shape
    total_k = total_q if cu_seqlens_k is None else "total_k"
    check_tensor("k", k, shape=[total_k, "num_heads_kv", head_dim], dtypes=[q.dtype], device=device)
    num_heads_kv = k.shape[1]
    if q.dtype == torch.float64 and device.type != "cpu" and not reference_is_forced():
        raise ValueError("q must have dtype float32, float16 or bfloat16 on this device, got torch.float64")
    if head_dim % 8 != 0 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"q: head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}")
    if num_heads_kv == 0 or num_heads % num_heads_kv != 0:
        raise ValueError(f"k: num_heads_kv must divide the {num_heads} heads of q, got {num_heads_kv}")
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, device)
    check_count("max_seqlen_q", max_seqlen_q)
    if (cu_seqlens_k is None) != (max_seqlen_k is None):
        raise ValueError("cu_seqlens_k and max_seqlen_k must be given together")
    if cu_seqlens_k is not None:
        check_tensor("cu_seqlens_k", cu_seqlens_k, shape=cu_seqlens_q.shape, dtypes=[torch.int32], device=device)
        check_count("max_seqlen_k", max_seqlen_k)
    if relative_bias is not None:
        if not isinstance(relative_bias, RelativePositionBias):
            raise ValueError(f"relative_bias must be a RelativePositionBias, got {type(relative_bias).__name__}")
        check_tensor(
            "relative_bias.table",
            relative_bias.table,
            shape=["num_buckets", num_heads],
            dtypes=FLOATING_DTYPES,
            device=device,
        )
    for name, positions, total in (("positions_q", positions_q, total_q), ("positions_k", positions_k, k.shape[0])):
        if positions is not None:
            check_tensor(name, positions, shape=[total], dtypes=[torch.int32], device=device)
    if query_mask is not None:
        check_tensor(query_mask_name, query_mask, shape=[total_q], dtypes=[torch.bool], device=device)


def bias_arguments(
    relative_bias: RelativePositionBias | None, positions_q: Tensor | None, positions_k: Tensor | None
) -> BiasArguments:
    """The bias as the ops take it. Nothing else reads positions."""
    if relative_bias is None:
        return BiasArguments(None, True, 0, None, None)
    return BiasArguments(
        relative_bias.table, relative_bias.bidirectional, relative_bias.max_distance, positions_q, positions_k
    )


def packed_attention(
    q: Tensor,  # [Tq, Hq, D]
    k: Tensor,  # [Tk, Hkv, D]
    v: Tensor,  # [Tk, Hkv, D]
    cu_seqlens_q: Tensor,  # [B + 1] int32
    cu_seqlens_k: Tensor | None = None,  # [B + 1] int32
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    relative_bias: RelativePositionBias | None = None,
    positions_q: Tensor | None = None,  # [Tq] int32
    positions_k: Tensor | None = None,  # [Tk] int32
    centrality_query_mask: Tensor | None = None,  # [Tq] bool
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,  # [1] int64
    return_lse: bool = False,
    return_centrality: bool = False,
) -> Tensor | AttentionOutput:
    """Attention within each sequence of a packed batch: `softmax(scale * q k^T + bias) v`.

    No attention map reaches memory. Rows from `cu_seqlens[-1]` on (tail rows) are never read; their outputs and
    gradients are 0. A query that sees no key gives 0 and lse = -inf. Differentiable in q, k, v and the bias table,
    once. Under autocast q, k and v are cast to the autocast dtype.

    Args:
        q: `[Tq, Hq, D]` in fp32, fp16, bf16, or fp64 on the CPU; D a multiple of 8 up to 256. Strided views are fine.
        k, v: `[Tk, Hkv, D]` of the same dtype, Hq a multiple of Hkv (grouped query heads share a key head).
        cu_seqlens_q: int32 `[B + 1]`, offsets of the query sequences, on the same device.
        cu_seqlens_k: those of the keys, for cross attention. None: self-attention.
        max_seqlen_q: the longest query sequence, or an upper bound of it. Must be given.
        max_seqlen_k: the same of the keys. Goes with cu_seqlens_k.
        causal: key j is visible to query i iff j <= i + (n_k - n_q), by index in the packed sequence.
        scale: factor on q k^T. None: 1/sqrt(D). T5 uses 1.0.
        relative_bias: T5's bias by the bucket of `positions_k - positions_q`.
        positions_q, positions_k: int32 original positions, read by the bias alone. None: 0..n-1 in each sequence;
            positions_k None in self-attention: positions_q.
        centrality_query_mask: which queries vote in the centrality; it hides no query from the attention. None: all.
        dropout_p: probability with which an attention weight is dropped, in [0, 1).
        dropout_seed: int64 `[1]` on the device; the mask is Philox4x32-10 of it, the same from every backend. None:
            drawn with torch.randint.
        return_lse, return_centrality: return an AttentionOutput with these parts besides `out`.

    Returns:
        `out` `[Tq, Hq, D]` in q's dtype, or AttentionOutput(out, lse `[Hq, Tq]`, centrality `[Tk]`) as soon as one
        flag is set. lse and centrality are fp32 (fp64 for fp64 inputs) and not differentiable; centrality is the sum
        over heads and voting queries of the weights before dropout (arXiv 2604.05329, S_attn).

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: cu_seqlens is not a rising sequence from 0 to at most T, or a sequence is longer than its
            max_seqlen (on the CPU, or under STAMP_KERNELS_CHECK=1); positions lie 2^30 or more apart (on the CPU).
    """
    q, k, v = cast_for_autocast(q=q, k=k, v=v)
    check_attention_inputs(
        q,
        k,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        relative_bias,
        positions_q,
        positions_k,
        centrality_query_mask,
        "centrality_query_mask",
    )
    check_tensor("v", v, shape=k.shape, dtypes=[q.dtype], device=q.device)
    check_range("dropout_p", dropout_p, 0.0, 1.0, below_high=True)
    if dropout_p == 0.0:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    else:
        check_tensor("dropout_seed", dropout_seed, shape=[1], dtypes=[torch.int64], device=q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    bias = bias_arguments(relative_bias, positions_q, positions_k)
    q, k, v, cu_seqlens_q, cu_seqlens_k, positions_q, positions_k = without_repeats(
        q, k, v, cu_seqlens_q, cu_seqlens_k, bias.positions_q, bias.positions_k
    )
    bias = bias._replace(positions_q=positions_q, positions_k=positions_k)
    max_seqlen_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    dropout = DropoutArguments(dropout_p, dropout_seed)
    arguments = (sequences, causal, scale, bias, centrality_query_mask, dropout, return_centrality)
    if reference_is_forced():
        with torch.autocast(q.device.type, enabled=False):  # the inputs have been cast; products inside stay in fp32
            out, lse, centrality = reference.packed_attention_forward(q, k, v, *arguments)
    else:
        out, lse, centrality = _PackedAttention.apply(q, k, v, bias.bias_table, *arguments)
    if not (return_lse or return_centrality):
        return out
    return AttentionOutput(out, lse if return_lse else None, centrality if return_centrality else None)
