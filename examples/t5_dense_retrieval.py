"""liger's pattern: a subclass whose forward calls super().forward, and a state of the encoder that retrieves items.

The state of the last token of a history is compared with an embedding of every item. A stamped encoder that prunes
returns fewer states: the last one is at `output.encoder_attention_mask.sum(-1) - 1`, and the last item is protected.

    pip install "stamp_kernels[profile]" && pip install --no-deps recbole  # recbole contains MovieLens-100K
    python examples/t5_dense_retrieval.py --keep-ratio 0.33
"""

from collections.abc import Sequence
from typing import Any

import torch
from histories import Batch, Histories, compare
from t5_tiger import EOS, PAD, Vocabulary
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from stamp_kernels.integrations.transformers import PruningConfig, apply_stamp


class T5WithRetrieval(T5ForConditionalGeneration):
    """T5's loss and beams, and beside them `predicted_embedding` `[B, d_model]` of the next item."""

    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.projection = nn.Linear(config.d_model, config.d_model)
        self.post_init()

    def forward(self, **kwargs: Any) -> Any:
        output = super().forward(**kwargs)
        mask = getattr(output, "encoder_attention_mask", None)  # of the kept tokens, of a stamped model
        if mask is None:
            mask = kwargs["attention_mask"]
        states, last = output.encoder_last_hidden_state, mask.sum(-1) - 1
        self.predicted_embedding = self.projection(states[torch.arange(len(states)), last])
        return output


class DenseRetrieval(nn.Module):
    temperature = 0.07

    def __init__(self, histories: Histories, **sizes: Any) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(histories)
        tokens = dict(vocab_size=self.vocabulary.size, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD)
        self.t5 = T5WithRetrieval(T5Config(**sizes, **tokens))
        self.item_embeddings = nn.Embedding(len(histories.codes_of_item), sizes["d_model"])  # in place of text

    def stamp(self, pruning: PruningConfig | None) -> None:
        apply_stamp(self.t5, pruning=pruning)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """`<user>` and the codes of the history, as embeddings, without `</s>`."""
        tokens = self.vocabulary.inputs(batch)["input_ids"][:, :-1]
        levels = batch.codes.shape[-1]
        mask = F.pad(batch.mask.repeat_interleave(levels, dim=1), (1, 0), value=True)
        tokens = tokens.masked_fill(~mask, PAD)
        return {"inputs_embeds": self.t5.shared(tokens), "attention_mask": mask.long()}

    def loss(self, batch: Batch) -> Tensor:
        labels = self.vocabulary.labels(batch)[:, :-1].contiguous()
        code_loss = self.t5(**self.inputs(batch), labels=labels).loss
        predicted = F.normalize(self.t5.predicted_embedding, dim=-1)
        similarities = predicted @ F.normalize(self.item_embeddings.weight, dim=-1).T
        return code_loss + F.cross_entropy(similarities / self.temperature, batch.target_item)

    @torch.no_grad()
    def recommend(self, batch: Batch, num_beams: int) -> Tensor:
        return self.vocabulary.recommend(self.t5, self.inputs(batch), num_beams)


def pruning_options(histories: Histories) -> dict[str, Any]:
    """`<user>` and the last item stay."""
    return dict(protect_first=1, protect_last=histories.codes_per_item)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return compare(DenseRetrieval, pruning_options, argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    main()
