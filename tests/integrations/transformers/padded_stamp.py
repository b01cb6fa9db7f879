"""STAMP written out in Hugging Face's own eager T5 modules, where nothing is gathered or packed.

The padded batch stays `[B, S]` through all blocks. A token that pruning drops is masked out as a key, for the later
blocks and for the decoder. `encode_rastp` is RASTP's encoder, which gathers columns of the padded batch.
"""

import copy
import itertools
import math
from collections.abc import Collection
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from closeness import relative_error
from t5_cases import VOCAB_SIZE, WITH_WEIGHTS, padded_batch, tiny_t5
from torch import Tensor
from transformers import T5EncoderModel, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from stamp_kernels.integrations.transformers import PredictionConfig, PruningConfig, apply_stamp

# Histories of 30 tokens then have distances in every exact and logarithmic bucket, and beyond.
FEW_BUCKETS = dict(relative_attention_num_buckets=8, relative_attention_max_distance=16)
V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
LENGTHS = (7, 1, 30, 2, 13)
THIRD = ((2, 1 / 3),)

# Where the padding is, and the lengths of the histories in tokens (in items with codes_per_item, see `batch_of`).
BATCHES = {
    "right": ("right", LENGTHS),
    "left": ("left", LENGTHS),
    "holes": ("holes", LENGTHS),
    "empty": ("holes", (0, 5, 12, 0)),
    "no_mask": ("none", (11, 11, 11)),
}
PRUNINGS = {
    "paper": PruningConfig(),
    "half": PruningConfig(((1, 0.5),)),
    "all_kept": PruningConfig(((2, 1.0),)),
    "two_points": PruningConfig(((1, 0.5), (2, 1 / 3))),
    "every_block": PruningConfig(((1, 2 / 3), (2, 2 / 3), (3, 2 / 3))),
    "last_block": PruningConfig(((3, 1 / 3),)),
    "l2": PruningConfig(((1, 0.5), (2, 0.5)), norm="l2"),
    "min_keep": PruningConfig(((1, 0.1), (3, 0.1)), min_keep=3),
    "items": PruningConfig(THIRD, codes_per_item=3),
    "items_two_points": PruningConfig(((1, 0.5), (2, 0.5)), codes_per_item=4, min_keep=2),
    "protect_first": PruningConfig(((1, 1 / 3), (2, 0.5)), protect_first=2),
    "protect_last": PruningConfig(((1, 1 / 3), (2, 0.5)), protect_last=1),
    "protect_both": PruningConfig(((1, 0.5), (3, 0.5)), protect_first=3, protect_last=2, min_keep=0),
    "only_protected": PruningConfig(((2, 0.0),), protect_first=1, protect_last=1, min_keep=0),
    "protect_items": PruningConfig(((1, 0.5), (2, 0.5)), codes_per_item=3, protect_first=3, protect_last=6),
    "user_and_eos": PruningConfig(((1, 0.5), (2, 0.5)), codes_per_item=4, protect_first=1, protect_last=1),
    "separators": PruningConfig(((1, 1 / 3), (3, 0.5)), codes_per_item=5, protect_first=1, protect_last=6, min_keep=2),
    "compact_user": PruningConfig(((1, 0.5), (2, 0.5)), codes_per_item=3, protect_first=2, positions="compact"),
    "only_ends": PruningConfig(THIRD, codes_per_item=4, protect_first=7, protect_last=2, min_keep=0),
    "max_seqlen_user": PruningConfig(
        ((1, 0.5), (2, 0.25)), budget="max_seqlen", codes_per_item=4, protect_first=3, protect_last=2
    ),
    "max_seqlen": PruningConfig(THIRD, budget="max_seqlen"),
    "max_seqlen_two_points": PruningConfig(((1, 0.5), (2, 0.5)), budget="max_seqlen", protect_first=1),
    "max_seqlen_items": PruningConfig(((1, 0.5), (2, 0.5)), budget="max_seqlen", codes_per_item=2),
    "compact": PruningConfig(((1, 0.5),), positions="compact"),
    "compact_two_points": PruningConfig(((1, 2 / 3), (2, 0.5)), positions="compact", protect_last=1),
    "only_training": PruningConfig(((1, 0.5),), prune_in_eval=False),
    "nothing_kept": PruningConfig(((2, 0.0),), min_keep=0),
}
RASTP = PruningConfig(((2, 1 / 3),), positions="none", budget="max_seqlen", voters="padded")


def in_turn(names: Collection[Any], others: Collection[Any], *, each: int) -> list[tuple[Any, Any]]:
    """Every name with `each` of the others, which take turns: a part of the product in which every value occurs."""
    turns = itertools.cycle(others)
    return [(name, next(turns)) for name in names for _ in range(each)]


def batch_of(name: str, pruning: PruningConfig | None = None) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels of a batch of BATCHES.

    If the pruning has codes_per_item, histories are whole items. If it also protects ends, two of the items are the
    ends, and histories of less than two items are that many tokens.
    """
    padding, lengths = BATCHES[name]
    if pruning is not None and pruning.codes_per_item is not None:
        codes_per_item, ends = pruning.codes_per_item, pruning.protect_first + pruning.protect_last
        lengths = tuple(
            codes_per_item * length if ends == 0 else length if length < 2 else ends + codes_per_item * (length - 2)
            for length in lengths
        )
    if padding in ("right", "left"):
        return padded_batch(lengths, padding_side=padding)
    batch = padded_batch(lengths)
    if padding == "none":
        return batch | dict(attention_mask=None)
    padded_length = max(lengths) * 5 // 4 + 3
    mask = torch.zeros(len(lengths), padded_length, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[torch.randperm(padded_length)[:length]] = 1
    # A hole looks like a token, but must not be read.
    return batch | dict(input_ids=torch.randint(1, VOCAB_SIZE, mask.shape), attention_mask=mask)


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


class Encoded(NamedTuple):
    """The encoded histories: states `[B, S, d_model]`, 0 except on kept tokens, and kept, bool `[B, S]`."""

    states: Tensor
    kept: Tensor


def encode_padded(
    base: T5ForConditionalGeneration | T5EncoderModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pruning: PruningConfig | None,
) -> Encoded:
    """STAMP's encoder written out, with the layers of the untouched base model."""
    kept = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    length = kept.shape[1]
    columns = length  # that a padded implementation still has
    schedule = {}
    if pruning is not None:
        schedule = dict(pruning.schedule) if base.training or pruning.prune_in_eval else {}
        rank = kept.cumsum(1) - 1
        is_at_an_end = (rank < pruning.protect_first) | (rank >= kept.sum(1, keepdim=True) - pruning.protect_last)
        protected = kept & is_at_an_end

    bias_of_columns = base.encoder.block[0].layer[0].SelfAttention.compute_bias(length, length)  # [1, H, S, S]
    bias = bias_of_columns
    voters = torch.ones_like(kept) if pruning is not None and pruning.voters == "padded" else kept
    hidden = base.encoder.embed_tokens(input_ids)
    for block_number, (self_attention, feed_forward) in enumerate((b.layer for b in base.encoder.block), start=1):
        hide_keys = torch.zeros(kept.shape, dtype=hidden.dtype).masked_fill(~kept, torch.finfo(hidden.dtype).min)
        hidden, *_, attention = self_attention(hidden, position_bias=bias + hide_keys[:, None, None], **WITH_WEIGHTS)
        hidden = feed_forward(hidden)
        if block_number not in schedule:
            continue
        centrality = (attention * voters[:, None, :, None]).sum((1, 2))  # [B, S], over heads and voting queries
        saliency = torch.linalg.vector_norm(hidden, 1 if pruning.norm == "l1" else 2, dim=-1)
        kept = best_tokens((saliency * centrality).detach(), kept, protected, schedule[block_number], columns, pruning)
        columns = columns_after(columns, schedule[block_number], pruning)
        voters = kept
        if pruning.positions == "none":
            bias = torch.zeros_like(bias_of_columns)
        if pruning.positions == "compact":
            place = (kept.cumsum(1) - 1).clamp(min=0)  # [B, S]
            bias = torch.stack([bias_of_columns[0][:, row][:, :, row] for row in place])  # [B, H, S, S]
    states = base.encoder.final_layer_norm(hidden)
    return Encoded(states.masked_fill(~kept[..., None], 0.0), kept)


def encode_rastp(
    base: T5ForConditionalGeneration, input_ids: Tensor, attention_mask: Tensor, block_number: int = 2
) -> tuple[Encoded, Tensor]:
    """RASTP's encoder: Hugging Face's blocks as they are, on fewer columns of the padded batch after one of them.

    Returns:
        What was kept, in the columns `[B, S]` of the inputs, and the mask `[B, k]` of the columns that remain.
    """
    blocks, length = base.encoder.block, input_ids.shape[1]
    maps: list[Tensor] = []
    attention = blocks[block_number - 1].layer[0].SelfAttention
    hook = attention.register_forward_hook(lambda module, args, output: maps.append(output[-1]))
    hidden, mask = base.encoder.embed_tokens(input_ids), attention_mask.bool()
    bias = blocks[0].layer[0].SelfAttention.compute_bias(length, length)
    for block in blocks[:block_number]:
        # Before 5.0 a block that is given a bias takes it as the sum of bias and mask.
        hidden = block(hidden, position_bias=bias + _hiding(mask, hidden.dtype), **WITH_WEIGHTS)[0]
    hook.remove()
    received = maps[0].sum(1).sum(1)  # [B, S], over the heads, then over all queries, padding too
    importance = (received * hidden.abs().sum(-1)).detach().masked_fill(~mask, -math.inf)
    columns = importance.topk(max(1, int(length * (1 / 3))), sorted=False).indices.sort().values  # [B, k]
    hidden = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[2]))
    remaining = mask.gather(1, columns)
    for block in blocks[block_number:]:
        hidden = block(hidden, attention_mask=_hiding(remaining, hidden.dtype), **_PLACES)[0]
    states = base.encoder.final_layer_norm(hidden).masked_fill(~remaining[..., None], 0.0)
    in_place = torch.zeros(*input_ids.shape, states.shape[2], dtype=states.dtype)
    in_place = in_place.scatter(1, columns[..., None].expand_as(states), states)
    return Encoded(in_place, torch.zeros_like(mask).scatter(1, columns, remaining)), remaining


# A block without a bias makes one of zeros; before 5.0 it needs a last position for that, whatever it is.
_PLACES = {"cache_position": torch.zeros(1, dtype=torch.int64)}


def _hiding(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`[B, 1, 1, S]`, added to the scores: 0 for keys in the mask, the least number for others."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[:, None, None]


def budget_of(items: int, keep_ratio: float, pruning: PruningConfig) -> int:
    return max(pruning.min_keep, math.ceil(Fraction(keep_ratio).limit_denominator(1000) * items))


def columns_after(columns: int, keep_ratio: float, pruning: PruningConfig) -> int:
    """The padded length after pruning: the most tokens that a history of so many columns keeps."""
    codes_per_item = pruning.codes_per_item or 1
    budget = codes_per_item * budget_of(columns // codes_per_item, keep_ratio, pruning)
    return min(columns, budget + pruning.protect_first + pruning.protect_last)


def best_tokens(
    importance: Tensor, kept: Tensor, protected: Tensor, keep_ratio: float, columns: int, pruning: PruningConfig
) -> Tensor:
    """bool `[B, S]`: which of the tokens kept so far are kept after one more pruning."""
    codes_per_item = pruning.codes_per_item or 1
    is_kept = protected.clone()
    for row, of_importance in enumerate(importance):
        items = (kept & ~protected)[row].nonzero()[:, 0].view(-1, codes_per_item)  # columns of each item
        of = len(items) if pruning.budget == "sequence" else columns // codes_per_item
        best = of_importance[items].sum(1).topk(min(len(items), budget_of(of, keep_ratio, pruning))).indices
        is_kept[row, items[best].flatten()] = True
    return is_kept


def decode_padded(base: T5ForConditionalGeneration, encoded: Encoded, **arguments):
    """The base model's own decoder on the kept tokens. Other states are 0, so a query without keys gets 0."""
    return base(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded.states),
        attention_mask=encoded.kept.long(),
        **arguments,
    )


def expected_positions(attention_mask: Tensor | None, encoded: Encoded, pruning: PruningConfig | None) -> Tensor:
    """`[T']`: the distance of each kept token from the first token of its history, or its index among the kept."""
    if pruning is not None and pruning.positions == "compact":
        return (encoded.kept.cumsum(1) - 1)[encoded.kept]
    columns = torch.arange(encoded.kept.shape[1]).expand(encoded.kept.shape)
    first = 0 if attention_mask is None else attention_mask.argmax(1, keepdim=True)
    return (columns - first)[encoded.kept]


def assert_states_are(states: Tensor, mask: Tensor, encoded: Encoded, bound: float = 1e-9) -> None:
    """`[B, S', d_model]` with its mask has these states in order, and 0 elsewhere."""
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == encoded.kept.sum(1).tolist()
    assert relative_error(states[mask], encoded.states[encoded.kept]) < bound
    assert not states[~mask].any()


def stamped(base, pruning: PruningConfig | None = None, prediction: PredictionConfig | None = None):
    return apply_stamp(copy.deepcopy(base), pruning=pruning, prediction=prediction)


def evaluating(pruning: PruningConfig | None, *, attention: str = "eager", **config):
    """(untouched eager base model, stamped model with heads), both in evaluation."""
    base, model = (tiny_t5(torch.float64, attention=kind, **FEW_BUCKETS, **config) for kind in ("eager", attention))
    apply_stamp(model, pruning=pruning, prediction=PredictionConfig())
    return base.eval(), model.eval()
