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


# Plain globals rather than a ContextVar, which torch.compile(fullgraph=True) cannot trace, or thread-local ones, of
# which it does not see the changes.
_backend = _checked(os.environ.get("STAMP_KERNELS_BACKEND", "auto"), "the environment variable STAMP_KERNELS_BACKEND")
_outer: list[tuple[object, str]] = []  # of each open block, outermost first: the block, and the backend around it


@contextmanager
def use_backend(name: Literal["auto", "reference"]) -> Iterator[None]:
    """Choose what serves the public functions inside a `with` block.

    Args:
        name: `"reference"` for the differentiable plain PyTorch code of `stamp_kernels.reference`, on any device, for
            debugging; `"auto"` for the registered ops. The environment variable `STAMP_KERNELS_BACKEND` sets the
            default for the process.

    The choice is per process, not per thread or task, so blocks must end in reverse order.

    Raises:
        ValueError: name is neither.
        RuntimeError: at the end of a block, if one that began after it is still open, in another thread or task. The
            backend is then that of the open block, and when that ends the one before both.
    """
    global _backend
    block, chosen = object(), _checked(name, "use_backend: name")
    _outer.append((block, _backend))
    _backend = chosen
    try:
        yield
    finally:
        _end(block)


def _end(block: object) -> None:
    global _backend
    index = next(i for i, (opened, _) in enumerate(_outer) if opened is block)
    _, before = _outer.pop(index)
    if index == len(_outer):
        _backend = before
        return
    _outer[index] = (_outer[index][0], before)
    raise RuntimeError(
        "a use_backend block ended while one that began later is still open: the choice is per process, so blocks of "
        "several threads or tasks must not overlap"
    )


def reference_is_forced() -> bool:
    return _backend == "reference"
