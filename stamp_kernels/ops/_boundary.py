"""Checks of the arguments of the ops that Python serves, for what their kernels rely on.

Anyone can call `torch.ops.stamp.*` with anything. The public functions check what users pass; these checks stand
before each Triton launcher and reference kernel, in the words of the compiled library (`csrc/cpu/core/checks.h`). They
read shapes, strides, dtypes, storages and plain numbers, never contents, and take about a microsecond for each tensor.

Each raises a RuntimeError that names the argument, what it was and what is allowed.
"""

import operator
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int32, torch.int64)
INT32 = (torch.int32,)
INT64 = (torch.int64,)
BOOL = (torch.bool,)

_MAX_INT32 = 2**31 - 1

Shape = tuple[int | str, ...]


def refuse(message: str) -> NoReturn:
    raise RuntimeError(message)


def check_tensor(name: str, x: Tensor, shape: Shape, dtypes: Sequence[torch.dtype], device: torch.device) -> None:
    """A tensor of the given sizes, with memory for them. A word in `shape` (for the message) allows any size."""
    sizes = x.shape
    if sizes != shape:
        check_sizes(name, sizes, shape)
    if x.dtype not in dtypes:
        refuse(f"{name} must have dtype {', '.join(map(_name_of, dtypes))}, got {_name_of(x.dtype)}")
    if x.device != device:
        refuse(f"{name} must be on {device}, got {x.device}")
    # What `check_storage` finds, in less time
    if not (x.is_contiguous() and x.storage_offset() == 0 and x.nbytes <= x.untyped_storage().nbytes()):
        check_storage(name, x)


def check_sizes(name: str, sizes: Sequence[int], shape: Shape) -> None:
    """Sizes as `shape` has them."""
    if len(sizes) == len(shape):
        for size, allowed in zip(sizes, shape, strict=True):  # a generator for all() would take twice as long
            if size != allowed and not isinstance(allowed, str):
                break
        else:
            return
    refuse(f"{name} must have shape [{', '.join(map(str, shape))}], got {list(sizes)}")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_storage(name: str, x: Tensor) -> None:
    """The storage must hold all elements. One that was resized does not: FSDP frees parameters in this way."""
    if x.numel() == 0:
        return
    strides = x.stride()
    last = x.storage_offset() + sum(map(operator.mul, x.shape, strides)) - sum(strides)
    needed_bytes, storage_bytes = (last + 1) * x.itemsize, x.untyped_storage().nbytes()
    if needed_bytes > storage_bytes:
        refuse(
            f"{name} must have memory for shape {list(x.shape)}: its storage needs {needed_bytes} bytes and has "
            f"{storage_bytes} (was it resized or freed?)"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, device: torch.device) -> None:
    """Offsets: int32 `[num_sequences + 1]`."""
    sizes = cu_seqlens.shape
    check_tensor(name, cu_seqlens, sizes if len(sizes) == 1 else ("num_sequences + 1",), INT32, device)
    if sizes[0] < 1:
        refuse(f"{name} must have num_sequences + 1 >= 1 entries, got 0")


def check_at_least(name: str, value: int, minimum: int) -> None:
    if value < minimum:
        refuse(f"{name} must be at least {minimum}, got {value}")


def check_num_rows(name: str, num_rows: int) -> None:
    """Kernels count packed rows in int32."""
    if num_rows > _MAX_INT32:
        refuse(f"{name} must have at most {_MAX_INT32} rows, got {num_rows}")
