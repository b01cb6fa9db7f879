"""Beams that share their history's keys and values, under Hugging Face's own `generate`.

`generate` repeats the encoded histories for every beam, and each beam then has keys and values of its own. Here the
beams of a history read one packed copy: its keys and values are computed once, are never reordered, and padding is not
attended to. Searches, logits processors, constraints and scores are Hugging Face's.
"""

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, StaticCache

from stamp_kernels.integrations.transformers.encoded import (
    PackedStates,
    SharedSource,
    states_behind,
    with_states_behind,
)
from stamp_kernels.integrations.transformers.outputs import EncoderOutput
from stamp_kernels.integrations.transformers.packed_trunk import check_one_given
from stamp_kernels.packed import PackedBatch

__all__ = ["PackedGeneration", "SharedEncoderOutput", "has_static_cache"]

if TYPE_CHECKING:
    _Base = GenerationMixin
else:
    _Base = object


class SharedEncoderOutput(EncoderOutput):
    """Encoded histories for R decoder rows, R / B for each history. The states are NaN: only `source` is read.

    Attributes:
        source: the packed histories.
        encoded: the output of the encoder, `[B, S', d_model]`.
    """

    source: SharedSource
    encoded: EncoderOutput

    @classmethod
    def of(cls, encoded: EncoderOutput, packed: PackedBatch, rows_per_history: int) -> "SharedEncoderOutput":
        states = cast(Tensor, encoded.last_hidden_state)
        rows = states.shape[0] * rows_per_history
        output = cls(
            last_hidden_state=states.new_full((1, 1, 1), torch.nan).expand(rows, *states.shape[1:]),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        output.source, output.encoded = SharedSource(packed), encoded
        return output

    def states(self, num_rows: int) -> Tensor:
        """What the decoder gets as encoder_hidden_states. Whoever reads its numbers fails: it has one row too many."""
        expected = cast(Tensor, self.last_hidden_state).shape[0]
        if num_rows != expected:
            raise ValueError(f"decoder_input_ids must have {expected} rows, as encoder_outputs have, got {num_rows}")
        states = self.source.packed.values
        return with_states_behind(states.new_zeros(num_rows + 1, 1, states.shape[-1]), self.source)

    def repeated(self) -> EncoderOutput:
        """The same histories with a copy for every row, for what beams cannot share."""
        copies = cast(Tensor, self.last_hidden_state).shape[0] // max(self.source.num_sequences, 1)
        states, mask = cast(Tensor, self.encoded.last_hidden_state), cast(Tensor, self.encoded.attention_mask)
        return EncoderOutput(
            last_hidden_state=states.repeat_interleave(copies, 0),
            hidden_states=self.hidden_states,
            attentions=self.attentions,
            attention_mask=mask.repeat_interleave(copies, 0),
        )


# Whether the call of `generate` that runs gives every beam its own copy of the history.
_OWN_HISTORIES: ContextVar[bool] = ContextVar("_OWN_HISTORIES", default=False)


def _needs_own_histories(default: Any, /, generation_config: Any = None, **kwargs: Any) -> bool:
    """Whether `generate` splits the beams (low_memory=True) or crops the cache, that of an assistant model.

    Old releases do, and they take the histories or the keys of cross attention apart, which shared ones do not have.
    """
    config = default if generation_config is None else generation_config
    low_memory = kwargs.get("low_memory", getattr(config, "low_memory", None))
    return bool(low_memory) or getattr(config, "is_assistant", False)


class PackedGeneration(_Base):
    """Mixin for encoder-decoders that `generate`."""

    encoder: nn.Module

    def shares_sources(self) -> bool:
        """Whether forward takes a SharedEncoderOutput."""
        raise NotImplementedError

    def generate(self, *args: Any, packed_inputs: PackedBatch | None = None, **kwargs: Any) -> Any:
        """The base model's generate, which also takes packed histories. Beams share their history's keys and values.

        Args:
            args, kwargs: of `transformers.GenerationMixin.generate`.
            packed_inputs: packed token ids `[T]` or embeddings `[T, d_model]`, in place of input_ids, attention_mask,
                inputs_embeds and encoder_outputs. They are encoded once. A row of the result is one sequence.

        Raises:
            ValueError: packed_inputs are given with other inputs.
        """
        if packed_inputs is not None:
            names = ("input_ids", "attention_mask", "inputs_embeds", "encoder_outputs")
            others = {name: kwargs.get(name) for name in names}
            check_one_given(packed_inputs=packed_inputs, inputs=args[0] if args else kwargs.get("inputs"), **others)
            with torch.no_grad():
                kwargs["encoder_outputs"] = self.encoder(packed_inputs=packed_inputs)
        encoder_outputs = kwargs.get("encoder_outputs")
        if isinstance(encoder_outputs, EncoderOutput):
            # A copy: generate writes into it.
            kwargs["encoder_outputs"] = EncoderOutput(**encoder_outputs.padded())
        elif encoder_outputs is not None and isinstance(behind := states_behind(encoder_outputs[0]), PackedStates):
            # The caller has put a stamped encoder's states into an output of the base model.
            mask = behind.mask_beside(kwargs.get("attention_mask"))
            if mask is behind.layout.mask:
                kwargs["encoder_outputs"] = EncoderOutput(last_hidden_state=encoder_outputs[0], attention_mask=mask)
            else:
                kwargs["attention_mask"] = mask.long()
        token = _OWN_HISTORIES.set(_needs_own_histories(self.generation_config, *args[1:2], **kwargs))
        try:
            return super().generate(*args, **kwargs)
        finally:
            _OWN_HISTORIES.reset(token)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Hugging Face repeats every tensor for the beams here. Packed histories are not repeated."""
        encoded = kwargs.get("encoder_outputs")
        states = encoded.last_hidden_state if isinstance(encoded, EncoderOutput) else None
        behind = states_behind(states)
        if isinstance(behind, PackedStates) and self.shares_sources() and not _OWN_HISTORIES.get():
            del kwargs["encoder_outputs"]
            input_ids, kwargs = cast(Any, super())._expand_inputs_for_generation(
                expand_size=expand_size, input_ids=input_ids, **kwargs
            )
            packed = behind.read(cast(Tensor, states))
            shared = SharedEncoderOutput.of(cast(EncoderOutput, encoded), packed, expand_size)
            return input_ids, kwargs | dict(encoder_outputs=shared)
        if isinstance(encoded, EncoderOutput) and encoded.attention_mask is not None:
            # A forward that a subclass has written reads this mask, and that of the caller is from before pruning.
            kwargs["attention_mask"] = encoded.attention_mask.long()
        expanded: tuple[Any, dict[str, Any]] = cast(Any, super())._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return expanded


def has_static_cache(cache: Any) -> bool:
    """Whether a cache keeps keys and values of cross attention in tensors of a fixed size."""
    return isinstance(getattr(cache, "cross_attention_cache", cache), StaticCache)
