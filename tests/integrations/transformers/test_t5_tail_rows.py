"""Tail rows of a stamped T5's packed inputs are never read: bit for bit the results of zeros there."""

import math
from dataclasses import replace

import pytest
import torch
from t5_cases import (
    HEADS,
    LEVELS,
    PREDICTION,
    PRUNING,
    VOCAB_SIZE,
    gradients,
    padded_batch,
    tiny_t5,
    trained_heads,
)
from torch import Tensor

from stamp_kernels.integrations.transformers import EncoderOutput, PruningConfig, apply_stamp
from stamp_kernels.integrations.transformers.packed_trunk import with_empty_tail
from stamp_kernels.packed import PackedBatch

LENGTHS, TAIL = (7, 1, 0, 13), 5
NEVER_READ = [math.nan, math.inf, 3e38]
TWO_POINTS = PruningConfig(schedule=((1, 0.5), (2, 0.5)), protect_first=1)


def embeddings_with_tail(content: float, width: int) -> PackedBatch:
    """Leaves `[T, width]` with content on their tail rows, which have wild positions too."""
    torch.manual_seed(2)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    values = torch.cat([torch.randn(sum(LENGTHS), width), torch.full((TAIL, width), content)])
    positions = torch.cat([torch.arange(n) for n in LENGTHS] + [torch.full((TAIL,), 0 if content == 0 else 2**31 - 1)])
    return PackedBatch(values.requires_grad_(), cu_seqlens, max(LENGTHS), positions.int())


def labels_and_future() -> dict[str, Tensor]:
    torch.manual_seed(3)
    labels, future_ids = torch.randint(1, VOCAB_SIZE, (2, len(LENGTHS), LEVELS))
    labels[1, 2:] = -100
    return dict(labels=labels, future_ids=future_ids)


def training_step(model, content: float, form: str, **options) -> list[Tensor]:
    """The loss and all gradients, with content on the tail rows of the inputs, or of the encoder's outputs."""
    packed = embeddings_with_tail(content, model.config.d_model)
    given = dict(packed_inputs=packed) if form == "inputs" else dict(encoder_outputs=EncoderOutput(packed=packed))
    output = model(**given, **labels_and_future(), **options)
    of_parameters = gradients(model, output.loss)
    return [output.loss.detach(), packed.values.grad, *of_parameters.values()]


def assert_never_reads(model, content: float, form: str = "inputs", **options) -> None:
    expected, got = (training_step(model, value, form, **options) for value in (0.0, content))
    assert len(got) == len(expected) > 20
    for x, want in zip(got, expected, strict=True):
        assert torch.equal(x, want) and x.isfinite().all()
    assert got[1][: sum(LENGTHS)].any() and not got[1][sum(LENGTHS) :].any()


@pytest.mark.parametrize("content", NEVER_READ)
@pytest.mark.parametrize("pruning", [None, PRUNING, TWO_POINTS], ids=["plain", "pruned", "two points"])
def test_training_never_reads_tail_rows(pruning, content):
    assert_never_reads(apply_stamp(tiny_t5(), pruning=pruning), content)


@pytest.mark.parametrize("kind", HEADS)
def test_prediction_heads_never_read_tail_rows(kind):
    model = trained_heads(apply_stamp(tiny_t5(), pruning=PRUNING, prediction=replace(PREDICTION, **HEADS[kind])))
    assert_never_reads(model, math.nan)


@pytest.mark.parametrize("path", ["logits", "hooked head"])
def test_losses_from_logits_never_read_tail_rows(path):
    model = apply_stamp(tiny_t5(), pruning=PRUNING)
    if path == "hooked head":
        model.lm_head.register_forward_hook(lambda module, args, output: 0.5 * output)
    assert_never_reads(model, math.nan, skip_logits=path == "hooked head")


@pytest.mark.parametrize("content", NEVER_READ)
def test_cross_attention_never_reads_tail_rows(content):
    """Encoded histories that the user made: the projections of keys and values run on their tail rows too."""
    model = apply_stamp(tiny_t5(), prediction=PREDICTION)
    assert_never_reads(model, content, form="encoder outputs")


@pytest.mark.parametrize("content", NEVER_READ)
def test_training_never_reads_padding(content):
    """Of embeddings of the encoder and of the decoder, and of encoded histories."""
    model = trained_heads(apply_stamp(tiny_t5(), pruning=PRUNING, prediction=PREDICTION))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    decoder_mask = torch.arange(LEVELS) < torch.tensor([LEVELS, LEVELS, LEVELS, 0])[:, None]  # whole items
    given = labels_and_future()
    given["labels"] = given["labels"].masked_fill(~decoder_mask, -100)
    states, decoder_states = torch.randn(*mask.shape, 24), torch.randn(*decoder_mask.shape, 24)
    for encoded in (False, True):
        results = []
        for value in (0.0, content):
            x = states.masked_fill(~mask[..., None], value).requires_grad_()
            y = decoder_states.masked_fill(~decoder_mask[..., None], value).requires_grad_()
            inputs = dict(encoder_outputs=(x,)) if encoded else dict(inputs_embeds=x)
            loss = model(
                **inputs, attention_mask=mask, decoder_inputs_embeds=y, decoder_attention_mask=decoder_mask, **given
            ).loss
            results.append([loss.detach(), *gradients(model, loss).values(), x.grad, y.grad])
        for want, got in zip(*results, strict=True):
            assert torch.equal(got, want) and got.isfinite().all()


def test_decoding_never_reads_tail_rows():
    model = apply_stamp(tiny_t5(), pruning=PRUNING).eval()
    clean, dirty = (embeddings_with_tail(content, 24) for content in (0.0, math.nan))
    start = torch.zeros(len(LENGTHS), 1, dtype=torch.int64)
    with torch.no_grad():
        logits = [model(packed_inputs=packed, decoder_input_ids=start).logits for packed in (clean, dirty)]
        states = [model.encoder(packed_inputs=packed).packed.values for packed in (clean, dirty)]
    assert torch.equal(*logits) and torch.equal(*states)


def test_known_lengths_cost_no_pass_over_tail_rows():
    batch = padded_batch(LENGTHS)
    packed = PackedBatch.from_padded(batch["input_ids"], batch["attention_mask"])
    assert with_empty_tail(packed) is packed
    longer = replace(packed, values=torch.cat([packed.values, torch.full((2,), -7)]))
    assert with_empty_tail(longer).values.tolist() == [*packed.values.tolist(), 0, 0]
    assert with_empty_tail(replace(longer, lengths_cpu=None)).values.tolist() == [*packed.values.tolist(), 0, 0]
