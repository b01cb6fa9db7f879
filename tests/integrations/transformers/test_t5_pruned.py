"""Stamped T5s against STAMP written out in Hugging Face's own eager modules, where nothing is gathered or packed.

The padded batch stays `[B, S]` through all blocks: a token that pruning drops is masked out as a key from there on, for
the later blocks and for the decoder. What the multi-step prediction adds to the loss is summed up target by target.
"""

import copy
import math
from collections import defaultdict
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
from closeness import relative_error
from t5_cases import LENGTHS as LONG_LENGTHS
from t5_cases import LEVELS, VOCAB_SIZE, assert_same_training_step, gradients, padded_batch, tiny_t5
from torch import Tensor
from torch.nn import functional as F
from transformers import T5EncoderModel, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from stamp_kernels.integrations.transformers import PredictionConfig, PruningConfig, apply_stamp, global_target_counts
from stamp_kernels.modules.prediction import LinearDecay
from stamp_kernels.packed import PackedBatch

# Histories of 30 tokens then have distances in every exact and logarithmic bucket, and beyond.
FEW_BUCKETS = dict(relative_attention_num_buckets=8, relative_attention_max_distance=16)
V1_1 = dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
LENGTHS = (7, 1, 30, 2, 13)
THIRD = ((2, 1 / 3),)
SCORES_BOUND = 1e-6  # Hugging Face computes the scores of a search in fp32, whatever the model's dtype

# How long the histories are, in tokens (in items for unit="item"), and where their padding is.
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
    "all_stay": PruningConfig(((2, 1.0),)),
    "two_points": PruningConfig(((1, 0.5), (2, 1 / 3))),
    "every_block": PruningConfig(((1, 2 / 3), (2, 2 / 3), (3, 2 / 3))),
    "last_block": PruningConfig(((3, 1 / 3),)),
    "l2": PruningConfig(((1, 0.5), (2, 0.5)), norm="l2"),
    "min_keep": PruningConfig(((1, 0.1), (3, 0.1)), min_keep=3),
    "items": PruningConfig(THIRD, unit="item", codes_per_item=3),
    "items_two_points": PruningConfig(((1, 0.5), (2, 0.5)), unit="item", codes_per_item=4, min_keep=2),
    "protect_first": PruningConfig(((1, 1 / 3), (2, 0.5)), protect_first=2),
    "protect_last": PruningConfig(((1, 1 / 3), (2, 0.5)), protect_last=1),
    "protect_both": PruningConfig(((1, 0.5), (3, 0.5)), protect_first=3, protect_last=2, min_keep=0),
    "protect_alone": PruningConfig(((2, 0.0),), protect_first=1, protect_last=1, min_keep=0),
    "protect_items": PruningConfig(
        ((1, 0.5), (2, 0.5)), unit="item", codes_per_item=3, protect_first=3, protect_last=6
    ),
    "max_seqlen": PruningConfig(THIRD, budget="max_seqlen"),
    "max_seqlen_two_points": PruningConfig(((1, 0.5), (2, 0.5)), budget="max_seqlen", protect_first=1),
    "max_seqlen_items": PruningConfig(((1, 0.5), (2, 0.5)), budget="max_seqlen", unit="item", codes_per_item=2),
    "compact": PruningConfig(((1, 0.5),), positions="compact"),
    "compact_two_points": PruningConfig(((1, 2 / 3), (2, 0.5)), positions="compact", protect_last=1),
    "train_alone": PruningConfig(((1, 0.5),), prune_in_eval=False),
    "nothing_stays": PruningConfig(((2, 0.0),), min_keep=0),
}


def batch_of(name: str, pruning: PruningConfig | None = None) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels of a batch of BATCHES, of whole items where the pruning has items."""
    padding, lengths = BATCHES[name]
    tokens_per_unit = 1 if pruning is None else pruning.codes_per_item or 1
    lengths = tuple(tokens_per_unit * length for length in lengths)
    if padding in ("right", "left"):
        return padded_batch(lengths, padding_side=padding)
    batch = padded_batch(lengths)
    if padding == "none":
        return batch | dict(attention_mask=None)
    padded_length = max(lengths) * 5 // 4 + 3
    mask = torch.zeros(len(lengths), padded_length, dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[torch.randperm(padded_length)[:length]] = 1
    # What stands on a hole looks like a token, and must not be read.
    return batch | dict(input_ids=torch.randint(1, VOCAB_SIZE, mask.shape), attention_mask=mask)


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


class Encoded(NamedTuple):
    """What is left of the histories: states `[B, S, d_model]`, 0 where nothing is, and kept, bool `[B, S]`."""

    states: Tensor
    kept: Tensor


def encode_padded(
    host: T5ForConditionalGeneration | T5EncoderModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pruning: PruningConfig | None,
) -> Encoded:
    """STAMP's encoder by the formulas, with the layers of the untouched host."""
    kept = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    length = kept.shape[1]
    schedule = {}
    if pruning is not None:
        schedule = dict(pruning.schedule) if host.training or pruning.prune_in_eval else {}
        rank = kept.cumsum(1) - 1
        is_at_an_end = (rank < pruning.protect_first) | (rank >= kept.sum(1, keepdim=True) - pruning.protect_last)
        protected = kept & is_at_an_end

    bias_of_columns = host.encoder.block[0].layer[0].SelfAttention.compute_bias(length, length)  # [1, H, S, S]
    bias = bias_of_columns
    hidden = host.encoder.embed_tokens(input_ids)
    for block_number, (self_attention, feed_forward) in enumerate((b.layer for b in host.encoder.block), start=1):
        hide_keys = torch.zeros(kept.shape, dtype=hidden.dtype).masked_fill(~kept, torch.finfo(hidden.dtype).min)
        hidden, _, attention = self_attention(hidden, position_bias=bias + hide_keys[:, None, None])
        hidden = feed_forward(hidden)
        if block_number not in schedule:
            continue
        votes = (attention * kept[:, None, :, None]).sum((1, 2))  # [B, S], of all heads and of the tokens alone
        saliency = torch.linalg.vector_norm(hidden, 1 if pruning.norm == "l1" else 2, dim=-1)
        kept = best_tokens((saliency * votes).detach(), kept, protected, schedule[block_number], pruning)
        if pruning.positions == "compact":
            place = (kept.cumsum(1) - 1).clamp(min=0)  # [B, S]
            bias = torch.stack([bias_of_columns[0][:, row][:, :, row] for row in place])  # [B, H, S, S]
    states = host.encoder.final_layer_norm(hidden)
    return Encoded(states.masked_fill(~kept[..., None], 0.0), kept)


def best_tokens(
    importance: Tensor, kept: Tensor, protected: Tensor, keep_ratio: float, pruning: PruningConfig
) -> Tensor:
    """bool `[B, S]`: the tokens that stay of those that were kept so far."""
    histories = [row.nonzero()[:, 0].view(-1, pruning.codes_per_item or 1) for row in kept]  # columns of each item
    stays = torch.zeros_like(kept)
    for row, items in enumerate(histories):
        is_protected = protected[row][items].any(1)
        free = items[~is_protected]
        of = len(free) if pruning.budget == "sequence" else max(map(len, histories))
        budget = math.ceil(Fraction(keep_ratio).limit_denominator(1000) * of)
        best = importance[row][free].sum(1).topk(min(len(free), max(budget, pruning.min_keep))).indices
        stays[row, items[is_protected].flatten()] = True
        stays[row, free[best].flatten()] = True
    return stays


def decode_padded(host: T5ForConditionalGeneration, encoded: Encoded, **arguments):
    """The host's own decoder on what is left. States elsewhere are 0: who sees no key then gets 0, not their mean."""
    return host(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded.states),
        attention_mask=encoded.kept.long(),
        **arguments,
    )


def expected_positions(attention_mask: Tensor | None, encoded: Encoded, pruning: PruningConfig | None) -> Tensor:
    """`[T']`: how far each kept token is behind the first one of its history, or which of the kept ones it is."""
    if pruning is not None and pruning.positions == "compact":
        return (encoded.kept.cumsum(1) - 1)[encoded.kept]
    columns = torch.arange(encoded.kept.shape[1]).expand(encoded.kept.shape)
    first = 0 if attention_mask is None else attention_mask.argmax(1, keepdim=True)
    return (columns - first)[encoded.kept]


def assert_states_are(states: Tensor, mask: Tensor, encoded: Encoded, bound: float = 1e-9) -> None:
    """`[B, S', d_model]` with its mask has these states in their order, and 0 elsewhere."""
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == encoded.kept.sum(1).tolist()
    assert relative_error(states[mask], encoded.states[encoded.kept]) < bound
    assert not states[~mask].any()


def stamped(host, pruning: PruningConfig | None = None, prediction: PredictionConfig | None = None):
    return apply_stamp(copy.deepcopy(host), pruning=pruning, prediction=prediction)


def evaluating(pruning: PruningConfig | None, *, attention: str = "eager", **config):
    """(untouched eager host, stamped model with heads), both in evaluation."""
    host, model = (tiny_t5(torch.float64, attention=kind, **FEW_BUCKETS, **config) for kind in ("eager", attention))
    apply_stamp(model, pruning=pruning, prediction=PredictionConfig())
    return host.eval(), model.eval()


@pytest.mark.parametrize("padding", BATCHES)
@pytest.mark.parametrize("name", PRUNINGS)
def test_training_equals_masking_in_the_padded_host(name, padding):
    pruning = PRUNINGS[name]
    host = tiny_t5(torch.float64, **FEW_BUCKETS)
    model = stamped(host, pruning)
    batch = batch_of(padding, pruning)
    encoded = encode_padded(host, **inputs_of(batch), pruning=pruning)
    expected = decode_padded(host, encoded, labels=batch["labels"])

    output = model(**batch, skip_logits=False)
    assert relative_error(output.logits, expected.logits) < 1e-9
    assert relative_error(output.loss, expected.loss) < 1e-9
    assert_states_are(output.encoder_last_hidden_state, output.encoder_attention_mask, encoded)
    assert_same_training_step(host, expected.loss, model, model(**batch).loss)


@pytest.mark.parametrize("config", [{}, V1_1], ids=["t5", "v1.1"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_long_histories_in_both_kinds_of_t5(padding_side, dtype, config):
    pruning = PruningConfig(((1, 0.5), (2, 1 / 3)))
    host = tiny_t5(dtype, **config)
    model = stamped(host, pruning)
    batch = padded_batch(LONG_LENGTHS, padding_side=padding_side)
    batch["labels"][0, 1:] = batch["labels"][2] = -100
    encoded = encode_padded(host, **inputs_of(batch), pruning=pruning)
    expected = decode_padded(host, encoded, labels=batch["labels"])
    with_logits = model(**batch, skip_logits=False)
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    assert relative_error(with_logits.logits, expected.logits) < bound
    assert_states_are(with_logits.encoder_last_hidden_state, with_logits.encoder_attention_mask, encoded, bound)
    assert_same_training_step(host, expected.loss, model, model(**batch).loss)


@pytest.mark.parametrize("mask", ["1110", "0111", "1011", "0101"])
def test_decoder_mask(mask):
    """Of one user; what it hides has no label, since the host would learn it."""
    pruning = PRUNINGS["two_points"]
    host = tiny_t5(torch.float64, **FEW_BUCKETS)
    model = stamped(host, pruning)
    batch = batch_of("right")
    decoder_attention_mask = torch.ones_like(batch["labels"])
    decoder_attention_mask[2] = torch.tensor([int(visible) for visible in mask])
    decoder_input_ids = host._shift_right(batch["labels"])
    batch["labels"] = batch["labels"].masked_fill(decoder_attention_mask == 0, -100)
    encoded = encode_padded(host, **inputs_of(batch), pruning=pruning)
    arguments = dict(decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask)
    expected_loss = decode_padded(host, encoded, labels=batch["labels"], **arguments).loss
    assert_same_training_step(host, expected_loss, model, model(**batch, **arguments).loss)


@pytest.mark.parametrize("given", ["inputs_embeds", "packed_inputs", "encoder_outputs", "packed_encoder_outputs"])
def test_inputs_may_come_in_other_ways(given):
    pruning = PRUNINGS["two_points"]
    host = tiny_t5(torch.float64, **FEW_BUCKETS)
    model = stamped(host, pruning)
    batch = batch_of("left")
    ids, mask, labels = batch.values()
    encoded = encode_padded(host, ids, mask, pruning)
    packed = PackedBatch.from_padded(ids, mask)
    arguments = {
        "inputs_embeds": lambda: dict(inputs_embeds=model.shared(ids), attention_mask=mask),
        "packed_inputs": lambda: dict(packed_inputs=packed),
        "encoder_outputs": lambda: dict(encoder_outputs=model.encoder(ids, mask), attention_mask=mask),
        "packed_encoder_outputs": lambda: dict(encoder_outputs=model.encoder(packed_inputs=packed)),
    }[given]()
    expected_loss = decode_padded(host, encoded, labels=labels).loss
    assert_same_training_step(host, expected_loss, model, model(**arguments, labels=labels).loss)


@pytest.mark.parametrize("padding", ["right", "left", "holes", "no_mask"])
@pytest.mark.parametrize("name", ["paper", "two_points", "items", "protect_both", "compact", "train_alone", None])
def test_evaluation(name, padding):
    """Logits with labels and without; whose states the output has, and where."""
    pruning = PRUNINGS.get(name)
    host, model = evaluating(pruning)
    batch = batch_of(padding, pruning)
    encoded = encode_padded(host, **inputs_of(batch), pruning=pruning)
    everything = encode_padded(host, **inputs_of(batch), pruning=None)
    is_pruned = name not in ("train_alone", None)
    assert (encoded.kept.sum() < everything.kept.sum()) == is_pruned

    expected = decode_padded(host, encoded, labels=batch["labels"])
    for arguments in (
        dict(labels=batch["labels"]),
        dict(decoder_input_ids=host._shift_right(batch["labels"])),
    ):
        output = model(**inputs_of(batch), **arguments)
        assert relative_error(output.logits, expected.logits) < 1e-9
        mask = output.encoder_attention_mask
        assert_states_are(output.encoder_last_hidden_state, mask, encoded)
        left_aligned = torch.arange(mask.shape[1]) < encoded.kept.sum(1, keepdim=True)
        assert torch.equal(mask, left_aligned if is_pruned else encoded.kept)
        assert mask.any(0).all() or not is_pruned  # no column is padding alone
        positions = output.encoder_positions
        assert positions.shape == mask.shape and positions.dtype == torch.int32 and not positions[~mask].any()
        assert positions[mask].tolist() == expected_positions(batch["attention_mask"], encoded, pruning).tolist()
        if "labels" in arguments:
            assert relative_error(output.loss, expected.loss) < 1e-9
            assert output.prediction_loss is None


def test_a_model_stamped_in_evaluation_is_in_evaluation():
    pruning = PRUNINGS["train_alone"]
    host = tiny_t5(torch.float64, **FEW_BUCKETS).eval()
    model = stamped(host, pruning)
    inputs = inputs_of(batch_of("right"))
    encoded = encode_padded(host, **inputs, pruning=pruning)
    output = model(**inputs, decoder_input_ids=torch.zeros(len(LENGTHS), 1, dtype=torch.long))
    assert_states_are(output.encoder_last_hidden_state, output.encoder_attention_mask, encoded)


def test_a_history_does_not_depend_on_its_neighbours():
    """Nor do its positions, where another one has holes."""
    _, model = evaluating(PRUNINGS["paper"])
    inputs = dict(
        input_ids=torch.randint(1, VOCAB_SIZE, (2, 8)),
        attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1]]),
        decoder_input_ids=torch.zeros(2, 1, dtype=torch.long),
    )
    alone, both = (model(**{name: x[:users] for name, x in inputs.items()}) for users in (1, 2))
    assert relative_error(both.logits[0], alone.logits[0]) < 1e-9
    assert both.encoder_positions[0, :2].tolist() == alone.encoder_positions[0].tolist()


@pytest.mark.parametrize("padding", BATCHES)
@pytest.mark.parametrize("name", ["paper", "two_points", "items_two_points", "protect_both", "compact", None])
def test_encoder_model(name, padding):
    pruning = PRUNINGS.get(name)
    torch.manual_seed(0)
    host = T5EncoderModel(tiny_t5(**FEW_BUCKETS).encoder.config).double().train()
    host.encoder.set_attn_implementation("eager")
    model = stamped(host, pruning)
    inputs = inputs_of(batch_of(padding, pruning))
    encoded = encode_padded(host, **inputs, pruning=pruning)
    output = model(**inputs)
    assert_states_are(output.last_hidden_state, output.attention_mask, encoded)
    assert torch.equal(model(**inputs, return_dict=False)[0], output.last_hidden_state)
    reward = torch.randn_like(encoded.states)[encoded.kept]  # of each state that is left
    expected_loss = (encoded.states[encoded.kept] * reward).sum()
    loss = (output.last_hidden_state[output.attention_mask] * reward).sum()
    assert_same_training_step(host, expected_loss, model, loss)


# Generation: items of a made catalogue, three codes and one that tells items alike apart.

CATALOGUE = sorted({(1 + i % 3, 10 + i % 4, 20 + i % 2, 30 + i % 5) for i in range(0, 90, 4)})
SEARCHES = {
    "greedy": dict(num_beams=1, num_return_sequences=1),
    "beams_2": dict(num_beams=2, num_return_sequences=1),
    "beams_5": dict(num_beams=5, num_return_sequences=3),
    "beams_8": dict(num_beams=8, num_return_sequences=8, length_penalty=0.5),
}


def codes_of_catalogue(_, decoder_ids: Tensor) -> list[int]:
    """With which codes an item goes on after these, the start token first."""
    prefix = tuple(decoder_ids[1:].tolist())
    return sorted({item[len(prefix)] for item in CATALOGUE if item[: len(prefix)] == prefix})


def codes_of_vocabulary(_, decoder_ids: Tensor) -> list[int]:
    return list(range(VOCAB_SIZE))


def search(model, inputs: dict, allowed, **options):
    return model.generate(
        **inputs,
        prefix_allowed_tokens_fn=allowed,
        max_new_tokens=LEVELS,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )


def search_from_encoded(host, encoded: Encoded, allowed, **options):
    """The untouched host's own search over what is left of the histories."""
    states = BaseModelOutput(last_hidden_state=encoded.states.clone())
    return search(host, dict(encoder_outputs=states, attention_mask=encoded.kept.long()), allowed, **options)


def obvious_beam_search(host, encoded: Encoded, allowed, num_beams: int) -> tuple[Tensor, Tensor]:
    """(log-probabilities `[B, num_beams]`, decoder ids), best first: without a cache, history by history."""
    found = []
    for states, kept in zip(encoded.states, encoded.kept, strict=True):
        scores, ids = torch.zeros(1), torch.zeros(1, 1, dtype=torch.long)
        for _ in range(LEVELS):
            one = Encoded(states.expand(len(ids), -1, -1), kept.expand(len(ids), -1))
            next_scores = decode_padded(host, one, decoder_input_ids=ids).logits[:, -1].log_softmax(-1)
            longer = torch.full_like(next_scores, -math.inf)
            for beam, prefix in enumerate(ids):
                codes = allowed(None, prefix)
                longer[beam, codes] = scores[beam] + next_scores[beam, codes]
            scores, best = longer.flatten().topk(min(num_beams, int(longer.isfinite().sum())))
            ids = torch.cat([ids[best // VOCAB_SIZE], best[:, None] % VOCAB_SIZE], 1)
        found.append((scores, ids))
    return tuple(map(torch.stack, zip(*found, strict=True)))


@pytest.mark.parametrize("allowed", [codes_of_vocabulary, codes_of_catalogue], ids=["free", "catalogue"])
@pytest.mark.parametrize(
    ("name", "padding", "searching"),
    [("two_points", "holes", searching) for searching in SEARCHES]
    + [(name, "left", "beams_5") for name in ("paper", "protect_both", "compact", "train_alone", None)]
    + [("paper", "empty", "beams_2"), ("paper", "no_mask", "beams_8"), ("items", "right", "beams_5")],
)
@torch.no_grad()
def test_generation_finds_the_same_beams(name, padding, searching, allowed):
    pruning, options = PRUNINGS.get(name), SEARCHES[searching]
    host, model = evaluating(pruning, attention="sdpa")  # T5's default
    inputs = inputs_of(batch_of(padding, pruning))
    encoded = encode_padded(host, **inputs, pruning=pruning)
    expected = search_from_encoded(host, encoded, allowed, **options)
    found = search(model, inputs, allowed, **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for got, want in zip(found.scores, expected.scores, strict=True):
        allowed_now = want.isfinite()
        assert torch.equal(got.isfinite(), allowed_now)
        assert relative_error(got[allowed_now], want[allowed_now]) < SCORES_BOUND

    scores, ids = (
        x[:, : options["num_return_sequences"]].flatten(0, 1)
        for x in obvious_beam_search(host, encoded, allowed, options["num_beams"])
    )
    assert found.sequences.tolist() == ids.tolist()
    if options["num_beams"] > 1:
        assert relative_error(found.sequences_scores, expected.sequences_scores) < SCORES_BOUND
        assert (
            relative_error(found.sequences_scores, scores / LEVELS ** options.get("length_penalty", 1.0)) < SCORES_BOUND
        )


@torch.no_grad()
def test_a_wide_constrained_search_ranks_the_whole_catalogue():
    """As many beams as items: the order is that of the items' log-probabilities by teacher forcing."""
    pruning = PRUNINGS["paper"]
    host, model = evaluating(pruning)
    inputs = inputs_of(batch_of("right"))
    encoded = encode_padded(host, **inputs, pruning=pruning)
    items = torch.tensor(CATALOGUE)
    found = search(model, inputs, codes_of_catalogue, num_beams=len(items), num_return_sequences=len(items))
    found_scores, found_ids = (x.unflatten(0, (len(LENGTHS), -1)) for x in (found.sequences_scores, found.sequences))
    for user in range(len(LENGTHS)):
        one = Encoded(*(x[user].expand(len(items), *x.shape[1:]) for x in encoded))
        codes = decode_padded(host, one, labels=items).logits.log_softmax(-1).gather(-1, items[..., None])
        ranked = codes.sum((1, 2)).sort(descending=True)
        assert found_ids[user, :, 1:].tolist() == items[ranked.indices].tolist()
        assert relative_error(found_scores[user], ranked.values / LEVELS) < SCORES_BOUND


@torch.no_grad()
def test_generation_with_an_end_token_and_from_encoded_histories():
    pruning = PRUNINGS["two_points"]
    host, model = evaluating(pruning, eos_token_id=7, attention="sdpa")
    for each in (host, model):
        each.lm_head.weight[7] *= 3  # ends are likely
    inputs = inputs_of(batch_of("left"))
    encoded = encode_padded(host, **inputs, pruning=pruning)
    options = dict(allowed=None, num_beams=6, num_return_sequences=4)
    expected = search_from_encoded(host, encoded, **options)
    assert 0 < (expected.sequences == 7).any(1).sum() < len(expected.sequences)
    packed = PackedBatch.from_padded(inputs["input_ids"], inputs["attention_mask"])
    for given in (
        inputs,
        dict(encoder_outputs=model.encoder(**inputs)),
        dict(encoder_outputs=model.encoder(**inputs), attention_mask=inputs["attention_mask"]),
        dict(encoder_outputs=model.encoder(packed_inputs=packed).padded()),
    ):
        found = search(model, given, **options)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert relative_error(found.sequences_scores, expected.sequences_scores) < SCORES_BOUND


@pytest.mark.parametrize("name", ["paper", "nothing_stays"])
@torch.no_grad()
def test_generation_where_no_history_has_a_token_left(name):
    pruning = PRUNINGS[name]
    host, model = evaluating(pruning, attention="sdpa")
    inputs = inputs_of(batch_of("right"))
    if name == "paper":
        inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    encoded = encode_padded(host, **inputs, pruning=pruning)
    assert not encoded.kept.any()
    scores, ids = (x.flatten(0, 1) for x in obvious_beam_search(host, encoded, codes_of_vocabulary, 2))
    found = search(model, inputs, None, num_beams=2, num_return_sequences=2)
    assert found.sequences.tolist() == ids.tolist()
    assert relative_error(found.sequences_scores, scores / LEVELS) < SCORES_BOUND


# Multi-step prediction. Level l of an item has the codes 1 + 15 l to 15 + 15 l.

CODES = tuple((1 + 15 * level, 16 + 15 * level) for level in range(LEVELS))
PREDICTIONS = {
    "linear": PredictionConfig(head="linear"),
    "residual": PredictionConfig(head="residual", num_steps=2, step_weights=(1.0, 0.3)),
    "transformer": PredictionConfig(head="transformer", num_attention_heads=3, lambda_=0.7),
    "own": PredictionConfig(unembedding="own"),
    "ranges": PredictionConfig(vocab_ranges=CODES),
    "own_ranges": PredictionConfig(unembedding="own", vocab_ranges=CODES, lambda_=LinearDecay(0.5, 0.1, 8)),
    "tokens": PredictionConfig(unit="token", num_steps=5, step_weights=(1.0, 0.8, 0.6, 0.4, 0.2)),
    "tokens_own": PredictionConfig(unit="token", unembedding="own", head="transformer", num_attention_heads=1),
}
TRAINING_STEP = 3


def future_batch(items: int = 1) -> dict[str, Tensor]:
    """A padded batch whose labels are so many items, and future_ids after them, of -100 from different items on."""
    batch = padded_batch(LENGTHS)
    num_future = (0, 1, 2, 4, 3)  # items
    codes = torch.randint(15, (len(LENGTHS), items + max(num_future), LEVELS)) + torch.tensor(CODES)[:, 0]
    batch["labels"], batch["future_ids"] = codes[:, :items].flatten(1), codes[:, items:].flatten(1).clone()
    for row, number in zip(batch["future_ids"], num_future, strict=True):
        row[LEVELS * number :] = -100
    return batch


def randomize(heads: torch.nn.Module) -> None:
    torch.manual_seed(5)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def apply_head(head: torch.nn.Module, kind: str, states: Tensor) -> Tensor:
    """A head written out, on one user's decoder states `[N, d_model]`."""
    if kind == "linear":
        return states @ head.weight.T + head.bias
    if kind == "residual":
        return states + F.silu(states @ head.linear.weight.T + head.linear.bias)

    def normalized(x: Tensor, norm: torch.nn.RMSNorm) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    qkv = normalized(states, head.attention_norm) @ head.query_key_value.weight.T
    q, k, v = (x.unflatten(1, (head.num_attention_heads, -1)).transpose(0, 1) for x in qkv.chunk(3, dim=1))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    states = states + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ head.attention_out.weight.T
    inner = F.silu(normalized(states, head.mlp_norm) @ head.mlp_in.weight.T)
    return states + inner @ head.mlp_out.weight.T


def written_out_prediction_loss(
    host: T5ForConditionalGeneration,
    states: Tensor,
    batch: dict[str, Tensor],
    config: PredictionConfig,
    decoder_mask: Tensor,
) -> Tensor:
    """`lambda * sum_k w_k * mean over levels of (mean over valid targets of the cross-entropy)`, target by target."""
    heads = host.stamp_prediction
    unembedding = heads.unembedding if config.unembedding == "own" else host.lm_head.weight
    num_labels = batch["labels"].shape[1]
    tokens = []  # of each user, the future right behind the last item that has a label
    for labels, future in zip(batch["labels"].tolist(), batch["future_ids"].tolist(), strict=True):
        while labels and set(labels[-LEVELS:]) == {-100}:
            del labels[-LEVELS:]
        tokens.append(labels + future)
    stride = LEVELS if config.unit == "item" else 1
    loss = 0.0
    for step in range(1, config.num_steps + 1):
        losses = defaultdict(list)  # by level
        for user_states, user_tokens, visible in zip(states, tokens, decoder_mask.tolist(), strict=True):
            logits = apply_head(heads.heads[step - 1], config.head, user_states) @ unembedding.T
            for place in range(num_labels):
                ahead = place + step * stride
                if not visible[place] or ahead >= len(user_tokens) or user_tokens[ahead] == -100:
                    continue
                start, end = (0, VOCAB_SIZE) if config.vocab_ranges is None else CODES[place % LEVELS]
                probability = logits[place, start:end].softmax(-1)[user_tokens[ahead] - start]
                losses[place % LEVELS].append(-probability.log())
        weight = 1.0 if config.step_weights is None else config.step_weights[step - 1]
        loss = loss + weight * sum(sum(of_level) / len(of_level) for of_level in losses.values()) / LEVELS
    decays = isinstance(config.lambda_, LinearDecay)
    return loss * (0.5 - (0.5 - 0.1) * TRAINING_STEP / 8 if decays else config.lambda_)


def host_with_heads(model: T5ForConditionalGeneration, **config) -> T5ForConditionalGeneration:
    """The untouched host of a stamped model, with a copy of its heads as the keeper of their parameters."""
    host = tiny_t5(torch.float64, **FEW_BUCKETS, **config)
    host.stamp_prediction = copy.deepcopy(model.stamp_prediction)
    return host


def predicting(config: PredictionConfig, pruning: PruningConfig | None = None, **host_config):
    """(host with heads, stamped model), whose heads are random and no longer the identity."""
    model = stamped(tiny_t5(torch.float64, **FEW_BUCKETS, **host_config), pruning, config)
    randomize(model.stamp_prediction)
    return host_with_heads(model, **host_config), model


@pytest.mark.parametrize("shape", ["one_item", "two_items", "one_or_two_items"])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_prediction_loss_equals_the_written_out_formula(name, shape):
    config, pruning = PREDICTIONS[name], PRUNINGS["paper"]
    host_config = V1_1 if name == "ranges" else {}
    host, model = predicting(config, pruning, **host_config)
    batch = future_batch(1 if shape == "one_item" else 2)
    if shape == "one_or_two_items":  # the second one of some is padding
        batch["labels"][1::2, LEVELS:] = -100
    decoder_mask = batch["labels"] != -100
    encoded = encode_padded(host, **inputs_of(batch), pruning=pruning)
    decoded = host.decoder(
        input_ids=host._shift_right(batch["labels"]),
        attention_mask=decoder_mask.long(),
        encoder_hidden_states=encoded.states,
        encoder_attention_mask=encoded.kept.long(),
    )
    states = decoded.last_hidden_state * (1.0 if host_config else host.config.d_model**-0.5)
    next_token_loss = F.cross_entropy(host.lm_head(states).flatten(0, 1), batch["labels"].flatten())
    prediction_loss = written_out_prediction_loss(host, states, batch, config, decoder_mask)

    mask = dict(decoder_attention_mask=decoder_mask) if shape == "one_or_two_items" else {}
    output = model(**batch, **mask, training_step=TRAINING_STEP)
    assert relative_error(output.next_token_loss, next_token_loss) < 1e-9
    assert relative_error(output.prediction_loss, prediction_loss) < 1e-9
    assert not output.next_token_loss.requires_grad and not output.prediction_loss.requires_grad
    assert_same_training_step(host, next_token_loss + prediction_loss, model, output.loss)


def halves(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The users in two parts of different sizes; in the first nobody has a second item after the next."""
    return [{name: x[users] for name, x in batch.items()} for users in (slice(2), slice(2, None))]


def losses_of_parts_and_whole(config: PredictionConfig, batch: dict[str, Tensor]):
    """(model, outputs of the two halves with the counts of both, output of the whole batch by itself)."""
    _, model = predicting(config, PRUNINGS["two_points"])
    counts = [global_target_counts(half["labels"], half["future_ids"], config) for half in halves(batch)]
    counts = {name: sum(of_half[name] for of_half in counts) for name in counts[0]}
    parts = [model(**half, **counts, training_step=TRAINING_STEP) for half in halves(batch)]
    return model, parts, model(**batch, training_step=TRAINING_STEP)


@pytest.mark.parametrize("items", [1, 2], ids=["one_item", "two_items"])
@pytest.mark.parametrize("name", ["residual", "own_ranges", "tokens", "tokens_own"])
def test_losses_of_parts_add_up_to_the_whole(name, items):
    batch = future_batch(items)
    batch["labels"][3, 1] = batch["labels"][0] = -100
    model, parts, whole = losses_of_parts_and_whole(PREDICTIONS[name], batch)
    for loss in ("loss", "next_token_loss", "prediction_loss"):
        assert relative_error(sum(getattr(part, loss) for part in parts), getattr(whole, loss)) < 1e-9
    expected, got = gradients(model, whole.loss), gradients(model, sum(part.loss for part in parts))
    assert expected.keys() == got.keys() == dict(model.named_parameters()).keys()
    for parameter in expected:
        assert relative_error(got[parameter], expected[parameter]) < 1e-9, parameter


def test_a_part_may_have_no_targets_at_all():
    batch = future_batch()
    for targets in ("labels", "future_ids"):
        batch[targets][:2] = -100
    model, (without, other), whole = losses_of_parts_and_whole(PREDICTIONS["residual"], batch)
    assert without.loss == without.next_token_loss == without.prediction_loss == 0
    assert relative_error(other.loss, whole.loss) < 1e-9
    assert not any(gradient.any() for gradient in gradients(model, without.loss).values())


def test_with_num_items_alone_parts_weigh_by_their_labels():
    """What Hugging Face's Trainer gives: the auxiliary means are then those of the part."""
    _, model = predicting(PREDICTIONS["residual"])
    batch = future_batch()
    batch["labels"][0, 2:] = -100
    numbers = [int((half["labels"] != -100).sum()) for half in halves(batch)]
    assert numbers == [6, 12]
    whole = model(**batch)
    for num_items in (18, torch.tensor(18)):
        parts = [model(**half, num_items_in_batch=num_items) for half in halves(batch)]
        assert relative_error(sum(part.next_token_loss for part in parts), whole.next_token_loss) < 1e-9
        for number, part, half in zip(numbers, parts, halves(batch), strict=True):
            by_itself = model(**half)
            assert relative_error(part.prediction_loss, number / 18 * by_itself.prediction_loss) < 1e-9
            assert relative_error(part.loss, part.next_token_loss + part.prediction_loss) < 1e-9


def test_target_counts_by_hand():
    labels = torch.tensor([[11, 21, 12, 22], [11, 21, 12, -100], [-100] * 4])
    future_ids = torch.tensor([[13, 23, 14], [13, 23, -100], [-100] * 3])
    counts = global_target_counts(labels)
    assert counts.keys() == {"num_items_in_batch"} and counts["num_items_in_batch"] == 7

    # Step 1: first codes 12, 13 and 12, 13; second codes 22, 23. Step 2: 13, 14 and 13; 23 and 23. Step 3: 14. What has
    # no label has no target: not the 23 that is one item behind the second user's missing code.
    counts = global_target_counts(labels, future_ids, PredictionConfig(num_steps=3, codes_per_item=2))
    assert counts["num_items_in_batch"] == 7
    assert counts["num_future_targets"].tolist() == [[4, 2], [3, 2], [1, 0]]

    # Step 1, from places of first codes: 21, 22 and 21; of second ones: 12, 13 and 12. Step 2 as step 1 above.
    counts = global_target_counts(labels, future_ids, PredictionConfig(num_steps=2, codes_per_item=2, unit="token"))
    assert counts["num_future_targets"].tolist() == [[3, 3], [4, 2]]
    assert counts["num_future_targets"].dtype == counts["num_items_in_batch"].dtype == torch.int64


def test_target_counts_need_future_ids_and_prediction_together():
    labels = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="future_ids and prediction go together, got None for prediction"):
        global_target_counts(labels, labels)
    with pytest.raises(ValueError, match="future_ids and prediction go together, got None for future_ids"):
        global_target_counts(labels, prediction=PredictionConfig())


def test_counts_of_a_batch_change_nothing_beside_a_decoder_mask():
    config = PREDICTIONS["residual"]
    _, model = predicting(config)
    batch = future_batch(2)
    batch["labels"][:3, LEVELS:] = -100
    decoder_attention_mask = batch["labels"] != -100
    counts = global_target_counts(batch["labels"], batch["future_ids"], config)
    expected, got = (model(**batch, **given, decoder_attention_mask=decoder_attention_mask) for given in ({}, counts))
    assert relative_error(got.next_token_loss, expected.next_token_loss) < 1e-9
    assert relative_error(got.prediction_loss, expected.prediction_loss) < 1e-9
