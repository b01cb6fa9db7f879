"""T5's attention, encoder and decoder on packed sequences: the classes that take the place of Hugging Face's.

A stack is called as before, on padded inputs, and packs them itself; or on packed inputs. What a packed stack does not
have (attention maps, a cache, masks of more dimensions) is computed by Hugging Face's own forward on padded inputs.
"""

from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack
from transformers.utils import logging

from stamp_kernels.integrations.transformers.classes import StampedModule, own_class, packs
from stamp_kernels.integrations.transformers.encoded import (
    PackedStates,
    SharedSource,
    check_mask,
    source_behind,
    states_behind,
)
from stamp_kernels.integrations.transformers.outputs import (
    DecoderOutput,
    EncoderOutput,
    as_requested,
    check_layers,
    returns_tuple,
    selected_layers,
)
from stamp_kernels.integrations.transformers.packed_trunk import (
    CrossPacking,
    PackedTrunk,
    Packing,
    check_at_most_one_given,
    check_consumed,
    check_one_given,
    packed_embeddings,
    with_empty_tail,
)
from stamp_kernels.integrations.transformers.padded_layout import pack_padded
from stamp_kernels.integrations.transformers.padded_queries import PaddedQueries
from stamp_kernels.integrations.transformers.versions import (
    STACK_ARGUMENTS,
    attention_outputs,
    in_order_of,
    run_block,
)
from stamp_kernels.modules._arguments import check_packed
from stamp_kernels.ops.attention.packed_attention import AttentionOutput, packed_attention
from stamp_kernels.packed import PackedBatch
from stamp_kernels.relative_position import RelativePositionBias

__all__ = ["PackedT5Attention", "PackedT5Decoder", "PackedT5Encoder", "options_of_base"]

logger = logging.get_logger(__name__)

_NO_OPTIONS = ("return_dict", "num_items_in_batch", "output_hidden_states")  # packed stacks have these, or ignore them


@packs(T5Attention)
class PackedT5Attention(StampedModule, T5Attention):
    """T5's attention, on packed sequences if there is a packing in the place of the mask.

    The `position_bias` that each block passes to the next is then the first block's bias table `[num_buckets, heads]`.
    """

    def forward(
        self,
        hidden_states: Tensor,  # [1, T, d_model]
        mask: Tensor | Packing | CrossPacking | None = None,
        key_value_states: Tensor | None = None,  # [1, Ts, d_model]
        position_bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        if isinstance(mask, Packing):
            if position_bias is None:
                # Later blocks get this copy of the table: if the first block is sharded, the table is whole only here.
                position_bias = self._bias_table(hidden_states)
            attended = self._self_attention(hidden_states, position_bias, mask)
        elif isinstance(mask, CrossPacking):
            position_bias = None
            attended = self._cross_attention(hidden_states, cast(Tensor, key_value_states), mask)
        elif (source := source_behind(key_value_states)) is not None:
            position_bias = None
            attended = self._shared_cross_attention(hidden_states, source)
        elif position_bias is not None and position_bias.dim() == 2:
            raise RuntimeError(
                f"a {own_class(type(self)).__name__} of a packed stack got no packing as `mask`: its block and layer "
                "must hand on their attention_mask, or leave this model unstamped"
            )
        else:
            output = super().forward(hidden_states, mask, key_value_states, position_bias, *args, **kwargs)
            return cast(tuple[Any, ...], output)
        states = self.o(attended.reshape(*hidden_states.shape[:2], self.inner_dim))
        return attention_outputs(states, position_bias, kwargs)

    def _bias_table(self, hidden_states: Tensor) -> Tensor:
        num_buckets = self.relative_attention_num_buckets
        if not self.has_relative_attention_bias:
            return hidden_states.new_zeros(num_buckets, self.n_heads)
        return cast(Tensor, self.relative_attention_bias(torch.arange(num_buckets, device=hidden_states.device)))

    def _self_attention(self, hidden_states: Tensor, bias_table: Tensor, packing: Packing) -> Tensor:
        queries = packing.queries
        states_of_keys = hidden_states
        key_arguments: dict[str, Any] = {}
        if isinstance(queries, PaddedQueries):
            states_of_keys, key_arguments = queries.take_tokens(hidden_states[0])[None], queries.key_arguments()
        bias = RelativePositionBias(
            bias_table, bidirectional=not self.is_decoder, max_distance=self.relative_attention_max_distance
        )
        attended = packed_attention(
            self._heads(self.q(hidden_states)),
            self._heads(self.k(states_of_keys)),
            self._heads(self.v(states_of_keys)),
            queries.cu_seqlens,
            max_seqlen_q=queries.max_seqlen,
            tiles_q=queries.tiles,
            causal=self.is_decoder,
            scale=self._scale(),
            relative_bias=bias if packing.has_bias else None,
            positions_q=queries.positions,
            dropout_p=self.dropout if self.training else 0.0,
            return_centrality=packing.wants_centrality,
            **key_arguments,
        )
        if isinstance(attended, AttentionOutput):
            packing.centrality = attended.centrality
            attended = attended.out
        _consume(packing)
        return attended

    def _cross_attention(self, hidden_states: Tensor, key_value_states: Tensor, packing: CrossPacking) -> Tensor:
        attended = packed_attention(
            self._heads(self.q(hidden_states)),
            self._heads(self.k(key_value_states)),
            self._heads(self.v(key_value_states)),
            packing.cu_seqlens_q,
            packing.source.cu_seqlens,
            packing.max_seqlen_q,
            packing.source.max_seqlen,
            tiles_q=packing.tiles_q,
            tiles_k=packing.source.tiles,
            scale=self._scale(),
            dropout_p=self.dropout if self.training else 0.0,
        )
        _consume(packing)
        return attended

    def _shared_cross_attention(self, hidden_states: Tensor, source: SharedSource) -> Tensor:
        """The beams of each history `[R, N, d_model]` attend to its keys and values, which are computed once."""
        if id(self) not in source.keys_and_values:
            states = source.packed.values
            source.keys_and_values[id(self)] = self._heads(self.k(states)), self._heads(self.v(states))
        rows = hidden_states.shape[0] * hidden_states.shape[1]
        return packed_attention(
            self._heads(self.q(hidden_states)),
            *source.keys_and_values[id(self)],
            source.offsets(rows),
            source.packed.cu_seqlens,
            rows // max(source.num_sequences, 1),
            source.packed.max_seqlen,
            tiles_k=source.packed.tiles,
            scale=self._scale(),
            dropout_p=self.dropout if self.training else 0.0,
        )

    def _scale(self) -> float:
        return getattr(self, "scaling", 1.0)  # older releases have no attribute

    def _heads(self, states: Tensor) -> Tensor:
        """`[..., heads * d_kv]` to `[T, heads, d_kv]`."""
        return states.view(-1, self.n_heads, self.key_value_proj_dim)


def _consume(packing: Packing | CrossPacking) -> None:
    if packing.is_watched:
        packing.is_consumed = True


class _Source(NamedTuple):
    """What the decoder's cross attentions read, and the decoder rows of each encoded sequence (None: one)."""

    packed: PackedBatch
    cu_seqlens_q: Tensor | None = None
    max_seqlen_q: int | None = None


class PackedT5Stack(StampedModule, T5Stack):
    """What both stacks share on packed sequences."""

    def embeds_by_token(self) -> bool:
        """Whether embed_tokens looks tokens up one by one, so that it may be given packed ones."""
        embed_tokens = getattr(self, "embed_tokens", None)  # some models delete it
        # Hooks may need ids [B, S] too.
        is_changed = embed_tokens is None or "forward" in vars(embed_tokens) or any(_hooks(embed_tokens))
        return _is_plain_embedding(embed_tokens) and not is_changed

    def padded_inputs(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Token ids `[B, S]` or embeddings `[B, S, d_model]`, whichever can be packed."""
        if inputs_embeds is not None:
            return inputs_embeds
        ids = cast(Tensor, input_ids)
        return ids if self.embeds_by_token() else cast(Tensor, self.embed_tokens(ids))

    def embed_packed(self, inputs: PackedBatch) -> PackedBatch:
        """Token ids `[T]` embedded, or embeddings `[T, d_model]` unchanged, with dropout."""
        embed_tokens = getattr(self, "embed_tokens", None)
        check_packed("packed_inputs", inputs)
        holds_ids = not inputs.values.is_floating_point()
        if holds_ids and embed_tokens is not None and not _is_plain_embedding(_adapted(embed_tokens)):
            raise ValueError(
                f"packed_inputs.values must be embeddings [T, {self.config.d_model}] for a stack whose embed_tokens is "
                f"a {type(embed_tokens).__name__}, which may need ids [B, S]"
            )
        return replace(inputs, values=self.dropout(packed_embeddings(inputs, embed_tokens, self.config.d_model)))

    def finish_packed(self, packed: PackedBatch) -> PackedBatch:
        """The states after the last block, with the final norm and dropout; without the tile list, which is right only
        as long as nobody replaces the offsets.
        """
        return replace(packed, values=self.dropout(self.final_layer_norm(packed.values)), tiles=None)

    def watches_blocks(self) -> bool:
        """Whether attentions note that they have read their packing. A graph may not write in a checkpointed block."""
        is_checkpointed = getattr(self, "gradient_checkpointing", False) and self.training
        return not (torch.compiler.is_compiling() and is_checkpointed)

    def wants_hidden_states(self, kwargs: dict[str, Any]) -> Any:
        """False, True, or the indices of the layers."""
        requested = kwargs.get("output_hidden_states")
        return getattr(self.config, "output_hidden_states", False) if requested is None else requested


def _is_plain_embedding(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_pre_hooks, module._forward_hooks


def _adapted(module: nn.Module) -> nn.Module:
    """What an adapter of PEFT is for. Those of embeddings look tokens up one by one too."""
    while type(module).__module__.startswith("peft."):
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if inner is None:
            break
        module = inner
    return module


@packs(T5Stack)
class PackedT5Encoder(PackedTrunk, PackedT5Stack):
    """T5's encoder on packed sequences, pruned between blocks."""

    @in_order_of(T5Stack.forward)
    def forward(
        self,
        *,
        input_ids: Tensor | None = None,  # [B, S]
        attention_mask: Tensor | None = None,  # [B, S]
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        inputs_embeds: Tensor | None = None,  # [B, S, d_model]
        packed_inputs: PackedBatch | None = None,
        **kwargs: Any,
    ) -> Any:
        """Encode histories, given in exactly one of three ways.

        Args:
            input_ids: int32 or int64 token ids, padded anywhere.
            attention_mask: nonzero on tokens. None: all are. For input_ids and inputs_embeds.
            encoder_hidden_states, encoder_attention_mask: not for an encoder.
            inputs_embeds: embeddings in place of token ids.
            packed_inputs: token ids `[T]` or embeddings `[T, d_model]` as a PackedBatch.
            kwargs: of T5Stack.forward. Options that a packed stack does not have run Hugging Face's own forward,
                on padded inputs, if nothing is pruned.

        Returns:
            EncoderOutput, or a tuple with return_dict=False.

        Raises:
            ValueError: an argument has a wrong shape or dtype, none or several are given, or a pruned stack or packed
                inputs are given options that only padded stacks have.
        """
        check_one_given(input_ids=input_ids, inputs_embeds=inputs_embeds, packed_inputs=packed_inputs)
        check_at_most_one_given(attention_mask=attention_mask, packed_inputs=packed_inputs)
        padded = dict(encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask)
        options = options_of_base(self.config, attention_mask=attention_mask, **padded, **_known(kwargs))
        if options:
            self._check_base_can_run(options, packed_inputs)
            return super().forward(input_ids, attention_mask, **padded, inputs_embeds=inputs_embeds, **kwargs)
        collected: list[PackedBatch] | None = [] if self.wants_hidden_states(kwargs) and not self.is_pruned else None
        if packed_inputs is not None:
            if kwargs.get("output_hidden_states"):
                raise ValueError("output_hidden_states needs padded inputs, got packed_inputs")
            output = EncoderOutput(packed=self.encode_packed(packed_inputs))
        else:
            packed, layout = self.pack_inputs(self.padded_inputs(input_ids, inputs_embeds), attention_mask)
            output = self.padded_output(self.encode_packed(packed, collected), layout)
            if self.wants_hidden_states(kwargs):
                if self.is_pruned:
                    check_layers(self.wants_hidden_states(kwargs))
                last = cast(Tensor, output.last_hidden_state)
                hidden_states = (*[layout.pad(each.values) for each in collected or ()], last)
                selected = selected_layers(hidden_states, self.wants_hidden_states(kwargs))
                output = EncoderOutput(**{**output, "hidden_states": selected})
        return as_requested(output, kwargs.get("return_dict"), self.config)

    @property
    def takes_packed(self) -> bool:
        """Whether forward takes packed_inputs, which a subclass's own forward may not know."""
        return type(self).forward is PackedT5Encoder.forward

    def encode_packed(self, inputs: PackedBatch, collected: list[PackedBatch] | None = None) -> PackedBatch:
        """The loop over the blocks: states `[T', d_model]` of the kept tokens. What each block reads is collected."""
        packed = self.embed_packed(inputs)
        position_bias = None
        for block_number, block in enumerate(self.block, start=1):
            if collected is not None:
                collected.append(packed)
            packing = self.packing_for(block_number, packed)
            packing.is_watched = self.watches_blocks()
            hidden, position_bias = run_block(self, block, packed.values[None], packing, position_bias)
            check_consumed(block, block_number, packing)
            packed = self.after_block(block_number, hidden[0], packing)
        return self.finish_packed(packed)

    def _check_base_can_run(self, options: list[str], packed_inputs: PackedBatch | None) -> None:
        if self.is_pruned or packed_inputs is not None:
            why = "is pruned" if packed_inputs is None else "has packed_inputs"
            raise ValueError(
                f"{', '.join(options)}: packed stacks do not have this, and Hugging Face's own forward cannot run "
                f"because the encoder {why}"
            )
        _warn_of_base(options)


@packs(T5Stack)
class PackedT5Decoder(PackedT5Stack):
    """T5's decoder, on packed sequences where no cache is needed.

    Attributes:
        stamp_skips_zeros: whether its encoder leaves states of 0 in the columns of dropped tokens.
    """

    stamp_skips_zeros: bool

    @in_order_of(T5Stack.forward)
    def forward(
        self,
        *,
        input_ids: Tensor | None = None,  # [B, N]
        attention_mask: Tensor | None = None,  # [B, N]
        encoder_hidden_states: Tensor | None = None,  # [B, S, d_model]
        encoder_attention_mask: Tensor | None = None,  # [B, S]
        inputs_embeds: Tensor | None = None,  # [B, N, d_model]
        packed_inputs: PackedBatch | None = None,
        packed_source: PackedBatch | None = None,
        cu_seqlens_cross: Tensor | None = None,  # int32 [B + 1]
        max_seqlen_cross: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """T5's forward. It runs packed in training or with use_cache=False, if no cache is given, and on packed inputs.
        A tuple (return_dict=False) has T5's cache unless use_cache=False.

        Args:
            input_ids, attention_mask, inputs_embeds: as for T5, padded anywhere.
            encoder_hidden_states, encoder_attention_mask: the encoder's states and their mask. If the states are the
                tensor that a stamped encoder returned, unchanged, the kept tokens are known: the mask may be that of
                the histories before pruning, or hide more of the states.
            packed_inputs: decoder token ids `[T]`, already shifted right, or their embeddings `[T, d_model]`.
            packed_source: the encoder's states, values `[Ts, d_model]`.
            cu_seqlens_cross, max_seqlen_cross: offsets of the decoder tokens that read each source sequence, if several
                decoder sequences share one (the beams of a search). None: one decoder sequence for each.
            kwargs: of T5Stack.forward.

        Returns:
            T5Stack's output. For packed_inputs, which are teacher forcing without a cache, EncoderOutput with only
            packed: states `[T, d_model]` before the language-model head and its scaling.

        Raises:
            ValueError: packed_inputs have a wrong shape or dtype, packed_source is missing, only one of
                cu_seqlens_cross and max_seqlen_cross is given, padded and packed inputs are given together, or a mask
                does not fit its states.
        """
        if (packed_inputs is None) != (packed_source is None):
            missing = "packed_inputs" if packed_inputs is None else "packed_source"
            raise ValueError(f"packed_inputs and packed_source must be given together, got None for {missing}")
        if (cu_seqlens_cross is None) != (max_seqlen_cross is None):
            missing = "cu_seqlens_cross" if cu_seqlens_cross is None else "max_seqlen_cross"
            raise ValueError(f"cu_seqlens_cross and max_seqlen_cross must be given together, got None for {missing}")
        padded = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            inputs_embeds=inputs_embeds,
        )
        masks = dict(attention_mask=attention_mask, encoder_attention_mask=encoder_attention_mask)
        options = options_of_base(self.config, **masks, **_known(kwargs))
        if packed_inputs is not None:
            check_packed("packed_source", packed_source)
            given = [name for name, value in padded.items() if value is not None] + options
            if given:
                raise ValueError(f"forward takes no {', '.join(given)} with packed_inputs")
            given_source = _Source(cast(PackedBatch, packed_source), cu_seqlens_cross, max_seqlen_cross)
            return EncoderOutput(packed=self.decode_packed(packed_inputs, given_source))

        behind = states_behind(encoder_hidden_states)
        if isinstance(behind, PackedStates) and (encoder_attention_mask is None or encoder_attention_mask.dim() == 2):
            known = behind.mask_beside(encoder_attention_mask)
            behind = behind if known is behind.layout.mask else None
            padded["encoder_attention_mask"] = encoder_attention_mask = known
        elif encoder_hidden_states is not None and not isinstance(behind, SharedSource):
            _check_mask(encoder_hidden_states, encoder_attention_mask)
            if self.stamp_skips_zeros and (encoder_attention_mask is None or encoder_attention_mask.dim() == 2):
                # States that are not recognized, beside a mask that may be from before pruning.
                is_state = (encoder_hidden_states != 0).any(-1)
                given_mask = True if encoder_attention_mask is None else encoder_attention_mask.bool()
                padded["encoder_attention_mask"] = encoder_attention_mask = is_state & given_mask
        lacks_cache = kwargs.get("use_cache") is None and getattr(self.config, "use_cache", True)
        wants_tuple = returns_tuple(kwargs.get("return_dict"), self.config)
        if options or (kwargs.get("use_cache") is None and not self.training) or (lacks_cache and wants_tuple):
            return super().forward(**padded, **kwargs)
        check_one_given(input_ids=input_ids, inputs_embeds=inputs_embeds)
        inputs, layout = pack_padded(self.padded_inputs(input_ids, inputs_embeds), attention_mask)
        source: _Source | None = None
        if isinstance(behind, SharedSource):
            rows = layout.mask.shape[0] * layout.mask.shape[1]
            source = _Source(behind.packed, behind.offsets(rows), rows // max(behind.num_sequences, 1))
        elif behind is not None:
            source = _Source(behind.read(cast(Tensor, encoder_hidden_states)))
        elif encoder_hidden_states is not None:
            source = _Source(pack_padded(encoder_hidden_states, encoder_attention_mask)[0])
        collected: list[PackedBatch] | None = [] if self.wants_hidden_states(kwargs) else None
        decoded = self.decode_packed(inputs, source, collected)
        last = layout.pad(decoded.values)
        hidden_states: Any = None
        if collected is not None:
            every_layer = (*[layout.pad(each.values) for each in collected], last)
            hidden_states = selected_layers(every_layer, self.wants_hidden_states(kwargs))
        output = DecoderOutput(last_hidden_state=last, hidden_states=hidden_states)
        output.lacks_cache = lacks_cache
        return as_requested(output, kwargs.get("return_dict"), self.config)

    @property
    def takes_packed(self) -> bool:
        """Whether forward takes packed_inputs, which a subclass's own forward may not know."""
        return type(self).forward is PackedT5Decoder.forward

    def decode_packed(
        self, inputs: PackedBatch, source: _Source | None, collected: list[PackedBatch] | None = None
    ) -> PackedBatch:
        """The loop over the blocks, see `PackedT5Encoder.encode_packed`. No source: no cross attention."""
        packed = self.embed_packed(inputs).with_tiles()
        encoded = None if source is None else with_empty_tail(source.packed).with_tiles()
        position_bias = None
        for block_number, block in enumerate(self.block, start=1):
            if collected is not None:
                collected.append(packed)
            packing, cross = Packing(packed, is_watched=self.watches_blocks()), None
            if source is not None and encoded is not None:
                shared = source.cu_seqlens_q is not None
                cross = CrossPacking(
                    encoded,
                    cast(Tensor, source.cu_seqlens_q) if shared else packed.cu_seqlens,
                    cast(int, source.max_seqlen_q) if shared else packed.max_seqlen,
                    None if shared else packed.tiles,
                    is_watched=packing.is_watched,
                )
            states = None if encoded is None else encoded.values[None]
            hidden, position_bias = run_block(self, block, packed.values[None], packing, position_bias, states, cross)
            check_consumed(block, block_number, packing, cross)
            packed = replace(packed, values=hidden[0])
        return self.finish_packed(packed)


def options_of_base(config: Any, **arguments: Any) -> list[str]:
    """The names of the arguments that ask for what packed stacks do not have."""
    options = [
        name
        for name, value in arguments.items()
        if name not in _NO_OPTIONS and not name.endswith("attention_mask") and value is not None and value is not False
    ]
    options += [f"{name} of {mask.dim()} dimensions" for name, mask in _masks(arguments) if mask.dim() != 2]
    if arguments.get("output_attentions") is None and getattr(config, "output_attentions", False):
        options.append("output_attentions")
    return options


def _known(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without those that T5Stack ignores, such as the labels that `generate` hands to an encoder."""
    return {name: value for name, value in kwargs.items() if name in STACK_ARGUMENTS}


def _masks(arguments: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, x) for name, x in arguments.items() if name.endswith("attention_mask") and isinstance(x, Tensor)]


def _check_mask(states: Tensor, mask: Tensor | None) -> None:
    """Raises:
    ValueError: the mask is for another number of columns, for example for histories before pruning.
    """
    if mask is not None and mask.dim() == 4 and mask.shape[-1] != states.shape[1]:
        raise ValueError(
            f"encoder_attention_mask must have shape [..., {states.shape[1]}], one column for each state, "
            f"got {list(mask.shape)}"
        )
    if mask is not None and mask.dim() == 2:
        check_mask(states.shape, mask)


def _warn_of_base(options: list[str]) -> None:
    logger.warning_once(
        f"{', '.join(options)}: packed stacks do not have this, so Hugging Face's padded forward runs, which is slower"
    )
