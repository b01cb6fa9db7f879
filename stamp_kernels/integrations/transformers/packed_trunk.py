"""T5's stacks on packed sequences: the attention and the loop over the blocks, in place of the host's.

The classes here are put on modules that the host has made (`module.__class__ = ...`), so parameters, submodules and
hooks stay the host's. Blocks run on hidden states `[1, T, d_model]` and are called like any module, so that what hangs
on them (hooks, gradient checkpointing, FSDP2, LoRA) works; the packing reaches their attention as a keyword argument.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Attention, T5Stack
from transformers.utils.generic import can_return_tuple

from stamp_kernels.common.rows import sequence_of_row
from stamp_kernels.integrations.transformers.configuration import PruningConfig
from stamp_kernels.modules.pruning import SemanticAdaptivePruning
from stamp_kernels.ops.attention.packed_attention import packed_attention
from stamp_kernels.ops.pruning.gather import gather_tokens
from stamp_kernels.ops.pruning.selection import TokenSelection
from stamp_kernels.packed import PackedBatch
from stamp_kernels.relative_position import RelativePositionBias

INTERMEDIATE_OUTPUTS = ("output_attentions", "output_hidden_states")  # options of the host


@dataclass
class EncoderOutput(BaseModelOutput):
    """The encoder's states, packed where its inputs came packed, and padded otherwise.

    Attributes:
        last_hidden_state: `[B, S', d_model]`; 0 on padding. Without pruning S' and the tokens' places are those of the
            inputs. With it the kept tokens stand on the left, and S' is the most that a history may keep. None for
            packed inputs.
        attention_mask: bool `[B, S']`, where last_hidden_state has a token. `generate` repeats it for the beams along
            with the states.
        positions: int32 `[B, S']`, each state's index in its history before pruning (holes of the mask counted), or
            among the kept tokens for positions="compact"; 0 on padding.
        packed: the states as a PackedBatch, for packed inputs.
    """

    attention_mask: Tensor | None = None
    positions: Tensor | None = None
    packed: PackedBatch | None = None

    def padded(self) -> "EncoderOutput":
        """The same states padded on the right, as `generate(encoder_outputs=...)` wants them."""
        if self.packed is None:
            return self
        # At least one column, of padding if need be: the host's decoder cannot read states without any.
        length = max(self.packed.max_seqlen, 1)
        states = self.packed.to_padded(length)
        lengths = self.packed.cu_seqlens.diff()
        return EncoderOutput(
            last_hidden_state=states,
            attention_mask=torch.arange(length, device=states.device) < lengths[:, None],
            positions=replace(self.packed, values=self.packed.materialized_positions()).to_padded(length),
        )


class Packing:
    """What the attention of a block needs to know of the batch.

    No dataclass: FSDP2 rebuilds dataclasses among a block's arguments, and the answer would be written to the copy.

    Attributes:
        queries: the sequences that the block runs on (their values are not read).
        source: for cross attention, the encoded sequences, and
        cu_seqlens_cross, max_seqlen_cross: the offsets of the queries per encoded sequence.
        want_centrality: ask the self-attention for the centrality of its keys.
        centrality: the answer, `[T]`.
    """

    def __init__(
        self,
        queries: PackedBatch,
        *,
        source: PackedBatch | None = None,
        cu_seqlens_cross: Tensor | None = None,
        max_seqlen_cross: int | None = None,
        want_centrality: bool = False,
    ) -> None:
        self.queries = queries
        self.source = source
        self.cu_seqlens_cross = cu_seqlens_cross
        self.max_seqlen_cross = max_seqlen_cross
        self.want_centrality = want_centrality
        self.centrality: Tensor | None = None


class PackedT5Attention(T5Attention):
    """The host's attention, on packed sequences where there is a `packing`.

    The `position_bias` that blocks hand on from the first one is then its bias table `[num_buckets, heads]`.
    """

    def forward(
        self,
        hidden_states: Tensor,  # [1, T, d_model]
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,  # [1, Ts, d_model]
        position_bias: Tensor | None = None,
        *args: object,
        packing: Packing | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if packing is None:
            return super().forward(hidden_states, mask, key_value_states, position_bias, *args, **kwargs)
        heads = (-1, self.n_heads, self.key_value_proj_dim)
        source_states = hidden_states if key_value_states is None else key_value_states
        q = self.q(hidden_states).view(heads)
        k, v = (projection(source_states).view(heads) for projection in (self.k, self.v))
        options = dict(scale=self.scaling, dropout_p=self.dropout if self.training else 0.0)
        queries, source = packing.queries, packing.source
        if key_value_states is not None:
            offsets = (packing.cu_seqlens_cross, source.cu_seqlens, packing.max_seqlen_cross, source.max_seqlen)
            return self.o(packed_attention(q, k, v, *offsets, **options).view(1, -1, self.inner_dim)), None, None
        if position_bias is None:
            # Only here is the table whole where the first block is sharded: later blocks get this copy of it.
            buckets = torch.arange(self.relative_attention_num_buckets, device=hidden_states.device)
            position_bias = self.relative_attention_bias(buckets)
        result = packed_attention(
            q,
            k,
            v,
            queries.cu_seqlens,
            max_seqlen_q=queries.max_seqlen,
            causal=self.is_causal,
            relative_bias=RelativePositionBias(
                position_bias, bidirectional=not self.is_decoder, max_distance=self.relative_attention_max_distance
            ),
            positions_q=queries.positions,
            return_centrality=packing.want_centrality,
            **options,
        )
        if packing.want_centrality:
            packing.centrality = result.centrality
            result = result.out
        return self.o(result.view(1, -1, self.inner_dim)), position_bias, None


class PackedT5Stack(T5Stack):
    """What both stacks share on packed sequences."""

    def embed_packed(self, inputs: PackedBatch) -> PackedBatch:
        """Token ids `[T]` embedded, or embeddings `[T, d_model]` as they are, with dropout."""
        values = inputs.values
        if values.is_floating_point():
            if values.dim() != 2 or values.shape[1] != self.config.d_model:
                raise ValueError(
                    f"packed_inputs.values must be embeddings [T, {self.config.d_model}] or token ids [T], "
                    f"got {values.dtype} {list(values.shape)}"
                )
        else:
            if values.dim() != 1 or values.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    "packed_inputs.values must be int32 or int64 token ids [T], "
                    f"got {values.dtype} {list(values.shape)}"
                )
            # What stands on tail rows is not read as a token.
            rows = torch.arange(values.shape[0], device=values.device)
            values = self.embed_tokens(torch.where(rows < inputs.cu_seqlens[-1], values, 0))
        return replace(inputs, values=self.dropout(values))

    def finish_packed(self, packed: PackedBatch) -> PackedBatch:
        return replace(packed, values=self.dropout(self.final_layer_norm(packed.values)))


class PackedT5Encoder(PackedT5Stack):
    """The host's encoder on packed sequences, pruned on the way; see `set_pruning`."""

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B, S]
        attention_mask: Tensor | None = None,  # [B, S]
        inputs_embeds: Tensor | None = None,  # [B, S, d_model]
        packed_inputs: PackedBatch | None = None,
        **kwargs: object,
    ) -> EncoderOutput:
        """Encode histories, given in exactly one of three ways.

        Args:
            input_ids: int32 or int64 token ids, padded anywhere.
            attention_mask: nonzero on tokens. None: all are. For input_ids and inputs_embeds.
            inputs_embeds: embeddings in place of token ids.
            packed_inputs: either of them packed, values `[T]` or `[T, d_model]`.

        Raises:
            ValueError: an argument has a wrong shape or dtype, none or several are given, or attention maps or hidden
                states of all blocks are asked for.
        """
        refuse_intermediate_outputs(self.config, kwargs)
        check_one_given(input_ids=input_ids, inputs_embeds=inputs_embeds, packed_inputs=packed_inputs)
        if packed_inputs is not None:
            return EncoderOutput(packed=self.encode_packed(packed_inputs))
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        packed, layout = pack_padded(inputs, attention_mask)
        encoded = self.encode_packed(packed)
        return self.padded_output(encoded, layout)

    def set_pruning(self, config: PruningConfig | None) -> None:
        """Prune as the config says; None: not at all."""
        modules = {} if config is None else config.build_modules()
        # Modules without parameters: they follow train() and eval(), and add no key to the state dict.
        self.stamp_pruning = nn.ModuleDict({str(block_number): module for block_number, module in modules.items()})
        self.stamp_pruning.train(self.training)
        self.stamp_protected_ends = (0, 0) if config is None else (config.protect_first, config.protect_last)

    @property
    def is_pruned(self) -> bool:
        return any(module.is_active for module in self.stamp_pruning.values())

    def padded_output(self, encoded: PackedBatch, layout: "PaddedLayout | None") -> EncoderOutput:
        """States as `forward` gives them for a padded batch of this layout, or on the right where there was none."""
        if layout is None or self.is_pruned:
            return EncoderOutput(packed=encoded).padded()
        return EncoderOutput(
            last_hidden_state=layout.pad(encoded.values),
            attention_mask=layout.mask,
            positions=layout.pad(encoded.materialized_positions()),
        )

    def encode_packed(self, inputs: PackedBatch) -> PackedBatch:
        """The loop over the blocks: states `[T', d_model]` of the kept tokens."""
        packed = self.embed_packed(inputs)
        position_bias = None
        for block_number, block in enumerate(self.block, start=1):
            prunes = str(block_number) in self.stamp_pruning and self.is_pruned
            packing = Packing(packed, want_centrality=prunes)
            hidden, position_bias, _ = block(packed.values[None], None, position_bias, packing=packing)
            packed = replace(packed, values=hidden[0])
            if prunes:
                packed = self._prune(self.stamp_pruning[str(block_number)], packed, packing.centrality)
        return self.finish_packed(packed)

    def _prune(self, prune: SemanticAdaptivePruning, packed: PackedBatch, centrality: Tensor) -> PackedBatch:
        first, last = self.stamp_protected_ends
        if (first, last) == (0, 0):
            return prune(packed, centrality).packed
        # Protected tokens are never pruned, so they are at the ends of what is left after any pruning point.
        total, batch = packed.values.shape[0], len(packed.cu_seqlens) - 1
        row = torch.arange(total, device=packed.values.device)
        sequence = sequence_of_row(packed.cu_seqlens, total)  # batch on tail rows
        starts, ends = packed.cu_seqlens[sequence], packed.cu_seqlens[(sequence + 1).clamp(max=batch)]
        protect = ((row < starts + first) | (row >= ends - last)) & (sequence < batch)
        unit = prune.codes_per_item or 1
        if packed.lengths_cpu is None:
            num_protected = batch * ((first + last) // unit)  # at most
        else:
            num_protected = packed.lengths_cpu.clamp(max=first + last) // unit
        return prune(packed, centrality, protect=protect, num_protected=num_protected).packed


class PackedT5Decoder(PackedT5Stack):
    """The host's decoder: as it is, or on packed sequences where they are given."""

    @can_return_tuple
    def forward(
        self,
        *args: object,
        packed_inputs: PackedBatch | None = None,
        packed_source: PackedBatch | None = None,
        cu_seqlens_cross: Tensor | None = None,  # int32 [B + 1]
        max_seqlen_cross: int | None = None,
        **kwargs: object,
    ) -> BaseModelOutput | EncoderOutput:
        """Without packed_inputs the host's forward. With it, teacher forcing on packed sequences, without a cache.

        Args:
            packed_inputs: decoder token ids `[T]`, shifted right already, or their embeddings `[T, d_model]`.
            packed_source: the encoder's states, values `[Ts, d_model]`.
            cu_seqlens_cross, max_seqlen_cross: offsets of the decoder tokens that read each source sequence, where
                several decoder sequences share one (the beams of a search). None: one for each source sequence.

        Returns:
            EncoderOutput with packed alone: states `[T, d_model]` before the language-model head and its scaling.

        Raises:
            ValueError: packed_inputs have a wrong shape or dtype, or packed_source is missing.
        """
        refuse_intermediate_outputs(self.config, kwargs)
        if packed_inputs is None:
            return super().forward(*args, **kwargs)
        if packed_source is None:
            raise ValueError("packed_source must be given with packed_inputs, got None")
        packed = self.embed_packed(packed_inputs)
        packing = Packing(
            packed,
            source=packed_source,
            cu_seqlens_cross=packed.cu_seqlens if cu_seqlens_cross is None else cu_seqlens_cross,
            max_seqlen_cross=packed.max_seqlen if max_seqlen_cross is None else max_seqlen_cross,
        )
        hidden, position_bias = packed.values[None], None
        for block in self.block:
            hidden, position_bias, _ = block(hidden, None, position_bias, packed_source.values[None], packing=packing)
        return EncoderOutput(packed=self.finish_packed(replace(packed, values=hidden[0])))


@dataclass(frozen=True)
class PaddedLayout:
    """Where the packed tokens stand in a padded batch.

    Attributes:
        mask: bool `[B, S]`.
        selection: of the padded rows among the packed ones, for gather_tokens; None where there is no padding.
    """

    mask: Tensor
    selection: TokenSelection | None

    def pad(self, values: Tensor) -> Tensor:
        """`[T, ...]` to `[B, S, ...]`, 0 on padding."""
        rows = values if self.selection is None else gather_tokens(values, self.selection)
        return rows.unflatten(0, self.mask.shape)

    def pack(self, values: Tensor) -> Tensor:
        """`[B, S, ...]` to `[T, ...]`."""
        rows = values.flatten(0, 1)
        return rows if self.selection is None else rows.index_select(0, self.selection.inverse)


def pack_padded(inputs: Tensor, attention_mask: Tensor | None) -> tuple[PackedBatch, PaddedLayout]:
    """Drop the padding of `[B, S]` or `[B, S, d_model]`.

    Where a mask has holes the positions count them, as the host's do.

    Raises:
        ValueError: inputs or mask have another shape.
    """
    if inputs.dim() not in (2, 3):
        raise ValueError(f"inputs must be token ids [B, S] or embeddings [B, S, d_model], got {list(inputs.shape)}")
    batch, length = inputs.shape[:2]
    if attention_mask is not None:
        if attention_mask.shape != (batch, length):
            raise ValueError(f"attention_mask must have shape {[batch, length]}, got {list(attention_mask.shape)}")
        return _pack_by_mask(inputs, attention_mask.bool())
    # Without padding the host knows all sizes.
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=inputs.device) * length
    lengths_cpu = torch.full((batch,), length, dtype=torch.int64)
    mask = torch.ones(batch, length, dtype=torch.bool, device=inputs.device)
    return PackedBatch(inputs.flatten(0, 1), cu_seqlens, length, lengths_cpu=lengths_cpu), PaddedLayout(mask, None)


@torch.compiler.disable(reason="the number of tokens in a mask is a size that the host has to read")
def _pack_by_mask(inputs: Tensor, mask: Tensor) -> tuple[PackedBatch, PaddedLayout]:
    packed = PackedBatch.from_padded(inputs, mask)
    total, length = packed.values.shape[0], mask.shape[1]
    valid = mask.flatten()
    valid_up_to = valid.cumsum(0)
    packed_row = torch.where(valid, valid_up_to - 1, -1)
    # Packed row j is the padded row at which the count of valid ones reaches j + 1.
    padded_row = torch.searchsorted(valid_up_to, torch.arange(1, total + 1, device=mask.device)).to(torch.int32)
    num_runs = mask[:, :1].sum(1) + (mask[:, 1:] & ~mask[:, :-1]).sum(1)
    if (num_runs > 1).any():  # holes
        sequence, column = padded_row // length, padded_row % length
        packed = replace(packed, positions=column - column[packed.cu_seqlens[sequence]])
    selection = TokenSelection(packed_row, packed.cu_seqlens, packed.max_seqlen, padded_row, total)
    return packed, PaddedLayout(mask, selection)


def check_one_given(**arguments: object) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(arguments)} must be given, got {', '.join(given) or 'none'}")


def refuse_intermediate_outputs(config: object, kwargs: dict[str, object]) -> None:
    """The host's options that have no meaning here: maps are never built, and tokens differ from block to block."""
    for name in INTERMEDIATE_OUTPUTS:
        asked = kwargs.get(name)
        if asked or (asked is None and getattr(config, name, False)):
            raise ValueError(f"{name}=True: packed stacks do not keep them; use forward hooks, or remove_stamp(model)")
