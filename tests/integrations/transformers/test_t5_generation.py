"""The beams of pruned T5s, against the base model's own search and a search written out, see padded_stamp.py."""

import math
from dataclasses import replace

import pytest
import torch
from closeness import relative_error
from padded_stamp import (
    LENGTHS,
    PRUNINGS,
    Encoded,
    batch_of,
    decode_padded,
    encode_padded,
    evaluating,
    inputs_of,
)
from t5_cases import LEVELS, VOCAB_SIZE
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from stamp_kernels.packed import PackedBatch

SCORES_BOUND = 1e-6  # Hugging Face computes the scores of a search in fp32, whatever the model's dtype

# Items of an invented catalogue: three codes, and a fourth that separates items with equal codes.
CATALOGUE = sorted({(1 + i % 3, 10 + i % 4, 20 + i % 2, 30 + i % 5) for i in range(0, 90, 4)})
SEARCHES = {
    "greedy": dict(num_beams=1, num_return_sequences=1),
    "beams_2": dict(num_beams=2, num_return_sequences=1),
    "beams_5": dict(num_beams=5, num_return_sequences=3),
    "beams_8": dict(num_beams=8, num_return_sequences=8, length_penalty=0.5),
}


def codes_of_catalogue(_, decoder_ids: Tensor) -> list[int]:
    """The codes that may follow decoder_ids, whose first entry is the start token."""
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


def search_from_encoded(base, encoded: Encoded, allowed, **options):
    """The base model's own search over the kept tokens of the histories."""
    states = BaseModelOutput(last_hidden_state=encoded.states.clone())
    return search(base, dict(encoder_outputs=states, attention_mask=encoded.kept.long()), allowed, **options)


def obvious_beam_search(base, encoded: Encoded, allowed, num_beams: int) -> tuple[Tensor, Tensor]:
    """(log-probabilities `[B, num_beams]`, decoder ids), best first, without a cache, one history at a time."""
    found = []
    for states, kept in zip(encoded.states, encoded.kept, strict=True):
        scores, ids = torch.zeros(1), torch.zeros(1, 1, dtype=torch.long)
        for _ in range(LEVELS):
            one = Encoded(states.expand(len(ids), -1, -1), kept.expand(len(ids), -1))
            next_scores = decode_padded(base, one, decoder_input_ids=ids).logits[:, -1].log_softmax(-1)
            longer = torch.full_like(next_scores, -math.inf)
            for beam, prefix in enumerate(ids):
                codes = allowed(None, prefix)
                longer[beam, codes] = scores[beam] + next_scores[beam, codes]
            scores, best = longer.flatten().topk(min(num_beams, int(longer.isfinite().sum())))
            ids = torch.cat([ids[best // VOCAB_SIZE], best[:, None] % VOCAB_SIZE], 1)
        found.append((scores, ids))
    return tuple(map(torch.stack, zip(*found, strict=True)))


@pytest.mark.parametrize(
    ("name", "padding", "searching", "allowed"),
    [
        ("two_points", "holes", "greedy", codes_of_vocabulary),
        ("two_points", "holes", "beams_2", codes_of_vocabulary),
        ("two_points", "holes", "beams_5", codes_of_catalogue),
        ("two_points", "holes", "beams_8", codes_of_catalogue),
        ("paper", "left", "beams_5", codes_of_catalogue),
        ("protect_both", "left", "beams_5", codes_of_vocabulary),
        ("compact", "left", "beams_5", codes_of_catalogue),
        ("only_training", "left", "greedy", codes_of_catalogue),
        (None, "left", "beams_5", codes_of_vocabulary),
        ("paper", "empty", "beams_2", codes_of_catalogue),
        ("paper", "no_mask", "beams_8", codes_of_vocabulary),
        ("items", "right", "beams_5", codes_of_catalogue),
    ],
)
@torch.no_grad()
def test_generation_finds_the_same_beams(name, padding, searching, allowed):
    pruning, options = PRUNINGS.get(name), SEARCHES[searching]
    base, model = evaluating(pruning, attention="sdpa")  # T5's default
    inputs = inputs_of(batch_of(padding, pruning))
    encoded = encode_padded(base, **inputs, pruning=pruning)
    expected = search_from_encoded(base, encoded, allowed, **options)
    found = search(model, inputs, allowed, **options)
    assert found.sequences.tolist() == expected.sequences.tolist()
    for got, want in zip(found.scores, expected.scores, strict=True):
        allowed_now = want.isfinite()
        assert torch.equal(got.isfinite(), allowed_now)
        assert relative_error(got[allowed_now], want[allowed_now]) < SCORES_BOUND

    scores, ids = (
        x[:, : options["num_return_sequences"]].flatten(0, 1)
        for x in obvious_beam_search(base, encoded, allowed, options["num_beams"])
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
    base, model = evaluating(pruning)
    inputs = inputs_of(batch_of("right"))
    encoded = encode_padded(base, **inputs, pruning=pruning)
    items = torch.tensor(CATALOGUE)
    found = search(model, inputs, codes_of_catalogue, num_beams=len(items), num_return_sequences=len(items))
    found_scores, found_ids = (x.unflatten(0, (len(LENGTHS), -1)) for x in (found.sequences_scores, found.sequences))
    for user in range(len(LENGTHS)):
        one = Encoded(*(x[user].expand(len(items), *x.shape[1:]) for x in encoded))
        codes = decode_padded(base, one, labels=items).logits.log_softmax(-1).gather(-1, items[..., None])
        ranked = codes.sum((1, 2)).sort(descending=True)
        assert found_ids[user, :, 1:].tolist() == items[ranked.indices].tolist()
        assert relative_error(found_scores[user], ranked.values / LEVELS) < SCORES_BOUND


@torch.no_grad()
def test_generation_with_end_token_from_encoded_histories():
    pruning = PRUNINGS["two_points"]
    base, model = evaluating(pruning, eos_token_id=7, attention="sdpa")
    for each in (base, model):
        each.lm_head.weight[7] *= 3  # so that searches end early
    inputs = inputs_of(batch_of("left"))
    encoded = encode_padded(base, **inputs, pruning=pruning)
    options = dict(allowed=None, num_beams=6, num_return_sequences=4)
    expected = search_from_encoded(base, encoded, **options)
    assert 0 < (expected.sequences == 7).any(1).sum() < len(expected.sequences)
    packed = PackedBatch.from_padded(inputs["input_ids"], inputs["attention_mask"])
    for given in (
        inputs,
        dict(encoder_outputs=model.encoder(**inputs)),
        dict(encoder_outputs=model.encoder(**inputs), attention_mask=inputs["attention_mask"]),
        dict(encoder_outputs=model.encoder(packed_inputs=packed).padded()),
        dict(encoder_outputs=model.encoder(packed_inputs=packed)),
        dict(packed_inputs=packed),
        dict(packed_inputs=replace(packed, values=model.shared(packed.values))),
    ):
        found = search(model, given, **options)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert relative_error(found.sequences_scores, expected.sequences_scores) < SCORES_BOUND


def test_generation_encodes_packed_histories_once():
    """Without gradients, also if the caller records them."""
    _, model = evaluating(PRUNINGS["paper"])
    inputs = inputs_of(batch_of("left"))
    packed = PackedBatch.from_padded(inputs["input_ids"], inputs["attention_mask"])
    states = []
    model.encoder.register_forward_hook(lambda module, args, output: states.append(output.packed.values))
    found = model.generate(packed_inputs=packed, max_new_tokens=LEVELS, num_beams=2)
    assert found.shape == (len(LENGTHS), 1 + LEVELS)
    assert len(states) == 1 and not states[0].requires_grad


@pytest.mark.parametrize("other", ["inputs", "input_ids", "attention_mask", "inputs_embeds", "encoder_outputs"])
def test_generation_refuses_other_inputs_beside_packed(other):
    _, model = evaluating(None)
    packed = PackedBatch(torch.arange(3), torch.tensor([0, 3], dtype=torch.int32), 3)
    message = f"exactly one of packed_inputs, inputs, .* must be given, got packed_inputs, {other}$"
    with pytest.raises(ValueError, match=message):
        model.generate(packed_inputs=packed, **{other: torch.ones(1, 3, dtype=torch.int64)})
    if other == "inputs":
        with pytest.raises(ValueError, match=message):
            model.generate(torch.ones(1, 3, dtype=torch.int64), packed_inputs=packed)


@pytest.mark.parametrize("name", ["paper", "nothing_kept"])
@torch.no_grad()
def test_generation_without_any_kept_token(name):
    pruning = PRUNINGS[name]
    base, model = evaluating(pruning, attention="sdpa")
    inputs = inputs_of(batch_of("right"))
    if name == "paper":
        inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    encoded = encode_padded(base, **inputs, pruning=pruning)
    assert not encoded.kept.any()
    scores, ids = (x.flatten(0, 1) for x in obvious_beam_search(base, encoded, codes_of_vocabulary, 2))
    found = search(model, inputs, None, num_beams=2, num_return_sequences=2)
    assert found.sequences.tolist() == ids.tolist()
    assert relative_error(found.sequences_scores, scores / LEVELS) < SCORES_BOUND
