"""Dropout in packed_attention: its random numbers, its mask, and where the seed comes from."""

import pytest
import torch
from attention_cases import (
    CASES,
    DROPOUT_SEED,
    contract_keep_mask,
    detached,
    forward_and_backward,
    philox_words,
    small_integers,
)
from torch.utils.checkpoint import checkpoint

from stamp_kernels.ops.attention.packed_attention import packed_attention
from stamp_kernels.reference.dropout import attention_keep_mask, philox4x32


@pytest.mark.core
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers of Random123
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
)
def test_philox_known_answers(counter, key, words):
    counter, key, words = ([int(word, 16) for word in numbers.split()] for numbers in (counter, key, words))
    assert philox_words(tuple(counter), tuple(key)) == tuple(words)
    got = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert [int(word) for word in got] == words


@pytest.mark.core
@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, DROPOUT_SEED])
def test_mask_follows_the_contract(seed):
    heads, n_q, n_k = 2, 19, 42
    got = attention_keep_mask(0.4, torch.tensor([seed]), torch.tensor([0, 7]), heads, n_q, n_k)
    want = torch.stack([contract_keep_mask(0.4, seed, sequence, (heads, n_q, n_k)) for sequence in (0, 7)])
    assert torch.equal(got, want)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropped_share(p):
    keep = attention_keep_mask(p, torch.tensor([3]), torch.arange(4), 4, 64, 64)
    standard_error = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs((~keep).double().mean().item() - p) < 4 * standard_error


def test_seed_comes_from_torchs_generator(backend):
    inputs = CASES["dropout"].inputs() | dict(dropout_seed=None)

    def run(seed):
        torch.manual_seed(seed)
        return forward_and_backward(packed_attention, inputs)

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(first[part], again[part]) for part in first)
    assert not torch.equal(first["out"], other["out"])
    assert torch.equal(first["centrality"], other["centrality"])  # of the attention before dropout
    assert torch.equal(first["lse"], other["lse"])


def test_checkpointing_draws_the_same_mask(backend):
    inputs = detached(CASES["dropout"].inputs() | dict(dropout_seed=None))
    q = inputs.pop("q").requires_grad_()
    gradients = []
    for run in (lambda f: f(q), lambda f: checkpoint(f, q, use_reentrant=False)):
        torch.manual_seed(0)
        out = run(lambda q: packed_attention(q, **inputs))
        gradients.append(torch.autograd.grad(out, q, small_integers(out))[0])
    assert torch.equal(*gradients)
