"""gather_tokens against index_select and its gradient; what it refuses, opcheck and torch.compile."""

import doctest
import math
import re

import pytest
import torch
from devices import every_device
from pruning_cases import STRIDED, expected_rows, random_tensor, selection_of
from ragged import BATCHES, RaggedBatch
from torch import Tensor

from stamp_kernels.ops.pruning import gather
from stamp_kernels.ops.pruning.gather import gather_tokens
from stamp_kernels.ops.pruning.selection import select_tokens

RAGGED = BATCHES["ragged"]
T = RAGGED.total


@pytest.mark.core
@pytest.mark.parametrize("name", BATCHES)
@every_device
def test_all_dtypes_and_shapes(device, name):
    selection = selection_of(BATCHES[name], device)
    total = selection.total_source
    x = [
        random_tensor((total, *shape), dtype, device)
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.float64)
        for shape in ((), (1,), (3,), (2, 5), (16,), (0,), (4, 0, 2))
    ]
    for tensor, y in zip(x, gather_tokens(x, selection), strict=True):
        assert y.dtype == tensor.dtype
        assert torch.equal(y, expected_rows(tensor, selection))


@pytest.mark.parametrize("row_bytes", [1, 2, 3, 4, 6, 8, 12, 16, 24, 100, 128, 1000, 4096, 16384])
@every_device
def test_rows_of_any_width(device, row_bytes):
    selection = selection_of(BATCHES["long_among_short"], device)
    x = torch.randint(0, 256, (selection.total_source, row_bytes), dtype=torch.uint8, device=device)
    assert torch.equal(gather_tokens(x, selection), expected_rows(x, selection))
    # Rows that start at any byte of memory
    shifted = torch.empty(x.numel() + 1, dtype=torch.uint8, device=device)[1:].view_as(x).copy_(x)
    assert torch.equal(gather_tokens(shifted, selection), expected_rows(x, selection))


@pytest.mark.parametrize("layout", STRIDED)
@every_device
def test_strided_tensors_and_their_gradients(device, layout):
    selection = selection_of(BATCHES["ragged"], device)
    base = torch.randn(selection.total_source, 8, dtype=torch.float64, device=device)
    leaf, leaf_expected = base.clone().requires_grad_(), base.clone().requires_grad_()
    y, expected = (
        gather_tokens(STRIDED[layout](leaf), selection),
        expected_rows(STRIDED[layout](leaf_expected), selection),
    )
    assert torch.equal(y, expected)
    grad = torch.randn_like(expected)
    y.backward(STRIDED["transposed"](grad) if grad.dim() == 2 else grad)
    expected.backward(grad)
    assert torch.equal(leaf.grad, leaf_expected.grad)


@pytest.mark.core
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@every_device
def test_gradient_is_that_of_index_select(device, dtype, name):
    selection = selection_of(BATCHES[name], device)
    x = random_tensor((selection.total_source, 3, 2), dtype, device).requires_grad_()
    x_expected = x.detach().clone().requires_grad_()
    y, expected = gather_tokens(x, selection), expected_rows(x_expected, selection)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(x.grad, x_expected.grad)


@every_device
def test_dropped_rows_and_tail_rows_leak_nothing(device):
    selection = selection_of(BATCHES["ragged"], device)
    dropped = selection.inverse < 0
    x = torch.randn(selection.total_source, 3, device=device)
    x[dropped] = math.nan
    x.requires_grad_()
    y = gather_tokens(x, selection)
    is_tail = selection.indices < 0
    assert is_tail.sum() == 2
    assert not y.isnan().any()
    assert (y[is_tail] == 0).all()
    grad = torch.ones_like(y)
    grad[is_tail] = math.nan
    y.backward(grad)
    assert torch.equal(x.grad, (~dropped).float().unsqueeze(1).expand(-1, 3))


@every_device
def test_tail_rows_take_the_fill_value(device, backend):
    """Of every dtype; one value for all tensors, or one for each."""
    selection = selection_of(BATCHES["ragged"], device)
    is_tail = selection.indices < 0
    fills = {torch.int64: -100, torch.uint8: 255, torch.bool: True, torch.bfloat16: -math.inf, torch.float64: 0.5}
    x = [random_tensor((RAGGED.total, *shape), dtype, device) for dtype in fills for shape in ((), (3,), (2, 0))]
    values = [fills[tensor.dtype] for tensor in x]
    for tensor, value, y in zip(x, values, gather_tokens(x, selection, fill_value=values), strict=True):
        expected = expected_rows(tensor, selection)
        expected[is_tail] = value
        assert torch.equal(y, expected) and y.dtype == tensor.dtype
        assert torch.equal(gather_tokens(tensor, selection, fill_value=value), expected)
    ones = gather_tokens(x, selection, fill_value=1)
    assert all((y[is_tail] == 1).all() for y in ones)


@every_device
def test_fill_value_has_no_gradient(device, backend):
    selection = selection_of(BATCHES["ragged"], device)
    x = torch.randn(RAGGED.total, 3, device=device, requires_grad=True)
    y = gather_tokens([torch.arange(RAGGED.total, device=device), x], selection, fill_value=[-100, 7.5])[1]
    grad = torch.randn_like(y)
    grad[selection.indices < 0] = math.nan
    y.backward(grad)
    expected = torch.zeros_like(x)
    for kept_row, row in enumerate(selection.indices.tolist()):
        if row >= 0:
            expected[row] = grad[kept_row]
    assert torch.equal(x.grad, expected)


@every_device
def test_more_tensors_than_one_launch_takes(device):
    selection = selection_of(BATCHES["ragged"], device)
    x = [torch.randn(selection.total_source, 1 + i % 7, device=device, requires_grad=i % 3 == 0) for i in range(150)]
    y = gather_tokens(x, selection)
    sum(i * tensor.sum() for i, tensor in enumerate(y)).backward()
    kept = (selection.inverse >= 0).float().unsqueeze(1)
    for i, (tensor, result) in enumerate(zip(x, y, strict=True)):
        assert torch.equal(result, expected_rows(tensor, selection))
        assert result.requires_grad == tensor.requires_grad
        assert tensor.grad is None if i % 3 else torch.equal(tensor.grad, i * kept.expand_as(tensor))


def test_gradient_reaches_only_what_was_used():
    selection = selection_of(BATCHES["ragged"])
    used, unused = (torch.randn(selection.total_source, 2, requires_grad=True) for _ in range(2))
    positions = torch.arange(selection.total_source)
    gather_tokens([positions, used, unused], selection)[1].sum().backward()
    assert used.grad is not None
    assert unused.grad is None


def test_one_tensor_in_one_tensor_out():
    selection = selection_of(BATCHES["ragged"])
    x = torch.randn(selection.total_source, 2)
    (from_list,) = gather_tokens([x], selection)
    assert torch.equal(gather_tokens(x, selection), from_list)


@pytest.mark.parametrize("name", BATCHES)
def test_gradcheck(name):
    selection = selection_of(BATCHES[name])
    x = torch.randn(selection.total_source, 2, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(selection.total_source, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: tuple(gather_tokens(list(x), selection)), (x, scale))


def test_thread_count_does_not_change_results():
    batch = RaggedBatch(tuple(torch.randint(0, 60, (300,)).tolist()), tail=5)
    importance = torch.randint(0, 9, (batch.total,)).float()
    x = torch.randn(batch.total, 64)

    def run() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        selection = select_tokens(importance, batch.cu_seqlens, batch.max_seqlen, keep_ratio=1 / 3)
        y = gather_tokens(leaf, selection)
        (y * y).sum().backward()
        return [selection.indices, selection.cu_seqlens, selection.inverse, y.detach(), leaf.grad]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(2)
        together = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# The dispatcher and torch.compile


@pytest.mark.parametrize("name", ["ragged", "no_sequences"])
def test_opcheck(name):
    batch, ops = BATCHES[name], torch.ops.stamp
    selection = selection_of(batch)
    x = [torch.randn(batch.total, 3), torch.arange(batch.total)]
    torch.library.opcheck(ops.gather_tokens_forward.default, (x, selection.indices))
    grads = gather_tokens(x, selection)
    torch.library.opcheck(ops.gather_tokens_backward.default, (grads, selection.inverse))


def test_compiled_with_one_tensor_twice():
    selection = select_tokens(torch.rand(6), torch.tensor([0, 6], dtype=torch.int32), 6, keep_ratio=0.5)
    x = torch.randn(6, 2, requires_grad=True)

    def gather(x):
        return gather_tokens([x, x], selection)

    first, second = torch.compile(gather, fullgraph=True, backend="aot_eager")(x)
    (first + 2 * second).sum().backward()
    assert torch.equal(first, x[selection.indices]) and torch.equal(second, first)
    assert torch.equal(x.grad, 3.0 * (selection.inverse >= 0)[:, None].expand(6, 2))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_compiled_without_gradients(count):
    selection = selection_of(BATCHES["ragged"])
    x = [torch.randn(RAGGED.total, 2) for _ in range(count)]
    compiled = torch.compile(gather_tokens, fullgraph=True, backend="aot_eager")
    for y, tensor in zip(compiled(x, selection), x, strict=True):
        assert torch.equal(y, expected_rows(tensor, selection))


# Refusals


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([], "x must be a tensor or a non-empty list of tensors, got an empty list"),
        (torch.zeros(3, 2), f"x must have {T} rows (selection.total_source), got shape [3, 2]"),
        ([torch.zeros(T), torch.tensor(1.0)], f"x[1] must have {T} rows (selection.total_source), got shape []"),
        ([torch.zeros(T), 3], "x[1] must be a tensor, got int"),
        (None, "x must be a tensor or a non-empty list of tensors, got NoneType"),
    ],
)
def test_names_the_bad_argument(x, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gather_tokens(x, selection_of(RAGGED))


@pytest.mark.parametrize(
    ("x", "fill_value", "message"),
    [
        (torch.zeros(T), "0", "fill_value must be a number, got str"),
        (torch.zeros(T), [1.0], "fill_value must be a number, got list"),
        (torch.zeros(T), torch.tensor(1.0), "fill_value must be a number, got Tensor"),
        (torch.zeros(T), 1e39, "fill_value must be at most 3.4028234663852886e+38 in magnitude for a tensor of"),
        (torch.zeros(T).half(), -1e5, "fill_value must be at most 65504.0 in magnitude for a tensor of torch.float16"),
        (torch.zeros(T).byte(), -100, "fill_value must be an integer from 0 to 255 for a tensor of torch.uint8, got"),
        (torch.zeros(T).long(), 1.5, "for a tensor of torch.int64, got 1.5"),
        (torch.zeros(T).long(), 2**63, "fill_value must be an integer from -9223372036854775808 to"),
        (torch.zeros(T).bool(), -100, "fill_value must be False or True for a tensor of torch.bool, got -100"),
        ([torch.zeros(T)] * 2, [1.0], "fill_value must be a number, or one for each of the 2 tensors, got [1.0]"),
        ([torch.zeros(T)] * 2, [1.0, None], "fill_value[1] must be a number, got NoneType"),
        ([torch.zeros(T), torch.zeros(T).bool()], -100, "fill_value must be False or True for a tensor of"),
    ],
)
def test_names_the_bad_fill_value(x, fill_value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gather_tokens(x, selection_of(RAGGED), fill_value=fill_value)


def test_example():
    assert doctest.testmod(gather, extraglobs={"select_tokens": select_tokens}).failed == 0


def test_checks_the_selection():
    selection = selection_of(RAGGED)
    x = torch.zeros(T, 2)
    with pytest.raises(ValueError, match=r"selection\.indices must have dtype torch\.int64, got torch\.int32"):
        gather_tokens(x, selection._replace(indices=selection.indices.int()))
    with pytest.raises(ValueError, match=rf"selection\.inverse must have shape \[{T}\], got \[{T - 1}\]"):
        gather_tokens(x, selection._replace(inverse=selection.inverse[1:]))
    with pytest.raises(RuntimeError, match=rf"indices\[0\] is {T}, but only -1 \(none\) to {T - 1} are allowed"):
        gather_tokens(x, selection._replace(indices=selection.indices.clamp(min=0) + T))
    with pytest.raises(RuntimeError, match=r"indices\[0\] is -2"):
        gather_tokens(x, selection._replace(indices=torch.full_like(selection.indices, -2)))


@pytest.mark.gpu
def test_devices_must_agree():
    with pytest.raises(ValueError, match="x must be on cuda:0, got cpu"):
        gather_tokens(torch.zeros(T, 2), selection_of(RAGGED, "cuda"))


def test_raw_op_refuses_two_dimensional_indices():
    with pytest.raises(RuntimeError, match="indices must have one dimension, got 2"):
        torch.ops.stamp.gather_tokens_forward([torch.rand(3, 2)], torch.zeros(2, 2, dtype=torch.int64))
