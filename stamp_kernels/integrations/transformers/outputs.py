"""What stamped models return: the outputs of their base models, and what pruning and prediction add."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPastAndCrossAttentions,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
)
from transformers.utils.generic import ModelOutput

from stamp_kernels.integrations.transformers.encoded import PackedStates, with_states_behind
from stamp_kernels.integrations.transformers.padded_layout import PaddedLayout, layout_on_the_left, version_of
from stamp_kernels.integrations.transformers.versions import given_cache
from stamp_kernels.packed import PackedBatch

__all__ = [
    "DecoderOutput",
    "EncoderOutput",
    "Seq2SeqOutput",
    "Seq2SeqStates",
    "as_requested",
    "check_layers",
    "has_cache",
    "returns_tuple",
    "selected_layers",
]


class _NamedFields(ModelOutput):
    """An output whose tuple has only the fields with the places of the base model's tuple. The others have names."""

    def num_places(self) -> int:
        """How many fields from the first on have the base model's places."""
        raise NotImplementedError

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str):
            return super().__getitem__(key)
        # Behind the last field a cache may be missing, so that [-1] and [1:] do not find it either.
        length = len(self) + getattr(self, "lacks_cache", False)
        try:
            chosen = range(length)[key]
        except IndexError:
            chosen = length
        if any(place >= self.num_places() for place in ([chosen] if isinstance(chosen, int) else chosen)):
            raise IndexError(
                f"{type(self).__name__}[{key}]: of {', '.join(self.keys())} only the first {self.num_places()} can be "
                "found by number: use their names, or ask for the base model's tuple with return_dict=False"
            )
        return self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields with the base model's places; all if there is none, which would lose packed states."""
        fields: tuple[Any, ...] = super().to_tuple()
        return fields[: self.num_places() or None]


@dataclass
class EncoderOutput(BaseModelOutput, _NamedFields):
    """The states of a trunk: packed if its inputs were packed, padded otherwise.

    Attributes:
        last_hidden_state: `[B, S', d_model]`, 0 on padding. Without pruning every token keeps its place, and S' is the
            length of the inputs. With pruning the kept tokens are moved to the left, and S' is the largest number of
            tokens that a history may keep; with `layout="original"` they keep their places too, and the states of
            dropped tokens are 0. None for packed inputs.
        hidden_states: if they are requested: the embeddings and the states of every block, without pruning. With
            pruning only last_hidden_state, because the blocks run on different tokens.
        attention_mask: bool `[B, S']`, True where last_hidden_state has a token. `generate` repeats it for the beams
            together with the states.
        positions: int32 `[B, S']`, each state's index in its history before pruning (holes of the mask counted), or
            among the kept tokens for positions="compact"; 0 on padding.
        packed: the states as a PackedBatch, for packed inputs.
    """

    attention_mask: Tensor | None = None
    positions: Tensor | None = None
    packed: PackedBatch | None = None

    def num_places(self) -> int:
        # A PackedBatch is never found by number. hidden_states follow the states as in the base model's output.
        return 0 if self.last_hidden_state is None else 1 + (self.hidden_states is not None)

    def padded(self) -> "EncoderOutput":
        """The same states padded on the right, as decoding with a cache needs them."""
        if self.packed is None:
            return self
        # At least one column, even if it is padding: the base model's decoder cannot read states without columns.
        return EncoderOutput.in_layout(self.packed, layout_on_the_left(self.packed, max(self.packed.max_seqlen, 1)))

    @classmethod
    def in_layout(
        cls, packed: PackedBatch, layout: PaddedLayout, inputs: PaddedLayout | None = None
    ) -> "EncoderOutput":
        """Packed states padded in a layout, which a decoder recognizes; `inputs` is the layout before pruning."""
        attention_mask = layout.mask.clone()  # the caller may change it
        if not torch.compiler.is_compiling():  # graphs do not know versions
            layout = replace(layout, given=(attention_mask, version_of(attention_mask)))
        behind = PackedStates(packed, layout, inputs)
        return cls(
            last_hidden_state=with_states_behind(layout.pad(packed.values), behind),
            attention_mask=attention_mask,
            positions=layout.pad(packed.materialized_positions()),
        )

    def mean_pooled(self) -> Tensor:
        """`[B, d_model]`: the mean state of each history's (kept) tokens, 0 for a history without tokens.

        In the place of `(states * mask).sum(1) / mask.sum(1)` with the mask of the inputs, which counts dropped tokens.
        """
        padded = self.padded()
        states, mask = padded.last_hidden_state, padded.attention_mask
        assert states is not None and mask is not None
        weights = mask.to(states.dtype)
        return (states * weights[..., None]).sum(1) / weights.sum(1).clamp(min=1)[:, None]


class _NoCache(_NamedFields):
    """Mixin for the states of a decoder that ran packed, where the base model's output has a cache by default.

    Attributes:
        lacks_cache: whether it would have one. Only the states can then be found by number.
    """

    lacks_cache: bool

    def num_places(self) -> int:
        return 1 if self.lacks_cache else len(self.keys())


@dataclass
class DecoderOutput(BaseModelOutputWithPastAndCrossAttentions, _NoCache):
    """The output of a decoder, `[B, N, d_model]`."""


@dataclass
class Seq2SeqStates(Seq2SeqModelOutput, _NoCache):
    """The output of an encoder-decoder without a language-model head."""


@dataclass
class Seq2SeqOutput(Seq2SeqLMOutput, _NamedFields):
    """The output of an encoder-decoder.

    If it lacks fields of the base model's output, such as the cache in training, only loss and logits can be found by
    number.

    Attributes:
        loss: the loss to minimise: next_token_loss, plus prediction_loss in training with a PredictionConfig.
        logits: `[B, N, vocab_size]`. None if they are skipped.
        encoder_last_hidden_state: `[B, S', d_model]`, states of the kept tokens, see EncoderOutput. None if logits are
            skipped.
        decoder_hidden_states, encoder_hidden_states: if they are requested: a tuple whose last entry is the last state.
        encoder_attention_mask, encoder_positions: `[B, S']`, which of these rows are tokens, and their positions, see
            EncoderOutput.
        encoder_packed: the same states packed, if logits are skipped.
        next_token_loss, prediction_loss: the two parts of the loss, detached.
    """

    encoder_attention_mask: Tensor | None = None
    encoder_positions: Tensor | None = None
    encoder_packed: PackedBatch | None = None
    next_token_loss: Tensor | None = None
    prediction_loss: Tensor | None = None

    def num_places(self) -> int:
        own = (self.loss is not None) + (self.logits is not None)
        return getattr(self, "places_of_base", own)

    @classmethod
    def of_base(cls, output: Seq2SeqLMOutput, *, lacks_cache: bool, **fields: Any) -> "Seq2SeqOutput":
        """The base model's output, with further fields as attributes: its keys, order and length do not change. Without
        the cache that the base model would have, places are right only in front of it.
        """
        extended = cls(**output)
        if not lacks_cache:
            object.__setattr__(extended, "places_of_base", len(output.keys()))
        for name, value in fields.items():
            object.__setattr__(extended, name, value)  # ModelOutput's own makes it a key in transformers 5
        return extended


def has_cache(output: ModelOutput) -> bool:
    return given_cache(dict(output)) is not None


def returns_tuple(return_dict: bool | None, config: Any) -> bool:
    """Whether the argument or the config asks for a tuple in the place of an output."""
    return not (getattr(config, "return_dict", True) if return_dict is None else return_dict)


def as_requested(output: ModelOutput, return_dict: bool | None, config: Any) -> Any:
    """The output, or the base model's tuple where the argument or the config asks for one."""
    return output.to_tuple() if returns_tuple(return_dict, config) else output


def selected_layers(hidden_states: tuple[Tensor, ...], wanted: Any) -> tuple[Tensor | None, ...]:
    """Hidden states as output_hidden_states asks for them: True, or the indices of layers, None in place of others."""
    if isinstance(wanted, bool):
        return hidden_states
    length = len(hidden_states)
    indices = [wanted] if isinstance(wanted, int) else wanted
    kept = {index % length for index in indices if -length <= index < length}
    return tuple(states if index in kept else None for index, states in enumerate(hidden_states))


def check_layers(wanted: Any) -> None:
    """Raises:
    ValueError: indices of layers, where only the last states exist.
    """
    if wanted and not isinstance(wanted, bool):
        raise ValueError(
            f"output_hidden_states={wanted}: with pruning or prediction only the last hidden states exist, "
            "which output_hidden_states=True returns"
        )
