"""What stamped models return: the outputs of their base models, and what pruning and prediction add."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from stamp_kernels.packed import PackedBatch

__all__ = ["EncoderOutput", "Seq2SeqOutput"]


@dataclass
class EncoderOutput(BaseModelOutput):
    """The states of a trunk: packed if its inputs were packed, padded otherwise.

    Attributes:
        last_hidden_state: `[B, S', d_model]`, 0 on padding. Without pruning every token keeps its place, and S' is the
            length of the inputs. With pruning the kept tokens are moved to the left, and S' is the largest number of
            tokens that a history may keep. None for packed inputs.
        attention_mask: bool `[B, S']`, True where last_hidden_state has a token. `generate` repeats it for the beams
            together with the states.
        positions: int32 `[B, S']`, each state's index in its history before pruning (holes of the mask counted), or
            among the kept tokens for positions="compact"; 0 on padding.
        packed: the states as a PackedBatch, for packed inputs.
    """

    attention_mask: Tensor | None = None
    positions: Tensor | None = None
    packed: PackedBatch | None = None

    def padded(self) -> "EncoderOutput":
        """The same states padded on the right, as decoding with a cache needs them."""
        if self.packed is None:
            return self
        # At least one column, even if it is padding: the base model's decoder cannot read states without columns.
        length = max(self.packed.max_seqlen, 1)
        states = self.packed.to_padded(length)
        lengths = self.packed.cu_seqlens.diff()
        return EncoderOutput(
            last_hidden_state=states,
            attention_mask=torch.arange(length, device=states.device) < lengths[:, None],
            positions=replace(self.packed, values=self.packed.materialized_positions()).to_padded(length),
        )


@dataclass
class Seq2SeqOutput(Seq2SeqLMOutput):
    """The output of an encoder-decoder.

    Attributes:
        loss: the loss to minimise: next_token_loss, plus prediction_loss in training with a PredictionConfig.
        logits: `[B, N, vocab_size]`. None if they are skipped.
        encoder_last_hidden_state: `[B, S', d_model]`, states of the kept tokens, see EncoderOutput. None if logits are
            skipped.
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
