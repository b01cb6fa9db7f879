"""Checks of what modules and models are given, beside those of the ops; their errors name the argument."""

from collections.abc import Iterable, Mapping, Set
from typing import Any

from stamp_kernels.packed import PackedBatch

__all__ = ["as_pairs", "as_tuple", "check_packed"]


def check_packed(name: str, value: object) -> None:
    """Raises:
    ValueError: value is not a PackedBatch.
    """
    if not isinstance(value, PackedBatch):
        raise ValueError(f"{name} must be a PackedBatch, got {type(value).__name__}")


def as_tuple(name: str, value: Any, of: str) -> tuple[Any, ...]:
    """The elements of a list, tuple or array, in order; `of` says what they are.

    Raises:
        ValueError: value is something else, such as a number, a string, or a set or mapping, whose order says nothing.
    """
    if isinstance(value, str | Mapping | Set) or not isinstance(value, Iterable):
        raise ValueError(f"{name} must be a sequence of {of}, got {value!r}")
    return tuple(value)


def as_pairs(name: str, value: Any, of: str) -> tuple[tuple[Any, Any], ...]:
    """The elements of a sequence of pairs; `of` says what they are.

    Raises:
        ValueError: value is something else.
    """
    pairs = as_tuple(name, value, of)
    if not all(isinstance(pair, Iterable) and len(tuple(pair)) == 2 for pair in pairs):
        raise ValueError(f"{name} must be a sequence of {of}, got {value!r}")
    return tuple((first, second) for first, second in pairs)
