"""A stamped T5 without pruning and prediction equals the base model: loss, logits, gradients, generation."""

import pytest
import torch
from closeness import assert_close, relative_error
from t5_cases import LENGTHS, LEVELS, VOCAB_SIZE, assert_same_training_step, gradients, padded_batch, stamped, tiny_t5
from torch import Tensor
from transformers import T5EncoderModel

from stamp_kernels.integrations.transformers import PruningConfig, remove_stamp
from stamp_kernels.packed import PackedBatch

V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
SCATTERED = "scattered"


def batch_of(padding: str, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Padded on one side, or with holes in the mask."""
    if padding != SCATTERED:
        return padded_batch(lengths, padding_side=padding)
    batch = padded_batch(lengths)
    holes = torch.rand(batch["attention_mask"].shape) < 0.3
    holes[:, 0] = False  # no empty row, where the base model attends to the padding
    return batch | {"attention_mask": batch["attention_mask"] * ~holes}


@pytest.mark.core
@pytest.mark.parametrize("padding", ["right", "left", SCATTERED])
@pytest.mark.parametrize(
    ("dtype", "config"), [(torch.float64, V1_1), (torch.float32, {})], ids=["float64-v1.1", "float32-t5"]
)
def test_training_step(dtype, padding, config):
    base = tiny_t5(dtype, **config)
    model = stamped(base)
    batch = batch_of(padding)
    batch["labels"][0, 1:], batch["labels"][2] = -100, -100
    assert_same_training_step(base, base(**batch).loss, model, model(**batch).loss)


@pytest.mark.parametrize(
    ("dtype", "padding"), [(torch.float64, "left"), (torch.float64, SCATTERED), (torch.float32, "right")]
)
def test_logits_and_states(dtype, padding):
    base = tiny_t5(dtype).eval()
    model = stamped(base)
    batch = batch_of(padding)
    expected, got = base(**batch), model(**batch)
    valid = batch["attention_mask"].bool()
    assert_close(got.logits, expected.logits)
    assert_close(got.loss, expected.loss)
    assert_close(got.encoder_last_hidden_state[valid], expected.encoder_last_hidden_state[valid])
    assert torch.equal(got.encoder_attention_mask, valid)
    assert not got.encoder_last_hidden_state[~valid].any()
    # Logits in training, if they are requested.
    assert_close(model.train()(**batch, skip_logits=False).logits, expected.logits)
    assert model(**batch).logits is None


def test_bfloat16_is_as_exact_as_the_base_model():
    bases = {name: tiny_t5(torch.bfloat16, attention=name) for name in ("eager", "sdpa")}
    model, exact = stamped(bases["eager"]), tiny_t5(torch.float64)
    exact.load_state_dict(bases["eager"].state_dict())
    batch = batch_of("right", lengths=tuple(range(1, 60)))

    def whole_gradient(model) -> Tensor:
        return torch.cat([g.double().flatten() for g in gradients(model, model(**batch).loss).values()])

    truth, eager, sdpa = (whole_gradient(m) for m in (exact, bases["eager"], bases["sdpa"]))
    assert relative_error(whole_gradient(model), truth) < 1.5 * max(relative_error(g, truth) for g in (eager, sdpa))
    loss = exact(**batch).loss
    allowed = max(relative_error(base(**batch).loss, loss) for base in bases.values())
    assert relative_error(model(**batch).loss, loss) < 1.5 * allowed


@pytest.mark.parametrize(
    ("attention", "padding", "options"),
    [
        ("eager", "right", {}),
        ("sdpa", "left", {}),
        ("sdpa", "right", {"use_cache": False}),
        ("eager", "left", {"num_beams": 4, "num_return_sequences": 3}),
        ("sdpa", "right", {"num_beams": 3, "prefix_allowed_tokens_fn": lambda _, ids: [*range(1, 9), 20 + len(ids)]}),
        ("sdpa", "left", {"do_sample": True, "num_beams": 2}),
    ],
    ids=["eager greedy", "sdpa greedy", "no cache", "beams", "constrained", "sampled beams"],
)
def test_generate(attention, padding, options):
    base = tiny_t5(torch.float64, attention=attention).eval()
    model = stamped(base)
    batch = batch_of(padding)
    del batch["labels"]
    results = []
    for m in (base, model):
        torch.manual_seed(5)
        results.append(
            m.generate(**batch, max_new_tokens=LEVELS, return_dict_in_generate=True, output_scores=True, **options)
        )
    assert torch.equal(results[0].sequences, results[1].sequences)
    if "num_beams" in options:
        assert_close(results[1].sequences_scores, results[0].sequences_scores)


def test_no_mask_means_no_padding():
    base = tiny_t5(torch.float64).eval()
    model = stamped(base)
    ids, labels = torch.randint(0, VOCAB_SIZE, (3, 9)), torch.randint(1, VOCAB_SIZE, (3, LEVELS))
    assert_close(model(input_ids=ids, labels=labels).logits, base(input_ids=ids, labels=labels).logits)


def test_decoder_inputs_of_every_kind():
    """Decoder ids with a mask, embeddings on both sides, encoder outputs, tuples."""
    base = tiny_t5(torch.float64).eval()
    model = stamped(base)
    batch = padded_batch()
    labels = batch.pop("labels")
    decoder_ids = torch.randint(1, VOCAB_SIZE, labels.shape)
    decoder_mask = (torch.arange(LEVELS) < torch.tensor([4, 1, 2, 4, 3, 4])[:, None]).long()
    masked_labels = labels.masked_fill(decoder_mask == 0, -100)
    for extra in (
        dict(decoder_input_ids=decoder_ids, decoder_attention_mask=decoder_mask, labels=masked_labels),
        dict(decoder_inputs_embeds=torch.randn(*labels.shape, 24, dtype=torch.float64), labels=labels),
        dict(decoder_input_ids=decoder_ids),
    ):
        expected, got = base(**batch, **extra), model(**batch, **extra)
        valid = decoder_mask.bool() if "decoder_attention_mask" in extra else torch.ones_like(decoder_mask).bool()
        assert_close(got.logits[valid], expected.logits[valid])
        assert (got.loss is None) == (expected.loss is None)
        if got.loss is not None:
            assert_close(got.loss, expected.loss)

    embeds = base.shared(batch["input_ids"])
    by_embeds = dict(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=labels)
    expected = base(**batch, labels=labels)
    assert_close(model(**by_embeds).logits, expected.logits)
    for encoder_outputs in (model.encoder(**batch), base.encoder(**batch), base.encoder(**batch, return_dict=False)):
        two_steps = dict(encoder_outputs=encoder_outputs, attention_mask=batch["attention_mask"])
        assert_close(model(**two_steps, labels=labels).logits, expected.logits)
        assert_close(model(**two_steps, decoder_input_ids=model._shift_right(labels)).logits, expected.logits)
    loss, logits = model(**batch, labels=labels, return_dict=False)[:2]
    assert_close(loss, expected.loss)
    assert_close(logits, expected.logits)


def test_packed_inputs():
    """Packed in, packed out. Tail rows are not read. `generate` takes the result of `padded()`."""
    model = stamped(tiny_t5(torch.float64), pruning=PruningConfig())
    batch = padded_batch()
    packed = PackedBatch.from_padded(batch["input_ids"], batch["attention_mask"])
    with_tail = PackedBatch(torch.cat([packed.values, torch.full((5,), -100)]), packed.cu_seqlens, packed.max_seqlen)
    expected = gradients(model, model(**batch).loss)
    for inputs in (packed, with_tail):
        for name, gradient in gradients(model, model(packed_inputs=inputs, labels=batch["labels"]).loss).items():
            assert_close(gradient, expected[name])
    model.eval()
    assert_close(
        model(packed_inputs=packed, labels=batch["labels"]).encoder_last_hidden_state,
        model(**batch).encoder_last_hidden_state,
    )
    del batch["labels"]
    encoded = model.encoder(packed_inputs=packed)
    assert encoded.last_hidden_state is None and encoded.packed.values.shape[0] == sum(-(-n // 3) for n in LENGTHS)
    assert torch.equal(
        model.generate(encoder_outputs=encoded.padded(), num_beams=3, max_new_tokens=LEVELS),
        model.generate(**batch, num_beams=3, max_new_tokens=LEVELS),
    )
    start = torch.zeros(len(LENGTHS), 1, dtype=torch.int64)
    assert_close(
        model(packed_inputs=packed, decoder_input_ids=start).logits, model(**batch, decoder_input_ids=start).logits
    )


def test_decoder_sequences_may_share_a_source():
    """The beams of a search read one history. The states are those with a repeated history."""
    model = stamped(tiny_t5(torch.float64))
    batch = padded_batch((5, 3))
    source = PackedBatch.from_padded(batch["input_ids"], batch["attention_mask"])
    num_beams, length = 3, 2
    decoder_ids = PackedBatch(
        torch.randint(1, VOCAB_SIZE, (2 * num_beams * length,)), torch.arange(0, 13, length, dtype=torch.int32), length
    )
    got = model.decoder(
        packed_inputs=decoder_ids,
        packed_source=model.encoder(packed_inputs=source).packed,
        cu_seqlens_cross=torch.tensor([0, 6, 12], dtype=torch.int32),
        max_seqlen_cross=num_beams * length,
    )
    repeated = PackedBatch.from_padded(
        *(batch[name].repeat_interleave(num_beams, 0) for name in ("input_ids", "attention_mask"))
    )
    expected = model.decoder(packed_inputs=decoder_ids, packed_source=model.encoder(packed_inputs=repeated).packed)
    assert_close(got.packed.values, expected.packed.values)


def test_empty_batch_has_no_loss_and_zero_gradients():
    model = stamped(tiny_t5(), pruning=PruningConfig())
    no_ids = torch.zeros(0, dtype=torch.int64)
    empty = PackedBatch(no_ids, torch.zeros(1, dtype=torch.int32), 0, lengths_cpu=no_ids)
    for labels in (no_ids.view(0, 0), no_ids.view(0, LEVELS)):
        loss = model(packed_inputs=empty, labels=labels).loss
        assert loss == 0
        found = gradients(model, loss)
        assert found.keys() == dict(model.named_parameters()).keys()
        assert not any(gradient.any() for gradient in found.values())
    # A history without tokens among others: its decoder attends to nothing.
    batch = padded_batch((4, 0, 2))
    assert model(**batch).loss.isfinite()


def test_encoder_model():
    base = T5EncoderModel(tiny_t5().config).double().eval()
    model = stamped(base)
    batch = padded_batch(padding_side="left")
    del batch["labels"]
    valid = batch["attention_mask"].bool()
    expected, got = base(**batch), model(**batch)
    assert_close(got.last_hidden_state[valid], expected.last_hidden_state[valid])
    packed = PackedBatch.from_padded(batch["input_ids"], batch["attention_mask"])
    assert_close(model(packed_inputs=packed).packed.values, expected.last_hidden_state[valid])
    remove_stamp(model)
    assert torch.equal(model(**batch).last_hidden_state, expected.last_hidden_state)


def test_dropout_follows_the_seed_and_the_mode():
    model = stamped(tiny_t5(dropout_rate=0.2), pruning=PruningConfig())
    batch = padded_batch()

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model(**batch).loss.item()

    assert loss(0) == loss(0) != loss(1)
    model.eval()
    assert loss(0) == loss(1)


EXCLUSIVE = {
    "mask": r"at most one of attention_mask, packed_inputs may be given, got attention_mask, packed_inputs",
    "decoder": r"at most one of decoder_input_ids, decoder_inputs_embeds may be given, got decoder_input_ids, decoder_",
}


def test_errors_name_the_argument():
    model = stamped(tiny_t5())
    batch = padded_batch()
    labels, ids = batch["labels"], batch["input_ids"]
    packed, embeds = PackedBatch.from_padded(ids, batch["attention_mask"]), torch.zeros(*labels.shape, 24)
    cases = [
        (
            dict(labels=labels),
            r"exactly one of input_ids, inputs_embeds, packed_inputs, encoder_outputs must be given",
        ),
        (dict(input_ids=ids, packed_inputs=packed, labels=labels), r"got input_ids, packed_inputs"),
        (dict(input_ids=ids, attention_mask=ids[:, :3], labels=labels), r"attention_mask must have shape \[6, 200\]"),
        (dict(input_ids=ids[0], labels=labels), r"token ids \[B, S\] or embeddings \[B, S, d_model\], got \[200\]"),
        (dict(**batch, future_labels=labels), r"forward takes no future_labels"),
        (dict(packed_inputs=packed, attention_mask=batch["attention_mask"], labels=labels), EXCLUSIVE["mask"]),
        (dict(packed_inputs=ids, labels=labels), r"packed_inputs must be a PackedBatch, got Tensor"),
        (dict(packed_inputs=ids, decoder_input_ids=labels), r"packed_inputs must be a PackedBatch, got Tensor"),
        (dict(**batch, encoder_outputs=(torch.zeros(6, 2, 24),)), r"must be given, got input_ids, encoder_outputs$"),
        (dict(**batch, decoder_input_ids=labels, decoder_inputs_embeds=embeds), EXCLUSIVE["decoder"]),
        (dict(input_ids=ids, decoder_input_ids=labels, decoder_inputs_embeds=embeds), EXCLUSIVE["decoder"]),
        (dict(input_ids=ids, decoder_input_ids=labels, skip_logits=True), r"skip_logits=True needs labels"),
        (dict(packed_inputs=packed, labels=labels, output_attentions=True), r"output_attentions: packed stacks do not"),
    ]
    for values, text in (
        (torch.zeros(3, 2), r"embeddings \[T, 24\] or token ids \[T\], got torch.float32 \[3, 2\]"),
        (torch.zeros(3, dtype=torch.int16), r"int32 or int64 token ids \[T\], got torch.int16 \[3\]"),
    ):
        inputs = PackedBatch(values, torch.tensor([0, 3], dtype=torch.int32), 3)
        cases.append((dict(packed_inputs=inputs, labels=labels[:1]), text))
    for arguments, text in cases:
        with pytest.raises(ValueError, match=text):
            model(**arguments)
    with pytest.raises(ValueError, match=EXCLUSIVE["mask"]):
        model.encoder(packed_inputs=packed, attention_mask=batch["attention_mask"])
    both = dict(packed_inputs=packed, packed_source=packed)
    for arguments, text in (
        (dict(packed_inputs=packed), r"packed_inputs and packed_source must be given together, got None for packed_so"),
        (dict(input_ids=labels, packed_source=packed), r"must be given together, got None for packed_inputs"),
        (dict(**both, max_seqlen_cross=3), r"must be given together, got None for cu_seqlens_cross"),
        (dict(**both, cu_seqlens_cross=packed.cu_seqlens), r"must be given together, got None for max_seqlen_cross"),
        (dict(packed_inputs=packed, packed_source=ids), r"packed_source must be a PackedBatch, got Tensor"),
        (dict(**both, input_ids=labels), r"forward takes no input_ids with packed_inputs"),
    ):
        with pytest.raises(ValueError, match=text):
            model.decoder(**arguments)
    with pytest.raises(ValueError, match=r"forward takes no input_ids with packed_inputs"):
        model.decoder(labels, **both)
    with pytest.raises(ValueError, match=r"future_ids needs labels in training"):
        model(input_ids=ids, decoder_input_ids=labels, future_ids=labels)
    model.eval()(input_ids=ids, decoder_input_ids=labels, future_ids=labels)
    with pytest.raises(
        ValueError,
        match=r"model must be a T5Stack or .* not wrapped or sharded, got torch.nn.modules.container.Sequential",
    ):
        remove_stamp(torch.nn.Sequential(model))
