"""TIGER: a plain T5ForConditionalGeneration over semantic IDs, stamped with one line.

A history is `<user> code ... code </s>`. Beam search is constrained to the items that exist. Trainers like this one are
public in many variants (arXiv 2305.05065).

    pip install "stamp_kernels[profile]" && pip install --no-deps recbole  # recbole contains MovieLens-100K
    python examples/t5_tiger.py --keep-ratio 0.33
"""

from collections.abc import Sequence
from typing import Any

import torch
from histories import Batch, Histories, compare
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from stamp_kernels.integrations.transformers import PruningConfig, apply_stamp

PAD, EOS, FIRST_CODE = 0, 1, 2
USER_TOKENS = 2000  # users are hashed to these


class Vocabulary:
    """Token ids: padding, `</s>`, the codes of each level, user tokens."""

    def __init__(self, histories: Histories) -> None:
        self.histories = histories
        self.level_starts = FIRST_CODE + histories.codebook_size * torch.arange(histories.codes_per_item)
        self.first_user = FIRST_CODE + histories.codebook_size * histories.codes_per_item
        self.size = self.first_user + USER_TOKENS

    def inputs(self, batch: Batch, has_users: bool = True) -> dict[str, Tensor]:
        """input_ids and attention_mask: `<user>`, the codes of the history and `</s>`, padded on the right."""
        codes = (batch.codes + self.level_starts).flatten(1)
        lengths = self.histories.codes_per_item * batch.mask.sum(1)
        columns = torch.arange(codes.shape[1] + 1)
        ids = F.pad(codes, (0, 1), value=PAD)
        ids = ids.where(columns < lengths[:, None], torch.where(columns == lengths[:, None], EOS, PAD))
        if has_users:
            users = self.first_user + batch.users % USER_TOKENS
            ids = torch.cat([users[:, None], ids], dim=1)
        return {"input_ids": ids, "attention_mask": (ids != PAD).long()}

    def labels(self, batch: Batch) -> Tensor:
        """`[B, L + 1]`: the codes of the next item and `</s>`."""
        return F.pad(batch.target + self.level_starts, (0, 1), value=EOS)

    def allowed_tokens(self, row: int, generated: Tensor) -> list[int]:
        """prefix_allowed_tokens_fn of `generate`: only codes that continue an item, then `</s>`."""
        prefix = generated[1:]  # behind the decoder's start token
        level = len(prefix)
        if level >= len(self.level_starts):
            return [EOS]
        codes = tuple((prefix - self.level_starts[:level]).tolist())
        start = int(self.level_starts[level])
        return [start + code for code in sorted(self.histories.next_codes.get(codes, ()))] or [EOS]

    def recommend(self, t5: T5ForConditionalGeneration, inputs: dict[str, Tensor], num_beams: int) -> Tensor:
        """Codes `[B, num_beams, L]` by Hugging Face's beam search. A stamped model's beams share their history."""
        levels = len(self.level_starts)
        sequences = t5.generate(
            **inputs,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            max_new_tokens=levels + 1,
            prefix_allowed_tokens_fn=self.allowed_tokens,
        )
        codes = sequences[:, 1 : 1 + levels] - self.level_starts
        return codes.view(-1, num_beams, levels)


class Tiger(nn.Module):
    def __init__(self, histories: Histories, **sizes: Any) -> None:
        super().__init__()
        self.vocabulary = Vocabulary(histories)
        tokens = dict(vocab_size=self.vocabulary.size, pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD)
        self.t5 = T5ForConditionalGeneration(T5Config(**sizes, **tokens))

    def stamp(self, pruning: PruningConfig | None) -> None:
        apply_stamp(self.t5, pruning=pruning)  # the one line; before the optimizer and DDP

    def loss(self, batch: Batch) -> Tensor:
        return self.t5(**self.vocabulary.inputs(batch), labels=self.vocabulary.labels(batch)).loss

    @torch.no_grad()
    def recommend(self, batch: Batch, num_beams: int) -> Tensor:
        # Without output.attention_mask: T5's forward and generate take the mask of the kept tokens themselves.
        return self.vocabulary.recommend(self.t5, self.vocabulary.inputs(batch), num_beams)


def pruning_options(histories: Histories) -> dict[str, Any]:
    """`<user>` and `</s>` stay."""
    return dict(protect_first=1, protect_last=1)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    return compare(Tiger, pruning_options, argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    main()
