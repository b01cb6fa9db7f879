"""Beams that share their history's keys and values, against the base model's own search."""

import copy

import pytest
import torch
from closeness import relative_error
from t5_cases import LENGTHS, LEVELS, PRUNING, VOCAB_SIZE, padded_batch, stamped, tiny_t5
from transformers import LogitsProcessor, LogitsProcessorList, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from stamp_kernels.integrations.transformers import PruningConfig, apply_stamp, generation
from stamp_kernels.integrations.transformers.encoded import states_behind
from stamp_kernels.integrations.transformers.t5_stacks import PackedT5Attention
from stamp_kernels.packed import PackedBatch

BATCH = len(LENGTHS)
ALLOWED = [[2 + level, 11 + level, 20 + level, 33 + 2 * level] for level in range(LEVELS)]


class FewerOddCodes(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores - (torch.arange(scores.shape[-1]) % 2) * 0.7


def codes_of_level(_, decoder_ids):
    return ALLOWED[len(decoder_ids) - 1]


SEARCHES = {
    "greedy": dict(),
    "beams": dict(num_beams=5, num_return_sequences=3),
    "without a cache": dict(num_beams=3, num_return_sequences=3, use_cache=False),
    "constrained": dict(num_beams=4, num_return_sequences=4, prefix_allowed_tokens_fn=codes_of_level),
    "processors": dict(num_beams=4, logits_processor=LogitsProcessorList([FewerOddCodes()]), repetition_penalty=1.3),
    "end token": dict(num_beams=4, num_return_sequences=2, eos_token_id=7, length_penalty=0.3),
    "decoder prompt": dict(num_beams=3, decoder_input_ids=torch.tensor([[0, 5, 9]]).expand(BATCH, 3)),
    "sampling": dict(do_sample=True, num_return_sequences=3, temperature=1.7),
    "beam sampling": dict(do_sample=True, num_beams=3, num_return_sequences=2),
    "hidden states": dict(num_beams=3, output_hidden_states=True),
    "attention maps": dict(num_beams=3, output_attentions=True),
}


def inputs_of(padding_side: str = "right") -> dict[str, torch.Tensor]:
    batch = padded_batch(padding_side=padding_side)
    return dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def search(model: T5ForConditionalGeneration, inputs: dict, **options):
    torch.manual_seed(0)
    settings = dict(max_new_tokens=LEVELS, do_sample=False, return_dict_in_generate=True, output_scores=True)
    return model.generate(**inputs, **settings | options)


@pytest.fixture
def shared(monkeypatch) -> list[int]:
    """The numbers of rows per history of all searches that share their histories."""
    made = []
    make = generation.SharedEncoderOutput.of

    def recorded(encoded, packed, rows_per_history):
        made.append(rows_per_history)
        return make(encoded, packed, rows_per_history)

    monkeypatch.setattr(generation.SharedEncoderOutput, "of", recorded)
    return made


@pytest.mark.parametrize("name", SEARCHES)
@torch.no_grad()
def test_searches_are_those_of_the_base_model(name, shared):
    base, options = tiny_t5().eval(), SEARCHES[name]
    if "eos_token_id" in options:
        base.lm_head.weight[7] *= 3  # so that searches end early
    for padding_side in ("right", "left"):
        inputs = inputs_of(padding_side)
        expected, got = search(base, inputs, **options), search(stamped(base), inputs, **options)
        assert got.sequences.tolist() == expected.sequences.tolist()
        for ours, theirs in zip(got.scores, expected.scores, strict=True):
            allowed = theirs.isfinite()
            assert torch.equal(ours.isfinite(), allowed)
            assert relative_error(ours[allowed], theirs[allowed]) < 1e-5
        if "sequences_scores" in expected:
            assert relative_error(got.sequences_scores, expected.sequences_scores) < 1e-5
    rows = options.get("num_beams", options.get("num_return_sequences", 1))
    # Attention maps of packed histories do not exist.
    assert shared == ([] if name == "attention maps" else [rows, rows])


@torch.no_grad()
def test_each_history_has_keys_and_values_once(monkeypatch):
    model = stamped(tiny_t5().eval())
    made = []
    for block in model.decoder.block:
        block.layer[1].EncDecAttention.k.register_forward_hook(lambda _, args, out: made.append(args[0].shape))
    search(model, inputs_of(), num_beams=5)
    assert made == [(sum(LENGTHS), 24)] * len(model.decoder.block)


@torch.no_grad()
def test_searches_after_new_weights_have_new_keys():
    """Encoded histories may be searched again."""
    base = tiny_t5().eval()
    model = stamped(base)
    for _ in range(2):
        encoded = model.encoder(**inputs_of())
        mask = inputs_of()["attention_mask"]
        expected = search(base, inputs_of(), num_beams=3)
        for _ in range(2):
            got = search(model, dict(encoder_outputs=encoded, attention_mask=mask), num_beams=3)
            assert got.sequences.tolist() == expected.sequences.tolist()
        for each in (base, model):
            torch.manual_seed(3)
            for block in each.decoder.block:
                block.layer[1].EncDecAttention.k.weight.normal_()


@torch.no_grad()
def test_packed_and_pruned_histories_are_shared(shared):
    model = stamped(tiny_t5().eval(), pruning=PRUNING)
    inputs = inputs_of()
    packed = PackedBatch.from_padded(inputs["input_ids"], inputs["attention_mask"])
    expected = search(model, inputs, num_beams=4)
    assert search(model, dict(packed_inputs=packed), num_beams=4).sequences.tolist() == expected.sequences.tolist()
    assert shared == [4, 4]


@pytest.mark.parametrize("layout", ["compact", "original"])
@torch.no_grad()
def test_encoded_histories_bring_their_mask(layout):
    """Whoever encodes by himself has a mask from before pruning, or the states alone."""
    model = stamped(tiny_t5().eval(), pruning=PruningConfig([(1, 0.5)], layout=layout))
    inputs = inputs_of()
    expected = search(model, inputs, num_beams=4)
    encoded = model.encoder(**inputs)
    mask = inputs["attention_mask"]
    for given in (
        dict(encoder_outputs=encoded, attention_mask=mask),
        dict(encoder_outputs=(encoded[0],), attention_mask=mask),
        dict(encoder_outputs=BaseModelOutput(last_hidden_state=encoded.last_hidden_state), attention_mask=mask),
        dict(encoder_outputs=BaseModelOutput(last_hidden_state=encoded.last_hidden_state)),
        dict(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.last_hidden_state * 1),
            attention_mask=encoded.attention_mask.long(),
        ),
    ):
        got = search(model, given, num_beams=4)
        assert got.sequences.tolist() == expected.sequences.tolist()
        assert relative_error(got.sequences_scores, expected.sequences_scores) < 1e-5
    changed = BaseModelOutput(last_hidden_state=encoded.last_hidden_state * 1)
    if layout == "compact":
        with pytest.raises(ValueError, match=r"encoder_attention_mask must have shape \[24, 100\], .* got \[24, 200\]"):
            search(model, dict(encoder_outputs=changed, attention_mask=mask), num_beams=4)


class OwnForward(T5ForConditionalGeneration):
    """Reads the encoder's states and the mask, as models with a loss of their own do."""

    def forward(self, input_ids=None, attention_mask=None, decoder_input_ids=None, encoder_outputs=None, **kwargs):
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        states = encoder_outputs[0]
        assert attention_mask.shape == states.shape[:2]
        kwargs = {name: kwargs.get(name) for name in ("past_key_values", "cache", "use_cache") if name in kwargs}
        decoded = self.decoder(
            input_ids=decoder_input_ids, encoder_hidden_states=states, encoder_attention_mask=attention_mask, **kwargs
        )
        logits = self.lm_head(decoded[0] * self.model_dim**-0.5)
        return type(self).output_of(decoded, logits)

    @staticmethod
    def output_of(decoded, logits):
        cache = {name: decoded[name] for name in {"past_key_values", "cache"}.intersection(list(decoded.keys()))}
        return Seq2SeqLMOutput(logits=logits, **cache)


@pytest.mark.parametrize("pruning", [None, PRUNING], ids=["whole", "pruned"])
@torch.no_grad()
def test_a_forward_that_reads_states_is_not_given_shared_ones(pruning, shared):
    """With pruning the mask is that of the kept tokens, whatever the caller's."""
    plain = tiny_t5().eval()
    own = OwnForward(copy.deepcopy(plain.config)).eval()
    own.load_state_dict(plain.state_dict())
    expected = search(stamped(plain, pruning=pruning), inputs_of(), num_beams=4)
    shared.clear()
    got = search(apply_stamp(own, pruning=pruning), inputs_of(), num_beams=4)
    assert got.sequences.tolist() == expected.sequences.tolist() and shared == []
    assert relative_error(got.sequences_scores, expected.sequences_scores) < 1e-5


@torch.no_grad()
def test_a_static_cache_has_histories_of_its_own():
    base = tiny_t5().eval()
    inputs = inputs_of()
    expected = search(base, inputs, cache_implementation="static")
    got = search(stamped(base), inputs, cache_implementation="static")
    assert got.sequences.tolist() == expected.sequences.tolist()


@torch.no_grad()
def test_low_memory_searches_have_histories_of_their_own(shared):
    base = tiny_t5().eval()
    inputs, options = inputs_of(), dict(num_beams=3, num_return_sequences=3, low_memory=True)
    try:
        expected = search(base, inputs, **options)
    except ValueError as error:
        pytest.skip(f"releases after 4.49 refuse it: {error}")
    got = search(stamped(base), inputs, **options)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert relative_error(got.sequences_scores, expected.sequences_scores) < 1e-5
    assert shared == []


@torch.no_grad()
def test_assisted_searches():
    """The cache of the assistant is cropped, which old releases do key by key."""
    base, assistant = tiny_t5().eval(), tiny_t5(num_layers=2).eval()
    inputs = {name: values[2:3] for name, values in inputs_of().items()}
    expected = search(base, inputs, assistant_model=assistant)
    for model, assisting in ((base, stamped(assistant)), (stamped(base), assistant), (stamped(base), stamped(base))):
        got = search(model, inputs, assistant_model=assisting)
        assert got.sequences.tolist() == expected.sequences.tolist()


@torch.no_grad()
def test_decoder_rows_must_be_those_of_the_search():
    model = stamped(tiny_t5().eval())
    encoded = model.encoder(**inputs_of())
    shared = generation.SharedEncoderOutput.of(encoded, states_behind(encoded.last_hidden_state).packed, 3)
    with pytest.raises(
        ValueError, match=f"decoder_input_ids must have {3 * BATCH} rows, as encoder_outputs have, got 6"
    ):
        model(encoder_outputs=shared, decoder_input_ids=torch.zeros(BATCH, 1, dtype=torch.long))
    assert model(encoder_outputs=shared, decoder_input_ids=torch.zeros(18, 1).long()).logits.shape[-1] == VOCAB_SIZE


@torch.no_grad()
def test_shared_states_that_lost_their_source_are_refused():
    """Something on the way may copy the tensor. The copy has one row too many for the queries."""
    model = stamped(tiny_t5().eval())
    copied = model.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | dict(encoder_hidden_states=kwargs["encoder_hidden_states"] * 1)),
        with_kwargs=True,
    )
    with pytest.raises(RuntimeError, match=r"must match the size|expanded size|batch|invalid for input of size"):
        search(model, inputs_of(), num_beams=3)
    copied.remove()
    assert isinstance(model.decoder.block[0].layer[1].EncDecAttention, PackedT5Attention)
