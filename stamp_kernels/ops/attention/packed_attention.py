"""Packed attention: softmax attention over packed sequences, with T5's bias, dropout and centrality."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from stamp_kernels._backend import reference_is_forced
from stamp_kernels.common.arguments import AttentionNeeds, BiasArguments, DropoutArguments, Sequences
from stamp_kernels.common.exported import exported
from stamp_kernels.common.precision import compute_dtype
from stamp_kernels.ops._autocast import cast_for_autocast
from stamp_kernels.ops._autograd import OpFunction, call_below_autograd, first_order, without_repeats
from stamp_kernels.ops._checks import check_flags, check_range, check_tensor
from stamp_kernels.ops._library import define_op, imported_once
from stamp_kernels.ops.attention import _boundary
from stamp_kernels.ops.attention._inputs import (
    check_q_and_k,
    check_query_mask,
    check_v,
    checked_bias,
    checked_scale,
    checked_sequences,
    num_query_key_pairs,
)
from stamp_kernels.reference import attention as reference
from stamp_kernels.relative_position import RelativePositionBias

# In both, cu_seqlens_k None means self-attention: keys have the offsets, positions and tiles of the queries.
_FORWARD_SCHEMA = (
    "packed_attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
    "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? tiles_q, Tensor? tiles_k, "
    "bool causal, float scale, "
    "Tensor? bias_table, bool bias_bidirectional, int bias_max_distance, Tensor? positions_q, Tensor? positions_k, "
    "Tensor? centrality_query_mask, float dropout_p, Tensor? dropout_seed, bool return_centrality) "
    "-> (Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "packed_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? tiles_q, "
    "Tensor? tiles_k, bool causal, float scale, "
    "Tensor? bias_table, bool bias_bidirectional, int bias_max_distance, Tensor? positions_q, Tensor? positions_k, "
    "float dropout_p, Tensor? dropout_seed, bool need_dq, bool need_dk, bool need_dv, bool need_dbias) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@exported
class AttentionOutput(NamedTuple):
    """What `packed_attention` returns if a `return_` flag is set; a part that was not asked for is None.

    Attributes:
        out: `[Tq, Hq, D]`, dtype of q.
        lse: `[Hq, Tq]`, fp32 (fp64 for fp64 inputs): log of the sum of exponentiated scores; -inf for a query that
            sees no key.
        centrality: `[Tk]`, fp32 (fp64): the attention that each key receives, over heads and queries, before dropout.
    """

    out: Tensor
    lse: Tensor | None
    centrality: Tensor | None


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


@imported_once
def _forward_triton() -> Callable[..., Any]:
    from stamp_kernels.triton_kernels.attention.forward import packed_attention_forward  # imports Triton

    return packed_attention_forward


@imported_once
def _backward_triton() -> Callable[..., Any]:
    from stamp_kernels.triton_kernels.attention.backward import packed_attention_backward  # imports Triton

    return packed_attention_backward


def _differentiable_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, causal: bool, scale: float, bias: BiasArguments, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op for inputs that require grad."""
    outputs: tuple[Tensor, Tensor, Tensor] = _PackedAttention.apply(
        q, k, v, bias.bias_table, sequences, causal, scale, bias, *others
    )
    return outputs


_forward = define_op(
    _FORWARD_SCHEMA,
    check=_boundary.check_forward,
    reference=reference.packed_attention_forward,
    triton=_forward_triton,
    fake=_forward_fake,
    flops=_forward_flops,
    differentiable=_differentiable_forward,
    groups=(Sequences, BiasArguments, DropoutArguments),
)
_backward = define_op(
    _BACKWARD_SCHEMA,
    check=_boundary.check_backward,
    reference=reference.packed_attention_backward,
    triton=_backward_triton,
    fake=_backward_fake,
    flops=_backward_flops,
    backward_of="packed_attention",
    groups=(Sequences, BiasArguments, DropoutArguments, AttentionNeeds),
)


class _PackedAttention(OpFunction):
    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias_table: Tensor | None,  # beside `bias`, since autograd tracks only tensors that are arguments
        sequences: Sequences,
        causal: bool,
        scale: float,
        bias: BiasArguments,
        centrality_query_mask: Tensor | None,
        dropout: DropoutArguments,
        return_centrality: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs: tuple[Tensor, Tensor, Tensor] = call_below_autograd(
            _forward, q, k, v, *sequences, causal, scale, bias_table, *bias[1:], centrality_query_mask, *dropout,
            return_centrality,
        )  # fmt: skip
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        q, k, v, bias_table, sequences, causal, scale, bias, _, dropout, _ = inputs
        out, lse, centrality = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse, centrality)
        ctx.save_for_backward(
            q, k, v, out, lse, sequences.cu_seqlens_q, sequences.cu_seqlens_k, sequences.tiles_q, sequences.tiles_k,
            bias_table, bias.positions_q, bias.positions_k, dropout.dropout_seed,
        )  # fmt: skip
        ctx.max_seqlens = (sequences.max_seqlen_q, sequences.max_seqlen_k)
        ctx.causal, ctx.scale, ctx.dropout_p = causal, scale, dropout.dropout_p
        ctx.bias_options = (bias.bias_bidirectional, bias.bias_max_distance)

    @staticmethod
    @first_order("packed_attention")
    def backward(
        ctx: Any, saved: tuple[Any, ...], grad_out: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        grads: list[Tensor | None] = [None] * 4
        if grad_out is not None and any(needs):
            q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *tiles, bias_table, positions_q, positions_k, seed = saved
            computed = call_below_autograd(
                _backward, grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.max_seqlens, *tiles,
                ctx.causal, ctx.scale, bias_table, *ctx.bias_options, positions_q, positions_k, ctx.dropout_p, seed,
                *needs,
            )  # fmt: skip
            grads = [grad if needed else None for grad, needed in zip(computed, needs, strict=True)]
        return *grads, *[None] * 7


@overload
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ..., *, causal: bool = ..., scale: float | None = ...,
    relative_bias: RelativePositionBias | None = ..., positions_q: Tensor | None = ...,
    positions_k: Tensor | None = ..., tiles_q: Tensor | None = ..., tiles_k: Tensor | None = ...,
    centrality_query_mask: Tensor | None = ..., dropout_p: float = ..., dropout_seed: Tensor | None = ...,
    return_lse: Literal[False] = ..., return_centrality: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ..., *, causal: bool = ..., scale: float | None = ...,
    relative_bias: RelativePositionBias | None = ..., positions_q: Tensor | None = ...,
    positions_k: Tensor | None = ..., tiles_q: Tensor | None = ..., tiles_k: Tensor | None = ...,
    centrality_query_mask: Tensor | None = ..., dropout_p: float = ..., dropout_seed: Tensor | None = ...,
    return_lse: Literal[True], return_centrality: bool = ...,
) -> AttentionOutput: ...  # fmt: skip
@overload
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ..., *, causal: bool = ..., scale: float | None = ...,
    relative_bias: RelativePositionBias | None = ..., positions_q: Tensor | None = ...,
    positions_k: Tensor | None = ..., tiles_q: Tensor | None = ..., tiles_k: Tensor | None = ...,
    centrality_query_mask: Tensor | None = ..., dropout_p: float = ..., dropout_seed: Tensor | None = ...,
    return_lse: bool = ..., return_centrality: Literal[True],
) -> AttentionOutput: ...  # fmt: skip
@overload
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ..., max_seqlen_k: int | None = ..., *, causal: bool = ..., scale: float | None = ...,
    relative_bias: RelativePositionBias | None = ..., positions_q: Tensor | None = ...,
    positions_k: Tensor | None = ..., tiles_q: Tensor | None = ..., tiles_k: Tensor | None = ...,
    centrality_query_mask: Tensor | None = ..., dropout_p: float = ..., dropout_seed: Tensor | None = ...,
    return_lse: bool = ..., return_centrality: bool = ...,
) -> Tensor | AttentionOutput: ...  # fmt: skip
def packed_attention(
    q: Tensor,  # [Tq, Hq, D]
    k: Tensor,  # [Tk, Hkv, D]
    v: Tensor,  # [Tk, Hkv, D]
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
    centrality_query_mask: Tensor | None = None,  # [Tq] bool
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,  # [1] int64
    return_lse: bool = False,
    return_centrality: bool = False,
) -> Tensor | AttentionOutput:
    """Attention within each sequence of a packed batch: `softmax(scale * q k^T + bias) v`.

    The positional arguments are those of flash-attention's `flash_attn_varlen_func` and torch's `varlen_attn`. No
    attention map is written to memory. Rows from `cu_seqlens[-1]` on (tail rows) are never read; their outputs and
    gradients are 0. A query that sees no key gives 0 and lse = -inf. Differentiable in q, k, v and the bias table, to
    first order. Under autocast q, k and v are cast to the autocast dtype.

    Args:
        q: `[Tq, Hq, D]` in fp32, fp16, bf16, or fp64 on the CPU; D a multiple of 8 up to 256. Strided views are fine.
        k, v: `[Tk, Hkv, D]` of the same dtype, Hq a multiple of Hkv (grouped query heads share a key head).
        cu_seqlens_q: int32 or int64 `[B + 1]`, offsets of the query sequences, on the same device. Every call converts
            int64 to int32; a PackedBatch does it once.
        cu_seqlens_k: those of the key sequences, for cross attention. None: self-attention.
        max_seqlen_q: the length of the longest query sequence, or an upper bound. Must be given.
        max_seqlen_k: the same for the key sequences; given if and only if cu_seqlens_k is.
        causal: query i sees key j iff j <= i + (n_k - n_q), by index in the packed sequence.
        scale: factor on q k^T. None: 1/sqrt(D). T5 uses 1.0.
        relative_bias: T5's bias by the bucket of `positions_k - positions_q`.
        positions_q, positions_k: int32 original positions; only the bias reads them. None: 0..n-1 in each sequence;
            positions_k None in self-attention: positions_q.
        tiles_q, tiles_k: from `tile_list(cu_seqlens_q, Tq)` and `tile_list(cu_seqlens_k, Tk)`, which many calls share.
            They save GPU time where lengths differ much, and change no bit but of the bias gradient; the CPU makes a
            list of its own. None: none; tiles_k None in self-attention: tiles_q.
        centrality_query_mask: which queries count in the centrality; the attention itself ignores it. None: all.
        dropout_p: probability of dropping an attention weight, in [0, 1).
        dropout_seed: int64 `[1]` on the device, from which Philox4x32-7 draws the same mask in every backend. None:
            drawn with torch.randint.
        return_lse, return_centrality: return an AttentionOutput that has these parts beside `out`.

    Returns:
        `out` `[Tq, Hq, D]` in q's dtype, or AttentionOutput(out, lse `[Hq, Tq]`, centrality `[Tk]`) if a flag is set.
        lse and centrality are fp32 (fp64 for fp64 inputs) and not differentiable. The centrality of a key is the sum
        of its weights before dropout, over heads and the queries of the mask (arXiv 2604.05329, S_attn).

    Raises:
        ValueError: an argument has a wrong shape, dtype, device or value.
        RuntimeError: cu_seqlens does not rise from 0 to at most T, or a sequence is longer than its max_seqlen (on the
            CPU, or under STAMP_KERNELS_CHECK=1); tiles are those of other offsets (on a GPU
            under STAMP_KERNELS_CHECK=1; the CPU's kernels do not read them);
            positions are 2^30 or more apart (on the CPU).
    """
    q, k, v = cast_for_autocast(q=q, k=k, v=v)
    check_q_and_k(q, k, is_self_attention=cu_seqlens_k is None)
    sequences = checked_sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, tiles_q, tiles_k, q, k)
    bias = checked_bias(relative_bias, positions_q, positions_k, q, k)
    check_query_mask("centrality_query_mask", centrality_query_mask, q)
    check_v(v, k)
    check_flags(causal=causal, return_lse=return_lse, return_centrality=return_centrality)
    dropout_p = check_range("dropout_p", dropout_p, 0.0, 1.0, below_high=True)
    if dropout_p == 0.0:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    else:
        check_tensor("dropout_seed", dropout_seed, shape=[1], dtypes=[torch.int64], device=q.device)
    if torch.compiler.is_compiling():
        q, k, v, cu_seqlens_q, cu_seqlens_k, tiles_q, tiles_k, positions_q, positions_k = without_repeats(
            q, k, v, sequences.cu_seqlens_q, sequences.cu_seqlens_k, tiles_q, tiles_k, bias.positions_q,
            bias.positions_k,
        )  # fmt: skip
        sequences = sequences._replace(
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, tiles_q=tiles_q, tiles_k=tiles_k
        )
        bias = bias._replace(positions_q=positions_q, positions_k=positions_k)
    arguments = (
        sequences,
        causal,
        checked_scale(scale, q.shape[-1]),
        bias,
        centrality_query_mask,
        DropoutArguments(dropout_p, dropout_seed),
        return_centrality,
    )
    if reference_is_forced():
        with torch.autocast(q.device.type, enabled=False):  # the inputs are cast; products of the reference stay fp32
            out, lse, centrality = reference.packed_attention_forward(q, k, v, *arguments)
    else:
        out, lse, centrality = _PackedAttention.apply(q, k, v, bias.bias_table, *arguments)
    if not (return_lse or return_centrality):
        return out
    return AttentionOutput(out, lse if return_lse else None, centrality if return_centrality else None)
