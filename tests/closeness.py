"""Results are judged by the relative norm of their error against a float64 reference."""

import torch
from torch import Tensor

# Bounds of ||out - ref|| / ||ref||, by the dtype of the tested computation.
RELATIVE_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def relative_error(out: Tensor, ref: Tensor) -> float:
    """`||out - ref|| / ||ref||` in float64; 0 if they are equal, infinite if shapes or NaNs differ."""
    if out.shape != ref.shape:
        return float("inf")
    difference = torch.linalg.vector_norm(out.double() - ref.double()).item()
    norm = torch.linalg.vector_norm(ref.double()).item()
    if difference == 0.0:
        return 0.0
    return difference / norm if norm > 0 and difference == difference else float("inf")


def assert_close(out: Tensor, ref: Tensor, dtype: torch.dtype | None = None) -> None:
    """`out` equals the float64 (or more exact) `ref` to the bound of `dtype` (out's own where None)."""
    bound = RELATIVE_ERROR[dtype or out.dtype]
    error = relative_error(out, ref)
    assert error < bound, (
        f"relative error {error:.3g}, allowed {bound:.3g} (shapes {list(out.shape)}, {list(ref.shape)})"
    )
