"""RASTP's implementation, which pads, and the PruningConfig that says the same."""

from dataclasses import replace

import pytest
import torch
from closeness import relative_error
from padded_stamp import (
    BATCHES,
    FEW_BUCKETS,
    PRUNINGS,
    RASTP,
    Encoded,
    assert_states_are,
    batch_of,
    decode_padded,
    encode_padded,
    encode_rastp,
    expected_positions,
    in_turn,
    inputs_of,
    stamped,
)
from t5_cases import VOCAB_SIZE, assert_same_training_step, padded_batch, tiny_t5
from torch import Tensor
from torch.nn import functional
from transformers import T5EncoderModel, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from stamp_kernels.integrations.transformers import PruningConfig, apply_stamp
from stamp_kernels.packed import PackedBatch

RASTP_LENGTHS = (7, 10, 30, 11, 23)


def rastp_t5() -> T5ForConditionalGeneration:
    return tiny_t5(torch.float64, num_layers=4, **FEW_BUCKETS)


def rastp_batch(padded_length: int = 30) -> dict[str, Tensor]:
    """Histories below, at and above a third of the padded length, and at the padded length."""
    return padded_batch((*RASTP_LENGTHS, padded_length))


@pytest.mark.parametrize("padded_length", [30, 36])
def test_masking_equals_the_gathered_columns(padded_length):
    """Two truths, made in different ways: nothing is gathered in the first, and RASTP's columns in the second."""
    base, batch = rastp_t5(), rastp_batch(padded_length)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected, remaining = encode_rastp(base, ids, mask)
    got = encode_padded(base, ids, mask, RASTP)
    assert torch.equal(got.kept, expected.kept)
    assert expected.kept.sum(1).tolist() == [min(n, padded_length // 3) for n in mask.sum(1).tolist()]
    assert relative_error(got.states, expected.states) < 1e-9
    # RASTP's decoder reads the first columns of the mask from before the pruning: right for padding on the right.
    assert torch.equal(remaining, mask[:, : remaining.shape[1]].bool())


def test_training_equals_training_on_the_gathered_columns():
    base, other, batch = rastp_t5(), rastp_t5(), rastp_batch()
    ids, mask, labels = batch.values()
    encoded, remaining = encode_rastp(base, ids, mask)
    # The decoder gets the columns that are left, with their own mask, as in RASTP.
    columns = encoded.kept.int().argsort(dim=1, descending=True, stable=True)[:, : remaining.shape[1]]
    states = encoded.states.gather(1, columns[..., None].expand(-1, -1, encoded.states.shape[2]))
    outputs = BaseModelOutput(last_hidden_state=states)
    expected = base(encoder_outputs=outputs, attention_mask=remaining.long(), labels=labels)
    got = decode_padded(other, encode_padded(other, ids, mask, RASTP), labels=labels)
    assert relative_error(got.logits, expected.logits) < 1e-9
    assert_same_training_step(base, expected.loss, other, got.loss)


@pytest.fixture(params=["right", "left", "holes", "empty", "no_mask", "other_pad_ids"])
def batch(request) -> dict[str, Tensor]:
    """Padded lengths are multiples of 3. In most batches some histories keep all tokens, and some are padded."""
    if request.param in ("right", "left"):
        return padded_batch(RASTP_LENGTHS, padding_side=request.param)
    if request.param == "other_pad_ids":
        made = padded_batch(RASTP_LENGTHS)
        return made | dict(input_ids=torch.randint(1, VOCAB_SIZE, made["input_ids"].shape))
    made = batch_of(request.param)
    length = made["input_ids"].shape[1] // 3 * 3
    return made | {name: x if x is None else x[:, :length] for name, x in inputs_of(made).items()}


def truth(base: T5ForConditionalGeneration, batch: dict[str, Tensor]) -> Encoded:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape[1] % 3 == 0
    return encode_rastp(base, ids, torch.ones_like(ids) if mask is None else mask)[0]


def test_training_equals_rastp(batch):
    base = rastp_t5()
    model = stamped(base, RASTP)
    encoded = truth(base, batch)
    expected = decode_padded(base, encoded, labels=batch["labels"])
    output = model(**batch, skip_logits=False)
    assert relative_error(output.logits, expected.logits) < 1e-9
    assert relative_error(output.loss, expected.loss) < 1e-9
    assert_states_are(output.encoder_last_hidden_state, output.encoder_attention_mask, encoded)
    positions = output.encoder_positions[output.encoder_attention_mask]
    assert torch.equal(positions, expected_positions(batch["attention_mask"], encoded, RASTP).int())
    assert_same_training_step(base, expected.loss, model, model(**batch).loss)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("form", ["inputs_embeds", "encoder_outputs", "checkpointing", "T5EncoderModel"])
def test_other_forms_equal_rastp(form):
    base, batch = rastp_t5(), rastp_batch()
    model, (ids, mask, labels) = stamped(base, RASTP), batch.values()
    encoded = truth(base, batch)
    if form == "T5EncoderModel":
        encoder = T5EncoderModel(base.encoder.config).double()
        encoder.load_state_dict(base.state_dict(), strict=False)
        output = apply_stamp(encoder, pruning=RASTP)(ids, mask)
        assert_states_are(output.last_hidden_state, output.attention_mask, encoded)
        return
    if form == "checkpointing":
        model.gradient_checkpointing_enable()
    given = {
        "inputs_embeds": lambda: dict(inputs_embeds=model.shared(ids), attention_mask=mask),
        "encoder_outputs": lambda: dict(encoder_outputs=model.encoder(ids, mask), attention_mask=mask),
        "checkpointing": lambda: dict(input_ids=ids, attention_mask=mask),
    }[form]()
    expected = decode_padded(base, encoded, labels=labels).loss
    assert_same_training_step(base, expected, model, model(**given, labels=labels).loss)


@torch.no_grad()
def test_evaluation_equals_rastp(batch):
    base, model = rastp_t5().eval(), stamped(rastp_t5(), RASTP).eval()
    start = torch.zeros(len(batch["input_ids"]), 1, dtype=torch.int64)
    expected = decode_padded(base, truth(base, batch), decoder_input_ids=start)
    output = model(**inputs_of(batch), decoder_input_ids=start)
    assert relative_error(output.logits, expected.logits) < 1e-9


@pytest.mark.parametrize("num_beams", [1, 4])
@torch.no_grad()
def test_generation_equals_rastp(num_beams, batch):
    base, model = rastp_t5().eval(), stamped(rastp_t5(), RASTP).eval()
    encoded = truth(base, batch)
    options = dict(num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=4, do_sample=False)
    outputs = BaseModelOutput(last_hidden_state=encoded.states)
    expected = base.generate(encoder_outputs=outputs, attention_mask=encoded.kept.long(), **options)
    assert model.generate(**inputs_of(batch), **options).tolist() == expected.tolist()


@torch.no_grad()
def test_exported_encoder_equals_rastp():
    """The sizes of an exported program do not depend on the mask, so its tokens have tail rows."""
    base, batch = rastp_t5().eval(), rastp_batch()
    sizes = (torch.export.Dim("B", min=2), torch.export.Dim("S", min=4, max=512))
    encoder = stamped(base, RASTP).eval().encoder
    inputs = tuple(inputs_of(batch).values())
    program = torch.export.export(encoder, inputs, dynamic_shapes=(sizes, sizes)).module()
    for other in (batch, padded_batch((4, 0, 21), padding_side="left"), padded_batch((12, 12))):
        output = program(*inputs_of(other).values())
        assert_states_are(output.last_hidden_state, output.attention_mask, truth(base, other))


@pytest.mark.parametrize("padded_length", [31, 32])
def test_other_padded_lengths_need_another_ratio(padded_length):
    """RASTP keeps the third of the padded length rounded down, and the budget of a PruningConfig is rounded up."""
    base, batch = rastp_t5(), rastp_batch(padded_length)
    expected, _ = encode_rastp(base, batch["input_ids"], batch["attention_mask"])
    assert int(expected.kept.sum(1).max()) == padded_length // 3 == 10
    output = stamped(base, RASTP).encoder(**inputs_of(batch))
    assert output.attention_mask.shape[1] == 11
    output = stamped(base, replace(RASTP, schedule=[(2, 10 / padded_length)])).encoder(**inputs_of(batch))
    assert_states_are(output.last_hidden_state, output.attention_mask, expected)


@pytest.mark.parametrize(
    "other",
    [
        PruningConfig(RASTP.schedule, budget="max_seqlen", voters="padded"),
        PruningConfig(RASTP.schedule, budget="max_seqlen", positions="none"),
        PruningConfig(RASTP.schedule, positions="none", voters="padded"),
    ],
    ids=["positions", "voters", "budget"],
)
def test_every_setting_changes_the_states(other):
    """So that a comparison with RASTP tests each of them."""
    base, batch = rastp_t5(), rastp_batch()
    rastp, without = (encode_padded(base, **inputs_of(batch), pruning=pruning) for pruning in (RASTP, other))
    assert relative_error(without.states, rastp.states) > 1e-3
    output = stamped(base, other).encoder(**inputs_of(batch))
    assert_states_are(output.last_hidden_state, output.attention_mask, without)


# ---- what RASTP does not have ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "padding", "positions"),
    [
        ("paper", "right", None),
        ("two_points", "left", None),
        ("two_points", "holes", "none"),
        ("every_block", "right", "none"),
        ("last_block", "left", "none"),
        ("l2", "holes", None),
        ("items_two_points", "left", None),
        ("protect_both", "right", "none"),
        ("user_and_eos", "holes", None),
        ("max_seqlen_two_points", "holes", "none"),
        ("compact_two_points", "left", None),
        ("two_points", "empty", None),
        ("two_points", "no_mask", "none"),
        ("nothing_kept", "right", None),
        ("all_kept", "left", "none"),
    ],
)
def test_padding_votes_with_every_setting(name, padding, positions):
    pruning = replace(PRUNINGS[name], voters="padded")
    if positions is not None:
        pruning = replace(pruning, positions=positions)
    base = tiny_t5(torch.float64, **FEW_BUCKETS)
    model, batch = stamped(base, pruning), batch_of(padding, pruning)
    encoded = encode_padded(base, **inputs_of(batch), pruning=pruning)
    expected = decode_padded(base, encoded, labels=batch["labels"])
    output = model(**batch, skip_logits=False)
    assert relative_error(output.logits, expected.logits) < 1e-9
    assert_states_are(output.encoder_last_hidden_state, output.encoder_attention_mask, encoded)
    assert_same_training_step(base, expected.loss, model, model(**batch).loss)


@pytest.mark.parametrize(("name", "padding"), in_turn(["paper", "two_points", "last_block", "items"], BATCHES, each=2))
def test_bias_ends_at_the_first_pruning(name, padding):
    """Without the other settings of RASTP."""
    pruning = replace(PRUNINGS[name], positions="none")
    base = tiny_t5(torch.float64, **FEW_BUCKETS)
    model, batch = stamped(base, pruning), batch_of(padding, pruning)
    encoded = encode_padded(base, **inputs_of(batch), pruning=pruning)
    expected = decode_padded(base, encoded, labels=batch["labels"])
    with_logits = model(**batch, skip_logits=False)
    assert_states_are(with_logits.encoder_last_hidden_state, with_logits.encoder_attention_mask, encoded)
    assert_same_training_step(base, expected.loss, model, model(**batch).loss)


def test_padding_changes_the_first_pruning_only():
    """With the budget of a sequence, more padding adds votes. Later prunings have no padding."""
    pruning = PruningConfig(((1, 0.5), (2, 0.5)), voters="padded")
    base, batch = rastp_t5(), rastp_batch()
    model = stamped(base, pruning)
    states = []
    for extra in (0, 17):
        ids, mask = (functional.pad(batch[name], (0, extra)) for name in ("input_ids", "attention_mask"))
        output = model.encoder(ids, mask)
        assert_states_are(output.last_hidden_state, output.attention_mask, encode_padded(base, ids, mask, pruning))
        states.append(output.last_hidden_state)
    assert relative_error(*states) > 1e-3


@torch.no_grad()
def test_nothing_of_padding_runs_without_pruning():
    pruning = replace(RASTP, prune_in_eval=False)
    model, plain, batch = stamped(rastp_t5(), pruning), stamped(rastp_t5()).eval(), rastp_batch()
    sizes = []
    model.encoder.block[0].register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    num_tokens = int(batch["attention_mask"].sum())
    model.encoder(**inputs_of(batch))
    assert sizes == [batch["attention_mask"].numel()]
    output = model.eval().encoder(**inputs_of(batch))
    assert sizes[1:] == [num_tokens]
    assert torch.equal(output.last_hidden_state, plain.encoder(**inputs_of(batch)).last_hidden_state)


@torch.no_grad()
def test_packed_inputs_have_no_padding():
    batch = rastp_batch()
    packed = PackedBatch.from_padded(batch["input_ids"], batch["attention_mask"])
    got, expected = (
        stamped(rastp_t5(), replace(RASTP, voters=voters)).encoder(packed_inputs=packed).packed.values
        for voters in ("padded", "tokens")
    )
    assert torch.equal(got, expected)


def test_padding_gets_no_gradient():
    model, batch = stamped(rastp_t5(), RASTP), rastp_batch()
    embeddings = model.shared(batch["input_ids"]).detach().requires_grad_()
    mask = batch["attention_mask"]
    model(inputs_embeds=embeddings, attention_mask=mask, labels=batch["labels"]).loss.backward()
    assert not embeddings.grad[mask == 0].any() and embeddings.grad[mask == 1].any(-1).all()
