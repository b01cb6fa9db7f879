"""Which backend serves the public functions: the kernels, or the plain PyTorch reference."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

_BACKENDS = ("auto", "reference")


def _checked(name: str, source: str) -> str:
    if name not in _BACKENDS:
        raise ValueError(f"{source} must be one of {_BACKENDS}, got {name!r}")
    return name


# A plain global rather than a ContextVar, which would break torch.compile(fullgraph=True).
_backend = _checked(os.environ.get("STAMP_KERNELS_BACKEND", "auto"), "the environment variable STAMP_KERNELS_BACKEND")


@contextmanager
def use_backend(name: Literal["auto", "reference"]) -> Iterator[None]:
    """Choose what serves the public functions inside a `with` block.

    Args:
        name: `"reference"` for the differentiable plain PyTorch code of `stamp_kernels.reference`, on any device, for
            debugging; `"auto"` for the registered ops. The environment variable `STAMP_KERNELS_BACKEND` sets the
            default for the process.

    The choice is per process, not per thread.

    Raises:
        ValueError: `name` is neither.
    """
    global _backend
    previous = _backend
    _backend = _checked(name, "use_backend: name")
    try:
        yield
    finally:
        _backend = previous


def reference_is_forced() -> bool:
    return _backend == "reference"
