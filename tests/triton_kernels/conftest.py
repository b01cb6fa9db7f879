"""What kernels promise the compiler is checked wherever they are interpreted."""

from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def promises_are_kept(monkeypatch):
    """Fail where `tl.multiple_of` promises what is not so.

    Compiled code relies on it, and faults or reads something else. The interpreter ignores it, so right results show
    nothing. As the compiler understands the promise: along each dimension it is about the first element of each run of
    neighbours, and pointers count in bytes.
    """
    if torch.cuda.is_available():
        return
    pytest.importorskip("triton")
    from triton.runtime.interpreter import TensorHandle

    note = TensorHandle.set_attr

    def check(handle: TensorHandle, key: str, values: list[int]) -> None:
        if key == "tt.divisibility":
            step = handle.get_element_ty().primitive_bitwidth // 8 if handle.dtype.is_ptr() else 1
            for axis, value in enumerate(values):
                assert begins_of_runs_are_divisible(handle.data, axis, step, value), (handle.data, values)
        note(handle, key, values)

    monkeypatch.setattr(TensorHandle, "set_attr", check)


def begins_of_runs_are_divisible(data: Any, axis: int, step: int, value: int) -> bool:
    lines = np.moveaxis(np.atleast_1d(data), axis, -1)
    begins = np.ones(lines.shape, dtype=bool)
    begins[..., 1:] = np.diff(lines) != step
    return bool((lines[begins] % value == 0).all())
