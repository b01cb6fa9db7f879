"""Argument checks of the public functions: shapes, dtypes, devices and plain values, but not the contents of tensors.

Each raises a ValueError that names the argument, what it was and what is allowed. None needs a sync.
"""

import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import SupportsIndex, cast

import torch
from torch import Tensor

# isinstance with a union builds it at every call.
_INTS = (int, torch.SymInt)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)

FLOATING_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INT32 = (torch.int32,)
INTEGERS = (torch.int32, torch.int64)


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")


def check_range(name: str, value: float, low: float, high: float = float("inf"), *, below_high: bool = False) -> float:
    """`low <= value <= high`, or `low <= value < high`. Returns the value, of Python's type where it was NumPy's."""
    if not isinstance(value, _NUMBERS):
        if not isinstance(value, numbers.Real):
            raise ValueError(f"{name} must be a number (not a tensor), got {type(value).__name__}")
        value = float(value)
    if not (low <= value and (value < high if below_high else value <= high)):
        interval = f"[{low}, {high}{')' if below_high or high == float('inf') else ']'}"
        raise ValueError(f"{name} must be in {interval}, got {value}")
    return value


def check_tensor(
    name: str,
    x: Tensor,
    *,
    shape: Sequence[int | str | None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> None:
    """A tensor of the given rank and sizes. A word (for the message) or None in `shape` allows any size."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    if shape is not None and not _sizes_match(x.shape, shape):
        wanted_shape = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
        raise ValueError(f"{name} must have shape {wanted_shape}, got {list(x.shape)}")
    if dtypes is not None and x.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must have dtype {allowed}, got {x.dtype}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def _sizes_match(sizes: Sequence[int], shape: Sequence[int | str | None]) -> bool:
    if len(sizes) != len(shape):
        return False
    for size, allowed_size in zip(sizes, shape, strict=True):  # a generator for all() would take twice as long
        if type(allowed_size) is not str and allowed_size is not None and size != allowed_size:
            return False
    return True


def checked_cu_seqlens(name: str, cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """Offsets, int32 or int64 `[batch + 1]`. Returns them in int32, the only dtype that the ops take.

    Nothing is read. A number that int32 does not hold becomes the nearest that it holds. That is past the rows of any
    tensor, so the op refuses it where contents are checked; wrapped around it could look like an offset.
    """
    # The conditions are those of check_tensor, which knows what to say.
    if not (
        isinstance(cu_seqlens, Tensor)
        and cu_seqlens.dim() == 1
        and cu_seqlens.dtype in INTEGERS
        and cu_seqlens.device == device
    ):
        check_tensor(name, cu_seqlens, shape=("batch + 1",), dtypes=INTEGERS, device=device)
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have batch + 1 >= 1 entries, got shape {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype == torch.int32:
        return cu_seqlens
    return cu_seqlens.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def check_count(name: str, value: SupportsIndex | None, minimum: int = 0) -> int:
    """An int of at least `minimum`. Returns it, of Python's type where it was NumPy's."""
    if type(value) is int and minimum <= value < 2**63:
        return value
    count = check_int(name, value)
    check_range(name, count, minimum)
    return count


def check_int(name: str, value: SupportsIndex | None) -> int:
    """An int of 64 bits. Returns it, of Python's type where it was NumPy's."""
    if not isinstance(value, _INTS):
        if not isinstance(value, numbers.Integral):
            raise ValueError(f"{name} must be an int (not a tensor), got {type(value).__name__}")
        value = operator.index(value)
    if isinstance(value, bool):
        raise ValueError(f"{name} must be an int (not a tensor), got bool")
    number = cast(int, value)
    check_range(name, number, -(2**63), 2**63 - 1)
    return number


def check_vocab_ranges(
    vocab_ranges: Iterable[tuple[int, int]], num_classes: int | None = None
) -> tuple[tuple[int, int], ...]:
    """Pairs (start, end) with `0 <= start < end <= num_classes`. Returns them, of Python's ints."""
    try:
        if isinstance(vocab_ranges, Mapping | Set):
            raise TypeError("its order says nothing")
        ranges = tuple((operator.index(start), operator.index(end)) for start, end in vocab_ranges)
    except (TypeError, ValueError):
        raise ValueError(f"vocab_ranges must be pairs (start, end) of ints, got {vocab_ranges}") from None
    for start, end in ranges:
        if not (0 <= start < end and (num_classes is None or end <= num_classes)):
            limit = "" if num_classes is None else f" <= {num_classes} (rows of weight)"
            raise ValueError(f"vocab_ranges must satisfy 0 <= start < end{limit}, got {(start, end)}")
    return ranges


def check_flags(**flags: bool) -> None:
    for name, flag in flags.items():
        if flag is not True and flag is not False:
            raise ValueError(f"{name} must be True or False, got {flag!r}")
