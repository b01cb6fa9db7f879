"""apply_stamp and remove_stamp, their checkpoints, and the errors of stamped models."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from t5_cases import (
    DTYPE,
    HEADS,
    LENGTHS,
    LEVELS,
    PREDICTION,
    PRUNING,
    VOCAB_SIZE,
    future_batch,
    packed_batch,
    padded_batch,
    stamped,
    tiny_t5,
    trained_heads,
)
from torch import Tensor, nn
from transformers import T5EncoderModel, T5ForConditionalGeneration

from stamp_kernels.integrations.transformers import (
    PredictionConfig,
    PruningConfig,
    StampT5EncoderModel,
    StampT5ForConditionalGeneration,
    apply_stamp,
    remove_stamp,
)
from stamp_kernels.integrations.transformers.multi_step_targets import multi_step_targets
from stamp_kernels.modules.prediction import LinearDecay

LORA = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, target_modules=["q"])

# ---- apply_stamp and remove_stamp ----------------------------------------------------------------------------------


def description(model: nn.Module) -> dict[str, object]:
    """Everything that `apply_stamp` may change, by value."""
    stacks = [stack for stack in (model.encoder, getattr(model, "decoder", None)) if stack is not None]
    return dict(
        types=[(name, type(module)) for name, module in model.named_modules()],
        attributes=[(name, sorted(vars(module))) for name, module in model.named_modules()],
        keys=list(model.state_dict()),
        configs=[each.config.to_dict() for each in (model, *stacks)],
        training=[module.training for module in model.modules()],
    )


def outputs_of(model: nn.Module) -> Tensor:
    batch = padded_batch()
    if isinstance(model, T5EncoderModel):
        del batch["labels"]
        return model(**batch).last_hidden_state
    return model(**batch, use_cache=False).logits


@pytest.mark.parametrize("base_class", [T5ForConditionalGeneration, T5EncoderModel])
@pytest.mark.parametrize("training", [True, False])
def test_remove_stamp_restores_the_base_model(base_class, training):
    torch.manual_seed(0)
    model = base_class(tiny_t5().config).train(training)
    expected, expected_outputs = description(model), outputs_of(model)
    prediction = None if base_class is T5EncoderModel else PREDICTION
    apply_stamp(model, pruning=PRUNING, prediction=prediction)
    assert description(model) != expected
    remove_stamp(model)
    assert description(model) == expected
    assert torch.equal(outputs_of(model), expected_outputs)
    remove_stamp(model)  # does nothing to a base model
    assert description(model) == expected


def test_remove_stamp_restores_a_loaded_model(tmp_path):
    base = tiny_t5()
    stamped(base, pruning=PRUNING, prediction=PREDICTION).save_pretrained(tmp_path / "stamped")
    base.save_pretrained(tmp_path / "base")
    expected = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    model = StampT5ForConditionalGeneration.from_pretrained(tmp_path / "stamped")
    remove_stamp(model)
    expected_description, got = description(expected), description(model)
    for configs in (expected_description["configs"], got["configs"]):
        for config in configs:
            config.pop("_name_or_path", None)
    assert got == expected_description
    assert torch.equal(outputs_of(model), outputs_of(expected))


def test_apply_stamp_is_in_place_and_idempotent():
    base = tiny_t5()
    parameters = dict(base.named_parameters())
    model = apply_stamp(base, pruning=PRUNING, prediction=PREDICTION)
    assert model is base
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    batch = future_batch()
    expected_description, expected_loss = description(trained_heads(model)), model(**batch).loss
    heads = model.stamp_prediction
    assert apply_stamp(model, pruning=PRUNING, prediction=PREDICTION) is model
    assert model.stamp_prediction is heads
    assert description(model) == expected_description and torch.equal(model(**batch).loss, expected_loss)


def test_apply_stamp_again_replaces_the_configurations():
    model = trained_heads(apply_stamp(tiny_t5(), pruning=PRUNING, prediction=PREDICTION))
    heads = model.stamp_prediction
    weight = heads.heads[0].linear.weight
    apply_stamp(model, pruning=PruningConfig(schedule=[(2, 0.25)], protect_last=1), prediction=PREDICTION)
    assert model.stamp_prediction is heads and model.stamp_prediction.heads[0].linear.weight is weight
    assert list(model.encoder.stamp_pruning) == ["2"] and model.encoder.stamp_pruning["2"].protected_ends == (0, 1)
    assert model.config.stamp["pruning"]["schedule"] == ((2, 0.25),)

    apply_stamp(model, prediction=replace(PREDICTION, lambda_=0.5))
    assert model.stamp_prediction is not heads and model.stamp_prediction.lambda_ == 0.5
    assert len(model.encoder.stamp_pruning) == 0 and model.config.stamp["pruning"] is None

    apply_stamp(model)
    assert model.stamp_prediction is None
    assert list(model.state_dict()) == list(tiny_t5().state_dict())
    batch = padded_batch()
    assert torch.equal(model(**batch).loss, apply_stamp(tiny_t5())(**batch).loss)


@pytest.mark.parametrize("before", [{}, dict(pruning=PRUNING, prediction=PREDICTION)], ids=["base", "stamped"])
def test_refused_configurations_change_nothing(before):
    model = apply_stamp(tiny_t5(), **before) if before else tiny_t5()
    expected, expected_outputs = description(model), outputs_of(model.eval())
    refused = replace(PREDICTION, head="transformer", num_attention_heads=2)
    with pytest.raises(ValueError, match="num_attention_heads must divide hidden_size 24 into multiples of 8, got 2"):
        apply_stamp(model, pruning=PruningConfig(schedule=[(2, 0.1)]), prediction=refused)
    assert description(model.train()) == expected
    assert torch.equal(outputs_of(model.eval()), expected_outputs)


def test_number_of_parameters():
    base = tiny_t5()
    expected = base.num_parameters()
    assert stamped(base).num_parameters() == expected
    assert stamped(base, pruning=PRUNING).num_parameters() == expected
    with_heads = stamped(base, pruning=PRUNING, prediction=PREDICTION)
    heads = 2 * (24 * 24 + 24)
    assert with_heads.num_parameters() == expected + heads
    assert sum(p.numel() for p in with_heads.stamp_prediction.parameters()) == heads


def test_pruning_follows_the_mode():
    pruning = PruningConfig(schedule=[(1, 0.5)], prune_in_eval=False)
    model = apply_stamp(tiny_t5(), pruning=pruning)
    batch = padded_batch(padding_side="left")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def kept() -> list[int]:
        return model.encoder(**inputs).attention_mask.sum(1).tolist()

    halves = [-(-n // 2) for n in LENGTHS]
    assert kept() == halves
    model.eval()
    assert torch.equal(model.encoder(**inputs).attention_mask, batch["attention_mask"].bool())  # in their places
    assert torch.equal(outputs_of(model), outputs_of(apply_stamp(tiny_t5()).eval()))
    model.encoder.train()
    assert kept() == halves
    apply_stamp(model.eval(), pruning=PRUNING, prediction=PREDICTION)
    assert kept() == halves
    assert not any(module.training for module in model.modules())


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def edit_config(directory: Path, edit: Callable[[dict], None]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", HEADS)
def test_checkpoints_keep_pruning_and_heads(kind, tmp_path):
    prediction = PredictionConfig(
        num_steps=2,
        step_weights=(1.0, 0.5),
        vocab_ranges=[(0, VOCAB_SIZE)] * LEVELS,
        lambda_=LinearDecay(0.3, 0.1, 10),
        **HEADS[kind],
    )
    pruning = PruningConfig(schedule=[(1, 0.5), (2, 1 / 3)], protect_first=1, norm="l2", min_keep=2)
    model = trained_heads(apply_stamp(tiny_t5(), pruning=pruning, prediction=prediction))
    model.save_pretrained(tmp_path)
    loaded, keys = StampT5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not keys["missing_keys"] and not keys["unexpected_keys"]
    assert loaded.stamp_prediction_config == prediction and loaded.stamp_prediction.lambda_ == prediction.lambda_
    assert PruningConfig(**loaded.config.stamp["pruning"]) == pruning
    assert list(loaded.encoder.stamp_pruning) == ["1", "2"] and loaded.encoder.stamp_pruning["1"].norm == "l2"
    batch = future_batch() | dict(training_step=5)
    for mode in (True, False):
        expected, got = (each.train(mode)(**batch, use_cache=False) for each in (model, loaded))
        assert torch.equal(got.loss, expected.loss) and torch.equal(got.next_token_loss, expected.next_token_loss)

    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["T5ForConditionalGeneration"]
    base = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert type(base) is T5ForConditionalGeneration
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in base.named_parameters())
    again = apply_stamp(base, pruning=pruning)  # the base model's class keeps unknown entries of its config
    assert again.config.stamp["prediction"] is None


def test_checkpoints_of_another_dtype(tmp_path):
    trained_heads(apply_stamp(tiny_t5(), prediction=PREDICTION)).save_pretrained(tmp_path)
    model = StampT5ForConditionalGeneration.from_pretrained(tmp_path, **{DTYPE: torch.bfloat16})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_checkpoints_of_the_base_model(tmp_path):
    base = tiny_t5()
    base.save_pretrained(tmp_path)
    model = StampT5ForConditionalGeneration.from_pretrained(tmp_path)
    assert model.stamp_prediction is None and len(model.encoder.stamp_pruning) == 0
    assert torch.equal(outputs_of(model), outputs_of(apply_stamp(base).eval()))
    apply_stamp(model, pruning=PRUNING)
    assert model.encoder.is_pruned


@pytest.mark.parametrize("kind", HEADS)
def test_heads_missing_from_a_checkpoint_are_the_identity(kind, tmp_path):
    """The weights are those of a base model, only the config has a description of heads."""
    tiny_t5().save_pretrained(tmp_path)
    edit_config(
        tmp_path, lambda config: config.update(stamp=dict(pruning=None, prediction=dict(num_steps=2, **HEADS[kind])))
    )
    model, keys = StampT5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert keys["missing_keys"] and all(key.startswith("stamp_prediction.") for key in keys["missing_keys"])
    assert_identity(model.stamp_prediction.heads[0])
    assert_identity(model.stamp_prediction.heads[1])
    if kind == "own unembedding":
        assert 0.8 < model.stamp_prediction.unembedding.std() * 24**0.5 < 1.2


@pytest.mark.parametrize("kind", HEADS)
def test_more_heads_than_a_checkpoint_has(kind, tmp_path):
    one = replace(PREDICTION, num_steps=1, **HEADS[kind])
    saved = trained_heads(apply_stamp(tiny_t5(), prediction=one))
    saved.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["stamp"]["prediction"].update(num_steps=2))
    model = StampT5ForConditionalGeneration.from_pretrained(tmp_path)
    state = model.stamp_prediction.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.stamp_prediction.state_dict().items())
    assert_identity(model.stamp_prediction.heads[1])


def test_unembedding_missing_from_a_checkpoint(tmp_path):
    """The heads are loaded, and stay as they are."""
    saved = trained_heads(apply_stamp(tiny_t5(), prediction=PREDICTION))
    saved.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config["stamp"]["prediction"].update(unembedding="own"))
    model = StampT5ForConditionalGeneration.from_pretrained(tmp_path)
    state = model.stamp_prediction.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.stamp_prediction.state_dict().items())
    assert 0.8 < model.stamp_prediction.unembedding.std() * 24**0.5 < 1.2


def assert_identity(head: nn.Module) -> None:
    states = torch.randn(6, 24)
    assert torch.equal(head(states, torch.tensor([0, 2, 6], dtype=torch.int32), 4), states)


@pytest.mark.parametrize("prediction", [None, PREDICTION], ids=["SAP", "SAP and MAP"])
def test_encoder_of_a_checkpoint(prediction, tmp_path):
    model = apply_stamp(tiny_t5(), pruning=PRUNING, prediction=prediction)
    model.save_pretrained(tmp_path)
    encoder = StampT5EncoderModel.from_pretrained(tmp_path)
    inputs = {name: padded_batch()[name] for name in ("input_ids", "attention_mask")}
    expected = model.eval().encoder(**inputs)
    got = encoder(**inputs)
    assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(got.positions, expected.positions)


def test_checkpoints_with_configurations_that_do_not_fit(tmp_path):
    """Refused as by `apply_stamp`: blocks that do not exist would not prune."""
    model = apply_stamp(tiny_t5(), pruning=PruningConfig(schedule=[(3, 0.5)]))
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, lambda config: config.update(num_layers=2))
    with pytest.raises(ValueError, match="schedule must have blocks from 1 to 2, got 3"):
        StampT5ForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config.d_kv must be a multiple of 8 from 8 to 256, got 12"):
        StampT5ForConditionalGeneration(tiny_t5(d_kv=12).config)


# ---- errors --------------------------------------------------------------------------------------------------------


def test_apply_stamp_errors():
    for model, name in (
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (torch.compile(tiny_t5()), "torch._dynamo.eval_frame.OptimizedModule"),
        (nn.DataParallel(tiny_t5()), "torch.nn.parallel.data_parallel.DataParallel"),
        (get_peft_model(tiny_t5(), LORA), "peft.peft_model.PeftModelForSeq2SeqLM"),
    ):
        with pytest.raises(ValueError, match=rf"of transformers or a subclass, not wrapped or sharded, got {name}$"):
            apply_stamp(model)
    with pytest.raises(ValueError, match="prediction needs a T5ForConditionalGeneration, got a T5EncoderModel"):
        apply_stamp(T5EncoderModel(tiny_t5().config), prediction=PREDICTION)
    for d_kv in (12, 264):
        with pytest.raises(ValueError, match=f"model.config.d_kv must be a multiple of 8 from 8 to 256, got {d_kv}"):
            apply_stamp(tiny_t5(d_kv=d_kv))
    with pytest.raises(ValueError, match="schedule must have blocks from 1 to 3, got 4"):
        apply_stamp(tiny_t5(), pruning=PruningConfig(schedule=[(1, 0.5), (4, 0.5)]))


FORWARD_ERRORS = {
    "decoder_attention_mask": (
        dict(decoder_attention_mask=torch.ones(6, 3)),
        r"attention_mask must have shape \[6, 4\], got \[6, 3\]",
    ),
    "no future_ids": (
        dict(future_ids=None),
        "future_ids must be given in training with a PredictionConfig, got None",
    ),
    "future_ids of other users": (
        dict(future_ids=torch.ones(2, 8, dtype=torch.int64)),
        r"future_ids must have shape \[6, num_future\], got \[2, 8\]",
    ),
    "future_ids of another dtype": (
        dict(future_ids=torch.ones(6, 8, dtype=torch.int32)),
        "future_ids must have dtype torch.int64, got torch.int32",
    ),
    "labels that are not whole items": (
        dict(labels=torch.ones(6, 3, dtype=torch.int64)),
        r"labels must be whole items of 4 codes, got \[6, 3\]",
    ),
    "num_future_targets": (
        dict(num_future_targets=torch.ones(3)),
        r"target_counts must have shape \[2, 4\], got \[3\]",
    ),
    "output_attentions": (dict(output_attentions=True), "output_attentions: packed stacks do not have this"),
    "use_cache": (
        dict(use_cache=True),
        "use_cache: packed stacks do not have this, and prediction with labels needs them",
    ),
    "return_dict": (dict(return_dict=False), "return_dict=False: packed stacks do not have this"),
    "labels without a batch": (
        dict(labels=torch.ones(6, dtype=torch.int64)),
        r"labels must have shape \[6, num_labels\], got \[6\]",
    ),
    "labels of other users": (
        dict(labels=torch.ones(3, 4, dtype=torch.int64)),
        r"labels must have shape \[6, num_labels\], got \[3, 4\]",
    ),
    "labels of another dtype": (
        dict(labels=torch.ones(6, 4, dtype=torch.int32)),
        r"labels must have dtype torch.int64, got torch.int32",
    ),
    "labels of another length than decoder_input_ids": (
        dict(decoder_input_ids=torch.ones(6, 5, dtype=torch.int64)),
        r"decoder_input_ids must have shape \[6, 4\], got \[6, 5\]",
    ),
    "an unknown argument": (dict(future_labels=torch.ones(6, 4)), "forward takes no future_labels"),
}


@pytest.mark.parametrize("case", FORWARD_ERRORS)
def test_forward_errors(case):
    arguments, message = FORWARD_ERRORS[case]
    model = apply_stamp(tiny_t5(), pruning=PRUNING, prediction=PREDICTION)
    with pytest.raises(ValueError, match=message):
        model(**{**future_batch(), **arguments})


def test_forward_of_a_decaying_weight_needs_the_step():
    model = apply_stamp(tiny_t5(), prediction=replace(PREDICTION, lambda_=LinearDecay(0.3, 0.1, 10)))
    with pytest.raises(ValueError, match="training_step must be given if lambda_ is a function of it, got None"):
        model(**future_batch())


def test_evaluation_needs_no_future():
    model = apply_stamp(tiny_t5(), prediction=PREDICTION).eval()
    output = model(**padded_batch(), use_cache=False)
    assert output.prediction_loss is None and torch.equal(output.loss, output.next_token_loss)


def test_labels_outside_the_vocabulary():
    model = apply_stamp(tiny_t5())
    batch = padded_batch()
    batch["labels"][2, -1] = VOCAB_SIZE
    with pytest.raises(RuntimeError, match=rf"targets\[11, 0\] is {VOCAB_SIZE}, .* range \[0, {VOCAB_SIZE}\)"):
        model(**batch)


def test_encoder_errors():
    encoder = apply_stamp(tiny_t5()).encoder
    packed = packed_batch()
    with pytest.raises(ValueError, match="exactly one of input_ids, inputs_embeds, packed_inputs must be given"):
        encoder()
    ids = replace(packed, values=packed.values[:, None])
    with pytest.raises(ValueError, match=r"must be int32 or int64 token ids \[T\], got torch.int64 \[253, 1\]"):
        encoder(packed_inputs=ids)
    with pytest.raises(ValueError, match="output_attentions: packed stacks do not have this"):
        encoder(packed_inputs=packed, output_attentions=True)


def test_target_errors():
    labels, future_ids = torch.ones(2, 4, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels must have shape \[batch, num_labels\], got \[4\]"):
        multi_step_targets(labels[0], future_ids, PREDICTION)
    with pytest.raises(ValueError, match=r"future_ids must have shape \[2, num_future\], got \[1, 8\]"):
        multi_step_targets(labels, future_ids[:1], PREDICTION)
    with pytest.raises(ValueError, match=r"labels must be whole items of 4 codes, got \[2, 3\]"):
        multi_step_targets(labels[:, :3], future_ids, PREDICTION)
