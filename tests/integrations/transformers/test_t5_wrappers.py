"""Hooks, adapters, dtypes and copies work on a stamped T5 as on the base model."""

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from closeness import assert_close, relative_error
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from t5_cases import (
    COPIES,
    HEADS,
    LENGTHS,
    PREDICTION,
    PRUNING,
    assert_same_training_step,
    future_batch,
    gradients,
    padded_batch,
    stamped,
    tiny_t5,
    trained_heads,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5Block,
    T5DenseActDense,
    T5LayerCrossAttention,
    T5LayerFF,
    T5LayerNorm,
    T5LayerSelfAttention,
    T5Stack,
)

from stamp_kernels.integrations.transformers import StampT5ForConditionalGeneration, apply_stamp, remove_stamp
from stamp_kernels.modules.prediction import LinearDecay


def seeded_step(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)  # of dropout
    loss = model(**batch).loss
    return loss.detach(), gradients(model, loss)


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert_close(got[name], expected[name])


# ---- gradient checkpointing ----------------------------------------------------------------------------------------


def checkpoint_gradients(model: nn.Module, use_reentrant: bool) -> None:
    """By the argument name that all supported versions have."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=use_reentrant))


@pytest.mark.parametrize(
    ("configs", "dropout", "use_reentrant"),
    [
        ({}, 0.0, True),
        ({}, 0.2, False),
        (dict(pruning=PRUNING, prediction=PREDICTION), 0.0, False),
        (dict(pruning=PRUNING, prediction=PREDICTION), 0.2, True),
    ],
    ids=["plain", "plain with dropout", "SAP and MAP", "SAP and MAP with dropout"],
)
def test_gradient_checkpointing(configs, dropout, use_reentrant):
    model = apply_stamp(tiny_t5(torch.float64, dropout_rate=dropout), **configs)
    batch = future_batch()
    expected_loss, expected = seeded_step(model, batch)
    checkpoint_gradients(model, use_reentrant)
    calls = count_calls(model, lambda name: name.endswith(".SelfAttention.q"))
    loss, got = seeded_step(model, batch)
    assert set(calls.values()) == {2} and len(calls) == 6  # in both stacks, once more in the backward
    assert torch.equal(loss, expected_loss)
    assert_same_gradients(got, expected)


def count_calls(model: nn.Module, chosen: Callable[[str], bool]) -> Counter[str]:
    calls = Counter()
    for name, module in model.named_modules():
        if chosen(name):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


# ---- hooks ---------------------------------------------------------------------------------------------------------

HOOKED = {
    "stacks": T5Stack,
    "blocks": T5Block,
    "self attention layers": T5LayerSelfAttention,
    "cross attention layers": T5LayerCrossAttention,
    "feed-forward layers": T5LayerFF,
    "attention": T5Attention,
    "feed-forwards": T5DenseActDense,
    "norms": T5LayerNorm,
    "linears": nn.Linear,
    "embeddings": nn.Embedding,
}


@pytest.mark.parametrize("kind", HOOKED)
def test_hooks_fire_as_on_the_base_model(kind):
    """Every module runs once, as in the base model. Both kinds of hooks change its computation."""
    base = tiny_t5(torch.float64)
    model = stamped(base)
    counts = []
    for each in (base, model):
        pre, post = Counter(), Counter()
        for name, module in each.named_modules():
            if not isinstance(module, HOOKED[kind]) or (kind != "linears" and name.endswith("relative_attention_bias")):
                continue
            if name == "lm_head":
                continue  # see test_hooks_of_the_language_model_head

            def before(module, args, kwargs, name=name, pre=pre):
                pre[name] += 1
                if args and args[0].is_floating_point():
                    return (1.1 * args[0], *args[1:]), kwargs

            def after(module, args, output, name=name, post=post):
                post[name] += 1
                if isinstance(output, Tensor):
                    return 0.9 * output
                if isinstance(output, tuple):
                    return 0.9 * output[0], *output[1:]

            module.register_forward_pre_hook(before, with_kwargs=True)
            module.register_forward_hook(after)
        counts.append((pre, post))
        each.loss = each(**padded_batch()).loss
    assert counts[0] == counts[1] and sum(counts[0][0].values()) >= 2
    assert_same_training_step(base, base.loss, model, model.loss)


def test_hooks_of_the_language_model_head():
    """In training too, where the loss without hooks needs no logits."""
    base = tiny_t5(torch.float64)
    model = stamped(base)
    for each in (base, model):
        each.lm_head.register_forward_hook(lambda module, args, output: 0.5 * output)
        each.loss = each(**padded_batch()).loss
    assert_same_training_step(base, base.loss, model, model.loss)


def test_offloaded_weights():
    """Accelerate's hooks load weights when a layer is called. Before that the head has none."""
    model = apply_stamp(tiny_t5(), pruning=PRUNING).eval()
    batch = padded_batch()
    with torch.no_grad():
        expected = model(**batch).loss
        offloaded = cpu_offload(model, execution_device="cpu")
        assert offloaded.lm_head.weight.device.type == "meta"
        for skip_logits in (False, True):
            assert_close(offloaded(**batch, skip_logits=skip_logits).loss, expected)


def test_full_backward_hooks_fire():
    model = apply_stamp(tiny_t5(), pruning=PRUNING)
    calls = Counter()
    names = {"encoder.block.1": 1, "decoder.block.0": 1, "encoder.block.0.layer.0.SelfAttention.v": 1}
    for name in names:
        model.get_submodule(name).register_full_backward_hook(lambda *_, name=name: calls.update([name]))
    model(**padded_batch()).loss.backward()
    assert calls == names


@pytest.mark.parametrize(
    ("norm", "place"),
    [
        (parametrizations.weight_norm, "encoder.block.1.layer.0.SelfAttention.q"),
        (parametrizations.spectral_norm, "decoder.block.0.layer.1.EncDecAttention.v"),
        (weight_norm, "encoder.block.1.layer.0.SelfAttention.q"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrized_linear_layers(norm, place):
    assert_parametrized_trains_as_the_base(norm, place)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrized_language_model_head(norm):
    """A hook or a property computes the weight, so the loss cannot read it from the module."""
    assert_parametrized_trains_as_the_base(norm, "lm_head")


def assert_parametrized_trains_as_the_base(norm: Callable, place: str) -> None:
    base = tiny_t5(torch.float64)
    model = stamped(base)
    batch = padded_batch()
    for each in (base, model):
        torch.manual_seed(2)  # of the power iteration's vectors
        norm(each.get_submodule(place))
    for _ in range(2):
        assert_same_training_step(base, base(**batch).loss, model, model(**batch).loss)
        for each in (base, model):
            torch.optim.SGD(each.parameters(), lr=0.01).step()


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def with_lora(model: nn.Module, **options) -> PeftModel:
    """With adapters that are not 0."""
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=2, **options))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return adapted.train()


def trained_names(model: nn.Module, batch: dict[str, Tensor]) -> set[str]:
    return set(gradients(model, model(**batch).loss))


@pytest.mark.parametrize("targets", [["q", "v"], "all-linear", ["relative_attention_bias", "shared", "o"]], ids=str)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_lora_trains_as_on_the_base_model(targets):
    base = tiny_t5(torch.float64)
    adapted_base = with_lora(copy.deepcopy(base), target_modules=targets)
    adapted = with_lora(stamped(base), target_modules=targets)
    batch = padded_batch()
    base_loss = adapted_base(**batch).loss
    assert abs(base_loss - base(**batch).loss) > 1e-3
    assert_same_training_step(adapted_base, base_loss, adapted, adapted(**batch).loss)
    assert all("lora_" in name for name in trained_names(adapted, batch))


def test_lora_with_pruning_and_prediction():
    model = apply_stamp(tiny_t5(torch.float64), pruning=PRUNING, prediction=PREDICTION)
    base_loss = model(**future_batch()).loss
    adapted = with_lora(model, target_modules=["q", "v"], modules_to_save=["stamp_prediction"])
    loss = adapted(**future_batch()).loss
    assert abs(loss - base_loss) > 1e-3
    trained = set(gradients(adapted, loss))
    assert trained == {name for name, p in adapted.named_parameters() if p.requires_grad}
    heads = {name for name in trained if "lora_" not in name}
    assert len(heads) == 4 and all("stamp_prediction.modules_to_save" in name for name in heads)
    with torch.no_grad():  # the copy runs, not the frozen original
        adapted.get_parameter(max(heads)).add_(1.0)
    assert adapted(**future_batch()).loss != loss


@pytest.mark.parametrize("kind", HEADS)
def test_lora_on_all_linear_layers_reaches_the_heads(kind):
    model = apply_stamp(tiny_t5(torch.float64), prediction=replace(PREDICTION, **HEADS[kind]))
    adapted = with_lora(model, target_modules="all-linear")
    trained = trained_names(adapted, future_batch())
    assert all("lora_" in name for name in trained) and any("stamp_prediction.heads.1" in name for name in trained)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_lora_on_the_head_reaches_the_loss():
    model = apply_stamp(tiny_t5(torch.float64))
    batch = padded_batch()
    plain = model(**batch).loss.item()
    adapted = with_lora(model, target_modules=["lm_head"])
    output = adapted(**batch)
    assert output.logits is None
    logits = adapted(**batch, skip_logits=False).logits
    assert_close(output.loss, F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()))
    assert abs(output.loss.item() - plain) > 1e-3
    assert all("lm_head.lora_" in name for name in trained_names(adapted, batch))


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_lora_on_the_head_needs_own_unembedding():
    own = replace(PREDICTION, unembedding="own")
    adapted = with_lora(apply_stamp(tiny_t5(), prediction=own), target_modules=["lm_head"])
    assert torch.isfinite(adapted(**future_batch()).loss)
    adapted = with_lora(apply_stamp(tiny_t5(), prediction=PREDICTION), target_modules=["lm_head"])
    message = (
        r'unembedding="shared" needs an nn.Linear without hooks as lm_head, got peft\.\S*\.Linear: '
        'choose unembedding="own"'
    )
    with pytest.raises(ValueError, match=message):
        adapted(**future_batch())


@pytest.mark.parametrize("targets", [["q", "v"], "all-linear"], ids=str)
def test_lora_merges_and_unloads(targets):
    model = apply_stamp(tiny_t5(torch.float64), pruning=PRUNING, prediction=PREDICTION)
    names = list(model.state_dict())
    adapted = with_lora(model, target_modules=targets)
    expected = adapted(**future_batch()).loss
    merged = adapted.merge_and_unload()
    assert type(merged) is StampT5ForConditionalGeneration and list(merged.state_dict()) == names
    assert_close(merged(**future_batch()).loss, expected)

    apply_stamp(merged)
    expected = merged.eval()(**padded_batch()).logits
    remove_stamp(merged)
    assert type(merged) is T5ForConditionalGeneration
    assert_close(merged(**padded_batch()).logits, expected)


def test_lora_adapters_load_into_the_base_model(tmp_path):
    """An adapter of a stamped model fits the base model."""
    base = tiny_t5(torch.float64)
    adapted = with_lora(stamped(base), target_modules=["q", "v"])
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(loaded.eval()(**padded_batch()).logits, adapted.eval()(**padded_batch()).logits)


# ---- dtypes --------------------------------------------------------------------------------------------------------


def whole(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten().double() for g in grads.values()])


def test_autocast_is_as_exact_as_the_base_model():
    base = tiny_t5()
    model = stamped(base)
    batch = padded_batch()
    exact = stamped(base).double()
    exact_loss = exact(**batch).loss
    exact_gradients = gradients(exact, exact_loss)
    errors = []
    for each in (base, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(**batch).loss
        assert loss.dtype == torch.float32 and abs(loss - exact_loss) < 5e-3 * exact_loss
        grads = gradients(each, loss)
        assert all(g.dtype == torch.float32 for g in grads.values())
        errors.append(relative_error(whole(grads), whole(exact_gradients)))
    assert 0 < errors[1] < 1.2 * errors[0] < 0.1


def test_autocast_with_pruning_and_prediction():
    """Other tokens than in fp32 may be kept, so the loss is only close."""
    model = apply_stamp(tiny_t5(), pruning=PRUNING, prediction=PREDICTION)
    batch = future_batch()
    expected = model(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert abs(loss - expected) < 0.02 * expected
    assert all(torch.isfinite(g).all() for g in gradients(model, loss).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("configs", [{}, dict(pruning=PRUNING, prediction=PREDICTION)], ids=["plain", "SAP and MAP"])
def test_models_of_half_precision(configs, dtype):
    model = apply_stamp(tiny_t5(dtype), **configs)
    assert {p.dtype for p in model.parameters()} == {dtype}  # heads too
    batch = future_batch()
    loss = model(**batch).loss
    grads = gradients(model, loss)
    exact = copy.deepcopy(model).double()
    assert loss.dtype == torch.float32 and relative_error(loss, exact(**batch).loss) < 0.02
    assert all(g.dtype == dtype and torch.isfinite(g).all() for g in grads.values())
    if not configs:
        assert relative_error(whole(grads), whole(gradients(exact, exact(**batch).loss))) < 0.1
    tokens = model.eval().generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=5, do_sample=False
    )
    assert tokens.shape == (len(LENGTHS), 5)


# ---- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", COPIES)
def test_copies_are_stamped(copied):
    prediction = replace(PREDICTION, lambda_=LinearDecay(0.3, 0.1, 10))
    model = trained_heads(apply_stamp(tiny_t5(dropout_rate=0.1), pruning=PRUNING, prediction=prediction))
    other = copied(model)
    batch = future_batch() | dict(training_step=5)
    expected, got = seeded_step(model, batch), seeded_step(other, batch)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][name], expected[1][name]) for name in expected[1])
    remove_stamp(other)
    assert type(other) is T5ForConditionalGeneration and type(model) is StampT5ForConditionalGeneration
    assert torch.equal(seeded_step(model, batch)[0], expected[0])
