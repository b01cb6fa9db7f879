"""Layers that somebody has put into a block: those that look at other tokens would mix packed histories."""

import copy
from contextlib import nullcontext

import pytest
import torch
from closeness import relative_error
from t5_cases import padded_batch, tiny_t5
from torch import Tensor, nn
from transformers import T5Model
from transformers.models.t5.modeling_t5 import T5Block, T5LayerCrossAttention, T5LayerSelfAttention

from stamp_kernels.integrations.transformers import PruningConfig, apply_stamp, stamp_status
from stamp_kernels.integrations.transformers.tokenwise import mixes_tokens

WIDTH = 24


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 40), nn.SiLU(), nn.Dropout(0.5), nn.Linear(40, WIDTH))

    def forward(self, states: Tensor) -> Tensor:
        return states + self.layers(states)


class Convolution(Perceptron):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, states: Tensor) -> Tensor:
        return states + self.layers(states.mT).mT


class Mean(Convolution):
    def forward(self, states: Tensor) -> Tensor:
        return states + states.mean(1, keepdim=True) + 0 * self.layers.bias


class WithoutParameters(nn.Module):
    def forward(self, states: Tensor) -> Tensor:
        return torch.fft.fft2(states).real


def patched() -> nn.Module:
    layer = tiny_t5().encoder.block[0].layer[-1]
    layer.DenseReluDense.forward = lambda states: states.cumsum(1)
    return layer


class Failing(Convolution):
    def forward(self, states: Tensor) -> Tensor:
        raise RuntimeError("needs a GPU")


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Perceptron(), False),
        (Convolution(), True),
        (Mean(), True),
        (nn.GRU(WIDTH, WIDTH, batch_first=True), True),
        (WithoutParameters(), True),
        (patched(), True),
        (nn.Softmax(dim=1), True),
        (Failing(), False),
        (Convolution().to("meta"), False),
        (tiny_t5().encoder.block[0].layer[-1], False),
        (Convolution().to(torch.bfloat16), True),
        (Perceptron().to(torch.bfloat16), False),
    ],
)
def test_mixes_tokens(module, expected):
    before = torch.get_rng_state()
    modes = [each.training for each in module.modules()]
    assert mixes_tokens(module, next(module.parameters(), torch.empty(0)).new_empty(WIDTH)) == expected
    assert torch.equal(torch.get_rng_state(), before) and [each.training for each in module.modules()] == modes


def test_a_replaced_layer_runs_packed():
    base = tiny_t5().eval()
    base.encoder.block[1].layer[-1] = Perceptron().eval()
    model, batch = apply_stamp(copy.deepcopy(base)), padded_batch()
    assert stamp_status(model).packed == ("encoder", "decoder")
    assert relative_error(model(**batch).logits, base(**batch).logits) < 1e-5


@pytest.mark.parametrize("place", ["layer", "inside a layer", "norm", "last norm"])
def test_a_stack_that_mixes_tokens_stays_padded(place):
    base = tiny_t5().eval()
    layers = base.encoder.block[1].layer
    if place == "layer":
        layers[-1] = Convolution().eval()
    elif place == "last norm":
        base.encoder.final_layer_norm = Convolution().eval()
    elif place == "norm":
        layers[0].layer_norm = Convolution().eval()
    else:
        layers[-1].DenseReluDense = Convolution().eval()
    model, batch = copy.deepcopy(base), padded_batch()
    with pytest.warns(
        UserWarning, match=r"encoder: padded, because (layer\..* of block 2|final_layer_norm), a .*, mixes"
    ):
        apply_stamp(model)
    assert relative_error(model(**batch).logits, base(**batch).logits) < 1e-5
    with pytest.raises(ValueError, match=r"pruning needs an encoder that runs packed: (layer|final)"):
        apply_stamp(base, pruning=PruningConfig())


class CallsSuper(T5Block):
    def forward(self, hidden_states, *args, **kwargs):
        states, *others = super().forward(1.5 * hidden_states, *args, **kwargs)
        return (states, *others)


class AddsPlaces(T5Block):
    def forward(self, hidden_states, *args, **kwargs):
        places = 0.01 * torch.arange(hidden_states.shape[1])[:, None]
        return super().forward(hidden_states + places, *args, **kwargs)


class Centres(T5LayerSelfAttention):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states - hidden_states.mean(1, keepdim=True), *args, **kwargs)


class CentresSource(T5LayerCrossAttention):
    def forward(self, hidden_states, key_value_states, *args, **kwargs):
        centred = key_value_states - key_value_states.mean(1, keepdim=True)
        return super().forward(hidden_states, centred, *args, **kwargs)


def with_class(stack: nn.Module, number: int, layer: int | None, new: type[nn.Module]) -> None:
    """Replaces the class of a block, or of one of its layers."""
    block = stack.block[number]
    (block if layer is None else block.layer[layer]).__class__ = new


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(
    ("stack", "layer", "new", "is_packed"),
    [
        ("encoder", None, CallsSuper, True),
        ("decoder", None, CallsSuper, True),
        ("encoder", None, AddsPlaces, False),
        ("decoder", None, AddsPlaces, False),
        ("encoder", 0, Centres, False),
        ("decoder", 1, CentresSource, False),
    ],
)
def test_blocks_that_mix_histories_stay_padded(stack, layer, new, is_packed, number):
    base = tiny_t5()
    with_class(getattr(base, stack), number, layer, new)
    model, batch = copy.deepcopy(base), padded_batch((9, 9, 9))  # the means of T5 are over padding too
    with (
        nullcontext() if is_packed else pytest.warns(UserWarning, match=rf"mixes histories, .* {new.__name__}\.forward")
    ):
        apply_stamp(model)
    assert (stack in stamp_status(model).packed) == is_packed
    assert relative_error(model(**batch).loss, base(**batch).loss) < 1e-5


@pytest.mark.parametrize("mask", ["that of the caller", "none"])
def test_dropped_states_are_not_read_from_a_copy(mask):
    """layout="original": a copy of the states has no layout, and the caller's mask is from before pruning."""
    torch.manual_seed(0)
    pruning = PruningConfig([(1, 0.5)], layout="original")
    model = apply_stamp(T5Model(tiny_t5(torch.float64).config).double(), pruning=pruning)
    batch = padded_batch((9, 9, 9))
    for training in (True, False):
        model.train(training)
        encoded = model.encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        assert not encoded.attention_mask.all()
        inputs = dict(input_ids=batch["labels"])
        expected = model.decoder(
            **inputs, encoder_hidden_states=encoded.last_hidden_state, encoder_attention_mask=encoded.attention_mask
        )
        got = model.decoder(
            **inputs,
            encoder_hidden_states=encoded.last_hidden_state * 1,
            encoder_attention_mask=None if mask == "none" else batch["attention_mask"],
        )
        assert relative_error(got.last_hidden_state, expected.last_hidden_state) < 1e-9


def test_a_stack_that_is_changed_later_is_unpacked_by_the_next_apply_stamp():
    base = tiny_t5().eval()
    model = apply_stamp(copy.deepcopy(base), pruning=PruningConfig())
    model.encoder.block[1].layer[-1] = base.encoder.block[1].layer[-1] = Convolution().eval()
    assert "still runs packed" in str(stamp_status(model))
    with pytest.warns(UserWarning, match="encoder: padded"):
        apply_stamp(model)
    assert type(model.encoder) is type(base.encoder)
    batch = padded_batch()
    assert relative_error(model(**batch).logits, base(**batch).logits) < 1e-5
