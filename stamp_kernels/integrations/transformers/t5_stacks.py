"""T5's attention, encoder and decoder on packed sequences: the classes that take the place of Hugging Face's."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack
from transformers.utils.generic import can_return_tuple

from stamp_kernels.integrations.transformers.outputs import EncoderOutput
from stamp_kernels.integrations.transformers.packed_trunk import (
    INTERMEDIATE_OUTPUTS,
    CrossAttention,
    PackedTrunk,
    Packing,
    check_at_most_one_given,
    check_one_given,
    packed_embeddings,
    refuse_intermediate_outputs,
    with_empty_tail,
)
from stamp_kernels.modules._arguments import check_packed
from stamp_kernels.ops.attention.packed_attention import AttentionOutput, packed_attention
from stamp_kernels.packed import PackedBatch
from stamp_kernels.relative_position import RelativePositionBias

__all__ = ["PackedT5Attention", "PackedT5Decoder", "PackedT5Encoder"]


class PackedT5Attention(T5Attention):
    """T5's attention, on packed sequences if there is a `packing`.

    The `position_bias` that each block passes to the next is then the first block's bias table `[num_buckets, heads]`.
    """

    def forward(
        self,
        hidden_states: Tensor,  # [1, T, d_model]
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,  # [1, Ts, d_model]
        position_bias: Tensor | None = None,
        *args: Any,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if packing is None:
            output = super().forward(hidden_states, mask, key_value_states, position_bias, *args, **kwargs)
            return cast(tuple[Tensor, Tensor | None, Tensor | None], output)
        if key_value_states is not None and packing.cross is not None:
            position_bias = None
            attended = self._cross_attention(hidden_states, key_value_states, packing.cross)
        else:
            if position_bias is None:
                # Later blocks get this copy of the table: if the first block is sharded, the table is whole only here.
                buckets = torch.arange(self.relative_attention_num_buckets, device=hidden_states.device)
                position_bias = self.relative_attention_bias(buckets)
            attended = self._self_attention(hidden_states, position_bias, packing)
        return self.o(attended.view(1, -1, self.inner_dim)), position_bias, None

    def _cross_attention(self, hidden_states: Tensor, key_value_states: Tensor, cross: CrossAttention) -> Tensor:
        return packed_attention(
            *self._project(hidden_states, key_value_states),
            cross.cu_seqlens_q,
            cross.source.cu_seqlens,
            cross.max_seqlen_q,
            cross.source.max_seqlen,
            tiles_q=cross.tiles_q,
            tiles_k=cross.source.tiles,
            scale=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def _self_attention(self, hidden_states: Tensor, bias_table: Tensor, packing: Packing) -> Tensor:
        queries = packing.queries
        attended = packed_attention(
            *self._project(hidden_states, hidden_states),
            queries.cu_seqlens,
            max_seqlen_q=queries.max_seqlen,
            tiles_q=queries.tiles,
            causal=self.is_causal,
            scale=self.scaling,
            relative_bias=RelativePositionBias(
                bias_table, bidirectional=not self.is_decoder, max_distance=self.relative_attention_max_distance
            ),
            positions_q=queries.positions,
            dropout_p=self.dropout if self.training else 0.0,
            return_centrality=packing.wants_centrality,
        )
        if isinstance(attended, AttentionOutput):
            packing.centrality = attended.centrality
            attended = attended.out
        return attended

    def _project(self, hidden_states: Tensor, key_value_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[T, heads, d_kv]`, k and v `[Ts, heads, d_kv]`."""
        heads = (-1, self.n_heads, self.key_value_proj_dim)
        q, k, v = self.q(hidden_states), self.k(key_value_states), self.v(key_value_states)
        return q.view(heads), k.view(heads), v.view(heads)


class PackedT5Stack(T5Stack):
    """What both stacks share on packed sequences."""

    def embed_packed(self, inputs: PackedBatch) -> PackedBatch:
        """Token ids `[T]` embedded, or embeddings `[T, d_model]` unchanged, with dropout."""
        return replace(inputs, values=self.dropout(packed_embeddings(inputs, self.embed_tokens, self.config.d_model)))

    def finish_packed(self, packed: PackedBatch) -> PackedBatch:
        """The states after the last block, with the final norm and dropout; without the tile list, which is right only
        as long as nobody replaces the offsets.
        """
        return replace(packed, values=self.dropout(self.final_layer_norm(packed.values)), tiles=None)


class PackedT5Encoder(PackedTrunk, PackedT5Stack):
    """T5's encoder on packed sequences, pruned between blocks."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, S]
        attention_mask: Tensor | None = None,  # [B, S]
        inputs_embeds: Tensor | None = None,  # [B, S, d_model]
        packed_inputs: PackedBatch | None = None,
        **kwargs: Any,
    ) -> EncoderOutput:
        """Encode histories, given in exactly one of three ways.

        Args:
            input_ids: int32 or int64 token ids, padded anywhere.
            attention_mask: nonzero on tokens. None: all are. For input_ids and inputs_embeds.
            inputs_embeds: embeddings in place of token ids.
            packed_inputs: token ids `[T]` or embeddings `[T, d_model]` as a PackedBatch.

        Raises:
            ValueError: an argument has a wrong shape or dtype, none or several are given, or the attention maps or
                hidden states of all blocks are requested.
        """
        refuse_intermediate_outputs(self.config, kwargs)
        check_one_given(input_ids=input_ids, inputs_embeds=inputs_embeds, packed_inputs=packed_inputs)
        check_at_most_one_given(attention_mask=attention_mask, packed_inputs=packed_inputs)
        if packed_inputs is not None:
            return EncoderOutput(packed=self.encode_packed(packed_inputs))
        inputs = cast(Tensor, input_ids if inputs_embeds is None else inputs_embeds)
        packed, layout = self.pack_inputs(inputs, attention_mask)
        return self.padded_output(self.encode_packed(packed), layout)

    def encode_packed(self, inputs: PackedBatch) -> PackedBatch:
        """The loop over the blocks: states `[T', d_model]` of the kept tokens."""
        packed = self.embed_packed(inputs)
        position_bias = None
        for block_number, block in enumerate(self.block, start=1):
            packing = self.packing_for(block_number, packed)
            hidden, position_bias, _ = block(packed.values[None], None, position_bias, packing=packing)
            packed = self.after_block(block_number, hidden[0], packing)
        return self.finish_packed(packed)


class PackedT5Decoder(PackedT5Stack):
    """T5's decoder, on packed sequences if they are given."""

    @can_return_tuple
    def forward(
        self,
        *args: Any,
        packed_inputs: PackedBatch | None = None,
        packed_source: PackedBatch | None = None,
        cu_seqlens_cross: Tensor | None = None,  # int32 [B + 1]
        max_seqlen_cross: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | EncoderOutput:
        """Without packed_inputs T5's own forward. With them, teacher forcing on packed sequences, without a cache.

        Args:
            packed_inputs: decoder token ids `[T]`, already shifted right, or their embeddings `[T, d_model]`.
            packed_source: the encoder's states, values `[Ts, d_model]`.
            cu_seqlens_cross, max_seqlen_cross: offsets of the decoder tokens that read each source sequence, if several
                decoder sequences share one (the beams of a search). None: one decoder sequence for each.

        Returns:
            EncoderOutput with only packed: states `[T, d_model]` before the language-model head and its scaling.

        Raises:
            ValueError: packed_inputs have a wrong shape or dtype, packed_source is missing, only one of
                cu_seqlens_cross and max_seqlen_cross is given, or padded and packed inputs are given together.
        """
        refuse_intermediate_outputs(self.config, kwargs)
        if (packed_inputs is None) != (packed_source is None):
            missing = "packed_inputs" if packed_inputs is None else "packed_source"
            raise ValueError(f"packed_inputs and packed_source must be given together, got None for {missing}")
        if (cu_seqlens_cross is None) != (max_seqlen_cross is None):
            missing = "cu_seqlens_cross" if cu_seqlens_cross is None else "max_seqlen_cross"
            raise ValueError(f"cu_seqlens_cross and max_seqlen_cross must be given together, got None for {missing}")
        if packed_inputs is None or packed_source is None:
            return cast(BaseModelOutput, super().forward(*args, **kwargs))
        padded = ["positional arguments"] if args else []
        padded += [name for name, value in kwargs.items() if value is not None and name not in INTERMEDIATE_OUTPUTS]
        if padded:
            raise ValueError(f"forward takes no {', '.join(padded)} with packed_inputs")
        check_packed("packed_source", packed_source)
        packed = self.embed_packed(packed_inputs).with_tiles()
        packed_source = with_empty_tail(packed_source).with_tiles()
        packing = Packing(
            packed,
            cross=CrossAttention(
                packed_source,
                packed.cu_seqlens if cu_seqlens_cross is None else cu_seqlens_cross,
                packed.max_seqlen if max_seqlen_cross is None else max_seqlen_cross,
                packed.tiles if cu_seqlens_cross is None else None,
            ),
        )
        hidden, position_bias = packed.values[None], None
        for block in self.block:
            hidden, position_bias, _ = block(hidden, None, position_bias, packed_source.values[None], packing=packing)
        return EncoderOutput(packed=self.finish_packed(replace(packed, values=hidden[0])))
