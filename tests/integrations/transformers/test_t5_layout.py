"""layout="original": the states of kept tokens stay in the columns of their tokens, see padded_stamp.py."""

from dataclasses import replace

import pytest
import torch
from closeness import relative_error
from padded_stamp import (
    BATCHES,
    FEW_BUCKETS,
    PRUNINGS,
    Encoded,
    batch_of,
    decode_padded,
    encode_padded,
    evaluating,
    inputs_of,
    stamped,
)
from t5_cases import LEVELS, assert_same_training_step, set_attention, tiny_t5
from torch import Tensor
from transformers import T5EncoderModel, T5Model

from stamp_kernels.integrations.transformers import EncoderOutput, PruningConfig, apply_stamp
from stamp_kernels.packed import PackedBatch

NAMES = ["paper", "two_points", "items_two_points", "protect_both"]


def in_place(name: str, positions: str = "original", voters: str = "tokens") -> PruningConfig:
    return replace(PRUNINGS[name], layout="original", positions=positions, voters=voters)


def assert_in_place(states: Tensor, mask: Tensor, positions: Tensor | None, batch: dict, encoded: Encoded) -> None:
    """States `[B, S, d_model]`, their mask and positions, column by column."""
    assert mask.dtype == torch.bool and torch.equal(mask, encoded.kept)
    assert relative_error(states, encoded.states) < 1e-9
    assert not states[~mask].any()
    if positions is not None:
        columns = torch.arange(mask.shape[1]).expand(mask.shape)
        given = batch["attention_mask"]
        first = 0 if given is None else given.argmax(1, keepdim=True)
        assert positions.dtype == torch.int32
        assert torch.equal(positions, torch.where(mask, columns - first, 0).int())


@pytest.mark.parametrize("padding", BATCHES)
@pytest.mark.parametrize("positions", ["original", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_states_stay_in_their_columns(name, positions, padding):
    pruning = in_place(name, positions)
    base = tiny_t5(torch.float64, **FEW_BUCKETS)
    model, batch = stamped(base, pruning), batch_of(padding, pruning)
    encoded = encode_padded(base, **inputs_of(batch), pruning=pruning)
    output = model.encoder(**inputs_of(batch))
    assert_in_place(output.last_hidden_state, output.attention_mask, output.positions, batch, encoded)

    expected = decode_padded(base, encoded, labels=batch["labels"])
    output = model(**batch, skip_logits=False)
    assert_in_place(
        output.encoder_last_hidden_state, output.encoder_attention_mask, output.encoder_positions, batch, encoded
    )
    assert relative_error(output.logits, expected.logits) < 1e-9
    assert_same_training_step(base, expected.loss, model, model(**batch).loss)


@pytest.mark.parametrize("padding", BATCHES)
@pytest.mark.parametrize("positions", ["original", "none"])
def test_gradients_of_padded_states(positions, padding):
    """A loss that reads all columns, as a head on an encoder does: dropped columns have no gradient."""
    pruning = in_place("two_points", positions)
    torch.manual_seed(0)
    base = T5EncoderModel(tiny_t5(**FEW_BUCKETS).encoder.config).double().train()
    set_attention(base, "eager")
    model, batch = stamped(base, pruning), batch_of(padding)
    encoded = encode_padded(base, **inputs_of(batch), pruning=pruning)
    output = model(**inputs_of(batch))
    assert_in_place(output.last_hidden_state, output.attention_mask, output.positions, batch, encoded)
    reward = torch.randn_like(encoded.states)
    assert_same_training_step(base, (encoded.states * reward).sum(), model, (output.last_hidden_state * reward).sum())


@pytest.mark.parametrize("padding", BATCHES)
def test_padding_that_votes(padding):
    """It is dropped, so its columns are 0 too."""
    pruning = in_place("two_points", "none", "padded")
    base, batch = tiny_t5(torch.float64, **FEW_BUCKETS), batch_of(padding)
    encoded = encode_padded(base, **inputs_of(batch), pruning=pruning)
    output = stamped(base, pruning).encoder(**inputs_of(batch))
    assert_in_place(output.last_hidden_state, output.attention_mask, output.positions, batch, encoded)


@pytest.mark.parametrize("padding", BATCHES)
@torch.no_grad()
def test_decoding_in_evaluation(padding):
    """With a cache, by the model's own encoder and from its output with the caller's mask, and greedily."""
    pruning = in_place("two_points")
    base, model = evaluating(pruning)
    batch = batch_of(padding)
    inputs = inputs_of(batch)
    encoded = encode_padded(base, **inputs, pruning=pruning)
    ids = base._shift_right(batch["labels"])
    expected = decode_padded(base, encoded, decoder_input_ids=ids).logits
    output = model.encoder(**inputs)
    assert relative_error(model(**inputs, decoder_input_ids=ids).logits, expected) < 1e-9
    for given in (output, (output.last_hidden_state,)):
        got = model(encoder_outputs=given, attention_mask=batch["attention_mask"], decoder_input_ids=ids)
        assert relative_error(got.logits, expected) < 1e-9
    # A copy of the states has no packed states behind it. Its mask says the same.
    copied = EncoderOutput(last_hidden_state=output.last_hidden_state.clone(), attention_mask=output.attention_mask)
    assert relative_error(model(encoder_outputs=copied, decoder_input_ids=ids).logits, expected) < 1e-9
    options = dict(max_new_tokens=LEVELS, do_sample=False, num_beams=2)
    compact = evaluating(replace(pruning, layout="compact"))[1]
    assert model.generate(**inputs, **options).tolist() == compact.generate(**inputs, **options).tolist()


@torch.no_grad()
def test_callers_mask_fits_the_states():
    """T5Model's own forward hands the mask of the inputs to the decoder, which reads the kept tokens all the same."""
    pruning = in_place("two_points")
    base, batch = tiny_t5(torch.float64, **FEW_BUCKETS), batch_of("left")
    ids = base._shift_right(batch["labels"])
    encoded = encode_padded(base, **inputs_of(batch), pruning=pruning)
    expected = decode_padded(base, encoded, decoder_input_ids=ids, output_hidden_states=True).decoder_hidden_states[-1]
    model = T5Model(base.config).double()
    model.load_state_dict(base.state_dict(), strict=False)
    apply_stamp(model, pruning=pruning)
    for use_cache in (False, True):
        got = model(**inputs_of(batch), decoder_input_ids=ids, use_cache=use_cache).last_hidden_state
        assert relative_error(got, expected) < 1e-9


@torch.no_grad()
def test_nothing_moves_without_pruning():
    pruning = replace(in_place("two_points"), prune_in_eval=False)
    base, model = evaluating(pruning)
    batch = batch_of("holes")
    encoded = encode_padded(base, **inputs_of(batch), pruning=None)
    output = model.encoder(**inputs_of(batch))
    assert_in_place(output.last_hidden_state, output.attention_mask, output.positions, batch, encoded)


@torch.no_grad()
def test_packed_inputs_have_no_columns():
    model, other = (stamped(tiny_t5(), replace(in_place("paper"), layout=layout)) for layout in ("original", "compact"))
    batch = batch_of("right")
    packed = PackedBatch.from_padded(batch["input_ids"], batch["attention_mask"])
    got, expected = (each.encoder(packed_inputs=packed) for each in (model, other))
    assert torch.equal(got.packed.values, expected.packed.values)
    assert torch.equal(got.padded().attention_mask, expected.padded().attention_mask)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (2, 3)])
@pytest.mark.parametrize("voters", ["tokens", "padded"])
def test_batches_without_tokens(shape, voters):
    """No history, histories without columns, and only padding."""
    model = stamped(tiny_t5(), replace(in_place("two_points"), voters=voters))
    ids, mask = torch.zeros(2, *shape, dtype=torch.int64)
    output = model.encoder(ids, mask)
    assert output.last_hidden_state.shape == (*shape, 24) and not output.last_hidden_state.any()
    assert output.attention_mask.shape == output.positions.shape == shape
    assert not output.attention_mask.any() and not output.positions.any()
    output.last_hidden_state.sum().backward()
