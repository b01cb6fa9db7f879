"""The compiled cross-entropy of the CPU: every instruction set, many groups and tiles, bits, memory.

What the loss is, test_cross_entropy.py checks; here is what only these kernels could get wrong.
"""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from torch import Tensor

from stamp_kernels import multi_token_cross_entropy
from stamp_kernels._backend import use_backend
from stamp_kernels.profiling.measure import peak_bytes

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def make_inputs(
    rows: int, width: int, classes: int, steps: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden `[K, N, D]`, weight `[V, D]`, targets `[N, K]` of which a quarter is ignored, bias `[V]`; leaves."""
    hidden = torch.randn(steps, rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(classes, width) / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, classes, (rows, steps)).masked_fill(torch.rand(rows, steps) < 0.25, -100)
    bias = torch.randn(classes).to(dtype).requires_grad_()
    return hidden, weight, targets, bias


def loop(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor) -> Tensor:
    """Float64 sum of every step's F.cross_entropy, 0 for a step without targets."""
    losses = []
    for k in range(targets.shape[1]):
        logits = F.linear(hidden[k].double(), weight.double(), bias.double())
        total = F.cross_entropy(logits, targets[:, k], reduction="sum")
        losses.append(total / (targets[:, k] != -100).sum().clamp(min=1))
    return torch.stack(losses).sum()


def assert_matches_loop(inputs: tuple[Tensor, Tensor, Tensor, Tensor], **options: object) -> None:
    hidden, weight, targets, bias = inputs
    leaves = (hidden, weight, bias)
    got, want = multi_token_cross_entropy(hidden, weight, targets, bias=bias, **options), loop(*inputs)
    assert_close(got, want)
    for grad, expected in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert_close(grad, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "classes"),
    [(1, 1, 1), (300, 20, 255), (33, 33, 256), (290, 128, 1025), (70, 16, 3000), (5, 100, 31)],
)
def test_every_instruction_set(capability, rows, width, classes, dtype):
    assert_matches_loop(make_inputs(rows, width, classes, steps=2, dtype=dtype))


@pytest.mark.parametrize("memory", ["auto", "minimal"])
@pytest.mark.parametrize("steps", [1, 4, 8])
def test_steps(steps, memory):
    assert_matches_loop(make_inputs(150, 24, 300, steps), memory=memory)


def test_a_large_vocabulary():
    assert_matches_loop(make_inputs(260, 32, 32_000))


@pytest.mark.parametrize("memory", ["auto", "minimal"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "label_smoothing": 0.1, "z_loss": 1e-3}], ids=str)
def test_many_tiles(capability, options, memory):
    """Blocks of rows, slices of several chunks, and rows whose first labels are ignored, with shared hidden states."""
    hidden, weight, targets, bias = make_inputs(700, 24, 4500, steps=3)
    hidden = hidden.detach()[0].requires_grad_()
    targets[:200, :2] = -100
    results = []
    for backend, to in (("auto", torch.float32), ("reference", torch.float64)):
        leaves = [x.detach().to(to).requires_grad_() for x in (hidden, weight, bias)]
        with use_backend(backend):
            loss = multi_token_cross_entropy(leaves[0], leaves[1], targets, bias=leaves[2], **options, memory=memory)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results, strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("width", [1000, 4100])
def test_wide_rows(width):
    """Fewer classes in a chunk, slices and rows in a group."""
    assert_matches_loop(make_inputs(150, width, 1500))


def test_whole_slices_of_classes_ruled_out_by_their_bias(capability):
    """The largest logit of such a slice is -inf, and the difference of two is no number."""
    hidden, weight, targets, bias = make_inputs(40, 8, 600)
    with torch.no_grad():
        bias[:200], bias[400:500] = -torch.inf, -torch.inf
    targets[targets >= 0] = 200 + targets[targets >= 0] % 200
    assert_matches_loop((hidden, weight, targets, bias))


def test_no_valid_target_anywhere():
    hidden, weight, targets, bias = make_inputs(40, 8, 50, steps=2)
    loss = multi_token_cross_entropy(hidden, weight, targets.fill_(-100), bias=bias)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    assert loss == 0
    assert not any(grad.any() for grad in grads)


def test_rows_past_which_nothing_is_read():
    """Whole groups of ignored rows between valid ones, with NaN in them."""
    hidden, weight, targets, bias = make_inputs(700, 16, 40)
    targets[100:650] = -100
    with torch.no_grad():
        hidden[0, targets[:, 0] == -100] = torch.nan
    loss = multi_token_cross_entropy(hidden, weight, targets, bias=bias)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    valid = targets[:, 0] != -100
    inputs = hidden.detach()[:, valid].requires_grad_(), weight, targets[valid], bias
    want = loop(*inputs)
    assert_close(loss, want)
    expected = torch.autograd.grad(want, (inputs[0], weight, bias))
    assert not grads[0][:, ~valid].any()
    for grad, ref in zip((grads[0][:, valid], *grads[1:]), expected, strict=True):
        assert_close(grad, ref)


@pytest.mark.parametrize("memory", ["auto", "minimal"])
@pytest.mark.parametrize("classes", [700, 5000])
def test_bits_do_not_depend_on_the_number_of_threads(classes, memory):
    hidden, weight, targets, bias = make_inputs(500, 40, classes, steps=2)

    def run() -> list[Tensor]:
        loss = multi_token_cross_entropy(hidden, weight, targets, bias=bias, memory=memory)
        return [loss, *torch.autograd.grad(loss, (hidden, weight, bias))]

    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 2):
            torch.set_num_threads(number)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("classes", "share"), [(4096, 8), (32_768, 16)])
def test_peak_memory_beyond_inputs_and_gradients(classes, share):
    rows, width = 4096, 32
    hidden, weight, targets, _ = make_inputs(rows, width, classes)
    hidden, weight = hidden.detach()[0].requires_grad_(), weight.detach().requires_grad_()

    def step() -> None:
        torch.autograd.grad(multi_token_cross_entropy(hidden, weight, targets), (hidden, weight))

    beyond = peak_bytes(step, torch.device("cpu")) - hidden.nbytes - weight.nbytes
    assert beyond < 4 * rows * classes / share
