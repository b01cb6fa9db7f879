"""The auxiliary losses of stamped T5s, summed up target by target, and the target counts of parts of a batch."""

import copy
import dataclasses
import math
from collections import defaultdict

import pytest
import torch
from closeness import relative_error
from padded_stamp import (
    FEW_BUCKETS,
    LENGTHS,
    PRUNINGS,
    V1_1,
    encode_padded,
    in_turn,
    inputs_of,
    stamped,
)
from t5_cases import LEVELS, VOCAB_SIZE, assert_same_training_step, gradients, padded_batch, tiny_t5
from torch import Tensor
from torch.nn import functional as F
from transformers import T5ForConditionalGeneration

from stamp_kernels.integrations.transformers import (
    PredictionConfig,
    PruningConfig,
    StampT5ForConditionalGeneration,
    apply_stamp,
    global_target_counts,
)
from stamp_kernels.modules.prediction import LinearDecay

# Level l of an item has the codes 1 + 15 l to 15 + 15 l.

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
EOS = 0
# What the users' labels are, and whether a decoder mask hides what has no label.
SHAPES = {
    "one_item": (False, False),
    "two_items": (False, False),
    "one_or_two_items": (False, True),
    "two_items_and_eos": (True, False),
    "one_or_two_items_and_eos": (True, True),
    "one_or_two_items_and_eos_in_view": (True, False),
}


def future_batch(items: int = 1) -> dict[str, Tensor]:
    """A padded batch with `items` items as labels, and future_ids that end after different numbers of items."""
    batch = padded_batch(LENGTHS)
    num_future = (0, 1, 2, 4, 3)  # items
    codes = torch.randint(15, (len(LENGTHS), items + max(num_future), LEVELS)) + torch.tensor(CODES)[:, 0]
    batch["labels"], batch["future_ids"] = codes[:, :items].flatten(1), codes[:, items:].flatten(1).clone()
    for row, number in zip(batch["future_ids"], num_future, strict=True):
        row[LEVELS * number :] = -100
    return batch


def append_eos(batch: dict[str, Tensor]) -> None:
    """An end-of-sequence token behind the last item of the labels, and of the future where there is room."""
    batch["labels"] = F.pad(batch["labels"], (0, 1), value=-100)
    for name in ("labels", "future_ids"):
        for row in batch[name]:
            places = (row == -100).nonzero()
            if len(places) > 0:
                row[places[0]] = EOS


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
    base: T5ForConditionalGeneration,
    states: Tensor,
    batch: dict[str, Tensor],
    config: PredictionConfig,
    decoder_mask: Tensor,
) -> Tensor:
    """`lambda * sum_k w_k * mean over levels of (mean over valid targets of the cross-entropy)`, target by target."""
    heads = base.stamp_prediction
    unembedding = heads.unembedding if config.unembedding == "own" else base.lm_head.weight
    histories = []  # of each user: the labels up to the end of the items, and with the future directly behind
    for labels, future in zip(batch["labels"].tolist(), batch["future_ids"].tolist(), strict=True):
        if config.eos_token_id in labels:
            del labels[labels.index(config.eos_token_id) :]
        while labels and set(labels[-LEVELS:]) == {-100}:
            del labels[-LEVELS:]
        histories.append((labels, labels + future))
    stride = LEVELS if config.unit == "item" else 1
    loss = 0.0
    for step in range(1, config.num_steps + 1):
        losses = defaultdict(list)  # by level
        for user_states, visible, (labels, tokens) in zip(states, decoder_mask, histories, strict=True):
            outputs = torch.zeros_like(user_states)
            outputs[visible] = apply_head(heads.heads[step - 1], config.head, user_states[visible])
            logits = outputs @ unembedding.T
            for place, label in enumerate(labels):
                ahead = place + step * stride
                if label == -100 or not visible[place] or ahead >= len(tokens):
                    continue
                if tokens[ahead] in (-100, config.eos_token_id):
                    continue
                start, end = (0, VOCAB_SIZE) if config.vocab_ranges is None else CODES[place % LEVELS]
                probability = logits[place, start:end].softmax(-1)[tokens[ahead] - start]
                losses[place % LEVELS].append(-probability.log())
        weight = 1.0 if config.step_weights is None else config.step_weights[step - 1]
        loss = loss + weight * sum(sum(of_level) / len(of_level) for of_level in losses.values()) / LEVELS
    decays = isinstance(config.lambda_, LinearDecay)
    return loss * (0.5 - (0.5 - 0.1) * TRAINING_STEP / 8 if decays else config.lambda_)


def base_with_heads(model: T5ForConditionalGeneration, **config) -> T5ForConditionalGeneration:
    """The base model of a stamped model, with a copy of the heads for their parameters."""
    base = tiny_t5(torch.float64, **FEW_BUCKETS, **config)
    base.stamp_prediction = copy.deepcopy(model.stamp_prediction)
    return base


def predicting(config: PredictionConfig, pruning: PruningConfig | None = None, **base_config):
    """(base model with heads, stamped model). The heads are random, not the identity."""
    model = stamped(tiny_t5(torch.float64, **FEW_BUCKETS, **base_config), pruning, config)
    randomize(model.stamp_prediction)
    return base_with_heads(model, **base_config), model


def assert_equals_written_out(config: PredictionConfig, batch: dict[str, Tensor], **inputs) -> None:
    """One training step, with the decoder_attention_mask and decoder_input_ids of `inputs`, if there are any."""
    pruning = PRUNINGS["paper"]
    base_config = V1_1 if config is PREDICTIONS["ranges"] else {}
    base, model = predicting(config, pruning, **base_config)
    decoder_mask = inputs.get("decoder_attention_mask", torch.ones_like(batch["labels"]))
    encoded = encode_padded(base, **inputs_of(batch), pruning=pruning)
    decoded = base.decoder(
        input_ids=inputs.get("decoder_input_ids", base._shift_right(batch["labels"])),
        attention_mask=decoder_mask.long(),
        encoder_hidden_states=encoded.states,
        encoder_attention_mask=encoded.kept.long(),
    )
    states = decoded.last_hidden_state * (1.0 if base_config else base.config.d_model**-0.5)
    next_token_loss = F.cross_entropy(base.lm_head(states).flatten(0, 1), batch["labels"].flatten())
    prediction_loss = written_out_prediction_loss(base, states, batch, config, decoder_mask.bool())

    counts = global_target_counts(batch["labels"], batch["future_ids"], config)
    for of_batch in ({}, counts):
        output = model(**batch, **inputs, **of_batch, training_step=TRAINING_STEP)
        assert relative_error(output.next_token_loss, next_token_loss) < 1e-9
        assert relative_error(output.prediction_loss, prediction_loss) < 1e-9
        assert not output.next_token_loss.requires_grad and not output.prediction_loss.requires_grad
    assert_same_training_step(base, next_token_loss + prediction_loss, model, output.loss)


@pytest.mark.parametrize(("name", "shape"), in_turn(PREDICTIONS, SHAPES, each=3))
def test_prediction_loss_equals_the_written_out_formula(name, shape):
    config, (has_eos, is_masked) = PREDICTIONS[name], SHAPES[shape]
    batch = future_batch(1 if shape == "one_item" else 2)
    if shape.startswith("one_or_two_items"):  # the second one of some is padding
        batch["labels"][1::2, LEVELS:] = -100
    if has_eos:
        config = dataclasses.replace(config, eos_token_id=EOS)
        append_eos(batch)
    assert_equals_written_out(
        config, batch, **(dict(decoder_attention_mask=batch["labels"] != -100) if is_masked else {})
    )


@pytest.mark.parametrize("has_eos", [False, True])
@pytest.mark.parametrize("name", PREDICTIONS)
def test_decoder_mask_may_hide_a_part_of_an_item(name, has_eos):
    """A hidden code has no target. The codes of other users, and of this one behind it, keep theirs."""
    config, batch = PREDICTIONS[name], future_batch(2)
    if has_eos:
        config = dataclasses.replace(config, eos_token_id=EOS)
        append_eos(batch)
    masks = ["11111111", "01111111", "11011110", "10110111", "11100000"]
    decoder_mask = torch.tensor([[int(visible) for visible in mask] for mask in masks])
    decoder_mask = F.pad(decoder_mask, (0, int(has_eos)), value=1)
    decoder_input_ids = F.pad(batch["labels"][:, :-1].clamp(min=0), (1, 0))
    batch["labels"] = batch["labels"].masked_fill(decoder_mask == 0, -100)
    assert_equals_written_out(config, batch, decoder_attention_mask=decoder_mask, decoder_input_ids=decoder_input_ids)


def test_label_that_the_decoder_mask_hides_has_no_loss():
    _, model = predicting(PREDICTIONS["residual"])
    batch = future_batch(2)
    decoder_mask = torch.ones_like(batch["labels"])
    decoder_mask[2, 1] = decoder_mask[4, 3] = 0
    inputs = dict(decoder_attention_mask=decoder_mask, decoder_input_ids=model._shift_right(batch["labels"]))
    # They are in the first items, which no step predicts, so that they are targets of nothing else.
    without = batch | dict(labels=batch["labels"].masked_fill(decoder_mask == 0, -100))
    assert torch.equal(model(**batch, **inputs).loss, model(**without, **inputs).loss)


def halves(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The users in two parts of different sizes. No user of the first part has a second item after the next."""
    return [{name: x[users] for name, x in batch.items()} for users in (slice(2), slice(2, None))]


def losses_of_parts_and_whole(config: PredictionConfig, batch: dict[str, Tensor]):
    """(model, outputs of the two halves with the counts of both, output of the whole batch by itself)."""
    _, model = predicting(config, PRUNINGS["two_points"])
    counts = [global_target_counts(half["labels"], half["future_ids"], config) for half in halves(batch)]
    counts = {name: sum(of_half[name] for of_half in counts) for name in counts[0]}
    parts = [model(**half, **counts, training_step=TRAINING_STEP) for half in halves(batch)]
    return model, parts, model(**batch, training_step=TRAINING_STEP)


@pytest.mark.parametrize(
    ("name", "items"), [("residual", 1), ("own_ranges", 2), ("tokens", 1), ("tokens_own", 2), ("residual", 2)]
)
def test_losses_of_parts_add_up(name, items):
    batch = future_batch(items)
    batch["labels"][3, 1] = batch["labels"][0] = -100
    model, parts, whole = losses_of_parts_and_whole(PREDICTIONS[name], batch)
    for loss in ("loss", "next_token_loss", "prediction_loss"):
        assert relative_error(sum(getattr(part, loss) for part in parts), getattr(whole, loss)) < 1e-9
    expected, got = gradients(model, whole.loss), gradients(model, sum(part.loss for part in parts))
    assert expected.keys() == got.keys() == dict(model.named_parameters()).keys()
    for parameter in expected:
        assert relative_error(got[parameter], expected[parameter]) < 1e-9, parameter


def test_part_may_have_no_targets():
    batch = future_batch()
    for targets in ("labels", "future_ids"):
        batch[targets][:2] = -100
    model, (without, other), whole = losses_of_parts_and_whole(PREDICTIONS["residual"], batch)
    assert without.loss == without.next_token_loss == without.prediction_loss == 0
    assert relative_error(other.loss, whole.loss) < 1e-9
    assert not any(gradient.any() for gradient in gradients(model, without.loss).values())


def test_only_num_items_weights_parts_by_labels():
    """As with Hugging Face's Trainer: the auxiliary losses are then means over the part."""
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

    # Step 1: first codes 12, 13 and 12, 13; second codes 22, 23. Step 2: 13, 14 and 13; 23 and 23. Step 3: 14.
    # Without a label there is no target: the 23 one item behind the second user's missing code does not count.
    counts = global_target_counts(labels, future_ids, PredictionConfig(num_steps=3, codes_per_item=2))
    assert counts["num_items_in_batch"] == 7
    assert counts["num_future_targets"].tolist() == [[4, 2], [3, 2], [1, 0]]

    # Step 1, at places of first codes: 21, 22 and 21; of second codes: 12, 13 and 12. Step 2 is step 1 of above.
    counts = global_target_counts(labels, future_ids, PredictionConfig(num_steps=2, codes_per_item=2, unit="token"))
    assert counts["num_future_targets"].tolist() == [[3, 3], [4, 2]]
    assert counts["num_future_targets"].dtype == counts["num_items_in_batch"].dtype == torch.int64


def test_target_counts_of_labels_with_eos():
    config = PredictionConfig(num_steps=2, codes_per_item=2, eos_token_id=1)
    labels = torch.tensor([[11, 21, 12, 22, 1], [11, 21, 1, -100, -100], [1, -100, -100, -100, -100]])
    future_ids = torch.tensor([[13, 23, 1, -100], [12, 22, 13, 23], [11, 21, 1, -100]])
    counts = global_target_counts(labels, future_ids, config)
    # Step 1: 12, 13 and 12; 22, 23 and 22. Step 2: 13 and 13; 23 and 23. Nothing is predicted from an eos or as one.
    assert counts["num_items_in_batch"] == 9  # of the next-token loss
    assert counts["num_future_targets"].tolist() == [[3, 3], [2, 2]]
    only_eos = global_target_counts(torch.ones(2, 1, dtype=torch.int64), future_ids[:2], config)
    assert only_eos["num_items_in_batch"] == 2 and not only_eos["num_future_targets"].any()


def test_labels_of_only_eos_have_no_prediction_loss():
    config = dataclasses.replace(PREDICTIONS["residual"], eos_token_id=EOS)
    _, model = predicting(config)
    batch = future_batch() | dict(labels=torch.full((len(LENGTHS), 1), EOS))
    output = model(**batch)
    assert output.prediction_loss == 0 and output.loss == output.next_token_loss > 0


@pytest.mark.parametrize(
    ("labels", "eos", "error", "message"),
    [
        ([[11, 21, 1]], None, ValueError, r"labels must be whole items of 2 codes, got \[1, 3\]: name an end-of"),
        ([[11, 21, 2]], 1, RuntimeError, r"whole items of 2 codes before eos_token_id 1, got 2 at \[0, 2\] of the"),
        ([[-100] * 4, [11, 21, 12, 1]], 1, RuntimeError, r"eos_token_id 1 only behind whole items of 2 .* \[1, 3\]"),
    ],
)
def test_names_labels_that_are_not_whole_items(labels, eos, error, message):
    config = PredictionConfig(num_steps=1, codes_per_item=2, eos_token_id=eos)
    labels = torch.tensor(labels)
    with pytest.raises(error, match=message):
        global_target_counts(labels, torch.ones_like(labels), config)


def test_target_counts_need_future_ids_and_prediction_together():
    labels = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="future_ids and prediction must be given together, got None for prediction"):
        global_target_counts(labels, labels)
    with pytest.raises(ValueError, match="future_ids and prediction must be given together, got None for future_ids"):
        global_target_counts(labels, prediction=PredictionConfig())


def test_counts_of_a_batch_change_nothing():
    config = PREDICTIONS["residual"]
    _, model = predicting(config)
    batch = future_batch(2)
    batch["labels"][:3, LEVELS:] = -100
    decoder_attention_mask = batch["labels"] != -100
    counts = global_target_counts(batch["labels"], batch["future_ids"], config)
    expected, got = (model(**batch, **given, decoder_attention_mask=decoder_attention_mask) for given in ({}, counts))
    assert relative_error(got.next_token_loss, expected.next_token_loss) < 1e-9
    assert relative_error(got.prediction_loss, expected.prediction_loss) < 1e-9


@pytest.mark.parametrize("num_tokens", [VOCAB_SIZE + 9, VOCAB_SIZE - 1])
def test_resizing_embeddings_resizes_an_unembedding_of_its_own(tmp_path, num_tokens):
    model = stamped(tiny_t5(), prediction=PredictionConfig(num_steps=2, codes_per_item=LEVELS, unembedding="own"))
    before = model.stamp_prediction.unembedding.detach().clone()
    model.resize_token_embeddings(num_tokens)
    unembedding, kept = model.stamp_prediction.unembedding, min(num_tokens, VOCAB_SIZE)
    assert unembedding.shape == model.lm_head.weight.shape == (num_tokens, 24)
    assert torch.equal(unembedding[:kept], before[:kept])
    assert unembedding.requires_grad

    batch = {name: x.clamp(max=num_tokens - 1) for name, x in future_batch().items()}
    batch["future_ids"][0, 0] = num_tokens - 1
    loss = model(**batch).loss
    loss.backward()
    assert unembedding.grad[num_tokens - 1].any()

    model.save_pretrained(tmp_path)
    loaded = StampT5ForConditionalGeneration.from_pretrained(tmp_path).train()
    assert torch.equal(loaded(**batch).loss, loss)
    heads = loaded.stamp_prediction
    assert apply_stamp(loaded, prediction=loaded.stamp_prediction_config).stamp_prediction is heads

    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.stamp_prediction.unembedding.shape == model.lm_head.weight.shape
