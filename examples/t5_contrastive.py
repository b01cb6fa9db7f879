"""ETEGRec's pattern: embeddings in, all hidden states out, and a contrastive loss on the mean of the encoder's states.

T5ForConditionalGeneration is called without labels. Its last decoder state is multiplied with the embeddings of each
level; the mean of the encoder's states is pulled to the embedding of the next item, away from those of other users.
Where tokens are pruned the mean is over the kept tokens, whose mask is `output.encoder_attention_mask`.

    pip install "stamp_kernels[profile]" && pip install --no-deps recbole  # recbole contains MovieLens-100K
    python examples/t5_contrastive.py --keep-ratio 0.33
"""

from collections.abc import Sequence
from typing import Any

import torch
from histories import Batch, Beams, Histories, compare
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from stamp_kernels.integrations.transformers import PruningConfig, apply_stamp


class Contrastive(nn.Module):
    temperature = 0.1

    def __init__(self, histories: Histories, **sizes: Any) -> None:
        super().__init__()
        levels, codes, width = histories.codes_per_item, histories.codebook_size, sizes["d_model"]
        self.histories = histories
        # T5's own embeddings have one row: the decoder's start.
        self.t5 = T5ForConditionalGeneration(
            T5Config(vocab_size=1, decoder_start_token_id=0, eos_token_id=None, **sizes)
        )
        self.code_embeddings = nn.ModuleList(nn.Embedding(codes, width) for _ in range(levels))
        self.item_embeddings = nn.Embedding(len(histories.codes_of_item), width)  # in place of text embeddings
        self.adapter = nn.Linear(width, width)

    def stamp(self, pruning: PruningConfig | None) -> None:
        apply_stamp(self.t5, pruning=pruning)

    def embed(self, codes: Tensor) -> Tensor:
        """`[..., l]` codes of the first l levels to `[..., l, d_model]`."""
        tables = self.code_embeddings[: codes.shape[-1]]
        if len(tables) == 0:
            return self.item_embeddings.weight.new_empty(*codes.shape, self.t5.config.d_model)
        return torch.stack([table(codes[..., i]) for i, table in enumerate(tables)], -2)

    def decoder_inputs(self, codes: Tensor) -> Tensor:
        return torch.cat([self.t5.shared.weight.expand(len(codes), 1, -1), self.embed(codes)], dim=1)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        codes = self.embed(batch.codes)  # [B, S, L, d_model]
        mask = batch.mask.repeat_interleave(codes.shape[2], dim=1)
        return {"inputs_embeds": codes.flatten(1, 2), "attention_mask": mask}

    def loss(self, batch: Batch) -> Tensor:
        inputs = self.inputs(batch)
        output = self.t5(
            **inputs, decoder_inputs_embeds=self.decoder_inputs(batch.target[:, :-1]), output_hidden_states=True
        )
        states = output.decoder_hidden_states[-1]  # [B, L, d_model]
        logits = torch.stack([states[:, i] @ table.weight.T for i, table in enumerate(self.code_embeddings)], dim=1)
        code_loss = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten())

        mask = getattr(output, "encoder_attention_mask", None)  # of the kept tokens
        if mask is None:
            mask = inputs["attention_mask"]
        sums = output.encoder_last_hidden_state.masked_fill(~mask[..., None], 0).sum(1)
        pooled = F.normalize(self.adapter(sums / mask.sum(1, keepdim=True)), dim=-1)
        items, positive = batch.target_item.unique(return_inverse=True)
        similarities = pooled @ F.normalize(self.item_embeddings(items), dim=-1).T
        return code_loss + F.cross_entropy(similarities / self.temperature, positive)

    @torch.no_grad()
    def recommend(self, batch: Batch, num_beams: int) -> Tensor:
        """Beam search over the items that exist. Histories are encoded once; every step decodes the whole prefix."""
        inputs, size = self.inputs(batch), len(batch.users)
        encoded = self.t5.get_encoder()(**inputs, return_dict=True)
        mask = getattr(encoded, "attention_mask", inputs["attention_mask"]).repeat_interleave(num_beams, 0)
        encoded = BaseModelOutput(encoded.last_hidden_state.repeat_interleave(num_beams, 0))
        beams = Beams(self.histories, size, num_beams)
        for table in self.code_embeddings:
            decoded = self.t5(
                encoder_outputs=encoded,
                attention_mask=mask,
                decoder_inputs_embeds=self.decoder_inputs(beams.codes.flatten(0, 1)),
                output_hidden_states=True,
                use_cache=False,
            ).decoder_hidden_states[-1][:, -1]
            beams.advance(decoded @ table.weight.T)
        return beams.codes


def pruning_options(histories: Histories) -> dict[str, Any]:
    """Whole items stay or go."""
    return dict(codes_per_item=histories.codes_per_item)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return compare(Contrastive, pruning_options, argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    main()
