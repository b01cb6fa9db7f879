"""Layers that somebody has put into a block: those that look at other tokens would mix packed histories."""

import copy

import pytest
import torch
from closeness import relative_error
from t5_cases import padded_batch, tiny_t5
from torch import Tensor, nn

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
    assert mixes_tokens(module, WIDTH) == expected
    assert torch.equal(torch.get_rng_state(), before) and [each.training for each in module.modules()] == modes


def test_a_replaced_layer_runs_packed():
    base = tiny_t5().eval()
    base.encoder.block[1].layer[-1] = Perceptron().eval()
    model, batch = apply_stamp(copy.deepcopy(base)), padded_batch()
    assert stamp_status(model).packed == ("encoder", "decoder")
    assert relative_error(model(**batch).logits, base(**batch).logits) < 1e-5


@pytest.mark.parametrize("place", ["layer", "inside a layer", "norm"])
def test_a_stack_that_mixes_tokens_stays_padded(place):
    base = tiny_t5().eval()
    layers = base.encoder.block[1].layer
    if place == "layer":
        layers[-1] = Convolution().eval()
    elif place == "norm":
        layers[0].layer_norm = Convolution().eval()
    else:
        layers[-1].DenseReluDense = Convolution().eval()
    model, batch = copy.deepcopy(base), padded_batch()
    with pytest.warns(UserWarning, match=r"encoder: padded, because layer\..* of block 2, a .*, mixes tokens"):
        apply_stamp(model)
    assert relative_error(model(**batch).logits, base(**batch).logits) < 1e-5
    with pytest.raises(ValueError, match="pruning needs an encoder that runs packed: layer"):
        apply_stamp(base, pruning=PruningConfig())
