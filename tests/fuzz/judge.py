"""Whether a result is what an oracle says."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from closeness import RELATIVE_ERROR
from torch import Tensor

from fuzz.calls import Call


@dataclasses.dataclass(frozen=True)
class Near:
    """A float64 value that a result must be near to.

    Attributes:
        value: the truth.
        magnitude: the same sums over absolute values, of the same shape. Where terms cancel, the error of a sum is
            proportional to its magnitude and not to its value. None: nothing cancels.
        dtype: of the result.
        precision: the dtype whose rounding decides how near. None: `dtype`.
    """

    value: Tensor
    dtype: torch.dtype
    magnitude: Tensor | None = None
    precision: torch.dtype | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A valid call and what it gives.

    Attributes:
        call: the call of the public function.
        run: makes the call, and its backward where there is one. Returns the parts of the result by name.
        want: the truth for each part: Near, or a tensor or value that must be equal.
    """

    call: Call
    run: Callable[[], Mapping[str, Any]]
    want: Callable[[], Mapping[str, Any]]


def mistakes(case: Case) -> list[str]:
    """One line for each part of the result that is wrong."""
    result, want = case.run(), case.want()
    if result.keys() != want.keys():
        return [f"parts {sorted(result)} instead of {sorted(want)}"]
    found = ((name, _difference(result[name], want[name])) for name in want)
    return [f"{name}: {what}" for name, what in found if what is not None]


def _difference(result: Any, want: Any) -> str | None:
    if isinstance(want, Near):
        return _distance(result, want)
    if not isinstance(want, Tensor):
        return None if result == want else f"{result!r} instead of {want!r}"
    if not isinstance(result, Tensor) or result.dtype != want.dtype or result.shape != want.shape:
        return f"{_kind(result)} instead of {_kind(want)}"
    different = (result != want) & ((result == result) | (want == want))  # NaN equals NaN
    return f"{int(different.sum())} of {want.numel()} elements differ" if bool(different.any()) else None


def _kind(x: Any) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else repr(x)


def _distance(result: Any, want: Near) -> str | None:
    """The error by its norm, over the whole tensor and over each row (the first dimension)."""
    value = want.value
    if not isinstance(result, Tensor) or result.dtype != want.dtype or result.shape != value.shape:
        return f"{_kind(result)} instead of {want.dtype} {list(value.shape)}"
    result = result.detach().double()
    finite = value.isfinite()
    if not torch.equal(result.isfinite(), finite):
        return f"{int((result.isfinite() != finite).sum())} of {value.numel()} elements are finite or not, wrongly"
    if not torch.equal(result[~finite].nan_to_num(), value[~finite].nan_to_num()):
        return "other infinities"
    zeros = torch.zeros_like(value)
    value, result = torch.where(finite, value, zeros), torch.where(finite, result, zeros)
    magnitude = value.abs() if want.magnitude is None else torch.where(finite, want.magnitude, zeros)
    bound = max(RELATIVE_ERROR[want.dtype], RELATIVE_ERROR[want.precision or want.dtype])
    # Half a step of the smallest numbers of the dtype, for each element.
    smallest = torch.finfo(want.dtype).smallest_normal * torch.finfo(want.dtype).eps
    norm = torch.linalg.vector_norm
    error, allowed = norm(result - value), bound * max(norm(value), 0.25 * norm(magnitude))
    if error > allowed + smallest * value.numel() ** 0.5:
        return f"error {error:.3g}, allowed {allowed:.3g}, norm {norm(value):.3g}"
    if value.dim() < 2 or value.numel() == 0:
        return None
    error, of_row = (norm(x.flatten(1), dim=1) for x in (result - value, magnitude))
    wrong = error > 4 * bound * of_row + smallest * value[0].numel() ** 0.5
    if bool(wrong.any()):
        row = int(wrong.to(torch.uint8).argmax())
        return f"row {row}: error {error[row]:.3g}, the row's norm is {of_row[row]:.3g}"
    return None
