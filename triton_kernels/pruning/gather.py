"""Gather: the rows of a selection, and their gradients, which are a gather too.

    forward   y[j] = x[indices[j]], 0 where indices[j] is -1         indices [T'] int64, -1 on tail rows
    backward  dx[t] = dy[inverse[t]], 0 where inverse[t] is -1       inverse [T] int32, -1 where token t was dropped

Every row is written once, so there is no pass that fills with zeros, and there are no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stamp_kernels.common.contents import contents_are_checked
from stamp_kernels.triton_kernels.device import launch_grid
from stamp_kernels.triton_kernels.launching import launch
from stamp_kernels.triton_kernels.pruning.configs import gather_config
from stamp_kernels.triton_kernels.rows import ceil_div


@triton.jit(do_not_specialize=["num_rows", "stride_row"])
def stamp_gather_rows_kernel(
    y_ptr,  # [num_rows, WIDTH]
    x_ptr,  # [N, WIDTH]
    row_map_ptr,  # int64 or int32 [num_rows]
    stride_row,  # of x
    num_rows,
    WIDTH: tl.constexpr,
    STRIDE_DIVISOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of ROWS x COLUMNS of `y[j] = x[row_map[j]]`, 0 where the map is -1.

    x and y are integers as wide as their alignment allows. A stride that is a multiple of STRIDE_DIVISOR lets a thread
    move 16 bytes at once.

    Grid: [ceil(num_rows / ROWS), ceil(WIDTH / COLUMNS)].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    exists = row < num_rows
    x_row = tl.load(row_map_ptr + row, mask=exists, other=-1).to(tl.int64)
    stride = tl.multiple_of(tl.cast(stride_row, tl.int64), STRIDE_DIVISOR)
    in_row = column < WIDTH
    value = tl.load(x_ptr + (x_row * stride)[:, None] + column, mask=(x_row >= 0)[:, None] & in_row, other=0)
    y_pointers = y_ptr + (row.to(tl.int64) * WIDTH)[:, None] + column
    tl.store(y_pointers, value, mask=exists[:, None] & in_row)  # [ROWS, COLUMNS]


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def _rows_are_contiguous(x: Tensor) -> bool:
    """Whether every row is one piece of memory; the rows may be apart."""
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def gather_rows(x: Tensor, row_map: Tensor) -> Tensor:
    """`y[j] = x[row_map[j]]`, 0 where the map is -1. One launch.

    Args:
        x: `[N, ...]`, any dtype.
        row_map: int64 or int32 `[M]`, contiguous, rows of x or -1.
    """
    x = x if _rows_are_contiguous(x) else x.contiguous()
    y = x.new_empty(row_map.shape[0], *x.shape[1:])
    if y.numel() == 0:
        return y
    config = gather_config(
        y.numel() // y.shape[0] * y.element_size(), x.stride(0) * x.element_size(), x.data_ptr() | y.data_ptr()
    )
    integers = _INTEGERS[config.element_size]
    grid = launch_grid(ceil_div(y.shape[0], config.rows), ceil_div(config.width, config.columns))
    launch(
        stamp_gather_rows_kernel,
        grid,
        y_ptr=triton.reinterpret(y, integers),
        x_ptr=triton.reinterpret(x, integers),
        row_map_ptr=row_map,
        stride_row=config.stride,
        num_rows=y.shape[0],
        WIDTH=config.width,
        STRIDE_DIVISOR=config.stride_divisor,
        ROWS=config.rows,
        COLUMNS=config.columns,
        num_warps=4,
    )
    return y


def _gather_list(x: list[Tensor], row_map: Tensor, name: str) -> list[Tensor]:
    if row_map.dim() != 1:
        raise RuntimeError(f"{name} must have one dimension, got {row_map.dim()}")
    num_rows = x[0].shape[0]
    for tensor in x:
        if tensor.shape[0] != num_rows:
            raise RuntimeError(f"all tensors must have the same number of rows, got {tensor.shape[0]} and {num_rows}")
    if contents_are_checked(row_map.device) and row_map.numel() > 0:
        low, high = int(row_map.min()), int(row_map.max())
        if low < -1 or high >= num_rows:
            raise RuntimeError(f"{name} must be -1 (none) to {num_rows - 1}, got {low} to {high}")
    row_map = row_map.contiguous()
    return [gather_rows(tensor, row_map) for tensor in x]


def gather_tokens_forward(x: list[Tensor], indices: Tensor) -> list[Tensor]:
    """The op `stamp::gather_tokens_forward`: the rows `indices`, int64 `[T']`, of tensors `[T, ...]` of any dtype."""
    return _gather_list(x, indices, "indices")


def gather_tokens_backward(grad: list[Tensor], inverse: Tensor) -> list[Tensor]:
    """The op `stamp::gather_tokens_backward`: row t is row `inverse[t]`, int32 `[T]`, of `grad`, or 0."""
    return _gather_list(grad, inverse, "inverse")
