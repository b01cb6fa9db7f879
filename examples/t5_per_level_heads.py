"""GRID's and RQ-VAE-Recommender's pattern: T5EncoderModel, a bare T5Stack as decoder, and a head for each level.

T5 sees only embeddings. A history is `<user>`, then the codes of each item and a separator. The decoder reads a learned
vector and the codes so far, and the state of level l goes through an nn.Linear of its own. Both stacks are stamped, and
`per_level_cross_entropy` takes the place of a cross-entropy for each level.

    pip install "stamp_kernels[profile]" && pip install --no-deps recbole  # recbole contains MovieLens-100K
    python examples/t5_per_level_heads.py --keep-ratio 0.33
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from histories import Batch, Beams, Histories, compare
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Stack

from stamp_kernels import per_level_cross_entropy
from stamp_kernels.integrations.transformers import PruningConfig, apply_stamp

USER_TOKENS = 2000  # users are hashed to these
# T5Stack's name of the argument, which transformers has changed.
CACHE = "cache" if "cache" in inspect.signature(T5Stack.forward).parameters else "past_key_values"


class PerLevelHeads(nn.Module):
    def __init__(self, histories: Histories, has_users: bool = True, **sizes: Any) -> None:
        super().__init__()
        levels, codes, width = histories.codes_per_item, histories.codebook_size, sizes["d_model"]
        self.histories = histories
        sizes |= dict(vocab_size=1, eos_token_id=None)  # T5's own embeddings are not used
        self.encoder = T5EncoderModel(T5Config(**sizes))
        self.decoder = T5Stack(T5Config(**sizes, is_decoder=True, is_encoder_decoder=False))
        self.user_embeddings = nn.Embedding(USER_TOKENS, width) if has_users else None
        self.code_embeddings = nn.ModuleList(nn.Embedding(codes, width) for _ in range(levels))
        self.separator, self.start = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))
        self.heads = nn.ModuleList(nn.Linear(width, codes, bias=False) for _ in range(levels))
        self.is_stamped = False

    def stamp(self, pruning: PruningConfig | None) -> None:
        apply_stamp(self.encoder, pruning=pruning)
        apply_stamp(self.decoder)
        self.is_stamped = True

    def embed(self, codes: Tensor) -> Tensor:
        """`[..., l]` codes of the first l levels to `[..., l, d_model]`."""
        return torch.stack(
            [table(codes[..., i]) for i, table in enumerate(self.code_embeddings[: codes.shape[-1]])], -2
        )

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The encoder's states `[B, S', d_model]` and their mask."""
        items = torch.cat([self.embed(batch.codes), self.separator.expand(*batch.mask.shape, 1, -1)], dim=-2)
        inputs, mask = items.flatten(1, 2), batch.mask.repeat_interleave(items.shape[2], dim=1)
        if self.user_embeddings is not None:
            users = self.user_embeddings(batch.users % USER_TOKENS)
            inputs, mask = torch.cat([users[:, None], inputs], dim=1), F.pad(mask, (1, 0), value=True)
        output = self.encoder(inputs_embeds=inputs, attention_mask=mask)
        # A stamped encoder that prunes returns fewer columns, and their mask beside them.
        return output.last_hidden_state, getattr(output, "attention_mask", mask)

    def loss(self, batch: Batch) -> Tensor:
        states, mask = self.encode(batch)
        shifted = torch.cat([self.start.expand(len(states), 1, -1), self.embed(batch.target[:, :-1])], dim=1)
        decoded = self.decoder(
            inputs_embeds=shifted, encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False
        ).last_hidden_state  # [B, L, d_model]
        if self.is_stamped:
            return per_level_cross_entropy(decoded, self.heads, batch.target)
        losses = [F.cross_entropy(head(decoded[:, i]), batch.target[:, i]) for i, head in enumerate(self.heads)]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def recommend(self, batch: Batch, num_beams: int) -> Tensor:
        """Beam search over the items that exist, with a cache of the beams' keys and values."""
        states, mask = self.encode(batch)
        size = len(states)
        states, mask = states.repeat_interleave(num_beams, 0), mask.repeat_interleave(num_beams, 0)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        inputs = self.start.expand(len(states), 1, -1)
        beams = Beams(self.histories, size, num_beams)
        for level, head in enumerate(self.heads):
            decoded = self.decoder(
                inputs_embeds=inputs,
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                use_cache=True,
                **{CACHE: cache},
            ).last_hidden_state[:, -1]
            cache.reorder_cache(beams.advance(head(decoded)))
            inputs = self.code_embeddings[level](beams.codes[..., -1]).view(-1, 1, inputs.shape[-1])
        return beams.codes


def pruning_options(histories: Histories) -> dict[str, Any]:
    """Whole items with their separators, or not at all; `<user>` stays."""
    return dict(codes_per_item=histories.codes_per_item + 1, protect_first=1)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return compare(PerLevelHeads, pruning_options, argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    main()
