"""per_level_cross_entropy against torch's cross-entropy of each level's logits."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from torch import nn

from stamp_kernels import MultiTokenLoss, per_level_cross_entropy
from stamp_kernels.modules import per_level

pytestmark = pytest.mark.core

NUM_ROWS, WIDTH = 23, 24
SIZES = {"equal": (17, 17, 17), "different": (17, 40, 9), "one": (12,)}
BIASES = {"none": lambda level: False, "all": lambda level: True, "some": lambda level: level % 2 == 0}


def inputs(sizes=SIZES["different"], has_bias=BIASES["none"], dtype=torch.float64, ignore_index=-100):
    """States, heads and codes. A third of the codes are ignored, and all of one row."""
    heads = nn.ModuleList(nn.Linear(WIDTH, size, bias=has_bias(level)) for level, size in enumerate(sizes)).to(dtype)
    states = torch.randn(NUM_ROWS, len(sizes), WIDTH).to(dtype).requires_grad_()
    codes = torch.stack([torch.randint(size, (NUM_ROWS,)) for size in sizes], dim=1)
    is_ignored = torch.rand(codes.shape) < 1 / 3
    is_ignored[3] = True
    return states, heads, codes.masked_fill(is_ignored, ignore_index)


def expected(states, heads, codes, **options):
    """The level's losses by torch, in float64."""
    losses = []
    for level, head in enumerate(heads):
        bias = None if head.bias is None else head.bias.double()
        logits = F.linear(states[:, level].double(), head.weight.double(), bias)
        losses.append(F.cross_entropy(logits, codes[:, level], **options))
    return torch.stack(losses)


def gradients(loss, states, heads):
    return torch.autograd.grad(loss, [states, *heads.parameters()])


def assert_equal_to_torch(states, heads, codes, **options):
    got = per_level_cross_entropy(states, heads, codes, return_step_losses=True, **options)
    want = expected(states, heads, codes, **options)
    assert isinstance(got, MultiTokenLoss)
    dtype = states.dtype
    assert_close(got.loss, want.sum(), dtype)
    assert_close(got.step_losses, want, dtype)
    assert not got.step_losses.requires_grad
    pairs = zip(gradients(got.loss, states, heads), gradients(want.sum(), states, heads), strict=True)
    for found, exact in pairs:
        assert found.dtype == dtype
        assert_close(found, exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("has_bias", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_losses_and_gradients(sizes, has_bias, dtype, backend):
    assert_equal_to_torch(*inputs(sizes, has_bias, dtype))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"ignore_index": 5}, {"ignore_index": -300}], ids=str)
def test_options(sizes, options):
    ignore_index = options.get("ignore_index", -100)
    assert_equal_to_torch(*inputs(sizes, BIASES["some"], ignore_index=ignore_index), **options)


def test_level_without_codes():
    """Where torch's mean is NaN."""
    states, heads, codes = inputs()
    codes[:, 1] = -100
    got = per_level_cross_entropy(states, heads, codes, return_step_losses=True)
    assert got.step_losses[1] == 0
    assert_close(got.loss, expected(states, heads, codes)[[0, 2]].sum())


def test_ignored_states_are_not_read():
    states, heads, codes = inputs()
    poisoned = states.detach().masked_fill((codes == -100)[..., None], torch.nan).requires_grad_()
    loss = per_level_cross_entropy(poisoned, heads, codes)
    assert_close(loss, expected(states, heads, codes).sum())
    for found, exact in zip(
        gradients(loss, poisoned, heads), gradients(expected(states, heads, codes).sum(), states, heads), strict=True
    ):
        assert_close(found, exact)


def test_strided_states_and_a_list_of_heads():
    """The decoder's states without the last one, as teacher forcing cuts them."""
    states, heads, codes = inputs()
    longer = torch.cat([states, states[:, :1]], dim=1)[:, :-1]
    assert_close(per_level_cross_entropy(longer, list(heads), codes), expected(states, heads, codes).sum())


def test_shared_head():
    states, heads, codes = inputs(SIZES["equal"])
    shared = nn.ModuleList([heads[0]] * 3)
    got, want = per_level_cross_entropy(states, shared, codes), expected(states, shared, codes).sum()
    for found, exact in zip(gradients(got, states, heads[:1]), gradients(want, states, heads[:1]), strict=True):
        assert_close(found, exact)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_autocast(sizes):
    states, heads, codes = inputs(sizes, BIASES["all"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = per_level_cross_entropy(states, heads, codes)
    assert_close(loss, expected(states, heads, codes).sum(), torch.bfloat16)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_compiles_to_one_graph(sizes):
    states, heads, codes = inputs(sizes, BIASES["all"], torch.float32)
    compiled = torch.compile(per_level_cross_entropy, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_close(compiled(states, heads, codes), expected(states, heads, codes).sum(), torch.float32)


def test_no_rows():
    states, heads, codes = inputs()
    assert per_level_cross_entropy(states[:0], heads, codes[:0]) == 0


class OwnForward(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


STATES, HEADS, CODES = inputs(dtype=torch.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"states": STATES[:, 0]}, r"states must have shape \[B, L, D\], got \[23, 24\]"),
        ({"states": CODES[..., None]}, r"states must have dtype .*, got torch.int64"),
        ({"heads": HEADS[:2]}, r"heads must have one nn.Linear for each of the 3 levels of states.* got 2"),
        ({"heads": HEADS[0]}, r"heads must be a sequence of nn.Linear, got Linear"),
        ({"heads": [*HEADS[:2], nn.Identity()]}, r"heads\[2\] must be an nn.Linear .*, got Identity"),
        ({"heads": [*HEADS[:2], OwnForward(24, 9)]}, r"heads\[2\] must be .* without a forward of its own, got OwnFor"),
        ({"heads": [*HEADS[:2], nn.Linear(8, 9)]}, r"heads\[2\].weight must have shape \[codes, 24\], got \[9, 8\]"),
        ({"heads": [*HEADS[:2], nn.Linear(24, 9).double()]}, r"heads\[2\].weight must have dtype torch.float32"),
        ({"heads": [*HEADS[:2], nn.Linear(24, 9, device="meta")]}, r"heads\[2\].weight must be on cpu, got meta"),
        ({"codes": CODES[:, :2]}, r"codes must have shape \[23, 3\], got \[23, 2\]"),
        ({"codes": CODES.int()}, r"codes must have dtype torch.int64"),
        ({"ignore_index": 0.5}, r"ignore_index must be an int"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in"),
        ({"return_step_losses": 1}, r"return_step_losses must be True or False"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        per_level_cross_entropy(**{"states": STATES, "heads": HEADS, "codes": CODES} | arguments)


def test_no_levels():
    with pytest.raises(ValueError, match=r"heads must have .* at least one, got 0"):
        per_level_cross_entropy(STATES[:, :0], [], CODES[:, :0])


@pytest.mark.parametrize("sizes", [SIZES["equal"], SIZES["different"]], ids=["equal", "different"])
@pytest.mark.parametrize("code", [-1, 17], ids=str)
def test_codes_of_another_level(sizes, code):
    states, heads, codes = inputs(sizes)
    codes[0, 0] = code
    with pytest.raises(RuntimeError, match="target"):
        per_level_cross_entropy(states, heads, codes)


def test_example():
    assert doctest.testmod(per_level).attempted == 4
    assert doctest.testmod(per_level).failed == 0
