"""Integers from users' lists, NumPy arrays and tensors. NumPy is not imported: its arrays describe themselves."""

from array import array
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def integers_of(name: str, x: Any, *, allow_bool: bool = False) -> Tensor:
    """`x` as int64 `[n]` on the CPU. An int64 tensor is returned unchanged.

    Args:
        name: names x in error messages.
        x: a tensor, a NumPy array, or any other iterable except a mapping or a set.
        allow_bool: accept bool tensors and arrays too, as 0 and 1.

    Raises:
        ValueError: x is not one-dimensional, does not hold integers of at most 64 bits, or is not on the CPU.
    """
    if isinstance(x, Mapping):
        raise ValueError(
            f"{name} must be a one-dimensional sequence of int64 integers: got {type(x).__name__}, a mapping, of which "
            "only the keys would be read"
        )
    if isinstance(x, set | frozenset):
        raise ValueError(
            f"{name} must be a one-dimensional sequence of int64 integers: got {type(x).__name__}, which has no order "
            "and drops repeated numbers"
        )
    if isinstance(x, Tensor):
        if x.dim() != 1:
            raise ValueError(f"{name} must be one-dimensional, got shape {list(x.shape)}")
        is_bool = x.dtype == torch.bool
        if x.is_floating_point() or x.is_complex() or (is_bool and not allow_bool):
            raise ValueError(f"{name} must have an integer dtype, got {x.dtype}")
        if x.device.type != "cpu":
            raise ValueError(f"{name} must be on cpu, got {x.device}")
        return _checked_int64(name, x.to(torch.int64), is_uint64=x.dtype == torch.uint64)
    if hasattr(x, "__array_interface__"):
        if x.ndim != 1:
            raise ValueError(f"{name} must be one-dimensional, got shape {list(x.shape)}")
        if x.dtype.kind not in ("biu" if allow_bool else "iu"):
            raise ValueError(f"{name} must have an integer dtype, got {x.dtype}")
        # The copy is writable, in native byte order and without negative strides, as torch requires.
        return _checked_int64(
            name, torch.from_numpy(x.astype("int64", order="C")), is_uint64=x.dtype.kind == "u" and x.itemsize == 8
        )
    try:
        # array() is several times faster than torch.tensor(), which would also truncate floats. list() is for bytes,
        # which array() would read as machine integers.
        buffer = array("q", list(x))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{name} must be a one-dimensional sequence of int64 integers: {_what_is_wrong(x)}") from error
    # frombuffer refuses an empty buffer.
    return torch.frombuffer(buffer, dtype=torch.int64) if buffer else torch.zeros(0, dtype=torch.int64, device="cpu")


def _checked_int64(name: str, x: Tensor, *, is_uint64: bool) -> Tensor:
    """`x`, unless numbers above 2**63 - 1 became negative when it was uint64."""
    if is_uint64 and bool((x < 0).any()):
        index = int((x < 0).nonzero()[0])
        raise ValueError(f"{name} must hold int64 integers, got {int(x[index]) + 2**64} at index {index}")
    return x


def _what_is_wrong(x: Any) -> str:
    if not hasattr(x, "__iter__"):
        return f"got {type(x).__name__}"
    for index, item in enumerate(x):
        if not hasattr(item, "__index__"):
            return f"got {type(item).__name__} at index {index}"
    return f"got numbers from {min(x)} to {max(x)}"
