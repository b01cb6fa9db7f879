"""Packed sequences through Hugging Face T5: the host's own blocks, without padding, pruned on the way.

The blocks (`T5Block`) are called as they are, on hidden states `[1, T, d_model]`, so that their hooks and their
parameters stay the host's; only the loop over them and the attention function are ours. Written for transformers
5.17, whose T5 hands its position bias to a pluggable attention function.

Example:

    model = T5ForConditionalGeneration(config)
    use_packed_attention(model)
    prune = SemanticAdaptivePruning(keep_ratio=1 / 3)
    encoded = encode_packed(model.encoder, packed_ids, pruning={2: prune})
    states = decode_packed(model.decoder, packed_decoder_ids, encoded.packed)
    loss = next_token_loss(model, states, labels)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack

from stamp_kernels.modules.pruning import SemanticAdaptivePruning
from stamp_kernels.ops.attention import packed_attention
from stamp_kernels.ops.cross_entropy import multi_token_cross_entropy
from stamp_kernels.packed import PackedSequence
from stamp_kernels.relative_position import RelativePositionBias

ATTENTION_NAME = "stamp"


@dataclass
class _Packing:
    """What one block's attention needs to know of the packing; reaches it as a keyword argument of the block.

    Attributes:
        queries: the sequences that the block runs on (their values are not read).
        source, cu_seqlens_cross, max_seqlen_cross: for cross attention, the encoded sequences and the queries' offsets
            per encoded sequence.
        want_centrality: ask the self-attention for the centrality of its keys.
        centrality: the answer.
    """

    queries: PackedSequence
    source: PackedSequence | None = None
    cu_seqlens_cross: Tensor | None = None
    max_seqlen_cross: int | None = None
    want_centrality: bool = False
    centrality: Tensor | None = None


def _packed_t5_attention(
    module: T5Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float,
    position_bias: Tensor,
    packing: _Packing | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The attention function of the host's interface: query, key and value `[1, heads, T, d_kv]`, one packed batch."""
    if packing is None:
        raise RuntimeError(
            f"the attention implementation {ATTENTION_NAME!r} runs packed sequences alone: call encode_packed and "
            "decode_packed, or give the model another implementation with set_attn_implementation"
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    queries = packing.queries
    if position_bias.dim() == 0:  # the placeholder that marks cross attention
        source = packing.source
        out = packed_attention(
            q,
            k,
            v,
            packing.cu_seqlens_cross,
            packing.max_seqlen_cross,
            source.cu_seqlens,
            source.max_seqlen,
            scale=scaling,
            dropout_p=dropout,
        )
        return out[None], None
    result = packed_attention(
        q,
        k,
        v,
        queries.cu_seqlens,
        queries.max_seqlen,
        causal=module.is_causal,
        scale=scaling,
        relative_bias=RelativePositionBias(
            position_bias,
            bidirectional=not module.is_decoder,
            max_distance=module.relative_attention_max_distance,
        ),
        positions_q=queries.positions,
        dropout_p=dropout,
        return_centrality=packing.want_centrality,
    )
    if not packing.want_centrality:
        return result[None], None
    packing.centrality = result.centrality
    return result.out[None], None


def use_packed_attention(model: T5ForConditionalGeneration) -> None:
    """Give both stacks of the model the packed attention function; their own `forward` then raises.

    `model.encoder.set_attn_implementation("sdpa")` and the same of the decoder give the host's attention back.
    """
    AttentionInterface.register(ATTENTION_NAME, _packed_t5_attention)
    for stack in (model.encoder, model.decoder):
        stack.set_attn_implementation(ATTENTION_NAME)


def _bias_table(stack: T5Stack) -> Tensor:
    """`[num_buckets, num_heads]`: block 0 owns the table, all blocks read it."""
    return stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight


def _embed(stack: T5Stack, inputs: PackedSequence) -> Tensor:
    """`[T, d_model]` token embeddings; what stands on tail rows is not read as a token."""
    rows = torch.arange(inputs.values.shape[0], device=inputs.values.device)
    token_ids = torch.where(rows < inputs.cu_seqlens[-1], inputs.values, 0)
    return stack.dropout(stack.embed_tokens(token_ids))


def _check_stack(stack: T5Stack, inputs: PackedSequence) -> None:
    if stack.config._attn_implementation != ATTENTION_NAME:
        raise ValueError(
            f"the stack runs attention {stack.config._attn_implementation!r}: call use_packed_attention(model) first"
        )
    if inputs.values.dim() != 1 or inputs.values.dtype != torch.int64:
        raise ValueError(
            f"inputs.values must be int64 token ids [T], got {inputs.values.dtype} {list(inputs.values.shape)}"
        )


class EncodedSequence(NamedTuple):
    """What `encode_packed` returns.

    Attributes:
        packed: the encoder's output states, values `[T', d_model]`, with the kept tokens' offsets and positions.
        tokens_per_block: rows that entered each block.
    """

    packed: PackedSequence
    tokens_per_block: list[int]


def encode_packed(
    encoder: T5Stack, inputs: PackedSequence, *, pruning: Mapping[int, SemanticAdaptivePruning] | None = None
) -> EncodedSequence:
    """Run T5's encoder on packed token ids.

    Args:
        encoder: `model.encoder`, after `use_packed_attention(model)`.
        inputs: values int64 `[T]` token ids; positions None for 0..n-1.
        pruning: number of a block, counted from 1, to what prunes its output (STAMP, arXiv 2604.05329: `{2: ...}`
            prunes after the second block). The tokens' centrality is that of the same block's attention.

    Raises:
        ValueError: the stack has another attention function, the values are no token ids, or a pruning point is not
            one of the encoder's blocks.
    """
    _check_stack(encoder, inputs)
    pruning = dict(pruning or {})
    for block_number in pruning:
        if not 1 <= block_number <= len(encoder.block):
            raise ValueError(f"pruning: blocks are numbered 1 to {len(encoder.block)}, got {block_number}")
    packed = replace(inputs, values=_embed(encoder, inputs))
    bias_table = _bias_table(encoder)
    tokens_per_block = []
    for block_number, block in enumerate(encoder.block, start=1):
        prune = pruning.get(block_number)
        packing = _Packing(packed, want_centrality=prune is not None and prune.is_active)
        tokens_per_block.append(packed.values.shape[0])
        hidden = block(packed.values[None], None, bias_table, packing=packing)[0]
        packed = replace(packed, values=hidden[0])
        if packing.want_centrality:
            packed = prune(packed, packing.centrality).packed
    states = encoder.dropout(encoder.final_layer_norm(packed.values))
    return EncodedSequence(replace(packed, values=states), tokens_per_block)


def decode_packed(
    decoder: T5Stack,
    inputs: PackedSequence,
    source: PackedSequence,
    *,
    cu_seqlens_cross: Tensor | None = None,
    max_seqlen_cross: int | None = None,
) -> Tensor:
    """Run T5's decoder, teacher forcing, on packed token ids.

    Args:
        decoder: `model.decoder`, after `use_packed_attention(model)`.
        inputs: values int64 `[T]` decoder ids, already shifted right.
        source: the encoder's output states, values `[Ts, d_model]`.
        cu_seqlens_cross, max_seqlen_cross: offsets of the decoder tokens that read each source sequence, where several
            decoder sequences share one (the beams of a search). None: one decoder sequence for each source sequence.

    Returns:
        `[T, d_model]` states, before the language-model head and its scaling.

    Raises:
        ValueError: the stack has another attention function, or the values are no token ids.
    """
    _check_stack(decoder, inputs)
    packing = _Packing(
        inputs,
        source=source,
        cu_seqlens_cross=inputs.cu_seqlens if cu_seqlens_cross is None else cu_seqlens_cross,
        max_seqlen_cross=inputs.max_seqlen if max_seqlen_cross is None else max_seqlen_cross,
    )
    bias_table = _bias_table(decoder)
    no_bias = bias_table.new_zeros(())  # None would make the host allocate [1, heads, T, T]
    hidden = _embed(decoder, inputs)[None]
    for block in decoder.block:
        hidden = block(hidden, None, bias_table, source.values[None], None, no_bias, packing=packing)[0]
    return decoder.dropout(decoder.final_layer_norm(hidden))[0]


def head_inputs(model: T5ForConditionalGeneration, states: Tensor) -> Tensor:
    """Decoder states as the language-model head takes them: T5 scales them where its embeddings are tied."""
    return states * model.model_dim**-0.5 if model.config.scale_decoder_outputs else states


def next_token_loss(model: T5ForConditionalGeneration, states: Tensor, labels: Tensor) -> Tensor:
    """The host's cross-entropy (mean over labels other than -100) without its logits.

    Args:
        states: `[T, d_model]`, what `decode_packed` returned.
        labels: int64 `[T]`; -100 on tail rows, as on whatever else is not to be learned.
    """
    return multi_token_cross_entropy(head_inputs(model, states), model.lm_head.weight, labels[:, None])
