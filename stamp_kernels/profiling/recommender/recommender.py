"""The recommender of the TIGER/GRID setting, in the configurations that `stamp-profile train` compares.

Hugging Face's T5ForConditionalGeneration reads a history of semantic-ID tokens and generates those of the next item.
Every configuration has the same parameters under the same names (`model.*`), so one seed gives all the same weights.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from stamp_kernels.integrations.transformers import PredictionConfig, PruningConfig, apply_stamp
from stamp_kernels.integrations.transformers.t5 import head_inputs
from stamp_kernels.ops._checks import check_choice
from stamp_kernels.packed import PackedBatch
from stamp_kernels.profiling.data.batches import Batch
from stamp_kernels.profiling.data.vocabulary import Vocabulary
from stamp_kernels.profiling.peers.padded_t5 import encode_padded_pruned, set_base_attention

CONFIGURATIONS = ("padded-eager", "padded-sdpa", "padded-prune", "packed", "packed+sap", "packed+sap+map")


@dataclass(frozen=True)
class RecommenderSettings:
    """Sizes of the model and of STAMP's two modules.

    Attributes:
        codes_per_item, codebook_size: codes of an item's semantic ID, one per level, and the number of codes per level.
        num_layers: the number of blocks of the encoder, and of the decoder.
        keep_ratio, prune_after_block: SAP keeps ceil(keep_ratio * n) tokens after this block, which counts from 1.
        auxiliary_steps: the number of items that MAP predicts beyond the next one.
        auxiliary_weight: lambda, the weight of their loss.
    """

    codes_per_item: int = 4
    codebook_size: int = 256
    num_layers: int = 4
    d_model: int = 128
    num_heads: int = 6
    d_kv: int = 64
    d_ff: int = 1024
    dropout: float = 0.1
    keep_ratio: float = 1 / 3
    prune_after_block: int = 2
    auxiliary_steps: int = 3
    auxiliary_weight: float = 0.3


class RecommenderOutput(NamedTuple):
    """What a training step needs.

    Attributes:
        loss: scalar, what the step minimises, including the auxiliary loss.
        next_item_loss: scalar, the part of it that all configurations share.
        tokens_per_block: the number of tokens that entered each block of the encoder, including padding.
    """

    loss: Tensor
    next_item_loss: Tensor
    tokens_per_block: list[int]


class Recommender(nn.Module, ABC):
    """What the configurations share: the base model, the training step and the two functions of the beam search."""

    def __init__(self, settings: RecommenderSettings) -> None:
        super().__init__()
        self.settings = settings
        self.vocabulary = Vocabulary(settings.codes_per_item, settings.codebook_size)
        self.model = T5ForConditionalGeneration(
            T5Config(  # type: ignore[call-arg]  # transformers declares only some of the arguments
                vocab_size=self.vocabulary.size,
                d_model=settings.d_model,
                d_kv=settings.d_kv,
                d_ff=settings.d_ff,
                num_layers=settings.num_layers,
                num_heads=settings.num_heads,
                dropout_rate=settings.dropout,
                pad_token_id=0,
                decoder_start_token_id=0,
                eos_token_id=None,
                use_cache=False,
            )
        )

    @abstractmethod
    def forward(self, batch: Batch) -> RecommenderOutput:
        """The losses of a training step."""

    @abstractmethod
    def encode(self, batch: Batch) -> Any:
        """The encoder's states of the histories, in the form that `next_token_logits` takes."""

    @abstractmethod
    def next_token_logits(self, encoded: Any, prefixes: Tensor) -> Tensor:
        """Logits `[B, beams, V]` of the token after each prefix, int64 `[B, beams, t]`; t may be 0."""

    def decoder_inputs(self, prefixes: Tensor) -> Tensor:
        """Prefixes `[..., t]` with the start token before them: `[..., t + 1]`."""
        start = prefixes.new_full((*prefixes.shape[:-1], 1), self.model.config.decoder_start_token_id)
        return torch.cat([start, prefixes], dim=-1)


class PaddedRecommender(Recommender):
    """The model as people train it: a padded batch through the base model's own forward."""

    def __init__(self, settings: RecommenderSettings, attention: str) -> None:
        super().__init__(settings)
        set_base_attention(self.model, attention)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
        """States `[B, S, D]`, their mask `[B, S]`, and the number of padded tokens that enter each block."""
        states = self.model.encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0]
        return states, batch.attention_mask, [batch.input_ids.numel()] * self.settings.num_layers

    def forward(self, batch: Batch) -> RecommenderOutput:
        states, mask, tokens_per_block = self.encode(batch)
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=mask, labels=batch.labels
        )
        return RecommenderOutput(output.loss, output.loss, tokens_per_block)

    def next_token_logits(self, encoded: tuple[Tensor, Tensor, list[int]], prefixes: Tensor) -> Tensor:
        states, mask, _ = encoded
        num_beams = prefixes.shape[1]
        output = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states.repeat_interleave(num_beams, dim=0)),
            attention_mask=mask.repeat_interleave(num_beams, dim=0),
            decoder_input_ids=self.decoder_inputs(prefixes).flatten(0, 1),
        )
        logits: Tensor = output.logits[:, -1].unflatten(0, prefixes.shape[:2])
        return logits


class PaddedPrunedRecommender(PaddedRecommender):
    """The paper's way of pruning, on a padded batch with eager attention maps."""

    def __init__(self, settings: RecommenderSettings) -> None:
        super().__init__(settings, attention="eager")

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor, list[int]]:
        pruning = {self.settings.prune_after_block: self.settings.keep_ratio}
        return encode_padded_pruned(self.model.encoder, batch.input_ids, batch.attention_mask, pruning)


class PackedRecommender(Recommender):
    """The same model after `apply_stamp`, with SAP (`prune`) and MAP (`predict`) on request."""

    def __init__(self, settings: RecommenderSettings, *, prune: bool, predict: bool) -> None:
        super().__init__(settings)
        pruning = prediction = None
        if prune:
            pruning = PruningConfig(schedule=[(settings.prune_after_block, settings.keep_ratio)])
        if predict:
            prediction = PredictionConfig(
                num_steps=settings.auxiliary_steps,
                codes_per_item=settings.codes_per_item,
                lambda_=settings.auxiliary_weight,
                vocab_ranges=[self.vocabulary.level_range(level) for level in range(settings.codes_per_item)],
            )
        apply_stamp(self.model, pruning=pruning, prediction=prediction)
        self._tokens_per_block = [0] * settings.num_layers
        for i, block in enumerate(self.model.encoder.block):
            block.register_forward_pre_hook(partial(self._count_tokens, i))

    def _count_tokens(self, i: int, block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._tokens_per_block[i] = inputs[0].shape[1]

    def encode(self, batch: Batch) -> PackedBatch:
        packed: PackedBatch = self.model.encoder(packed_inputs=batch.packed_inputs).packed
        return packed

    def forward(self, batch: Batch) -> RecommenderOutput:
        output = self.model(packed_inputs=batch.packed_inputs, labels=batch.labels, future_ids=batch.future_ids)
        return RecommenderOutput(output.loss, output.next_token_loss, list(self._tokens_per_block))

    def next_token_logits(self, encoded: PackedBatch, prefixes: Tensor) -> Tensor:
        """All beams of a user attend to one copy of the history; the base model's own search copies it per beam."""
        num_sequences, num_beams = prefixes.shape[:2]
        decoder_ids = self.decoder_inputs(prefixes)
        length = decoder_ids.shape[2]
        states = self.model.decoder(
            packed_inputs=PackedBatch(
                decoder_ids.flatten(), _even_offsets(num_sequences * num_beams, length, decoder_ids.device), length
            ),
            packed_source=encoded,
            cu_seqlens_cross=_even_offsets(num_sequences, num_beams * length, decoder_ids.device),
            max_seqlen_cross=num_beams * length,
        ).packed.values
        last = states.view(num_sequences, num_beams, length, -1)[:, :, -1]
        logits: Tensor = self.model.lm_head(head_inputs(self.model, last))
        return logits


def _even_offsets(num_sequences: int, length: int, device: torch.device) -> Tensor:
    """int32 cu_seqlens of sequences of the same length."""
    return torch.arange(0, num_sequences * length + 1, length, dtype=torch.int32, device=device)


def build_recommender(name: str, settings: RecommenderSettings, *, seed: int) -> Recommender:
    """A configuration by its name, with the weights of this seed.

    Raises:
        ValueError: there is no configuration of this name.
    """
    check_choice("configuration", name, CONFIGURATIONS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "padded-prune":
            return PaddedPrunedRecommender(settings)
        if name.startswith("padded-"):
            return PaddedRecommender(settings, attention=name.removeprefix("padded-"))
        return PackedRecommender(settings, prune="sap" in name, predict="map" in name)
