"""LETTER's pattern: a subclass of T5ForConditionalGeneration that rewrites forward, with a temperature in its loss.

apply_stamp takes the subclass. Its forward keeps its loss, which needs logits, and the stacks that it calls run packed.
Where tokens are pruned the encoder's states are shorter than the mask of the inputs: from then on the mask is that of
the encoder's output.

    pip install "stamp_kernels[profile]" && pip install --no-deps recbole  # recbole contains MovieLens-100K
    python examples/t5_own_loss.py --keep-ratio 0.33
"""

from collections.abc import Sequence
from typing import Any

import torch
from histories import Batch, Histories, compare
from t5_tiger import EOS, PAD, Vocabulary
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import Seq2SeqLMOutput

from stamp_kernels.integrations.transformers import PruningConfig, apply_stamp, stamp_status


class T5WithTemperature(T5ForConditionalGeneration):
    """The forward does not call super().forward: it is T5's, written again, with logits divided by a temperature."""

    temperature = 0.8

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        if labels is not None and decoder_input_ids is None:
            decoder_input_ids = self._shift_right(labels)
        # The mask of the states: that of the inputs, unless a stamped encoder has pruned.
        kept_mask = getattr(encoder_outputs, "attention_mask", None)
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=encoder_outputs[0],
            encoder_attention_mask=attention_mask if kept_mask is None else kept_mask,
            use_cache=use_cache,
            **{name: kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None},
        )
        logits = self.lm_head(decoded[0] * self.model_dim**-0.5)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1) / self.temperature, labels.flatten(), ignore_index=-100)
        return Seq2SeqLMOutput(loss=loss, logits=logits, **{k: v for k, v in decoded.items() if k in CACHE_NAMES})


CACHE_NAMES = ("cache", "past_key_values")  # before and after transformers renamed it


class Letter(nn.Module):
    """The recommender of t5_tiger.py around the subclass, without user tokens."""

    def __init__(self, histories: Histories, **sizes: Any) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(histories)
        tokens = dict(vocab_size=self.vocabulary.size, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD)
        self.t5 = T5WithTemperature(T5Config(**sizes, **tokens))

    def stamp(self, pruning: PruningConfig | None) -> None:
        apply_stamp(self.t5, pruning=pruning)
        # "encoder: packed, decoder: packed, the loss: as in T5WithTemperature.forward, with logits"
        assert stamp_status(self.t5).own_forward is not None

    def loss(self, batch: Batch) -> Tensor:
        inputs = self.vocabulary.inputs(batch, has_users=False)
        return self.t5(**inputs, labels=self.vocabulary.labels(batch)).loss

    @torch.no_grad()
    def recommend(self, batch: Batch, num_beams: int) -> Tensor:
        return self.vocabulary.recommend(self.t5, self.vocabulary.inputs(batch, has_users=False), num_beams)


def pruning_options(histories: Histories) -> dict[str, Any]:
    """`</s>` stays."""
    return dict(protect_last=1)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return compare(Letter, pruning_options, argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    main()
