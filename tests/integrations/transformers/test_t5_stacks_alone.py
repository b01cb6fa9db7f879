"""T5's other models and its bare stacks, stamped: they compute what the base model computes.

Among them the ways in which recommenders use them: a bare decoder on embeddings with a head for each level (GRID), and
embeddings on both sides with pooled encoder states in a further loss (ETEGRec).
"""

import copy

import pytest
import torch
from closeness import assert_close, relative_error
from padded_stamp import encode_padded
from t5_cases import (
    HAS_KWARGS,
    LEVELS,
    PREDICTION,
    PRUNING,
    VOCAB_SIZE,
    assert_same_training_step,
    gradients,
    padded_batch,
    positional,
    stamped,
    tiny_t5,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5ForQuestionAnswering,
    T5ForSequenceClassification,
    T5ForTokenClassification,
    T5Model,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5PreTrainedModel, T5Stack

from stamp_kernels.integrations.transformers import (
    PruningConfig,
    StampT5Model,
    apply_stamp,
    remove_stamp,
    stamp_status,
)
from stamp_kernels.packed import PackedBatch

LENGTHS = (7, 1, 12, 2)
PADDINGS = ("right", "left", "holes")
ORIGINAL = PruningConfig(schedule=PRUNING.schedule, layout="original")


def batch_of(padding: str) -> dict[str, Tensor]:
    batch = padded_batch(LENGTHS, padding_side="left" if padding == "left" else "right")
    if padding == "holes":
        holes = torch.rand(batch["attention_mask"].shape) < 0.4
        holes[:, 0] = False
        batch["attention_mask"] = batch["attention_mask"] * ~holes
    return batch


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def config(**changes):
    found = copy.deepcopy(tiny_t5().config)
    for name, value in changes.items():
        setattr(found, name, value)
    found._attn_implementation = "eager"
    return found


def made(cls: type[T5PreTrainedModel], **changes) -> T5PreTrainedModel:
    torch.manual_seed(0)
    model = cls(config(**changes))
    if cls is T5Stack and model.embed_tokens is None:  # before 5.0
        model.set_input_embeddings(nn.Embedding(model.config.vocab_size, model.config.d_model))
    model.double().train()
    for stack in (module for module in model.modules() if isinstance(module, T5Stack)):
        stack.config._attn_implementation = "eager"
    return model


# ---- T5Model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
def test_t5_model(padding, packed_calls):
    base = made(T5Model)
    model, batch = stamped(base), batch_of(padding)
    assert type(model) is StampT5Model and stamp_status(model).packed == ("encoder", "decoder")
    assert str(stamp_status(model)) == "encoder: packed\ndecoder: packed"
    arguments = dict(**inputs_of(batch), decoder_input_ids=batch["labels"])
    valid = batch["attention_mask"].bool()
    reward = torch.randn(*batch["labels"].shape, 24, dtype=torch.float64)

    def loss(output) -> Tensor:
        return (output.last_hidden_state * reward).sum() + output.encoder_last_hidden_state[valid].square().mean()

    assert_same_training_step(base, loss(base(**arguments)), model, loss(model(**arguments)))
    assert packed_calls.count("self") == 6 and packed_calls.count("cross") == 3
    for options in ({}, dict(use_cache=False), dict(output_hidden_states=True)):
        expected, got = base.eval()(**arguments, **options), model.eval()(**arguments, **options)
        assert_close(got.last_hidden_state, expected.last_hidden_state)
        assert list(got) == list(expected)
    remove_stamp(model)
    assert type(model) is T5Model
    assert_close(model(**arguments).last_hidden_state, expected.last_hidden_state)


def test_outputs_of_t5_model_by_number():
    base = made(T5Model)
    model, batch = stamped(base), batch_of("right")
    arguments = dict(**inputs_of(batch), decoder_input_ids=batch["labels"])
    output = model(**arguments)
    assert output[0] is output.last_hidden_state
    for key in (1, 2, -1, slice(1, None)):  # where the base model has its cache
        with pytest.raises(IndexError, match=r"Seq2SeqStates\[.*of last_hidden_state, encoder_last_hidden_state only"):
            output[key]
    without = model(**arguments, use_cache=False)
    assert without[1] is without.encoder_last_hidden_state is without[-1]
    for training in (True, False):
        for options in ({}, dict(use_cache=False), dict(output_hidden_states=True)):
            expected, got = (each.train(training)(**arguments, **options, return_dict=False) for each in (base, model))
            assert [type(each) for each in got] == [type(each) for each in expected]
            assert_close(got[0], expected[0])
    named = dict(attention_mask=batch["attention_mask"], decoder_input_ids=batch["labels"])
    arguments = positional(T5Model, **named, encoder_outputs=base.encoder(**inputs_of(batch)))
    assert_close(model(*arguments).last_hidden_state, base(*arguments).last_hidden_state)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("pruning", [PRUNING, ORIGINAL], ids=["compact", "original"])
def test_pruned_t5_model(pruning, padding):
    """The decoder is given the mask of the inputs, and reads the kept tokens."""
    base = made(T5Model)
    model, batch = stamped(base, pruning=pruning), batch_of(padding)
    for training in (True, False):
        base.train(training)
        model.train(training)
        encoded = encode_padded(base, **inputs_of(batch), pruning=pruning)
        expected = base(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.states),
            attention_mask=encoded.kept.long(),
            decoder_input_ids=batch["labels"],
        )
        got = model(**inputs_of(batch), decoder_input_ids=batch["labels"])
        losses = (each.last_hidden_state.pow(3).sum() for each in (expected, got))
        assert_same_training_step(base, next(losses), model, next(losses))


def test_prediction_needs_a_language_model_head():
    for cls in (T5Model, T5EncoderModel, T5ForQuestionAnswering):
        with pytest.raises(ValueError, match=f"prediction needs a T5ForConditionalGeneration, got a {cls.__name__}"):
            apply_stamp(made(cls), prediction=PREDICTION)


# ---- models with other heads ---------------------------------------------------------------------------------------


def classification_batch(padding: str) -> dict[str, Tensor]:
    """Each row has the end-of-sequence token 1 once."""
    batch = batch_of(padding)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == 1, 2)
    last = (batch["attention_mask"] * torch.arange(1, 1 + ids.shape[1])).argmax(1)
    return dict(input_ids=ids.scatter(1, last[:, None], 1), attention_mask=batch["attention_mask"])


HEADS = {
    T5ForSequenceClassification: (
        dict(labels=torch.tensor([0, 2, 1, 1])),
        ("transformer.encoder", "transformer.decoder"),
    ),
    T5ForTokenClassification: (dict(), ("transformer.encoder",)),
    T5ForQuestionAnswering: (
        dict(start_positions=torch.tensor([0, 0, 3, 1]), end_positions=torch.tensor([4, 0, 7, 1])),
        ("encoder", "decoder"),
    ),
}


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("cls", HEADS)
def test_models_with_other_heads(cls, padding):
    targets, names = HEADS[cls]
    base = made(cls, num_labels=2 if cls is T5ForQuestionAnswering else 3, eos_token_id=1, classifier_dropout=0.0)
    if cls is T5ForQuestionAnswering:
        base.qa_outputs.bias.requires_grad_(False)  # its gradient is 0, and rounding
    model, batch = stamped(base), classification_batch(padding)
    assert stamp_status(model).packed == names
    if cls is T5ForTokenClassification:
        targets = dict(labels=(batch["input_ids"] % 3).masked_fill(batch["attention_mask"] == 0, -100))
    assert_same_training_step(base, base(**batch, **targets).loss, model, model(**batch, **targets).loss)
    expected, got = base.eval()(**batch), model.eval()(**batch)
    name = "start_logits" if cls is T5ForQuestionAnswering else "logits"
    chosen = batch["attention_mask"].bool() if cls is T5ForTokenClassification else slice(None)
    assert_close(got[name][chosen], expected[name][chosen])
    assert isinstance(model, cls) and type(model).__name__ == cls.__name__
    assert type(copy.deepcopy(model)) is type(model)
    remove_stamp(model)
    assert type(model) is cls
    assert {type(each) for each in model.modules()} == {type(each) for each in base.modules()}
    assert_close(model(**batch)[name], expected[name])


def test_pruned_models_with_other_heads():
    """A decoder's head reads pruned histories. A head on every token does not fit its labels any more."""
    batch = classification_batch("right")
    targets, _ = HEADS[T5ForSequenceClassification]
    base = made(T5ForSequenceClassification, num_labels=3, eos_token_id=1)
    model = stamped(base, pruning=PRUNING)
    encoded = encode_padded(base.transformer, **batch, pruning=PRUNING)
    states = BaseModelOutput(last_hidden_state=encoded.states)
    expected = base.transformer(
        encoder_outputs=states, attention_mask=encoded.kept, decoder_input_ids=base._shift_right(batch["input_ids"])
    )
    logits = base.classification_head(expected[0][batch["input_ids"] == 1])
    loss = F.cross_entropy(logits, targets["labels"])
    assert_same_training_step(base, loss, model, model(**batch, **targets).loss)

    model = stamped(made(T5ForTokenClassification, num_labels=3), pruning=PRUNING)
    with pytest.raises(ValueError, match="Expected input batch_size"):
        model(**batch, labels=batch["input_ids"] % 3)


# ---- bare stacks ---------------------------------------------------------------------------------------------------


def bare_stack(*, is_decoder: bool, **changes) -> T5Stack:
    return made(T5Stack, is_decoder=is_decoder, use_cache=is_decoder, **changes)


@pytest.mark.parametrize("padding", PADDINGS)
def test_bare_encoder(padding):
    base = bare_stack(is_decoder=False)
    model, batch = stamped(base), batch_of(padding)
    assert str(stamp_status(model)) == "the model: packed"
    valid = batch["attention_mask"].bool()
    embeds = torch.randn(*valid.shape, 24, dtype=torch.float64)
    for arguments in (inputs_of(batch), dict(inputs_embeds=embeds, attention_mask=batch["attention_mask"])):
        losses = [each(**arguments).last_hidden_state[valid].pow(3).sum() for each in (base, model)]
        assert_same_training_step(base, losses[0], model, losses[1])
    packed = PackedBatch.from_padded(*inputs_of(batch).values())
    if padding != "holes":  # packed inputs have no holes
        assert_close(model(packed_inputs=packed).packed.values, base(**inputs_of(batch))[0][valid])
    remove_stamp(model)
    assert type(model) is T5Stack and sorted(vars(model)) == sorted(vars(base))


@pytest.mark.parametrize("padding", PADDINGS)
def test_pruned_bare_encoder(padding):
    base = bare_stack(is_decoder=False)
    batch = batch_of(padding)
    around = nn.Module()  # what encode_padded reads
    around.encoder, around.training = base, True
    encoded = encode_padded(around, **inputs_of(batch), pruning=PRUNING)
    output = stamped(base, pruning=PRUNING)(**inputs_of(batch))
    assert_close(output.last_hidden_state[output.attention_mask], encoded.states[encoded.kept])
    in_place = stamped(base, pruning=ORIGINAL)(**inputs_of(batch))
    assert torch.equal(in_place.attention_mask, encoded.kept)
    assert_close(in_place.last_hidden_state, encoded.states)
    assert not in_place.last_hidden_state[~encoded.kept].any()
    expected = encoded.states.sum(1) / encoded.kept.sum(1, keepdim=True)
    for each in (output, in_place):
        assert_close(each.mean_pooled(), expected)
    packed = PackedBatch.from_padded(*inputs_of(batch).values())
    if padding != "holes":
        assert_close(stamped(base, pruning=PRUNING)(packed_inputs=packed).mean_pooled(), expected)


@pytest.mark.parametrize("is_encoder_decoder", [True, False])
@pytest.mark.parametrize("has_source", [True, False])
def test_bare_decoder(has_source, is_encoder_decoder, packed_calls):
    base = bare_stack(is_decoder=True, is_encoder_decoder=is_encoder_decoder)
    model, batch = stamped(base), batch_of("left")
    assert str(stamp_status(model)) == "the model: packed"
    mask = (torch.arange(LEVELS) < torch.tensor([4, 1, 3, 2])[:, None]).long()
    arguments = dict(input_ids=batch["labels"], attention_mask=mask)
    if has_source:
        states = torch.randn(*batch["attention_mask"].shape, 24, dtype=torch.float64)
        arguments |= dict(encoder_hidden_states=states, encoder_attention_mask=batch["attention_mask"])
    # Without is_encoder_decoder T5 has one cache for both kinds of attention, and fails.
    no_cache = dict(use_cache=False) if has_source and not is_encoder_decoder else {}
    losses = [each(**arguments, **no_cache)[0][mask.bool()].pow(3).sum() for each in (base, model)]
    assert packed_calls.count("self") == 3 and packed_calls.count("cross") == (3 if has_source else 0)
    assert_same_training_step(base, losses[0], model, losses[1])
    for options in (dict(use_cache=False),) if no_cache else ({}, dict(use_cache=False), dict(use_cache=True)):
        expected, got = base.eval()(**arguments, **options), model.eval()(**arguments, **options)
        assert_close(got[0][mask.bool()], expected[0][mask.bool()])
        assert list(got) == list(expected)
    with pytest.raises(ValueError, match="pruning needs an encoder, got a T5Stack that is a decoder"):
        apply_stamp(model, pruning=PRUNING)
    remove_stamp(model)
    assert type(model) is T5Stack


def test_status_needs_a_stamped_model():
    for model in (made(T5Model), bare_stack(is_decoder=True)):
        with pytest.raises(ValueError, match=f"model must be stamped, got {type(model).__name__}: call apply_stamp"):
            stamp_status(model)


# ---- GRID ----------------------------------------------------------------------------------------------------------


class Grid(nn.Module):
    """As in GRID: an encoder on item embeddings, a bare decoder on code embeddings, and a head for each level."""

    def __init__(self, padding_is_zero: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(VOCAB_SIZE, 24)
        self.codes = nn.ModuleList(nn.Embedding(VOCAB_SIZE, 24) for _ in range(LEVELS))
        self.start = nn.Parameter(torch.randn(24))
        self.encoder = made(T5EncoderModel)
        self.decoder = bare_stack(is_decoder=True)
        for stack in (self.encoder.encoder, self.decoder):
            del stack.embed_tokens
        self.heads = nn.ModuleList(nn.Linear(24, VOCAB_SIZE) for _ in range(LEVELS))
        self.double().train()

    def encode(self, input_ids: Tensor, attention_mask: Tensor):
        return self.encoder(inputs_embeds=self.items(input_ids), attention_mask=attention_mask)

    def decode(self, states: Tensor, mask: Tensor, labels: Tensor, **options) -> Tensor:
        embedded = [codes(labels[:, level]) for level, codes in enumerate(self.codes)]
        embeds = torch.stack([self.start.expand_as(embedded[0]), *embedded[:-1]], 1)
        return self.decoder(
            inputs_embeds=embeds, encoder_hidden_states=states, encoder_attention_mask=mask, **options
        ).last_hidden_state

    def loss(self, decoded: Tensor, labels: Tensor) -> Tensor:
        return sum(F.cross_entropy(head(decoded[:, i]), labels[:, i]) for i, head in enumerate(self.heads))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **options) -> Tensor:
        states = self.encode(input_ids, attention_mask).last_hidden_state
        return self.loss(self.decode(states, attention_mask, labels, **options), labels)


def stamped_grid(base: Grid, pruning: PruningConfig | None = None) -> Grid:
    model = copy.deepcopy(base)
    apply_stamp(model.encoder, pruning=pruning)
    apply_stamp(model.decoder)
    return model


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("options", [{}, dict(use_cache=False), dict(use_cache=True)], ids=str)
def test_grid(options, padding, packed_calls):
    base = Grid()
    model, batch = stamped_grid(base), batch_of(padding)
    loss = model(**batch, **options)
    assert packed_calls.count("self") == (3 if options.get("use_cache") else 6)
    assert_same_training_step(base, base(**batch, **options), model, loss)
    assert_close(model.eval()(**batch, **options), base.eval()(**batch, **options))


def reference_loss(base: Grid, batch: dict[str, Tensor], **narrower) -> tuple[Tensor, Tensor]:
    """(the loss of the kept tokens, which are kept), with nothing dropped from the padded batch."""
    around = nn.Module()
    around.encoder, around.training = base.encoder.encoder, base.training
    around.encoder.embed_tokens = base.items
    encoded = encode_padded(around, **inputs_of(batch), pruning=PRUNING)
    del around.encoder.embed_tokens
    decoded = base.decode(encoded.states, encoded.kept.long(), batch["labels"])
    return base.loss(decoded, batch["labels"]), encoded.kept


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("pruning", [PRUNING, ORIGINAL], ids=["compact", "original"])
@pytest.mark.parametrize("training", [True, False])
def test_pruned_grid(training, pruning, padding):
    """The mask of the inputs is given to the decoder. The states are recognized, so only kept tokens are read."""
    base = Grid().train(training)
    model, batch = stamped_grid(base, pruning), batch_of(padding)
    expected, kept = reference_loss(base, batch)
    assert kept.sum() < batch["attention_mask"].sum()
    assert_same_training_step(base, expected, model, model(**batch))
    assert_same_training_step(base, reference_loss(base, batch)[0], model, model(**batch, use_cache=False))
    # The mask as another tensor, that of the states, and none.
    encoded = model.encode(**inputs_of(batch))
    for mask in (batch["attention_mask"].clone(), encoded.attention_mask, encoded.attention_mask.long(), None):
        assert_close(model.loss(model.decode(encoded[0], mask, batch["labels"]), batch["labels"]), expected)


def test_changed_states_need_their_own_mask():
    base = Grid()
    model, batch = stamped_grid(base, PRUNING), batch_of("left")
    encoded = model.encode(**inputs_of(batch))
    for training in (True, False):
        model.train(training)
        for states in (encoded[0] * 1, encoded[0].clone().mul_(2)):
            with pytest.raises(
                ValueError,
                match=r"encoder_attention_mask must have shape \[4, 6\], that of the encoder's states, got \[4, 12\]: "
                "with pruning give the attention_mask of the encoder's output",
            ):
                model.decode(states, batch["attention_mask"], batch["labels"])
        decoded = model.decode(encoded[0] * 1, encoded.attention_mask, batch["labels"])
        assert_close(decoded, model.decode(encoded[0], batch["attention_mask"], batch["labels"]))


@pytest.mark.parametrize("training", [True, False])
def test_states_changed_in_place(training):
    """The packed states are not read then: they are those from before."""
    base = Grid().train(training)
    model, batch = stamped_grid(base), batch_of("right")
    labels, mask = batch["labels"], batch["attention_mask"]
    losses = []
    for each in (base, model):
        states = each.encode(**inputs_of(batch)).last_hidden_state
        states *= 2
        losses.append(each.loss(each.decode(states, mask, labels), labels))
    assert_same_training_step(base, losses[0], model, losses[1])
    pruned = stamped_grid(base, PRUNING)
    states = pruned.encode(**inputs_of(batch)).last_hidden_state
    states *= 2
    with pytest.raises(ValueError, match="encoder_attention_mask must have shape"):
        pruned.decode(states, mask, labels)


@torch.inference_mode()
def test_states_changed_in_place_in_inference_mode():
    """Inference tensors do not count changes, so that their contents are compared."""
    base = Grid().eval()
    batch = batch_of("left")
    labels, mask = batch["labels"], batch["attention_mask"]
    for pruning in (None, PRUNING, ORIGINAL):
        model = stamped_grid(base, pruning)
        encoded = model.encode(**inputs_of(batch))
        other = model.encode(**inputs_of(batch)).last_hidden_state * 2
        expected = model.decode(other, encoded.attention_mask, labels)
        assert_close(
            model.decode(encoded[0], mask, labels), model.decode(encoded[0].clone(), encoded.attention_mask, labels)
        )
        encoded[0].mul_(2)
        assert_close(model.decode(encoded[0], encoded.attention_mask, labels), expected)
        if pruning is PRUNING:
            with pytest.raises(ValueError, match="encoder_attention_mask must have shape"):
                model.decode(encoded[0], mask, labels)


def test_unknown_layouts_are_refused():
    with pytest.raises(ValueError, match="layout must be one of"):
        PruningConfig(layout="orignal")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", PADDINGS)
def test_mask_that_hides_more(padding, training):
    """A decoder may read only a part of the states."""
    base = Grid().train(training)
    model, batch = stamped_grid(base), batch_of(padding)
    labels, narrow = batch["labels"], batch["attention_mask"].clone()
    for row in narrow:  # every second token
        row[row.nonzero()[1::2, 0]] = 0
    losses = []
    for each in (base, model):
        states = each.encode(**inputs_of(batch)).last_hidden_state
        losses.append(each.loss(each.decode(states, narrow, labels), labels))
    assert abs(losses[0] - base(**batch)) > 1e-4
    assert_same_training_step(base, losses[0], model, losses[1])

    in_place = stamped_grid(base, ORIGINAL)
    encoded = in_place.encode(**inputs_of(batch))
    got = in_place.decode(encoded[0], narrow, labels)
    changed = in_place.decode(encoded[0] * 1, encoded.attention_mask * narrow, labels)
    assert_close(got, changed)
    compact = stamped_grid(base, PRUNING)
    with pytest.raises(ValueError, match="encoder_attention_mask must have shape"):
        compact.decode(compact.encode(**inputs_of(batch))[0], narrow, labels)


def test_mask_changed_in_place():
    base = Grid()
    model, batch = stamped_grid(base), batch_of("right")
    losses = []
    for each in (base, model):
        mask = batch["attention_mask"].clone()
        states = each.encode(batch["input_ids"], mask).last_hidden_state
        mask[:, 1:4] = 0
        losses.append(each.loss(each.decode(states, mask, batch["labels"]), batch["labels"]))
    assert_same_training_step(base, losses[0], model, losses[1])


@pytest.mark.skipif(not HAS_KWARGS, reason="before 5.0 T5 takes no mask of four dimensions for the histories")
def test_mask_of_four_dimensions():
    """Hugging Face's own forward adds it to the scores."""
    base = Grid()
    model, batch = stamped_grid(base), batch_of("right")
    hidden = (batch["attention_mask"] == 0)[:, None, None].expand(-1, 1, LEVELS, -1).clone()
    hidden[:, :, 1:, 2:] = True
    mask = hidden.double() * torch.finfo(torch.float64).min
    for training in (True, False):
        losses = []
        for each in (base.train(training), model.train(training)):
            states = each.encode(**inputs_of(batch)).last_hidden_state
            losses.append(each.loss(each.decode(states, mask, batch["labels"]), batch["labels"]))
        assert_same_training_step(base, losses[0], model, losses[1])
    pruned = stamped_grid(base, PRUNING)
    with pytest.raises(ValueError, match=r"encoder_attention_mask must have shape \[..., 6\]"):
        pruned.decode(pruned.encode(**inputs_of(batch))[0], mask, batch["labels"])


@pytest.mark.parametrize("pruning", [PRUNING, ORIGINAL], ids=["compact", "original"])
def test_states_in_an_output_of_the_base_model(pruning):
    """`BaseModelOutput(last_hidden_state=...)` or a tuple around a stamped encoder's states."""
    model = stamped(tiny_t5(torch.float64), pruning=pruning)
    batch = batch_of("left")
    mask, labels = batch["attention_mask"], batch["labels"]

    def around(kind: type):
        states = model.encoder(**inputs_of(batch)).last_hidden_state
        return (states,) if kind is tuple else kind(last_hidden_state=states)

    for kind in (BaseModelOutput, tuple):
        expected = gradients(model.train(), model(**batch).loss)
        got = gradients(model, model(encoder_outputs=around(kind), attention_mask=mask, labels=labels).loss)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        expected = model.eval()(**inputs_of(batch), decoder_input_ids=labels)
        got = model(encoder_outputs=around(kind), attention_mask=mask, decoder_input_ids=labels)
        assert torch.equal(got.logits, expected.logits)
        assert torch.equal(got.encoder_attention_mask, expected.encoder_attention_mask)
    options = dict(max_new_tokens=LEVELS, output_scores=True, return_dict_in_generate=True)
    for beams in (1, 3):
        expected = model.generate(**inputs_of(batch), num_beams=beams, **options)
        got = model.generate(encoder_outputs=around(BaseModelOutput), attention_mask=mask, num_beams=beams, **options)
        assert torch.equal(got.sequences, expected.sequences)
        assert all(torch.equal(*each) for each in zip(got.scores, expected.scores, strict=True))


def test_search_with_a_mask_that_hides_more():
    base = tiny_t5(torch.float64).eval()
    model, batch = stamped(base), batch_of("right")
    narrow = batch["attention_mask"].clone()
    narrow[:, 1:4] = 0
    options = dict(max_new_tokens=LEVELS, num_beams=3, output_scores=True, return_dict_in_generate=True)
    found = []
    for each in (base, model):
        encoded = BaseModelOutput(last_hidden_state=each.encoder(**inputs_of(batch)).last_hidden_state)
        found.append(each.generate(encoder_outputs=encoded, attention_mask=narrow, **options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert_close(found[1].sequences_scores, found[0].sequences_scores)


# ---- ETEGRec -------------------------------------------------------------------------------------------------------


class Etegrec(nn.Module):
    """As in ETEGRec: embeddings on both sides, all hidden states, and pooled encoder states in a further loss."""

    def __init__(self, pools_kept: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.t5 = tiny_t5(torch.float64)
        self.items, self.codes = nn.Embedding(VOCAB_SIZE, 24), nn.Embedding(VOCAB_SIZE, 24)
        self.project, self.heads = nn.Linear(24, 24), nn.ModuleList(nn.Linear(24, VOCAB_SIZE) for _ in range(LEVELS))
        self.pools_kept = pools_kept
        self.double().train()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        output = self.t5(
            inputs_embeds=self.items(input_ids),
            attention_mask=attention_mask,
            decoder_inputs_embeds=self.codes(labels),
            output_hidden_states=True,
        )
        decoded, encoded = output.decoder_hidden_states[-1], output.encoder_last_hidden_state
        mask = (output.encoder_attention_mask if self.pools_kept else attention_mask)[..., None]
        pooled = self.project((encoded * mask).sum(1) / mask.sum(1))
        loss = sum(F.cross_entropy(head(decoded[:, i]), labels[:, i]) for i, head in enumerate(self.heads))
        return loss + F.mse_loss(pooled, self.items(labels[:, 0]))


@pytest.mark.parametrize("padding", PADDINGS)
def test_etegrec(padding, packed_calls):
    base = Etegrec()
    model, batch = copy.deepcopy(base), batch_of(padding)
    apply_stamp(model.t5)
    loss = model(**batch)
    assert packed_calls.count("self") == 6 and packed_calls.count("cross") == 3
    assert_same_training_step(base, base(**batch), model, loss)
    assert_close(model.eval()(**batch), base.eval()(**batch))


@pytest.mark.parametrize("padding", PADDINGS)
def test_pruned_etegrec(padding):
    base, batch = Etegrec(), batch_of(padding)
    model = copy.deepcopy(base)
    apply_stamp(model.t5, pruning=PRUNING)
    with pytest.raises(RuntimeError, match="The size of tensor a"):  # the mask of the inputs does not fit the states
        model(**batch)
    model.pools_kept = True

    base.t5.encoder.embed_tokens = base.items
    encoded = encode_padded(base.t5, **inputs_of(batch), pruning=PRUNING)
    base.t5.encoder.embed_tokens = base.t5.shared
    output = base.t5(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded.states),
        attention_mask=encoded.kept.long(),
        decoder_inputs_embeds=base.codes(batch["labels"]),
        output_hidden_states=True,
    )
    decoded, labels = output.decoder_hidden_states[-1], batch["labels"]
    pooled = base.project(encoded.states.sum(1) / encoded.kept.sum(1, keepdim=True))
    loss = sum(F.cross_entropy(head(decoded[:, i]), labels[:, i]) for i, head in enumerate(base.heads))
    expected = loss + F.mse_loss(pooled, base.items(labels[:, 0]))
    assert_same_training_step(base, expected, model, model(**batch))
    assert isinstance(model.t5, T5ForConditionalGeneration)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_gradients_flow_through_the_states(padding_side):
    """Whoever keeps or changes the gradient of the encoder's states sees that of the decoder."""
    base = T5Model(tiny_t5(torch.float64).config).double().train()
    model = apply_stamp(copy.deepcopy(base))
    batch = padded_batch(padding_side=padding_side)
    mask = batch["attention_mask"]
    found = []
    for each in (base, model):
        states = each.encoder(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        states.retain_grad()
        states.register_hook(lambda gradient: -gradient)
        inputs = dict(input_ids=batch["labels"], encoder_hidden_states=states, encoder_attention_mask=mask)
        each.decoder(**inputs).last_hidden_state.sum().backward()
        found.append((states.grad[mask.bool()], each.encoder.block[0].layer[1].DenseReluDense.wi.weight.grad))
    for expected, got in zip(*found, strict=True):
        assert expected.any() and relative_error(got, expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
@pytest.mark.parametrize("changed", ["the mask of the inputs", "the mask of the output"])
def test_a_mask_that_is_changed_in_place_counts(changed, dtype):
    base = T5Model(tiny_t5(torch.float64).config).double().train()
    model = apply_stamp(copy.deepcopy(base))
    batch = padded_batch((5, 9, 7))
    mask = batch["attention_mask"].to(dtype)
    states = {each: each.encoder(input_ids=batch["input_ids"], attention_mask=mask) for each in (base, model)}
    if changed == "the mask of the output":
        mask = states[model].attention_mask
    mask[:, 1] = 0
    expected, got = (
        each.decoder(
            input_ids=batch["labels"],
            encoder_hidden_states=states[each].last_hidden_state,
            encoder_attention_mask=mask,
        ).last_hidden_state
        for each in (base, model)
    )
    assert_close(got, expected)


def test_encoder_outputs_as_tuples_keep_their_hidden_states():
    base = tiny_t5().eval()
    model = apply_stamp(copy.deepcopy(base))
    batch = padded_batch()
    states = base.encoder(input_ids=batch["input_ids"], output_hidden_states=True)
    for given in (states.to_tuple(), [states[0]]):
        found = [each(encoder_outputs=given, decoder_input_ids=batch["labels"]) for each in (base, model)]
        assert_close(found[1].logits, found[0].logits)
        assert (found[1].encoder_hidden_states is None) == (found[0].encoder_hidden_states is None)


def test_labels_that_a_decoder_mask_hides_have_no_loss():
    """In training, and in evaluation with a cache and without."""
    model = apply_stamp(tiny_t5(torch.float64))
    batch = padded_batch()
    mask = torch.ones_like(batch["labels"])
    mask[1:, 2:] = 0
    losses = [
        model.train(training)(**batch, decoder_attention_mask=mask, **options).loss
        for training, options in ((True, {}), (False, {}), (False, dict(use_cache=False)))
    ]
    expected = model.train()(
        **batch | dict(labels=batch["labels"].masked_fill(mask == 0, -100)),
        decoder_input_ids=model._shift_right(batch["labels"]),
    ).loss
    for loss in losses:
        assert_close(loss, expected)
