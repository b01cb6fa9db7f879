"""A call of the package as data: it can be changed, made, and printed as code."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

import stamp_kernels

_MAX_LITERALS = 40  # elements of an integer tensor that a snippet writes out


@dataclasses.dataclass(frozen=True)
class Call:
    """`path(**arguments)`, or `on.path(**arguments)` where `on` is a call that gives the object.

    Attributes:
        path: dotted, from `stamp_kernels` or `torch` on, or the name of a method; "" calls the object itself.
        positional: arguments of a raw op, in the order of its schema, instead of `arguments`.
    """

    path: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    on: "Call | None" = None
    positional: tuple[Any, ...] = ()

    def replace(self, **arguments: Any) -> "Call":
        return dataclasses.replace(self, arguments=self.arguments | arguments)

    def function(self) -> Any:
        if self.on is not None:
            made = self.on.make()
            return getattr(made, self.path) if self.path else made
        root, *names = self.path.split(".")
        return functools.reduce(getattr, names, {"stamp_kernels": stamp_kernels, "torch": torch}[root])

    def make(self) -> Any:
        return self.function()(*self.positional, **self.arguments)

    def snippet(self) -> str:
        """Code that makes the call. Shapes, strides, dtypes and small integers are exact; other contents are random."""
        on = "" if self.on is None else self.on.snippet() + ("." if self.path else "")
        values = [
            *(_code(value) for value in self.positional),
            *(f"{name}={_code(value)}" for name, value in self.arguments.items()),
        ]
        return f"{on}{self.path}(\n" + "".join(f"    {value},\n" for value in values) + ")"


def _code(value: Any) -> str:
    if isinstance(value, Tensor):
        return _tensor_code(value)
    if isinstance(value, Call):
        return value.snippet()
    if isinstance(value, list):
        return "[" + ", ".join(map(_code, value)) + "]"
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        if fields is not None:
            named = ", ".join(f"{name}={_code(x)}" for name, x in zip(fields, value, strict=True))
            return f"stamp_kernels.{type(value).__name__}({named})"
        return "(" + "".join(_code(x) + ", " for x in value) + ")"
    if dataclasses.is_dataclass(value):
        named = ", ".join(f"{f.name}={_code(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"stamp_kernels.{type(value).__name__}({named})"
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return f"float('{value}')"
    return repr(value)


def _tensor_code(x: Tensor) -> str:
    if x.is_nested:
        return f"torch.nested.nested_tensor_from_jagged({_code(x.values())}, {_code(x.offsets())})"
    shape, dtype = list(x.shape), x.dtype
    if x.device.type == "meta":
        return f"torch.empty({shape}, dtype={dtype}, device='meta')"
    if x.untyped_storage().size() == 0 and x.numel() > 0:
        return f"empty_storage({shape}, {dtype})"
    if x.numel() == 0:
        code = f"torch.empty({shape}, dtype={dtype})"
    elif dtype == torch.bool:
        code = f"torch.rand({shape}) < 0.5"
        if x.numel() <= _MAX_LITERALS:
            code = f"torch.tensor({x.tolist()}, dtype=torch.bool)"
    elif not (x.is_floating_point() or x.is_complex()):
        code = f"torch.tensor({x.tolist()}, dtype={dtype})"
        if x.numel() > _MAX_LITERALS:
            code = f"torch.randint({int(x.min())}, {int(x.max())} + 1, {shape}, dtype={dtype})"
    elif x.numel() <= 1 and not x.is_complex():
        code = f"torch.tensor({_code(x.tolist())}, dtype={dtype})"
    else:
        code = f"torch.randn({shape}).to({dtype})"
    if not x.is_contiguous():
        code = f"with_strides({code}, {list(x.stride())})"
    return code + (".requires_grad_()" if x.requires_grad else "")


# What the snippets need beside torch and the package.
PRELUDE = """import torch
import stamp_kernels


def with_strides(x, strides):
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


def empty_storage(shape, dtype):
    x = torch.empty(shape, dtype=dtype)
    x.untyped_storage().resize_(0)
    return x

"""
