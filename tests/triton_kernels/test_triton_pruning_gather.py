"""The gather kernel, interpreted where there is no GPU, against the reference: exactly equal."""

import pytest
import torch
from pruning_cases import STRIDED, random_tensor
from torch import Tensor

pytest.importorskip("triton")

import stamp_kernels.reference.pruning as reference
import stamp_kernels.triton_kernels.pruning.gather as kernels
from stamp_kernels.triton_kernels.pruning.configs import MAX_TENSORS, RowMemory, gather_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def row_map(rows: int, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Rows in any order, most of them more than once, and -1."""
    return torch.randint(-1, rows, (num_rows,)).to(dtype)


def assert_gathers_as_the_reference(x: list[Tensor], indices: Tensor) -> None:
    gather = kernels.gather_tokens_forward if indices.dtype == torch.int64 else kernels.gather_tokens_backward
    got = gather([tensor.to(DEVICE) for tensor in x], indices.to(DEVICE))
    assert len(got) == len(x)
    for tensor, y in zip(x, got, strict=True):
        want = reference.gather_rows(tensor.cpu(), indices)
        assert y.dtype == tensor.dtype and y.is_contiguous()
        assert torch.equal(y.cpu(), want)


both_maps = pytest.mark.parametrize("map_dtype", [torch.int64, torch.int32], ids=["forward", "backward"])


@both_maps
def test_all_dtypes_and_shapes(map_dtype):
    dtypes = (torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float32, torch.float64)
    x = [
        random_tensor((31, *shape), dtype, "cpu")
        for dtype in (*dtypes, torch.complex64, torch.complex128)
        for shape in ((), (1,), (3,), (2, 5), (0,), (4, 0, 2))
    ]
    assert_gathers_as_the_reference(x, row_map(31, 17, map_dtype))


@both_maps
@pytest.mark.parametrize("row_bytes", [1, 2, 3, 4, 6, 8, 12, 16, 24, 100, 128, 1000, 4096, 10000])
def test_rows_of_any_width(row_bytes, map_dtype):
    x = torch.randint(0, 256, (40, row_bytes), dtype=torch.uint8, device=DEVICE)
    indices = row_map(40, 53, map_dtype)
    assert_gathers_as_the_reference([x], indices)
    # Rows that begin at any byte
    for offset in (1, 2, 4, 8):
        shifted = torch.empty(x.numel() + offset, dtype=torch.uint8, device=DEVICE)[offset:].view_as(x).copy_(x)
        assert_gathers_as_the_reference([shifted], indices)


@pytest.mark.parametrize("layout", STRIDED)
def test_strided_rows(layout):
    x = torch.randn(12, 8, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        view = STRIDED[layout](x.to(dtype))
        assert_gathers_as_the_reference([view], row_map(view.shape[0], 9, torch.int64))


def test_more_rows_than_a_program_moves():
    assert_gathers_as_the_reference([torch.randn(700, 2), torch.randn(700, 40)], row_map(700, 600, torch.int32))


@pytest.mark.parametrize("num_tensors", [1, MAX_TENSORS, MAX_TENSORS + 1])
def test_any_number_of_tensors(num_tensors):
    """Some of them empty, and of widths that take several columns of programs."""
    x = [torch.randn(12, *shape) for shape in ((3000,), (), (0,), (5,), (7, 3), (1,), (2048,))[:num_tensors]]
    assert_gathers_as_the_reference([*x, torch.zeros(12, 0)], row_map(12, 9, torch.int64))


@both_maps
@pytest.mark.parametrize(("rows", "num_rows"), [(0, 0), (0, 5), (5, 0), (1, 1)])
def test_without_rows(rows, num_rows, map_dtype):
    indices = torch.full((num_rows,), -1, dtype=map_dtype)
    assert_gathers_as_the_reference([torch.randn(rows, 3), torch.randn(rows)], indices)


def test_rows_outside_the_map_are_not_read():
    x = torch.randn(6, 4)
    x[3] = torch.nan
    (y,) = kernels.gather_tokens_forward([x.to(DEVICE)], torch.tensor([0, -1, 5], device=DEVICE))
    assert torch.equal(y.cpu(), torch.stack([x[0], torch.zeros(4), x[5]]))


@pytest.mark.parametrize(
    ("row_bytes", "stride_bytes", "address", "element_size", "divisor"),
    [
        (256, 256, 0, 8, 2),
        (48, 48, 1024, 8, 2),
        (24, 24, 0, 8, 1),
        (256, 264, 0, 8, 1),
        (256, 256, 8, 8, 1),
        (256, 256, 4, 4, 1),
        (100, 100, 0, 4, 1),
        (6, 8, 0, 2, 1),
        (8, 8, 1, 1, 1),
        (256, 0, 0, 8, 2),
    ],
)
def test_widest_access(row_bytes, stride_bytes, address, element_size, divisor):
    config = gather_config((RowMemory(row_bytes, stride_bytes, address),))
    assert (config.element_sizes, config.stride_divisors) == ((element_size,), (divisor,))
    assert config.widths[0] * element_size == row_bytes and config.strides[0] * element_size == stride_bytes


def test_widest_tensor_limits_the_rows():
    wide, narrow = RowMemory(2048, 2048, 0), RowMemory(8, 8, 0)
    assert gather_config((narrow,)).rows == 256
    assert gather_config((wide,)).rows == gather_config((wide, narrow)).rows == 4
    assert gather_config((narrow, wide)).widths == (1, 256)


@pytest.mark.parametrize(
    ("x", "indices", "message"),
    [
        ([torch.zeros(3, 2)], torch.tensor([0, 3]), r"indices must be -1 \(none\) to 2, got 0 to 3"),
        ([torch.zeros(3, 2)], torch.tensor([-2, 1]), r"indices must be -1 \(none\) to 2, got -2 to 1"),
        ([torch.zeros(3, 2)], torch.tensor([[0]]), "indices must have one dimension, got 2"),
        ([torch.zeros(3), torch.zeros(4)], torch.tensor([0]), "all tensors must have the same number of rows, got 4"),
    ],
)
def test_indices_outside_the_rows_are_refused(monkeypatch, x, indices, message):
    monkeypatch.setenv("STAMP_KERNELS_CHECK", "1")
    with pytest.raises(RuntimeError, match=message):
        kernels.gather_tokens_forward([tensor.to(DEVICE) for tensor in x], indices.to(DEVICE))
