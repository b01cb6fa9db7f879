"""Hugging Face's Trainer on stamped T5s: MovieLens-100K, padded and packed, against the base model."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.trainer
from closeness import relative_error
from peft import LoraConfig, TaskType, get_peft_model
from t5_cases import tiny_t5
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    Trainer,
)

from stamp_kernels.data import PackingCollator
from stamp_kernels.integrations.transformers import (
    PredictionConfig,
    PruningConfig,
    StampT5ForConditionalGeneration,
    apply_stamp,
)
from stamp_kernels.integrations.transformers.multi_step_targets import multi_step_targets
from stamp_kernels.profiling.data.interactions import load_interactions
from stamp_kernels.profiling.data.rows import TrainingRows
from stamp_kernels.profiling.data.semantic_ids import assign_semantic_ids
from stamp_kernels.profiling.data.vocabulary import Vocabulary

LEVELS, CODEBOOK_SIZE = 4, 16
VOCABULARY = Vocabulary(LEVELS, CODEBOOK_SIZE)
NUM_STEPS = 2
FUTURE_LENGTH = NUM_STEPS * LEVELS
PRUNING = PruningConfig(schedule=[(1, 0.5)])
PREDICTION = PredictionConfig(NUM_STEPS, LEVELS, vocab_ranges=[VOCABULARY.level_range(i) for i in range(LEVELS)])
MAX_STEPS = 40

Features = list[dict[str, list[int]]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Features:
    """Histories of 1 to 6 items, the item after each as labels, and up to 2 items after that."""
    try:
        interactions = load_interactions(None)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    cache = tmp_path_factory.mktemp("semantic_ids")
    semantic_ids = assign_semantic_ids(
        interactions, codes_per_item=LEVELS, codebook_size=CODEBOOK_SIZE, cache_dir=cache
    )
    chosen = TrainingRows(interactions, max_items=6, rows=320)

    def tokens(start: int, end: int) -> list[int]:
        return VOCABULARY.tokens(semantic_ids[chosen.items[start:end]]).reshape(-1).tolist()

    triples = zip(chosen.start.tolist(), chosen.target.tolist(), chosen.end.tolist(), strict=True)
    return [
        dict(input_ids=tokens(s, t), labels=tokens(t, t + 1), future_ids=tokens(t + 1, min(e, t + 1 + NUM_STEPS)))
        for s, t, e in triples
    ]


def with_ragged_labels(rows: Features) -> Features:
    """One or two items as labels, so that some rows are padded with -100, and no future."""
    return [
        dict(input_ids=row["input_ids"], labels=row["labels"] + row["future_ids"][: LEVELS * (i % 2)])
        for i, row in enumerate(rows)
    ]


def with_padded_future(rows: Features) -> Features:
    """For Hugging Face's collators, which do not pad unknown columns."""
    return [row | dict(future_ids=(row["future_ids"] + [-100] * FUTURE_LENGTH)[:FUTURE_LENGTH]) for row in rows]


def padding_collator(model: nn.Module | None = None) -> DataCollatorForSeq2Seq:
    """Hugging Face's own. With a model it adds decoder_input_ids."""
    vocabulary = Tokenizer(WordLevel({"<pad>": VOCABULARY.pad_id}, unk_token="<pad>"))
    return DataCollatorForSeq2Seq(PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>"), model)


def small_t5(dtype: torch.dtype = torch.float32, **config) -> T5ForConditionalGeneration:
    return tiny_t5(dtype, **{**dict(vocab_size=VOCABULARY.size, d_model=32, num_layers=2), **config})


def stamped(base: T5ForConditionalGeneration, **configs) -> StampT5ForConditionalGeneration:
    return apply_stamp(copy.deepcopy(base), **configs)


def new_trainer(
    directory: Path, model: nn.Module, features: Features, collator: Callable, **options: Any
) -> Seq2SeqTrainer:
    """Trains every model on the same batches of 8. The loss of every step is in log_history."""
    settings = dict(max_steps=MAX_STEPS, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=1)
    settings |= dict(lr_scheduler_type="constant", save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True)
    trainer_class = options.pop("trainer_class", Trainer)
    compute_metrics = options.pop("compute_metrics", None)
    return trainer_class(
        model,
        Seq2SeqTrainingArguments(output_dir=str(directory), **{**settings, **options}),
        data_collator=collator,
        train_dataset=features,
        eval_dataset=features[:50],
        compute_metrics=compute_metrics,
    )


@pytest.fixture(autouse=True)
def exact_log_history(monkeypatch):
    """Before 5.0 the Trainer rounds the losses to four digits."""
    monkeypatch.setattr(transformers.trainer, "round", lambda value, digits: value, raising=False)


def losses_of(trainer: Trainer) -> Tensor:
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], dtype=torch.float64)


def train(directory: Path, model: nn.Module, features: Features, collator: Callable, **options: Any) -> Tensor:
    """float64 `[steps]`, the logged losses, which the Trainer rounds to fp32."""
    trainer = new_trainer(directory, model, features, collator, **options)
    trainer.train()
    return losses_of(trainer)


def assert_same_curve(losses: Tensor, expected: Tensor, bound: float = 1e-6) -> None:
    """At every step, not only on average."""
    assert losses.shape == expected.shape
    difference = ((losses - expected).abs() / expected).max().item()
    assert difference < bound, f"relative difference {difference:.3g}, allowed {bound:.3g}"


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def count_calls(module: nn.Module) -> list[None]:
    calls = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


# ---- the loss curve of the base model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_runs(rows, tmp_path_factory) -> Callable[[torch.dtype], tuple[nn.Module, Tensor]]:
    """The base model after training on padded batches of ragged labels, and its losses. Trained once per dtype."""
    runs = {}

    def run(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
        if dtype not in runs:
            base = small_t5(dtype)
            directory = tmp_path_factory.mktemp("base model")
            runs[dtype] = base, train(directory, base, with_ragged_labels(rows), padding_collator())
        return runs[dtype]

    return run


@pytest.mark.parametrize(
    ("batches", "dtype"),
    [
        ("padded", torch.float64),
        ("padded with decoder inputs", torch.float64),
        ("packed", torch.float64),
        ("packed", torch.float32),
    ],
)
def test_loss_curve_is_that_of_the_base_model(dtype, batches, rows, base_runs, tmp_path):
    base, expected = base_runs(dtype)
    model = apply_stamp(small_t5(dtype))
    if batches == "packed":
        options = dict(collator=PackingCollator(), dataloader_num_workers=2)
    else:
        options = dict(collator=padding_collator(model if batches == "padded with decoder inputs" else None))
    losses = train(tmp_path, model, with_ragged_labels(rows), **options)
    assert_same_curve(losses, expected, bound=1e-6 if dtype == torch.float64 else 1e-5)
    if dtype == torch.float64:
        assert relative_error(weights_of(model), weights_of(base)) < 1e-9
    assert losses[:3].mean() > 4.5 and losses[-3:].mean() < 3.6  # a uniform guess has 4.17


def test_gradient_accumulation_is_a_larger_batch(rows, base_runs, tmp_path):
    """Two batches of 4 with different numbers of labels are one of 8.

    The reference is a batch of 8 because the base model accumulates wrongly: its forward takes `**kwargs`, from which
    the Trainer concludes that it divides by num_items_in_batch, but it does not. With two steps its losses and
    gradients are too large by a factor of two, and both steps have the same weight whatever their numbers of labels.
    """
    features = with_ragged_labels(rows)
    base, expected = base_runs(torch.float64)
    model = apply_stamp(small_t5(torch.float64))
    accumulate = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    losses = train(tmp_path, model, features, PackingCollator(), **accumulate)
    assert_same_curve(losses, expected)
    assert relative_error(weights_of(model), weights_of(base)) < 1e-9


def test_gradient_accumulation_with_prediction(rows, tmp_path):
    """If all rows have as many labels and targets, the auxiliary losses of the parts add up to the whole."""
    features = [row for row in rows if len(row["future_ids"]) == FUTURE_LENGTH]
    base = small_t5(torch.float64)
    options = dict(features=features, collator=PackingCollator(FUTURE_LENGTH), max_steps=10)
    whole, parts = (stamped(base, pruning=PRUNING, prediction=PREDICTION) for _ in range(2))
    expected = train(tmp_path, whole, **options)
    losses = train(tmp_path, parts, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert_same_curve(losses, expected)
    assert relative_error(weights_of(parts), weights_of(whole)) < 1e-9


def test_label_smoothing_is_that_of_the_base_model(rows, tmp_path):
    """The Trainer removes the labels and computes the loss from the logits of decoder_input_ids."""
    base = small_t5()
    options = dict(
        features=with_ragged_labels(rows), collator=padding_collator(base), label_smoothing_factor=0.1, max_steps=10
    )
    losses = train(tmp_path, stamped(base), **options)
    assert_same_curve(losses, train(tmp_path, base, **options), bound=1e-5)


# ---- pruning and prediction ----------------------------------------------------------------------------------------


def test_pruning_and_prediction_train(rows, tmp_path):
    model = apply_stamp(small_t5(), pruning=PRUNING, prediction=PREDICTION)
    seen, outputs = [], []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model.register_forward_hook(lambda _, args, output: outputs.append(output))
    options = dict(features=rows, collator=PackingCollator(FUTURE_LENGTH), dataloader_num_workers=2)
    trainer = new_trainer(tmp_path, model, **options)
    assert trainer.args.remove_unused_columns
    trainer.train()

    assert len(seen) == MAX_STEPS
    assert all(kwargs["future_ids"].shape == (8, FUTURE_LENGTH) for kwargs in seen)
    assert any((kwargs["future_ids"] != -100).any() for kwargs in seen)
    losses = losses_of(trainer)
    next_token, auxiliary = (
        torch.tensor([output[key] for output in outputs], dtype=torch.float64)
        for key in ("next_token_loss", "prediction_loss")
    )
    assert_same_curve(losses, next_token + auxiliary, bound=1e-5)
    for curve in (losses, next_token, auxiliary):
        assert curve[-5:].mean() < 0.8 * curve[:5].mean()
    assert all(torch.any(p != 0) for p in model.stamp_prediction.parameters())  # the residual heads start at 0


def test_padded_and_packed_batches_train_alike(rows, tmp_path):
    base = small_t5(torch.float64)
    padded, packed = (stamped(base, pruning=PRUNING, prediction=PREDICTION) for _ in range(2))
    expected = train(tmp_path, padded, with_padded_future(rows), padding_collator(), max_steps=10)
    losses = train(tmp_path, packed, rows, PackingCollator(FUTURE_LENGTH), max_steps=10)
    assert_same_curve(losses, expected)
    assert relative_error(weights_of(packed), weights_of(padded)) < 1e-9


@pytest.mark.parametrize("batches", ["padded", "packed"])
def test_evaluate_gives_the_next_token_loss(batches, rows, tmp_path):
    model = apply_stamp(small_t5(), pruning=PRUNING, prediction=PREDICTION)
    model.config.use_cache = False  # as the Trainer itself sets it from 5.0 on
    seen = []

    def compute_metrics(prediction) -> dict[str, float]:
        seen.append(prediction)
        hits = prediction.predictions[0].argmax(-1) == prediction.label_ids
        return dict(accuracy=hits.mean())

    if batches == "packed":
        options = dict(features=rows, collator=PackingCollator(FUTURE_LENGTH))
    else:
        options = dict(features=with_padded_future(rows), collator=padding_collator())
    trainer = new_trainer(
        tmp_path, model, **options, compute_metrics=compute_metrics, per_device_eval_batch_size=16, max_steps=5
    )
    trainer.train()
    metrics = trainer.evaluate()

    # 50 rows, so the last batch is smaller than the others. All rows have as many labels.
    batch = PackingCollator()(rows[:50])
    with torch.no_grad():
        expected = model.eval()(**batch)
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert metrics["eval_accuracy"] == (expected.logits.argmax(-1) == batch["labels"]).double().mean().item()

    # compute_metrics gets every tensor of the output but the loss, padded with -100 if batches differ in length. In the
    # bool encoder_attention_mask -100 is True, so only the positions tell tokens from padding.
    logits, states, mask, positions, next_token_loss = seen[0].predictions
    assert logits.shape == (50, LEVELS, VOCABULARY.size)
    assert relative_error(torch.from_numpy(logits), expected.logits) < 1e-5
    is_token = expected.encoder_attention_mask.numpy()
    width = is_token.shape[1]
    assert states.shape == (50, width, 32) and mask.shape == positions.shape == is_token.shape
    assert relative_error(torch.from_numpy(states[is_token]), expected.encoder_last_hidden_state[is_token]) < 1e-5
    assert mask[is_token].all() and np.array_equal(positions[is_token], expected.encoder_positions.numpy()[is_token])
    assert np.isin(positions[~is_token], (0, -100)).all()
    assert next_token_loss.shape == (4,)  # batches

    trainer.compute_metrics = None  # the Trainer then requests only the loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_evaluate_by_generating(rows, tmp_path):
    model = apply_stamp(small_t5(), pruning=PRUNING, prediction=PREDICTION)
    seen = []
    trainer = new_trainer(
        tmp_path,
        model,
        with_padded_future(rows),
        padding_collator(),
        trainer_class=Seq2SeqTrainer,
        compute_metrics=lambda prediction: seen.append(prediction) or {},
        predict_with_generate=True,
        generation_max_length=1 + LEVELS,
        generation_num_beams=3,
        per_device_eval_batch_size=16,
        max_steps=5,
    )
    trainer.train()
    trainer.evaluate()
    batch = padding_collator()(with_ragged_labels(rows[:50:2]))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model.eval().generate(**inputs, max_length=1 + LEVELS, num_beams=3, do_sample=False)
    assert np.array_equal(seen[0].predictions[::2, : 1 + LEVELS], expected.numpy())


@pytest.mark.parametrize("labels_of_the_other", [1, 2])
def test_targets_of_a_row_are_its_own(labels_of_the_other):
    """The items after the labels of a row are its targets, whatever the number of labels of other rows."""
    row = dict(input_ids=[1], labels=[11, 12, 13, 14], future_ids=[21, 22, 23, 24, 31, 32, 33, 34])
    other = dict(input_ids=[1], labels=[5] * LEVELS * labels_of_the_other, future_ids=[6] * FUTURE_LENGTH)
    batch = PackingCollator(FUTURE_LENGTH)([row, other])
    targets = multi_step_targets(batch["labels"], batch["future_ids"], PREDICTION)
    assert targets[0, :LEVELS].tolist() == [[21, 31], [22, 32], [23, 33], [24, 34]]


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_resumed_training_goes_on_the_same(rows, tmp_path):
    """With dropout, because the Trainer restores the state of the generator that draws the dropout seeds."""

    def new_model() -> StampT5ForConditionalGeneration:
        return apply_stamp(small_t5(dropout_rate=0.1), pruning=PRUNING, prediction=PREDICTION)

    options = dict(features=rows, collator=PackingCollator(FUTURE_LENGTH), max_steps=12)
    options |= dict(save_strategy="steps", save_steps=7)
    expected_model = new_model()
    trainer = new_trainer(tmp_path, expected_model, **options)
    trainer.train()
    expected = losses_of(trainer)

    model = new_model()
    calls = count_calls(model)
    trainer = new_trainer(tmp_path, model, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert len(calls) == 12 - 7  # the checkpoint has the losses of the first 7 steps
    assert torch.equal(losses_of(trainer), expected)
    assert torch.equal(weights_of(model), weights_of(expected_model))


def test_saved_models_load(rows, tmp_path):
    model = apply_stamp(small_t5(), pruning=PRUNING, prediction=PREDICTION)
    trainer = new_trainer(tmp_path, model, rows, PackingCollator(FUTURE_LENGTH), max_steps=5)
    trainer.train()
    trainer.save_model(tmp_path / "saved")

    loaded = StampT5ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    batch = PackingCollator(FUTURE_LENGTH)(rows[:8])
    for mode in (True, False):
        assert torch.equal(loaded.train(mode)(**batch).loss, model.train(mode)(**batch).loss)

    base, keys = T5ForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not keys["missing_keys"] and all(key.startswith("stamp_prediction.") for key in keys["unexpected_keys"])
    padded = padding_collator()(with_ragged_labels(rows[:8]))
    apply_stamp(model)
    assert relative_error(base.eval()(**padded).logits, model.eval()(**padded).logits) < 1e-5


# ---- precision, memory, adapters -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")  # of the Trainer before 4.48
def test_bf16_autocast_trains(rows, tmp_path):
    base = small_t5()
    options = dict(features=rows, collator=PackingCollator(FUTURE_LENGTH), max_steps=20)
    full, mixed = (stamped(base, pruning=PRUNING, prediction=PREDICTION) for _ in range(2))
    expected = train(tmp_path, full, **options)
    losses = train(tmp_path, mixed, bf16=True, **options)
    assert not torch.equal(losses, expected) and all(p.dtype == torch.float32 for p in mixed.parameters())
    assert_same_curve(losses, expected, bound=0.01)


def test_gradient_checkpointing_trains_the_same(rows, tmp_path):
    base = small_t5(torch.float64, dropout_rate=0.1)
    options = dict(features=rows, collator=PackingCollator(FUTURE_LENGTH), max_steps=10)
    kept, recomputed = (stamped(base, pruning=PRUNING, prediction=PREDICTION) for _ in range(2))
    expected = train(tmp_path, kept, **options)
    calls = count_calls(recomputed.encoder.block[0].layer[0].SelfAttention.q)
    # By the argument name that all supported versions have.
    losses = train(tmp_path, recomputed, gradient_checkpointing=True, **options)
    assert len(calls) == 2 * 10
    assert_same_curve(losses, expected)
    assert relative_error(weights_of(recomputed), weights_of(kept)) < 1e-9


def test_lora_trains_adapters_and_heads(rows, tmp_path):
    model = apply_stamp(small_t5(), pruning=PRUNING, prediction=PREDICTION)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lora = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, r=4, target_modules=["q", "v"], modules_to_save=["stamp_prediction"]
    )
    adapted = get_peft_model(model, lora)
    trainer = new_trainer(tmp_path, adapted, rows, PackingCollator(FUTURE_LENGTH), learning_rate=1e-2)
    assert trainer.model_accepts_loss_kwargs and trainer.label_names == ["labels"]
    trainer.train()
    losses = losses_of(trainer)
    assert losses[-5:].mean() < 0.97 * losses[:5].mean()
    merged = adapted.merge_and_unload()
    after = dict(merged.named_parameters())
    assert after.keys() == before.keys()
    trained = {name for name in before if not torch.equal(after[name], before[name])}
    assert trained == {name for name in before if name.endswith((".q.weight", ".v.weight")) or "stamp" in name}
