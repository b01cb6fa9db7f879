"""Models whose code somebody has changed: a stamped T5 computes what the base model computes, or refuses by name.

Nothing is lost in silence: no overridden method, no patched instance, no mask, no field of an output.
"""

import copy
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from closeness import assert_close, relative_error
from padded_stamp import decode_padded, encode_padded
from peft import LoraConfig, TaskType, get_peft_model
from t5_cases import (
    CACHE,
    COPIES,
    HAS_KWARGS,
    HAS_SDPA,
    HAS_SELECTION,
    LEVELS,
    PREDICTION,
    PRUNING,
    VOCAB_SIZE,
    assert_same_training_step,
    needed_by_attention,
    padded_batch,
    positional,
    positions_of,
    set_attention,
    stamped,
    tiny_t5,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5Block,
    T5LayerCrossAttention,
    T5LayerSelfAttention,
    T5Stack,
)

from stamp_kernels.integrations.transformers import (
    PruningConfig,
    StampT5ForConditionalGeneration,
    apply_stamp,
    remove_stamp,
    stamp_status,
    t5_stacks,
)
from stamp_kernels.packed import PackedBatch

LENGTHS = (7, 1, 12, 2)


def batch_of(padding_side: str = "right") -> dict[str, Tensor]:
    return padded_batch(LENGTHS, padding_side=padding_side)


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def become(model: nn.Module, **classes: type[nn.Module]) -> nn.Module:
    """The modules at these names (`__` for a dot) get these classes, as if they had been constructed with them."""
    for name, cls in classes.items():
        model.get_submodule(name.replace("__", ".")).__class__ = cls
    return model


def become_all(model: nn.Module, own: type[nn.Module], cls: type[nn.Module]) -> nn.Module:
    for module in model.modules():
        if type(module) is own:
            module.__class__ = cls
    return model


def silently_stamped(base: nn.Module, **configs) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return stamped(base, **configs)


def assert_all_packed(model: nn.Module, names: tuple[str, ...] = ("encoder", "decoder")) -> None:
    status = stamp_status(model)
    assert status.packed == names and not status.padded


def assert_same_as_base(base: nn.Module, model: nn.Module, batch: dict[str, Tensor] | None = None, **extra) -> None:
    """A training step, logits and states in evaluation, and a search."""
    batch = batch or batch_of()
    for each in (base, model):
        each.train()
    assert_same_training_step(base, base(**batch, **extra).loss, model, model(**batch, **extra).loss)
    base.eval()
    model.eval()
    with torch.no_grad():
        expected, got = base(**batch, **extra), model(**batch, **extra)
        valid = batch["attention_mask"].bool()
        assert_close(got.logits, expected.logits)
        assert_close(got.encoder_last_hidden_state[valid], expected.encoder_last_hidden_state[valid])
        if not extra:
            found = [each.generate(**inputs_of(batch), num_beams=2, max_new_tokens=3) for each in (base, model)]
            assert torch.equal(*found)


def assert_pruned_like_the_reference(base: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> None:
    """`model` is pruned with PRUNING. The reference drops nothing from the padded batch, see padded_stamp.py."""
    encoded = encode_padded(base, **inputs_of(batch), pruning=PRUNING)
    expected = decode_padded(base, encoded, labels=batch["labels"])
    assert_same_training_step(base, expected.loss, model, model(**batch).loss)


# ---- attention -----------------------------------------------------------------------------------------------------


class SameAttention(T5Attention):
    pass


class HalvedAttention(T5Attention):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return (0.5 * output[0], *output[1:])


class ScalingAttention(T5Attention):
    """Divides scores by sqrt(d_kv), as other models do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scaling = self.key_value_proj_dim**-0.5


class OwnAttention(T5Attention):
    def forward(self, hidden_states, mask=None, key_value_states=None, position_bias=None, **kwargs):
        output = T5Attention.forward(self, hidden_states, mask, key_value_states, position_bias, **kwargs)
        return (torch.tanh(output[0]), *output[1:])


class DoubledBias(T5Attention):
    """Calls super(), but packed attention computes the bias of each distance itself."""

    def compute_bias(self, *args, **kwargs):
        return 2 * super().compute_bias(*args, **kwargs)


class OwnBuckets(T5Attention):
    @staticmethod
    def _relative_position_bucket(relative_position, bidirectional=True, num_buckets=32, max_distance=128):
        return relative_position.abs().clamp(max=num_buckets - 1)


@pytest.mark.parametrize("cls", [SameAttention, HalvedAttention])
def test_attention_that_calls_super(cls, packed_calls):
    base = become_all(tiny_t5(torch.float64), T5Attention, cls)
    model = silently_stamped(base)
    assert_all_packed(model)
    assert isinstance(model.encoder.block[0].layer[0].SelfAttention, cls)
    batch = batch_of("left")
    assert model(**batch).loss != tiny_t5(torch.float64)(**batch).loss or cls is SameAttention
    assert packed_calls.count("self") == 6 and packed_calls.count("cross") == 3
    assert_same_as_base(base, model, batch)
    assert_pruned_like_the_reference(base.train(), silently_stamped(base, pruning=PRUNING).train(), batch_of())
    remove_stamp(model)
    assert type(model.decoder.block[1].layer[1].EncDecAttention) is cls


@pytest.mark.skipif(not HAS_SDPA, reason="before 5.0 T5's attention has no scaling")
def test_scaling_of_scores_is_kept():
    base = tiny_t5(torch.float64)
    for module in base.modules():
        if isinstance(module, T5Attention):
            module.scaling = module.key_value_proj_dim**-0.5
    plain = tiny_t5(torch.float64)
    assert abs(base(**batch_of()).loss - plain(**batch_of()).loss) > 1e-4
    assert_same_as_base(base, silently_stamped(base))


def test_attention_without_relative_bias():
    base = tiny_t5(torch.float64)
    for stack in (base.encoder, base.decoder):
        first = stack.block[0].layer[0].SelfAttention
        first.has_relative_attention_bias = False
        del first.relative_attention_bias
    assert_same_as_base(base, silently_stamped(base), batch_of("left"))


@pytest.mark.parametrize(
    ("cls", "found"),
    [
        (OwnAttention, "OwnAttention.forward"),
        (DoubledBias, "DoubledBias.compute_bias"),
        (OwnBuckets, "OwnBuckets._relative_position_bucket"),
    ],
)
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_attention_that_would_be_lost_stays_padded(cls, found, stack):
    base = tiny_t5(torch.float64)
    become_all(base.get_submodule(stack), T5Attention, cls)
    other = {"encoder": "decoder", "decoder": "encoder"}[stack]
    with pytest.warns(UserWarning, match=rf"(?s)stamped in part.*{stack}: padded, because {found} is not T5's"):
        model = stamped(base)
    status = stamp_status(model)
    assert status.packed == (other,) and list(status.padded) == [stack]
    assert str(status).splitlines()[0] == f"{other}: packed"
    assert_same_as_base(base, model)
    assert_same_as_base(base, model, batch_of("left"))
    if stack == "encoder":
        with pytest.raises(ValueError, match=f"pruning needs an encoder that runs packed: {found} is not T5's"):
            stamped(base, pruning=PRUNING)
    else:
        with pytest.warns(UserWarning, match="stamped in part"):
            pruned = stamped(base, pruning=PRUNING)
        assert_pruned_like_the_reference(base.train(), pruned.train(), batch_of())
    remove_stamp(model)
    assert {type(each) for each in model.get_submodule(stack).modules() if isinstance(each, T5Attention)} == {cls}


def test_nothing_that_can_be_packed_is_refused():
    base = become_all(tiny_t5(), T5Attention, DoubledBias)
    with pytest.raises(
        ValueError, match=r"whose stacks can run packed, got T5ForCond.*: DoubledBias.compute_bias is not"
    ):
        apply_stamp(base)
    assert type(base) is T5ForConditionalGeneration and type(base.encoder) is T5Stack


def test_patched_bias_stays_padded():
    base = tiny_t5(torch.float64)
    first = base.encoder.block[0].layer[0].SelfAttention
    first.compute_bias = types.MethodType(lambda self, *args, **kwargs: DoubledBias.compute_bias.__get__(self), first)
    with pytest.warns(UserWarning, match=r"encoder.block.0.layer.0.SelfAttention has a compute_bias of its own on the"):
        apply_stamp(base)


@pytest.mark.skipif(not HAS_SDPA, reason="before 5.0 T5's attention calls no registered function")
def test_registered_attention_function_stays_padded():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask
    from transformers.models.t5.modeling_t5 import eager_attention_forward

    def halved_attention(module, query, key, value, mask, *, scaling=None, **kwargs):
        return eager_attention_forward(module, query, key, value, mask, scaling=0.5 * scaling, **kwargs)

    AttentionInterface.register("halved", halved_attention)
    AttentionMaskInterface.register("halved", eager_mask)
    base = tiny_t5(torch.float64)
    base.encoder.set_attn_implementation("halved")
    assert abs(base(**batch_of()).loss - tiny_t5(torch.float64)(**batch_of()).loss) > 1e-4
    with pytest.warns(UserWarning, match='encoder: padded, because attn_implementation="halved" is not T5\'s'):
        model = stamped(base)
    assert_same_as_base(base, model)


# ---- layers and blocks ---------------------------------------------------------------------------------------------


class OldSelfLayer(T5LayerSelfAttention):
    """Written for a release without further arguments."""

    def forward(self, hidden_states, attention_mask=None, position_bias=None, **kwargs):
        attended = self.SelfAttention(
            self.layer_norm(hidden_states),
            mask=attention_mask,
            position_bias=position_bias,
            **needed_by_attention(kwargs),
        )
        return (hidden_states + 0.5 * self.dropout(attended[0]), *attended[1:])


class OldCrossLayer(T5LayerCrossAttention):
    def forward(self, hidden_states, key_value_states, attention_mask=None, position_bias=None, **kwargs):
        attended = self.EncDecAttention(
            self.layer_norm(hidden_states),
            mask=attention_mask,
            key_value_states=key_value_states,
            position_bias=position_bias,
            **needed_by_attention(kwargs),
        )
        return (hidden_states + 0.5 * self.dropout(attended[0]), *attended[1:])


class UnmaskedSelfLayer(T5LayerSelfAttention):
    def forward(self, hidden_states, attention_mask=None, position_bias=None, **kwargs):
        attended = self.SelfAttention(
            self.layer_norm(hidden_states), position_bias=position_bias, **needed_by_attention(kwargs)
        )
        return (hidden_states + self.dropout(attended[0]), *attended[1:])


class UnmaskedCrossLayer(T5LayerCrossAttention):
    def forward(self, hidden_states, key_value_states, attention_mask=None, position_bias=None, **kwargs):
        attended = self.EncDecAttention(
            self.layer_norm(hidden_states), key_value_states=key_value_states, **needed_by_attention(kwargs)
        )
        return (hidden_states + self.dropout(attended[0]), *attended[1:])


class GatedBlock(T5Block):
    """Has a parameter-free gate behind T5's own block."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return (output[0] * torch.sigmoid(output[0]), *output[1:])


class UnmaskedBlock(T5Block):
    def forward(self, hidden_states, attention_mask=None, position_bias=None, *args, **kwargs):
        return super().forward(hidden_states, None, position_bias, *args, **kwargs)


class TwoAttentions(T5LayerSelfAttention):
    """One more self-attention, without a mask, before T5's."""

    def forward(self, hidden_states, attention_mask=None, position_bias=None, **kwargs):
        needed = needed_by_attention(kwargs)
        hidden_states = hidden_states + self.SelfAttention(hidden_states, position_bias=position_bias, **needed)[0]
        return super().forward(hidden_states, attention_mask, position_bias, **kwargs)


def test_layers_without_further_arguments(packed_calls):
    base = become_all(tiny_t5(torch.float64), T5LayerSelfAttention, OldSelfLayer)
    become_all(base, T5LayerCrossAttention, OldCrossLayer)
    model = silently_stamped(base)
    assert_all_packed(model)
    packed_calls.clear()  # layers of others are tried out
    model(**batch_of())
    assert len(packed_calls) == 9
    assert_same_as_base(base, model, batch_of("left"))
    assert_pruned_like_the_reference(base.train(), silently_stamped(base, pruning=PRUNING).train(), batch_of())


def test_block_that_calls_super():
    base = become_all(tiny_t5(torch.float64), T5Block, GatedBlock)
    model = silently_stamped(base)
    assert_all_packed(model)
    assert_same_as_base(base, model)


LOSES_MASK = {
    "self": (T5LayerSelfAttention, UnmaskedSelfLayer, "block 1, a T5Block"),
    "cross": (T5LayerCrossAttention, UnmaskedCrossLayer, "block 1, a T5Block"),
    "block": (T5Block, UnmaskedBlock, "block 1, a UnmaskedBlock"),
}


@pytest.mark.parametrize("pruning", [None, PRUNING], ids=["plain", "SAP"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", LOSES_MASK)
def test_lost_mask_is_refused(case, training, pruning):
    own, cls, named = LOSES_MASK[case]
    model = stamped(become_all(tiny_t5(), own, cls), pruning=pruning).train(training)
    message = rf"{named}, did not give its attention_mask .* hand it on, or leave this model unstamped"
    with pytest.raises(RuntimeError, match=message):
        model(**batch_of(), use_cache=False)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", LOSES_MASK)
def test_lost_mask_is_refused_in_a_graph(case):
    own, cls, named = LOSES_MASK[case]
    model = torch.compile(stamped(become_all(tiny_t5(), own, cls)), backend="eager")
    with pytest.raises(RuntimeError, match=f"{named}, did not give its attention_mask"):
        model(**batch_of())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_lost_mask_of_one_late_block_is_refused():
    model = become(stamped(tiny_t5()), encoder__block__2__layer__0=UnmaskedSelfLayer)
    with pytest.raises(RuntimeError, match="a T5Attention of a packed stack got no packing as `mask`: its block and"):
        model(**batch_of())
    with pytest.raises(
        RuntimeError, match="a T5Attention of a packed stack got no packing"
    ):  # graphs have no is_consumed
        torch.compile(model, backend="eager")(**batch_of())


class OtherAttention(nn.Module):
    """Not a T5Attention: the mean over the tokens of the mask."""

    def forward(self, hidden_states, mask=None, position_bias=None, **kwargs):
        weights = torch.ones_like(hidden_states[..., :1]) if mask is None else (mask[:, 0, -1, :, None] == 0).double()
        mean = (hidden_states * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return mean.expand_as(hidden_states), position_bias, None


def test_block_with_another_attention_stays_padded():
    base = tiny_t5(torch.float64)
    base.encoder.block[1].layer[0].SelfAttention = OtherAttention()
    with pytest.warns(
        UserWarning, match="encoder: padded, because block 2, a T5Block, has 0 T5Attention where T5 has 1"
    ):
        model = stamped(base)
    assert_same_as_base(base, model)
    with pytest.raises(ValueError, match="pruning needs an encoder that runs packed: block 2, a T5Block, has 0"):
        stamped(base, pruning=PRUNING)


def test_attention_that_replaces_a_stamped_one_fails():
    """A T5Attention that is not stamped cannot add a packing to its scores."""
    for attention in ("eager", "sdpa"):
        base = tiny_t5(attention=attention)
        model = stamped(base)
        model.encoder.block[1].layer[0].SelfAttention = copy.deepcopy(base.encoder.block[1].layer[0].SelfAttention)
        with pytest.raises((RuntimeError, AttributeError, TypeError)):
            model(**batch_of())
        apply_stamp(model)
        assert_close(model(**batch_of()).loss, base(**batch_of()).loss)


# ---- stacks --------------------------------------------------------------------------------------------------------


class WholeWordEncoder(T5Stack):
    """As in OpenP5: one more embedding for each token, and a loop over the blocks of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.whole_word_embeddings = nn.Embedding(8, config.d_model)

    def forward(self, input_ids=None, attention_mask=None, whole_word_ids=None, inputs_embeds=None, **kwargs):
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if whole_word_ids is not None:
            hidden = hidden + self.whole_word_embeddings(whole_word_ids)
        mask = (1 - attention_mask[:, None, None].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
        position_bias = None
        for block in self.block:
            hidden, position_bias = block(hidden, mask, position_bias, **positions_of(hidden))[:2]
        return BaseModelOutput(last_hidden_state=self.dropout(self.final_layer_norm(hidden)))


class EmbeddingEncoder(WholeWordEncoder):
    """The same with T5's loop."""

    def forward(self, input_ids=None, attention_mask=None, whole_word_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if whole_word_ids is not None:
            inputs_embeds = inputs_embeds + self.whole_word_embeddings(whole_word_ids)
        return T5Stack.forward(self, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)


class SuperEncoder(T5Stack):
    def __init__(self, config):
        super().__init__(config)
        self.whole_word_embeddings = nn.Embedding(8, config.d_model)

    def forward(self, input_ids=None, attention_mask=None, whole_word_ids=None, inputs_embeds=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if whole_word_ids is not None:
            inputs_embeds = inputs_embeds + self.whole_word_embeddings(whole_word_ids)
        return super().forward(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)


class SuperOfAnotherMethod(T5Stack):
    """`super()` occurs in its forward, but super().forward does not."""

    def __init__(self, config):
        super().__init__(config)
        self.whole_word_embeddings = nn.Embedding(8, config.d_model)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        super().train(self.training)
        return WholeWordEncoder.forward(self, input_ids, attention_mask, **kwargs)


class P5(T5ForConditionalGeneration):
    """As in OpenP5: its forward hands one more argument to the encoder."""

    def forward(self, input_ids=None, attention_mask=None, whole_word_ids=None, labels=None, **kwargs):
        encoder_outputs = kwargs.pop("encoder_outputs", None)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, whole_word_ids=whole_word_ids, return_dict=True
            )
        return super().forward(attention_mask=attention_mask, encoder_outputs=encoder_outputs, labels=labels, **kwargs)


MODELS_WITH_ENCODERS = [
    pytest.param(
        T5ForConditionalGeneration,
        marks=pytest.mark.skipif(not HAS_KWARGS, reason="before 5.0 T5's forward has no further arguments to hand on"),
    ),
    P5,
]


def with_encoder(encoder_class: type[T5Stack], model_class: type[T5ForConditionalGeneration]) -> nn.Module:
    model = become(tiny_t5(torch.float64), **{"": model_class})
    encoder = encoder_class(model.encoder.config).double().train()
    encoder.load_state_dict(model.encoder.state_dict(), strict=False)
    encoder.set_input_embeddings(model.shared)
    model.encoder = encoder
    return model


def whole_word_ids() -> Tensor:
    return torch.arange(max(LENGTHS)).expand(len(LENGTHS), -1) // 3


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("model_class", MODELS_WITH_ENCODERS)
@pytest.mark.parametrize("encoder_class", [WholeWordEncoder, EmbeddingEncoder, SuperOfAnotherMethod])
def test_encoder_with_its_own_forward_stays_padded(encoder_class, model_class, padding_side, packed_calls):
    base = with_encoder(encoder_class, model_class)
    name = f"{encoder_class.__name__}.forward"
    with pytest.warns(UserWarning, match=rf"encoder: padded, because {name} does not call super\(\).forward"):
        model = stamped(base)
    assert stamp_status(model).packed == ("decoder",)
    batch = batch_of(padding_side)
    model(**batch)
    assert packed_calls.count("self") == packed_calls.count("cross") == 3
    assert_same_as_base(base, model, batch)
    assert_same_as_base(base, model, batch, whole_word_ids=whole_word_ids())
    changed = base(**batch, whole_word_ids=whole_word_ids()).loss
    assert abs(changed - base(**batch).loss) > 1e-4
    with pytest.raises(ValueError, match=f"pruning needs an encoder that runs packed: {name} does not call super"):
        stamped(base, pruning=PRUNING)
    remove_stamp(model)
    assert type(model) is model_class and type(model.encoder) is encoder_class
    assert_close(model(**batch).loss, base(**batch).loss)


@pytest.mark.parametrize("model_class", MODELS_WITH_ENCODERS)
def test_encoder_that_calls_super_runs_packed(model_class, packed_calls):
    base = with_encoder(SuperEncoder, model_class)
    model = silently_stamped(base)
    assert_all_packed(model)
    model(**batch_of())
    assert packed_calls.count("self") == 6
    for extra in ({}, dict(whole_word_ids=whole_word_ids())):
        assert_same_as_base(base, model, batch_of("left"), **extra)
    pruned = silently_stamped(base, pruning=PRUNING)
    for batch in (batch_of(), batch_of("left")):
        assert_pruned_like_the_reference(base.train(), pruned.train(), batch)
    embeds = base.shared(batch["input_ids"]) + base.encoder.whole_word_embeddings(whole_word_ids())
    plain = stamped(tiny_t5(torch.float64), pruning=PRUNING)
    by_hand = plain(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"])
    assert_close(pruned(**batch, whole_word_ids=whole_word_ids()).loss, by_hand.loss)
    remove_stamp(model)
    assert type(model.encoder) is SuperEncoder


def test_encoder_put_in_after_stamping_is_reported():
    base = tiny_t5(torch.float64)
    model = stamped(base, pruning=PRUNING)
    model.encoder = copy.deepcopy(base.encoder)
    model.encoder.set_input_embeddings(model.shared)
    status = stamp_status(model)
    assert status.packed == ("decoder",)
    assert status.padded == {"encoder": "it was put there after apply_stamp, which can be called again"}
    assert_same_as_base(base, model)
    apply_stamp(model, pruning=PRUNING)
    assert_all_packed(model)
    assert_pruned_like_the_reference(base.train(), model.train(), batch_of())


class TwoEncoders(T5ForConditionalGeneration):
    def __init__(self, config):
        super().__init__(config)
        self.user_encoder = WholeWordEncoder(self.encoder.config)
        self.post_init()


def test_second_encoder_that_cannot_be_pruned_is_named():
    model = TwoEncoders(tiny_t5().config)
    with pytest.raises(
        ValueError, match=r"pruning needs an encoder that runs packed: WholeWordEncoder\.forward does not"
    ):
        apply_stamp(model, pruning=PRUNING)
    with pytest.warns(UserWarning, match="user_encoder: padded"):
        apply_stamp(model)


# ---- embed_tokens --------------------------------------------------------------------------------------------------


class UserEmbedding(nn.Module):
    """Adds the position in the row and a user, who is the first token of the row."""

    def __init__(self, tokens: nn.Embedding):
        super().__init__()
        self.tokens = tokens
        self.positions = nn.Parameter(torch.randn(64, tokens.embedding_dim, dtype=torch.float64))
        self.users = nn.Embedding(VOCAB_SIZE, tokens.embedding_dim, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[-1]
        return self.tokens(ids) + self.positions[:length] + self.users(ids[..., :1])


class PositionEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * torch.arange(1, 1 + ids.shape[-1])[:, None]


def patched_embedding(weight: Tensor) -> nn.Embedding:
    embedding = nn.Embedding.from_pretrained(weight, freeze=False)
    embedding.forward = types.MethodType(PositionEmbedding.forward, embedding)
    embedding.forward = lambda ids: F.embedding(ids, embedding.weight) * torch.arange(1, 1 + ids.shape[-1])[:, None]
    return embedding


EMBEDDINGS: dict[str, Callable[[nn.Embedding], nn.Module]] = {
    "a module": UserEmbedding,
    "a subclass": lambda tokens: PositionEmbedding.from_pretrained(tokens.weight.detach().clone(), freeze=False),
    "a patched instance": lambda tokens: patched_embedding(tokens.weight.detach().clone()),
}


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_get_whole_rows(kind, padding_side):
    def base() -> nn.Module:
        torch.manual_seed(4)
        model = tiny_t5(torch.float64)
        model.encoder.embed_tokens = EMBEDDINGS[kind](model.shared)
        torch.manual_seed(4)
        model.decoder.embed_tokens = EMBEDDINGS[kind](model.shared)
        return model

    model = apply_stamp(base())
    batch = batch_of(padding_side)
    expected = base()
    assert abs(expected(**batch).loss - tiny_t5(torch.float64)(**batch).loss) > 1e-4
    assert_same_as_base(expected, model, batch)


@pytest.mark.parametrize("kind", ["a module", "a subclass"])
def test_packed_ids_for_such_embeddings_are_refused(kind):
    base = tiny_t5(torch.float64)
    base.encoder.embed_tokens = EMBEDDINGS[kind](base.shared)
    model = stamped(base)
    batch = batch_of()
    ids, mask, labels = batch.values()
    packed = PackedBatch.from_padded(ids, mask)
    with pytest.raises(
        ValueError, match=r"packed_inputs.values must be embeddings \[T, 24\] for a stack whose embed_tok"
    ):
        model(packed_inputs=packed, labels=labels)
    packed = PackedBatch.from_padded(base.encoder.embed_tokens(ids), mask)
    assert_close(model(packed_inputs=packed, labels=labels).loss, base(**batch).loss)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_packed_ids_reach_adapted_embeddings():
    """PEFT's adapters are no nn.Embedding, but look tokens up one by one."""
    base = tiny_t5(torch.float64, tie_word_embeddings=False)
    for stack in (base.encoder, base.decoder):  # before 5.0 theirs is `shared` itself, which PEFT replaces only there
        stack.set_input_embeddings(copy.deepcopy(stack.embed_tokens))
    config = LoraConfig(target_modules=["shared", "embed_tokens"], r=2, init_lora_weights=False)
    model = get_peft_model(stamped(base), config).base_model.model
    ids, mask, labels = batch_of().values()
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert abs(expected - base(input_ids=ids, attention_mask=mask, labels=labels).loss) > 1e-4
    assert_close(model(packed_inputs=PackedBatch.from_padded(ids, mask), labels=labels).loss, expected)


# ---- forwards on instances -----------------------------------------------------------------------------------------


def halve(module: nn.Module) -> None:
    """Patch the instance: its result is half of what its class computes."""
    own = module.forward

    def forward(self, *args, **kwargs):
        output = own(*args, **kwargs)
        if isinstance(output, tuple):
            return (0.5 * output[0], *output[1:])
        if isinstance(output, Tensor):
            return 0.5 * output
        output["last_hidden_state"] = 0.5 * output.last_hidden_state
        return output

    module.forward = types.MethodType(forward, module)


PATCHED = {
    "encoder": "encoder has a forward",
    "encoder.block.1.layer.0.SelfAttention": r"encoder.block.1.layer.0.SelfAttention has a forward",
    "decoder.block.0.layer.1.EncDecAttention": r"decoder.block.0.layer.1.EncDecAttention has a forward",
}


@pytest.mark.parametrize("place", PATCHED)
def test_patched_modules_stay_padded(place):
    base, model = tiny_t5(torch.float64), tiny_t5(torch.float64)
    for each in (base, model):
        halve(each.get_submodule(place))
    stack = place.split(".")[0]
    message = f"{stack}: padded, because {PATCHED[place]} of its own on the instance, as hooks of Accelerate put there"
    with pytest.warns(UserWarning, match=message):
        apply_stamp(model)
    assert abs(base(**batch_of()).loss - tiny_t5(torch.float64)(**batch_of()).loss) > 1e-5
    assert_same_as_base(base, model)
    if stack == "encoder":
        with pytest.raises(ValueError, match=f"pruning needs an encoder that runs packed: {PATCHED[place]}"):
            apply_stamp(model, pruning=PRUNING)


@pytest.mark.parametrize("place", ["encoder.block.1", "decoder.block.0.layer.2", "encoder.block.0.layer.1"])
def test_patched_blocks_and_layers_are_respected(place):
    base, model = tiny_t5(torch.float64), tiny_t5(torch.float64)
    for each in (base, model):
        halve(each.get_submodule(place))
    apply_stamp(model)
    assert_all_packed(model)
    assert abs(base(**batch_of()).loss - tiny_t5(torch.float64)(**batch_of()).loss) > 1e-5
    assert_same_as_base(base, model)


def test_patched_model_is_refused():
    model = tiny_t5()
    model.forward = types.MethodType(Doubled.forward, model)
    with pytest.raises(ValueError, match="stamped before Accelerate replaces its forward, but the T5ForConditionalGen"):
        apply_stamp(model)
    assert type(model.encoder) is T5Stack


def prepared(model: nn.Module) -> nn.Module:
    return Accelerator(mixed_precision="bf16", cpu=True).prepare(model)


def test_accelerate_prepares_before():
    with pytest.raises(ValueError, match="must be stamped before Accelerate replaces its forward"):
        apply_stamp(prepared(tiny_t5()))


def test_accelerate_prepares_after():
    base = tiny_t5()
    model = prepared(stamped(base))
    prepared(base)
    batch = batch_of()
    expected, got = base(**batch), model(**batch)
    assert got.logits is None and got.loss.dtype == torch.float32
    assert relative_error(got.loss, expected.loss) < 1e-2
    pruned = prepared(stamped(tiny_t5(), pruning=PRUNING))
    expected = stamped(tiny_t5(), pruning=PRUNING)(**batch).loss
    assert relative_error(pruned(**batch).loss, expected) < 1e-2
    with pytest.raises(ValueError, match="the model has a forward on the instance, which calls the stamped class's"):
        remove_stamp(model)
    assert isinstance(model, StampT5ForConditionalGeneration) and model(**batch).loss.isfinite()


class HalvingHook(ModelHook):
    def post_forward(self, module, output):
        if isinstance(output, tuple):
            return (0.5 * output[0], *output[1:])
        return 0.5 * output


@pytest.mark.parametrize(
    "place", ["encoder.block.1.layer.0.SelfAttention", "decoder.block.0", "encoder.block.2.layer.1"]
)
def test_accelerate_hooks_after_stamping(place):
    base = tiny_t5(torch.float64)
    model = stamped(base)
    for each in (base, model):
        add_hook_to_module(each.get_submodule(place), HalvingHook())
    assert_all_packed(model)
    assert_same_as_base(base, model)
    apply_stamp(model, pruning=PRUNING)  # what a hook wraps is stamped already
    assert model.encoder.is_pruned
    apply_stamp(model)
    assert not model.encoder.is_pruned
    assert_same_as_base(base, model)
    if place.endswith("Attention"):
        with pytest.raises(
            ValueError, match=rf"{place} has a forward on the instance.*remove_hook_from_module\(recurse"
        ):
            remove_stamp(model)
    for each in (base, model):
        remove_hook_from_module(each, recurse=True)
    remove_stamp(model)
    assert_close(model(**batch_of()).loss, base(**batch_of()).loss)


def test_accelerate_hook_that_was_removed():
    """Accelerate leaves the forward of the class on the instance, which is not that of the stamped class."""
    model = tiny_t5(torch.float64)
    expected = copy.deepcopy(model)
    for name in ("encoder", "decoder.block.0.layer.0.SelfAttention"):
        module = model.get_submodule(name)
        remove_hook_from_module(add_hook_to_module(module, HalvingHook()))
        assert "forward" in vars(module)
    apply_stamp(model)
    assert_all_packed(model)
    assert_same_as_base(expected, model)


def test_accelerate_hook_before_stamping():
    base, model = tiny_t5(torch.float64), tiny_t5(torch.float64)
    for each in (base, model):
        add_hook_to_module(each.decoder.block[0].layer[0].SelfAttention, HalvingHook())
    with pytest.warns(
        UserWarning, match=r"decoder: padded, because decoder.block.0.layer.0.SelfAttention has a forward"
    ):
        apply_stamp(model)
    assert_same_as_base(base, model)


# ---- outputs by number ---------------------------------------------------------------------------------------------


def test_outputs_of_training_by_number():
    output = stamped(tiny_t5())(**batch_of())
    assert output[0] is output.loss and output[:1] == (output.loss,) == output.to_tuple()
    message = r"Seq2SeqOutput\[.*\]: of loss, encoder_packed, next_token_loss only the first 1 can .* return_dict=False"
    for key in (1, 2, -1, slice(1, None), slice(0, 2), slice(None)):
        with pytest.raises(IndexError, match=message):
            output[key]
    assert list(output) == ["loss", "encoder_packed", "next_token_loss"]


def test_outputs_of_evaluation_by_number():
    base = tiny_t5().eval()
    model, batch = stamped(base), batch_of()
    names = list(base(**batch))
    output = model(**batch)
    assert list(output) == names and len(output.to_tuple()) == len(names)
    assert all(output[place] is output[name] is output[:][place] for place, name in enumerate(names))
    assert output[-1] is output.encoder_last_hidden_state
    output = model(**batch, use_cache=False)  # where the decoder runs packed
    assert output[0] is output.loss and output[1] is output.logits
    for got in (output[:2], output.to_tuple()):
        assert len(got) == 2 and got[0] is output.loss and got[1] is output.logits
    for key in (2, -1, slice(0, 3), slice(2, None)):
        with pytest.raises(IndexError, match="only the first 2 can be found by number"):
            output[key]
    with_logits = model.train()(**batch, skip_logits=False)
    assert with_logits[1] is with_logits.logits
    with pytest.raises(IndexError, match="only the first 2"):
        with_logits[2]


@pytest.mark.parametrize("training", [True, False])
def test_outputs_without_labels_by_number(training):
    base = tiny_t5(torch.float64).train(training)
    model = stamped(base)
    arguments = dict(**inputs_of(batch_of()), decoder_input_ids=batch_of()["labels"])
    for options in ({}, dict(use_cache=True), dict(use_cache=False), dict(output_hidden_states=True)):
        expected, got = base(**arguments, **options), model(**arguments, **options)
        # In training the decoder runs packed, without the cache that the base model has in the second place.
        names = [name for name in expected if name in got]
        places = len(names) if names == list(expected) else 1
        assert places > 1 or (training and options.get("use_cache") is None)
        for place in range(places):
            assert got[place] is got[names[place]]
        is_whole = places == len(expected)
        for key in (places,) if is_whole else (places, -1, slice(0, places + 1), slice(None)):
            with pytest.raises(IndexError, match="Seq2SeqOutput"):
                got[key]
        assert len(got.to_tuple()) == places and got.to_tuple()[0] is got.logits
        assert not is_whole or got[-1] is got[names[-1]]


def test_encoder_outputs_by_number():
    base = tiny_t5(torch.float64).eval()
    model, inputs = stamped(base), inputs_of(batch_of())
    output = model.encoder(**inputs)
    assert output[0] is output.last_hidden_state and output.to_tuple() == (output.last_hidden_state,)
    for key in (1, -1, slice(None)):
        with pytest.raises(IndexError, match="EncoderOutput"):
            output[key]
    with_states = model.encoder(**inputs, output_hidden_states=True)
    assert with_states[1] is with_states.hidden_states and len(with_states[1]) == 4
    assert (
        list(with_states)[:2]
        == ["last_hidden_state", "hidden_states"]
        == list(base.encoder(**inputs, output_hidden_states=True))
    )
    packed = PackedBatch.from_padded(*inputs.values())
    with pytest.raises(IndexError, match=r"EncoderOutput\[0\]: of packed only the first 0 can be found"):
        model.encoder(packed_inputs=packed)[0]


def test_decoder_outputs_by_number():
    base = tiny_t5(torch.float64)
    model, batch = stamped(base), batch_of()
    arguments = dict(input_ids=batch["labels"], encoder_hidden_states=base.encoder(**inputs_of(batch))[0])
    output = model.decoder(**arguments)
    assert output[0] is output.last_hidden_state
    for key in (1, -1, slice(1, None)):  # where the base model has its cache
        with pytest.raises(IndexError, match="DecoderOutput"):
            output[key]
    output = model.decoder(**arguments, use_cache=False)
    assert output[-1] is output[0] and output[1:] == ()
    output = model.decoder(**arguments, use_cache=False, output_hidden_states=True)
    assert output[1] is output.hidden_states
    assert (
        list(output) == list(base.decoder(**arguments, use_cache=False, output_hidden_states=True))[: len(list(output))]
    )


def assert_same_values(got, expected, valid: Tensor) -> None:
    """Tuples of the same length with the same values on tokens, at any depth; caches only by type."""
    if isinstance(expected, Tensor):
        assert got.shape == expected.shape
        if expected.dim() == 4 and expected.shape[2] == valid.shape[1]:
            got, expected = got.transpose(1, 2), expected.transpose(1, 2)  # keys or values, before 5.0
        if expected.shape[:2] == valid.shape:
            got, expected = got[valid], expected[valid]
        assert_close(got, expected)
    elif isinstance(expected, tuple):
        assert isinstance(got, tuple) and len(got) == len(expected)
        for each_got, each_expected in zip(got, expected, strict=True):
            assert_same_values(each_got, each_expected, valid)
    else:
        assert type(got) is type(expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, dict(use_cache=False), dict(output_hidden_states=True)], ids=str)
def test_tuples_are_those_of_the_base_model(training, options):
    base = tiny_t5(torch.float64).train(training)
    model, batch = stamped(base), batch_of()
    valid = batch["attention_mask"].bool()
    without = dict(**inputs_of(batch), decoder_input_ids=batch["labels"])
    for arguments in (batch, without):
        expected, got = (each(**arguments, **options, return_dict=False) for each in (base, model))
        assert_same_values(got, expected, valid)
    shared = {name: value for name, value in options.items() if name != "use_cache"}
    expected, got = (each.encoder(**inputs_of(batch), **shared, return_dict=False) for each in (base, model))
    assert_same_values(got, expected, valid)
    arguments = dict(encoder_hidden_states=expected[0], encoder_attention_mask=batch["attention_mask"])
    arguments |= dict(input_ids=batch["labels"], return_dict=False, **options)
    assert_same_values(model.decoder(**arguments), base.decoder(**arguments), valid)


def test_positional_arguments_have_the_order_of_t5():
    base = tiny_t5(torch.float64)
    model, batch = stamped(base), batch_of()
    ids, mask, labels = batch.values()
    decoder_ids = base._shift_right(labels)
    encoded = base.encoder(ids, mask)
    encoded.last_hidden_state = encoded.last_hidden_state.detach()
    given = dict(attention_mask=mask, decoder_input_ids=decoder_ids, encoder_outputs=encoded)
    arguments = positional(T5ForConditionalGeneration, **given, labels=labels)
    assert_same_training_step(base, base(*arguments).loss, model, model(*arguments).loss)
    assert_close(model(ids, mask, decoder_ids, None, labels=labels).loss, base(*arguments).loss)
    without = positional(T5ForConditionalGeneration, **given)
    assert_close(model.train(False)(*without).logits, base.eval()(*without).logits)
    with pytest.raises(TypeError, match="multiple values for encoder_outputs"):
        model(*without, encoder_outputs=encoded)
    with pytest.raises(TypeError, match="positional arguments"):
        model(*arguments, *[None] * 12)
    with pytest.raises(TypeError, match="positional arguments"):
        model.encoder(ids, mask, None, None, None, *[None] * 12)


def test_positional_arguments_keep_those_by_name():
    """future_ids and num_items_in_batch beside five positional arguments."""
    model = stamped(tiny_t5(torch.float64), prediction=PREDICTION)
    ids, mask, labels = batch_of().values()
    encoded = model.encoder(ids, mask)
    extra = dict(labels=labels, future_ids=labels.repeat(1, 2), num_items_in_batch=100)
    expected = model(encoder_outputs=encoded, attention_mask=mask, **extra)
    got = model(*positional(T5ForConditionalGeneration, attention_mask=mask, encoder_outputs=encoded), **extra)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.prediction_loss, expected.prediction_loss)


class Doubled(T5ForConditionalGeneration):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = 2 * output.loss
        return output


def test_positional_arguments_through_a_subclass():
    """The stamped forward must not start the subclass's once more."""
    base = become(tiny_t5(torch.float64), **{"": Doubled})
    model, batch = stamped(base), batch_of()
    ids, mask, labels = batch.values()
    encoded = BaseModelOutput(last_hidden_state=base.encoder(ids, mask)[0].detach())
    arguments = positional(T5ForConditionalGeneration, attention_mask=mask, encoder_outputs=encoded, labels=labels)
    assert_same_training_step(base, base(*arguments).loss, model, model(*arguments).loss)


# ---- hidden states and attention maps ------------------------------------------------------------------------------

STATES = ("encoder_hidden_states", "decoder_hidden_states")


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("training", [True, False])
def test_hidden_states_are_those_of_the_base_model(training, padding_side):
    base = tiny_t5(torch.float64).train(training)
    model, batch = stamped(base), batch_of(padding_side)
    valid = batch["attention_mask"].bool()
    expected, got = (each(**batch, output_hidden_states=True) for each in (base, model))
    for name in STATES:
        assert len(got[name]) == len(expected[name]) == 4
        for each_got, each_expected in zip(got[name], expected[name], strict=True):
            chosen = valid if name == "encoder_hidden_states" else torch.ones_like(batch["labels"]).bool()
            assert_close(each_got[chosen], each_expected[chosen])
    assert_close(got.logits, expected.logits)
    losses = []
    for output in (expected, got):  # the mean of every hidden state, and the loss
        means = [(output.encoder_hidden_states[i] * valid[..., None]).mean() for i in range(4)]
        losses.append(output.loss + sum(means) + sum(each.mean() for each in output.decoder_hidden_states))
    assert_same_training_step(base, losses[0], model, losses[1])


@pytest.mark.parametrize("training", [True, False])
def test_hidden_states_of_a_pruned_model(training):
    model = stamped(tiny_t5(torch.float64), pruning=PRUNING).train(training)
    batch = batch_of()
    output = model(**batch, output_hidden_states=True)
    assert len(output.encoder_hidden_states) == 1
    assert output.encoder_hidden_states[-1] is output.encoder_last_hidden_state
    plain = model(**batch)
    assert torch.equal(output.loss, plain.loss)
    if not training:
        assert torch.equal(output.encoder_last_hidden_state, plain.encoder_last_hidden_state)
    encoded = model.encoder(**inputs_of(batch), output_hidden_states=True)
    assert encoded.hidden_states[-1] is encoded.last_hidden_state and len(encoded.hidden_states) == 1
    (output.encoder_hidden_states[-1].mean() + output.decoder_hidden_states[-1].mean()).backward()
    assert all(p.grad is not None for p in model.encoder.block[0].parameters())


@pytest.mark.skipif(not HAS_SELECTION, reason="earlier releases have all, none, or (5.17) others than those asked for")
@pytest.mark.parametrize("selected", [[1], 2, [0, -1], [7, 1]])
def test_selected_hidden_states(selected):
    """The newest releases take indices in the place of True."""
    base = tiny_t5(torch.float64).eval()
    model, batch = stamped(base), batch_of()
    expected, got = (each(**batch, output_hidden_states=selected) for each in (base, model))
    for name in STATES:
        assert [each is None for each in got[name]] == [each is None for each in expected[name]]
        assert_same_values(got[name], expected[name], batch["attention_mask"].bool())
    model = stamped(base, pruning=PRUNING)
    for refused in (model, model.train(), model.encoder):
        with pytest.raises(
            ValueError, match=r"output_hidden_states=.*: with pruning or prediction only the last hidden"
        ):
            refused(**(inputs_of(batch) if refused is model.encoder else batch), output_hidden_states=selected)


@pytest.mark.parametrize("training", [True, False])
def test_attention_maps_are_those_of_the_base_model(training):
    base = tiny_t5(torch.float64).train(training)
    model, batch = stamped(base), batch_of()
    expected, got = (each(**batch, output_attentions=True) for each in (base, model))
    valid = batch["attention_mask"].bool()
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(got[name]) == 3
        for each_got, each_expected in zip(got[name], expected[name], strict=True):
            if name == "encoder_attentions":
                each_got, each_expected = (each.transpose(1, 2)[valid] for each in (each_got, each_expected))
            assert_close(each_got, each_expected)
    assert_same_training_step(base, expected.loss, model, got.loss)


def test_attention_maps_of_a_pruned_model_are_refused():
    model = stamped(tiny_t5(), pruning=PRUNING)
    with pytest.raises(ValueError, match=r"output_attentions: packed stacks do not have this, .* encoder is pruned"):
        model(**batch_of(), output_attentions=True)


def test_attention_maps_warn_once(monkeypatch):
    said = []
    monkeypatch.setattr(t5_stacks.logger, "warning_once", said.append)
    model = stamped(tiny_t5()).eval()
    for _ in range(2):
        model(**batch_of(), output_attentions=True)
    assert set(said) == {
        "output_attentions: packed stacks do not have this, so Hugging Face's padded forward runs, which is slower"
    }


# ---- subclasses of the model ---------------------------------------------------------------------------------------


class Smoothed(T5ForConditionalGeneration):
    """Reads the logits of super().forward and adds a loss."""

    def forward(self, *args, weight: float = 0.1, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output.loss = output.loss + weight * output.logits.logsumexp(-1).square().mean()
        return output


class Letter(T5ForConditionalGeneration):
    """As in LETTER: T5's forward written out, with a temperature in the loss."""

    temperature = 0.7

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        encoder_outputs=None,
        inputs_embeds=None,
        decoder_inputs_embeds=None,
        labels=None,
        cache=None,
        past_key_values=None,  # its name before 5.18
        use_cache=None,
        return_dict=None,
        cache_position=None,
    ):
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, return_dict=True
            )
        hidden_states = encoder_outputs[0]
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shift_right(labels)
        decoder_outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            inputs_embeds=decoder_inputs_embeds,
            **{CACHE: past_key_values if cache is None else cache},
            encoder_hidden_states=hidden_states,
            encoder_attention_mask=attention_mask,
            use_cache=use_cache,
            return_dict=True,
        )
        states = decoder_outputs[0]
        if getattr(self.config, "scale_decoder_outputs", self.config.tie_word_embeddings):
            states = states * (self.model_dim**-0.5)
        logits = self.lm_head(states)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.flatten(0, 1) / self.temperature, labels.flatten())
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            encoder_last_hidden_state=hidden_states,
            **{CACHE: decoder_outputs.get(CACHE)},
        )


class WithHead(T5ForConditionalGeneration):
    """Adds a head, and an argument for it."""

    def __init__(self, config):
        super().__init__(config)
        self.rating = nn.Linear(config.d_model, 1)
        self.post_init()

    def forward(self, *args, ratings: Tensor | None = None, **kwargs):
        output = super().forward(*args, **kwargs)
        if ratings is not None:
            predicted = self.rating(output.logits @ self.lm_head.weight)
            output.loss = output.loss + (predicted.mean((1, 2)) - ratings).square().mean()
        return output


class Untouched(T5ForConditionalGeneration):
    pass


SUBCLASSES = (Untouched, Smoothed, Letter, WithHead, Doubled)


def subclass_model(cls: type[T5ForConditionalGeneration]) -> nn.Module:
    torch.manual_seed(0)
    model = cls(tiny_t5().config)
    set_attention(model, "eager")
    return model.double().train()


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("cls", SUBCLASSES)
def test_subclasses(cls, padding_side, packed_calls):
    base = subclass_model(cls)
    model = silently_stamped(base)
    batch = batch_of(padding_side)
    assert_all_packed(model)
    assert stamp_status(model).own_forward == ("Letter.forward" if cls is Letter else None)
    assert str(stamp_status(model)).endswith("as in Letter.forward, with logits") == (cls is Letter)
    extra = dict(ratings=torch.rand(len(LENGTHS), dtype=torch.float64)) if cls is WithHead else {}
    model(**batch, **extra)
    assert packed_calls.count("self") == 6 and packed_calls.count("cross") == 3
    assert_same_training_step(base, base(**batch, **extra).loss, model, model(**batch, **extra).loss)
    assert_close(model.eval()(**batch, **extra).logits, base.eval()(**batch, **extra).logits)
    for options in ({}, dict(num_beams=3)):
        found = [each.generate(**inputs_of(batch), max_new_tokens=3, **options) for each in (base, model)]
        assert torch.equal(*found)
    assert type(model).__name__ == cls.__name__ and isinstance(model, cls)
    assert isinstance(model, StampT5ForConditionalGeneration)
    remove_stamp(model)
    assert type(model) is cls
    assert_close(model(**batch).loss, base(**batch).loss)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("layout", ["compact", "original"])
def test_own_forward_with_pruning(layout, padding_side):
    """It hands the mask of the inputs to the decoder, which reads only the kept tokens."""
    base = subclass_model(Letter)
    pruning = PruningConfig(schedule=PRUNING.schedule, layout=layout)
    model, batch = silently_stamped(base, pruning=pruning), batch_of(padding_side)
    for training in (True, False):
        base.train(training)
        model.train(training)
        encoded = encode_padded(base, **inputs_of(batch), pruning=PRUNING)
        expected = decode_padded(base, encoded, labels=batch["labels"])
        assert_same_training_step(base, expected.loss, model, model(**batch).loss)
    plain = stamped(tiny_t5(torch.float64), pruning=pruning).eval()
    plain.load_state_dict(model.state_dict())
    options = dict(num_beams=3, max_new_tokens=3, output_scores=True, return_dict_in_generate=True)
    expected, got = (each.generate(**inputs_of(batch), **options) for each in (plain, model))
    assert torch.equal(got.sequences, expected.sequences)
    assert_close(got.sequences_scores, expected.sequences_scores)


def test_prediction_needs_the_loss_of_super():
    message = r"prediction needs the loss of super\(\).forward, which Letter.forward does not call"
    with pytest.raises(ValueError, match=message):
        apply_stamp(subclass_model(Letter), prediction=PREDICTION)
    model = apply_stamp(subclass_model(Smoothed), prediction=PREDICTION)
    batch = batch_of()
    future_ids = batch["labels"].repeat(1, 2)
    output = model(**batch, future_ids=future_ids)
    addition = 0.1 * output.logits.logsumexp(-1).square().mean()
    assert_close(output.loss.detach(), (output.next_token_loss + output.prediction_loss + addition).detach())


def test_arguments_that_nobody_knows_are_refused():
    model = stamped(subclass_model(Smoothed))
    with pytest.raises(ValueError, match="forward takes no user_ids"):
        model(**batch_of(), user_ids=torch.zeros(4))


class BuiltStamped(StampT5ForConditionalGeneration):
    """A subclass of the stamped class, with an encoder of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = SuperEncoder(self.encoder.config)
        self.encoder.set_input_embeddings(self.shared)
        self.post_init()


def test_subclass_of_the_stamped_class(tmp_path):
    torch.manual_seed(0)
    config = tiny_t5().config
    plain = BuiltStamped(config)
    assert_all_packed(plain)
    assert isinstance(plain.encoder, SuperEncoder) and not plain.encoder.is_pruned
    model = apply_stamp(plain, pruning=PRUNING, prediction=PREDICTION)
    model.save_pretrained(tmp_path)
    loaded = BuiltStamped.from_pretrained(tmp_path)
    assert type(loaded) is BuiltStamped and isinstance(loaded.encoder, SuperEncoder) and loaded.encoder.is_pruned
    batch = batch_of() | dict(future_ids=torch.randint(1, VOCAB_SIZE, (len(LENGTHS), 2 * LEVELS)))
    assert torch.equal(loaded.train()(**batch).loss, model.train()(**batch).loss)
    assert type(copy.deepcopy(model)) is BuiltStamped
    with pytest.raises(ValueError, match="stamped by apply_stamp, but BuiltStamped is a subclass of a stamped class"):
        remove_stamp(model)


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_checkpoints_of_subclasses(cls, tmp_path):
    prediction = None if cls is Letter else PREDICTION
    model = stamped(subclass_model(cls).float(), pruning=PRUNING, prediction=prediction)
    model.save_pretrained(tmp_path)
    assert f'"{cls.__name__}"' in (tmp_path / "config.json").read_text()
    batch = batch_of()
    expected = model.eval()(**batch)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.encoder.is_pruned
    assert (loaded.stamp_prediction is None) == (prediction is None)
    assert torch.equal(loaded(**batch).loss, expected.loss)
    base = cls.from_pretrained(tmp_path)
    assert type(base) is cls and type(base.encoder) is T5Stack
    apply_stamp(base, pruning=PRUNING)
    assert torch.equal(base(**batch).loss, expected.loss)


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_subclasses_are_stamped(copied):
    base = with_encoder(SuperEncoder, Smoothed)
    become_all(base.decoder, T5Attention, HalvedAttention)
    model = stamped(base, pruning=PRUNING)
    other = copied(model)
    assert [type(each) for each in other.modules()] == [type(each) for each in model.modules()]
    batch = batch_of()
    assert torch.equal(other(**batch).loss, model(**batch).loss)
    remove_stamp(other)
    assert [type(each) for each in other.modules()] == [type(each) for each in base.modules()]
    assert_close(other(**batch).loss, base(**batch).loss)


@pytest.mark.parametrize("cls", [Smoothed, Letter])
def test_lora_on_a_subclass(cls):
    base = subclass_model(cls)
    config = LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, target_modules=["q", "v"], r=2, init_lora_weights=False)
    adapted = []
    for each in (copy.deepcopy(base), stamped(base)):
        torch.manual_seed(3)
        adapted.append(get_peft_model(each, config).double().train())
    batch = batch_of()
    arguments = batch
    assert_same_training_step(
        adapted[0], adapted[0].base_model(**arguments).loss, adapted[1], adapted[1].base_model(**arguments).loss
    )


@pytest.mark.parametrize("cls", [Smoothed, Letter])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_subclass(cls):
    base = subclass_model(cls)
    model = torch.compile(stamped(base), backend="eager")
    batch = batch_of()
    assert_same_training_step(base, base(**batch).loss, model._orig_mod, model(**batch).loss)


@pytest.mark.parametrize("cls", [T5ForConditionalGeneration, Untouched, Smoothed, Letter])
def test_trainer_asks_a_subclass_for_its_arguments(cls, tmp_path):
    """A forward of its own may not take num_items_in_batch. Accumulated steps are those of the base model."""
    if cls is Smoothed and not HAS_KWARGS:
        pytest.skip("before 5.0 the base model has no num_items_in_batch, which the Trainer gives to any **kwargs")
    weights = []
    for stamp in (False, True):
        model = subclass_model(cls).float()
        if stamp:
            apply_stamp(model)
        if cls is not Letter:
            stamp or weights.append(None)
        rows = [dict(zip(batch_of(), row, strict=True)) for row in zip(*batch_of().values(), strict=True)]
        arguments = TrainingArguments(
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            optim="sgd",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        Trainer(model, arguments, train_dataset=rows).train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    if cls is Letter:  # T5's own forward does not divide by num_items_in_batch
        assert_close(weights[-1], weights[-2])
