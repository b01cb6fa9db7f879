"""Every address that interpreted kernels read or write is checked: out-of-bounds accesses without a GPU.

A launch gets copies of the storages that its tensors lie in, far apart in one arena. Triton's interpreter makes an
array of addresses for each load and store; those of the active lanes must be inside one of the storages. A GPU allows
accesses in the same page or in the neighbouring tensor, and reads something else; here each is an error that names the
kernel and the nearest tensor.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor

# Between two storages, and before and after them. No kernel's offsets are wrong by more, except at random.
GAP = 2**16


class Region(NamedTuple):
    """The copy of one storage: the addresses `start ... end - 1`."""

    name: str  # of the kernel's argument
    start: int
    end: int
    storage: torch.UntypedStorage  # the caller's


class Arena:
    """Copies of the storages of a launch's tensors."""

    def __init__(self, tensors: list[tuple[str, Tensor]]) -> None:
        storages: dict[int, tuple[str, torch.UntypedStorage]] = {}
        for name, x in tensors:
            storage = x.untyped_storage()
            storages.setdefault(storage.data_ptr(), (name, storage))
        size = GAP + sum(_padded(storage.nbytes()) + GAP for _, storage in storages.values())
        self.memory = torch.full((size,), 0xFF, dtype=torch.uint8)
        self.regions: dict[int, Region] = {}  # by the address of the caller's storage
        start = GAP
        for address, (name, storage) in storages.items():
            end = start + storage.nbytes()
            if end > start:
                self.memory[start:end] = _bytes_of(storage)
            self.regions[address] = Region(name, self.memory.data_ptr() + start, self.memory.data_ptr() + end, storage)
            start += _padded(storage.nbytes()) + GAP

    def copy_of(self, x: Tensor) -> Tensor:
        """The tensor in the arena."""
        region = self.regions[x.untyped_storage().data_ptr()]
        offset = (region.start - self.memory.data_ptr()) // x.itemsize + x.storage_offset()
        copy = torch.empty(0, dtype=x.dtype)
        return copy.set_(self.memory.untyped_storage(), offset, x.size(), x.stride())

    def copy_back(self) -> None:
        for _, start, end, storage in self.regions.values():
            if end > start:
                first = start - self.memory.data_ptr()
                _bytes_of(storage).copy_(self.memory[first : first + end - start])

    def check(self, addresses: np.ndarray, itemsize: int, access: str) -> None:
        """All in one storage, since a kernel's pointers come from one argument."""
        lowest, highest = int(addresses.min()), int(addresses.max()) + itemsize
        if any(start <= lowest and highest <= end for _, start, end, _ in self.regions.values()):
            return
        nearest = min(
            self.regions.values(), key=lambda region: max(region.start - lowest, highest - region.end), default=None
        )
        if nearest is None:
            raise AssertionError(f"{access} of a launch without tensors")
        raise AssertionError(
            f"{access} outside {nearest.name}: bytes {lowest - nearest.start} to {highest - nearest.start} of "
            f"{nearest.end - nearest.start}"
        )


def _padded(size: int) -> int:
    """Copies begin on 64-byte boundaries, as torch's storages do."""
    return -(-size // 64) * 64


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _tensors_in(name: str, argument: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of an argument of a kernel, also those in tuples and with another element type."""
    if isinstance(argument, tuple):
        fields = getattr(argument, "_fields", range(len(argument)))
        for field, x in zip(fields, argument, strict=True):
            yield from _tensors_in(f"{name}.{field}", x)
    elif hasattr(argument, "data_ptr"):
        yield name, interpreter._unwrap_tensor(argument)


def _in_arena(argument: Any, arena: Arena) -> Any:
    if isinstance(argument, tuple):
        return interpreter._tuple_create(argument, [_in_arena(x, arena) for x in argument])
    if not hasattr(argument, "data_ptr"):
        return argument
    copy = arena.copy_of(interpreter._unwrap_tensor(argument))
    return interpreter._rewrap_tensor(copy, original_tensor=argument)


@contextmanager
def checked_accesses() -> Iterator[Counter[str]]:
    """Check every access of the kernels in the block; yields the number of launches of each kernel.

    Raises:
        triton.runtime.errors.InterpreterError: an access is outside the storages of the launch.
    """
    launches: Counter[str] = Counter()
    arenas: list[Arena] = []  # of the launch that runs

    def to_arena(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        launches[self.fn.__name__] += 1
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        arena = Arena([found for name, argument in named.items() for found in _tensors_in(name, argument)])
        arenas.append(arena)
        return [_in_arena(x, arena) for x in args], {name: _in_arena(x, arena) for name, x in kwargs.items()}

    def from_arena(self: Any, *_: Any) -> None:
        arenas.pop().copy_back()

    def check(ptrs: Any, mask: Any, access: str) -> None:
        active = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)]
        if active.size > 0:
            arenas[-1].check(active, ptrs.get_element_ty().primitive_bitwidth // 8 or 1, access)

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask, "load")
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(ptrs, mask, "store")
        return store(self, ptrs, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", to_arena)
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", from_arena)
        patch.setattr(builder, "create_masked_load", checked_load)
        patch.setattr(builder, "create_masked_store", checked_store)
        yield launches
