"""Pruned T5s in training and in evaluation, against STAMP written out on padded batches, see padded_stamp.py."""

import pytest
import torch
from closeness import relative_error
from padded_stamp import (
    BATCHES,
    FEW_BUCKETS,
    LENGTHS,
    PRUNINGS,
    V1_1,
    assert_states_are,
    batch_of,
    decode_padded,
    encode_padded,
    evaluating,
    expected_positions,
    in_turn,
    inputs_of,
    stamped,
)
from t5_cases import LENGTHS as LONG_LENGTHS
from t5_cases import VOCAB_SIZE, assert_same_training_step, padded_batch, tiny_t5
from transformers import T5EncoderModel

from stamp_kernels.integrations.transformers import PruningConfig
from stamp_kernels.packed import PackedBatch


@pytest.mark.parametrize(("name", "padding"), in_turn(PRUNINGS, BATCHES, each=2))
def test_training_equals_masking_in_the_base_model(name, padding):
    pruning = PRUNINGS[name]
    base = tiny_t5(torch.float64, **FEW_BUCKETS)
    model = stamped(base, pruning)
    batch = batch_of(padding, pruning)
    encoded = encode_padded(base, **inputs_of(batch), pruning=pruning)
    expected = decode_padded(base, encoded, labels=batch["labels"])

    output = model(**batch, skip_logits=False)
    assert relative_error(output.logits, expected.logits) < 1e-9
    assert relative_error(output.loss, expected.loss) < 1e-9
    assert_states_are(output.encoder_last_hidden_state, output.encoder_attention_mask, encoded)
    assert_same_training_step(base, expected.loss, model, model(**batch).loss)


@pytest.mark.parametrize(
    ("padding_side", "dtype", "config"),
    [
        ("right", torch.float64, {}),
        ("left", torch.float64, V1_1),
        ("left", torch.float32, {}),
        ("right", torch.float32, V1_1),
    ],
    ids=["right-float64-t5", "left-float64-v1.1", "left-float32-t5", "right-float32-v1.1"],
)
def test_long_histories_in_both_kinds_of_t5(padding_side, dtype, config):
    pruning = PruningConfig(((1, 0.5), (2, 1 / 3)))
    base = tiny_t5(dtype, **config)
    model = stamped(base, pruning)
    batch = padded_batch(LONG_LENGTHS, padding_side=padding_side)
    batch["labels"][0, 1:] = batch["labels"][2] = -100
    encoded = encode_padded(base, **inputs_of(batch), pruning=pruning)
    expected = decode_padded(base, encoded, labels=batch["labels"])
    with_logits = model(**batch, skip_logits=False)
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    assert relative_error(with_logits.logits, expected.logits) < bound
    assert_states_are(with_logits.encoder_last_hidden_state, with_logits.encoder_attention_mask, encoded, bound)
    assert_same_training_step(base, expected.loss, model, model(**batch).loss)


@pytest.mark.parametrize("mask", ["1110", "0111", "1011", "0101"])
def test_decoder_mask(mask):
    """The mask of one user. Hidden positions have no label, because the base model would train on them."""
    pruning = PRUNINGS["two_points"]
    base = tiny_t5(torch.float64, **FEW_BUCKETS)
    model = stamped(base, pruning)
    batch = batch_of("right")
    decoder_attention_mask = torch.ones_like(batch["labels"])
    decoder_attention_mask[2] = torch.tensor([int(visible) for visible in mask])
    decoder_input_ids = base._shift_right(batch["labels"])
    batch["labels"] = batch["labels"].masked_fill(decoder_attention_mask == 0, -100)
    encoded = encode_padded(base, **inputs_of(batch), pruning=pruning)
    arguments = dict(decoder_input_ids=decoder_input_ids, decoder_attention_mask=decoder_attention_mask)
    expected_loss = decode_padded(base, encoded, labels=batch["labels"], **arguments).loss
    assert_same_training_step(base, expected_loss, model, model(**batch, **arguments).loss)


@pytest.mark.parametrize("given", ["inputs_embeds", "packed_inputs", "encoder_outputs", "packed_encoder_outputs"])
def test_inputs_in_other_forms(given):
    pruning = PRUNINGS["two_points"]
    base = tiny_t5(torch.float64, **FEW_BUCKETS)
    model = stamped(base, pruning)
    batch = batch_of("left")
    ids, mask, labels = batch.values()
    encoded = encode_padded(base, ids, mask, pruning)
    packed = PackedBatch.from_padded(ids, mask)
    arguments = {
        "inputs_embeds": lambda: dict(inputs_embeds=model.shared(ids), attention_mask=mask),
        "packed_inputs": lambda: dict(packed_inputs=packed),
        "encoder_outputs": lambda: dict(encoder_outputs=model.encoder(ids, mask), attention_mask=mask),
        "packed_encoder_outputs": lambda: dict(encoder_outputs=model.encoder(packed_inputs=packed)),
    }[given]()
    expected_loss = decode_padded(base, encoded, labels=labels).loss
    assert_same_training_step(base, expected_loss, model, model(**arguments, labels=labels).loss)


@pytest.mark.parametrize(
    ("name", "padding"),
    in_turn(
        ["paper", "two_points", "items", "protect_both", "user_and_eos", "compact", "only_training", None],
        ["right", "left", "holes", "no_mask"],
        each=2,
    ),
)
def test_evaluation(name, padding):
    """Logits with and without labels, and the places and positions of the states."""
    pruning = PRUNINGS.get(name)
    base, model = evaluating(pruning)
    batch = batch_of(padding, pruning)
    encoded = encode_padded(base, **inputs_of(batch), pruning=pruning)
    everything = encode_padded(base, **inputs_of(batch), pruning=None)
    is_pruned = name not in ("only_training", None)
    assert (encoded.kept.sum() < everything.kept.sum()) == is_pruned

    expected = decode_padded(base, encoded, labels=batch["labels"])
    for arguments in (
        dict(labels=batch["labels"]),
        dict(decoder_input_ids=base._shift_right(batch["labels"])),
    ):
        output = model(**inputs_of(batch), **arguments)
        assert relative_error(output.logits, expected.logits) < 1e-9
        mask = output.encoder_attention_mask
        assert_states_are(output.encoder_last_hidden_state, mask, encoded)
        left_aligned = torch.arange(mask.shape[1]) < encoded.kept.sum(1, keepdim=True)
        assert torch.equal(mask, left_aligned if is_pruned else encoded.kept)
        assert mask.any(0).all() or not is_pruned  # no column has only padding
        positions = output.encoder_positions
        assert positions.shape == mask.shape and positions.dtype == torch.int32 and not positions[~mask].any()
        assert positions[mask].tolist() == expected_positions(batch["attention_mask"], encoded, pruning).tolist()
        if "labels" in arguments:
            assert relative_error(output.loss, expected.loss) < 1e-9
            assert output.prediction_loss is None


@pytest.mark.parametrize("form", ["input_ids", "inputs_embeds", "left"])
def test_padded_budget_is_a_share_of_the_padded_length(form):
    """ceil(40 / 3) of up to 30 tokens, then ceil(14 / 2) of the 14 columns that are left."""
    pruning = PruningConfig(((1, 1 / 3), (2, 0.5)), budget="max_seqlen")
    model = stamped(tiny_t5(), pruning)
    ids, mask, labels = padded_batch(LENGTHS).values()
    ids, mask = torch.cat([ids, ids[:, :10]], 1), torch.cat([mask, torch.zeros_like(mask[:, :10])], 1)
    if form == "left":
        ids, mask = ids.flip(1), mask.flip(1)
    inputs = dict(inputs_embeds=model.shared(ids)) if form == "inputs_embeds" else dict(input_ids=ids)
    kept = torch.tensor(LENGTHS).clamp(max=7)
    assert torch.equal(model.encoder(**inputs, attention_mask=mask).attention_mask.sum(1), kept)
    assert torch.equal(model(**inputs, attention_mask=mask, labels=labels).encoder_packed.cu_seqlens.diff(), kept)
    # The length of packed inputs is their max_seqlen: here the longest history, ceil(ceil(30 / 3) / 2).
    packed = PackedBatch.from_padded(ids, mask)
    assert torch.equal(model.encoder(packed_inputs=packed).packed.cu_seqlens.diff(), kept.clamp(max=5))


def test_model_stamped_in_evaluation_stays_in_evaluation():
    pruning = PRUNINGS["only_training"]
    base = tiny_t5(torch.float64, **FEW_BUCKETS).eval()
    model = stamped(base, pruning)
    inputs = inputs_of(batch_of("right"))
    encoded = encode_padded(base, **inputs, pruning=pruning)
    output = model(**inputs, decoder_input_ids=torch.zeros(len(LENGTHS), 1, dtype=torch.long))
    assert_states_are(output.encoder_last_hidden_state, output.encoder_attention_mask, encoded)


def test_histories_do_not_depend_on_each_other():
    """Neither do its positions, even if another history has holes."""
    _, model = evaluating(PRUNINGS["paper"])
    inputs = dict(
        input_ids=torch.randint(1, VOCAB_SIZE, (2, 8)),
        attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1]]),
        decoder_input_ids=torch.zeros(2, 1, dtype=torch.long),
    )
    alone, both = (model(**{name: x[:users] for name, x in inputs.items()}) for users in (1, 2))
    assert relative_error(both.logits[0], alone.logits[0]) < 1e-9
    assert both.encoder_positions[0, :2].tolist() == alone.encoder_positions[0].tolist()


@pytest.mark.parametrize(
    ("name", "padding"),
    in_turn(["paper", "two_points", "items_two_points", "protect_both", "compact", None], BATCHES, each=2),
)
def test_encoder_model(name, padding):
    pruning = PRUNINGS.get(name)
    torch.manual_seed(0)
    base = T5EncoderModel(tiny_t5(**FEW_BUCKETS).encoder.config).double().train()
    assert base.encoder.config._attn_implementation == "eager"
    model = stamped(base, pruning)
    inputs = inputs_of(batch_of(padding, pruning))
    encoded = encode_padded(base, **inputs, pruning=pruning)
    output = model(**inputs)
    assert_states_are(output.last_hidden_state, output.attention_mask, encoded)
    assert torch.equal(model(**inputs, return_dict=False)[0], output.last_hidden_state)
    reward = torch.randn_like(encoded.states)[encoded.kept]  # of each kept state
    expected_loss = (encoded.states[encoded.kept] * reward).sum()
    loss = (output.last_hidden_state[output.attention_mask] * reward).sum()
    assert_same_training_step(base, expected_loss, model, loss)
