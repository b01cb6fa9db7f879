"""Workloads small enough for the interpreter and two cores: the same calls, options and outputs."""

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from workloads import CrossEntropy, Workload

_MAX_TOKENS = 4  # one item of 4 codes
_MAX_SEQUENCES = 2
_MAX_ROWS = 6
_MAX_WIDTH = 32
_CLASSES = 8


def rehearsed(workloads: Iterable[Workload], dtype: torch.dtype) -> list[Workload]:
    """The workloads, shrunk.

    The slow interpreter serves fp16, so there workloads that differ only in their names and lengths run once.
    """
    small = [shrunk(workload) for workload in workloads]
    if dtype != torch.float16:
        return small
    return list({_without_lengths(workload): workload for workload in small}.values())


def _without_lengths(workload: Workload) -> Workload:
    """What the interpreter runs: one kernel serves all lengths up to _MAX_TOKENS."""
    ignored: dict[str, Any] = {"name": ""}
    if hasattr(workload, "lengths"):
        ignored["lengths"] = ()
    return replace(workload, **ignored)


def shrunk(workload: Workload) -> Workload:
    """The workload with few short sequences, few rows and classes, and narrow states."""
    small: dict[str, Any] = {}
    for field in fields(workload):
        value = getattr(workload, field.name)
        if field.name in ("lengths", "lengths_q") and value is not None:
            small[field.name] = tuple(min(n, _MAX_TOKENS) for n in value[:_MAX_SEQUENCES])
        elif field.name == "rows":
            small["rows"] = min(value, _MAX_ROWS)
        elif field.name in ("width", "head_dim"):
            small[field.name] = min(value, _MAX_WIDTH)
        elif field.name in ("num_heads", "num_heads_kv"):
            small[field.name] = 1
    if isinstance(workload, CrossEntropy):
        small["vocabulary"] = _CLASSES * workload.steps
    elif getattr(workload, "num_heads_kv", None) != getattr(workload, "num_heads", None):
        small["num_heads"] = 2
    return replace(workload, **small)
