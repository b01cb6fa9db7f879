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
from stamp_kernels.triton_kernels.pruning.configs import MAX_TENSORS, GatherConfig, RowMemory, gather_config
from stamp_kernels.triton_kernels.rows import ceil_div


@triton.jit
def _load_tile(x_ptr, x_row, stride_row, WIDTH: tl.constexpr, STRIDE_DIVISOR: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of the rows `x_row`, 0 where it is -1."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    stride = tl.multiple_of(tl.cast(stride_row, tl.int64), STRIDE_DIVISOR)
    mask = (x_row >= 0)[:, None] & (column < WIDTH)
    return tl.load(x_ptr + (x_row * stride)[:, None] + column, mask=mask, other=0)  # [ROWS, COLUMNS]


@triton.jit
def _store_tile(y_ptr, row, exists, value, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    y_pointers = y_ptr + (row.to(tl.int64) * WIDTH)[:, None] + column
    tl.store(y_pointers, value, mask=exists[:, None] & (column < WIDTH))  # [ROWS, COLUMNS]


@triton.jit(do_not_specialize=["num_rows"])
def stamp_gather_rows_kernel(
    y,  # for each tensor a pointer to [num_rows, width]
    x,  # for each tensor a pointer to [N, width]
    stride_row,  # of each x
    row_map_ptr,  # int64 or int32 [num_rows]
    num_rows,
    WIDTHS: tl.constexpr,
    STRIDE_DIVISORS: tl.constexpr,
    COLUMNS: tl.constexpr,  # of each tensor's tile
    ROWS: tl.constexpr,
):
    """A tile of ROWS x COLUMNS of `y[j] = x[row_map[j]]`, 0 where the map is -1, of each tensor.

    x and y are integers as wide as their alignment allows. A stride that is a multiple of its STRIDE_DIVISOR lets a
    thread move 16 bytes at once. The loads of all tensors come before the first store, so they wait for memory at the
    same time.

    Grid: [ceil(num_rows / ROWS), max(ceil(WIDTHS / COLUMNS))].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    x_row = tl.load(row_map_ptr + row, mask=exists, other=-1).to(tl.int64)
    values = ()
    for i in tl.static_range(len(WIDTHS)):
        values += (_load_tile(x[i], x_row, stride_row[i], WIDTHS[i], STRIDE_DIVISORS[i], COLUMNS[i]),)
    for i in tl.static_range(len(WIDTHS)):
        _store_tile(y[i], row, exists, values[i], WIDTHS[i], COLUMNS[i])


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


def _rows_are_contiguous(x: Tensor) -> bool:
    """Whether every row is one piece of memory; the rows may be apart."""
    if x.is_contiguous():
        return True
    expected = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def gather_rows(x: list[Tensor], row_map: Tensor) -> list[Tensor]:
    """`y[j] = x[row_map[j]]`, 0 where the map is -1, for each tensor of x. One launch for every MAX_TENSORS tensors.

    Args:
        x: tensors `[N, ...]` of any dtypes.
        row_map: int64 or int32 `[num_rows]`, contiguous, rows of x or -1.
    """
    num_rows = row_map.shape[0]
    results = []
    copies = []  # (y, x), neither of them empty
    memory = []
    for tensor in x:
        tensor = tensor if _rows_are_contiguous(tensor) else tensor.contiguous()
        y = tensor.new_empty(num_rows, *tensor.shape[1:])
        results.append(y)
        if (size := y.numel()) > 0:
            copies.append((y, tensor))
            element_size = y.element_size()
            alignment = (y.data_ptr() | tensor.data_ptr()) & 15
            memory.append(RowMemory(size // num_rows * element_size, tensor.stride(0) * element_size, alignment))
    for first in range(0, len(copies), MAX_TENSORS):
        last = first + MAX_TENSORS
        _launch_gather(copies[first:last], row_map, gather_config(tuple(memory[first:last])))
    return results


def _launch_gather(copies: list[tuple[Tensor, Tensor]], row_map: Tensor, config: GatherConfig) -> None:
    integers = [_INTEGERS[size] for size in config.element_sizes]
    num_rows = row_map.shape[0]
    launch(
        stamp_gather_rows_kernel,
        launch_grid(ceil_div(num_rows, config.rows), config.column_blocks),
        y=tuple([triton.reinterpret(y, dtype) for (y, _), dtype in zip(copies, integers, strict=True)]),
        x=tuple([triton.reinterpret(x, dtype) for (_, x), dtype in zip(copies, integers, strict=True)]),
        stride_row=config.strides,
        row_map_ptr=row_map,
        num_rows=num_rows,
        WIDTHS=config.widths,
        STRIDE_DIVISORS=config.stride_divisors,
        COLUMNS=config.columns,
        ROWS=config.rows,
        num_warps=4,
    )


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
    return gather_rows(x, row_map)


def gather_tokens_forward(x: list[Tensor], indices: Tensor) -> list[Tensor]:
    """The op `stamp::gather_tokens_forward`: the rows `indices`, int64 `[T']`, of tensors `[T, ...]` of any dtype."""
    return _gather_list(x, indices, "indices")


def gather_tokens_backward(grad: list[Tensor], inverse: Tensor) -> list[Tensor]:
    """The op `stamp::gather_tokens_backward`: row t is row `inverse[t]`, int32 `[T]`, of `grad`, or 0."""
    return _gather_list(grad, inverse, "inverse")
